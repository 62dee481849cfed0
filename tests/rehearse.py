#!/usr/bin/env python3
"""Restore a backup for real, and compare: python3 tests/rehearse.py FILE.dump

Verifies the backup, starts a PostgreSQL server of its own, types the commands that its metadata's
facts make, and compares what came back, value for value: the rows of every table, whatever their
order, the sequences and the large objects. Exit code 0: restored and equal. It reads the two files
of the backup, touches no other server, and leaves nothing behind. (A backup of a release before
2026.12 does not say how its values are written: of its tables the rows are counted.)

The server is one that is installed here, or else one that tests/.venv brings. It listens on no
address, only on a socket in a directory that is closed to others: the data is production's, and
what the database's owners wrote into it (check constraints, generated columns) runs in there. When
root rehearses, that is under a user id that nobody else has, which can read neither the backups nor
.env.local; otherwise as you.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import glob
import io
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment
from cluster import PACKAGED, Cluster, ClusterError, installation
from sample import SERVER_VERSION
from values import Contents, Line, Name, compare, figure

import backup_db
from backup_db import Metadata, display_path, format_size, plural, printable, shell_words

# What is lost with the server may be lost earlier too; the rest saves time in large databases.
SETTINGS = {
    "listen_addresses": "",
    "autovacuum": "off",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "4GB",
}

# Packages of extensions that are not called after them.
DEBIAN_PACKAGES = {"vector": "pgvector", "postgis": "postgis-3"}

MOST_TABLES_SHOWN = 20

NO_SPACE = "No space left on device"
WHAT_THEN = 'README.md says under "Restore" what to do then'

# Of the settings that shape the text of a dump, those that the metadata may name.
SHAPING = ("bytea_output", "lc_monetary")

# Of each partition its topmost table. Whatever the database's settings are; and the names as bytes
# of its own encoding, which is that of the archive.
PARTITIONS = r"""
SET statement_timeout = 0; SET search_path = '';
SET SESSION AUTHORIZATION DEFAULT; SET ROLE NONE;
SELECT set_config('client_encoding', current_setting('server_encoding'), false) \g /dev/null
SELECT n.nspname, c.relname, top_n.nspname, top.relname
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_class top ON top.oid = pg_partition_root(c.oid)
  JOIN pg_namespace top_n ON top_n.oid = top.relnamespace
 WHERE c.relispartition AND c.relkind = 'r'
"""


class RehearsalFailure(Exception):
    """The backup was not restored, or is not equal; the text is the last line."""


class Interrupted(BaseException):
    """A signal that ends the rehearsal; its number is the argument."""


def interrupt(number: int, _frame: FrameType | None) -> None:
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # one is enough; cleaning up takes a moment
    raise Interrupted(number)


# -- servers that fit -----------------------------------------------------------------------------


def folders() -> Iterator[Path]:
    """Where PostgreSQL's programs may be: what is installed here, then what tests/.venv brings."""
    for pattern in (*os.environ.get("PATH", os.defpath).split(os.pathsep), *backup_db.TOOL_FOLDERS):
        yield from map(Path, glob.glob(pattern))
    for major in PACKAGED:
        with contextlib.suppress(ClusterError):
            yield installation(major)


def find_servers() -> list[tuple[int, Path]]:
    """Every server with its major version, each once; the oldest of those installed first."""
    found: dict[Path, int] = {}
    needed = ("postgres", "initdb", "pg_ctl", "psql", "pg_dump", "pg_restore", "vacuumdb")
    for folder in folders():
        real = (folder / "postgres").resolve().parent  # a PATH may lead there by a link
        programs = [real / name for name in needed]
        if real not in found and all(os.access(program, os.X_OK) for program in programs):
            command = [str(real / "postgres"), "--version"]
            said = subprocess.run(command, capture_output=True, text=True)
            if version := re.search(r"\) (\d+)", said.stdout):
                found[real] = int(version[1])
    is_packaged = {path: environment.VENV in path.parents for path in found}
    return sorted(((m, path) for path, m in found.items()), key=lambda s: (is_packaged[s[1]], s))


