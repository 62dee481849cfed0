#!/usr/bin/env python3
"""Back up one PostgreSQL database, verify a backup, or list the backups.

A backup is a pair: DATABASE_ENVIRONMENT_TIMESTAMP.dump, written by pg_dump, and the
.metadata.json beside it. It is published only when pg_restore has read the dump back to its
last byte and found in it as many rows of every table as the database held at that moment.

Settings come from the environment, .env.local and .env beside this script, strongest first:
DEV_DB_NAME or DB_NAME names the database. .env.example has every variable.

To restore a backup beside what is there, then to look at it:
  createdb --template=template0 restored && pg_restore --dbname=restored FILE.dump
README.md, "Restore", has every other way.
"""

# Where to look for what:
#   what happens, in order                main, run_creation, create_backup; in it dump_database
#   where a setting comes from            brain_core/config.py; become_libpq_environment
#   why this exit code, and what to do    search the message's words, or ExitCode.NAME; by cause:
#                                         CONNECTION_REMEDIES (a wrong password), SERVER_REMEDIES,
#                                         FILE_REMEDIES (by errno; a full disk: search ENOSPC)
#   what programs are run, and how        tool_environment; search "with Program(", run_pg_restore(
#   can half a file be seen               "The directory": PartialBackup.publish
#   what the server is asked              begin_read_only; the SQL of "The catalog", "The snapshot"
#   how a wait ends                       Background.wait, Program.wait, Session._call; ten minutes
#                                         without movement: Patience, run_pg_restore
#   what verified means                   examine_dump, compare_contents, compare_hash; in a list:
#                                         Status
#   what is removed, and when             PartialBackup: begin, close, publish; retire_backups
#   what a restore will type              "The restore": restore_commands
#   what is printed                       "Reports"; the progress line: Progress

from __future__ import annotations

import locale
import os
import signal
import sys

if __name__ == "__main__" and sys.version_info < (3, 10):
    version = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"backup_db.py needs Python 3.10 or newer; this is {version} ({sys.executable})")

if __name__ == "__main__":
    if sys.getfilesystemencoding() != "utf-8":
        # Names and passwords are UTF-8 in any locale, as from Python 3.15 on; output is as before.
        os.environ.setdefault("PYTHONIOENCODING", locale.getpreferredencoding(False))
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until `catch_signals` there is nothing to clean up: Ctrl-C needs no traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import enum
import errno
import fcntl
import functools
import json
import re
import resource
import select
import shlex
import stat
import subprocess
import threading
import time
import typing
from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    from brain_core.config import DatabaseConfig, Retention

# Records are NamedTuples: dataclasses import inspect, which takes 10 ms of every start.

SCRIPT_DIR = Path(__file__).resolve().parent
DEFAULT_OUTPUT_DIR = SCRIPT_DIR / "db" / "backups"
BACKUP_DB_VERSION = "2026.12"
METADATA_VERSION = 1  # a reader refuses a higher one
# Of the server, and of pg_dump: before it there is no pg_stat_progress_copy.
OLDEST_MAJOR = 14

# Time limits, in seconds.
STALL_SECONDS = 600  # without any movement, before a wait is given up
ANSWER_SECONDS = 10  # extra time for the server to report that its own lock_timeout ended a query
LOCK_RETRY_SECONDS = 1.0  # between two attempts; no lock is held meanwhile
FREED_SECONDS = 2.0  # for the server to free the connection of a pg_dump that has ended
CONNECT_LIMIT_FACTOR = 3  # times libpq's limit for each host: a name may have several addresses
CONNECT_LIMIT_SECONDS = 5  # added to that
TOOL_SECONDS = 30  # for a tool to report its version
STOP_SECONDS = 1.0  # for a program to end on SIGTERM, before SIGKILL
ORPHAN_SECONDS = 1  # for the server to notice that this process was killed, and to end its query
TICK_SECONDS = 0.1  # between two checks during any wait
STILL_SECONDS = 1.0  # for the dump and a count, before another session looks who is in the way
REDRAW_SECONDS = 0.2  # between two states of the progress line

# No wait of ours while we hold locks is longer: PostgreSQL's deadlock_timeout is 1 s by default.
LOCK_TIMEOUT_MS = 500
DUMP_LOCK_TIMEOUT = "10s"
DUMP_ATTEMPTS = 3

PIPE_BYTES = 1024 * 1024  # lets pg_restore run ahead
READ_BYTES = 128 * 1024  # take a third less time than 1 MiB, for which malloc maps memory each time
HASH_BLOCK_BYTES = 1024 * 1024
STDERR_TAIL_BYTES = 64 * 1024
METADATA_MAX_BYTES = 256 * 1024 * 1024

# The least that a dump needs: a share of the last backup or, without one, of the database.
NEED_OF_LAST_BACKUP = 0.8
NEED_OF_DATABASE = 0.03
EXPECTED_OF_DATABASE = 0.2  # for the progress line
DUMP_SHARE = 0.8  # of the whole run, for the progress line; the rest is the read-back
FULL_DISK_BYTES = 64 * 1024
# The space on the disk that is kept free for others: the lesser of these two.
RESERVE_BYTES = 256 * 1024 * 1024
RESERVE_SHARE = 0.02

CLOCK_TOLERANCE = timedelta(days=1)  # a backup that is dated later is from the future
RECENT_BACKUPS = 7  # in which the tables' rows are compared with those of a new one
MOST_NAMES = 10  # in a message, which gives the number of the others


# -- Failures: the exit codes, and what is raised -------------------------------------------------


class ExitCode(enum.IntEnum):
    """The contract's exit codes and categories; 0 is success, and a signal ends a run by itself."""

    category: str

    def __new__(cls, code: int, category: str) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_, member.category = code, category
        return member

    GENERAL = 1, "General error"
    CONFIGURATION = 2, "Configuration error"
    CONNECTION = 3, "Database connection error"
    PERMISSION = 4, "Permission error"
    DISK_SPACE = 5, "Disk space error"
    TOOL = 6, "Tool error"
    CREATION = 7, "Backup creation error"
    VERIFICATION = 8, "Verification error"


class Failure(Exception):
    """What a user, a server or a disk can cause: `detail` says what happened, in the words of the
    tool that met it, `steps` what to do next, and `report` what was found before."""

    def __init__(
        self, code: ExitCode, detail: str, *steps: str, report: Sequence[str] = ()
    ) -> None:
        self.code = code
        self.detail = detail
        self.steps = steps
        self.report = report


class ServerError(Exception):
    """What the server, or libpq, answered instead of a result; libpq has no SQLSTATE of its own."""

    def __init__(self, text: str, sqlstate: str | None = None) -> None:
        # "FATAL:  ", in any language: libpq puts two spaces there.
        self.text = printable_lines(re.sub(r"(?m)(^|: )(\w+):  (?=\S)", r"\1\2: ", text))
        self.sqlstate = sqlstate


class ConnectionLost(ServerError):
    """The connection has ended, or no answer came in time; only `close` and `connect` are left."""


class NoAnswer(ConnectionLost):
    """There was no answer in time: there is no point in asking the same server anything else."""


class ArchiveError(Exception):
    """A dump that pg_restore cannot read, or that does not read as pg_dump writes it."""


class ChecksumDiffers(Exception):
    """The hash of a dump is known to differ: what is in it need not be read any further."""


class LetGo(Exception):
    """pg_dump waits for a lock, and somebody waits for ours: every lock has to go, at once."""

    def __init__(self, blocker: Blocker | None) -> None:
        self.blocker = blocker


class SnapshotLost(Exception):
    """A name has changed under the snapshot, which no lock prevents: begin again."""


class DumpFailed(Exception):
    """pg_dump ended without a dump: its exit status, and its own words."""

    def __init__(self, status: int, stderr_text: str) -> None:
        self.status = status
        self.stderr_text = stderr_text


# The errnos of a machine, or of a limit on this process, that has no room left.
OUT_OF_RESOURCES = {errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE}

# What follows the last ": " of a step is to be typed: shell commands, SQL (it ends in ";"), an
# option (--…), or a setting. The remedies stand in the section of what fails.

AGAIN = "Run the backup again; earlier backups are untouched"
CALM_HOUR = "Run the backup again, at an hour without migrations"
SERVER_LOG = "See the server's log for the cause"


def fill_steps(text: str, **values: str) -> list[str]:
    """The lines of a remedy, with their places filled. Every value is quoted for the shell or for
    SQL before, and printable. A line that comes out empty is no step."""
    steps = (line.format_map(values) for line in text.strip().splitlines())
    return [step for step in steps if step]


# -- Waiting: signals, calls in a thread, the one clock, the progress line ------------------------

TERMINATING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)


class Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        self.number = number
        self.outcome = "No new backup; earlier backups are untouched."


noted_signals: list[int] = []


def catch_signals() -> None:
    """Note terminating signals; one that was ignored at the start (nohup) stays ignored."""
    for number in TERMINATING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: noted_signals.append(number))


def check_signals() -> None:
    """Raise Interrupted for the first terminating signal that has come. Called on each tick of a
    wait, and before each step that cannot be undone; never by a clean-up. Nothing is interrupted
    between two calls: no fork or rename needs a guard."""
    if noted_signals:
        raise Interrupted(noted_signals[0])


def die_by_signal(number: int) -> int:
    """End this process by the signal itself, so that a shell or cron sees what happened. A
    container's first process survives that: there it returns the status a shell would report."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGQUIT: memory with a password in it
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


T = TypeVar("T")


class Background(threading.Thread, Generic[T]):
    """A call that may take long, in a daemon thread. The main thread waits for it, hears signals,
    shows progress and checks deadlines. (concurrent.futures would join a stuck thread at exit.)"""

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._error: BaseException | None = None
        try:
            self.start()
        except RuntimeError as error:  # "can't start new thread"
            raise MemoryError(str(error)) from None

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised by `wait`
            self._error = error

    def wait(
        self, on_tick: Callable[[], object] = lambda: None, seconds: float = float("inf")
    ) -> T:
        """The result of the call. Raises its error; Interrupted; what `on_tick` raises; and
        TimeoutError when `seconds` have passed, while the call goes on."""
        started = time.monotonic()
        self.join(TICK_SECONDS)
        while self.is_alive():
            check_signals()
            on_tick()
            if time.monotonic() - started > seconds:
                raise TimeoutError
            self.join(TICK_SECONDS)
        if self._error is not None:
            raise self._error
        return self._result


class Patience:
    """The clock of a wait: STALL_SECONDS without movement end it."""

    def __init__(self) -> None:
        self._seen: dict[str, object] = {}
        self._moved_at = time.monotonic()

    def has_moved(self, **seen: object) -> bool:
        """Record the values; return True if any changed."""
        if seen.items() <= self._seen.items():  # all as they were
            return False
        self._seen |= seen
        self._moved_at = time.monotonic()
        return True

    @property
    def still_seconds(self) -> float:
        return time.monotonic() - self._moved_at

    def check(self, what: str, blocker: Blocker | None = None) -> None:
        """Raise Failure where nothing has moved for too long; `what` names what is waited for."""
        if self.still_seconds > STALL_SECONDS:
            raise stalled_failure(what, blocker)


def pause(progress: Progress, waits_for: str, seconds: float = LOCK_RETRY_SECONDS) -> None:
    Background(lambda: time.sleep(seconds)).wait(lambda: progress.show(f"Waiting: {waits_for}"))


class Progress:
    """One line on a terminal's stderr, redrawn in place; silent where stderr is no terminal."""

    backs_up = ""  # what, and where, in a run that makes a backup: for main's last line

    def __init__(self, stream: IO[str] | None) -> None:
        self._terminal = stream if stream is not None and stream.isatty() else None
        self._started = time.monotonic()
        self._drawn_at = 0.0
        self._fraction = 0.0
        self._first: tuple[float, float] | None = None  # the first fraction, and when it was known

    def clear(self) -> None:
        self._draw([])

    def finish(self) -> None:
        """At the end of a run that had such a line, say how long it took."""
        if self._drawn_at:
            write_lines(self._terminal, [f"Took {round(time.monotonic() - self._started)} s."])

    def show(self, phase: str, fraction: float | None = None, *details: str) -> None:
        """Draw the line, a few times a second at most. `fraction` is that of the whole run; the
        one shown never decreases."""
        now = time.monotonic()
        if now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = now
        parts = [phase]
        if fraction is not None:
            self._fraction = max(self._fraction, min(fraction, 1.0))
            bar = "#" * int(self._fraction * 20)
            parts += [f"[{bar:-<20}]", f"{int(self._fraction * 100):3d} %"]
            # The time before it, such as a wait for a lock, must not count for the time left.
            self._first = self._first or (self._fraction, now)
            if (gained := self._fraction - self._first[0]) > 0.02:
                left = (now - self._first[1]) * (1 - self._fraction) / gained
                parts.append(f"{timedelta(seconds=int(left))} left")
        self._draw([*parts, f"{timedelta(seconds=int(now - self._started))} elapsed", *details])

    def _draw(self, parts: list[str]) -> None:
        if self._terminal is None:
            return
        try:
            if not select.select([], [self._terminal], [], 0)[1]:
                return  # Ctrl-S stopped the terminal; that must not stop the run
            room = (os.get_terminal_size(self._terminal.fileno()).columns or 80) - 1
            while len(line := "  ".join(map(printable, parts))) > room and len(parts) > 1:
                parts.pop()
            self._terminal.write(f"\r{line[:room]}\x1b[K")
            self._terminal.flush()
        except OSError:
            self._terminal = None


# -- Text for people, and names of files ----------------------------------------------------------


def printable(text: str) -> str:
    """`text` on one line: what a terminal would not show as itself is escaped."""

    def escape(c: str) -> str:  # a byte that is not UTF-8 is the surrogate \udcXX
        return c.encode("unicode_escape").decode().replace(r"\udc", r"\x")

    if text.isprintable():  # as nearly all are: a list has thousands
        return text
    return "".join(c if c.isprintable() else escape(c) for c in text)


def printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.strip().replace("\t", "    ").splitlines()))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def list_names(names: Iterable[str], separator: str = ", ", most: int = MOST_NAMES) -> str:
    """The first names, printable, and how many more there are."""
    shown = [printable(name) for name in names]
    if len(shown) > most:
        shown[most:] = [f"and {len(shown) - most} more"]
    return separator.join(shown)


def row_summary(rows: int, tables: int, large_objects: int = 0) -> str:
    """`3727 rows in 4 tables`, and the large objects where there are any."""
    summary = f"{plural(rows, 'row')} in {plural(tables, 'table')}"
    return summary + (f", {plural(large_objects, 'large object')}" if large_objects else "")


def format_size(size_bytes: int) -> str:
    """Units of 1024 with one decimal, as the contract shows them."""
    size, unit = float(size_bytes), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if round(size, 1) >= 1024:
            size, unit = size / 1024, larger
    return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def format_age(seconds: float) -> str:
    """A time span in its largest unit: `3 hours`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return plural(int(seconds // length), unit)
    return plural(max(0, int(seconds)), "second")


def display_path(path: Path) -> str:
    """`path` as the contract shows it: relative where it lies under the working directory."""
    text = str(path)
    with contextlib.suppress(FileNotFoundError):  # the working directory is gone
        text = os.path.abspath(path).removeprefix(f"{os.getcwd()}/")
    return printable(text)


def shell_words(*words: str) -> str:
    """A command as a person can paste it: in every shell, and printable. What a terminal would obey
    or not show is written as `"$(printf 'kun\\302\\240den')"`."""

    def octal(c: str) -> str:
        return "".join(f"\\{byte:03o}" for byte in c.encode("utf-8", "surrogateescape"))

    def quote(word: str) -> str:
        if word.isprintable():
            return shlex.quote(word)
        escaped = "".join(c if c.isalnum() or c in "/._ " else octal(c) for c in word)
        return f"\"$(printf '{escaped}')\""

    return " ".join(map(quote, words))


def list_command(directory: Path) -> str:
    """The command that lists the backups in a directory; if it does not exist, in the usual one."""
    where = ("--output-dir", str(directory)) if os.path.isdir(directory) else ()
    return shell_words("python3", "backup_db.py", "--list", *where)


def verify_command(dump: str) -> str:
    return shell_words("python3", "backup_db.py", "--verify", dump)


def libpq_options(user: str | None = None) -> str:
    """The options by which PostgreSQL's programs reach the database that the PG* variables name."""
    host, port, name = (os.environ[f"PG{key}"] for key in ("HOST", "PORT", "DATABASE"))
    user = user or os.environ.get("PGUSER") or user_name()
    return shell_words("-h", host, "-p", port, "-U", user, "-d", name)


def sql_identifier(name: str, mark: str = '"') -> str:
    """A name quoted for SQL; unprintable characters, such as a newline, are in SQL's escapes."""
    quoted = mark + name.replace(mark, mark * 2) + mark
    if quoted.isprintable():
        return quoted
    return "U&" + re.sub(r"[^ -~]|\\", lambda match: f"\\+{ord(match[0]):06X}", quoted)


def sql_literal(text: str) -> str:
    return sql_identifier(text, mark="'")


DUMP_SUFFIX = ".dump"
METADATA_SUFFIX = ".metadata.json"
PARTIAL_SUFFIX = ".partial"
LOCK_SUFFIX = ".lock"
# A published file's name, as PartialBackup.begin makes it.
FILE_NAME = re.compile(
    r"(?P<prefix>[^.].*?(?:_(?P<environment>dev|prod))?)"
    r"_(?P<date>\d{4}-\d\d-\d\d)T(?P<hour>\d\d)-(?P<minute>\d\d)-(?P<second>\d\d)Z"
    r"\.(?:dump|metadata\.json)",
    re.DOTALL,
)


def file_prefix(database: str, environment: str) -> str:
    """The name of a backup's files up to the timestamp: printable, and valid on FAT and NTFS."""

    def percent(c: str) -> str:  # a byte that is not UTF-8 arrives as a lone surrogate
        return "%" + c.encode(errors="surrogateescape").hex("%").upper()

    encoded = "".join(
        c if c.isprintable() and c not in '/%\\"*:<>?|' and (i or c not in ".-") else percent(c)
        for i, c in enumerate(database)
    )
    ending = "" if encoded.endswith(f"_{environment}") else f"_{environment}"
    return encoded + ending


def iso_timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_iso_timestamp(text: str) -> datetime:
    """The inverse, for more than iso_timestamp writes. Raises ValueError."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def metadata_path(dump: Path) -> Path:
    return dump.with_name(dump.name.removesuffix(DUMP_SUFFIX) + METADATA_SUFFIX)


# -- Metadata -------------------------------------------------------------------------------------


class MetadataError(ValueError):
    """Metadata that is missing, unreadable or ill-typed; the text names the key."""


class NewerMetadata(MetadataError):
    """Metadata that this release would misread."""


def is_utc_time(value: object) -> bool:
    try:
        return iso_timestamp(parse_iso_timestamp(str(value))) == value
    except ValueError:  # a 30th of February
        return False


def predicate_for(annotation: Any) -> Callable[[Any], object]:
    """A function that tells whether a value from JSON fits the annotation of its field. Every int
    is a count, a size or an oid: not negative, within PostgreSQL's bigint."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if type(None) in parts:
        return predicate_for(parts[0])
    if origin is Mapping:
        fits = predicate_for(parts[1])
        return lambda value: isinstance(value, dict) and all(map(fits, value.values()))
    if origin is Sequence:
        fits = predicate_for(parts[0])
        return lambda value: isinstance(value, list) and all(map(fits, value))
    if annotation is int:
        return lambda value: type(value) is int and 0 <= value < 2**63
    return lambda value: annotation is Any or isinstance(value, annotation)


