#!/usr/bin/env python3
"""Back up one PostgreSQL database, verify a backup, or list the backups.

A backup is a pair: DATABASE_ENVIRONMENT_TIMESTAMP.dump, written by pg_dump, and the
.metadata.json beside it. It is published only when pg_restore has read the dump back to its
last byte and found in it every row that the database held at that moment.

The database is named in .env.local beside this script; .env.example has every variable.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `catch_signals` there is nothing to clean up, and Ctrl-C needs no traceback to end this.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import enum
import errno
import fcntl
import json
import os
import re
import select
import shlex
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from brain_core.config import DatabaseConfig

# ---------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------

SCRIPT_DIR = Path(__file__).resolve().parent
DEFAULT_OUTPUT_DIR = SCRIPT_DIR / "db" / "backups"
METADATA_VERSION = 1

# Time limits, in seconds.
STALL_SECONDS = 600  # without any movement, before a wait is given up
ANSWER_SECONDS = 10  # beyond it, for a server that waits itself to say so
LOCK_RETRY_SECONDS = 1.0  # between two tries; nothing is held meanwhile
WATCH_SECONDS = 0.1  # between two looks at whom pg_dump waits for; see BlockerWatch
READ_SILENCE_SECONDS = 600  # for pg_restore to go on: on some damaged archives it never does
TOOL_SECONDS = 30  # for a tool to tell its version
STOP_SECONDS = 1.0  # for a program to end on SIGTERM, before SIGKILL
CONNECT_LIMIT_FACTOR = 3  # of libpq's own limit for each host: a name may have more addresses
CONNECT_LIMIT_SECONDS = 5  # beyond it
ORPHAN_SECONDS = 1  # for the server to see that this process was killed, and to end its query
TICK_SECONDS = 0.1  # between two looks at anything else that is waited for
REDRAW_SECONDS = 0.2  # between two states of the progress line

# Our own wait for a table lock stays below PostgreSQL's deadlock_timeout (1 s by default, and half
# of it where it is set lower): a backup that waits longer while it holds other tables makes a
# migration the deadlock victim.
LOCK_TIMEOUT_MS = 500
DUMP_LOCK_TIMEOUT = "10s"
DUMP_ATTEMPTS = 3

HASH_BLOCK_BYTES = 1024 * 1024

# A large pipe lets pg_restore run ahead; reads that malloc need not map anew take a third less of
# our time than reads of 1 MiB (for 1 GB 0.9 s against 1.4 s; of 64 and 256 KiB 1.0 s).
PIPE_BYTES = 1024 * 1024
READ_BYTES = 128 * 1024
STDERR_TAIL_BYTES = 64 * 1024
METADATA_MAX_BYTES = 256 * 1024 * 1024

# Of the size of the last backup, and of the tables where there is none: the least that a dump
# can be expected to need. Text compresses to 0.15 to 0.3 of its table, random bytes not at all.
NEED_OF_LAST_BACKUP = 0.8
NEED_OF_TABLES = 0.03
EXPECTED_OF_TABLES = 0.3
FULL_DISK_BYTES = 64 * 1024

# Where packages put the PostgreSQL tools, for the hint when PATH does not lead there (cron).
TOOL_FOLDERS = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/opt/homebrew/opt/libpq/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/usr/local/opt/libpq/bin",
    "/opt/local/lib/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)


# ---------------------------------------------------------------------------------------------
# Exit codes and failures
# ---------------------------------------------------------------------------------------------


class ExitCode(enum.IntEnum):
    """The exit codes of the contract; 0 is success, and a signal is its own."""

    GENERAL = 1
    CONFIGURATION = 2
    CONNECTION = 3
    PERMISSION = 4
    DISK_SPACE = 5
    TOOL = 6
    CREATION = 7
    VERIFICATION = 8

    @property
    def category(self) -> str:
        """The words for this code in the first line of an error."""
        return {
            ExitCode.GENERAL: "General error",
            ExitCode.CONFIGURATION: "Configuration error",
            ExitCode.CONNECTION: "Database connection error",
            ExitCode.PERMISSION: "Permission error",
            ExitCode.DISK_SPACE: "Disk space error",
            ExitCode.TOOL: "Tool error",
            ExitCode.CREATION: "Backup creation error",
            ExitCode.VERIFICATION: "Verification error",
        }[self]


class Failure(Exception):
    """An expected failure: what a user, a server or a disk can cause.

    `detail` says what happened, in the words of the tool that met it; `steps` what to do next;
    `report`, above both, what was found before.
    Any other exception that leaves an operation, but OSError, is a bug.
    """

    def __init__(
        self, code: ExitCode, detail: str, *steps: str, report: Sequence[str] = ()
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.steps = steps
        self.report = report


# "FATAL:  ", with two spaces after a word in any language, as libpq begins a server's message.
SEVERITY = re.compile(r"(^|: )(\w+):  (?=\S)", re.MULTILINE)


class ServerError(Exception):
    """What the server, or the way to it, answered instead of a result.

    `sqlstate` is None where there is none to be had: libpq gives none for a failed connection.
    """

    def __init__(self, text: str, sqlstate: str | None = None, lost: bool = False) -> None:
        super().__init__(text)
        self.text = printable_lines(SEVERITY.sub(r"\1\2: ", text))
        self.sqlstate = sqlstate
        self.lost = lost


class ArchiveError(Exception):
    """A dump that pg_restore cannot read, or that does not read as pg_dump writes it."""


class InTheWay(Exception):
    """A session that pg_dump waits for waits itself, and so may be waiting for us."""

    def __init__(self, session: OtherSession) -> None:
        super().__init__(str(session))
        self.session = session


class DumpFailed(Exception):
    """pg_dump ended without a dump: its exit status, and its own words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status
        self.words = words


WRONG_KIND_ERRNOS = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP}
PERMISSION_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS} | WRONG_KIND_ERRNOS
DISK_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT}


def file_failure(error: OSError, otherwise: ExitCode = ExitCode.CREATION) -> Failure:
    """The one place where an errno becomes an exit code; `otherwise` is that of all others."""
    text = "" if error.filename is None else os.fsdecode(error.filename)
    where = f"{display_path(Path(text))}: " if text else ""
    folder = shell_words(text if os.path.isdir(text) else os.path.dirname(text) or ".")
    look = shell_words("ls", "-ld", text) if os.path.lexists(text) else f"ls -ld {folder}"
    instead = {
        ExitCode.CONFIGURATION: f"make it the owner: {shell_words('chown', current_user(), text)}",
        ExitCode.GENERAL: "list another directory: --output-dir DIR",
        ExitCode.VERIFICATION: "run this as the user who owns the backup",
    }.get(otherwise, "write elsewhere: --output-dir DIR")
    detail = f"{where}{error.strerror or error}"
    if error.errno in DISK_SPACE_ERRNOS:
        return Failure(
            ExitCode.DISK_SPACE,
            detail,
            f"See what is full, blocks or inodes: df -h {folder}; df -i {folder}",
            "Free space there, or write elsewhere: --output-dir DIR",
        )
    if error.errno in WRONG_KIND_ERRNOS:
        return Failure(
            ExitCode.PERMISSION,
            detail,
            f"See what it is: {look}",
            "Move it out of the way, or name another path",
        )
    if error.errno in PERMISSION_ERRNOS:
        return Failure(
            ExitCode.PERMISSION,
            detail,
            f"See who may use it (this run is as user {current_user()}): {look}",
            f"Give that user access, or {instead}",
        )
    return Failure(
        otherwise,
        detail,
        f"Check the file system and its limits: df -h {folder}; ulimit -f; dmesg | tail",
    )


def other_file_failure(number: int, path: Path, detail: str) -> Failure:
    """The same for an errno that another program met, or none yet; `detail` says what happened."""
    failure = file_failure(OSError(number, os.strerror(number), os.fspath(path)))
    return Failure(failure.code, detail, *failure.steps)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError from what is inside say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def current_user() -> str:
    """The operating system's name for the user of this run, or its number."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


# ---------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------

TERMINATING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A terminating signal came: unwind, clean up, and die of it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class SignalNote:
    """A signal handler that only notes the first signal: `check_signals` raises it."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, _frame: object) -> None:
        self.number = self.number or number


def catch_signals() -> None:
    """Note terminating signals; one ignored from the start (nohup) stays so."""
    note = SignalNote()
    for number in TERMINATING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)


def check_signals() -> None:
    """Raise Interrupted if a terminating signal has come; a further one is ignored.

    It is called on each tick of a wait, and before each step that cannot be undone. Between two
    calls nothing is interrupted, so that no fork, rename or clean-up needs a guard.
    """
    for number in TERMINATING_SIGNALS:
        note = signal.getsignal(number)
        if isinstance(note, SignalNote) and note.number:
            set_signals(signal.SIG_IGN)
            raise Interrupted(note.number)


def set_signals(action: signal.Handlers) -> None:
    """Give the signals that are noted another action, SIG_IGN or SIG_DFL."""
    for number in TERMINATING_SIGNALS:
        if isinstance(signal.getsignal(number), SignalNote):
            signal.signal(number, action)


def die_by_signal(number: int) -> None:
    """End this process by the signal itself, so that a shell or cron sees what happened."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# ---------------------------------------------------------------------------------------------
# Waiting
# ---------------------------------------------------------------------------------------------

T = TypeVar("T")


def do_nothing() -> None:
    """What is done on a tick when there is nothing to do."""


class Background(Generic[T]):
    """A call that may last: made in a daemon thread, waited for on the main thread, which alone
    receives Python's signal handlers, and meanwhile looks after progress and deadlines.

    (concurrent.futures would join its threads at exit, one that is stuck in libpq too.)
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised by `wait`
            self._error = error
        self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or an error. Never waits."""
        return self._done.is_set()

    def join(self, seconds: float) -> None:
        """Wait for the end of the call, deaf to signals."""
        self._done.wait(seconds)

    def wait(self, on_tick: Callable[[], None] = do_nothing, seconds: float | None = None) -> T:
        """The result of the call. Raises its error; TimeoutError when `seconds` have passed, while
        the call goes on; Interrupted; and whatever `on_tick` raises."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self._done.wait(TICK_SECONDS):
            check_signals()
            on_tick()
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._result


class Patience:
    """The end of a wait: STALL_SECONDS without any movement."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._state: tuple[object, ...] = ()
        self._moved_at = time.monotonic()

    def look(self, *state: object) -> None:
        """Note a state that differs from the last as movement. Raises ServerError after too long a
        time without."""
        now = time.monotonic()
        if state != self._state:
            self._state, self._moved_at = state, now
        elif now - self._moved_at > STALL_SECONDS:
            text = f"nothing has moved for {format_age(STALL_SECONDS)} while {self._doing}"
            raise ServerError(text, lost=True)


# ---------------------------------------------------------------------------------------------
# Text for people
# ---------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` on one line: what a terminal would not show as itself is escaped."""
    text = decode_os_text(text)
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def decode_os_text(text: str) -> str:
    """Text that the system gave us, whatever the locale: UTF-8, and what is none is escaped."""
    if not text.isascii():  # bytes that Python could not decode stand in it as surrogates
        with contextlib.suppress(UnicodeEncodeError):
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text


def encode_os_text(text: str) -> str:
    """Text as this process passes it to the system, in any locale: its UTF-8 bytes."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def printable_lines(text: str) -> str:
    """A tool's words as they are, but for what would not show; its lines stay lines."""
    lines = text.strip().splitlines()
    return "\n".join(printable(line.replace("\t", "    ")) for line in lines)


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def row_summary(rows: int, tables: int, large_objects: int = 0) -> str:
    """`3727 rows in 4 tables`, and the large objects where there are any."""
    summary = f"{plural(rows, 'row')} in {plural(tables, 'table')}"
    return summary + (f", {plural(large_objects, 'large object')}" if large_objects else "")


def format_size(size_bytes: int) -> str:
    """Units of 1024 with one decimal, as the contract shows them."""
    size = float(size_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if round(size, 1) < 1024:
            return f"{size_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def format_age(seconds: float) -> str:
    """A time span in its largest unit: `3 hours`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return plural(int(seconds // length), unit)
    return plural(max(0, int(seconds)), "second")


def display_path(path: Path) -> str:
    """`path` as the contract shows it: relative where it lies under the working directory."""
    try:
        here = os.getcwd()
        absolute = os.path.abspath(path)
    except FileNotFoundError:  # the working directory is gone
        return printable(str(path))
    if here != "/" and absolute.startswith(here + "/"):
        absolute = absolute[len(here) + 1 :]
    return printable(absolute)


def shell_words(*words: str) -> str:
    """A command as a person can paste it."""
    return " ".join(printable(shlex.quote(word)) for word in words)


def list_command(directory: Path) -> str:
    """The command that lists the backups in a directory; where there is none, the usual ones."""
    command = ["python3", "backup_db.py", "--list"]
    is_usual = os.path.realpath(directory) == os.path.realpath(DEFAULT_OUTPUT_DIR)
    if not is_usual and os.path.isdir(directory):
        command += ["--output-dir", str(directory)]
    return shell_words(*command)


# ---------------------------------------------------------------------------------------------
# File names
# ---------------------------------------------------------------------------------------------

TIMESTAMP_PATTERN = r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}Z"
ISO_TIMESTAMP = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)
DUMP_SUFFIX = ".dump"
METADATA_SUFFIX = ".metadata.json"
PARTIAL_SUFFIX = ".partial"
BACKUP_NAME = re.compile(rf"(?P<prefix>.+)_(?P<timestamp>{TIMESTAMP_PATTERN})", re.DOTALL)


def file_prefix(database: str, environment: str) -> str:
    """The name of a backup's files up to the timestamp: safe, UTF-8, the same in any locale."""
    encoded = "".join(
        "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
        if character in "/%"
        or ord(character) < 32
        or 127 <= ord(character) < 160
        # Bytes that are no UTF-8 arrive as lone surrogates.
        or "\ud800" <= character <= "\udfff"
        or (index == 0 and character in ".-")
        else character
        for index, character in enumerate(database)
    )
    ending = "" if encoded.endswith(f"_{environment}") else f"_{environment}"
    # The str that stands for these UTF-8 bytes in the file system's encoding, whatever it is.
    return encode_os_text(encoded + ending)


def file_timestamp(moment: datetime) -> str:
    """The moment as a file name has it: colons are not for file names."""
    return moment.strftime("%Y-%m-%dT%H-%M-%SZ")


def iso_timestamp(moment: datetime) -> str:
    """The moment as the metadata and the reports have it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_iso_timestamp(text: str) -> datetime:
    """The inverse of `iso_timestamp`; ValueError for anything else."""
    if not ISO_TIMESTAMP.fullmatch(text):
        raise ValueError(f"{text!r} is no UTC time")
    return datetime.fromisoformat(text[:-1]).replace(tzinfo=timezone.utc)


def match_name(dump: Path) -> re.Match[str] | None:
    """The prefix and the timestamp in a dump's name; None where it is not named as ours are."""
    return BACKUP_NAME.fullmatch(dump.name.removesuffix(DUMP_SUFFIX))


def metadata_path(dump: Path) -> Path:
    """The metadata file that belongs to a dump."""
    return dump.with_name(dump.name.removesuffix(DUMP_SUFFIX) + METADATA_SUFFIX)


# ---------------------------------------------------------------------------------------------
# Metadata
# ---------------------------------------------------------------------------------------------


class MetadataError(ValueError):
    """Metadata that is missing, unreadable or ill-typed; the text names the key."""


def is_text(value: object) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_count(value: object) -> bool:
    """Whether it is a number of bytes, rows or objects, as PostgreSQL's bigint holds one."""
    return type(value) is int and 0 <= value < 2**63


def is_utc_time(value: object) -> bool:
    """Whether it is a moment as `iso_timestamp` writes one."""
    try:
        return isinstance(value, str) and bool(parse_iso_timestamp(value))
    except ValueError:
        return False


def are_counts(value: object) -> bool:
    """Whether it is an object of counts."""
    return isinstance(value, dict) and all(map(is_count, value.values()))


def are_oids(value: object) -> bool:
    """Whether it is an object of oids, each another one."""
    return (
        isinstance(value, dict)
        and all(type(oid) is int and 0 < oid < 2**32 for oid in value.values())
        and len(set(value.values())) == len(value)
    )


# What a reader relies on: whether the value fits, and what it should be.
REQUIRED_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "backup_timestamp": (is_utc_time, "a UTC time"),
    "environment": (is_text, "text"),
    "database_name": (is_text, "text"),
    "backup_file": (is_text, "text"),
    "backup_size_bytes": (is_count, "a size"),
    "checksum_sha256": (
        lambda value: is_text(value) and bool(re.fullmatch(r"[0-9a-f]{64}", value)),
        "a SHA-256",
    ),
    "table_counts": (are_counts, "a number of rows for each table"),
    "pg_dump_version": (is_text, "text"),
    "postgresql_version": (is_text, "text"),
}