def missing_extensions(bin_dir: Path, extensions: set[str]) -> set[str]:
    """Those that this server does not bring; none where it cannot tell, then the restore does."""
    command = [str(bin_dir / "pg_config"), "--sharedir"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return set()
    folder = Path(asked.stdout.strip()) / "extension"
    return {name for name in extensions if not (folder / f"{name}.control").exists()}


def complaint(folder: Path, dump: Path) -> str:
    """What keeps the pg_restore there from reading the archive: a compression that it has not."""
    command = [str(folder / "pg_restore"), "--list", str(dump)]
    listing = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return listing.stderr.strip().partition("\n")[0]


class Server(NamedTuple):
    """One that fits, and the folder of a pg_restore that reads the archive: its own, or that on
    PATH."""

    major: int
    bin_dir: Path
    tools: Path


def choose_server(metadata: Metadata, dump: Path) -> Server:
    """The first server that fits. Raises RehearsalFailure: why none does."""
    on_path = Path(shutil.which("pg_restore") or "").parent
    needed = backup_db.least_major(metadata)
    extensions = set(metadata.extensions or {}) - {"plpgsql"}
    lacking: set[str] = set()
    complaints = []
    for major, bin_dir in find_servers():
        if major < needed:
            continue
        if missing := missing_extensions(bin_dir, extensions):
            lacking = lacking & missing or missing
        else:
            for folder in (bin_dir, on_path):
                if not (words := complaint(folder, dump)):
                    return Server(major, bin_dir, folder)
                complaints.append(words)
    if complaints:
        raise RehearsalFailure(
            f"No pg_restore here reads {display_path(dump)}: {printable(complaints[0])}"
        )
    if lacking:
        names = sorted(lacking)
        packages = [f"postgresql-{needed}-{DEBIAN_PACKAGES.get(name, name)}" for name in names]
        raise RehearsalFailure(
            f"No PostgreSQL {needed} or newer here has {printable(', '.join(names))}:"
            f" {shell_words('apt-get', 'install', *packages)}, or your system's packages of them"
        )
    raise RehearsalFailure(
        f"It takes PostgreSQL {needed} or newer: apt-get install postgresql-{needed}"
    )


def needed_environment(metadata: Metadata) -> str:
    """Which tests/.venv has a server that may fit: the sample's has one version."""
    if sys.platform != "linux":
        return "sample"  # it has several there
    fits = backup_db.least_major(metadata) <= SERVER_VERSION and "vector" not in (
        metadata.extensions or {}
    )
    return "sample" if fits else "tests"


# -- the steps ------------------------------------------------------------------------------------


class Steps:
    """Tells what is done, and keeps how long each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._started
        self._started = now


def show_status(text: str) -> None:
    """One line on a terminal, redrawn; elsewhere nothing."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def type_command(
    command: str, shown: str, directory: Path, environ: Mapping[str, str], cluster: Cluster
) -> str:
    """Run a line as a shell does, and show it and what it says. Returns why it failed, else ""."""
    print(f"$ {shown}", flush=True)
    started = time.monotonic()
    words = Words()
    with subprocess.Popen(
        ["sh", "-c", command],
        cwd=directory,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that all of it can be ended at once
    ) as process:
        assert process.stdout
        try:
            while True:
                if not select.select([process.stdout], [], [], 1)[0]:
                    show_status(progress(cluster, time.monotonic() - started))
                elif block := os.read(process.stdout.fileno(), 65536):
                    show_status("")
                    words.feed(block)
                else:
                    break
            status = process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
        finally:
            show_status("")
    words.feed(b"\n" if words.unfinished else b"")
    return cause([*words.kept, *cluster.end_of_log().splitlines()]) if status else ""