class Series(NamedTuple):
    """What backups have in common that are compared and removed: servers may share a directory."""

    database: str  # as the server has it, which cuts longer names
    environment: str
    server: str | None = None  # system_identifier; None, where a service hides it, fits any

    def matches(self, other: Series) -> bool:
        """Whether it is the same one; an older backup, with no server, counts as ours."""
        may_be_ours = self.server == other.server or None in (self.server, other.server)
        return may_be_ours and self[:2] == other[:2]


def read_metadata_values(path: str) -> dict[str, Any]:
    """The values, the required ones checked. Raises MetadataError, with the key; OSError."""
    status = os.stat(path)  # first: to open a pipe of that name would hang
    if not stat.S_ISREG(status.st_mode) or status.st_size > METADATA_MAX_BYTES:
        raise MetadataError("it is no metadata file")
    try:
        with open(path, encoding="utf-8") as file:
            values = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"it is not a JSON object: {error}") from None
    if not isinstance(values, dict):
        raise MetadataError("it is not a JSON object")
    version = values.get("metadata_version")
    if type(version) is int and version > METADATA_VERSION:
        release = values.get("backup_db_version", "of an unknown version")
        raise NewerMetadata(f"a newer backup_db.py made this: {release}")
    for key in REQUIRED_KEYS:
        if key not in values or not FITS[key](values[key]):
            raise MetadataError(f'the key "{key}" is missing, or not what it should be')
    return values


class Metadata(NamedTuple):
    """The content of a `.metadata.json`. Only a field with a default may be missing; where its
    value does not fit the annotation, it counts as missing."""

    backup_timestamp: str
    environment: str
    database_name: str
    backup_file: str
    backup_size_bytes: int
    checksum_sha256: str
    table_counts: Mapping[str, int]
    pg_dump_version: str
    postgresql_version: str
    table_oids: Mapping[str, int] | None = None
    partition_of: Mapping[str, str] | None = None
    metadata_version: int = METADATA_VERSION
    backup_db_version: str | None = None
    system_identifier: str | None = None
    database_size_bytes: int | None = None
    compression: str | None = None
    duration_seconds: float | None = None
    large_object_count: int | None = None
    verification: Mapping[str, Any] | None = None
    not_included: Sequence[str] = ()
    encoding: str | None = None
    locale: Mapping[str, str | None] | None = None
    extensions: Mapping[str, str] | None = None
    roles: Sequence[str] | None = None
    role_attributes: Mapping[str, Mapping[str, Any]] | None = None
    settings: Mapping[str, str] | None = None
    tablespaces: Sequence[str] | None = None
    database_tablespace: str | None = None
    restore: Sequence[str] | None = None

    def to_json(self) -> str:
        """The text of the file; a lone surrogate in a name becomes JSON's own escape."""
        text = json.dumps(self._asdict(), indent=2, ensure_ascii=False) + "\n"
        return text.encode(errors="backslashreplace").decode()

    @classmethod
    def read(cls, path: Path) -> Metadata:
        values = read_metadata_values(str(path))
        fitting = {key: value for key, value in values.items() if key in FITS and FITS[key](value)}
        if values.get("table_oids") is not None:  # older backups have none
            oids, keys = fitting.get("table_oids", {}), values["table_counts"].keys()
            if oids.keys() != keys or len({*oids.values()}) < len(keys):
                raise MetadataError('the key "table_oids" is not an oid for each table')
        return cls(**fitting)

    def describes(self, dump: Path) -> bool:
        """Whether the dump still has the name under which it was made."""
        return self.backup_file == dump.name

    @property
    def total_rows(self) -> int:
        return sum(self.table_counts.values())


REQUIRED_KEYS = [key for key in Metadata._fields if key not in Metadata._field_defaults]
FITS = {key: predicate_for(hint) for key, hint in typing.get_type_hints(Metadata).items()} | {
    "backup_timestamp": is_utc_time,
    "checksum_sha256": lambda value: re.fullmatch("[0-9a-f]{64}", str(value)),
}


# -- Programs -------------------------------------------------------------------------------------


class OpenFile(NamedTuple):
    """A file held open: it stays the same file, whatever becomes of its name. A program gets it as
    /dev/fd/N, which is seekable (tested on Linux with 15 to 18; on macOS it shares our offset): 100
    or more, or at least 10, since programs use the lower ones themselves."""

    path: Path
    descriptor: int

    @classmethod
    def open(cls, path: Path, flags: int) -> OpenFile:
        """Open the file; a new one is readable only by its owner. Raises OSError."""
        low = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            most, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # ulimit -n
            return cls(path, fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 100 if most > 128 else 10))
        finally:
            os.close(low)

    @property
    def argument(self) -> str:
        return f"/dev/fd/{self.descriptor}"

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def sync(self) -> None:
        """Write it to the disk and drop it from the page cache: the next reader reads the disk."""
        with with_filename(self.path):
            os.fsync(self.descriptor)
        with contextlib.suppress(AttributeError, OSError):  # not on macOS, nor every kernel
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self.descriptor)


class Program(contextlib.AbstractContextManager["Program"]):
    """A running PostgreSQL tool, in a session of its own, and the tail of its stderr. As a context
    manager it leaves no program behind."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *files: OpenFile,  # that it inherits
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        self.name = Path(argv[0]).name
        self._files = files
        self._tail = b""
        self._stderr, stderr = os.pipe()
        try:
            self._drain = Background(self._read_stderr)  # first: there may be no room for a thread
            self.process = subprocess.Popen(
                argv,
                env=environment,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[file.descriptor for file in files],
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        finally:
            os.close(stderr)

    def _read_stderr(self) -> None:
        with open(self._stderr, "rb", buffering=0) as pipe:
            while block := pipe.read(8192):
                self._tail = (self._tail + block)[-STDERR_TAIL_BYTES:]

    def __exit__(self, *_exception: object) -> None:
        """End it and what it started: by SIGTERM (pg_dump cancels its query), then SIGKILL."""
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
            if self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it just ended
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        self._drain.join(STOP_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def wait(self, seconds: float) -> int | None:
        """The exit status, negative for a signal; None if `seconds` go by. Raises Interrupted."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            check_signals()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(TICK_SECONDS)
        check_signals()
        return self.process.poll()

    @property
    def stderr_text(self) -> str:
        """What the ended program wrote to stderr; if that is nothing, how it failed."""
        self._drain.join(STOP_SECONDS)  # something that it started may hold its stderr open
        text = printable_lines(self._tail.decode("utf-8", "backslashreplace"))
        for file in self._files:
            text = text.replace(file.argument, display_path(file.path))
        status = self.process.returncode or 0
        if status < 0:
            cause = f"signal {-status}: {signal.strsignal(-status)}"
            return f"{text}\n{self.name} was ended by {cause}".lstrip()
        return text or (f"{self.name} ended with exit status {status}" if status else "")


class Tool(NamedTuple):
    path: str
    version: str
    major: int


def tool_environment(*prefixes: str) -> dict[str, str]:
    """This process's environment, in English, without connection settings and secrets; kept is what
    begins with one of the prefixes, and what Debian's wrapper chooses its tools by."""
    kept = ("PGCLUSTER", "PGHOST", "PGPORT", *prefixes)
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(kept) or not name.startswith(("PG", "DB_", "DEV_DB_"))
    } | {"LC_ALL": "C"}


# Where packages put the PostgreSQL tools, for the hint when PATH does not lead there (cron).
TOOL_FOLDERS = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/bin",
    "/opt/homebrew/opt/*/bin",
    "/usr/local/opt/*/bin",
    "/opt/local/lib/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)


def tool_steps(name: str, major: int = 0) -> list[str]:
    """How cron, or a shell, finds the newest of the tools in the usual folders, of that version or
    newer; or what to install."""
    import glob
    import shutil

    tools = []
    for folder in sorted(folder for pattern in TOOL_FOLDERS for folder in glob.glob(pattern)):
        if shutil.which(name, path=folder) not in {None, shutil.which(name)}:
            with contextlib.suppress(Failure):  # it does not run
                tools.append(find_tool(name, folder))
    newest = max(tools, key=lambda tool: tool.major, default=None)
    if newest is None or newest.major < major:
        return install_steps(major)
    folder = os.path.dirname(newest.path)
    # This python3, a virtual environment's, stays the first, unless such a tool is beside it.
    python = os.path.dirname(sys.executable)
    own = [folder, python] if os.path.exists(os.path.join(python, name)) else [python, folder]
    path = ":".join(dict.fromkeys([*own, "/usr/local/bin", "/usr/bin", "/bin"]))
    return [
        f"It is in {folder}. For cron, put this line above yours in the crontab: PATH={path}",
        f'In a shell: export PATH={shell_words(":".join(own))}:"$PATH"',
    ]


# By a system's package manager: what installs the client tools, of a version where it has several.
INSTALL = {
    "apt-get": "sudo apt-get install postgresql-client",
    "dnf": "sudo dnf install postgresql{major}",
    "apk": "apk add postgresql{major}-client",
    "brew": "brew install libpq",
}
# PostgreSQL's own for Debian and Ubuntu (wiki.postgresql.org/wiki/Apt); README.md has Red Hat's.
APT_REPOSITORY = """\
sudo apt-get install -y postgresql-common ca-certificates && \
sudo /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y"""


def install_steps(major: int) -> list[str]:
    """What to install, by this system's own package manager; 0 for any version."""
    import shutil

    folders = "/usr/bin:/sbin:/opt/homebrew/bin:/usr/local/bin"
    manager = next((name for name in INSTALL if shutil.which(name, path=folders)), "apt-get")
    version = f"version {major} or newer" if major else "of the server's version or newer"
    command = INSTALL[manager].format(major=major or "")
    steps = [f"Install PostgreSQL's client tools, {version}: {command}"]
    if major and manager == "apt-get":
        steps.append(f"Where that is older than {major}, first: {APT_REPOSITORY}")
    return steps


def check_version(tool: Tool, major: int, because: str) -> None:
    """Raise Failure where the tool is older than `major`; `because` ends the sentence."""
    if tool.major < major:
        detail = f"{printable(tool.path)} is version {tool.version}, {because}"
        raise Failure(ExitCode.TOOL, detail, *tool_steps(os.path.basename(tool.path), major))


def wrapper_failure(tool: Tool, problem: str, stderr_text: str) -> Failure:
    """A tool that does not reach our file, which it inherits as /dev/fd/N."""
    why = "/dev/fd is missing"  # in a chroot of a rescue system
    steps = ["Mount what it leads to: sudo mount -t proc proc /proc"]
    if os.path.exists("/dev/fd"):
        why = "is it a wrapper that runs on another machine, in a container or by sudo?"
        steps = [
            f"See what it is: file -L {shell_words(tool.path)}",
            *tool_steps(os.path.basename(tool.path), tool.major),
            "Or put the folder of PostgreSQL's own tools first on PATH",
        ]
    detail = f"{printable(tool.path)} {problem}: {why}\n{stderr_text}".rstrip()
    return Failure(ExitCode.TOOL, detail, *steps)


def find_tool(name: str, folder: str | None = None, major: int = 0) -> Tool:
    """The program called `name`, in the folder or on PATH, asked for its version. `major` is only
    for the steps where it is missing: see check_version. Raises Failure."""
    import shutil

    path = shutil.which(name, path=folder) or shutil.which(name)
    if path is None:
        detail = f"{name} not found on PATH ({printable(os.environ.get('PATH', ''))})"
        steps = tool_steps(name, major)
        if blocked := shutil.which(name, mode=os.F_OK):
            detail = f"{printable(blocked)} is on PATH but may not be run by {user_name()}"
            steps = [f"Make it executable: {shell_words('chmod', '+x', blocked)}"]
        raise Failure(ExitCode.TOOL, detail, *steps)
    problem = f"has not answered within {TOOL_SECONDS} seconds"
    try:
        with Program([path, "--version"], tool_environment(), stdout=subprocess.PIPE) as program:
            assert program.process.stdout is not None
            if program.wait(TOOL_SECONDS) is not None:
                # Read once: what a wrapper has started may hold it open.
                output = os.read(program.process.stdout.fileno(), 4096)
                answer = output.decode("utf-8", "backslashreplace")
                # "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
                if version := re.search(r"\) ((\d+)[.\w]*)", answer):
                    return Tool(path, version[1], int(version[2]))
                shown = program.stderr_text or printable(answer.strip()) or "no output"
                problem = f"does not answer with a version: {shown}"
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        problem = f"cannot be run: {error.strerror}"
    raise Failure(
        ExitCode.TOOL,
        f"{printable(path)} --version {problem}",
        f"See what it is: {shell_words(path, '--version')}",
        "Or put PostgreSQL's own tools first on PATH",
    )


class Tools(NamedTuple):
    pg_dump: Tool
    pg_restore: Tool
    compression: str  # that both can do: zstd:3, gzip:4, none

    @property
    def compress_value(self) -> str:
        """The value for `pg_dump --compress`, which before version 16 took only a gzip level."""
        return "0" if self.compression == "none" else re.sub(r"^gzip:(?=\d$)", "", self.compression)


def find_tools(config: DatabaseConfig) -> Tools:
    pg_dump = find_tool("pg_dump")
    because = f"and {OLDEST_MAJOR} is the oldest with which a backup can be verified"
    check_version(pg_dump, OLDEST_MAJOR, because)
    # The one beside it is nearly always built with the same compressions.
    pg_restore = find_tool("pg_restore", os.path.dirname(pg_dump.path))
    check_version(pg_restore, pg_dump.major, f"too old for archives of pg_dump {pg_dump.version}")
    wanted = config.compress or ("zstd:3" if pg_dump.major >= 16 else "gzip:4")
    if wanted.isdigit():
        wanted = "none" if wanted == "0" else f"gzip:{wanted}"
    tools = Tools(pg_dump, pg_restore, wanted)
    if not (refusal := compression_refusal(tools)):
        return tools
    if config.compress:
        raise Failure(
            ExitCode.CONFIGURATION,
            f"BACKUP_COMPRESS is {config.compress!r}, which pg_dump {pg_dump.version} "
            f"does not take:\n{refusal}",
            f"Correct it {config.setting_locations['compress']}",
            "Or leave it out; then zstd:3 is used where pg_dump has it, else gzip:4",
        )
    return tools._replace(compression="gzip:4")


def compression_refusal(tools: Tools) -> str:
    """pg_dump's words where it does not take the compression; nothing where it does."""
    # Version 14 takes any text, and writes uncompressed.
    if tools.pg_dump.major < 16 and not re.fullmatch(r"none|gzip:\d", tools.compression):
        return "before version 16 it has none but gzip, with a level from 1 to 9"
    # pg_dump checks the value before it tries to connect, in vain (tested on 15 to 18).
    options = ("--format=custom", f"--compress={tools.compress_value}", f"--file={os.devnull}")
    nowhere = {"PGHOST": "/nowhere", "PGDATABASE": "probe"}
    with Program([tools.pg_dump.path, *options], tool_environment() | nowhere) as program:
        program.wait(TOOL_SECONDS)
        return program.stderr_text if "compress" in program.stderr_text else ""


# -- The archive: its checksum, its table of contents, and every row in it ------------------------


class FileHash(Background[str]):
    """The SHA-256 of a file, as hexadecimal digits, taken in the background. When nobody waits for
    it any longer, it reads on without effect. (hashlib.file_digest needs Python 3.11.)"""

    def __init__(self, file: OpenFile) -> None:
        self.done_bytes = 0
        self._descriptor = file.descriptor
        super().__init__(self._read)

    def _read(self) -> str:
        import hashlib

        digest = hashlib.sha256()
        block = memoryview(bytearray(HASH_BLOCK_BYTES))
        while count := os.preadv(self._descriptor, [block], self.done_bytes):
            digest.update(block[:count])
            self.done_bytes += count
        return digest.hexdigest()


class ScriptReader:
    """Counts the rows in the SQL script that `pg_restore --data-only` writes, as it goes by.

    COPY escapes every newline and backslash within a value: a row is a line, and only the end of
    the data is the line `\\.` (PostgreSQL documentation, "COPY", text format). Names are not
    escaped: within double quotes a COPY statement may span lines. Other lines are passed over:
    releases add some, and what is lost is seen from the numbers of blocks, rows, large objects.
    """

    STATEMENT = re.compile(
        rb'(?P<copy>COPY (?:[^"\n]|"[^"]*")* FROM stdin;\n)'
        rb"|(?P<large_object>SELECT pg_catalog\.lo_open\(.*\n)"
        rb"|(?P<other>(?!COPY ).*\n)"
    )
    # The names of 1,600 columns take a third of it, pg_restore's piece of a large object 32 KiB.
    LONGEST_STATEMENT_BYTES = 1024 * 1024
    END_OF_DATA = b"\n\\.\n"

    def __init__(self, most_blocks: int) -> None:
        self.blocks: list[int] = []  # the rows of each COPY, in order
        self.large_objects = 0
        self._most_blocks = most_blocks
        self._unread = b""
        self._is_in_data = False

    def feed(self, block: bytes) -> None:
        """Read the next block. Raises ArchiveError for more tables than `most_blocks`."""
        script = self._unread + block
        position = 0
        while True:
            if self._is_in_data:
                # The data nearly always goes on, and to find no backslash costs next to nothing;
                # rfind, where it finds nothing, takes less than half of find's time.
                if has_end := b"\\" in script and script.rfind(self.END_OF_DATA, position) >= 0:
                    stop = script.find(self.END_OF_DATA, position)
                else:  # keep the last bytes: the end of the data may lie across two blocks
                    stop = max(position, len(script) - len(self.END_OF_DATA) + 1)
                self.blocks[-1] += script.count(b"\n", position, stop)
                position = stop
                if not has_end:
                    break
                self._is_in_data = False
                position += len(self.END_OF_DATA)
            elif statement := self.STATEMENT.match(script, position):
                position = statement.end()
                if statement["copy"]:
                    if len(self.blocks) == self._most_blocks:
                        listed = f"lists the data of {plural(self._most_blocks, 'table')}"
                        raise ArchiveError(f"its table of contents {listed}, it holds more")
                    self.blocks.append(0)
                    self._is_in_data = True
                    position -= 1  # its newline counts for the last row's, which END_OF_DATA has
                elif statement["large_object"]:
                    self.large_objects += 1
            else:
                break
        self._unread = script[position:]
        if len(self._unread) > self.LONGEST_STATEMENT_BYTES:
            raise ArchiveError("a line that is no data and does not end")

    def finish(self) -> None:
        if self._is_in_data or self._unread:
            raise ArchiveError("it breaks off within a table")


def run_pg_restore(
    pg_restore: Tool,
    dump: OpenFile,
    *options: str,
    stdin: bytes = b"",
    on_block: Callable[[bytes], None],
    on_tick: Callable[[], object] = lambda: None,
) -> str:
    """Let pg_restore read the dump to its end; `on_block` is called with each piece that it writes.
    Returns its warnings. Raises ArchiveError, with its words, where it fails or is stuck."""
    os.lseek(dump.descriptor, 0, os.SEEK_SET)  # see OpenFile
    # By the format's name: without it pg_restore reads other formats too, even a directory.
    argv = [pg_restore.path, "--format=custom", *options, dump.argument]
    pipe = subprocess.PIPE
    with Program(argv, tool_environment(), dump, stdin=pipe, stdout=pipe) as program:
        input_pipe, output = program.process.stdin, program.process.stdout
        assert input_pipe is not None
        assert output is not None
        heard_at = time.monotonic()

        def read() -> None:
            nonlocal heard_at
            with contextlib.suppress(BrokenPipeError), input_pipe:  # it ended: see stderr_text
                input_pipe.write(stdin)
            with contextlib.suppress(AttributeError, OSError):  # not Linux; a smaller pipe will do
                fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            while block := os.read(output.fileno(), READ_BYTES):
                heard_at = time.monotonic()
                on_block(block)
            program.process.wait()

        def tick() -> None:
            on_tick()
            if time.monotonic() - heard_at > STALL_SECONDS:
                raise ArchiveError(f"pg_restore is stuck: silent for {format_age(STALL_SECONDS)}")

        Background(read).wait(tick)
        if program.process.returncode:
            raise ArchiveError(program.stderr_text)
        return program.stderr_text