# Of the further keys, those that are read; one that does not fit counts as absent.
OPTIONAL_KEYS: dict[str, Callable[[Any], bool]] = {
    "database_size_bytes": is_count,
    "compression": is_text,
    "large_object_count": is_count,
    "verification": lambda value: isinstance(value, dict),
}


def open_at_once(path: str, flags: int) -> int:
    """An opener for `open`: a pipe of that name must not hang a listing, nor a run."""
    return os.open(path, flags | os.O_NONBLOCK)


class Metadata(NamedTuple):
    """What stands in a `.metadata.json`. The fields with a default are not in every file."""

    backup_timestamp: str
    environment: str
    database_name: str
    backup_file: str
    backup_size_bytes: int
    checksum_sha256: str
    table_counts: dict[str, int]
    pg_dump_version: str
    postgresql_version: str
    table_oids: dict[str, int] | None = None
    metadata_version: int = METADATA_VERSION
    database_size_bytes: int | None = None
    compression: str | None = None
    duration_seconds: float | None = None
    large_object_count: int | None = None
    verification: dict[str, Any] | None = None
    not_included: Sequence[str] = ()
    encoding: str | None = None
    locale: dict[str, str | None] | None = None
    extensions: dict[str, str] | None = None
    roles: list[str] | None = None

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self._asdict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Metadata:
        """Read and check a metadata file. Raises MetadataError, naming the key; OSError."""
        with open(path, "rb", buffering=0, opener=open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > METADATA_MAX_BYTES:
                raise MetadataError("it is no metadata file")
            text = file.read()
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MetadataError(f"it is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise MetadataError("it is not a JSON object")
        for key, (fits, wanted) in REQUIRED_KEYS.items():
            if key not in values:
                raise MetadataError(f'the key "{key}" is missing')
            if not fits(values[key]):
                raise MetadataError(f'the key "{key}" is not {wanted}')
        further = {key: values[key] for key, fits in OPTIONAL_KEYS.items() if fits(values.get(key))}
        if (oids := values.get("table_oids")) is not None:  # backups made before have none
            if not are_oids(oids) or oids.keys() != values["table_counts"].keys():
                raise MetadataError('the key "table_oids" is not an oid for each table')
            further["table_oids"] = oids
        return cls(**{key: values[key] for key in REQUIRED_KEYS}, **further)

    @property
    def moment(self) -> datetime:
        """The time of the snapshot."""
        return parse_iso_timestamp(self.backup_timestamp)

    @property
    def total_rows(self) -> int:
        """The rows of all tables."""
        return sum(self.table_counts.values())


# ---------------------------------------------------------------------------------------------
# Progress: one line on a terminal, nothing elsewhere
# ---------------------------------------------------------------------------------------------


class Progress:
    """One line on a terminal's stderr, redrawn in place; silent where stderr is no terminal."""

    BAR_WIDTH = 20

    def __init__(self, stream: IO[str] | None) -> None:
        try:
            self.enabled = stream is not None and stream.isatty()
        except ValueError:  # closed
            self.enabled = False
        self._stream = stream
        self._started = time.monotonic()
        self._drawn_at = 0.0
        self._fraction = 0.0
        self._first: tuple[float, float] | None = None  # the first fraction, and when it was known

    def show(self, phase: str, fraction: float | None = None, *details: str) -> None:
        """Draw the line, a few times a second at most.

        `fraction` is that of the whole run; it never runs backwards. `details` come in the order
        of their worth: a narrow terminal shows the first ones.
        """
        now = time.monotonic()
        if not self.enabled or now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = now
        elapsed = now - self._started
        parts = [phase]
        if fraction is not None:
            self._fraction = max(self._fraction, min(fraction, 1.0))
            filled = int(self._fraction * self.BAR_WIDTH)
            parts.append(f"[{'#' * filled}{'-' * (self.BAR_WIDTH - filled)}]")
            parts.append(f"{int(self._fraction * 100):3d} %")
            # What came before it, such as a wait for a lock, says nothing of the time left.
            self._first = self._first or (self._fraction, now)
            first_fraction, then = self._first
            if (gained := self._fraction - first_fraction) > 0.02:
                parts.append(f"{_clock((now - then) * (1 - self._fraction) / gained)} left")
        self._draw([*parts, f"{_clock(elapsed)} elapsed", *details])

    def clear(self) -> None:
        """Take the line away, before anything else is printed."""
        if self.enabled:
            self._draw([""])

    def _draw(self, parts: list[str]) -> None:
        """The parts that fit on one line, in place of what is there."""
        assert self._stream is not None
        try:
            if not select.select([], [self._stream], [], 0)[1]:
                return  # held by Ctrl-S, which must not hold up the run
            room = (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
            parts = [printable(part) for part in parts if part]
            while len(parts) > 1 and len("  ".join(parts)) > room:
                parts.pop()
            self._stream.write(f"\r{'  '.join(parts)[:room]}\x1b[K")
            self._stream.flush()
        except (OSError, ValueError):
            self.enabled = False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---------------------------------------------------------------------------------------------
# External programs
# ---------------------------------------------------------------------------------------------


class Program:
    """A PostgreSQL tool while it runs, in a session of its own, and the last it said on stderr.

    As a context manager it never leaves the program running behind it. It is started from the
    main thread, with no shell, and with exactly the environment given.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = Path(argv[0]).name
        self._tail = b""
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)
        try:
            self.process = subprocess.Popen(
                argv,
                env=environment,
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.PIPE,
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
            self._drain.start()
        except OSError as error:
            raise Failure(
                ExitCode.TOOL,
                f"{printable(argv[0])} cannot be run: {error.strerror}",
                f"See whether it is a working program: {shell_words(argv[0], '--version')}",
            ) from None

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        while block := os.read(self.process.stderr.fileno(), 8192):
            self._tail = (self._tail + block)[-STDERR_TAIL_BYTES:]

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def stop(self) -> None:
        """End it, and whatever it started: SIGTERM, by which pg_dump cancels its query, then
        SIGKILL."""
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
            if self.status() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it just ended
                    os.killpg(self.process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)
        self._drain.join(STOP_SECONDS)

    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs. Never waits."""
        return self.process.poll()

    def wait(self, seconds: float) -> int | None:
        """The exit status; None where `seconds` went by first. Raises Interrupted."""
        deadline = time.monotonic() + seconds
        while True:
            check_signals()
            left = deadline - time.monotonic()
            try:
                return self.process.wait(max(0.0, min(left, TICK_SECONDS)))
            except subprocess.TimeoutExpired:
                if left <= TICK_SECONDS:
                    return None

    @property
    def words(self) -> str:
        """What the program, now ended, said on stderr, or how it ended without a word."""
        self._drain.join(STOP_SECONDS)  # something that it started may hold its stderr open
        said = printable_lines(self._tail.decode("utf-8", "backslashreplace"))
        status = self.process.returncode
        if status is not None and status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = "unknown"
            ended = f"{self.name} was ended by signal {-status} ({name})"
            return f"{said}\n{ended}" if said else ended
        return said or (f"{self.name} ended with exit status {status}" if status else "")


class Tool(NamedTuple):
    """A PostgreSQL program that was found, and asked for its version."""

    path: str
    version: str
    environment: Mapping[str, str]

    def __repr__(self) -> str:
        """Without the environment, where the password is."""
        return f"Tool({self.path!r}, {self.version!r})"

    @property
    def major(self) -> int:
        """17 for 17.10 and for 17beta1."""
        digits = re.match(r"\d+", self.version)
        return int(digits.group()) if digits else 0


def tool_environment(settings: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The environment of a child: this one's, without any connection setting or secret but
    `settings`, and with messages in English.

    PGCLUSTER stays: Debian's wrapper chooses the version of its tools by it.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "PGCLUSTER" or not name.startswith(("PG", "DB_", "DEV_DB_"))
    }
    return (
        inherited
        | {"LC_ALL": "C"}
        | {name: encode_os_text(value) for name, value in settings.items()}
    )


def find_tool(name: str, environment: Mapping[str, str]) -> Tool:
    """The program called `name` on PATH. Raises Failure with the PATH line that would find it."""
    import shutil

    path = shutil.which(name)
    if path is None:
        raise missing_tool(name)
    return ask_version(path, environment)


def ask_version(path: str, environment: Mapping[str, str]) -> Tool:
    """Run the tool for its version, in the environment that it will run in later."""
    with Program([path, "--version"], environment, stdout=subprocess.PIPE) as program:
        assert program.process.stdout is not None
        status = program.wait(TOOL_SECONDS)
        if status is None:
            raise Failure(
                ExitCode.TOOL,
                f"{printable(path)} --version has not answered within {TOOL_SECONDS} seconds",
                f"See what it does: {shell_words(path, '--version')}",
            )
        said = program.process.stdout.read(4096).decode("utf-8", "backslashreplace")
        # "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        match = re.search(r"\) (\d+[.\w]*)", said)
        if status != 0 or match is None:
            raise Failure(
                ExitCode.TOOL,
                f"{printable(path)} --version does not answer with a version: "
                + (program.words or printable(said.strip()) or "no output"),
                f"See what it is: {shell_words(path, '--version')}",
                "Or put PostgreSQL's own tools first on PATH",
            )
    return Tool(path, match.group(1), environment)


def missing_tool(name: str) -> Failure:
    """The failure for a tool that is not on PATH, with the places where it does lie."""
    steps = [path_hint(folder) for folder in tool_folders(name)[:1]]
    blocked = [
        folder for folder in os.get_exec_path() if os.path.isfile(os.path.join(folder, name))
    ]
    detail = f"{name} not found on PATH ({printable(os.environ.get('PATH', ''))})"
    if blocked:
        found = os.path.join(blocked[0], name)
        detail = f"{printable(found)} is on PATH but may not be run by {current_user()}"
        steps.append(f"Make it executable: {shell_words('chmod', '+x', found)}")
    if not steps:
        steps.append(install_hint(None))
    return Failure(ExitCode.TOOL, detail, *steps)


def tool_folders(name: str) -> list[str]:
    """The usual folders that hold the tool: the newest version first, then in their order."""
    import glob

    def version(folder: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", folder)]

    found = [
        folder
        for pattern in TOOL_FOLDERS
        for folder in glob.glob(pattern)
        if os.access(os.path.join(folder, name), os.X_OK)
    ]
    return sorted(found, key=version, reverse=True)


def path_hint(folder: str) -> str:
    """The line that makes cron, or a shell, find the tools in `folder`."""
    return (
        f"It is in {folder}. For cron, put this line above yours in the crontab: "
        f"PATH={folder}:/usr/local/bin:/usr/bin:/bin"
    )


def install_hint(major: int | None) -> str:
    """What to install, on the systems that people have."""
    number = str(major) if major else "17"
    return (
        f"Install PostgreSQL's client tools, version {number} or newer: "
        f"apt-get install postgresql-client-{number} (Debian, Ubuntu, from apt.postgresql.org), "
        f"dnf install postgresql{number} (Red Hat), brew install postgresql@{number} (macOS)"
    )


def older_tool(tool: Tool, major: int, because: str) -> Failure:
    """The failure for a tool that is too old, with a newer one where this machine has it."""
    name = Path(tool.path).name
    steps = []
    for folder in tool_folders(name):
        with contextlib.suppress(Failure):
            if ask_version(os.path.join(folder, name), tool.environment).major >= major:
                steps.append(path_hint(folder))
                break
    return Failure(
        ExitCode.TOOL,
        f"{printable(tool.path)} is version {tool.version}, {because}",
        *steps,
        install_hint(major),
    )


class Tools(NamedTuple):
    """The two programs that a backup needs, and the compression that both can do."""

    pg_dump: Tool
    pg_restore: Tool
    compression: str  # as pg_dump 16 writes it: zstd:3, gzip:4, none

    @property
    def compress_value(self) -> str:
        """The value for `pg_dump --compress`, which before version 16 was a gzip level alone."""
        if self.pg_dump.major >= 16:
            return self.compression
        return "0" if self.compression == "none" else self.compression.removeprefix("gzip:")


def find_tools(config: DatabaseConfig) -> Tools:
    """Both tools, of versions that fit, with the compression to use."""
    pg_dump = find_tool("pg_dump", tool_environment(config.libpq))
    # Without the password, which pg_restore has no use for; with the host and port, since
    # Debian's wrapper chooses its version by them.
    names = ("PGHOST", "PGPORT")
    pg_restore = find_tool(
        "pg_restore", tool_environment({name: config.libpq[name] for name in names})
    )
    if pg_restore.major < pg_dump.major:
        raise older_tool(
            pg_restore, pg_dump.major, f"too old for the archives of pg_dump {pg_dump.version}"
        )
    if not config.compress:
        fits = pg_dump.major >= 16 and takes_compression(pg_dump, "zstd:3") is None
        fits = fits and reads_compression(pg_restore, "zstd")
        return Tools(pg_dump, pg_restore, "zstd:3" if fits else "gzip:4")
    wanted = config.compress
    wanted = {"0": "none"}.get(wanted, f"gzip:{wanted}" if wanted.isdigit() else wanted)
    tools = Tools(pg_dump, pg_restore, wanted)
    if refusal := takes_compression(pg_dump, tools.compress_value):
        raise Failure(
            ExitCode.CONFIGURATION,
            f"BACKUP_COMPRESS is {config.compress!r}, which pg_dump {pg_dump.version} "
            f"does not take:\n{refusal}",
            f"Correct it {config.places['compress']}",
            "Or leave it out: then zstd:3 is used where the tools have it, else gzip:4",
        )
    if not reads_compression(pg_restore, wanted):
        raise unreadable_compression(pg_restore, wanted)
    return tools


def takes_compression(pg_dump: Tool, value: str) -> str | None:
    """None where this build of pg_dump can compress so, else its words.

    pg_dump checks the value, then creates its file, then connects (15 to 18, tried): whether
    there is a file afterwards is the answer. No server is asked.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="backup_db-") as folder:
        file = os.path.join(folder, "probe")
        argv = [pg_dump.path, "--format=custom", f"--compress={value}", f"--file={file}"]
        nowhere = {name: text for name, text in pg_dump.environment.items() if name[:2] != "PG"}
        with Program(argv, nowhere | {"PGHOST": folder, "PGDATABASE": "probe"}) as program:
            program.wait(TOOL_SECONDS)
            return None if os.path.exists(file) else program.words


COMPRESSION_NUMBERS = {"none": 0, "gzip": 1, "lz4": 2, "zstd": 3}


def reads_compression(pg_restore: Tool, compression: str) -> bool:
    """Whether this build of pg_restore can read archives compressed so.

    It is shown the head of an empty archive, version 1.15 (PostgreSQL 16 source,
    pg_backup_archiver.c, ReadHead): one that it cannot read later makes it warn now.
    """
    algorithm = compression.partition(":")[0]
    if pg_restore.major < 16:
        return algorithm in ("gzip", "none")
    if algorithm not in COMPRESSION_NUMBERS:
        return True  # a newer PostgreSQL's; the read-back will tell
    integer_bytes, custom_format, no_entries = 4, 1, 0

    def integer(number: int) -> bytes:
        return b"\0" + number.to_bytes(integer_bytes, "little")

    created = b"".join(map(integer, (0, 0, 0, 1, 0, 100, 0)))  # 2000-01-01 00:00:00
    strings = integer(1) + b"x" + integer(2) + b"16" + integer(2) + b"16"
    head = b"PGDMP" + bytes((1, 15, 0, integer_bytes, 8, custom_format))
    head += bytes((COMPRESSION_NUMBERS[algorithm],)) + created + strings + integer(no_entries)
    argv = [pg_restore.path, "--format=custom", "--list"]
    with Program(argv, pg_restore.environment, stdin=subprocess.PIPE) as program:
        write_stdin(program, head)
        return program.wait(TOOL_SECONDS) == 0 and not program.words


def unreadable_compression(pg_restore: Tool, compression: str) -> Failure:
    """The failure for a pg_restore that was built without the archive's compression."""
    return Failure(
        ExitCode.TOOL,
        f"{printable(pg_restore.path)} ({pg_restore.version}) is built without "
        f"{printable(compression.partition(':')[0])}, by which the backup is compressed",
        *[path_hint(folder) for folder in tool_folders("pg_restore")[:1]],
        "Install PostgreSQL's client tools from your distribution or apt.postgresql.org, "
        "which are built with it",
        "For new backups another compression will do: BACKUP_COMPRESS=gzip:4",
    )


def write_stdin(program: Program, data: bytes) -> None:
    """Give the program its whole input. One that ended early says why by its exit status."""
    assert program.process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        program.process.stdin.write(data)
        program.process.stdin.close()


# ---------------------------------------------------------------------------------------------
# The archive: its checksum, its table of contents, and every row in it
# ---------------------------------------------------------------------------------------------


def hash_file(path: Path, on_block: Callable[[int], None]) -> str:
    """The SHA-256 of the file, as hexadecimal digits; `on_block` hears how many bytes are read."""
    import hashlib

    digest = hashlib.sha256()
    block = memoryview(bytearray(HASH_BLOCK_BYTES))
    done = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            done += count
            on_block(done)
    return digest.hexdigest()


class FileHash(Background[str]):
    """`hash_file` in the background: a context manager, behind which it stops at its next block."""

    class Stopped(Exception):
        """The result is not wanted any more."""

    def __init__(self, path: Path) -> None:
        self.done_bytes = 0
        self._stopping = False
        super().__init__(lambda: hash_file(path, self._note))

    def _note(self, done_bytes: int) -> None:
        self.done_bytes = done_bytes
        if self._stopping:
            raise self.Stopped

    def __enter__(self) -> FileHash:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopping = True


class ScriptReader:
    """Counts the rows in the SQL script that `pg_restore --data-only` writes, as it goes by.

    Data lines are never looked into: COPY escapes every newline and every backslash within a
    value, so that a row is a line and only the end of the data is the line `\\.` (PostgreSQL
    documentation, "COPY", text format). Names are not escaped: a COPY statement may span lines,
    and has ended only where its double quotes are even. They are not looked into either. Whatever
    else is in the script must be what pg_restore is known to write there (15 to 18), or the archive
    counts as damaged.
    """

    END_OF_DATA = b"\n\\.\n"
    HARMLESS = (
        b"--",
        b"SET ",
        b"SELECT pg_catalog.set_config",
        b"\\restrict ",
        b"\\unrestrict ",
        b"BEGIN;",
        b"COMMIT;",
        b"SELECT pg_catalog.lowrite(",
        b"SELECT pg_catalog.lo_close(",
    )
    LARGE_OBJECT = b"SELECT pg_catalog.lo_open("
    LONGEST_LINE_BYTES = 16 * 1024 * 1024
    LONGEST_STATEMENT_BYTES = 1024 * 1024  # 1,600 columns of 63 bytes take a third of it

    def __init__(self) -> None:
        self.rows_read = 0
        self.blocks: list[int] = []  # the rows of each COPY, in order
        self.large_objects = 0
        self._unread = b""
        self._statement = b""  # a COPY statement that goes on in the next line
        self._is_in_data = False

    def feed(self, block: bytes) -> None:
        """Read on. Raises ArchiveError for what pg_restore never writes."""
        script = self._unread + block
        position = 0
        while True:
            if self._is_in_data:
                # Nearly always there is none. To see that there is no backslash costs next to
                # nothing, and rfind finds none in two thirds of find's time.
                end = script.find(b"\\", position)
                if end >= 0:
                    end = script.rfind(self.END_OF_DATA, position)
                if end >= 0:
                    end = script.find(self.END_OF_DATA, position)
                # Keep the last bytes: the end of the data may lie across two blocks.
                stop = end if end >= 0 else max(position, len(script) - len(self.END_OF_DATA) + 1)
                rows = script.count(b"\n", position, stop)
                self.blocks[-1] += rows
                self.rows_read += rows
                if end < 0:
                    position = stop
                    break
                self._is_in_data = False
                position = end + len(self.END_OF_DATA)
            else:
                end = script.find(b"\n", position)
                if end < 0:
                    break
                self._read_line(script[position : end + 1])
                # The newline before the first row is the one that ends the statement.
                position = end if self._is_in_data else end + 1
        self._unread = script[position:]
        if len(self._unread) > self.LONGEST_LINE_BYTES:
            raise ArchiveError("a line that is no data and does not end")

    def _read_line(self, line: bytes) -> None:
        if self._statement or line.startswith(b"COPY "):
            self._statement += line
            if self._statement.count(b'"') % 2 == 0 and line.endswith(b" FROM stdin;\n"):
                self._statement, self._is_in_data = b"", True
                self.blocks.append(0)
            elif len(self._statement) > self.LONGEST_STATEMENT_BYTES:
                raise ArchiveError("a COPY statement that does not end")
        elif line.startswith(self.LARGE_OBJECT):
            self.large_objects += 1
        elif line != b"\n" and not line.startswith(self.HARMLESS):
            raise ArchiveError(f"an unexpected line: {printable(line[:200].decode('latin-1'))}")

    def finish(self) -> None:
        """Raises ArchiveError where the script breaks off."""
        if self._is_in_data or self._statement or self._unread:
            raise ArchiveError("it breaks off within a table")


# dump id; oid of the catalog, oid of the object, kind: for table data the object is the table
TOC_DATA_ENTRY = re.compile(rb"(\d+); \d+ (\d+) (TABLE DATA|BLOBS) ")


class DataEntries(NamedTuple):
    """The entries of an archive that hold data, by their dump ids."""

    tables: Mapping[bytes, int]  # to the table's oid, in the archive's order
    large_objects: Sequence[bytes]


class Contents(NamedTuple):
    """What an archive yields when it is read to its end."""

    rows: Mapping[int, int]  # by the table's oid
    large_objects: int

    @property
    def total_rows(self) -> int:
        """The rows of all tables."""
        return sum(self.rows.values())


def read_output(program: Program, look_after: Callable[[], None]) -> Iterator[bytes]:
    """What pg_restore writes, block by block, to its successful end; `look_after` is called all
    the while. Raises ArchiveError with its words for any other end, and for too long a silence.
    """
    assert program.process.stdout is not None
    pipe = program.process.stdout.fileno()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux
        with contextlib.suppress(OSError):  # a smaller pipe will do
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    last_heard = time.monotonic()
    block = b"begin"
    while block:
        check_signals()
        look_after()
        if select.select([pipe], [], [], TICK_SECONDS)[0]:
            block = os.read(pipe, READ_BYTES)
            last_heard = time.monotonic()
            yield block
        elif time.monotonic() - last_heard > READ_SILENCE_SECONDS:
            raise ArchiveError(
                f"{program.name} is stuck: silent for {READ_SILENCE_SECONDS} seconds"
            )
    if program.wait(READ_SILENCE_SECONDS) != 0 or program.words:
        raise ArchiveError(program.words)


def list_data_entries(pg_restore: Tool, dump: Path) -> DataEntries:
    """`pg_restore --list`. Raises ArchiveError with pg_restore's words; a warning is one too."""
    tables: dict[bytes, int] = {}
    large_objects: list[bytes] = []
    argv = [pg_restore.path, "--format=custom", "--list", os.path.abspath(dump)]
    with Program(argv, pg_restore.environment, stdout=subprocess.PIPE) as program:
        unread = b""
        for block in read_output(program, do_nothing):
            *lines, unread = (unread + block).split(b"\n")
            for line in lines:
                if match := TOC_DATA_ENTRY.match(line):
                    dump_id, oid, kind = match.groups()
                    if kind == b"BLOBS":
                        large_objects.append(dump_id)
                    else:
                        tables[dump_id] = int(oid)
    return DataEntries(tables, large_objects)


def read_contents(
    pg_restore: Tool, dump: Path, entries: DataEntries, on_tick: Callable[[int], None]
) -> Contents:
    """Let pg_restore decode every data entry of the archive, and count what it yields.

    It writes the entries in the order in which they are asked for: the k-th COPY is the data of the
    k-th table. Streams: the memory it takes does not grow with the archive. Raises ArchiveError.
    """
    reader = ScriptReader()
    argv = [pg_restore.path, "--format=custom", "--data-only", "--use-list=/dev/stdin", "--file=-"]
    with Program(
        [*argv, os.path.abspath(dump)],
        pg_restore.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as program:
        wanted = (*entries.tables, *entries.large_objects)
        write_stdin(program, b"".join(entry + b";\n" for entry in wanted))
        for block in read_output(program, lambda: on_tick(reader.rows_read)):
            reader.feed(block)
    reader.finish()
    oids = entries.tables.values()
    if len(reader.blocks) != len(oids):
        raise ArchiveError(
            f"its table of contents lists the data of {plural(len(oids), 'table')}, "
            f"it holds that of {len(reader.blocks)}"
        )
    rows = dict(zip(oids, reader.blocks, strict=True))
    if len(rows) != len(oids):
        raise ArchiveError("its table of contents lists the data of a table twice")
    return Contents(rows, reader.large_objects)


def compare_contents(contents: Contents, expected: Metadata) -> list[str]:
    """Every way in which the archive's contents differ from the counts, a sentence each."""
    problems = []
    if expected.table_oids is None:  # made before: all that can be compared are the numbers
        found, wanted = sorted(contents.rows.values()), sorted(expected.table_counts.values())
        if found != wanted:
            from collections import Counter

            more, less = Counter(found) - Counter(wanted), Counter(wanted) - Counter(found)
            problems += [f"a table of {plural(n, 'row')}: not expected" for n in more.elements()]
            problems += [f"a table of {plural(n, 'row')}: not in the dump" for n in less.elements()]
    else:
        for key, oid in expected.table_oids.items():
            rows = expected.table_counts[key]
            if oid not in contents.rows:
                problems.append(
                    f"table {printable(key)}: not in the dump, {plural(rows, 'row')} expected"
                )
            elif contents.rows[oid] != rows:
                problems.append(
                    f"table {printable(key)}: {plural(contents.rows[oid], 'row')} in the dump, "
                    f"{rows} expected"
                )
        problems += [
            f"table with the oid {oid}: in the dump, but not counted"
            for oid in contents.rows.keys() - expected.table_oids.values()
        ]
    large_objects = expected.large_object_count or 0
    if contents.large_objects != large_objects:
        problems.append(
            f"{plural(contents.large_objects, 'large object')} in the dump, "
            f"{large_objects} expected"
        )
    return problems


class Check(NamedTuple):
    """One check of a dump: what its line in the report says, and why it failed, if it did."""

    verdict: str
    problem: str = ""


class Examination(NamedTuple):
    """What the three checks of a dump found; None for one that was not made."""

    digest: str  # SHA-256, empty where it was not taken
    checksum: Check
    structure: Check
    contents: Check | None

    @property
    def problem(self) -> str:
        """Why the dump is not sound; empty where it is."""
        checks = (self.checksum, self.structure, self.contents)
        return "\n".join(check.problem for check in checks if check and check.problem)


def examine_dump(
    pg_restore: Tool,
    dump: Path,
    expected: Metadata,
    on_progress: Callable[[float, int], None],
) -> Examination:
    """Check that a dump is the file, and holds the rows, that its metadata says: at creation, when
    there is no checksum yet, and later.

    Hash and contents are read at once, which takes as long as the slower of the two. As soon as the
    checksum is known to differ no more is read, and what was read is discarded. `on_progress` is
    called with the fraction that is done, and the rows so far. Raises OSError, Interrupted.
    """
    structure, entries = check_structure(pg_restore, dump)
    size_bytes, total_rows = expected.backup_size_bytes, expected.total_rows
    if (found := dump.stat().st_size) != size_bytes:
        sizes = f"expected {size_bytes} bytes, found {found}"
        return Examination("", Check(f"✗ Mismatch ({sizes})", OTHER_FILE), structure, None)
    contents = None
    with FileHash(dump) as hashing:

        def fits(digest: str) -> bool:
            return digest == (expected.checksum_sha256 or digest)

        def on_tick(rows: int) -> None:
            if hashing.is_done and not fits(hashing.wait()):
                raise ArchiveError(OTHER_FILE)
            done = hashing.done_bytes / (size_bytes or 1) + rows / (total_rows or 1)
            on_progress(done / 2, rows)

        try:
            if entries is not None:
                contents = check_contents(pg_restore, dump, entries, expected, on_tick)
            digest = hashing.wait()
            found = dump.stat().st_size
        except OSError as error:
            words = f"{display_path(dump)} cannot be read: {error.strerror}"
            return Examination("", Check(f"✗ Invalid ({words})", words), structure, None)
    if not hashing.done_bytes == found == size_bytes:
        sizes = f"expected {size_bytes} bytes, read {hashing.done_bytes}, then found {found}"
        return Examination("", Check(f"✗ Mismatch ({sizes})", sizes), structure, None)
    if fits(digest):
        return Examination(digest, Check(f"✓ Match ({digest[:12]}...)"), structure, contents)
    digits = f"expected {expected.checksum_sha256[:12]}..., found {digest[:12]}..."
    return Examination(digest, Check(f"✗ Mismatch ({digits})", OTHER_FILE), structure, None)


OTHER_FILE = "the dump is not the file that was verified when it was made"


def check_structure(pg_restore: Tool, dump: Path) -> tuple[Check, DataEntries | None]:
    """Whether pg_restore can list the archive, and the data entries that it lists."""
    try:
        entries = list_data_entries(pg_restore, dump)
    except ArchiveError as error:
        return Check(f"✗ Invalid ({first_line(str(error))})", str(error)), None
    return Check("✓ Valid (pg_restore --list succeeded)"), entries


def check_contents(
    pg_restore: Tool,
    dump: Path,
    entries: DataEntries,
    expected: Metadata,
    on_tick: Callable[[int], None],
) -> Check:
    """Whether pg_restore reads the archive to its end, and finds in it what is expected."""
    try:
        contents = read_contents(pg_restore, dump, entries, on_tick)
    except ArchiveError as error:
        return Check(f"✗ Invalid ({first_line(str(error))})", str(error))
    problems = compare_contents(contents, expected)
    found = row_summary(contents.total_rows, len(contents.rows), contents.large_objects)
    if not problems:
        return Check(f"✓ Match ({found})")
    wanted = row_summary(
        expected.total_rows, len(expected.table_counts), expected.large_object_count or 0
    )
    return Check(f"✗ Mismatch (expected {wanted}, found {found})", list_problems(problems))


def list_problems(problems: Sequence[str], most: int = 10) -> str:
    """The first problems, a line each, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([*problems[:most], *more])


# ---------------------------------------------------------------------------------------------
# The server: one session, waited for in a thread
# ---------------------------------------------------------------------------------------------


# Keepalives notice a peer that is gone while we only receive; what we sent and nobody confirms is
# tcp_user_timeout's (libpq documentation, "Parameter Key Words"). For our session and pg_dump's.
KEEPALIVES = {
    "keepalives_idle": 60,
    "keepalives_interval": 10,
    "keepalives_count": 6,
    "tcp_user_timeout": 120_000,
}


class RowCounter:
    """Where the rows of a COPY go: psycopg2 writes them one by one."""

    def __init__(self) -> None:
        self.rows = 0

    def write(self, _row: bytes) -> None:
        """Take one row."""
        self.rows += 1


@contextlib.contextmanager
def no_excepthook() -> Iterator[None]:
    """psycopg2 prints a FATAL that ends a COPY by sys.excepthook, and then raises it as well."""
    hook = sys.excepthook
    sys.excepthook = lambda *_exception: None
    try:
        yield
    finally:
        sys.excepthook = hook


class Session:
    """One connection to the server. Each call that waits for it is made in a thread, one at a time.

    libpq's own blocking calls are the only ones that cope with slow handshakes, lost packets and
    lists of hosts; here, meanwhile, signals are heard and deadlines kept. Once a wait was broken
    off, by a signal or whatever `on_tick` raised, the session is only good for `close`.

    (psycopg2's set_wait_callback was tried instead: it is global, and an exception in it closes
    the connection.) Every method may raise ServerError.
    """

    def __init__(self, config: DatabaseConfig, database: str | None = None) -> None:
        psycopg2 = import_psycopg2()
        self._running: Background[Any] | None = None
        self._connection: Any = None
        started = time.monotonic()

        def connect() -> Any:
            connection = psycopg2.connect(
                "",  # where to is in the environment, as it is for pg_dump
                **({} if database is None else {"dbname": database}),
                client_encoding="UTF8",
                fallback_application_name="backup_db",
                **KEEPALIVES,
            )
            connection.autocommit = True  # or psycopg2 sends a BEGIN of its own
            if connection.get_parameter_status("server_encoding") == "SQL_ASCII":
                # No conversion there: any byte may come, and Latin-1 has a character for each.
                connection.set_client_encoding("LATIN1")
            return connection

        # libpq ends what is silent, by PGCONNECT_TIMEOUT for each address, and says which; not a
        # resolver that hangs, nor a server that talks without an end.
        hosts = config.host.count(",") + 1
        limit = CONNECT_LIMIT_FACTOR * hosts * config.connect_seconds + CONNECT_LIMIT_SECONDS
        try:
            self._connection = self._wait(connect, do_nothing, limit)
        except TimeoutError:
            place = f'"{config.host}", port {config.port}'
            text = f"no connection to {place}: its name server or the server keeps us waiting"
            raise ServerError(text, lost=True) from None
        except UnicodeDecodeError as error:
            raise ServerError(decode_words(error.object)) from None
        except (psycopg2.Error, ValueError) as error:
            too_late = time.monotonic() - started >= config.connect_seconds
            text = str(error) or "the server's words are in an encoding that Python cannot read"
            raise ServerError(text, lost=too_late) from None

    def _wait(self, call: Callable[[], T], on_tick: Callable[[], None], seconds: float | None) -> T:
        assert self._running is None, "one call at a time"
        self._running = Background(call)
        try:
            result: T = self._running.wait(on_tick, seconds)
        finally:
            if self._running.is_done:
                self._running = None
        return result

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement, or several in one string, and return the rows of the last."""

        def execute() -> list[tuple[Any, ...]]:
            with self._connection.cursor() as cursor:
                cursor.execute(statement, values or None)
                return cursor.fetchall() if cursor.description else []

        silence = STALL_SECONDS + ANSWER_SECONDS
        try:
            return self._call(execute, seconds=silence)
        except TimeoutError:
            raise ServerError(f"no answer within {format_age(silence)}", lost=True) from None

    def copy_rows(self, statement: str, counter: RowCounter, on_tick: Callable[[], None]) -> int:
        """Run a `COPY … TO STDOUT` and return how many rows came; `counter` counts them on the way,
        their contents are discarded."""

        def copy() -> int:
            with self._connection.cursor() as cursor, no_excepthook():
                cursor.copy_expert(statement, counter)
                return int(cursor.rowcount)

        return self._call(copy, on_tick)

    def _call(
        self,
        call: Callable[[], T],
        on_tick: Callable[[], None] = do_nothing,
        seconds: float | None = None,
    ) -> T:
        psycopg2 = import_psycopg2()
        try:
            return self._wait(call, on_tick, seconds)
        except (psycopg2.Error, UnicodeError) as error:
            raise self._translate(error) from None

    def _translate(self, error: Exception) -> ServerError:
        sqlstate = getattr(error, "pgcode", None)
        lost = sqlstate is None and bool(self._connection.closed)
        # psycopg2 often has no more than "no message from the libpq" for a connection that ended.
        text = (lost and self._connection.info.error_message) or getattr(error, "pgerror", None)
        return ServerError((text or str(error)).strip(), sqlstate, lost)

    def parameter(self, name: str) -> str:
        """A setting that the server reports by itself, such as server_encoding."""
        return str(self._connection.get_parameter_status(name))

    @property
    def server_version(self) -> int:
        """170010 for 17.10."""
        return int(self._connection.server_version)

    def close(self) -> None:
        """Leave the server; locks and snapshot go with it, and the query that runs, at once."""
        if self._running is not None:
            self._reset()
            self._running.join(STOP_SECONDS)
            if not self._running.is_done:
                return  # to the end of the process: a call beside it would block this thread too
        self._connection.close()

    def _reset(self) -> None:
        """Cut the socket under the call that runs. A reset, and no mere end: behind a full receive
        window a COPY's backend would wait for us for minutes, with its locks and snapshot."""
        import socket
        import struct

        with (
            contextlib.suppress(OSError, import_psycopg2().Error),  # it is gone already
            socket.socket(fileno=os.dup(self._connection.fileno())) as way,
        ):
            with contextlib.suppress(OSError):  # a Unix socket has no lingering
                linger = struct.pack("ii", 1, 0)
                way.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            way.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def decode_words(raw: bytes) -> str:
    """What the server says before a login: its own words in an encoding that it does not name,
    ours within them in UTF-8. A byte that is no UTF-8 is taken as Latin-1."""
    return "".join(
        chr(ord(character) - 0xDC00) if "\udc80" <= character <= "\udcff" else character
        for character in raw.decode("utf-8", "surrogateescape")
    )


def import_psycopg2() -> Any:
    """psycopg2, where it is used: listing and verifying must work without it."""
    try:
        import psycopg2
        import psycopg2.extensions
    except ImportError as error:
        raise missing_package(error) from None
    return psycopg2


def missing_package(error: ImportError) -> Failure:
    """The failure for a run-time package that is not installed, or does not load."""
    requirements = SCRIPT_DIR / "requirements.txt"
    return Failure(
        ExitCode.GENERAL,
        f"a package is missing: {error} (python is {printable(sys.executable)})",
        "Install what the script needs: "
        + shell_words(sys.executable, "-m", "pip", "install", "-r", display_path(requirements)),
        "In cron, name the python that has it: /path/to/venv/bin/python3 backup_db.py",
    )


BEGIN_READING = """
BEGIN ISOLATION LEVEL {isolation} READ ONLY;
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '{lock_wait_seconds}s';
SET LOCAL idle_in_transaction_session_timeout = 0;
SET LOCAL row_security = off;
SET LOCAL search_path = '';
SET LOCAL quote_all_identifiers = off;
"""


def begin(session: Session, isolation: str) -> None:
    """Begin a transaction that no setting of the role or the database can break or bend, and that
    waits for no lock without an end (a VACUUM FULL of the catalog holds up any query)."""
    session.query(BEGIN_READING.format(isolation=isolation, lock_wait_seconds=STALL_SECONDS))
    if session.server_version >= 170000:
        session.query("SET LOCAL transaction_timeout = 0")
    if session.server_version >= 140000:
        try:
            # Should this process be killed, the server ends a long count or wait by itself.
            session.query(
                "SAVEPOINT looking_after;"
                f" SET LOCAL client_connection_check_interval = '{ORPHAN_SECONDS}s';"
                " RELEASE SAVEPOINT looking_after"
            )
        except ServerError as error:
            if error.lost:
                raise
            # A platform that cannot.
            session.query("ROLLBACK TO SAVEPOINT looking_after; RELEASE SAVEPOINT looking_after")


def connection_failure(config: DatabaseConfig, error: ServerError) -> Failure:
    """Why there is no connection. The cause is looked up in the catalog, where another database
    lets us in; the server's words are shown as they are, in whatever language."""
    options = client_options(config)
    name = config.name
    # Where there was no answer in time, there is no other database to ask either.
    known = "unknown" if error.lost else _look_up_database(config)
    check_name = f"Check database name {config.places['name']}"
    if known == "missing":
        return Failure(
            ExitCode.CONNECTION,
            error.text,
            f"Verify database exists: psql -l {options}",
            check_name,
            f"Create database if needed: createdb {shell_words(name)} {options}",
        )
    if known == "closed":
        return Failure(
            ExitCode.CONNECTION,
            error.text,
            f"The database does not allow connections: {check_name}",
            "Or allow them, as its owner: ALTER DATABASE … ALLOW_CONNECTIONS true",
        )
    if known == "no CONNECT" or "User does not have CONNECT privilege." in error.text:
        return Failure(
            ExitCode.PERMISSION,
            error.text,
            f"Grant it, as the owner of the database: GRANT CONNECT ON DATABASE "
            f"{sql_identifier(name)} TO {sql_identifier(config.user or current_user())}",
            f"Or back up as another role, set {config.places['user']}",
        )
    return Failure(
        ExitCode.CONNECTION,
        error.text,
        f"See whether the server answers: pg_isready {client_options(config, user=False)}",
        f"Check the host {config.places['host']}, and the port {config.places['port']}",
        f"Check the user {config.places['user']}, and the password {config.places['password']}",
        f"Verify database exists: psql -l {options}",
        *(f"Check libpq's own settings {place}" for place in [config.places.get("libpq")] if place),
    )


def _look_up_database(config: DatabaseConfig) -> str:
    """What the catalog says of the configured database, seen from the database `postgres`."""
    try:
        with Session(config, "postgres") as session:
            found = session.query(
                "SELECT datallowconn, has_database_privilege(oid, 'CONNECT')"
                " FROM pg_catalog.pg_database WHERE datname = %s",
                config.name,
            )
    except ServerError:
        return "unknown"
    if not found:
        return "missing"
    allowed, may_connect = found[0]
    return "closed" if not allowed else "open" if may_connect else "no CONNECT"


def client_options(config: DatabaseConfig, user: bool = True) -> str:
    """The options by which psql reaches the configured server."""
    options = shell_words("-h", config.host, "-p", str(config.port))
    return f"{options} {shell_words('-U', config.user)}" if user and config.user else options


def sql_identifier(name: str) -> str:
    """A name quoted for SQL, as a person can paste it."""
    return printable_sql('"' + decode_os_text(name).replace('"', '""') + '"')


def printable_sql(sql: str) -> str:
    """SQL that still means the same when it is pasted from a terminal: quoted names that would not
    show as they are get SQL's own escapes, `U&"two\\+00000Alines"`."""

    def escape(quoted: re.Match[str]) -> str:
        if quoted.group().isprintable():
            return quoted.group()
        return "U&" + "".join(
            character.replace("\\", "\\\\")
            if character.isprintable()
            else f"\\+{ord(character):06X}"
            for character in quoted.group()
        )

    return re.sub('"(?:[^"]|"")+"', escape, sql)


LOCK_NOT_AVAILABLE = "55P03"


def server_failure(error: ServerError, doing: str) -> Failure:
    """What stopped us while `doing` something on the server, in the server's own words."""
    if error.lost:
        return Failure(
            ExitCode.CREATION,
            f"the connection to the server was lost while {doing}:\n{error.text}",
            "See why in the server's log: a restart, a crash, or an administrator's command",
            "Then run the backup again",
        )
    if error.sqlstate == "42501":  # insufficient_privilege
        return Failure(
            ExitCode.PERMISSION,
            f"while {doing}: {error.text}",
            "Grant the role what it lacks, or back up as another role",
        )
    if error.sqlstate == LOCK_NOT_AVAILABLE:
        return waited_too_long(f"while {doing}: {error.text}", None)
    if error.sqlstate == "53200":  # out_of_memory: the lock table is full
        return Failure(
            ExitCode.CREATION,
            f"while {doing}: {error.text}",
            "Raise max_locks_per_transaction in postgresql.conf, and restart the server",
        )
    return Failure(
        ExitCode.CREATION, f"while {doing}: {error.text}", "See the server's log for the cause"
    )


# ---------------------------------------------------------------------------------------------
# The server: what is in the database, and what this role may read of it
# ---------------------------------------------------------------------------------------------

# The relations that pg_dump reads: not those of extensions, but for their configuration tables
# (PostgreSQL documentation, "Extension Configuration Tables").
DUMPED_RELATIONS = """
  SELECT c.oid, c.relkind, c.relpersistence, n.oid AS nsoid, n.nspname, c.relname,
         x.extcondition[array_position(x.extconfig, c.oid)] AS condition
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_catalog.pg_depend m
      ON m.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND m.objid = c.oid
     AND m.objsubid = 0 AND m.deptype = 'e'
     AND m.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass
    LEFT JOIN pg_catalog.pg_extension x ON c.oid = ANY (x.extconfig)
   WHERE c.relkind IN ('r', 'p', 'S')
     AND (x.oid IS NOT NULL OR (m.objid IS NULL AND n.nspname !~ '^pg_'
                                AND n.nspname <> 'information_schema'))
"""

# What pg_dump would fail on, each row alone enough: tried by granting and revoking one by one.
UNREADABLE = f"""
WITH rel AS ({DUMPED_RELATIONS})
SELECT 'schema', pg_catalog.quote_ident(nspname), nsoid
  FROM (SELECT DISTINCT nspname, nsoid FROM rel) s
 WHERE NOT pg_catalog.has_schema_privilege(nsoid, 'USAGE')
UNION ALL
SELECT CASE relkind WHEN 'S' THEN 'sequence' ELSE 'table' END,
       pg_catalog.quote_ident(nspname) || '.' || pg_catalog.quote_ident(relname), oid
  FROM rel WHERE NOT pg_catalog.has_table_privilege(oid, 'SELECT')
UNION ALL
SELECT 'row security',
       pg_catalog.quote_ident(nspname) || '.' || pg_catalog.quote_ident(relname), oid
  FROM rel WHERE relkind = 'r' AND pg_catalog.row_security_active(oid)
UNION ALL
SELECT 'large object', l.oid::text, l.oid FROM pg_catalog.pg_largeobject_metadata l
 WHERE NOT EXISTS (
         SELECT FROM pg_catalog.aclexplode(
                  COALESCE(l.lomacl, pg_catalog.acldefault('L', l.lomowner))) a
          WHERE a.privilege_type = 'SELECT'
            AND (a.grantee = 0 OR pg_catalog.pg_has_role(a.grantee, 'USAGE')))
   AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
ORDER BY 1, 3
"""

GRANTS = {
    "schema": ("Let it use the schemas", "GRANT USAGE ON SCHEMA {} TO {}"),
    "table": ("Let it read the tables", "GRANT SELECT ON TABLE {} TO {}"),
    "sequence": ("Let it read the sequences", "GRANT SELECT ON SEQUENCE {} TO {}"),
    "large object": ("Let it read the large objects", "GRANT SELECT ON LARGE OBJECT {} TO {}"),
}


def check_privileges(session: Session) -> None:
    """Raise Failure with everything that pg_dump could not read as this role."""
    unreadable = session.query(UNREADABLE)
    if not unreadable:
        return
    role = str(session.query("SELECT pg_catalog.quote_ident(current_user)")[0][0])
    names: dict[str, list[str]] = {}
    for kind, name, _oid in unreadable:
        names.setdefault(kind, []).append(name)
    grantee = printable_sql(role)
    steps = [
        f"{purpose}: {grant.format(', '.join(map(printable_sql, names[kind])), grantee)};"
        for kind, (purpose, grant) in GRANTS.items()
        if kind in names
    ]
    if names.keys() - {"large object", "row security"}:
        steps.append(f"Or all tables, for good: GRANT pg_read_all_data TO {grantee};")
    if "row security" in names:
        steps.append(f"Let it see every row, as a superuser: ALTER ROLE {grantee} BYPASSRLS;")
    lines = [f"{kind}: {', '.join(map(printable, found))}" for kind, found in names.items()]
    raise Failure(
        ExitCode.PERMISSION,
        f"role {printable(role)} cannot read all of the database; a backup would be incomplete\n"
        + "\n".join(lines),
        *steps,
    )


class Table(NamedTuple):
    """A table that pg_dump locks, and whose rows it writes if there can be any."""

    oid: int
    sql_name: str  # with its schema, quoted where SQL needs it
    key: str  # the same in the metadata: bare in schema public
    condition: str  # of an extension's configuration table: the rows that pg_dump takes
    column: str  # the one that is least work to read, in parentheses; empty where there is none
    has_rows: bool  # in the dump: those of a partitioned table are in its partitions

    @property
    def copy_statement(self) -> str:
        """What yields one line for each of its rows in the dump.

        A COPY of a table reads the heap and is never planned, while planning a SELECT would run
        what the table's owner put into its indexes and statistics: as us. As in pg_dump, the one
        exception are the tables of an extension that come with a condition.
        """
        if self.condition:
            return f"COPY (SELECT {self.column} FROM {self.sql_name} {self.condition}) TO STDOUT"
        return f"COPY {self.sql_name} {self.column} TO STDOUT"


# The tables that pg_dump locks. Unlogged tables hold nothing on a standby, and pg_dump leaves
# their rows out there. Object ids grow, so that their order is the order of creation.
DUMPED_TABLES = f"""
WITH rel AS ({DUMPED_RELATIONS})
SELECT oid::bigint, pg_catalog.quote_ident(nspname) || '.' || pg_catalog.quote_ident(relname),
       CASE nspname WHEN 'public' THEN '' ELSE pg_catalog.quote_ident(nspname) || '.' END
       || pg_catalog.quote_ident(relname), COALESCE(condition, ''),
       COALESCE((SELECT '(' || pg_catalog.quote_ident(a.attname) || ')'
                   FROM pg_catalog.pg_attribute a
                  WHERE a.attrelid = rel.oid AND a.attnum > 0
                    AND NOT a.attisdropped AND a.attgenerated = ''
                  ORDER BY a.attlen < 0, a.attlen, a.attnum LIMIT 1), ''),
       relkind = 'r' AND NOT (relpersistence = 'u' AND pg_catalog.pg_is_in_recovery())
  FROM rel WHERE relkind IN ('r', 'p')
 ORDER BY oid
"""


def list_tables(session: Session) -> list[Table]:
    """The tables that pg_dump will lock, in the order in which they were created."""
    return [Table(*row) for row in session.query(DUMPED_TABLES)]


class DatabaseFacts(NamedTuple):
    """What the metadata says of the database, read in the snapshot."""

    name: str
    size_bytes: int
    server_version: str
    encoding: str
    locale: dict[str, str | None]
    extensions: dict[str, str]
    roles: list[str]
    large_objects: int
    not_included: list[str]


# Columns that only newer servers have come through to_jsonb: absent, they are NULL.
DATABASE_FACTS = """
SELECT pg_catalog.current_database(), pg_catalog.pg_database_size(d.oid),
       d.datcollate, d.datctype, pg_catalog.to_jsonb(d) ->> 'datlocprovider',
       COALESCE(pg_catalog.to_jsonb(d) ->> 'datlocale', pg_catalog.to_jsonb(d) ->> 'daticulocale'),
       (SELECT pg_catalog.count(*) FROM pg_catalog.pg_largeobject_metadata)
  FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()
"""

EXTENSIONS = "SELECT extname, extversion FROM pg_catalog.pg_extension ORDER BY extname"

# Owners and grantees of all that is in the database, and of the database. The bootstrap
# superuser (oid 10) is in no dependency but in most archives.
ROLES = """
SELECT rolname FROM pg_catalog.pg_roles r
 WHERE r.oid = 10 OR r.oid IN (
       SELECT s.refobjid FROM pg_catalog.pg_shdepend s, pg_catalog.pg_database d
        WHERE d.datname = pg_catalog.current_database()
          AND s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
          AND (s.dbid = d.oid OR (s.classid = 'pg_catalog.pg_database'::pg_catalog.regclass
                                  AND s.objid = d.oid)))
 ORDER BY rolname
"""

# What pg_dump leaves out and exits 0: (sentence, names or NULL, how many).
NOT_INCLUDED = """
WITH rel AS (
  SELECT c.oid, c.relkind, c.relpersistence, n.nspname,
         CASE n.nspname WHEN 'public' THEN '' ELSE pg_catalog.quote_ident(n.nspname) || '.' END
         || pg_catalog.quote_ident(c.relname) AS name
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
   WHERE c.relkind = 'f' OR c.relpersistence = 'u' OR n.nspname = 'information_schema')
SELECT 'data of foreign tables', pg_catalog.string_agg(name, ', ' ORDER BY oid), 0
  FROM rel WHERE relkind = 'f'
UNION ALL
SELECT 'data of unlogged tables, which a standby does not have',
       pg_catalog.string_agg(name, ', ' ORDER BY oid), 0
  FROM rel WHERE relkind = 'r' AND relpersistence = 'u' AND pg_catalog.pg_is_in_recovery()
UNION ALL
SELECT 'tables in the schema information_schema',
       pg_catalog.string_agg(name, ', ' ORDER BY oid), 0
  FROM rel WHERE relkind IN ('r', 'p') AND oid >= 16384 AND nspname = 'information_schema'
UNION ALL
SELECT 'subscriptions, which only a superuser can back up', NULL, pg_catalog.count(*)
  FROM pg_catalog.pg_subscription s JOIN pg_catalog.pg_database d ON d.oid = s.subdbid
 WHERE d.datname = pg_catalog.current_database()
   AND NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
UNION ALL
SELECT 'options of user mappings, which only a superuser can back up', NULL, pg_catalog.count(*)
  FROM pg_catalog.pg_user_mappings
 WHERE NOT (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user)
"""


def describe_database(session: Session) -> DatabaseFacts:
    """Everything that the metadata says of the database, but for the tables."""
    name, size_bytes, collate, ctype, provider, locale, large_objects = session.query(
        DATABASE_FACTS
    )[0]
    providers = {None: "libc", "c": "libc", "i": "icu", "b": "builtin", "d": "default"}
    major, minor = divmod(session.server_version, 10000)
    return DatabaseFacts(
        name=name,
        size_bytes=size_bytes,
        server_version=f"{major}.{minor}",
        encoding=session.parameter("server_encoding"),
        locale={
            "collate": collate,
            "ctype": ctype,
            "provider": providers.get(provider, provider),
            **({"locale": locale} if locale else {}),
        },
        extensions=dict(session.query(EXTENSIONS)),
        roles=[role for (role,) in session.query(ROLES)],
        large_objects=large_objects,
        not_included=[
            f"{what} ({names or count})"
            for what, names, count in session.query(NOT_INCLUDED)
            if names or count
        ],
    )


# ---------------------------------------------------------------------------------------------
# The server: locks first, then the snapshot, then the counts in it
# ---------------------------------------------------------------------------------------------

# also deadlock_detected, undefined_table, invalid_schema_name
LOCK_RETRY_SQLSTATES = {LOCK_NOT_AVAILABLE, "40P01", "42P01", "3F000"}

DEADLOCK_TIMEOUT_MS = """
SELECT setting::int FROM pg_catalog.pg_settings WHERE name = 'deadlock_timeout'
"""


class Snapshot(NamedTuple):
    """A moment of the database that pg_dump can be given, with every table held still."""

    id: str
    tables: Sequence[Table]  # those with rows


def take_snapshot(session: Session, progress: Progress) -> Snapshot:
    """Lock the tables, then export a snapshot that sees them as they stay.

    TRUNCATE and an ALTER TABLE that rewrites are not MVCC-safe (PostgreSQL documentation,
    "Caveats" of concurrency control): a table that is locked only after the snapshot can be
    dumped as empty, and counted as empty, with exit status 0. So the locks come before the
    transaction sees anything, and the list of tables is read again behind them.

    Raises Failure, naming the session that holds a table, after STALL_SECONDS.
    """
    deadline = time.monotonic() + STALL_SECONDS
    while True:
        begin(session, "READ COMMITTED")
        tables = list_tables(session)
        (deadlock_timeout_ms,) = session.query(DEADLOCK_TIMEOUT_MS)[0]
        session.query("COMMIT")
        try:
            begin(session, "REPEATABLE READ")
            if tables:
                lock_timeout_ms = max(1, min(LOCK_TIMEOUT_MS, deadlock_timeout_ms // 2))
                session.query(f"SET LOCAL lock_timeout = {lock_timeout_ms}")
                names = ", ".join(f"ONLY {table.sql_name}" for table in tables)
                session.query(f"LOCK TABLE {names} IN ACCESS SHARE MODE")
                session.query(f"SET LOCAL lock_timeout = '{STALL_SECONDS}s'")
            snapshot = str(session.query("SELECT pg_catalog.pg_export_snapshot()")[0][0])
            if list_tables(session) == tables:
                return Snapshot(snapshot, [table for table in tables if table.has_rows])
            session.query("ROLLBACK")
            holder, waits_for = None, "the set of tables changes all the time"
        except ServerError as error:
            if error.sqlstate not in LOCK_RETRY_SQLSTATES:
                raise
            session.query("ROLLBACK")  # every lock goes: we never wait while we hold some
            holder, waits_for = find_lock_holder(session, tables, error)
        if time.monotonic() > deadline:
            raise waited_too_long(
                f"the tables could not be locked for reading: {waits_for}", holder
            )
        pause(LOCK_RETRY_SECONDS, progress, f"Waiting: {waits_for}")


def pause(seconds: float, progress: Progress, what: str) -> None:
    """Sleep, and keep the progress line alive."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check_signals()
        progress.show(what)
        time.sleep(min(left, TICK_SECONDS))


# Within a transaction pg_stat_activity shows what it showed first, until it is told to look again.
LOOK_AGAIN = "SELECT pg_catalog.pg_stat_clear_snapshot()"

LOCK_HOLDER = """
SELECT l.relation::pg_catalog.regclass::text, l.pid, a.usename, a.application_name, a.query
  FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
   AND l.relation = ANY (%s::oid[])
   AND l.database = (SELECT oid FROM pg_catalog.pg_database
                      WHERE datname = pg_catalog.current_database())
 ORDER BY l.granted DESC, a.xact_start LIMIT 1
"""


def find_lock_holder(
    session: Session, tables: Iterable[Table], error: ServerError
) -> tuple[OtherSession | None, str]:
    """Who holds one of the tables, and a sentence that says so; where nobody does any more, the
    words of the error."""
    session.query(LOOK_AGAIN)
    found = session.query(LOCK_HOLDER, [table.oid for table in tables])
    if not found:
        return None, error.text
    relation, *who = found[0]
    holder = OtherSession(*who)
    return holder, f"{holder} holds the table {printable(relation)}"


class OtherSession(NamedTuple):
    """A session that is not ours, with what this role may know of it."""

    pid: int
    user: str | None
    application: str | None
    query: str | None
    is_waiting: bool = False  # for a lock

    def __str__(self) -> str:
        """`session 4711 (alice, psql: ALTER TABLE …)`."""
        text = printable(" ".join((self.query or "").split()))
        text = text if len(text) <= 80 else text[:79] + "…"
        about = ", ".join(printable(part) for part in (self.user, self.application) if part)
        about += f": {text}" if text else ""
        return f"session {self.pid}" + (f" ({about})" if about else "")


def table_sizes(session: Session, tables: Sequence[Table]) -> dict[int, int]:
    """The bytes of each table with its TOAST, by oid. Only with the locks held: it takes a lock
    itself. (pg_table_size would add the maps and TOAST's index, in five times the time.)"""
    return dict(
        session.query(
            "SELECT oid::bigint, COALESCE(pg_catalog.pg_relation_size(oid), 0)"
            " + COALESCE(pg_catalog.pg_relation_size(NULLIF(reltoastrelid, 0)), 0)"
            " FROM pg_catalog.pg_class WHERE oid = ANY (%s::oid[])",
            [table.oid for table in tables],
        )
    )


def count_rows(
    session: Session,
    tables: Sequence[Table],
    sizes: Mapping[int, int],
    counter: RowCounter,
    on_tick: Callable[[], None],
) -> dict[int, int]:
    """The rows of every table, exactly, in the session's snapshot, by the table's oid.

    A table without a byte is empty, but for one with a condition: its children are read too.
    """
    return {
        table.oid: session.copy_rows(table.copy_statement, counter, on_tick)
        if table.condition or sizes[table.oid]
        else 0
        for table in tables
    }


# Whether pg_dump copies rows by now, and who blocks it.
PG_DUMP_ACTIVITY = """
SELECT pg_catalog.starts_with(a.query, 'COPY '), b.pid, b.usename, b.application_name, b.query,
       pg_catalog.cardinality(pg_catalog.pg_blocking_pids(b.pid)) > 0
  FROM pg_catalog.pg_stat_activity a
  LEFT JOIN LATERAL pg_catalog.unnest(pg_catalog.pg_blocking_pids(a.pid)) AS blocking (pid) ON true
  LEFT JOIN pg_catalog.pg_stat_activity b ON b.pid = blocking.pid
 WHERE a.application_name = %s
 ORDER BY b.xact_start LIMIT 1
"""


def look_at_pg_dump(session: Session, application_name: str) -> tuple[bool, OtherSession | None]:
    """Whether the pg_dump with this application name copies rows by now, and the session that
    keeps it waiting for a lock."""
    session.query(LOOK_AGAIN)
    for is_copying, pid, *about in session.query(PG_DUMP_ACTIVITY, application_name):
        return bool(is_copying), None if pid is None else OtherSession(pid, *about)
    return False, None  # it has not connected yet, or has gone


# ---------------------------------------------------------------------------------------------
# The dump: pg_dump beside the counts, and what it means when it fails
# ---------------------------------------------------------------------------------------------


class Dumped(NamedTuple):
    """A finished dump, not yet read back, and what the database held at that moment."""

    facts: DatabaseFacts
    moment: datetime
    tables: Sequence[Table]
    counts: Mapping[int, int]
    warnings: str


class Run(NamedTuple):
    """What a run works with, from the moment that it may write."""

    config: DatabaseConfig
    tools: Tools
    lock: DatabaseLock
    partial: PartialBackup
    progress: Progress


def dump_database(run: Run) -> Dumped:
    """Dump the database into the partial file, and count its rows in the same snapshot.

    DDL that slipped in before pg_dump took its own locks (a view dropped, an ALTER TABLE queued
    behind us) makes pg_dump fail before it writes: then all is let go and begun again. So it is
    where pg_dump and a migration wait for each other.
    """
    attempts = 0
    deadline = time.monotonic() + STALL_SECONDS
    while True:
        try:
            session = Session(run.config)
        except ServerError as error:
            raise connection_failure(run.config, error) from None
        doing = "reading the catalog"
        try:
            with session:
                refuse_older_dump(run.tools.pg_dump, session.server_version)
                begin(session, "READ COMMITTED")
                check_privileges(session)
                session.query("COMMIT")
                doing = "locking the tables"
                snapshot = take_snapshot(session, run.progress)
                doing = "dumping and counting the rows"
                try:
                    return dump_snapshot(run, session, snapshot)
                except InTheWay as found:
                    waits_for = found.session
                    if time.monotonic() > deadline:
                        raise pg_dump_waited_too_long(waits_for) from None
                except DumpFailed as failed:
                    attempts += 1
                    cause = find_cause(run, failed, session)
                    retry = failed.status == 1 and run.partial.size_bytes == 0
                    if cause is not None or not retry or attempts == DUMP_ATTEMPTS:
                        raise cause or dump_failure(failed) from None
                    continue
        except ServerError as error:
            raise server_failure(error, doing) from None
        pause(LOCK_RETRY_SECONDS, run.progress, f"Waiting: {waits_for} holds what pg_dump needs")


def refuse_older_dump(pg_dump: Tool, server_version: int) -> None:
    """pg_dump refuses a server of a later major version than its own."""
    major = server_version // 10000
    if pg_dump.major < major:
        raise older_tool(pg_dump, major, f"too old for the server, which is version {major}")


def dump_snapshot(run: Run, session: Session, snapshot: Snapshot) -> Dumped:
    """Run pg_dump on the snapshot while our session counts in it. Raises DumpFailed, InTheWay."""
    pg_dump_tool, partial = run.tools.pg_dump, run.partial
    facts = describe_database(session)
    sizes = table_sizes(session, snapshot.tables)
    large_objects_size = session.query("SELECT pg_catalog.pg_table_size('pg_largeobject')")[0][0]
    expected_bytes = check_disk_space(
        partial.directory, run.config, facts, sum(sizes.values()) + large_objects_size
    )
    moment = partial.claim_name()
    # By this its backend is found; ASCII, since the server replaces anything else.
    application_name = f"backup_db {os.getpid()} {os.urandom(4).hex()}"
    argv = [
        pg_dump_tool.path,
        "--format=custom",
        # The database, the host and the password stay in the environment.
        "--dbname=" + " ".join(f"{name}={value}" for name, value in KEEPALIVES.items()),
        "--no-password",
        "--no-sync",  # we do it ourselves, before we read the file back
        f"--snapshot={snapshot.id}",
        f"--encoding={facts.encoding}",
        f"--lock-wait-timeout={DUMP_LOCK_TIMEOUT}",
        f"--compress={run.tools.compress_value}",
        f"--file={partial.dump}",
    ]
    environment = {**pg_dump_tool.environment, "PGAPPNAME": application_name}
    with Program(argv, environment, pass_fds=[run.lock.descriptor]) as pg_dump:
        run.lock.note(f"pg_dump {pg_dump.process.pid}")

        def show(blocker: OtherSession | None = None) -> None:
            if blocker is not None:
                run.progress.show(f"Waiting: {blocker} blocks pg_dump")
                return
            written = partial.size_bytes
            fraction = DUMP_SHARE * min(written / (expected_bytes or 1), 1)
            run.progress.show("Dumping", fraction, f"{format_size(written)} written")

        counter, patience = RowCounter(), Patience("counting the rows")

        def on_tick() -> None:
            check_dump_status(pg_dump)
            patience.look(counter.rows, partial.size_bytes)
            show()

        blocker_watch = BlockerWatch(session, application_name)
        while pg_dump.wait(TICK_SECONDS) is None:
            show(blocker_watch.look())
            if blocker_watch.saw_copying or partial.size_bytes:
                break  # it has all its locks
        check_dump_status(pg_dump)
        counted = count_rows(session, snapshot.tables, sizes, counter, on_tick)
        while pg_dump.wait(TICK_SECONDS) is None:
            show(blocker_watch.look())
        check_dump_status(pg_dump)
        warnings = pg_dump.words
    return Dumped(facts, moment, snapshot.tables, counted, warnings)


def check_dump_status(pg_dump: Program) -> None:
    """Raise DumpFailed if pg_dump ended without success."""
    if status := pg_dump.status():
        raise DumpFailed(status, pg_dump.words)


class BlockerWatch:
    """Notices when another session keeps pg_dump waiting for a lock.

    --lock-wait-timeout does not cover every lock: pg_dump waits for ever behind an uncommitted
    REFRESH MATERIALIZED VIEW (15 to 18, tried). And views, materialized views and sequences
    cannot be locked beforehand: a migration that has replaced a view, and comes to alter the
    table below it while pg_dump waits for that view, would be the victim of the deadlock. The
    server sees one after deadlock_timeout, 1 s by default; we look more often and let go.
    """

    def __init__(self, session: Session, application_name: str) -> None:
        self._session = session
        self._application_name = application_name
        self._blocker: OtherSession | None = None
        self._blocked_since = 0.0
        self._next_look = 0.0
        self.saw_copying = False  # rows: all locks are taken before the first

    def look(self) -> OtherSession | None:
        """Who blocks pg_dump now. Raises Failure once it has lasted STALL_SECONDS, InTheWay
        where that session waits too."""
        now = time.monotonic()
        if now < self._next_look:
            return self._blocker
        self._next_look = now + WATCH_SECONDS
        blocked_before = self._blocker is not None
        is_copying, self._blocker = look_at_pg_dump(self._session, self._application_name)
        self.saw_copying |= is_copying
        if self._blocker is not None and self._blocker.is_waiting:
            raise InTheWay(self._blocker)
        if self._blocker is None or not blocked_before:
            self._blocked_since = now
        elif now - self._blocked_since > STALL_SECONDS:
            raise pg_dump_waited_too_long(self._blocker)
        return self._blocker


def pg_dump_waited_too_long(blocker: OtherSession) -> Failure:
    """The failure for a lock that pg_dump has not got."""
    return waited_too_long(f"pg_dump waits for a lock: {blocker} blocks it", blocker)


def waited_too_long(what: str, holder: OtherSession | None) -> Failure:
    """The failure for a lock that another session has held too long."""
    steps = ["Run the backup again, at an hour without migrations"]
    if holder is not None:
        end = shell_words("psql", "-c", f"SELECT pg_terminate_backend({holder.pid})")
        steps.insert(0, f"Let that session finish, or end it: {end}")
    return Failure(ExitCode.CREATION, f"gave up after {format_age(STALL_SECONDS)}: {what}", *steps)


DUMP_SHARE = 0.8  # of the whole run, as the progress line counts it; the rest is the read-back


OUTPUT_FILE_ERROR = re.compile(
    r"could not (?:write to|open) output file.*: (?P<reason>[^:\n]+)$", re.MULTILINE
)


def find_cause(run: Run, failed: DumpFailed, session: Session) -> Failure | None:
    """Why pg_dump failed: settled by looking again at the file, the server and the privileges.

    The only words of pg_dump's that count are its own on its output file, whose end is the text
    of the errno (in English: LC_ALL=C). None where nothing explains it.
    """
    directory = run.partial.directory
    if match := OUTPUT_FILE_ERROR.search(failed.words):
        for number in errno.errorcode:
            if match.group("reason") == os.strerror(number):
                return other_file_failure(number, directory, failed.words)
    if failed.status == -signal.SIGXFSZ:
        detail = f"{failed.words}: the limit on file sizes was reached"
        return other_file_failure(errno.EFBIG, directory, detail)
    if is_disk_full(directory):
        return other_file_failure(errno.ENOSPC, directory, failed.words)
    if failed.status < 0:
        return None
    try:
        with Session(run.config) as again:
            begin(again, "READ COMMITTED")
            check_privileges(again)
    except Failure as failure:
        return Failure(failure.code, f"{failed.words}\n{failure.detail}", *failure.steps)
    except ServerError as error:
        return find_lost_connection(run.config, failed, session, error)
    return None


def find_lost_connection(
    config: DatabaseConfig, failed: DumpFailed, session: Session, error: ServerError
) -> Failure:
    """pg_dump failed, and no second connection is to be had: is the server gone, or full?"""
    session.close()
    try:
        Session(config).close()
    except ServerError as gone:
        lost = ServerError(f"{failed.words}\n{gone.text}", lost=True)
        return server_failure(lost, "dumping")
    role = sql_identifier(config.user or current_user())
    return Failure(
        ExitCode.CONNECTION,
        error.text,
        "A backup needs two connections at once, one of them for pg_dump",
        f"Allow the role more: ALTER ROLE {role} CONNECTION LIMIT 3; or the database: "
        f"ALTER DATABASE {sql_identifier(config.name)} CONNECTION LIMIT …",
    )


def dump_failure(failed: DumpFailed) -> Failure:
    """pg_dump failed, and nothing here explains it: its own words are all there is."""
    steps = ["See the server's log for the time of this run"]
    if failed.status == -signal.SIGKILL:
        steps.insert(
            0, "See whether the system ran out of memory: dmesg | grep -i 'killed process'"
        )
    return Failure(ExitCode.CREATION, failed.words, *steps, "Then run the backup again")


# ---------------------------------------------------------------------------------------------
# Files: the directory, its lock, partial files, and how a backup is published
# ---------------------------------------------------------------------------------------------


def make_directory(directory: Path) -> None:
    """Make the output directory, for its owner alone; one that is there stays as it is."""
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in made:  # its name, too, has to outlive a power cut
            with contextlib.suppress(PermissionError):  # to read it is not ours to ask for
                sync_directory(path.parent)
    except FileExistsError:  # "File exists" would be no news to who asked for a directory
        raise Failure(
            ExitCode.PERMISSION,
            f"{display_path(directory)}: {os.strerror(errno.ENOTDIR)}",
            f"See what it is, a file or a link to nowhere: ls -ld {shell_words(str(directory))}",
            "Move it out of the way, or use another directory: --output-dir DIR",
        ) from None
    except OSError as error:
        raise file_failure(error) from None


class DatabaseLock:
    """That one run at a time backs up a database into a directory.

    flock() on a hidden file that is never deleted. pg_dump inherits the descriptor: should this
    process be killed, the lock is held until pg_dump has ended too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = -1

    def __enter__(self) -> DatabaseLock:
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._held() from None
            os.ftruncate(self.descriptor, 0)
            self.note(f"pid {os.getpid()}")
            self.note(f"started {iso_timestamp(datetime.now(timezone.utc))}")
        except BaseException:
            os.close(self.descriptor)
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self.descriptor)

    def note(self, line: str) -> None:
        """Add a line for whoever finds the lock held."""
        with naming(self._path):
            os.write(self.descriptor, f"{line}\n".encode())

    def _held(self) -> Failure:
        text = os.pread(self.descriptor, 1000, 0).decode("utf-8", "replace")
        notes = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
        pid, started = printable(notes.get("pid", "?")), printable(notes.get("started", "?"))
        dump_pid = printable(notes.get("pg_dump", ""))
        if dump_pid and not is_running(pid) and is_running(dump_pid):
            return Failure(
                ExitCode.GENERAL,
                f"pg_dump (process {dump_pid}) of a backup of this database that was killed "
                f"(process {pid}, started {started}) is still running",
                f"Wait until it has ended, or stop it: kill {dump_pid}",
            )
        return Failure(
            ExitCode.GENERAL,
            f"another backup of this database is running: process {pid}, started {started}",
            f"Wait until it has ended; look at it: ps -fp {pid}",
        )


def is_running(pid: str) -> bool:
    """Whether a process with this number is there."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def sweep(directory: Path, prefix: str) -> None:
    """Remove what a killed run of this database left; only with the lock held.

    That is its partial files, and metadata that it published when its dump still was partial.
    """
    partial = re.compile(
        rf"\.(?P<stem>{re.escape(prefix)}_{TIMESTAMP_PATTERN})"
        rf"(?P<suffix>{re.escape(DUMP_SUFFIX)}|{re.escape(METADATA_SUFFIX)}){re.escape(PARTIAL_SUFFIX)}"
    )
    for name in os.listdir(directory):
        if match := partial.fullmatch(name):
            dump = directory / (match.group("stem") + DUMP_SUFFIX)
            if match.group("suffix") == DUMP_SUFFIX and not os.path.lexists(dump):
                metadata_path(dump).unlink(missing_ok=True)
            (directory / name).unlink(missing_ok=True)


class PartialBackup:
    """The two hidden files of a run, until both are whole and bear their names.

    Nothing that is not whole is ever visible: `publish` renames both, and whatever ends the run
    before that removes both.
    """

    def __init__(self, directory: Path, prefix: str) -> None:
        self.directory = directory
        self._prefix = prefix
        self.name = ""

    @property
    def dump(self) -> Path:
        """Where pg_dump writes."""
        return self._hidden(DUMP_SUFFIX)

    @property
    def metadata(self) -> Path:
        """Where the metadata is written."""
        return self._hidden(METADATA_SUFFIX)

    @property
    def published_dump(self) -> Path:
        """What the dump is called when it is published."""
        return self.directory / (self.name + DUMP_SUFFIX)

    def _hidden(self, suffix: str) -> Path:
        return self.directory / f".{self.name}{suffix}{PARTIAL_SUFFIX}"

    def __enter__(self) -> PartialBackup:
        self.name = f"{self._prefix}_{file_timestamp(datetime.now(timezone.utc))}"
        try:
            for path in (self.dump, self.metadata):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for path in (self.dump, self.metadata):
            # A directory that is gone or read-only by now must not hide why the run failed; what
            # stays is hidden, and the next run sweeps it.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @property
    def size_bytes(self) -> int:
        """How much of the dump is written."""
        try:
            return self.dump.stat().st_size
        except OSError:
            return 0

    def claim_name(self) -> datetime:
        """Name the backup by this second, or by the next whose name is free."""
        while True:
            moment = datetime.now(timezone.utc).replace(microsecond=0)
            name = f"{self._prefix}_{file_timestamp(moment)}"
            dump = self.directory / (name + DUMP_SUFFIX)
            if not os.path.lexists(dump) and not os.path.lexists(metadata_path(dump)):
                break
            time.sleep(TICK_SECONDS)
            check_signals()
        old = (self.dump, self.metadata)
        self.name = name
        for path, new_path in zip(old, (self.dump, self.metadata), strict=True):
            path.rename(new_path)
        return moment

    def write_metadata(self, metadata: Metadata) -> None:
        """Write the metadata beside the dump, down to the disk."""
        with naming(self.metadata), self.metadata.open("w", encoding="utf-8") as file:
            file.write(metadata.to_json())
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> Path:
        """Give both files their names, the metadata first: a dump that can be seen is described.

        Raises OSError, and then nothing is published.
        """
        dump = self.published_dump
        metadata = metadata_path(dump)
        for path in (metadata, dump):
            if os.path.lexists(path):  # not of our making, since we hold the lock
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        check_signals()
        self.metadata.rename(metadata)
        try:
            sync_directory(self.directory)
            self.dump.rename(dump)
        except OSError:
            metadata.unlink(missing_ok=True)
            raise
        sync_directory(self.directory)
        return dump


def sync_file(path: Path) -> None:
    """Bring a file that another program wrote down to the disk, and out of the page cache, so
    that whoever reads it next reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory down to the disk, where its file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with naming(directory):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# Files: the space on the disk, and the backups that are there
# ---------------------------------------------------------------------------------------------


def is_disk_full(directory: Path) -> bool:
    """Whether the file system has neither room nor, where it counts them, inodes."""
    try:
        disk = os.statvfs(directory)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < FULL_DISK_BYTES or (
        disk.f_files > 0 and disk.f_favail == 0
    )


def check_disk_space(
    directory: Path, config: DatabaseConfig, facts: DatabaseFacts, tables_bytes: int
) -> int:
    """How large the dump will be, more or less. Refuse only what can hardly fit: a nightly backup
    must not be refused where it would have fitted, and a disk that fills on the way is handled
    there."""
    last = max(
        (
            backup
            for backup in find_backups(directory)
            if backup.is_verified and backup.belongs_to(facts.name, config.environment.value)
        ),
        key=lambda backup: backup.timestamp,
        default=None,
    )
    need = NEED_OF_TABLES * tables_bytes
    expected = EXPECTED_OF_TABLES * tables_bytes
    basis = f"{format_size(tables_bytes)} of tables"
    if last is not None and last.metadata is not None and last.metadata.database_size_bytes:
        growth = facts.size_bytes / last.metadata.database_size_bytes
        expected = growth * last.metadata.backup_size_bytes
        need = NEED_OF_LAST_BACKUP * expected
        basis = f"the last backup had {format_size(last.metadata.backup_size_bytes)}"
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        detail = (
            f"{display_path(directory)}: {format_size(free)} free, at least "
            f"{format_size(int(need))} needed ({basis})"
        )
        raise other_file_failure(errno.ENOSPC, directory, detail)
    return int(expected)


VERIFIED = "✓ Verified"


class Backup(NamedTuple):
    """A `.dump` in a directory, with what can be known of it without reading it."""

    dump: Path
    size_bytes: int | None
    metadata: Metadata | None
    status: str

    @property
    def is_verified(self) -> bool:
        """Verified when it was made, and of the same size since."""
        return self.status == VERIFIED

    def belongs_to(self, database: str, environment: str) -> bool:
        """Whether it is of this database and environment, by its metadata, and named so."""
        return (
            self.metadata is not None
            and self.metadata.database_name == database
            and self.metadata.environment == environment
        )

    @property
    def timestamp(self) -> str:
        """Its time in ISO 8601, from the metadata or else from the file name, or `-`."""
        if self.metadata is not None:
            return self.metadata.backup_timestamp
        match = match_name(self.dump)
        if match is None:
            return "-"
        date, clock = match.group("timestamp").split("T")
        return f"{date}T{clock.replace('-', ':')}"

    @property
    def environment(self) -> str:
        """`dev` or `prod`, from the metadata or else from the file name, or `-`."""
        if self.metadata is not None:
            return self.metadata.environment
        match = match_name(self.dump)
        ending = re.search(r"_(dev|prod)$", match.group("prefix")) if match else None
        return ending.group(1) if ending else "-"

    @property
    def database(self) -> str:
        """The database, from the metadata, or else what the file name begins with, or `-`."""
        if self.metadata is not None:
            return self.metadata.database_name
        match = match_name(self.dump)
        return match.group("prefix") if match else "-"


def find_backups(directory: Path) -> list[Backup]:
    """Every backup in the directory, broken ones too, in no order. Raises OSError for the
    directory; whatever is wrong with a file is in its status."""
    names = set(os.listdir(directory))
    return [
        read_backup(directory / name)
        for name in names
        if name.endswith(DUMP_SUFFIX) and not name.startswith(".")
    ]


def read_backup(dump: Path) -> Backup:
    """One backup, from its metadata and the size of its dump."""
    size_bytes: int | None = None
    try:
        status = dump.stat()
        if stat.S_ISREG(status.st_mode):
            size_bytes = status.st_size
    except OSError:
        pass  # unreadable, or a link to nowhere
    try:
        metadata = Metadata.read(metadata_path(dump))
    except FileNotFoundError:
        return Backup(dump, size_bytes, None, "✗ No metadata")
    except (OSError, MetadataError):
        return Backup(dump, size_bytes, None, "✗ Bad metadata")
    if size_bytes != metadata.backup_size_bytes:
        return Backup(dump, size_bytes, metadata, "✗ Size mismatch")
    verdict = VERIFIED if metadata.verification else "✗ Not verified"
    return Backup(dump, size_bytes, metadata, verdict)


# ---------------------------------------------------------------------------------------------
# Operations: create, verify, list, remove
# ---------------------------------------------------------------------------------------------


class CreationReport(NamedTuple):
    """A backup that was published."""

    dump: Path
    metadata: Metadata
    keep: int | None
    warnings: str


def create_backup(choice: str, output_dir: Path, progress: Progress) -> CreationReport:
    """Make, verify and publish a backup: the whole run, in order.

    Raises Failure or OSError; then what was there before is untouched, and nothing else is.
    """
    started = time.monotonic()
    config = load_configuration(choice)
    tools = find_tools(config)
    make_directory(output_dir)
    prefix = file_prefix(config.name, config.environment.value)
    with DatabaseLock(output_dir / f".{prefix}.lock") as lock:
        sweep(output_dir, prefix)
        with PartialBackup(output_dir, prefix) as partial:
            run = Run(config, tools, lock, partial, progress)
            dumped = dump_database(run)
            Background(lambda: sync_file(partial.dump)).wait()
            draft = draft_metadata(run, dumped)

            def on_progress(done: float, rows: int) -> None:
                done = DUMP_SHARE + (1 - DUMP_SHARE) * done
                progress.show("Verifying", done, f"{rows} rows read back")

            examination = examine_dump(tools.pg_restore, partial.dump, draft, on_progress)
            if examination.problem:
                raise unsound_dump_failure(output_dir, examination)
            now = datetime.now(timezone.utc)
            metadata = draft._replace(
                checksum_sha256=examination.digest,
                duration_seconds=round(time.monotonic() - started, 3),
                verification={
                    "verified_at": iso_timestamp(now),
                    "rows_read_back": draft.total_rows,
                    "tables_read_back": len(draft.table_counts),
                    "large_objects_read_back": draft.large_object_count,
                    "pg_restore_version": tools.pg_restore.version,
                },
            )
            partial.write_metadata(metadata)
            published = partial.publish()
            check_signals()
    return CreationReport(published, metadata, config.keep, dumped.warnings)


def load_configuration(choice: str) -> DatabaseConfig:
    """The settings for `choice`, which from here on are this process's libpq settings too."""
    from brain_core.config import ConfigurationError, load_config, read_settings

    try:
        config = load_config(choice, read_settings(os.environ, SCRIPT_DIR))
    except ConfigurationError as error:
        raise Failure(
            ExitCode.CONFIGURATION, printable(str(error)), *map(printable, error.steps)
        ) from None
    except OSError as error:
        raise file_failure(error, ExitCode.CONFIGURATION) from None
    except ImportError as error:
        raise missing_package(error) from None
    for name in [name for name in os.environ if name.startswith("PG") and name != "PGCLUSTER"]:
        del os.environ[name]
    os.environ.update({name: encode_os_text(value) for name, value in config.libpq.items()})
    return config


def draft_metadata(run: Run, dumped: Dumped) -> Metadata:
    """What the metadata says of a dump before it is read back: no checksum, no verification."""
    facts = dumped.facts
    return Metadata(
        backup_timestamp=iso_timestamp(dumped.moment),
        environment=run.config.environment.value,
        database_name=facts.name,
        backup_file=decode_os_text(run.partial.published_dump.name),
        backup_size_bytes=run.partial.size_bytes,
        checksum_sha256="",
        table_counts={table.key: dumped.counts[table.oid] for table in dumped.tables},
        table_oids={table.key: table.oid for table in dumped.tables},
        pg_dump_version=run.tools.pg_dump.version,
        postgresql_version=facts.server_version,
        database_size_bytes=facts.size_bytes,
        compression=run.tools.compression,
        large_object_count=facts.large_objects,
        not_included=facts.not_included,
        encoding=facts.encoding,
        locale=facts.locale,
        extensions=facts.extensions,
        roles=facts.roles,
    )


def unsound_dump_failure(directory: Path, examination: Examination) -> Failure:
    """The failure for a new dump that is not what the database held."""
    detail = f"the new dump does not hold what the database held\n{examination.problem}"
    if is_disk_full(directory):
        return other_file_failure(errno.ENOSPC, directory, f"the disk is full: {detail}")
    return Failure(
        ExitCode.VERIFICATION,
        detail,
        "Run the backup again",
        "If it fails again, check the disk and the memory of this machine: dmesg | tail -50",
        f"Keep the last good backup: {list_command(directory)}",
    )


class VerificationReport(NamedTuple):
    """A backup that was examined."""

    dump: Path
    size_bytes: int
    metadata: Metadata
    examination: Examination


def verify_backup(dump: Path, progress: Progress) -> VerificationReport:
    """Check a backup's checksum, structure and contents, with nothing but its two files.

    Raises Failure for what keeps the checks from being made (files, tools), OSError.
    """
    size_bytes, metadata = load_backup(dump)
    pg_restore = find_tool("pg_restore", tool_environment())

    def on_progress(done: float, rows: int) -> None:
        progress.show("Verifying", done, f"{rows} rows read back")

    examination = examine_dump(pg_restore, dump, metadata, on_progress)
    if examination.structure.problem and not examination.checksum.problem:
        check_restore_fits(pg_restore, metadata)
    return VerificationReport(dump, size_bytes, metadata, examination)


def load_backup(dump: Path) -> tuple[int, Metadata]:
    """The size of the dump to verify, and its metadata. Raises Failure where one is missing."""
    again = [f"See which backups there are: {list_command(dump.parent)}"]
    if dump.name.endswith(METADATA_SUFFIX):
        other = dump.with_name(dump.name.removesuffix(METADATA_SUFFIX) + DUMP_SUFFIX)
        again.insert(0, f"Name the dump: python3 backup_db.py --verify {shell_words(str(other))}")
    try:
        status = dump.stat()
    except FileNotFoundError:
        detail = f"there is no file {display_path(dump)}"
        raise Failure(ExitCode.VERIFICATION, detail, *again) from None
    if not stat.S_ISREG(status.st_mode) or not dump.name.endswith(DUMP_SUFFIX):
        detail = f"{display_path(dump)} is not a {DUMP_SUFFIX} file"
        raise Failure(ExitCode.VERIFICATION, detail, *again)
    os.close(os.open(dump, os.O_RDONLY))
    path = metadata_path(dump)
    try:
        return status.st_size, Metadata.read(path)
    except FileNotFoundError:
        problem = f"there is no metadata file {display_path(path)}"
    except MetadataError as error:
        problem = f"{display_path(path)} cannot be used: {printable(str(error))}"
    raise Failure(
        ExitCode.VERIFICATION,
        problem,
        "Bring the metadata file back from the place that this backup was copied to or from",
        "What the dump alone can tell: pg_restore --file=/dev/null " + shell_words(str(dump)),
    )


def check_restore_fits(pg_restore: Tool, metadata: Metadata) -> None:
    """Raise Failure where it is pg_restore that is unfit for an archive that is intact."""
    digits = re.match(r"\d+", metadata.pg_dump_version)
    if digits and pg_restore.major < int(digits.group()):
        raise older_tool(
            pg_restore,
            int(digits.group()),
            f"too old for this backup, which pg_dump {printable(metadata.pg_dump_version)} made",
        )
    if metadata.compression and not reads_compression(pg_restore, metadata.compression):
        raise unreadable_compression(pg_restore, metadata.compression)


def first_line(text: str) -> str:
    """The first line of a tool's words."""
    return text.partition("\n")[0]


def list_backups(output_dir: Path) -> list[Backup]:
    """The backups in the directory, the newest first. Raises Failure, OSError."""
    try:
        backups = find_backups(output_dir)
    except FileNotFoundError:
        raise Failure(
            ExitCode.GENERAL,
            f"there is no directory {display_path(output_dir)}",
            "Name the one that has the backups: --output-dir DIR",
            "Or make the first backup: python3 backup_db.py",
        ) from None
    return sorted(backups, key=lambda backup: (backup.timestamp, backup.dump.name), reverse=True)


def remove_old_backups(report: CreationReport, warn: Callable[[str], None]) -> list[Path]:
    """Remove all but the newest `keep` verified backups of the same database and environment.

    The dump goes first: metadata alone is no backup to anyone. The one just made always stays,
    even where the clock was set back. What cannot be removed is a warning.
    """
    if report.keep is None:
        return []
    made = report.metadata
    prefix = match_name(report.dump)
    assert prefix is not None
    others = [
        backup
        for backup in find_backups(report.dump.parent)
        if backup.is_verified
        and backup.belongs_to(made.database_name, made.environment)
        and backup.dump != report.dump
        and (name := match_name(backup.dump))
        and name.group("prefix") == prefix.group("prefix")
    ]
    others.sort(key=lambda backup: backup.timestamp, reverse=True)
    removed = []
    for backup in others[report.keep - 1 :]:
        try:
            backup.dump.unlink()
            removed.append(backup.dump)
            metadata_path(backup.dump).unlink()
        except OSError as error:
            path = display_path(Path(os.fsdecode(error.filename)))
            warn(f"{path} was not removed: {error.strerror}")
    return removed


# ---------------------------------------------------------------------------------------------
# Reports: what a person reads
# ---------------------------------------------------------------------------------------------


def write_lines(stream: IO[str] | None, lines: Iterable[str]) -> None:
    """Print, whatever has become of the stream: what was done stays done."""
    if stream is None:
        return
    try:
        stream.write("".join(f"{line}\n" for line in lines))
        stream.flush()
    except (OSError, ValueError):
        # Closed, full or broken. Python would try again at its end, and exit with 120.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def describe_tables(table_counts: Mapping[str, int]) -> str:
    """`4 (150 conversations, 3420 messages, …)`: in the order of creation, at most six."""
    if not table_counts:
        return "0"
    shown = set(sorted(table_counts, key=lambda key: table_counts[key], reverse=True)[:6])
    parts = [f"{rows} {printable(key)}" for key, rows in table_counts.items() if key in shown]
    if len(table_counts) > len(parts):
        parts.append(f"and {len(table_counts) - len(parts)} more")
    return f"{len(table_counts)} ({', '.join(parts)})"


def creation_lines(report: CreationReport) -> list[str]:
    """The contract's success output."""
    made = report.metadata
    read = row_summary(made.total_rows, len(made.table_counts), made.large_object_count or 0)
    return [
        "✓ Backup created successfully",
        "",
        f"Backup File: {display_path(report.dump)}",
        f"Metadata:    {display_path(metadata_path(report.dump))}",
        f"Size:        {format_size(made.backup_size_bytes)}",
        f"Environment: {made.environment}",
        f"Database:    {printable(made.database_name)}",
        f"Tables:      {describe_tables(made.table_counts)}",
        f"Checksum:    {made.checksum_sha256[:12]}...",
        f"Verified:    ✓ Integrity check passed ({read} read back)",
    ]


def verification_lines(report: VerificationReport) -> list[str]:
    """The contract's verification output, below its first line; no line for a check not made."""
    found = report.examination
    return [
        f"File:        {display_path(report.dump)}",
        f"Checksum:    {found.checksum.verdict}",
        f"Structure:   {found.structure.verdict}",
        *([f"Contents:    {found.contents.verdict}"] if found.contents else []),
        f"Size:        {format_size(report.size_bytes)}",
        f"Timestamp:   {report.metadata.backup_timestamp}",
    ]


def display_width(text: str) -> int:
    """The columns that the text takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0
        if unicodedata.combining(character)
        else 2
        if unicodedata.east_asian_width(character) in "WF"
        else 1
        for character in text
    )


def pad(text: str, columns: int) -> str:
    """The text, and spaces until it takes so many columns."""
    return text + " " * (columns - display_width(text))


LIST_COLUMNS = (
    ("Timestamp", 25),
    ("Environment", 13),
    ("Database", 20),
    ("Size", 10),
    ("Status", 0),
)


def list_lines(backups: Sequence[Backup], output_dir: Path, now: datetime) -> list[str]:
    """The contract's table; below it the totals, and how old the newest backups are."""
    folder = display_path(output_dir).rstrip("/") + "/"
    if not backups:
        return [f"No backup files in {folder}"]
    rows = [
        (
            backup.timestamp,
            printable(backup.environment),
            printable(backup.database),
            "-" if backup.size_bytes is None else format_size(backup.size_bytes),
            backup.status,
        )
        for backup in backups
    ]
    widths = [
        max(least, *(display_width(cell) + 2 for cell in set(column)))
        for column, (_title, least) in zip(zip(*rows, strict=True), LIST_COLUMNS, strict=True)
    ]

    def line(cells: Sequence[str]) -> str:
        *padded, last = cells
        return "".join(map(pad, padded, widths)) + last

    total = sum(backup.size_bytes or 0 for backup in backups)
    return [
        f"Backup Files ({folder}):",
        "",
        line([title for title, _width in LIST_COLUMNS]),
        *map(line, rows),
        "",
        f"{plural(len(backups), 'backup')}, {format_size(total)} in all",
        *newest_lines(backups, now),
    ]


def newest_lines(backups: Sequence[Backup], now: datetime) -> Iterator[str]:
    """For each environment the age of its newest verified backup."""
    for environment in dict.fromkeys(backup.environment for backup in backups):
        newest = next(
            (
                backup.metadata
                for backup in backups
                if backup.environment == environment and backup.is_verified
            ),
            None,
        )
        if newest is not None:
            age = format_age((now - newest.moment).total_seconds())
            yield f"Newest verified {printable(environment)} backup: {age} old"
        elif environment != "-":
            yield f"Newest verified {printable(environment)} backup: none"


def failure_lines(what: str, failure: Failure) -> list[str]:
    """`✗ Backup failed: …`, the tool's own words, and what to do."""
    lines = [f"✗ {what}: {failure.code.category}", ""]
    if what == VERIFICATION_FAILED and failure.code == ExitCode.VERIFICATION:
        lines[0] = f"✗ {what}"
    if failure.report:
        lines += [*failure.report, ""]
    lines.append(f"Error: {failure.detail}")
    if failure.steps:
        lines += ["", "Troubleshooting:"]
        lines += [f"  {number}. {step}" for number, step in enumerate(failure.steps, 1)]
    return lines


VERIFICATION_FAILED = "Backup verification failed"


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The contract's options, and nothing else."""
    parser = argparse.ArgumentParser(
        prog="backup_db.py",
        description=__doc__,
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
        metavar="DIR",
        help="where the backups lie (default: db/backups/ beside this script)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--verify",
        metavar="FILE",
        help="verify this .dump: its checksum, its structure and every row in it",
    )
    mode.add_argument("--list", action="store_true", help="list the backups, newest first")
    return parser


def run_creation(choice: str, output_dir: Path, progress: Progress) -> int:
    """Default mode: make a backup and report it."""
    try:
        report = create_backup(choice, output_dir, progress)
    finally:
        progress.clear()
    if report.warnings:
        write_lines(sys.stderr, [f"Warning: {report.warnings}"])
    write_lines(sys.stdout, creation_lines(report))
    removed = remove_old_backups(report, lambda text: write_lines(sys.stderr, [f"Warning: {text}"]))
    lines = [f"Removed:     {', '.join(map(display_path, removed))}"] if removed else []
    if report.metadata.not_included:
        lines.append(f"Not included: {printable('; '.join(report.metadata.not_included))}")
    write_lines(sys.stdout, lines)
    return 0


def run_verification(dump: Path, progress: Progress) -> int:
    """`--verify`: check a backup and report it."""
    try:
        report = verify_backup(dump, progress)
    finally:
        progress.clear()
    lines = verification_lines(report)
    if not report.examination.problem:
        write_lines(sys.stdout, ["✓ Backup verification passed", "", *lines])
        return 0
    steps = [
        "Do not rely on this dump alone: restore it into an empty database and compare",
        f"Choose another backup: {list_command(dump.parent)}",
    ]
    if report.examination.checksum.problem:
        steps[:1] = [
            "Do not rely on this dump: its bytes have changed since it was made",
            "Compare it with a copy elsewhere, and check the disk it lies on: dmesg | tail -50",
        ]
    raise Failure(
        ExitCode.VERIFICATION, report.examination.problem, *steps, report=verification_lines(report)
    )


def run_listing(output_dir: Path) -> int:
    """`--list`: show the backups."""
    backups = list_backups(output_dir)
    write_lines(sys.stdout, list_lines(backups, output_dir, datetime.now(timezone.utc)))
    return 0


def prepare_process() -> None:
    """What must hold before anything else: files are private, standard streams exist and never
    fail on a character, signals unwind."""
    os.umask(0o077)
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # started with a standard stream closed: no file of ours may get its number
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    catch_signals()


def user_path(text: str) -> Path:
    """A path from the command line. The shell leaves the ~ of `--output-dir=~/backups` to us."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise Failure(
            ExitCode.CONFIGURATION,
            f"{printable(text)}: no such user, or one without a home directory",
            f"Write the path in full, or, if its name begins with ~: {shell_words('./' + text)}",
        )
    return Path(path)


def run(options: argparse.Namespace, progress: Progress) -> int:
    """Run the mode that was asked for. Raises Failure or OSError."""
    output_dir = DEFAULT_OUTPUT_DIR
    if options.output_dir is not None:
        output_dir = user_path(options.output_dir)
    if options.list:
        return run_listing(output_dir)
    if options.verify is not None:
        return run_verification(user_path(options.verify), progress)
    return run_creation(options.env, output_dir, progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: whatever was raised becomes a message and an exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    for option, value in (("--output-dir", options.output_dir), ("--verify", options.verify)):
        if value == "":
            parser.error(f"argument {option}: expected a path, not an empty text")
    what, otherwise = "Backup failed", ExitCode.CREATION
    if options.list:
        what, otherwise = "Listing failed", ExitCode.GENERAL
    elif options.verify is not None:
        what, otherwise = VERIFICATION_FAILED, ExitCode.VERIFICATION
    progress = Progress(sys.stderr)
    try:
        try:
            prepare_process()
            return run(options, progress)
        except Failure as error:
            failure = error
        except OSError as error:
            failure = file_failure(error, otherwise)
        write_lines(sys.stderr, failure_lines(what, failure))
        return failure.code
    except Interrupted as interrupted:
        progress.clear()
        write_lines(
            sys.stderr, [f"✗ Stopped by {interrupted}: what was published before is untouched"]
        )
        die_by_signal(interrupted.number)
    except Exception:  # noqa: BLE001 - a bug, shown as one: there is nobody else to tell
        import traceback

        write_lines(
            sys.stderr,
            [f"✗ {what}: a bug in backup_db.py; please report it with the lines below", ""],
        )
        write_lines(sys.stderr, traceback.format_exc().splitlines())
    finally:
        # Interrupted must not be raised during interpreter shutdown.
        set_signals(signal.SIG_DFL)
    return ExitCode.GENERAL


if __name__ == "__main__":
    sys.exit(main())
