#!/usr/bin/env python3
"""Restore a backup for real, and compare: python3 tests/rehearse.py FILE.dump

Verifies the backup, starts a PostgreSQL server of its own, types the commands that its metadata's
facts make, and compares the rows of every table with those that the backup was made of. Exit code
0: restored and equal. It reads the two files of the backup, touches no other server, and leaves
nothing behind.

The server is one that is installed here, or else one that tests/.venv brings. It listens on no
address, only on a socket in a directory that is closed to others: the data is production's, and
what the database's owners wrote into it (check constraints, generated columns) runs in there. When
root rehearses, that is as a user who can read neither the backups nor .env.local; otherwise as you.
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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import environment
from cluster import PACKAGED, Cluster, ClusterError, installation
from sample import SERVER_VERSION

import backup_db
from backup_db import Metadata, display_path, format_size, printable, shell_words

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

# Against settings of the database that would bend or end what is asked here; and names of no known
# encoding as they are.
UNBENT = r"""
SET statement_timeout = 0; SET lock_timeout = 0; SET search_path = ''; SET row_security = off;
SET SESSION AUTHORIZATION DEFAULT; SET ROLE NONE;
SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout' \g /dev/null
SELECT set_config('client_encoding', setting, false) FROM pg_settings
 WHERE name = 'server_encoding' AND setting = 'SQL_ASCII' \g /dev/null
"""

# For each table that pg_dump dumps a query: its name, the topmost table that it is a partition of,
# and its rows, of an extension's table those that are its user's.
COUNTS = r"""
SELECT format('SELECT %1$L, %2$L, %3$L, count(*) FROM ONLY %1$I.%2$I %4$s', n.nspname, c.relname,
              pg_partition_root(c.oid)::regclass,
              x.extcondition[array_position(x.extconfig, c.oid)])
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_extension x ON c.oid = ANY (x.extconfig)
 WHERE c.relkind = 'r' AND c.relpersistence <> 't'
   AND (x.oid IS NOT NULL OR (n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
        AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass
                        AND objid = c.oid AND objsubid = 0 AND deptype = 'e')))
 ORDER BY c.oid