class Words:
    """What a command says: shown as it comes, and kept as far as it tells why it failed. How much
    that is depends on what the database's owners wrote."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.unfinished = b""

    def feed(self, block: bytes) -> None:
        *lines, self.unfinished = (self.unfinished + block).split(b"\n")
        for line in lines:
            text = printable(line.decode("utf-8", "backslashreplace").replace("\t", "    "))
            print(text, flush=True)
            if len(self.kept) < 100 or NO_SPACE in text:
                self.kept.append(text)


def progress(cluster: Cluster, seconds: float) -> str:
    size = "SELECT sum(pg_database_size(oid)) FROM pg_database WHERE NOT datistemplate"
    with contextlib.suppress(ClusterError):
        return f"{format_size(int(cluster.psql(size)))} after {seconds:.0f} s"
    return ""


def cause(lines: Sequence[str]) -> str:
    """The first error among a tool's words. Where the disk is full, that: the log has it too, for a
    server without room for its files stops at once, and its clients may not hear why."""
    errors = [line for line in lines if "rror:" in line or "ERROR:" in line]
    full = [line for line in lines if NO_SPACE in line]
    if full:
        return f"{full[0]}: give it more with TMPDIR"
    return next(iter([*errors, *lines]), "without a word")


def verify(dump: Path, environ: Mapping[str, str]) -> None:
    command = [sys.executable, str(environment.PROJECT / "backup_db.py"), "--verify", str(dump)]
    print(f"$ python3 {shell_words(display_path(Path(command[1])), *command[2:])}", flush=True)
    with subprocess.Popen(command, env=environ) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status:
        raise RehearsalFailure("Not rehearsed: the backup did not pass its verification.")
    print(flush=True)


def check_locales(cluster: Cluster, metadata: Metadata) -> None:
    """Raises RehearsalFailure where this machine lacks one that the restore takes."""
    locales = {(metadata.settings or {}).get("lc_monetary")}
    locales |= {(metadata.locale or {}).get(key) for key in ("collate", "ctype")}
    for name in sorted(filter(None, locales)):
        try:
            cluster.psql(f"SET lc_monetary = {quote(name)}")
        except ClusterError:
            raise RehearsalFailure(
                f"This machine has no locale {printable(name)}: apt-get install locales-all,"
                " or your system's package of it"
            ) from None


def quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def without_values(metadata: Metadata) -> Metadata:
    """What may be shown: the value of a role's setting may be a secret."""
    attributes = {
        role: {**facts, "settings": [f"{s.partition('=')[0]}=…" for s in facts.get("settings", [])]}
        for role, facts in (metadata.role_attributes or {}).items()
    }
    return metadata._replace(role_attributes=attributes)


def restore(cluster: Cluster, metadata: Metadata, dump: Path, environ: Mapping[str, str]) -> str:
    """Type the commands, all of them. Returns the first failure; "" where there is none."""
    for tablespace in metadata.tablespaces or []:
        quoted = '"' + tablespace.replace('"', '""') + '"'
        in_place = "SET allow_in_place_tablespaces = on"
        cluster.psql(f"{in_place}; CREATE TABLESPACE {quoted} LOCATION ''")
    name = f"./{dump.name}" if dump.name.startswith("-") else dump.name
    # Made anew: a text that stands in a file is never run.
    metadata = metadata._replace(backup_file=name)
    commands = backup_db.restore_commands(metadata)
    failures = []
    for line, shown in zip(
        commands, backup_db.restore_commands(without_values(metadata)), strict=True
    ):
        if line.startswith("#"):
            print(shown)
        elif failure := type_command(line, shown, dump.parent, environ, cluster):
            failures.append(failure)
    return failures[0] if failures else ""


# -- the comparison -------------------------------------------------------------------------------