def list_data_entries(pg_restore: Tool, dump: OpenFile) -> dict[bytes, int]:
    """By dump id, in the archive's order: the table's oid, or 0 for large objects."""
    listing: list[bytes] = []
    run_pg_restore(pg_restore, dump, "--list", on_block=listing.append)
    # Dump id; oid of the catalog, oid of the object, kind.
    data_entry = re.compile(rb"^(\d+); \d+ (\d+) (?:TABLE DATA|BLOBS) ", re.MULTILINE)
    return {dump_id: int(oid) for dump_id, oid in data_entry.findall(b"".join(listing))}


class Contents(NamedTuple):
    rows: Mapping[int, int] = {}  # that were read back, by the table's oid
    large_objects: int = 0
    warnings: str = ""  # pg_restore's


def read_contents(
    pg_restore: Tool, dump: OpenFile, entries: Mapping[bytes, int], on_tick: Callable[[int], None]
) -> Contents:
    """Let pg_restore decode every data entry, in the order of `entries`: the k-th COPY is the k-th
    table's. The memory this takes does not grow with the archive. Raises ArchiveError."""
    oids = [oid for oid in entries.values() if oid]
    reader = ScriptReader(len(oids))
    # --use-list leaves comments out: a large object's may hold any line, that of a COPY too.
    warnings = run_pg_restore(
        pg_restore,
        dump,
        *("--data-only", "--use-list=/dev/stdin", "--file=-"),
        stdin=b"".join(dump_id + b";\n" for dump_id in entries),
        on_block=reader.feed,
        on_tick=lambda: on_tick(sum(reader.blocks)),
    )
    reader.finish()
    if not len(set(oids)) == len(oids) == len(reader.blocks):
        raise ArchiveError(
            f"its table of contents lists the data of {plural(len(set(oids)), 'table')}, "
            f"it holds that of {len(reader.blocks)}"
        )
    return Contents(dict(zip(oids, reader.blocks, strict=True)), reader.large_objects, warnings)


class Check(NamedTuple):
    verdict: str  # its line in the report
    problem: str = ""  # why it failed, if it did


def compare_contents(found: Contents, expected: Metadata) -> Check:
    """Whether the archive's contents are what was counted; if not, every difference."""
    counts, objects = expected.table_counts, expected.large_object_count or 0
    rows, problems = found.rows, []
    if expected.table_oids is None:  # an older backup: only the numbers can be compared
        if sorted(rows.values()) != sorted(counts.values()):
            problems.append("the tables in the dump have other numbers of rows than were counted")
    else:
        problems += [
            f"rows of table {key}: {rows.get(oid, 'not')} in the dump, {counts[key]} expected"
            for key, oid in expected.table_oids.items()
            if rows.get(oid) != counts[key]
        ]
        uncounted = rows.keys() - expected.table_oids.values()
        problems += [f"table with the oid {oid}: in the dump, but not counted" for oid in uncounted]
    if found.large_objects != objects:
        problems.append(f"large objects: {found.large_objects} in the dump, {objects} expected")
    summary = row_summary(sum(rows.values()), len(rows), found.large_objects)
    if not problems:
        return Check(f"✓ Match ({summary})")
    expectation = row_summary(expected.total_rows, len(counts), objects)
    verdict = f"✗ Mismatch (expected {expectation}, found {summary})"
    return Check(verdict, list_names(problems, separator="\n"))


def invalid(problem: str) -> Check:
    return Check(f"✗ Invalid ({problem.splitlines()[0]})", problem)


def format_complaint(file: Path) -> str:
    """A line for a file that is no custom-format archive, whose 11th byte is the format, else
    nothing."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if not re.match(rb"PGDMP.{5}\x01", opened.read(11), re.DOTALL):
            return "it is no custom-format archive of pg_dump\n"
    return ""


class Examination(NamedTuple):
    checksum: Check
    structure: Check
    contents: Check | None = None  # not made
    digest: str = ""  # SHA-256, where the checksum matches
    found: Contents = Contents()

    @property
    def problem(self) -> str:
        """Why the dump is not sound; empty where it is."""
        checks = (self.checksum, self.structure, self.contents)
        return "\n".join(check.problem for check in checks if check and check.problem)


def examine_dump(
    pg_restore: Tool, dump: OpenFile, expected: Metadata, progress: Progress, begin: float = 0.0
) -> Examination:
    """Compare a dump with its metadata: the bytes, the table of contents, the rows. At creation
    there is no checksum yet. `begin` is the fraction of the whole run that came before.

    The hash and the contents are read at the same time. Once the checksum is known to differ, no
    more is read. Raises Failure where pg_restore is not up to this archive, Interrupted.
    """
    contents, found = None, Contents()
    try:
        entries = list_data_entries(pg_restore, dump)
        structure = Check("✓ Valid (pg_restore --list succeeded)")
    except ArchiveError as error:
        structure = invalid(f"{format_complaint(dump.path)}{error}")
    hashing = FileHash(dump)

    def on_tick(rows: int) -> None:
        if not hashing.is_alive() and compare_hash(dump, hashing, expected).problem:
            raise ChecksumDiffers
        hashed = hashing.done_bytes / (expected.backup_size_bytes or 1)
        done = (hashed + rows / (expected.total_rows or 1)) / 2
        progress.show("Verifying", begin + (1 - begin) * done, f"{rows} rows read back")

    if not structure.problem and dump.size_bytes == expected.backup_size_bytes:
        try:
            found = read_contents(pg_restore, dump, entries, on_tick)
            contents = compare_contents(found, expected)
        except ArchiveError as error:
            contents = invalid(str(error))
        except ChecksumDiffers:
            pass
    checksum = compare_hash(dump, hashing, expected)
    if checksum.problem:
        return Examination(checksum, structure)
    examination = Examination(checksum, structure, contents, hashing.wait(), found)
    if examination.problem:
        check_restore_fits(pg_restore, expected, examination.problem)
    return examination


def compare_hash(dump: OpenFile, hashing: FileHash, expected: Metadata) -> Check:
    """Whether every byte was hashed, and the hash is the one that the metadata has, if any."""
    size_bytes, checksum = expected.backup_size_bytes, expected.checksum_sha256
    difference = f"expected {size_bytes} bytes, found {dump.size_bytes}"
    if dump.size_bytes == size_bytes:
        try:
            digest = hashing.wait()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                raise
            return invalid(f"{display_path(dump.path)} cannot be read: {error.strerror}")
        found_bytes = dump.size_bytes  # it may have grown meanwhile
        difference = f"expected {size_bytes} bytes, read {hashing.done_bytes} of {found_bytes}"
        if hashing.done_bytes == found_bytes == size_bytes:
            if checksum in {"", digest}:
                return Check(f"✓ Match ({digest[:12]}...)")
            difference = f"expected {checksum[:12]}..., found {digest[:12]}..."
    problem = f"This file has changed since it was written: {difference}"
    if checksum and not expected.describes(dump.path):
        metadata_file = display_path(metadata_path(dump.path))
        problem = f"{metadata_file} describes another backup: {printable(expected.backup_file)}"
    return Check(f"✗ Mismatch ({difference})", problem)


def check_restore_fits(pg_restore: Tool, metadata: Metadata, problem: str) -> None:
    """Raise Failure if pg_restore is too old, lacks the compression, or has no way to the file."""
    needed = least_major(metadata)
    maker = printable(metadata.pg_dump_version)
    check_version(pg_restore, needed, f"too old for this backup, which pg_dump {maker} made")
    if "does not support compression" in problem:
        compression = printable((metadata.compression or "the method").partition(":")[0])
        raise Failure(
            ExitCode.TOOL,
            f"{printable(pg_restore.path)} ({pg_restore.version}) is built without "
            f"{compression}, by which the backup is compressed\n{problem}",
            *tool_steps("pg_restore", needed),
            "For new backups another compression will do: BACKUP_COMPRESS=gzip:4",
        )
    if "could not open input file" in problem:
        raise wrapper_failure(pg_restore, "cannot open the dump", problem)


# -- The session: one connection, waited for in a thread ------------------------------------------

# While we only receive, keepalives notice that the peer is gone; while it confirms nothing of ours,
# tcp_user_timeout (libpq documentation, "Parameter Key Words"). For pg_dump's session too.
KEEPALIVES = {
    "keepalives_idle": 60,
    "keepalives_interval": 10,
    "keepalives_count": 6,
    "tcp_user_timeout": 120_000,
}


class RowCounter:
    """Where the rows of one COPY after the other go: psycopg2 writes them one by one."""

    def __init__(self) -> None:
        self.rows = 0  # of all so far: only to see that something moves
        self.finished: list[int] = []  # the rows of each COPY that has ended, as the server says

    def write(self, _row: bytes) -> None:
        self.rows += 1


class Session(contextlib.AbstractContextManager["Session"]):
    """One connection to the server. Every method may raise ServerError.

    Each call that waits is made in a thread, one at a time: only libpq's own blocking calls cope
    with slow handshakes, lost packets and lists of hosts. (psycopg2's set_wait_callback is global,
    and an exception in it closes the connection.) See `is_busy` for a wait that is broken off.
    """

    def __init__(self, config: DatabaseConfig, database: str | None = None) -> None:
        self._config = config
        self._database = database
        self.connect()

    def connect(self) -> None:
        config, started = self._config, time.monotonic()
        self._running: Background[Any] | None = None
        self._connection: Any = None
        # PGCONNECT_TIMEOUT limits the wait for each address, but not a resolver that hangs, or a
        # server that never stops sending.
        hosts = config.host.count(",") + 1
        limit = CONNECT_LIMIT_FACTOR * hosts * config.connect_seconds + CONNECT_LIMIT_SECONDS
        try:
            self._connection = self._call(self._open, limit)
        except ServerError as error:
            if time.monotonic() - started >= config.connect_seconds:
                raise NoAnswer(error.text) from None  # libpq's timeout has no code of its own
            raise
        self.server_version = int(self._connection.server_version)  # 170010 for 17.10
        # As libpq knows it; a pooler hands out a number of its own.
        self.backend_pid = int(self._connection.info.backend_pid)

    def _open(self) -> Any:
        psycopg2 = import_psycopg2()
        connection = psycopg2.connect(
            dbname=self._database,  # None: like all else, it is in the environment
            client_encoding="UTF8",
            fallback_application_name="backup_db",
            **KEEPALIVES,
        )
        connection.autocommit = True  # or psycopg2 sends a BEGIN of its own
        if connection.get_parameter_status("server_encoding") == "SQL_ASCII":
            # No conversion there: any byte may come, and Latin-1 has a character for each.
            connection.set_client_encoding("LATIN1")
        # Take names as bytes: one from a database of another encoding need not be UTF-8.
        psycopg2.extensions.register_type(psycopg2.extensions.BYTES, connection)
        return connection

    def _call(
        self, call: Callable[[], T], seconds: float, on_tick: Callable[[], object] = lambda: None
    ) -> T:
        psycopg2 = import_psycopg2()
        self._running = Background(call)
        try:
            result: T = self._running.wait(on_tick, seconds)
        except TimeoutError:
            address = f'"{self._config.host}", port {self._config.port}'
            answer = f"no answer from {address} within {format_age(seconds)}"
            raise NoAnswer(answer) from None
        except (psycopg2.Error, ValueError) as error:
            raise self._translate(error) from None
        finally:
            if not self._running.is_alive():
                self._running = None
        return result

    def _translate(self, error: Exception) -> ServerError:
        if isinstance(error, UnicodeDecodeError):
            # Before the login the server's words are in an encoding that it does not name: a byte
            # that is not UTF-8 is taken as Latin-1.
            decoded = error.object.decode("utf-8", "surrogateescape")
            return ServerError(
                re.sub("[\udc80-\udcff]", lambda match: chr(ord(match[0]) - 0xDC00), decoded)
            )
        sqlstate, text = getattr(error, "pgcode", None), getattr(error, "pgerror", None)
        # Some Pythons lose what is not UTF-8 before a login (seen on 3.11.2, not on 3.11.7).
        unread = "the server's words are not UTF-8, and lost on this Python; psql shows them"
        text = (text or str(error)).strip() or unread
        if sqlstate is None and self._connection is not None and self._connection.closed:
            # psycopg2 often has no more than "no message from the libpq" for a lost connection.
            return ConnectionLost(self._connection.info.error_message or text)
        return ServerError(text, sqlstate)

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement, or several in one string, and return the rows of the last. A byte that
        is not UTF-8 is a lone surrogate in the text, both ways."""

        def execute() -> list[tuple[Any, ...]]:
            with self._connection.cursor() as cursor:
                cursor.execute(statement.encode("utf-8", "surrogateescape"), values or None)
                return cursor.fetchall() if cursor.description else []

        return [
            tuple(v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in row)
            for row in self._call(execute, STALL_SECONDS + ANSWER_SECONDS)
        ]

    def copy_rows(
        self, statements: Iterable[str], counter: RowCounter, on_tick: Callable[[], None]
    ) -> None:
        """Run a `COPY … TO STDOUT` after the other, at least one, until a tick has passed: a thread
        for each would take longer than that of a small table. `counter` tells which has failed."""

        def copy() -> None:
            # psycopg2 prints a FATAL that ends a COPY by sys.excepthook, and raises it as well.
            hook, sys.excepthook = sys.excepthook, lambda *_exception: None
            started = time.monotonic()
            try:
                with self._connection.cursor() as cursor:
                    for statement in statements:
                        cursor.copy_expert(statement.encode("utf-8", "surrogateescape"), counter)
                        counter.finished.append(int(cursor.rowcount))
                        if time.monotonic() - started > TICK_SECONDS:
                            return
            finally:
                sys.excepthook = hook

        self._call(copy, float("inf"), on_tick)

    @property
    def is_busy(self) -> bool:
        """Whether a call goes on whose wait was broken off: then only `close` is left."""
        return self._running is not None

    def close(self) -> None:
        """Close the connection: its locks, its snapshot and a query that runs end at once."""
        if self._connection is None:
            return  # it was never made, or a thread still makes it
        if self._running is not None:
            self._reset()
            self._running.join(STOP_SECONDS)
            if self._running.is_alive():
                return  # left to the end of the process: to close it would block this thread too
        self._connection.close()

    def _reset(self) -> None:
        """Reset the socket under the call that runs: closed with our receive window full, it would
        let a COPY's backend keep its locks and snapshot for minutes."""
        import socket
        import struct

        gone = contextlib.suppress(OSError, import_psycopg2().Error)
        with gone, socket.socket(fileno=os.dup(self._connection.fileno())) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *_exception: object) -> None:
        self.close()


def import_psycopg2() -> Any:
    """Import psycopg2 only where it is used: listing and verifying must work without it."""
    try:
        import psycopg2.extensions
    except ImportError as error:
        raise missing_package_failure(error) from None
    return psycopg2


# For each major version the first minor release that can refuse a view or foreign table in a
# table's place (CVE-2024-7348); every later major version can.
RESTRICTING_MINORS = {14: 13, 15: 8, 16: 4}

# No SELECT may stand here: it would take the snapshot before the tables are locked, and a table
# that is emptied in between would be dumped, and counted, as empty.
BEGIN_READ_ONLY = """
BEGIN ISOLATION LEVEL {isolation} READ ONLY;
SET LOCAL search_path = '';
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '{lock_seconds}s';
SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL row_security = off;
SET LOCAL quote_all_identifiers = off;
SET LOCAL TimeZone = 'UTC';
"""


def begin_read_only(session: Session, isolation: str = "READ COMMITTED") -> None:
    """Begin a transaction that no setting of the role or the database can disturb. Every query runs
    in one: the owner of a schema or of the database must not run code as us."""
    begin = BEGIN_READ_ONLY.format(isolation=isolation, lock_seconds=STALL_SECONDS)
    major, minor = divmod(session.server_version, 10000)
    if minor >= RESTRICTING_MINORS.get(major, 0):
        begin += "SET LOCAL restrict_nonsystem_relation_kind = 'view, foreign-table';"
    if major >= 17:
        begin += "SET LOCAL transaction_timeout = 0;"
    try:
        # Should this process be killed, the server ends a long count or wait by itself.
        session.query(f"{begin}SET LOCAL client_connection_check_interval = '{ORPHAN_SECONDS}s'")
    except ConnectionLost:
        raise
    except ServerError:  # not every platform can check that
        session.query(f"ROLLBACK; {begin}")


# -- The way to the server: why there is no connection, and what is in between --------------------

# The first row whose pattern is in the error: libpq's own words, which are never translated, and
# the server's in the C locale. In parentheses is what its catalog tells, the environment, or what
# PGSSLMODE is. A place in capitals is a variable of libpq; {captured} is what the pattern captures,
# or of an option's name the place where it is set.
CONNECTION_REMEDIES = {
    r"\(prod\)[\s\S]*(?:\(missing\)|database \".*\" does not exist)": """
Verify database exists: psql -l {options}
Check database name {name_location}
If it was lost, see its backups, then README.md, Restore: {list}""",
    r"\(missing\)|database \".*\" does not exist": """
Verify database exists: psql -l {options}
Check database name {name_location}
Create database if needed: createdb {database} {options}""",
    r"\(closed\)|is not currently accepting connections": """
Allow connections to it, as its owner in another database: ALTER DATABASE {sql_database} \
ALLOW_CONNECTIONS true;
Or name the right one {name_location}""",
    r"User does not have CONNECT privilege\.": """
Grant it, as its owner in any database: GRANT CONNECT ON DATABASE {sql_database} TO {sql_user};
Or back up as another role, set {user_location}""",
    r"no password supplied": """
Set the password {password_location}
Or keep it in ~/.pgpass: add this line, then put the password into it: \
echo {pgpass_line} >> ~/.pgpass
A line there counts only with this very host, and in a file of mode 0600: chmod 600 ~/.pgpass""",
    r"password retrieved from file": """
The password in ~/.pgpass is wrong for this host and user: correct it there, or set the one \
{password_location}
Try it by hand: psql {options} -d {database}""",
    r"password authentication failed": """
{password_hint}
Check the password {password_location}
The server says the same of a user that is missing; check it {user_location}
And of a password that has expired; lift that, as a superuser in any database: \
ALTER ROLE {sql_user} VALID UNTIL 'infinity';
Try it by hand: psql {options} -d {database}""",
    r"[Pp]eer authentication failed|local user with ID": """
Name the role (on this socket it has the name of the system's user); set the user {user_location}
Or connect by TCP with a password: set the host to 127.0.0.1 {host_location}""",
    r"server does not support SSL": "The server has no TLS; set to prefer {PGSSLMODE}",
    r"\(PGSSLMODE=disable\)[\s\S]*(?:no encryption|SSL off)": """
The server demands TLS; set to require {PGSSLMODE}""",
    r"valid client certificate|[Cc]ertificate authentication failed": """
The server asks for this user's certificate; name its file {PGSSLCERT}
And that of its key, which only you may read, {PGSSLKEY}""",
    r"private key file (\".*\") has group or world access": "Keep it private: chmod 600 {captured}",
    r"channel binding": "The server offers none on this way; set to prefer {PGCHANNELBINDING}",
    r"invalid \"?(\w+)\"? value|for connection option \"(\w+)\"": "Correct it {captured}",
    r"(?:unrecognized|unsupported) .*parameter|command-line arg|invalid value for parameter": """
Correct it {PGOPTIONS}""",
    r"[Ss]ocket path .* is too long": """
Name a shorter path, such as a link to that directory; set the host {host_location}
Or connect by TCP: set the host to 127.0.0.1 {host_location}""",
    r"not recognized by setlocale": """
The server's system lacks that locale; install it there, on Debian by: \
sudo dpkg-reconfigure locales
Then start the server again, on its machine: sudo systemctl restart postgresql""",
    r"no pg_hba\.conf entry|pg_hba\.conf rejects": """
Let this client in, above the other lines of the server's pg_hba.conf: {hba_line}
See where that file is, as a superuser in any database: SHOW hba_file;
Then, as a superuser in any database: SELECT pg_reload_conf();""",
    r"role \".*\" does not exist": """
Check the user {user_location}
Or create it, as a superuser in any database: CREATE ROLE {sql_user} LOGIN;""",
    r"is not permitted to log in": """
Allow it, as a superuser in any database: ALTER ROLE {sql_user} LOGIN;
Or back up as another role, set {user_location}""",
    r"certificate verify failed|root certificate file": """
Name the file of the certificate authority {PGSSLROOTCERT}
With system for that file it needs, beside it: SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt""",
    r"does not match host name": "Use the one that is in the certificate; set it {host_location}",
    r"could not translate host name": """
Check the host {host_location}
See whether this machine knows it: {look_up} {host}""",
    r"Connection refused|on socket .* failed: No such file or directory": """
See whether the server answers: pg_isready {options}
Start it, where it is on this machine: {start}
Or correct the address: the host {host_location}, and the port {port_location}""",
    r"timeout expired|keeps us waiting|timed out|No route to host|Network is unreachable": """
Let this machine in, where a firewall or a managed server's list of allowed addresses does not
See whether the server answers: pg_isready {options}
Or correct the address: the host {host_location}, and the port {port_location}""",
    r"the database system is": """
Run the backup again when the server accepts connections: pg_isready {options}""",
    r"too many connections for role": """
A backup needs two connections at once; lift the role's limit, as a superuser in any database: \
ALTER ROLE {sql_user} CONNECTION LIMIT -1;""",
    r"too many connections for database": """
A backup needs two connections at once; lift the database's limit, as its owner in any database: \
ALTER DATABASE {sql_database} CONNECTION LIMIT -1;""",
    r"too many clients already|remaining connection slots|query_wait_timeout": """
A backup needs two connections at once; run it when there is room, or raise max_connections
See who is connected, as a superuser: SELECT datname, usename, count(*) FROM pg_stat_activity \
GROUP BY 1, 2;""",
    "": """
See whether the server answers: pg_isready {options}
Check the host {host_location}, and the port {port_location}
Check the user {user_location}, and the password {password_location}
Verify database exists: psql -l {options}
Check libpq's own settings {libpq_location}""",
}