\gexec
"""
LARGE_OBJECTS = "SELECT count(*) FROM pg_catalog.pg_largeobject_metadata"


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
    needed = ("postgres", "initdb", "pg_ctl", "psql", "pg_restore")
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


def choose_server(metadata: Metadata, dump: Path) -> tuple[Path, Path]:
    """The folders of the first server that fits, and of a pg_restore that reads the archive: its
    own, or that on PATH. Raises RehearsalFailure: why none does."""
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
                    return bin_dir, folder
                complaints.append(words)
    if complaints:
        raise RehearsalFailure(f"No pg_restore here reads it: {printable(complaints[0])}")
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
    command: str, directory: Path, environ: Mapping[str, str], cluster: Cluster
) -> None:
    """Run a line as a shell does, and show it and what it says. Raises RehearsalFailure."""
    print(f"$ {command}", flush=True)
    started = time.monotonic()
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
        said = b""
        try:
            while True:
                if not select.select([process.stdout], [], [], 1)[0]:
                    show_status(progress(cluster, time.monotonic() - started))
                elif block := os.read(process.stdout.fileno(), 65536):
                    said += block
                else:
                    break
            status = process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
        finally:
            show_status("")
    words = backup_db.printable_lines(said.decode("utf-8", "backslashreplace"))
    if words:
        print(words, flush=True)
    if status:
        raise RehearsalFailure(f"Not restored: {cause(words + log_of_full_disk(cluster))}")


def progress(cluster: Cluster, seconds: float) -> str:
    size = "SELECT sum(pg_database_size(oid)) FROM pg_database WHERE NOT datistemplate"
    with contextlib.suppress(ClusterError):
        return f"{format_size(int(cluster.psql(size)))} after {seconds:.0f} s"
    return ""


def log_of_full_disk(cluster: Cluster) -> str:
    """What its clients may not hear: a server without room for its log stops at once."""
    lines = cluster.log.read_text(errors="replace").splitlines()
    return "".join(f"\n{line}" for line in lines if NO_SPACE in line)


def cause(words: str) -> str:
    """The first error among a tool's words; where it is the disk's, that."""
    errors = [line for line in words.splitlines() if "rror:" in line or "ERROR:" in line]
    full = [line for line in words.splitlines() if NO_SPACE in line]
    if full:
        return f"{full[0]}: give it more with TMPDIR"
    return errors[0] if errors else words.rpartition("\n")[2] or "without a word"


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


def restore(cluster: Cluster, metadata: Metadata, dump: Path, environ: Mapping[str, str]) -> None:
    for tablespace in metadata.tablespaces or []:
        quoted = '"' + tablespace.replace('"', '""') + '"'
        in_place = "SET allow_in_place_tablespaces = on"
        cluster.psql(f"{in_place}; CREATE TABLESPACE {quoted} LOCATION ''")
    name = f"./{dump.name}" if dump.name.startswith("-") else dump.name
    # Made anew: a text that stands in a file is never run.
    for line in backup_db.restore_commands(metadata._replace(backup_file=name)):
        if line.startswith("#"):
            print(line)
        else:
            type_command(line, dump.parent, environ, cluster)


# -- the comparison -------------------------------------------------------------------------------


def split_key(key: str) -> tuple[str, str]:
    """Schema and table of a name as SQL has it; each PostgreSQL quotes other words."""
    parts = re.findall(r'"(?:[^"]|"")*"|[^".]+', key)
    names = [p[1:-1].replace('""', '"') if p.startswith('"') else p for p in parts]
    return ("public", names[0]) if len(names) == 1 else (names[0], names[1])


class Counted(NamedTuple):
    """A table of the copy."""

    root: str  # the topmost table that it is a partition of; empty where it is none
    rows: int


def count_rows(cluster: Cluster, database: str) -> dict[tuple[str, str], Counted]:
    bare = ("--no-psqlrc", "--quiet", "--csv", "--tuples-only", "--set=ON_ERROR_STOP=1")
    text = cluster.run("psql", *bare, "--file=-", database=database, stdin=UNBENT + COUNTS)
    rows = csv.reader(io.StringIO(text, newline=""))
    return {(schema, table): Counted(root, int(count)) for schema, table, root, count in rows}


def spellings(name: str) -> set[str]:
    """How a name of no known encoding may stand in the metadata."""
    raw = name.encode("utf-8", "surrogateescape")
    return {raw.decode("latin-1"), raw.decode("utf-8", "backslashreplace")}


class Line(NamedTuple):
    """What the backup says of a table, and what the copy holds; None where there is none."""

    name: str
    in_backup: int | None
    restored: int | None

    @property
    def differs(self) -> bool:
        return self.in_backup != self.restored


def compare(cluster: Cluster, metadata: Metadata) -> list[Line]:
    """A line for the large objects, and for each table, the largest first."""
    restored = count_rows(cluster, metadata.database_name)
    expected = {split_key(key): (key, rows) for key, rows in metadata.table_counts.items()}
    for schema, table in restored.keys() - expected.keys():
        others = {(s, t) for s in spellings(schema) for t in spellings(table)} & expected.keys()
        for other in others:
            restored[other] = restored.pop((schema, table))
    lines: list[Line] = []
    partitions: dict[str, list[Line]] = {}
    for name in expected.keys() | restored.keys():
        key, rows = expected.get(name, (".".join(name), None))
        root, found = restored.get(name, ("", None))
        if name in expected or found:  # an unlogged table has no rows on a standby, and no count
            partitions.setdefault(root or key, []).append(Line(key, rows, found))
    for root, parts in partitions.items():
        # By an enum's hash, another one on each server, the same rows come to other partitions.
        in_backup = sum(part.in_backup or 0 for part in parts)
        total = Line(f"{root}, all partitions", in_backup, sum(p.restored or 0 for p in parts))
        moved = len(parts) > 1 and any(part.differs for part in parts) and not total.differs
        lines += [total] if moved else parts
    lines.sort(key=lambda line: (-(line.in_backup or 0), line.name))
    large_objects = int(cluster.psql(UNBENT + LARGE_OBJECTS, metadata.database_name))
    if metadata.large_object_count or large_objects:
        lines.insert(0, Line("large objects", metadata.large_object_count, large_objects))
    return lines


def show_comparison(lines: list[Line]) -> list[str]:
    """Print the largest, and all that differ. Returns what differs, in words."""

    def figure(rows: int | None) -> str:
        return "none" if rows is None else str(rows)

    shown = [line for i, line in enumerate(lines) if i < MOST_TABLES_SHOWN or line.differs]
    width = max((len(printable(line.name)) for line in shown), default=5)
    print(f"\n{'Table':<{width}}  {'In backup':>12}  {'Restored':>12}")
    for line in shown:
        figures = f"{figure(line.in_backup):>12}  {figure(line.restored):>12}"
        print(f"{printable(line.name):<{width}}  {figures}{'  ✗' if line.differs else ''}")
    if len(lines) > len(shown):
        print(f"and {len(lines) - len(shown)} more, equal")
    return [
        f"{printable(line.name)} has {figure(line.restored)} in place of {figure(line.in_backup)}"
        for line in lines
        if line.differs
    ]


def rehearse(dump: Path, metadata: Metadata, bin_dir: Path, tools: Path) -> str:
    """All of it. Returns the last line; raises RehearsalFailure, ClusterError."""
    steps = Steps()
    path = (str(tools), str(bin_dir), os.environ.get("PATH", os.defpath))
    environ = {"PATH": os.pathsep.join(path), "LC_ALL": "C"}
    verify(dump, {**os.environ, "PATH": environ["PATH"]})
    steps.done("verified")
    with Cluster(bin_dir, settings=SETTINGS) as cluster:
        steps.done("server started")
        free = shutil.disk_usage(cluster.directory).free
        need = format_size(metadata.database_size_bytes or metadata.backup_size_bytes)
        print(
            f"Into {cluster.directory} (see TMPDIR): it takes {need}, {format_size(free)} are free."
        )
        print(f"On PostgreSQL {cluster.psql('SHOW server_version')} of {display_path(bin_dir)}\n")
        environ |= {"PGHOST": str(cluster.directory), "PGPORT": str(cluster.port)}
        environ |= {"PGUSER": "postgres", "PGCLIENTENCODING": "UTF8"}
        restore(cluster, metadata, dump, environ)
        steps.done("restored")
        show_status("Analyzing")
        cluster.psql(UNBENT + "ANALYZE", metadata.database_name)
        steps.done("analyzed")
        show_status("Comparing")
        lines = compare(cluster, metadata)
        show_status("")
        steps.done("compared")
    differences = show_comparison(lines)
    print("\n" + ", ".join(f"{name} in {took:.1f} s" for name, took in steps.seconds.items()))
    if differences:
        raise RehearsalFailure(f"Restored, but not equal: {'; '.join(differences)}")
    found = (metadata.total_rows, len(metadata.table_counts), metadata.large_object_count or 0)
    return f"✓ Restored and equal: {backup_db.row_summary(*found)}"


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
            bin_dir, tools = choose_server(metadata, dump)
        except RehearsalFailure:
            if Path(sys.prefix) == environment.VENV:
                raise
            python = environment.python_for(needed_environment(metadata))
            os.execv(python, [python, __file__, str(dump)])
        print(rehearse(dump, metadata, bin_dir, tools))
    except Interrupted as interrupted:
        return 128 + int(interrupted.args[0])
    except (backup_db.Failure, environment.EnvironmentFailure, RehearsalFailure) as failure:
        text = str(failure)
    except (ClusterError, OSError) as error:
        text = f"Not restored: {cause(printable_error(error))}"
    else:
        return 0
    sys.stdout.flush()
    print(f"✗ {text}", file=sys.stderr)
    return 1


def printable_error(error: Exception) -> str:
    return backup_db.printable_lines(str(error))


if __name__ == "__main__":
    sys.exit(main())