def read_script(contents: Contents, environ: Mapping[str, str], *commands: Sequence[str]) -> None:
    """Read what the last of these programs writes; each reads what the one before it writes. What
    the archive or the server holds never is in memory at once. Raises RehearsalFailure."""
    with contextlib.ExitStack() as stack:
        words = stack.enter_context(tempfile.TemporaryFile())
        processes: list[subprocess.Popen[bytes]] = []
        for command in commands:
            source = processes[-1].stdout if processes else None
            process = subprocess.Popen(
                command,
                env=environ,
                stdin=source or subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=words,
                bufsize=backup_db.READ_BYTES,
            )
            stack.enter_context(process)
            stack.callback(process.terminate)  # nothing to one that has ended
            processes.append(process)
            if source:
                source.close()  # the other end is told when its reader ends
        script = processes[-1].stdout
        assert script
        problem = contents.read(script)
        script.close()
        failed = [process for process in processes if process.wait()]
        if problem or failed:
            words.seek(0)
            said = backup_db.printable_lines(words.read(65536).decode("utf-8", "backslashreplace"))
            print(said, flush=True)
            found = "; ".join(filter(None, [said and cause(said.splitlines()), problem]))
            raise RehearsalFailure(f"what pg_restore writes is not whole: {found}")


def shaping(metadata: Metadata) -> dict[str, str]:
    """The settings by which the text of the archive was written."""
    settings = metadata.settings or {}
    options = [
        f"-c {name}=" + re.sub(r"([\\\s])", r"\\\1", settings[name])
        for name in SHAPING
        if name in settings
    ]
    return {"PGTZ": "UTC", "PGOPTIONS": " ".join(options)}


def show_comparison(lines: list[Line]) -> None:
    """Print the largest, and all that differ."""
    shown = [line for i, line in enumerate(lines) if i < MOST_TABLES_SHOWN or line.differs]
    width = max((len(line.name) for line in shown), default=5)
    print(f"\n{'Table':<{width}}  {'In backup':>12}  {'Restored':>12}")
    for line in shown:
        text = f"{line.name:<{width}}  {figure(line.in_backup):>12}  {figure(line.restored):>12}"
        mark = "  ✗" if line.differs else ""
        if line.differs and line.in_backup == line.restored:
            mark += " other values"
        print(text + mark)
    if len(lines) > len(shown):
        print(f"and {len(lines) - len(shown)} more, equal")


def compare_with_copy(
    cluster: Cluster, server: Server, metadata: Metadata, dump: Path, environ: Mapping[str, str]
) -> tuple[str, list[str]]:
    """Print the comparison. Returns what the backup has, and what of it differs."""
    bare = ("--no-psqlrc", "--quiet", "--csv", "--tuples-only", "--set=ON_ERROR_STOP=1")
    text = cluster.run("psql", *bare, "--file=-", database=metadata.database_name, stdin=PARTITIONS)
    tops: dict[Name, Name] = {}
    for row in csv.reader(io.StringIO(text, newline="")):
        schema, table, top_schema, top = (name.encode("utf-8", "surrogateescape") for name in row)
        tops[schema, table] = top_schema, top
    columns: dict[Name, list[bytes]] = {}
    archive, copy = Contents(tops, columns), Contents(tops, columns)
    script = [str(server.tools / "pg_restore"), *Contents.OPTIONS, "--file=-"]
    read_script(archive, environ, [*script, str(dump)])
    environ = {**environ, **shaping(metadata), "PGDATABASE": metadata.database_name}
    again = [str(server.bin_dir / "pg_dump"), *Contents.OPTIONS, "--format=custom", "--compress=0"]
    read_script(copy, environ, [*again, f"--encoding={archive.encoding}"], script)
    lines = compare(archive, copy, tops, by_value=metadata.settings is not None)
    show_status("")
    show_comparison(lines)
    had = backup_db.row_summary(
        metadata.total_rows, len(metadata.table_counts), archive.large_objects.count
    )
    if archive.sequences:
        had += f", {plural(len(archive.sequences), 'sequence')}"
    return had, [line.words() for line in lines if line.differs]