def look_up_database(config: DatabaseConfig) -> str:
    """Why the database refuses us, by the catalog: in the words of CONNECTION_REMEDIES, or ""."""
    ask = """
        SELECT CASE WHEN NOT datallowconn THEN '(closed)'
                    WHEN NOT has_database_privilege(oid, 'CONNECT')
                    THEN 'User does not have CONNECT privilege.' ELSE '' END
          FROM pg_database WHERE datname = %s"""
    try:
        with Session(config, "postgres") as session:
            begin_read_only(session)
            refusals = session.query(ask, config.name)
    except ServerError:
        return ""
    return str(refusals[0][0]) if refusals else "(missing)"


def connection_failure(config: DatabaseConfig, error: ServerError) -> Failure:
    """Why there is no connection: the cause by the catalog, where another database lets us in, and
    the server's words as they are, in whatever language."""
    cause = error.text
    if not isinstance(error, NoAnswer):  # or another database would not answer either
        cause = look_up_database(config) or cause
    is_mac = sys.platform == "darwin"
    asked = f"(PGSSLMODE={config.libpq.get('PGSSLMODE')}) ({config.environment.value}) {cause}"
    rows = ((re.search(key, asked), remedy) for key, remedy in CONNECTION_REMEDIES.items())
    match, remedy = next((match, remedy) for match, remedy in rows if match)
    captured = next(filter(None, match.groups()), "")
    option = f"PG{captured.replace('_', '').upper()}"  # the variable that sets libpq's option
    user = config.user or user_name()
    fields = (config.host, str(config.port), config.name, user)
    line = ":".join(re.sub(r"([:\\])", r"\\\1", field) for field in fields)
    hba = f"{sql_identifier(config.name)} {sql_identifier(user)}"
    client = re.search(r'for host "([\w.:]+)"', error.text)
    hba = f"host {hba} {client[1]}/{128 if ':' in client[1] else 32}" if client else f"local {hba}"
    steps = fill_steps(
        remedy,
        **{f"{name}_location": place for name, place in config.setting_locations.items()},
        **{variable: config.location(variable) for variable in re.findall(r"{(PG\w+)}", remedy)},
        captured=config.location(option) if captured.isidentifier() else captured,
        list=shell_words("python3", *sys.argv, "--list"),  # the directory is not known here
        host=shell_words(config.host),
        database=shell_words(config.name),
        sql_database=sql_identifier(config.name),
        sql_user=sql_identifier(user),
        options=shell_words("-h", config.host, "-p", str(config.port), "-U", user),
        password_hint=printable(config.password_hint),
        pgpass_line=shell_words(f"{line}:PASSWORD"),
        hba_line=f"{hba} scram-sha-256",
        look_up="ping -c 1" if is_mac else "getent hosts",
        start="brew services start postgresql" if is_mac else "sudo systemctl start postgresql",
    )
    code = ExitCode.PERMISSION if "CONNECT privilege" in match[0] else ExitCode.CONNECTION
    return Failure(code, error.text, *steps)


def open_session(config: DatabaseConfig) -> Session:
    try:
        return Session(config)
    except ServerError as error:
        raise connection_failure(config, error) from None


def check_no_pooler(session: Session, config: DatabaseConfig) -> None:
    """Raise Failure behind a connection pooler in transaction or statement mode: pg_dump's settings
    would stay on connections that the application is given next, or miss its own queries.

    Without a pooler, libpq's backend PID is the server's own. Two sessions that share a backend,
    or one whose backend changes, are not in session mode. (In statement mode a BEGIN ends the
    connection: this one query runs without it, and names its schema.)
    """
    ask = "SELECT pg_catalog.pg_backend_pid()"
    if session.query(ask) == [(session.backend_pid,)]:
        return
    with open_session(config) as other:
        answers = [(session.query(ask), other.query(ask)) for _round in range(10)]
    ours, theirs = answers[0]
    if ours != theirs and all(answer == answers[0] for answer in answers):
        return
    raise Failure(
        ExitCode.CONFIGURATION,
        "there is a connection pooler in transaction or statement mode in between: a backup through"
        " it would break the application's queries, and could be wrong itself",
        f"Set the server's own address: the host {config.setting_locations['host']}, and the port "
        f"{config.setting_locations['port']}",
        "Neon has it under the host name without -pooler, Supabase on port 5432 in place of 6543, "
        "pgbouncer on the server's own port, or in an entry with pool_mode=session",
    )


# -- The catalog: what is in the database, and what this role may read of it ----------------------

# The relations of the database, and whether pg_dump reads them: of an extension's (objid) only the
# configuration tables (extname; documentation, "Extension Configuration Tables").
RELATIONS = """
WITH rel AS (
  SELECT c.oid, c.relkind, c.relpersistence, n.oid AS nsoid, n.nspname, m.objid, x.extname,
         format('%I.%I', nspname, relname) AS name,
         format(CASE nspname WHEN 'public' THEN '%2$I' ELSE '%I.%I' END, nspname, relname) AS key,
         x.extcondition[array_position(x.extconfig, c.oid)] AS condition,
         c.relispopulated, c.relkind NOT IN ('f', 'm') AND (x.oid IS NOT NULL OR (
           m.objid IS NULL AND n.nspname <> 'information_schema')) AS is_dumped
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_depend m
      ON m.classid = 'pg_class'::regclass AND m.objid = c.oid AND m.objsubid = 0
     AND m.deptype = 'e' AND m.refclassid = 'pg_extension'::regclass
    LEFT JOIN pg_extension x ON c.oid = ANY (x.extconfig)
   WHERE c.relkind IN ('r', 'p', 'S', 'm', 'f') AND (x.oid IS NOT NULL OR n.nspname !~ '^pg_')),
me AS (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
"""

# What pg_dump would fail on; each row alone is enough (tested by granting and revoking each).
UNREADABLE = f"""
{RELATIONS}
SELECT DISTINCT 'schema', quote_ident(nspname), nsoid
  FROM rel WHERE is_dumped AND NOT has_schema_privilege(nsoid, 'USAGE')
UNION ALL
SELECT CASE relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, name, oid
  FROM rel WHERE is_dumped AND NOT has_table_privilege(oid, 'SELECT')
UNION ALL
SELECT 'row security', name, oid
  FROM rel WHERE is_dumped AND relkind = 'r' AND row_security_active(oid)
UNION ALL
SELECT 'large object', l.oid::text, l.oid FROM pg_largeobject_metadata l, me
 WHERE NOT EXISTS (
         SELECT FROM aclexplode(COALESCE(l.lomacl, acldefault('L', l.lomowner))) a
          WHERE a.privilege_type = 'SELECT'
            AND (a.grantee = 0 OR pg_has_role(a.grantee, 'USAGE')))
   AND NOT rolsuper AND NOT current_setting('lo_compat_privileges')::bool
ORDER BY 1, 3
"""

GRANTS = {
    "schema": "Or let it use the schemas{more}, {who}: GRANT USAGE ON SCHEMA {names} TO {role};",
    "table": "Or let it read the tables{more}, {who}: GRANT SELECT ON TABLE {names} TO {role};",
    "sequence": "Or let it read the sequences{more}, {who}: GRANT SELECT ON SEQUENCE {names} "
    "TO {role};",
    "large object": "Let it read large objects, {who}: GRANT SELECT ON LARGE OBJECT {names} "
    "TO {role};",
    "large objects": "Let it read and write every large object, {who}: "
    "ALTER ROLE {role} SET lo_compat_privileges = on;",
    "row security": "Let it see every row, {who}: ALTER ROLE {role} BYPASSRLS;",
}


def check_privileges(session: Session) -> None:
    """Raise Failure with what pg_dump could not read as this role."""
    unreadable = session.query(UNREADABLE)
    if not unreadable:
        return
    current = "SELECT quote_ident(current_user), quote_ident(current_database())"
    role, database = map(printable, session.query(current)[0])
    who = f"as a superuser in database {database}"
    names: dict[str, list[str]] = {}
    for kind, name, _oid in unreadable:
        names.setdefault(kind, []).append(name)
    steps = []
    if names.keys() - {"large object", "row security"}:
        steps.append(f"Let it read all tables, {who}: GRANT pg_read_all_data TO {role};")
    if len(names.get("large object", [])) > MOST_NAMES:
        names["large objects"] = names.pop("large object")
    for kind, grant in GRANTS.items():
        if of_kind := names.get(kind):
            listed = ", ".join(map(printable, of_kind[:MOST_NAMES]))
            more = ", and so on" if len(of_kind) > MOST_NAMES else ""
            steps.append(grant.format(names=listed, more=more, role=role, who=who))
    detail = f"role {role} cannot read all of the database; a backup would be incomplete"
    lines = [f"{kind}: {list_names(of_kind)}" for kind, of_kind in names.items()]
    raise Failure(ExitCode.PERMISSION, "\n".join([detail, *lines]), *steps)


class Table(NamedTuple):
    """A table that pg_dump locks, and whose rows it writes if there can be any."""

    oid: int
    qualified_name: str  # with its schema, quoted where SQL needs it
    key: str  # its name in the metadata: without the schema where that is public
    root: int | None  # of a partition: the oid of its topmost table
    copy: str | None  # the statement to count by; None where the dump has no rows of its own


# The tables that pg_dump locks, in the order of their creation, each with a statement that returns
# a line for each of its rows in the dump. On a standby unlogged tables have none there. A COPY is
# never planned: to plan a SELECT would run, as us, what the table's owner put into its indexes and
# statistics. As in pg_dump, the only exception is an extension's table with a condition. One column
# is enough: the one that is least work to read.
DUMPED_TABLES = f"""
{RELATIONS}
SELECT oid, name, key, NULLIF(pg_partition_root(oid)::oid, oid),
       CASE WHEN relkind = 'p' OR relpersistence = 'u' AND pg_is_in_recovery() THEN NULL
            WHEN condition <> '' THEN format('COPY (SELECT %s FROM %s %s) TO STDOUT',
                                             attname, name, condition)
            ELSE format('COPY %s %s TO STDOUT', name, '(' || attname || ')') END
  FROM rel LEFT JOIN LATERAL (
       SELECT quote_ident(attname) AS attname FROM pg_attribute
        WHERE attrelid = rel.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
        ORDER BY attlen < 0, attlen, attnum LIMIT 1) a ON true
 WHERE is_dumped AND relkind IN ('r', 'p') ORDER BY oid
"""


def list_tables(session: Session) -> list[Table]:
    return [Table(*row) for row in session.query(DUMPED_TABLES)]


# What the metadata says of the database, by its keys. Columns that older servers lack are read
# through to_jsonb; a null has no key. The roles are those that a restore names (the bootstrap
# superuser, oid 10, is in no dependency); where several grantors gave a membership, its options add
# up. The settings, our session's and so pg_dump's, are those that shape the text of the rows.
DATABASE_FACTS = """
WITH d AS (SELECT * FROM pg_database WHERE datname = current_database()),
named (oid) AS (
  SELECT 10::oid
  UNION SELECT refobjid FROM pg_shdepend s, d
   WHERE refclassid = 'pg_authid'::regclass
     AND (dbid = d.oid OR (classid = 'pg_database'::regclass AND objid = d.oid))
  UNION SELECT setrole FROM pg_db_role_setting JOIN d ON setdatabase = d.oid
  UNION SELECT subowner FROM pg_subscription JOIN d ON subdbid = d.oid),
membership AS (
  SELECT member, g.rolname AS role, json_build_object(
           'admin', bool_or(admin_option),
           'inherit', bool_or((to_jsonb(m) ->> 'inherit_option')::boolean),
           'set', bool_or((to_jsonb(m) ->> 'set_option')::boolean)) AS options
    FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid GROUP BY member, g.rolname)
SELECT json_strip_nulls(json_build_object(
  'database_name', datname,
  'database_size_bytes', pg_database_size(oid),
  'encoding', current_setting('server_encoding'),
  'locale', json_build_object(
    'collate', datcollate, 'ctype', datctype,
    'provider', CASE COALESCE(to_jsonb(d) ->> 'datlocprovider', 'c')
                WHEN 'c' THEN 'libc' WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' END,
    'locale', COALESCE(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale')),
  'extensions', (
    SELECT COALESCE(json_object_agg(extname, extversion ORDER BY extname), '{}') FROM pg_extension),
  'role_attributes', (
    SELECT json_object_agg(rolname, json_build_object(
             'superuser', rolsuper, 'inherit', rolinherit, 'createrole', rolcreaterole,
             'createdb', rolcreatedb, 'login', rolcanlogin, 'replication', rolreplication,
             'bypassrls', rolbypassrls, 'member_of', COALESCE((
               SELECT json_object_agg(role, options ORDER BY role)
                 FROM membership WHERE member = r.oid), '{}'),
             'connection_limit', rolconnlimit, 'valid_until', rolvaliduntil,
             'settings', rolconfig) ORDER BY rolname)
      FROM named JOIN pg_roles r USING (oid)),
  'settings', json_build_object(
    'bytea_output', current_setting('bytea_output'),
    'lc_monetary', CASE WHEN EXISTS (
      SELECT FROM (SELECT atttypid FROM pg_attribute UNION ALL SELECT typbasetype FROM pg_type
                   UNION ALL SELECT rngsubtype FROM pg_range) AS used (type)
       WHERE type IN ('money'::regtype, 'money[]'::regtype)) THEN current_setting('lc_monetary')
      END),
  'tablespaces', (
    SELECT COALESCE(json_agg(spcname ORDER BY spcname), '[]') FROM pg_tablespace t
     WHERE spcname !~ '^pg_' AND (t.oid = dattablespace OR t.oid IN (
             SELECT reltablespace FROM pg_class WHERE relpersistence <> 't'))),
  'database_tablespace', (
    SELECT spcname FROM pg_tablespace t WHERE t.oid = dattablespace AND spcname !~ '^pg_'),
  'large_object_count', (SELECT count(*) FROM pg_largeobject_metadata)))::text FROM d
"""

COMPUTED_ANEW = "contents of materialized views, which a restore computes anew"

# What pg_dump silently omits, with exit status 0: (phrase, name, oid), a row each.
NOT_INCLUDED = f"""
{RELATIONS}
SELECT 'data of foreign tables', key, oid FROM rel WHERE relkind = 'f'
UNION ALL
SELECT '{COMPUTED_ANEW}', key, oid FROM rel WHERE relkind = 'm' AND relispopulated AND objid IS NULL
UNION ALL
SELECT 'data of unlogged tables, which a standby does not have', key, oid
  FROM rel WHERE relkind = 'r' AND relpersistence = 'u' AND pg_is_in_recovery()
UNION ALL
SELECT 'tables in the schema information_schema', key, oid
  FROM rel WHERE relkind IN ('r', 'p') AND oid >= 16384 AND nspname = 'information_schema'
UNION ALL
SELECT 'rows of tables that belong to an extension', key, oid
  FROM rel WHERE relkind = 'r' AND objid IS NOT NULL AND extname IS NULL
   AND pg_relation_size(oid) > 0
UNION ALL
SELECT 'invalid indexes, which a failed build has left', quote_ident(c.relname) || ' on ' || key,
       c.oid
  FROM pg_index JOIN rel ON rel.oid = indrelid JOIN pg_class c ON c.oid = indexrelid
 WHERE NOT indisvalid AND c.relkind = 'i'
UNION ALL
SELECT 'subscriptions, which only a superuser can back up', quote_ident(subname), s.oid
  FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid, me
 WHERE d.datname = current_database() AND NOT rolsuper
UNION ALL
SELECT 'options of user mappings, which only a superuser can back up',
       COALESCE(quote_ident(usename), 'public') || ' on ' || quote_ident(srvname), umid
  FROM pg_user_mappings, me WHERE NOT rolsuper
ORDER BY 3
"""


def read_facts(session: Session) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(session.query(DATABASE_FACTS)[0][0])
    major, minor = divmod(session.server_version, 10000)
    left_out: dict[str, list[str]] = {}
    for what, name, _oid in session.query(NOT_INCLUDED):
        left_out.setdefault(what, []).append(name)
    return {
        **facts,
        "postgresql_version": f"{major}.{minor}",
        "roles": list(facts["role_attributes"]),
        "not_included": [f"{what} ({list_names(names)})" for what, names in left_out.items()],
    }


# -- The restore: the commands for it that the metadata carries -----------------------------------


def least_major(metadata: Metadata) -> int:
    """The oldest major version whose server, psql and pg_restore can restore this backup."""
    versions = (metadata.postgresql_version, metadata.pg_dump_version)
    return max(int((re.match(r"\d{1,3}", version) or "0")[0]) for version in versions)


def restore_commands(metadata: Metadata) -> list[str]:
    """The shell commands, one a line, that restore this backup on a fresh server, made of the
    metadata's other facts alone; they drop nothing."""
    return [*comment_lines(metadata), *role_commands(metadata), *database_commands(metadata)]