def rehearse(dump: Path, metadata: Metadata, server: Server) -> str:
    """All of it. Returns the last line; raises RehearsalFailure, ClusterError."""
    steps = Steps()
    path = (str(server.tools), str(server.bin_dir), os.environ.get("PATH", os.defpath))
    environ = {"PATH": os.pathsep.join(path), "LC_ALL": "C"}
    verify(dump, {**os.environ, "PATH": environ["PATH"]})
    steps.done("verified")
    # Or a login trigger that writes would do so for each session of ours.
    silent = {"event_triggers": "off"} if server.major >= 17 else {}
    locales = {name: value for name, value in os.environ.items() if name == "LOCPATH"}
    with Cluster(server.bin_dir, settings={**SETTINGS, **silent}, environ=locales) as cluster:
        steps.done("server started")
        free = shutil.disk_usage(cluster.directory).free
        need = format_size(metadata.database_size_bytes or metadata.backup_size_bytes)
        print(
            f"Into {cluster.directory} (see TMPDIR): it takes {need}, {format_size(free)} are free."
        )
        version = cluster.psql("SHOW server_version")
        print(f"On PostgreSQL {version} of {display_path(server.bin_dir)}\n", flush=True)
        check_locales(cluster, metadata)
        environ |= {"PGHOST": str(cluster.directory), "PGPORT": str(cluster.port)}
        environ |= {"PGUSER": "postgres", "PGCLIENTENCODING": "UTF8"}
        failure = restore(cluster, metadata, dump, environ)
        steps.done("restored")
        show_status("Comparing")
        try:
            had, differences = compare_with_copy(cluster, server, metadata, dump, environ)
        except (ClusterError, RehearsalFailure) as error:
            words = cause(backup_db.printable_lines(str(error)).splitlines())
            text = f"Not restored: {failure}. {WHAT_THEN}" if failure else f"Not compared: {words}"
            raise RehearsalFailure(text) from None
        finally:
            show_status("")
        steps.done("compared")
    print("\n" + ", ".join(f"{name} in {took:.1f} s" for name, took in steps.seconds.items()))
    if failure:
        what = f"not equal: {', '.join(differences)}" if differences else "all values are equal"
        raise RehearsalFailure(f"Not all restored: {failure}; {what}. {WHAT_THEN}")
    if differences:
        raise RehearsalFailure(f"Restored, but not equal: {', '.join(differences)}")
    if metadata.settings is None:
        return f"✓ Restored, the rows counted, not compared (an earlier release made it): {had}"
    return f"✓ Restored and equal: {had}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE.dump", type=Path)
    dump = Path(os.path.abspath(parser.parse_args().file))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        metadata = backup_db.load_metadata(dump)
        try:
            server = choose_server(metadata, dump)
        except RehearsalFailure:
            if Path(sys.prefix) == environment.VENV:
                raise
            python = environment.python_for(needed_environment(metadata))
            os.execv(python, [python, __file__, str(dump)])
        print(rehearse(dump, metadata, server))
    except Interrupted as interrupted:
        return 128 + int(interrupted.args[0])
    except backup_db.Failure as failure:
        print("Troubleshooting:", *failure.steps, sep="\n  - ", file=sys.stderr)
        text = f"Not rehearsed: {failure.detail}"
    except (environment.EnvironmentFailure, RehearsalFailure) as failure:
        text = str(failure)
    except OSError as error:
        where = f"{display_path(Path(error.filename))}: " if error.filename else ""
        text = f"Not restored: {where}{error.strerror or error}"
    except ClusterError as error:
        text = f"Not restored: {cause(backup_db.printable_lines(str(error)).splitlines())}"
    else:
        return 0
    sys.stdout.flush()
    print(f"✗ {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    if sys.getfilesystemencoding() != "utf-8":  # names are UTF-8 in any locale, as in backup_db.py
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    sys.exit(main())