def comment_lines(metadata: Metadata) -> Iterator[str]:
    """What a person has to know and to prepare. (An interactive zsh takes a pasted comment for a
    command: so they read as the words of one.)"""
    file = shell_words(str(metadata_path(Path(metadata.backup_file))))
    code = "import json, sys; print(*json.load(open(sys.argv[1]))[sys.argv[2]], sep=chr(10))"
    yield f"# These lines as they are to be typed: jq -r '.restore[]' {file}"
    yield f"# Or: python3 -X utf8 -c {shell_words(code)} {file} restore"
    yield f"# For PostgreSQL {least_major(metadata)} or newer, the server and its tools"
    yield "# In the folder of the dump, with PGHOST, PGPORT, PGUSER and PGPASSWORD of a superuser"
    extensions = [
        shell_words(name, version)
        for name, version in sorted((metadata.extensions or {}).items())
        if name != "plpgsql"
    ]
    if extensions:
        yield f"# The server needs the packages of these extensions: {', '.join(extensions)}"
    facts = {**(metadata.locale or {}), **(metadata.settings or {})}
    of_system = {facts.get(key) for key in ("collate", "ctype", "lc_monetary")}
    if locales := sorted(filter(None, of_system - {"C", "POSIX"})):
        yield f"# The server needs these locales, see locale -a: {shell_words(*locales)}"
    if metadata.tablespaces:
        names = shell_words(*metadata.tablespaces)
        without = "" if metadata.database_tablespace else ", or its tables go to pg_default"
        yield f"# First make its tablespaces by CREATE TABLESPACE: {names}{without}"


def role_commands(metadata: Metadata) -> Iterator[str]:
    """Make the roles, then their memberships."""
    roles, attributes = metadata.roles or [], metadata.role_attributes or {}
    yield "# A role that is there already says so and stays as it is, the others get no password"
    for role in roles:
        yield psql_command(*role_statements(role, attributes.get(role, {}))) + " || true"
    for role in roles:
        for group, options in attributes.get(role, {}).get("member_of", {}).items():
            if group not in roles and not group.startswith("pg_"):  # PostgreSQL's own are there
                yield f"# Left out is the membership of {shell_words(role)} in {shell_words(group)}"
                continue
            how = " WITH ADMIN OPTION" if options.get("admin") else ""
            if "set" in options:  # from 16 on
                kinds = ("admin", "inherit", "set")
                flags = [f"{kind} {bool(options.get(kind))}".upper() for kind in kinds]
                how = f" WITH {', '.join(flags)}"
            yield psql_command(f"GRANT {sql_identifier(group)} TO {sql_identifier(role)}{how}")


def psql_command(*statements: str) -> str:
    """A psql that stops at the first statement that fails."""
    commands = " ".join(f"--command={shell_words(statement)}" for statement in statements)
    options = "--no-psqlrc --no-password --set=ON_ERROR_STOP=1 --dbname=postgres"
    return f"psql {options} {commands}"


def role_statements(role: str, facts: Mapping[str, Any]) -> Iterator[str]:
    """What makes a role, and gives it its settings; one that the server refuses is left out."""
    flags = ["superuser", "createrole", "createdb", "login", "replication", "bypassrls"]
    options = [flag.upper() for flag in flags if facts.get(flag)]
    options += [] if facts.get("inherit", True) else ["NOINHERIT"]
    if (limit := facts.get("connection_limit", -1)) != -1:
        options.append(f"CONNECTION LIMIT {limit:d}")
    if "valid_until" in facts:
        options.append(f"VALID UNTIL {sql_literal(facts['valid_until'])}")
    yield " ".join(["CREATE ROLE", sql_identifier(role), *options])
    if settings := facts.get("settings", []):
        yield r"\unset ON_ERROR_STOP"
    for setting in settings:
        name, _, value = setting.partition("=")
        values = [value]
        # These are lists of names, some of them quoted (pg_dump's variable_is_guc_list_quote; the
        # others there no role can have). An empty list is one empty name.
        if re.fullmatch("(local|session)_preload_libraries|search_path|temp_tablespaces", name):
            names = re.findall(r'"((?:[^"]|"")*)"|([^",\s]+)', value)
            values = [quoted.replace('""', '"') or bare for quoted, bare in names] or [""]
        literals = ", ".join(map(sql_literal, values))
        yield f"ALTER ROLE {sql_identifier(role)} SET {sql_identifier(name)} TO {literals}"


def database_commands(metadata: Metadata) -> Iterator[str]:
    """Make the database, fill it and analyze it.

    To make it (`--schema=-` is no schema of its) fails where one of that name is there, and nothing
    is added to that. It is filled section by section: with --jobs alone a row trigger of a
    partitioned table may be there before its rows, and fire.
    """
    name, dump = metadata.database_name, shell_words(metadata.backup_file)
    # Another value of these, which the database or the role may have, refuses rows or bends them.
    bending = {"default_transaction_read_only": "off", "array_nulls": "on"}
    if lc_monetary := (metadata.settings or {}).get("lc_monetary"):
        bending["lc_monetary"] = re.sub(r"([\\\s])", r"\\\1", lc_monetary)
    options = shell_words(" ".join(f"-c {key}={value}" for key, value in bending.items()))
    pg_restore = f"PGOPTIONS={options} pg_restore --no-password"
    fill = f"{pg_restore} --dbname={dbname_word(name)} --section=$section --jobs=4"
    analyze = f"vacuumdb --no-password --quiet --analyze-in-stages --dbname={dbname_word(name)}"
    if name in {"postgres", "template1"}:  # on every server: only an error stops a second time
        yield "# Settings, grants and comment of this database itself do not come back"
        make, otherwise = "", "exit 1"
        fill += " --exit-on-error"
    else:
        yield f"# For another try: dropdb {shell_words('--', name)}"
        yield "# Make it, then fill it, past what is refused: each error is told, exit status 1"
        make = f"{pg_restore} --create --schema=- --exit-on-error --dbname=postgres {dump} && "
        otherwise = "rc=1"
    sections = f"for section in pre-data data post-data; do {fill} {dump} || {otherwise}; done"
    yield f"{make}( rc=0; {sections}; {analyze}; exit $rc )"


def dbname_word(name: str) -> str:
    """A database's name behind `--dbname=`, where a name like `k=v` or a URL would be parsed."""
    if "=" in name or "://" in name or not name.isprintable():
        name = "dbname='" + re.sub(r"([\\'])", r"\\\1", name) + "'"
    return shell_words(name)


# -- The snapshot and the dump: locks first, then the snapshot, then pg_dump beside the counts ----

LOCK_NOT_AVAILABLE = "55P03"
# By SQLSTATE.
SERVER_REMEDIES = {
    "42501": "Grant the role what it lacks, or back up as another role",  # insufficient_privilege
    # out_of_memory: the lock table is full
    "53200": "Raise max_locks_per_transaction in postgresql.conf, and restart the server",
    # serialization_failure: in a transaction that only reads, a standby's recovery conflict
    "40001": "On the standby raise max_standby_streaming_delay, or set hot_standby_feedback = on",
    LOCK_NOT_AVAILABLE: "See what waits, and for whom, in the database backed up: "
    "SELECT pid, pg_blocking_pids(pid), state, wait_event, query FROM pg_stat_activity;",
}


def server_failure(error: ServerError, doing: str) -> Failure:
    detail = f"while {doing}: {error.text}"
    step = SERVER_REMEDIES.get(error.sqlstate or "", SERVER_LOG)
    if "conflict with recovery" in error.text:  # its SQLSTATE may be lost with the connection
        step = SERVER_REMEDIES["40001"]
    if isinstance(error, ConnectionLost):
        detail = f"the connection to the server was lost while {doing}:\n{error.text}"
    code = ExitCode.PERMISSION if error.sqlstate == "42501" else ExitCode.CREATION
    return Failure(code, detail, step, AGAIN)


@contextlib.contextmanager
def on_server(doing: str) -> Iterator[None]:
    """Turn a ServerError into the failure of what is done inside."""
    try:
        yield
    except ServerError as error:
        raise server_failure(error, doing) from None


def stalled_failure(what: str, blocker: Blocker | None) -> Failure:
    detail = f"gave up after {format_age(STALL_SECONDS)}: {what}"
    step = blocker.remedy if blocker else SERVER_REMEDIES[LOCK_NOT_AVAILABLE]
    return Failure(ExitCode.CREATION, detail, step, CALM_HOUR)


# Damage to the server's own data, which no repetition heals, and a value or a row over 1 GB in its
# text form. XX001 is data_corrupted, XX002 index_corrupted.
DAMAGE_SQLSTATES = {"XX001", "XX002"}
DAMAGE = re.compile(
    r"missing chunk number|unexpected chunk|invalid page in block|could not (read|open) .*\bbase/"
    r"|could not access status of transaction|data is corrupt"
    r"|invalid memory alloc request size|Cannot enlarge string buffer"
    r"|schema with OID \d+ does not exist"
)
COPIED_TABLE = re.compile(r"Command was: COPY (.+?) (?:\(.*\) )?TO stdout")


def damage_failure(detail: str, table: str) -> Failure:
    """The server cannot read its own data; `table` is quoted for SQL, empty where none is named."""
    without = shell_words(f"--exclude-table-data={table or 'TABLE'}", "--file=rescued.dump")
    return Failure(
        ExitCode.CREATION,
        f"the server cannot read its own data{f' of table {printable(table)}' if table else ''}; "
        f"no repetition of the backup heals that\n{detail}",
        f"Save all other rows now: pg_dump {libpq_options()} --format=custom {without}",
        "Then take that table's rows from the newest earlier backup that has them",
        f"See what else is damaged, as a superuser: pg_amcheck {libpq_options()}",
        "Check the server's disk and memory, on its machine: sudo dmesg | tail -50",
    )


class Blocker(NamedTuple):
    """Who has a lock that we or pg_dump wait for: a session, with what this role may see of it, or
    a prepared transaction, which has no session."""

    relation: int  # the oid
    pid: int | None
    user: str | None
    application: str | None
    query: str | None
    gid: str | None

    def __str__(self) -> str:
        """`session 4711 (alice, psql: ALTER TABLE …)`; in the other words may be a password."""
        if self.pid is None:
            return f"prepared transaction {shell_words(self.gid or '')}"
        command = re.match(r"\W*([A-Za-z]+(?:\s+[A-Za-z]+)?)", self.query or "")
        about = ", ".join(printable(part) for part in (self.user, self.application) if part)
        about += f": {' '.join(command.group(1).split())} …" if command else ""
        return f"session {self.pid}" + (f" ({about})" if about else "")

    @property
    def remedy(self) -> str:
        if self.pid is None:
            gid = printable("'" + (self.gid or "").replace("'", "''") + "'")
            whose = "as its owner or a superuser in this database"
            return f"End it, {whose}, by COMMIT PREPARED {gid}; or: ROLLBACK PREPARED {gid};"
        end = shell_words(f"SELECT pg_terminate_backend({self.pid});")
        return f"Let that session finish, or end it: psql {libpq_options(self.user)} -c {end}"


class Snapshot(NamedTuple):
    """An exported snapshot, for pg_dump to import, with every table locked."""

    id: str
    pid: int  # of the session that has it
    tables: Sequence[Table]
    names: Names
    facts: Mapping[str, Any]  # what the metadata says of the database

    @property
    def copied_tables(self) -> list[Table]:
        return [table for table in self.tables if table.copy is not None]


class RunContext(NamedTuple):
    config: DatabaseConfig
    tools: Tools
    session: Session
    lock: OpenFile
    partial: PartialBackup
    progress: Progress
    last: Backup | None  # the last one of this database and environment, of whatever server


# Also query_canceled (an administrator's), deadlock_detected, undefined_table, invalid_schema_name.
LOCK_RETRY_SQLSTATES = {LOCK_NOT_AVAILABLE, "57014", "40P01", "42P01", "3F000"}

LARGE_OBJECTS = 2613  # the oid of pg_largeobject, which holds them

# For how many tables there is room in the server's lock table, which all sessions share (PostgreSQL
# documentation, "Lock Management"). Fast-path locks are not in it.
LOCK_ROOM = """
SELECT current_setting('max_locks_per_transaction')::int * (1 + sum(setting::int))
       - (SELECT count(DISTINCT (database, relation)) FROM pg_locks
           WHERE locktype = 'relation' AND NOT fastpath)
  FROM pg_settings
 WHERE name IN ('max_connections', 'max_worker_processes', 'max_wal_senders',
                'max_prepared_transactions',
                CASE WHEN current_setting('server_version_num')::int < 180000
                THEN 'autovacuum_max_workers' ELSE 'autovacuum_worker_slots' END)
"""

# Who has, or is next to have, the only lock that ACCESS SHARE waits for. A prepared transaction has
# no session: its lock on its own transaction id, by the same virtual transaction, identifies it.
BLOCKER = """
SELECT l.relation::bigint, l.pid, a.usename, a.application_name,
       NULLIF(a.query, '<insufficient privilege>'), x.gid
  FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
  LEFT JOIN pg_locks t
    ON l.pid IS NULL AND t.pid IS NULL AND t.virtualtransaction = l.virtualtransaction
   AND t.locktype = 'transactionid' AND t.mode = 'ExclusiveLock'
  LEFT JOIN pg_prepared_xacts x ON x.transaction = t.transactionid
 WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.relation = ANY (%s::oid[])
   AND l.database IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
 ORDER BY l.granted DESC, a.xact_start LIMIT 1
"""


def find_blocker(session: Session, relations: Iterable[int]) -> Blocker | None:
    rows = session.query(BLOCKER, list(relations))
    return Blocker(*rows[0]) if rows else None


def take_snapshot(run: RunContext) -> Snapshot:
    """Lock the tables, then export a snapshot that sees them as they stay. Nothing waits while
    locks are held. Raises Failure, naming who holds a table, after STALL_SECONDS without success.

    TRUNCATE and an ALTER TABLE that rewrites are not MVCC-safe (PostgreSQL documentation,
    "Caveats" of concurrency control): a table that is locked only after the snapshot can be
    dumped, and counted, as empty. So the locks come before the transaction sees anything, and the
    list of tables is read again after them.
    """
    session, patience = run.session, Patience()
    while True:
        begin_read_only(session)
        tables = list_tables(session)
        ((room,),) = session.query(LOCK_ROOM)
        session.query("COMMIT")
        if len(tables) > room:
            detail = f"{len(tables)} tables to lock, and room for {room} in the server's lock table"
            raise Failure(ExitCode.CREATION, detail, SERVER_REMEDIES["53200"])
        run.partial.begin()  # before the locks: it may wait for the next second
        in_the_way = "the set of tables changes all the time"
        try:
            if snapshot := lock_and_export(session, tables):
                return snapshot
        except ServerError as error:
            if error.sqlstate not in LOCK_RETRY_SQLSTATES:
                raise
            in_the_way = error.text
        session.query("ROLLBACK")  # every lock goes
        keys = {LARGE_OBJECTS: "pg_largeobject"} | {table.oid: table.key for table in tables}
        begin_read_only(session)
        if blocker := find_blocker(session, keys):
            in_the_way = f"{blocker} holds the table {printable(keys[blocker.relation])}"
        session.query("COMMIT")
        patience.check(f"the tables could not be locked for reading: {in_the_way}", blocker)
        pause(run.progress, in_the_way)


def lock_and_export(session: Session, tables: list[Table]) -> Snapshot | None:
    """One attempt: everything that is read while locks are held; None where the tables changed.

    NOWAIT: a backup that waits for one table while it holds another makes a migration the victim of
    a deadlock. The short lock_timeout is for a pg_largeobject that somebody rewrites.
    """
    begin_read_only(session, "REPEATABLE READ")
    if tables:
        names = ", ".join(f"ONLY {table.qualified_name}" for table in tables)
        session.query(f"LOCK TABLE {names} IN ACCESS SHARE MODE NOWAIT")
    session.query(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")
    ((identifier, pid),) = session.query("SELECT pg_export_snapshot(), pg_backend_pid()")
    if list_tables(session) != tables:
        return None
    session.query("SELECT pg_relation_size(%s)", LARGE_OBJECTS)  # pg_dump will wait for it, too
    snapshot = Snapshot(identifier, pid, tables, read_names(session), read_facts(session))
    session.query("SET LOCAL lock_timeout = 0")  # from here on Patience ends a wait
    return snapshot


def dump_database(run: RunContext) -> tuple[Snapshot, list[int], str]:
    """Take a snapshot, dump it and count its rows, or begin again: DUMP_ATTEMPTS times in all after
    a change that no lock prevents; where somebody waits for our locks, until Patience ends that.
    Returns the snapshot, the rows of each of its tables with a COPY, and pg_dump's warnings."""
    attempts = 0
    patience: Patience | None = None
    while True:
        with on_server("locking the tables"):
            snapshot = take_snapshot(run)
        try:
            with on_server("dumping and counting the rows"):
                return snapshot, *dump_snapshot(run, snapshot)
        except LetGo as waiting:
            reason = f"{waiting.blocker or 'somebody'} blocks pg_dump, and others wait for us"
            patience = patience or Patience()
            patience.check(reason, waiting.blocker)
        except SnapshotLost as change:
            attempts, reason = attempts + 1, str(change)
            if attempts == DUMP_ATTEMPTS:
                detail = f"gave up after {attempts} attempts: {reason}"
                raise Failure(ExitCode.CREATION, detail, CALM_HOUR) from None
        except DumpFailed as failed:
            attempts += 1
            reason = diagnose_dump(run, snapshot, failed, is_last=attempts == DUMP_ATTEMPTS)
        run.session.close()  # every lock goes; a count may still run, and only this ends it
        pause(run.progress, reason)  # the server frees a connection a moment late
        try:
            run.session.connect()
        except ServerError as error:  # whatever is in the way now, the connection is lost
            raise server_failure(ConnectionLost(error.text), "beginning again") from None


WROTE_NOTHING = "wrote nothing into the dump"


def dump_snapshot(run: RunContext, snapshot: Snapshot) -> tuple[list[int], str]:
    """Run pg_dump on the snapshot while our session counts in it. Returns the counts and pg_dump's
    warnings. Raises DumpFailed, LetGo, SnapshotLost."""
    expected_bytes = expected_dump_bytes(run, snapshot)
    tool, dump = run.tools.pg_dump, run.partial.dump
    # The database, the host and the password stay in the environment.
    argv = [
        tool.path,
        "--format=custom",
        "--dbname=" + " ".join(f"{name}={value}" for name, value in KEEPALIVES.items()),
        "--no-password",
        "--no-sync",  # we do it ourselves, before we read the file back
        f"--snapshot={snapshot.id}",
        f"--encoding={snapshot.facts['encoding']}",
        f"--lock-wait-timeout={DUMP_LOCK_TIMEOUT}",
        f"--compress={run.tools.compress_value}",
        f"--file={dump.argument}",
    ]
    # By PGAPPNAME its backend is found. Times in UTC: so equal rows have equal text everywhere.
    environment = {**tool_environment("PG"), "PGTZ": "UTC"}
    environment["PGAPPNAME"] = f"backup_db {snapshot.id}"
    with Program(argv, environment, dump, run.lock) as pg_dump:
        with with_filename(run.lock.path):  # for held_lock_failure to read
            os.write(run.lock.descriptor, f"pg_dump {pg_dump.process.pid}\n".encode())
        watch = DumpWatch(run, pg_dump, snapshot, expected_bytes)
        # Our session stays free for `check` until pg_dump has its locks, and begins to copy.
        watch.wait(until=lambda: watch.is_copying)
        counts = count_rows(run.session, snapshot, watch)
        watch.wait()
        warnings = pg_dump.stderr_text
    # That a disk is full is told by verify_new_dump.
    if not dump.size_bytes and not DiskRoom.of(run.partial.directory).is_full:
        raise wrapper_failure(tool, WROTE_NOTHING, warnings)
    if change := find_change(run, snapshot):
        raise SnapshotLost(f"{change} while it was dumped")
    run.session.query("COMMIT")
    return counts, warnings


# undefined_table, invalid_schema_name, wrong_object_type, undefined_column; for a view in a table's
# place object_not_in_prerequisite_state
SLIPPED_IN_SQLSTATES = {"42P01", "3F000", "42809", "42703", "55000"}


def count_rows(session: Session, snapshot: Snapshot, watch: DumpWatch) -> list[int]:
    """The rows of every table with a COPY, in our snapshot: the archive's own prove nothing."""
    tables, counter = snapshot.copied_tables, watch.counter
    while uncounted := tables[len(counter.finished) :]:
        copies = (table.copy for table in uncounted if table.copy)
        try:
            session.copy_rows(copies, counter, watch.check)
        except ServerError as error:
            if error.sqlstate in SLIPPED_IN_SQLSTATES:
                raise SnapshotLost(error.text) from None
            if error.sqlstate in DAMAGE_SQLSTATES or DAMAGE.search(error.text):
                name = tables[len(counter.finished)].qualified_name
                raise damage_failure(error.text, name) from None
            raise
        watch.check(session)
    return counter.finished


# Everything whose name pg_dump looks up late, in the catalog as it is at that moment (seen on 15 to
# 18). The tables themselves are locked; other sessions make temporary objects all the time; and the
# functions below oid 16384 are PostgreSQL's own.
NAMES = """
WITH lasting AS (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_')
SELECT 'schema', oid::bigint, 0, 0::bigint, nspname::text FROM pg_namespace JOIN lasting USING (oid)
UNION ALL
SELECT 'type', t.oid, 0, typnamespace, typname
  FROM pg_type t JOIN lasting ON lasting.oid = typnamespace LEFT JOIN pg_class c ON c.oid = typrelid
 WHERE COALESCE(relkind, 'c') = 'c' AND NOT EXISTS (SELECT FROM pg_type WHERE typarray = t.oid)
UNION ALL
SELECT 'label', oid, 0, 0, enumlabel FROM pg_enum
UNION ALL
SELECT 'attribute', attrelid, attnum, 0, CASE WHEN attisdropped THEN '' ELSE attname END
  FROM pg_attribute JOIN pg_class c ON c.oid = attrelid JOIN lasting ON lasting.oid = relnamespace
 WHERE relkind = 'c' AND attnum > 0
UNION ALL
SELECT 'function', p.oid, 0, pronamespace, proname
  FROM pg_proc p JOIN lasting ON lasting.oid = pronamespace WHERE p.oid >= 16384
UNION ALL
SELECT CASE relkind WHEN 'c' THEN 'composite type' WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view'
       WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' ELSE 'index' END,
       c.oid, 0, relnamespace, relname
  FROM pg_class c JOIN lasting ON lasting.oid = relnamespace WHERE relkind NOT IN ('r', 'p', 't')
UNION ALL
SELECT 'role', oid, 0, 0, rolname FROM pg_roles
"""

# By kind, oid and number: the oid of the schema, and the name.
Names = Mapping[tuple[str, int, int], tuple[int, str]]


def read_names(session: Session) -> Names:
    return {
        (sys.intern(kind), oid, number): (schema, name)
        for kind, oid, number, schema, name in session.query(NAMES)
    }


def describe_change(then: Names, now: Names) -> str:
    """A phrase for the first name that has changed, or nothing. What is new or gone harms nothing,
    but a new attribute of a type that was there."""
    for (kind, oid, number), (schema, name) in now.items():
        if before := then.get((kind, oid, number)):
            what = f"{kind} {sql_identifier(before[1])}"
            if before[1] != name:
                return f"{what} was {f'renamed to {sql_identifier(name)}' if name else 'dropped'}"
            if before[0] != schema:
                return f"{what} was moved to another schema"
        elif kind == "attribute" and ("composite type", oid, 0) in then:
            return f"attribute {sql_identifier(name)} was added to a type"
    return ""


def find_change(run: RunContext, snapshot: Snapshot) -> str:
    """A phrase for a name that has changed since the snapshot, or nothing. pg_dump goes by name:
    two schemas that were swapped are dumped with each other's rows.

    A short second session asks, before our locks go: a migration that waits for them will rename
    only after that, and would look like one that slipped in. pg_dump's slot is free by now. Only
    where that session is refused, ours asks, when its locks are gone.
    """
    deadline = time.monotonic() + FREED_SECONDS
    while time.monotonic() < deadline:
        try:
            with Session(run.config) as beside:
                begin_read_only(beside)
                return describe_change(snapshot.names, read_names(beside))
        except ServerError:  # the server frees a connection some milliseconds late
            pause(run.progress, "a second connection", TICK_SECONDS)
    if run.session.is_busy:
        return ""
    run.session.query("COMMIT")  # every lock goes, for want of a second session
    begin_read_only(run.session)
    return describe_change(snapshot.names, read_names(run.session))


# What pg_dump's backend does (none of its parallel workers; without it `a` is null), on which
# relation it or ours waits for a lock, and whether anyone waits for them meanwhile. Within a
# transaction pg_stat_activity is frozen until pg_stat_clear_snapshot.
ACTIVITY = """
SELECT pg_stat_clear_snapshot();
SELECT starts_with(a.query, 'COPY '),
       concat_ws(' ', a.query_start, a.state_change, p.bytes_processed),
       (SELECT relation::bigint FROM pg_locks WHERE pid IN (a.pid, ours.pid) AND NOT granted
         LIMIT 1),
       EXISTS (SELECT FROM pg_locks WHERE pid IN (a.pid, ours.pid) AND NOT granted)
       AND EXISTS (SELECT FROM pg_locks w WHERE NOT w.granted
                      AND pg_blocking_pids(w.pid) && ARRAY[a.pid, ours.pid])
  FROM (SELECT %s) AS ours (pid) LEFT JOIN pg_stat_activity a
    ON a.usename = session_user AND a.application_name = 'backup_db ' || %s AND a.leader_pid IS NULL
  LEFT JOIN pg_stat_progress_copy p ON p.pid = a.pid LIMIT 1
"""


class DumpWatch:
    """pg_dump while it works: its end, its file, the room on the disk, who blocks it.

    --lock-wait-timeout does not cover every lock: pg_dump waits for ever behind an uncommitted
    REFRESH MATERIALIZED VIEW (tested on 15 to 18). And views and sequences cannot be locked
    beforehand: a migration that has replaced a view, and alters its table while pg_dump waits for
    that view, would be the victim of a deadlock, which the server detects after 1 s by default. We
    look more often, and release our locks. Where nobody waits for us, such a wait harms nobody.
    """

    def __init__(
        self, run: RunContext, pg_dump: Program, snapshot: Snapshot, expected_bytes: int
    ) -> None:
        self._run = run
        self._pg_dump = pg_dump
        self._snapshot = snapshot
        self._expected_bytes = expected_bytes
        self._written = 0
        self._patience = Patience()
        self._blocker: Blocker | None = None
        self._next_look = time.monotonic() + STILL_SECONDS  # by a session beside ours
        self.is_copying = False
        self.counter = RowCounter()

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Wait for pg_dump's end, or until the condition holds. Raises as `check` does."""
        while self._pg_dump.wait(TICK_SECONDS) is None and not until():
            self.check(self._run.session)
        self._check_status()

    def _check_status(self) -> None:
        if status := self._pg_dump.process.poll():
            raise DumpFailed(status, self._pg_dump.stderr_text)

    def check(self, session: Session | None = None) -> None:
        """Look at pg_dump's end, its file, the disk and the count; while the file stands still also
        at who blocks it, by our session, given where it is free, or by another. Raises DumpFailed,
        LetGo, Failure, Interrupted, and OSError where the disk fills."""
        check_signals()
        self._check_status()
        run, patience, written = self._run, self._patience, self._run.partial.dump.size_bytes
        grown, self._written = written - self._written, written
        self.is_copying |= written > 0
        if self._pg_dump.process.poll() is None:  # an ended one needs no more room
            why = f"kept free for others, and for the dump, now of {format_size(written)}"
            if run.last:
                why += f"; the last backup had {format_size(run.last.size_bytes or 0)}"
            require_room(run.partial.directory, 2 * grown, why)
        if patience.has_moved(written=written, rows=self.counter.rows):
            self._blocker = None
        if session and not grown:
            self._ask(session)
        elif patience.still_seconds > STILL_SECONDS and time.monotonic() > self._next_look:
            self._look_beside()
        if self._blocker is not None:
            blocks = f"{self._blocker} blocks"
            patience.check(f"pg_dump waits for a lock: {blocks} it", self._blocker)
            run.progress.show(f"Waiting: {blocks} pg_dump")
            return
        patience.check("pg_dump has written nothing more, and no row was counted")
        fraction = DUMP_SHARE * min(written / (self._expected_bytes or 1), 1)
        run.progress.show("Dumping", fraction, f"{format_size(written)} written")

    def _look_beside(self) -> None:
        """Ask another session, while ours is busy. If that is refused, there is no name to tell."""
        try:
            with Session(self._run.config) as beside:
                begin_read_only(beside)
                self._ask(beside)
        except ServerError:
            self._next_look = float("inf")  # never again

    def _ask(self, session: Session) -> None:
        """Look for what blocks pg_dump, or our count. Raises LetGo where somebody waits for our
        locks meanwhile."""
        self._blocker, self._next_look = None, time.monotonic() + STILL_SECONDS
        answer = session.query(ACTIVITY, self._snapshot.pid, self._snapshot.id)
        ((is_copying, activity, relation, others_wait),) = answer
        self.is_copying |= bool(is_copying)
        if relation:
            self._blocker = find_blocker(session, [relation])
        else:
            self._patience.has_moved(activity=activity)
        if others_wait:
            raise LetGo(self._blocker)


# All of pg_dump's messages about its own file (15 to 18); the server's come after "ERROR:".
OUTPUT_FILE_ERROR = re.compile(
    r"^\S+: error: could not (?:(?:open|write to|close) .*?file|(?:set|determine) seek position)\b"
    r".*: ([^:\n]+)$",
    re.MULTILINE,
)


def check_dump_file(run: RunContext, failed: DumpFailed) -> None:
    """Raise OSError where pg_dump's own file, or the disk, is why. (LC_ALL=C: it tells the errno's
    text in English.)"""
    directory, text = str(run.partial.directory), failed.stderr_text
    if match := OUTPUT_FILE_ERROR.search(text):
        number = next((number for number in errno.errorcode if os.strerror(number) == match[1]), 0)
        if number == errno.ENOENT:
            raise wrapper_failure(run.tools.pg_dump, WROTE_NOTHING, text)
        raise OSError(number, text, directory)
    if failed.status == -signal.SIGXFSZ:
        raise OSError(errno.EFBIG, f"{text}: the limit on file sizes was reached", directory)
    if DiskRoom.of(run.partial.directory).is_full:
        raise OSError(errno.ENOSPC, text, directory)


def diagnose_dump(run: RunContext, snapshot: Snapshot, failed: DumpFailed, is_last: bool) -> str:
    """Raise Failure with the cause of pg_dump's failure, by another look at the file, the server
    and the privileges; where another try is worth it, return why."""
    text = failed.stderr_text
    check_dump_file(run, failed)
    if failed.status == -signal.SIGTERM or "terminated by user" in text:
        why = "Somebody, or a shutdown, has ended pg_dump; nothing is wrong with the server"
        raise Failure(ExitCode.CREATION, text, why, AGAIN)
    if failed.status < 0:
        look = "See whether the system ran out of memory: sudo dmesg | grep -i 'killed process'"
        raise Failure(ExitCode.CREATION, text, look, AGAIN)
    try:
        change = find_change(run, snapshot)
        if not run.session.is_busy:  # with a count that nothing has ended
            run.session.query("COMMIT")  # Is the server there?
        # pg_dump's own statement names the snapshot. Where the server's answer does, in whatever
        # language, that server does not know it.
        if snapshot.id in re.sub(".*SET TRANSACTION SNAPSHOT.*", "", text):
            raise Failure(
                ExitCode.CONFIGURATION,
                "two servers answer at this address: pg_dump has reached another one than we have",
                "Name one server, no address that balances between several: set the host "
                f"{run.config.setting_locations['host']}",
            )
        with open_session(run.config) as other:  # Is there room for two connections?
            begin_read_only(other)
            check_privileges(other)
    except Failure as failure:
        raise Failure(failure.code, f"{text}\n{failure.detail}", *failure.steps) from None
    except ServerError as error:
        # Asked just now, it answers or is lost; only a lock may keep it.
        kind = ServerError if error.sqlstate == LOCK_NOT_AVAILABLE else ConnectionLost
        raise server_failure(kind(f"{text}\n{error.text}", error.sqlstate), "dumping") from None
    # All else is in order, and no data is written: a name has changed, even if none shows it.
    if not is_last and (change or run.partial.dump.size_bytes == 0):
        return change or text
    if change:
        detail = f"gave up after {DUMP_ATTEMPTS} attempts: {change}\n{text}"
        raise Failure(ExitCode.CREATION, detail, CALM_HOUR)
    if DAMAGE.search(text):  # after the other tries: a name may have these words
        table = COPIED_TABLE.search(text)
        raise damage_failure(text, table[1] if table else "")
    raise Failure(ExitCode.CREATION, text, SERVER_LOG, AGAIN)


# -- The directory: its lock, partial files, how a backup is published, the room on the disk ------

# By exit code (None: the operation's own) and errnos; the last row is for all others.
FILE_REMEDIES: Mapping[tuple[ExitCode | None, tuple[int, ...]], str] = {
    (ExitCode.DISK_SPACE, (errno.ENOSPC, errno.EDQUOT)): """
See what is full, blocks or inodes: df -h {path}; df -i {path}
Free space there, or keep fewer backups by BACKUP_KEEP in .env.local; these are there: {list}""",
    (ExitCode.PERMISSION, (errno.EROFS, errno.ENOLCK, errno.EOPNOTSUPP)): """
See whether it is mounted read-only, or has no locks: findmnt -T {path}""",
    (ExitCode.PERMISSION, (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)): """
{verify}
See what it is: ls -ld {path}""",
    (ExitCode.PERMISSION, (errno.EACCES, errno.EPERM)): """
{access}
See who may use it (this run is as user {user}): ls -ld {path}""",
    (None, (errno.EFBIG,)): """
See the limit on a file's size of this session (FAT32 has one, too: 4 GB): ulimit -f""",
    (None, (errno.ENAMETOOLONG,)): "Name a shorter path",
    (None, ()): "Check the file system: df -h {path}; sudo dmesg | tail",
}


def file_failure(error: OSError, default_code: ExitCode = ExitCode.CREATION) -> Failure:
    """The one place where an errno becomes an exit code; `default_code` is that of all others.
    What another program met is raised as an OSError too: its errno, its words, the path."""
    number, path = error.errno or 0, Path(os.fsdecode(error.filename or ""))
    detail = f"{display_path(path)}: " if error.filename else ""
    detail += error.strerror or str(error)
    rows = FILE_REMEDIES.items()
    code, text = next(
        (code, text) for (code, numbers), text in rows if number in numbers or not numbers
    )
    existing = next((place for place in (path, *path.parents) if os.path.lexists(place)), Path("."))
    is_dump = path.name.endswith(DUMP_SUFFIX)
    other = shell_words("--output-dir", str(path.parent)) if is_dump else "--output-dir DIR"
    verb = {ExitCode.CREATION: "use", ExitCode.GENERAL: "list"}.get(default_code)
    steps = fill_steps(
        f"{text}\n{{elsewhere}}",
        path=shell_words(str(existing)),
        user=user_name(),
        access=access_step(path, existing, default_code),
        list=list_command(existing if os.path.isdir(existing) else existing.parent),
        verify=f"To check that backup: {verify_command(str(path))}" if is_dump else "",
        elsewhere=f"Or {verb} another directory: {other}" if verb else "",
    )
    return Failure(code or default_code, detail, *steps)


def access_step(path: Path, existing: Path, default_code: ExitCode) -> str:
    """How this user gets at a path, or at what exists of it. What is another user's, such as that
    of the nightly job, stays theirs; what a run by sudo has left to root need not."""
    try:
        status = os.stat(existing)
    except OSError:  # a link to where this user may not look
        return ""
    user, place = shell_words(user_name()), shell_words(str(existing))
    if status.st_uid == os.geteuid():
        return f"Give yourself access: chmod u+rwX {place}"
    if status.st_uid or default_code not in {ExitCode.CREATION, ExitCode.CONFIGURATION}:
        owner = re.sub(r"^(?=\d+$)", "#", user_name(status.st_uid))  # a number, as sudo takes it
        again = shell_words("sudo", "-u", owner, sys.executable, *sys.argv)
        return f"It belongs to {printable(owner)}; run this as that user: {again}"
    if path != existing and not path.name.endswith((LOCK_SUFFIX, PARTIAL_SUFFIX)):
        place = shell_words(str(path))
        return f"Make it for this user: sudo mkdir -p {place}; sudo chown {user} {place}"
    # A file of ours, or a directory as we make one, for its owner alone; none of the system's.
    is_ours = stat.S_ISREG(status.st_mode) or SCRIPT_DIR in Path(os.path.realpath(existing)).parents
    is_ours |= not status.st_mode & 0o077 and str(existing) != "/root"
    return f"Root made it; take it over: sudo chown {user} {place}" if is_ours else ""


@contextlib.contextmanager
def with_filename(path: Path) -> Iterator[None]:
    """Let an OSError from inside say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def user_name(number: int | None = None) -> str:
    """The operating system's name for a user, by default that of this run; or its number."""
    import pwd

    number = os.geteuid() if number is None else number
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def make_directory(directory: Path) -> None:
    """Make the output directory, for its owner alone; one that is there stays as it is."""
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:  # which would not tell that it is no directory
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None
    for path in made:  # its name, too, has to survive a power cut
        sync_directory(path.parent)


@contextlib.contextmanager
def database_lock(path: Path) -> Iterator[OpenFile]:
    """One run at a time per database and directory: flock() on a hidden file that is never deleted.
    pg_dump inherits it: where this process is killed, the lock lasts until pg_dump ends."""
    # Others may have put a link, a pipe or a second name here: that must not be written to.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with contextlib.closing(OpenFile.open(path, flags)) as file:
        status = os.fstat(file.descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise OSError(errno.EEXIST, "it is no lock file of ours", str(path))
        with with_filename(path):
            try:
                fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise held_lock_failure(file) from None
            os.ftruncate(file.descriptor, 0)
            about = f"pid {os.getpid()}\nstarted {iso_timestamp(datetime.now(timezone.utc))}\n"
            os.write(file.descriptor, about.encode())
        yield file


def held_lock_failure(lock: OpenFile) -> Failure:
    """Another run has the lock, or the pg_dump of one that was killed."""
    text = os.pread(lock.descriptor, 1000, 0).decode("ascii", "replace")
    match = re.match(r"pid (\d{1,9})\nstarted ([\d:TZ-]+)\n(?:pg_dump (\d+)\n)*", text, re.ASCII)
    pid, started, pg_dump = match.groups() if match else ("?", "?", None)
    either = shell_words("|".join(filter(None, (pid, pg_dump)))) if match else "backup_db"
    return Failure(
        ExitCode.GENERAL,
        f"another backup of this database is running: process {pid}, started {started}",
        f"Wait until it has ended; look at it: ps -ef | grep -wE {either}",
        *([f"If only its pg_dump is left, wait for that, or: kill {pg_dump}"] if pg_dump else []),
        "For another server's database of this name use another directory: --output-dir DIR",
    )


class PartialBackup:
    """The two hidden files of a run, until both are complete and get their names by `publish`.
    Whatever ends the run before that, `close` removes both. They are used by their descriptors."""

    def __init__(self, directory: Path, prefix: str) -> None:
        self.directory = directory
        self._prefix = prefix
        self._hidden = [
            directory / f".{prefix}{suffix}{PARTIAL_SUFFIX}"
            for suffix in (DUMP_SUFFIX, METADATA_SUFFIX)
        ]
        self._files: list[OpenFile] = []

    def close(self) -> None:
        """Remove what was not published, the last attempt's or a killed run's."""
        while self._files:
            self._files.pop().close()
        for path in self._hidden:
            # This must not hide why the run failed; what stays, the next run removes.
            with contextlib.suppress(OSError):
                path.unlink()

    def begin(self) -> None:
        """Create both files, to be named by this second, or by the next that is free."""
        self.close()
        while True:
            self.moment = datetime.now(timezone.utc).replace(microsecond=0)
            stem = f"{self._prefix}_{iso_timestamp(self.moment).replace(':', '-')}"
            self.published_dump = self.directory / (stem + DUMP_SUFFIX)
            self._published_metadata = metadata_path(self.published_dump)
            if not any(map(os.path.lexists, (self.published_dump, self._published_metadata))):
                break
            check_signals()
            time.sleep(TICK_SECONDS)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        for path in self._hidden:
            path.unlink(missing_ok=True)  # where it could not be removed, this says why
            self._files.append(OpenFile.open(path, flags))
        self.dump, self._metadata = self._files

    def publish(self, metadata: Metadata) -> list[str]:
        """Write the metadata and rename both files. Returns what was not synced. Raises OSError;
        Interrupted, which tells whether it came too late."""
        with with_filename(self._metadata.path):
            with open(self._metadata.descriptor, "w", encoding="utf-8", closefd=False) as file:
                file.write(metadata.to_json())
            Background(self._metadata.sync).wait()
        pairs = ((self._metadata, self._published_metadata), (self.dump, self.published_dump))
        for partial, published in pairs:
            if os.path.lexists(published):  # not of our making, since we hold the lock
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(published))
            if not os.path.samestat(os.fstat(partial.descriptor), os.lstat(partial.path)):
                reason = "it was replaced by somebody else"
                raise OSError(errno.EEXIST, reason, str(partial.path))
        check_signals()
        # The metadata first: a dump that can be seen is always described. The other way round, a
        # process that is killed in between would leave a dump without a checksum.
        self._metadata.path.rename(self._published_metadata)
        try:
            complaints = [sync_directory(self.directory)]
            self.dump.path.rename(self.published_dump)
        except BaseException:
            self._published_metadata.unlink(missing_ok=True)
            raise
        try:
            complaints.append(sync_directory(self.directory))
            check_signals()
        except Interrupted as interrupted:
            interrupted.outcome = "The new backup is whole and published."
            raise
        return list(dict.fromkeys(filter(None, complaints)))


def sync_directory(directory: Path) -> str:
    """Write the names in a directory to the disk. Returns a complaint where the disk fails; on
    network file systems other errors mean that there is nothing to sync."""

    def sync() -> None:  # to open it may take long too, on a network
        with contextlib.closing(OpenFile.open(directory, os.O_RDONLY)) as opened:
            opened.sync()

    try:
        Background(sync).wait()
    except MemoryError as error:  # no room for the thread
        return f"{display_path(directory)} could not be synced: {error}"
    except OSError as error:
        if error.errno == errno.EIO:
            return f"{display_path(directory)} could not be synced: {error.strerror}"
    return ""


class DiskRoom(NamedTuple):
    """The free space of a file system; unlimited where that does not report it."""

    free_bytes: int
    reserve_bytes: int  # of these, kept free for others: a server whose data is there would stop
    is_full: bool  # no bytes, or no inodes where it counts them

    @classmethod
    def of(cls, directory: Path) -> DiskRoom:
        with contextlib.suppress(OSError):
            disk = os.statvfs(directory)
            if disk.f_blocks:
                free = disk.f_bavail * disk.f_frsize
                reserve = min(RESERVE_BYTES, int(RESERVE_SHARE * disk.f_blocks * disk.f_frsize))
                has_inodes = disk.f_files == 0 or disk.f_favail > 0
                return cls(free, reserve, free < FULL_DISK_BYTES or not has_inodes)
        return cls(sys.maxsize, 0, False)


def require_room(directory: Path, need_bytes: int, why: str) -> None:
    """Raise OSError where the disk has no room for that much beside the reserve."""
    room = DiskRoom.of(directory)
    need_bytes += room.reserve_bytes
    if room.free_bytes < need_bytes:
        free, need = format_size(room.free_bytes), format_size(need_bytes)
        raise OSError(errno.ENOSPC, f"{free} free, at least {need} needed ({why})", str(directory))


def expected_dump_bytes(run: RunContext, snapshot: Snapshot) -> int:
    """About how large the dump will be. Raises OSError only where it can hardly fit: a backup that
    would have fitted must not be refused, and DumpWatch handles a disk that fills."""
    last, database_bytes = run.last, snapshot.facts["database_size_bytes"]
    need, expected = NEED_OF_DATABASE * database_bytes, EXPECTED_OF_DATABASE * database_bytes
    basis = f"the database has {format_size(database_bytes)}"
    if last is not None and last.size_bytes and last.database_size_bytes:
        expected = last.size_bytes * database_bytes / last.database_size_bytes
        need = NEED_OF_LAST_BACKUP * expected
        basis = f"the last backup had {format_size(last.size_bytes)}"
    require_room(run.partial.directory, int(need), basis)
    return int(expected)


# -- The backups that are there -------------------------------------------------------------------


class Status(str, enum.Enum):
    VERIFIED = "✓ Verified"  # when it was made, and of the same size since
    NOT_VERIFIED = "✗ Not verified"
    SIZE_MISMATCH = "✗ Size mismatch"
    NO_METADATA = "✗ No metadata"
    BAD_METADATA = "✗ Bad metadata"
    NOT_READABLE = "✗ Not readable"


class Backup(NamedTuple):
    """A `.dump` in a directory, and what its metadata, or its name, tells; `-` for the rest."""

    dump: Path
    size_bytes: int | None
    status: Status
    timestamp: str
    series: Series
    is_described: bool = False  # by metadata that was read
    is_renamed: bool = False  # since it was made
    total_rows: int = 0
    database_size_bytes: int | None = None
    postgresql_version: str = ""

    @property
    def moment(self) -> datetime:
        return parse_iso_timestamp(self.timestamp)


def find_backups(directory: Path) -> list[Backup]:
    """Every backup in the directory, broken ones too, the newest first. Raises OSError."""
    backups = [
        read_backup(directory, name)
        for name in os.listdir(directory)
        if name.endswith(DUMP_SUFFIX) and not name.startswith(".")
    ]
    return sorted(backups, key=lambda backup: (backup.timestamp, backup.dump.name), reverse=True)


def read_backup(directory: Path, name: str) -> Backup:
    """The backup whose dump has this name, from its metadata and the size of its dump. As text, and
    without Metadata: a list has thousands."""
    dump, path = directory / name, f"{directory}/{name}"
    size_bytes: int | None = None
    with contextlib.suppress(OSError):  # unreadable, or a link to nowhere
        file = os.stat(path)
        size_bytes = file.st_size if stat.S_ISREG(file.st_mode) else None
    try:
        values = read_metadata_values(path.removesuffix(DUMP_SUFFIX) + METADATA_SUFFIX)
    except FileNotFoundError:
        status = Status.NO_METADATA
    except PermissionError:
        status = Status.NOT_READABLE
    except (OSError, MetadataError):
        status = Status.BAD_METADATA
    else:
        return described_backup(dump, size_bytes, values)
    timestamp, series = "-", Series("-", "-")
    if match := FILE_NAME.fullmatch(name):
        timestamp = "{date}T{hour}:{minute}:{second}Z".format_map(match.groupdict())
        series = Series(match["prefix"], match["environment"] or "-")
    return Backup(dump, size_bytes, status, timestamp, series)


def described_backup(dump: Path, size_bytes: int | None, values: Mapping[str, Any]) -> Backup:
    optional = {
        key: value
        for key in ("verification", "system_identifier", "database_size_bytes")
        if FITS[key](value := values.get(key))
    }
    status = Status.VERIFIED if optional.get("verification") else Status.NOT_VERIFIED
    if size_bytes != values["backup_size_bytes"]:
        status = Status.SIZE_MISMATCH
    return Backup(
        dump,
        size_bytes,
        status,
        values["backup_timestamp"],
        Series(values["database_name"], values["environment"], optional.get("system_identifier")),
        is_described=True,
        is_renamed=values["backup_file"] != dump.name,
        total_rows=sum(values["table_counts"].values()),
        database_size_bytes=optional.get("database_size_bytes"),
        postgresql_version=values["postgresql_version"],
    )


def verified_backups(backups: Iterable[Backup], series: Series) -> list[Backup]:
    """Those of the series that are verified and bear the name they were given."""
    return [
        backup
        for backup in backups
        if backup.status is Status.VERIFIED and not backup.is_renamed
        if series.matches(backup.series)
    ]


def newest_verified(backups: Iterable[Backup]) -> Backup | None:
    return next((backup for backup in backups if backup.status is Status.VERIFIED), None)


def find_orphans(directory: Path) -> list[Path]:
    """Our metadata files whose dump is gone, but for those that a run may be publishing."""
    names = set(os.listdir(directory))
    return sorted(
        directory / name
        for name in names
        if name.endswith(METADATA_SUFFIX)
        and name.removesuffix(METADATA_SUFFIX) + DUMP_SUFFIX not in names
        and (match := FILE_NAME.fullmatch(name))
        and match["environment"]
        and f".{match['prefix']}{DUMP_SUFFIX}{PARTIAL_SUFFIX}" not in names
    )


def backups_to_keep(backups: Sequence[Backup], retention: Retention) -> set[Backup]:
    """Those of the backups, which come the newest first, that any part of BACKUP_KEEP keeps; the
    first always. A period without a backup does not count."""
    kept = set(backups[: retention.newest])
    for count, period in (
        (retention.days, "%Y-%m-%d"),
        (retention.weeks, "%G-%V"),  # of ISO 8601: the last days of December may be in week 1
        (retention.months, "%Y-%m"),
        (retention.years, "%Y"),
    ):
        newest: dict[str, Backup] = {}
        for backup in backups:
            newest.setdefault(backup.moment.strftime(period), backup)
        kept.update(list(newest.values())[:count])
    return kept


def last_full_backup(backups: Sequence[Backup], kept: Collection[Backup]) -> Backup | None:
    """The last full one of the backups, which come the newest first, if it is not kept: it has more
    than twice the rows of every newer one that is kept. (The newest of all may be empty, some
    nights after the database was; an older one that the calendar keeps lacks what came later.)"""
    most_kept = 0
    for backup in backups:
        if backup in kept:
            most_kept = max(most_kept, backup.total_rows)
        elif backup.total_rows > 2 * most_kept:
            return backup
    return None


def read_recent(earlier: Sequence[Backup]) -> list[Metadata]:
    """The metadata of the last earlier backups, whole; that of hundreds would fill the memory."""
    recent = []
    for backup in earlier[:RECENT_BACKUPS]:
        with contextlib.suppress(OSError, MetadataError):  # it was there a moment ago
            recent.append(Metadata.read(metadata_path(backup.dump)))
    return recent


def shrunk_tables(made: Metadata, recent: Sequence[Metadata]) -> list[tuple[str, int, int]]:
    """The tables with less than half of the fewest rows that they had in the recent backups: rows
    now, and that fewest; the greatest loss first. Next night it is the fewest, and not told again.

    One that is gone counts if every recent backup has it. Partitions are summed under their topmost
    table; what the newest that records one says holds for all, since older ones record nothing.
    """
    topmost = ChainMap(*(dict(metadata.partition_of or {}) for metadata in (made, *recent)))

    def sum_rows(metadata: Metadata) -> Counter[str]:
        rows: Counter[str] = Counter()
        for key, count in metadata.table_counts.items():
            rows[topmost.get(key, key)] += count
        return rows

    now = sum_rows(made)
    had: dict[str, list[int]] = {}
    for metadata in recent:
        for table, count in sum_rows(metadata).items():
            had.setdefault(table, []).append(count)
    shrunk = [
        (table, now[table], min(counts))
        for table, counts in had.items()
        if 2 * now[table] < min(counts) and (table in now or len(counts) == len(recent))
    ]
    return sorted(shrunk, key=lambda table: table[2] - table[1], reverse=True)


def retire_backups(
    made: Backup, earlier: Sequence[Backup], retention: Retention
) -> tuple[list[Path], list[str]]:
    """Remove the earlier backups that BACKUP_KEEP does not keep, but for the last full one and
    those from the future. Returns the removed dumps, and warnings."""
    removed: list[Path] = []
    warnings: list[str] = []
    latest = iso_timestamp(datetime.now(timezone.utc) + CLOCK_TOLERANCE)
    backups = [made, *(backup for backup in earlier if backup.timestamp <= latest)]
    kept = backups_to_keep(backups, retention)
    if full := last_full_backup(backups, kept):
        newer = backups[: backups.index(full)]
        most = max(backup.total_rows for backup in newer if backup in kept)
        files = [display_path(full.dump), display_path(metadata_path(full.dump))]
        warnings.append(
            f"{files[0]} is kept beyond BACKUP_KEEP: it has {plural(full.total_rows, 'row')}, the "
            f"newer ones at most {most}. "
            f"If those rows were deleted on purpose: {shell_words('rm', '--', *files)}"
        )
    for backup in backups[1:]:
        if backup in kept or backup == full:
            continue
        try:
            backup.dump.unlink()  # first: metadata alone is no backup to anyone
            removed.append(backup.dump)
            metadata_path(backup.dump).unlink()
        except OSError as error:
            path = Path(os.fsdecode(error.filename))
            warnings.append(f"{display_path(path)} was not removed: {error.strerror}")
    return removed, warnings


# -- Operations: create, verify -------------------------------------------------------------------


def create_backup(
    config: DatabaseConfig,
    output_dir: Path,
    progress: Progress,
    announce: Callable[[Sequence[str], Sequence[str]], None],
) -> None:
    """Make, verify, publish and announce a backup: lock, snapshot, dump and count, read back,
    publish; only then remove old ones. `announce` is called with lines of a result and warnings.

    Raises Failure or OSError; then earlier backups are untouched, and there is no new one.
    """
    started = time.monotonic()
    tools = find_tools(config)
    with open_session(config) as session:  # first: a wrong password leaves no directory
        with on_server("reading the catalog"):
            check_server(session, config, tools.pg_dump)
            begin_read_only(session)
            check_privileges(session)
            series = identify_series(session, config)
            session.query("ROLLBACK")
        make_directory(output_dir)
        prefix = file_prefix(config.name, config.environment.value)
        partial = PartialBackup(output_dir, prefix)
        lock_file = output_dir / f".{prefix}{LOCK_SUFFIX}"
        with database_lock(lock_file) as lock, contextlib.closing(partial):
            backups = find_backups(output_dir)  # now: nobody else writes, no table is locked
            earlier = verified_backups(backups, series)
            recent = read_recent(earlier)
            of_any_server = verified_backups(backups, series._replace(server=None))
            last = next(iter(of_any_server), None)
            run = RunContext(config, tools, session, lock, partial, progress, last)
            snapshot, counts, dump_warnings = dump_database(run)
            session.close()  # nothing more is asked of the server
            Background(partial.dump.sync).wait()
            draft = draft_metadata(run, snapshot, counts, series)
            metadata, hints = verify_new_dump(run, draft, started)
            unsynced = partial.publish(metadata)
            made = read_backup(output_dir, partial.published_dump.name)
            warnings = [dump_warnings, hints, *unsynced, *shrinkage_lines(metadata, recent)]
            if not metadata.table_counts:
                question = "the database has no table; is it the right one? It is set "
                warnings.append(question + config.setting_locations["name"])
            announce(creation_lines(made.dump, metadata), warnings)
            # A name that may not be on the disk replaces no older backup.
            if config.retention and not unsynced:
                removed, notes = retire_backups(made, earlier, config.retention)
                paths = list_names(map(display_path, removed))
                announce([f"Removed:     {paths}"] if removed else [], notes)


def verify_new_dump(run: RunContext, draft: Metadata, started: float) -> tuple[Metadata, str]:
    """Read the new dump back; its metadata with the results, and pg_restore's warnings. Raises
    Failure where it is not what the database held."""
    pg_restore, directory = run.tools.pg_restore, run.partial.directory
    examination = examine_dump(pg_restore, run.partial.dump, draft, run.progress, DUMP_SHARE)
    if examination.problem:
        detail = f"the new dump does not hold what the database held\n{examination.problem}"
        if DiskRoom.of(directory).is_full:
            raise OSError(errno.ENOSPC, f"the disk is full: {detail}", str(directory))
        raise Failure(
            ExitCode.VERIFICATION,
            detail,
            "Run the backup again",
            "If it fails again, check the disk and the memory of this machine: "
            "sudo dmesg | tail -50",
            f"The failed dump was deleted. Earlier backups: {list_command(directory)}",
        )
    found = examination.found
    metadata = draft._replace(
        checksum_sha256=examination.digest,
        duration_seconds=round(time.monotonic() - started, 3),
        verification={
            "verified_at": iso_timestamp(datetime.now(timezone.utc)),
            "rows_read_back": sum(found.rows.values()),
            "tables_read_back": len(found.rows),
            "large_objects_read_back": found.large_objects,
            "pg_restore_version": pg_restore.version,
        },
    )
    return metadata, found.warnings


def missing_package_failure(error: ImportError) -> Failure:
    from importlib.util import find_spec

    script, requirements, venv = (
        display_path(SCRIPT_DIR / name) for name in ("backup_db.py", "requirements.txt", ".venv")
    )
    # In an environment of its own, since a system's pip refuses (Debian, Homebrew).
    make = shell_words(sys.executable, "-m", "venv", venv) + " && "
    make += shell_words(f"{venv}/bin/pip", "install", "-r", requirements)
    run = shell_words(f"{venv}/bin/python3", script)
    steps = [f"Install what the script needs: {make}", f"Run it by the python there: {run}"]
    if sys.prefix != sys.base_prefix:
        install = shell_words(sys.executable, "-m", "pip", "install", "-r", requirements)
        steps = [f"Install what the script needs: {install}"]
    elif not find_spec("ensurepip"):
        steps.insert(0, "Install Debian's part of python3 for this: sudo apt install python3-venv")
    detail = f"a package is missing: {error} (python is {printable(sys.executable)})"
    return Failure(ExitCode.GENERAL, detail, *steps)


def foreign_config_failure(error: BaseException) -> Failure:
    """brain_core/config.py is missing, or another project's, whose import may end in anything."""
    path = SCRIPT_DIR / "brain_core" / "config.py"
    reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
    if path.exists():
        detail = f"{display_path(path)} is not the one that backup_db.py came with: {reason}"
        script, folder = (
            shell_words(display_path(SCRIPT_DIR / name)) for name in ("backup_db.py", "backup")
        )
        move = f"mkdir {folder} && mv {script} {folder} && ln -s ../.env.local {folder}"
        steps = [
            f"Leave that file as it is, and give backup_db.py a folder of its own: {move}",
            f"Then copy the brain_core/ that it came with into {folder}",
        ]
    else:
        detail = f"{display_path(path)} is missing: {reason}"
        steps = ["Copy brain_core/, beside backup_db.py, from where that came from"]
    readme = 'All of it is in README.md, "Into an existing project"'
    return Failure(ExitCode.GENERAL, detail, *steps, readme)


def load_configuration(environment_option: str) -> DatabaseConfig:
    if str(SCRIPT_DIR) not in sys.path:  # python3 -I, -P, PYTHONSAFEPATH
        sys.path.append(str(SCRIPT_DIR))
    try:
        from brain_core.config import ConfigurationError, load_config, read_settings
    except (Exception, SystemExit) as error:  # noqa: BLE001 - another project's may raise anything
        raise foreign_config_failure(error) from None
    try:
        return load_config(environment_option, read_settings(os.environ, SCRIPT_DIR))
    except ConfigurationError as error:
        raise Failure(
            ExitCode.CONFIGURATION, printable(str(error)), *map(printable, error.steps)
        ) from None
    except OSError as error:
        raise file_failure(error, ExitCode.CONFIGURATION) from None
    except ImportError as error:
        raise missing_package_failure(error) from None


def become_libpq_environment(config: DatabaseConfig) -> None:
    """Make the settings those of libpq, here and in pg_dump: no secret is on a command line."""
    for name in [name for name in os.environ if name.startswith("PG") and name != "PGCLUSTER"]:
        del os.environ[name]
    os.environ.update(config.libpq)
    os.environ["PGDATESTYLE"] = "ISO"  # or psycopg2 sets it, and it stays on a pooled connection


def check_server(session: Session, config: DatabaseConfig, pg_dump: Tool) -> None:
    """Raise Failure for whatever makes a backup impossible; nothing is written yet."""
    check_no_pooler(session, config)
    major = session.server_version // 10000
    if major < OLDEST_MAJOR:
        raise Failure(
            ExitCode.TOOL,
            f"the server is version {major}, and {OLDEST_MAJOR} is the oldest that this works "
            "with: before it a long dump cannot be watched",
            f"Back it up by hand, which is not verified: pg_dump {libpq_options()} --format=custom "
            "--file=by_hand.dump",
            "Then upgrade the server: PostgreSQL's project mends that version no more",
        )
    check_version(pg_dump, major, f"too old for the server, which is version {major}")


def identify_series(session: Session, config: DatabaseConfig) -> Series:
    ((database,),) = session.query("SELECT current_database()")
    try:
        control = "SELECT system_identifier::text FROM pg_catalog.pg_control_system()"
        ((server,),) = session.query(control)
    except ConnectionLost:
        raise
    except ServerError:  # some services hide it
        server = None
    return Series(database, config.environment.value, server)


def draft_metadata(
    run: RunContext, snapshot: Snapshot, counts: Sequence[int], series: Series
) -> Metadata:
    """What the metadata says of a dump before it is read back: no checksum, no verification."""
    keys = {table.oid: table.key for table in snapshot.tables}
    tables = snapshot.copied_tables
    draft = Metadata(
        backup_timestamp=iso_timestamp(run.partial.moment),
        environment=series.environment,
        backup_db_version=BACKUP_DB_VERSION,
        backup_file=run.partial.published_dump.name,
        backup_size_bytes=run.partial.dump.size_bytes,
        checksum_sha256="",
        table_counts={table.key: rows for table, rows in zip(tables, counts, strict=True)},
        table_oids={table.key: table.oid for table in tables},
        partition_of={table.key: keys[table.root] for table in tables if table.root},
        pg_dump_version=run.tools.pg_dump.version,
        system_identifier=series.server,
        compression=run.tools.compression,
        **snapshot.facts,
    )
    return draft._replace(restore=restore_commands(draft))


def load_metadata(dump: Path) -> Metadata:
    try:
        is_dump = stat.S_ISREG(dump.stat().st_mode) and dump.name.endswith(DUMP_SUFFIX)
        detail = "" if is_dump else f"{display_path(dump)} is not a {DUMP_SUFFIX} file"
    except FileNotFoundError:
        detail = f"there is no file {display_path(dump)}"
    if detail:
        folder = dump if dump.is_dir() else dump.parent
        steps = [f"See which backups there are: {list_command(folder)}"]
        name = dump.name.replace(METADATA_SUFFIX, DUMP_SUFFIX)
        meant = (str(dump.with_name(name)), display_path(DEFAULT_OUTPUT_DIR / name))
        if meant_dump := next(filter(os.path.isfile, meant), ""):
            steps.insert(0, f"Name the dump: {verify_command(meant_dump)}")
        raise Failure(ExitCode.VERIFICATION, detail, *steps)
    path = metadata_path(dump)
    steps = ["Bring the metadata file back from the place that this backup was copied to or from"]
    try:
        return Metadata.read(path)
    except NewerMetadata as error:
        steps = ["Verify it with that release of backup_db.py, or a newer one"]
        detail = f"{display_path(path)}: {printable(str(error))}; this is {BACKUP_DB_VERSION}"
    except MetadataError as error:
        detail = f"{display_path(path)} cannot be used: {printable(str(error))}"
    except FileNotFoundError:
        detail = f"there is no metadata file {display_path(path)}"
    steps.append(
        f"What the dump alone can tell: pg_restore --file=/dev/null {shell_words(str(dump))}"
    )
    raise Failure(ExitCode.VERIFICATION, detail, *steps)


# -- Reports: what a person reads -----------------------------------------------------------------


def write_lines(stream: IO[str] | None, lines: Iterable[str]) -> str:
    """Print. Returns why a stream failed, which must not end the run; a reader that has left
    (`| head`), or a stream that never was open, is no failure."""
    if stream is None:
        return ""
    try:
        stream.write("".join(f"{line}\n" for line in lines))
        stream.flush()
    except OSError as error:
        # Python would try again at exit, and end with status 120.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return "" if isinstance(error, BrokenPipeError) else str(error.strerror)
    return ""


def describe_tables(table_counts: Mapping[str, int]) -> str:
    """`4 (150 conversations, 3420 messages, …)`: in the order of creation, at most six."""
    if not table_counts:
        return "0"
    shown = set(sorted(table_counts, key=lambda key: table_counts[key], reverse=True)[:6])
    parts = [f"{rows} {printable(key)}" for key, rows in table_counts.items() if key in shown]
    if len(table_counts) > len(parts):
        parts.append(f"and {len(table_counts) - len(parts)} more")
    return f"{len(table_counts)} ({', '.join(parts)})"


def creation_lines(dump: Path, made: Metadata) -> list[str]:
    """The contract's success output, then what is in the dump and what is not."""
    contents = row_summary(made.total_rows, len(made.table_counts), made.large_object_count or 0)
    lines = [
        "✓ Backup created successfully",
        "",
        f"Backup File: {display_path(dump)}",
        f"Metadata:    {display_path(metadata_path(dump))}",
        f"Size:        {format_size(made.backup_size_bytes)}",
        f"Environment: {made.environment}",
        f"Database:    {printable(made.database_name)}",
        f"Tables:      {describe_tables(made.table_counts)}",
        f"Checksum:    {made.checksum_sha256[:12]}...",
        "Verified:    ✓ Integrity check passed",
        f"Contents:    ✓ Match ({contents})",
    ]
    # A restore brings these back, and each night they would hide what it does not.
    left_out = [phrase for phrase in made.not_included if not phrase.startswith(COMPUTED_ANEW)]
    if left_out:
        lines.append(f"Not included: {printable('; '.join(left_out))}")
    return lines


def verification_lines(dump: Path, metadata: Metadata, examination: Examination) -> list[str]:
    """The contract's verification output, below its first line; no line for a check not made."""
    return [
        f"File:        {display_path(dump)}",
        f"Checksum:    {examination.checksum.verdict}",
        f"Structure:   {examination.structure.verdict}",
        f"Size:        {format_size(dump.stat().st_size)}",
        f"Timestamp:   {metadata.backup_timestamp}",
        *([f"Contents:    {examination.contents.verdict}"] if examination.contents else []),
    ]


def list_lines(
    backups: Sequence[Backup], orphans: Sequence[Path], directory: Path, now: datetime
) -> Iterator[str]:
    """The contract's table, its totals, each series, and what needs a person's eye."""
    folder = display_path(directory).rstrip("/") + "/"
    if backups:
        yield from table_lines(backups, folder)
    else:
        yield f"No backups yet in {folder}"
        if os.path.abspath(directory) != str(DEFAULT_OUTPUT_DIR):
            yield f"The usual directory: {list_command(DEFAULT_OUTPUT_DIR)}"
    latest = iso_timestamp(now + CLOCK_TOLERANCE)
    present = [backup for backup in backups if backup.timestamp <= latest]
    yield from series_lines(present, now)
    if future := [backup.dump.name for backup in backups if backup.timestamp > latest]:
        yield f"{len(future)} dated in the future, left alone by BACKUP_KEEP: {list_names(future)}"
    if orphans:
        command = shell_words("rm", "--", *map(display_path, orphans[:MOST_NAMES]))
        yield f"{len(orphans)} metadata without a dump; remove what is not coming back: {command}"
    if newest := newest_verified(present):
        command = verify_command(display_path(newest.dump))
        yield f"Verified means verified when it was made. To check a file now: {command}"


def table_lines(backups: Sequence[Backup], folder: str) -> Iterator[str]:
    rows = [("Timestamp", "Environment", "Database", "Size", "Status")]
    for backup in backups:
        database, environment = map(printable, backup.series[:2])
        size = "-" if backup.size_bytes is None else format_size(backup.size_bytes)
        is_named = backup.is_described and not backup.is_renamed
        name = "" if is_named else f" ({printable(backup.dump.name)})"
        rows.append((backup.timestamp, environment, database, size, backup.status.value + name))
    widths = [
        max(least, *(len(cell) + 2 for cell in column))
        for least, column in zip((25, 13, 20, 10, 0), zip(*rows, strict=True), strict=True)
    ]
    yield from (f"Backup Files ({folder}):", "")
    for row in rows:
        yield "".join(map(str.ljust, row, widths)).rstrip()
    total = format_size(sum(backup.size_bytes or 0 for backup in backups))
    unusable = sum(backup.status is not Status.VERIFIED for backup in backups)
    yield ""
    yield f"{plural(len(backups), 'backup')}, {total} in all" + (
        f", {unusable} not usable" if unusable else ""
    )


def series_lines(backups: Sequence[Backup], now: datetime) -> Iterator[str]:
    """A line for each series: it shows where nightly backups have stopped, or were left behind."""
    by_series: dict[Series, list[Backup]] = {}
    for backup in backups:
        if backup.is_described:
            by_series.setdefault(backup.series, []).append(backup)
    servers = Counter(series[:2] for series in by_series)
    for series, members in by_series.items():
        text = f"{printable(series.environment)} {printable(series.database)}"
        if servers[series[:2]] > 1:
            version = printable(members[0].postgresql_version)
            text += f" of server {printable(series.server or 'unknown')} (PostgreSQL {version})"
        size_bytes = sum(backup.size_bytes or 0 for backup in members)
        text += f": {plural(len(members), 'backup')}, {format_size(size_bytes)}; "
        if newest := newest_verified(members):
            age = format_age((now - newest.moment).total_seconds())
            yield text + f"newest verified {age} old: {printable(newest.dump.name)}"
        else:
            yield text + "none verified"


def shrinkage_lines(made: Metadata, recent: Sequence[Metadata]) -> list[str]:
    """A sentence about the tables with fewer rows than in the recent backups, if any."""
    tables = [
        f"{key} {now} (at least {least} before)" for key, now, least in shrunk_tables(made, recent)
    ]
    last = f"any of the last {len(recent)} backups" if len(recent) > 1 else "the last backup"
    return [f"fewer rows than in {last}: {list_names(tables, most=6)}"] if tables else []


def failure_lines(headline: str, failure: Failure) -> list[str]:
    """`✗ Backup failed: …`, the tool's own words, and what to do."""
    lines = [f"✗ {headline}", ""]
    if failure.report:
        lines += [*failure.report, ""]
    lines.append(f"Error: {failure.detail}")
    if failure.steps:
        lines += ["", "Troubleshooting:"]
        lines += [f"  {number}. {step}" for number, step in enumerate(failure.steps, 1)]
    return lines


# -- Command line ---------------------------------------------------------------------------------


class Mode(NamedTuple):
    headline: str  # of a failure
    default_code: ExitCode  # of an OSError without one of its own; it tells the modes apart, too
    run: Callable[[Progress], None]


class Parser(argparse.ArgumentParser):
    """argparse, whose errors repeat what was typed (a shell's `*` types names of files)."""

    def error(self, message: str) -> NoReturn:
        message = printable(message)
        if message.startswith("unrecognized") and sys.argv[-1].endswith(DUMP_SUFFIX):
            folder = shell_words(os.path.dirname(sys.argv[-1]) or ".")
            loop = f'for f in {folder}/*.dump; do python3 backup_db.py --verify "$f"; done'
            message += f"\nVerify several one by one: {loop}"
        super().error(message)


def typed_path(text: str) -> Path:
    """A path as it was typed; the shell leaves the ~ of `--output-dir=~/backups` to us."""
    if text == "":
        raise argparse.ArgumentTypeError("expected a path, not an empty text")
    return Path(os.path.expanduser(text))


EXAMPLES = """\
examples:
  python3 backup_db.py --env prod --output-dir /backups/production
  python3 backup_db.py --verify db/backups/project_chat_dev_2025-01-27T14-30-00Z.dump

exit codes:
  0  Success
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="backup_db.py",
        usage="%(prog)s [--env ENV] [--output-dir DIR] [--verify FILE] [--list] [--help]",
        description=f"{__doc__}\nThis is release {BACKUP_DB_VERSION}.",
        epilog=EXAMPLES + "".join(f"  {int(code)}  {code.category}\n" for code in ExitCode),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--env",
        choices=("dev", "prod", "auto"),
        default="auto",
        metavar="ENV",
        help="the environment to back up: dev, prod or auto (default: auto, which is what "
        "ENV_MODE says, else dev if DEV_DB_NAME is set, else prod)",
    )
    parser.add_argument(
        "--output-dir",
        type=typed_path,
        default=DEFAULT_OUTPUT_DIR,
        metavar="DIR",
        help="where the backups are (default: db/backups/ beside this script)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--verify",
        type=typed_path,
        metavar="FILE",
        help="verify this .dump: its checksum, its structure, the number of rows of every table",
    )
    mode.add_argument("--list", action="store_true", help="list the backups, newest first")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> Mode:
    """What the command line asks for; argparse reports an error itself, and exits."""
    options = build_parser().parse_args(argv)
    if options.list:
        run = functools.partial(run_listing, options.output_dir)
        return Mode("Listing failed", ExitCode.GENERAL, run)
    if options.verify:
        run = functools.partial(run_verification, options.verify)
        return Mode("Backup verification failed", ExitCode.VERIFICATION, run)
    run = functools.partial(run_creation, options.env, options.output_dir)
    return Mode("Backup failed", ExitCode.CREATION, run)


def run_creation(environment: str, output_dir: Path, progress: Progress) -> None:
    def announce(lines: Sequence[str], warnings: Sequence[str]) -> None:
        progress.clear()
        write_lines(sys.stdout, lines)
        warn(warnings)

    progress.backs_up = f"--env {environment}"
    # In a thread: another project's config.py, or an .env that is a pipe, may block for ever.
    config = Background(lambda: load_configuration(environment)).wait()
    name, host = printable(config.name), printable(config.host)
    progress.backs_up = f"{config.environment.value} {name} at {host}, port {config.port}"
    become_libpq_environment(config)
    with with_filename(output_dir):
        create_backup(config, output_dir, progress, announce)


def warn(sentences: Iterable[str]) -> None:
    lines = "\n".join(sentences).splitlines()
    messages = [re.sub(r"(?i)^(pg_dump: )?(warning: *)?", "", line) for line in lines if line]
    write_lines(sys.stderr, [f"Warning: {line}" for line in messages])


def write_result(lines: Iterable[str]) -> None:
    if problem := write_lines(sys.stdout, lines):
        detail = f"the output could not be written: {problem}"
        raise Failure(ExitCode.GENERAL, detail, "Free space there, or have it written elsewhere")


def run_verification(dump: Path, progress: Progress) -> None:
    """`--verify`, with nothing but the two files. Raises Failure where one is unsound; OSError."""
    with with_filename(dump):
        metadata = load_metadata(dump)
        pg_restore = find_tool("pg_restore", major=least_major(metadata))
        with contextlib.closing(OpenFile.open(dump, os.O_RDONLY)) as file:
            examination = examine_dump(pg_restore, file, metadata, progress)
        lines = verification_lines(dump, metadata, examination)
    progress.clear()
    if not examination.problem:
        write_result(["✓ Backup verification passed", "", *lines])
        warn([examination.found.warnings])
        return
    steps = ["Do not rely on this dump alone; restore it into an empty database and compare"]
    if examination.checksum.problem and not metadata.describes(dump):
        steps = ["Bring back this dump's own metadata file, or, if both were renamed, their names"]
    elif examination.checksum.problem:
        steps = [
            "Do not rely on this dump; its bytes have changed since it was made",
            "Compare it with a copy elsewhere, and check the disk: sudo dmesg | tail -50",
        ]
    steps.append(f"Choose another backup: {list_command(dump.parent)}")
    salvage = shell_words("pg_restore", "--file=salvaged.sql", str(dump))
    steps.append(f"Save what can be read of this one, up to where it breaks: {salvage}")
    raise Failure(ExitCode.VERIFICATION, examination.problem, *steps, report=lines)


def run_listing(directory: Path, _progress: Progress) -> None:
    try:
        backups, orphans = find_backups(directory), find_orphans(directory)
    except FileNotFoundError:
        backups, orphans = [], []
        if directory != DEFAULT_OUTPUT_DIR:  # that one is missing before the first backup
            raise Failure(
                ExitCode.GENERAL,
                f"there is no directory {display_path(directory)}",
                "See the usual one: python3 backup_db.py --list",
                "Or name the one that has the backups: --output-dir DIR",
            ) from None
    write_result(list_lines(backups, orphans, directory, datetime.now(timezone.utc)))


def prepare_process() -> None:
    """Make files private, standard streams exist and accept any character, and signals be noted."""
    os.umask(0o077)
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # started with a standard stream closed: no file of ours may get its number
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    catch_signals()


def as_failure(error: Failure | OSError | MemoryError, default_code: ExitCode) -> Failure:
    if isinstance(error, Failure):
        return error
    words = str(error) or "out of memory"
    if isinstance(error, OSError):
        if error.errno not in OUT_OF_RESOURCES:
            return file_failure(error, default_code)
        words = str(error.strerror)
    # What was not read for want of memory is not damaged.
    code = ExitCode.GENERAL if default_code == ExitCode.VERIFICATION else default_code
    detail = f"no room on this machine for memory, a process, a thread or an open file: {words}"
    return Failure(code, detail, "See what is left, and the limits here: free -m; ulimit -a")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: whatever was raised becomes a message and an exit code."""
    mode = parse_arguments(argv)
    progress = Progress(sys.stderr)
    try:
        prepare_process()
        mode.run(progress)
        progress.finish()
        return 0
    except (Failure, OSError, MemoryError) as error:
        failure = as_failure(error, mode.default_code)
        progress.clear()
        # Not "Backup verification failed: Verification error".
        is_said = failure.code == mode.default_code == ExitCode.VERIFICATION
        category = "" if is_said else f": {failure.code.category}"
        lines = failure_lines(mode.headline + category, failure)
        if progress.backs_up:  # for the log: when, and what
            lines += ["", f"{iso_timestamp(datetime.now(timezone.utc))} {progress.backs_up}"]
        write_lines(sys.stderr, lines)
        return failure.code
    except Interrupted as interrupted:
        progress.clear()
        outcome = f" {interrupted.outcome}" if progress.backs_up else ""
        write_lines(sys.stderr, [f"✗ Stopped ({interrupted}).{outcome}"])
        return die_by_signal(interrupted.number)
    except Exception:  # noqa: BLE001 - a bug, and shown as one
        import traceback

        progress.clear()
        what = f"✗ {mode.headline}: a bug in backup_db.py; please report it with the lines below"
        write_lines(sys.stderr, [what, "", *traceback.format_exc().splitlines()])
        return ExitCode.GENERAL


if __name__ == "__main__":
    sys.exit(main())
