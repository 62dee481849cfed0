#!/usr/bin/env python3
"""How fast backup_db.py is beside plain pg_dump, on a server and data of its own.

Starts a throw-away PostgreSQL, fills it with made-up chat (text, jsonb, float arrays), then with
narrow rows of numbers (the same on every machine), and runs backup_db.py and its peers in turn.
Prints medians, and the project's targets beside what was measured; it never fails because something
was slow. Nothing of yours is read or touched, and nothing is left behind.

The targets are ratios on two cores with nothing else to do.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import environment
from cluster import Cluster, ClusterError, installation
from sample import ABOUT_DATABASES, Interrupted, copy_project, interrupt

GB = 1024**3
MB = 1024**2

# A real server has more memory than the tests' own, and has vacuumed its tables.
SETTINGS = {
    "shared_buffers": "256MB",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "8GB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "autovacuum": "off",
    "max_locks_per_transaction": "1024",  # for 20,000 tables
}

GROWTH_GB = (0.25, 4.0)
# What takes a second needs more runs than what takes a minute for a median as steady.
QUICK_RUNS = 5
MORE_RUNS = f"What takes a second was run {QUICK_RUNS} times as often."

MANY_TABLES = (5000, 20_000)
MANY_BACKUPS = 10_000
# Backups of many tables, which a run compares the new one with, and a list shows.
OLD_BACKUPS, OLD_TABLES = 300, 2000

# In the temporary directory, for each GB of data: its tables, the backup that is kept and, in the
# comparison, a dump without compression; and for the server itself.
COMPARISON_DISK_SHARE, GROWTH_DISK_SHARE, RESTORE_DISK_SHARE = 3.5, 2.0, 4.0
SERVER_DISK_GB = 1.0

README = environment.PROJECT / "README.md"
FIGURES = Path(__file__).with_suffix(".md")
README_MARKS = ("<!-- benchmark -->", "<!-- /benchmark -->")
CHART = environment.TESTS / "benchmark.svg"


class BenchmarkFailure(Exception):
    """Something did not run at all; that something is slow is no failure."""


# -- the data -------------------------------------------------------------------------------------

# `dice` is a number from 0 to 1 that depends on nothing but its arguments. Words are used as in a
# language, few of them often and most of them rarely.
WORDS = """
CREATE FUNCTION dice(bigint, bigint) RETURNS float8 LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (hashint8extended($1, $2) & 2147483647) / 2147483648::float8;
CREATE FUNCTION word_number(bigint) RETURNS int LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN floor(4096 ^ (dice($1, 1) ^ 1.6))::int;
CREATE TABLE words AS
SELECT w AS number,
       (SELECT string_agg(substr('esiarntolcdugpmhbyfvkwzxjq',
                                 1 + floor(26 * dice(w * 32 + l, 2) * dice(w * 32 + l, 3))::int,
                                 1), '')
          FROM generate_series(1, 2 + floor(1.3 * ln(w) * dice(w, 4))::int) l) AS word
  FROM generate_series(1, 4096) w;
ALTER TABLE words ADD PRIMARY KEY (number);
VACUUM ANALYZE words;
"""


@dataclass(frozen=True)
class TableData:
    """A table of the data: its share of the bytes, the size of a row, and how rows are made."""

    name: str
    share: float
    row_bytes: int
    rows: str


TABLES = (
    TableData(
        "messages",
        0.65,
        382,
        """
SELECT n AS id, n / 24 AS conversation_id, (ARRAY['user', 'assistant'])[1 + n % 2] AS role,
       (SELECT string_agg(word, ' ')
          FROM generate_series(n * 1024,
                               n * 1024 + least(1023, 3 - 60 * ln(1 - dice(n, 5)))::int) w
          JOIN words ON number = word_number(w)) AS content,
       timestamptz '2024-01-01' + n * interval '13 s' + dice(n, 6) * interval '9 s' AS created_at
""",
    ),
    TableData(
        "embeddings",
        0.1,
        4250,
        """
SELECT n AS id, 'text-embedding' AS model,
       (SELECT array_agg(((dice(n * 768 + d, 7) + dice(n * 768 + d, 8) - 1) / 14)::real)
          FROM generate_series(1, 768) d) AS embedding
""",
    ),
    TableData(
        "events",
        0.25,
        384,
        """
SELECT n AS id, jsonb_build_object(
           'type', (ARRAY['message.created', 'message.read', 'conversation.opened', 'search'])
                   [1 + floor(4 * dice(n, 9) * dice(n, 10))::int],
           'at', timestamptz '2024-01-01' + n * interval '3 s',
           'session', md5((n / 20)::text)::uuid,
           'user', jsonb_build_object('id', floor(60000 * dice(n / 20, 11)), 'plan', 'team'),
           'tokens', jsonb_build_object('prompt', floor(4000 * dice(n, 12)),
                                        'completion', floor(900 * dice(n, 13))),
           'title', (SELECT string_agg(word, ' ') FROM generate_series(n * 1024, n * 1024 + 7) w
                       JOIN words ON number = word_number(w)),
           'tags', (SELECT jsonb_agg(word) FROM generate_series(n * 1024 + 8, n * 1024 + 10) w
                      JOIN words ON number = word_number(w))
       ) AS payload
""",
    ),
)

# Of these a backup is at its slowest beside pg_dump: each row is counted twice, and has few bytes.
NARROW_ROWS_PER_GB = 12_000_000
NARROW_TABLE = """
CREATE TABLE token_usage AS
SELECT n AS id, (n / 24)::int AS conversation_id,
       (hashint8extended(n, 1) & 65535)::int AS user_id,
       (hashint8extended(n, 2) & 4095)::int AS prompt_tokens,
       (hashint8extended(n, 3) & 1023)::int AS completion_tokens,
       1704067200 + n * 2 AS at_second
  FROM generate_series(1::bigint, {rows}) n;
ALTER TABLE token_usage ADD PRIMARY KEY (id);
VACUUM (ANALYZE);
"""

SIZE_OF_TABLES = """
SELECT sum(pg_table_size(oid)) FROM pg_class
 WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""


def build_data(cluster: Cluster, database: str, size_gb: float) -> int:
    """A database with tables of about this size; returns the bytes that they have."""
    say(f"Making {size_gb:g} GB of data (about a minute for each GB)")
    cluster.create_database(database)
    cluster.psql(WORDS, database)

    def build(table: TableData) -> None:
        rows = int(size_gb * GB * table.share / table.row_bytes)
        cluster.psql(
            f"CREATE TABLE {table.name} AS {table.rows} FROM generate_series(1::bigint, {rows}) n;"
            f"ALTER TABLE {table.name} ADD PRIMARY KEY (id)",
            database,
        )

    with ThreadPoolExecutor() as pool:
        try:
            list(pool.map(build, TABLES))
        except BaseException:
            cluster.destroy()  # or the threads would work on to their end
            raise
    cluster.psql("DROP TABLE words; VACUUM (ANALYZE)", database)
    settle(cluster)
    return int(cluster.psql(SIZE_OF_TABLES, database))


def build_narrow_rows(cluster: Cluster, database: str, rows: int) -> int:
    """A database with one table of numbers; returns the bytes that it has."""
    say(f"Making {rows / 1e6:g} million narrow rows")
    cluster.create_database(database)
    cluster.psql(NARROW_TABLE.format(rows=rows), database)
    settle(cluster)
    return int(cluster.psql(SIZE_OF_TABLES, database))


def build_many_tables(cluster: Cluster, database: str, tables: int) -> None:
    say(f"Making {tables} tables")
    cluster.create_database(database)
    cluster.psql(
        "SELECT format('CREATE TABLE table_%s (id bigint PRIMARY KEY, name text NOT NULL,"
        " created_at timestamptz DEFAULT now())', n),"
        " format('INSERT INTO table_%s SELECT i, md5(i::text) FROM generate_series(1, 10) i', n)"
        f" FROM generate_series(1, {tables}) n \\gexec\n VACUUM (ANALYZE)",
        database,
    )
    settle(cluster)


def settle(cluster: Cluster) -> None:
    """Write back now what would later be in the way of what is measured."""
    cluster.psql("CHECKPOINT")
    os.sync()


# -- what is run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Commands that are timed together, and the file they leave, which is then removed."""

    name: str
    commands: Sequence[Sequence[str]]
    leaves: Path | None = None


@dataclass
class Result:
    """What the runs of a contender took."""

    seconds: list[float] = field(default_factory=list)
    size_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Workplace:
    """A copy of the script and a place for its backups, which nothing of the user's reaches."""

    def __init__(self, directory: Path, path: str) -> None:
        self.project = directory / "project"
        self.project.mkdir()
        copy_project(self.project, {})
        self.environ = {k: v for k, v in os.environ.items() if not ABOUT_DATABASES.match(k)}
        folders = (str(environment.PYTHON.parent), path, os.environ.get("PATH", os.defpath))
        self.environ["PATH"] = os.pathsep.join(filter(None, folders))

    def ours(self, *options: str) -> list[str]:
        return [str(environment.PYTHON), "backup_db.py", *options]

    def run(self, command: Sequence[str]) -> str:
        """Run to the end; what it printed."""
        done = subprocess.run(
            command,
            cwd=self.project,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
        )
        if done.returncode:
            raise BenchmarkFailure(
                f"{' '.join(command)}\nexited with {done.returncode}: {done.stderr}"
            )
        return done.stdout

    def time_contender(self, contender: Contender, result: Result) -> None:
        started = time.perf_counter()
        for command in contender.commands:
            self.run(command)
        result.seconds.append(time.perf_counter() - started)
        if contender.leaves and contender.leaves.is_dir():
            (dump,) = contender.leaves.glob("*.dump")
            result.size_bytes = dump.stat().st_size
            shutil.rmtree(contender.leaves)
        elif contender.leaves:
            result.size_bytes = contender.leaves.stat().st_size
            contender.leaves.unlink()

    def time_in_turn(self, contenders: Sequence[Contender], runs: int) -> dict[str, Result]:
        results = {contender.name: Result() for contender in contenders}
        for number in range(1, runs + 1):
            for contender in contenders:
                self.time_contender(contender, results[contender.name])
                seconds = results[contender.name].seconds[-1]
                say(f"  {number} of {runs}: {seconds:7.2f} s  {contender.name}")
        return results

    def peak_memory(self, command: Sequence[str]) -> int:
        """The peak memory of a Python script itself, without the programs that it starts.

        Linux begins the count with what the parent had: this process, which is the smaller one.
        """
        python, *arguments = command
        peak = int(self.run([python, "-c", WITH_PEAK_MEMORY, *arguments]).splitlines()[-1])
        return peak if sys.platform == "darwin" else peak * 1024


# The project, being the working directory, is where the script finds its modules.
WITH_PEAK_MEMORY = """
import atexit, resource, runpy, sys
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class ServerWorkplace(Workplace):
    """A workplace whose commands reach a database of the cluster, ours and the peers alike."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.directory, str(cluster.bin_dir))
        self.cluster = cluster
        self.use("postgres")

    def use(self, database: str) -> None:
        """The database for what is run from here on."""
        self.environ |= self.cluster.environment(database)
        self.environ |= {
            "PGHOST": self.cluster.host,
            "PGPORT": str(self.cluster.port),
            "PGUSER": "postgres",
            "PGPASSWORD": self.cluster.password,
            "PGDATABASE": database,
        }

    @property
    def server_version(self) -> str:
        return self.cluster.psql("SHOW server_version").split()[0]

    def pg_dump(self, name: str, *options: str) -> Contender:
        file = self.project / "peer.dump"
        return Contender(name, [["pg_dump", "-Fc", *options, f"--file={file}"]], file)

    def backup(self, name: str) -> Contender:
        output = self.project / "backups"
        return Contender(name, [self.ours("--output-dir", str(output))], output)


# -- what is reported -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A table, with the targets that it is measured by."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    targets: Sequence[Target]
    bars: Sequence[tuple[str, float]] = ()
    summary: str = ""  # in plain words, for README.md

    def lines(self) -> list[str]:
        """For a terminal."""
        table = [self.header, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(self.header))]
        lines = ["", self.title, ""]
        for row in table:
            first, *rest = (
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join([first, *rest]).rstrip())
        return [*lines, "", *(target.line() for target in self.targets)]

    def markdown(self) -> list[str]:
        rule = ["---", *["--:"] * (len(self.header) - 1)]
        rows = [[f"`{name}`", *cells] for name, *cells in self.rows]
        table = [f"| {' | '.join(row)} |" for row in (self.header, rule, *rows)]
        return [f"**{self.title}**", "", *table, "", *(f"- {t.sentence()}" for t in self.targets)]


@dataclass(frozen=True)
class Target:
    """A value that was measured, and the most that it may be."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def mark(self) -> str:
        return "✓ met    " if self.value <= self.limit else "✗ not met"

    @property
    def measured(self) -> str:
        return f"{self.value:.2f}{self.unit}"

    @property
    def most(self) -> str:
        return f"at most {self.limit:g}{self.unit}"

    def line(self) -> str:
        return f"  {self.mark}  {self.measured:>8}  {self.most:<13}  {self.what}"

    def sentence(self) -> str:
        return f"{self.what}: {self.measured} (target: {self.most})"


def timing_cells(name: str, result: Result, baseline: Result) -> list[str]:
    return [
        name,
        f"{result.median:.2f} s",
        f"{min(result.seconds):.2f}–{max(result.seconds):.2f}",
        f"{result.median / baseline.median:.2f}",
    ]


def describe_runs(runs: int) -> str:
    return f"medians of {runs} runs in turn" if runs > 1 else "a single run"


def describe_machine() -> str:
    """Where this was measured, in words."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB
    return (
        f"{cores} cores of {model}, {memory:.0f} GB of memory, {platform.system()},"
        f" Python {platform.python_version()}"
    )


# -- the parts ------------------------------------------------------------------------------------

PLAIN, USUAL, FLOOR = "pg_dump -Fc", "pg_dump -Fc, sha256sum, pg_restore --list", "pg_dump -Fc -Z 0"
OURS, VERIFY = "backup_db.py", "backup_db.py --verify"
REHEARSE = "tests/rehearse.py"
SHA256SUM, RESTORE = "sha256sum", "pg_restore -f /dev/null"


@dataclass(frozen=True)
class FirstBackup:
    """A backup that is kept. Its making warmed the server, and showed the memory that it takes."""

    dump: Path
    compression: str
    peak_memory: int

    @property
    def is_gzip(self) -> bool:
        return self.compression.startswith("gzip")


def make_first_backup(place: ServerWorkplace) -> FirstBackup:
    folder = place.project / "kept"
    peak_memory = place.peak_memory(place.ours("--output-dir", str(folder)))
    (dump,) = folder.glob("*.dump")
    (metadata,) = folder.glob("*.metadata.json")
    compression = json.loads(metadata.read_text(encoding="utf-8"))["compression"]
    return FirstBackup(dump, compression, peak_memory)


def bare_pg_dump(place: ServerWorkplace, compression: str) -> Contender:
    """With our compression; the pg_dump of 15 knows gzip alone, and takes its level."""
    value = compression.removeprefix("gzip:")
    return place.pg_dump(f"pg_dump -Fc -Z {value}", f"--compress={value}")


def compare(place: ServerWorkplace, size_gb: float, runs: int) -> Report:
    """The backup and the verification, beside what they compete with."""
    data_bytes = build_data(place.cluster, "benchmark", size_gb)
    place.use("benchmark")
    first = make_first_backup(place)
    dump, is_gzip = str(first.dump), first.is_gzip
    verify_memory = place.peak_memory(place.ours("--verify", dump))

    checksum = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]
    plain = place.pg_dump(PLAIN)
    peer_file = str(plain.leaves)
    usual_script = [*plain.commands, [*checksum, peer_file], ["pg_restore", "--list", peer_file]]
    bare = bare_pg_dump(place, first.compression)
    contenders = [
        plain,
        Contender(USUAL, usual_script, plain.leaves),
        bare,
        place.pg_dump(FLOOR, "--compress=0"),
        place.backup(OURS),
    ]
    quick_contenders = [
        Contender(SHA256SUM, [[*checksum, dump]]),
        Contender(RESTORE, [["pg_restore", "--file=/dev/null", dump]]),
        Contender(VERIFY, [place.ours("--verify", dump)]),
    ]
    results = place.time_in_turn(contenders, runs)
    results |= place.time_in_turn(quick_contenders, runs * QUICK_RUNS)
    ours, base = results[OURS], results[PLAIN]
    slower = max(results[SHA256SUM].median, results[RESTORE].median)
    rows = []
    for name, result in results.items():
        rows.append(timing_cells(name, result, base))
        if result.size_bytes:
            size = f"{result.size_bytes / MB:.0f} MB"
            rows[-1] += [size, f"{result.size_bytes / base.size_bytes:.2f}"]
        else:
            rows[-1] += ["", ""]
    place.cluster.drop_database("benchmark")
    shutil.rmtree(first.dump.parent)
    return Report(
        f"PostgreSQL {place.server_version}, {data_bytes / GB:.2f} GB of tables, compression"
        f" {first.compression}, {describe_runs(runs)}",
        ("", "time", "from–to", "of pg_dump -Fc", "size", "of pg_dump -Fc"),
        rows,
        [
            Target(
                f"{OURS}, time of {PLAIN}", ours.median / base.median, 0.75 if is_gzip else 0.20
            ),
            Target(
                f"{OURS}, size of {PLAIN}",
                ours.size_bytes / base.size_bytes,
                1.06 if is_gzip else 1,
            ),
            Target(f"{OURS}, time of {bare.name}", ours.median / results[bare.name].median, 1.3),
            Target(
                f"{VERIFY}, time of the slower of {SHA256SUM} and {RESTORE}",
                results[VERIFY].median / slower,
                1.6,
            ),
            Target(f"{OURS}, peak memory of its own process", first.peak_memory / MB, 64, " MB"),
            Target(f"{VERIFY}, peak memory of its own process", verify_memory / MB, 64, " MB"),
        ],
        [(name, results[name].median) for name in (OURS, FLOOR, bare.name, PLAIN, USUAL)],
        f"Back up {data_bytes / GB:.2f} GB, verification included: {ours.median:.1f} s."
        f" `{PLAIN}` alone takes {base.median:.1f} s, with the same compression"
        f" {results[bare.name].median:.1f} s. Verify that backup again:"
        f" {results[VERIFY].median:.1f} s.",
    )


def compare_narrow_rows(place: ServerWorkplace, rows: int, runs: int) -> Report:
    """The backup of many rows with little in them, beside pg_dump with the same compression."""
    data_bytes = build_narrow_rows(place.cluster, "narrow_rows", rows)
    place.use("narrow_rows")
    first = make_first_backup(place)
    bare = bare_pg_dump(place, first.compression)
    results = place.time_in_turn([bare, place.backup(OURS)], runs)
    ours, base = results[OURS], results[bare.name]
    place.cluster.drop_database("narrow_rows")
    shutil.rmtree(first.dump.parent)
    return Report(
        f"{rows / 1e6:g} million narrow rows, PostgreSQL {place.server_version},"
        f" {data_bytes / GB:.2f} GB, compression {first.compression}, {describe_runs(runs)}",
        ("", "time", "from–to", f"of {bare.name}"),
        [timing_cells(name, result, base) for name, result in results.items()],
        [
            Target(f"{OURS}, time of {bare.name}, narrow rows", ours.median / base.median, 1.7),
            Target(
                f"{OURS}, peak memory of its own process, narrow rows",
                first.peak_memory / MB,
                64,
                " MB",
            ),
        ],
        summary=f"Back up {rows / 1e6:g} million narrow rows, the worst case: {ours.median:.1f} s;"
        f" `{bare.name}` takes {base.median:.1f} s.",
    )


def compare_growth(place: ServerWorkplace, runs: int) -> Report:
    """Whether a larger database takes more than its share of time."""
    sizes = {}
    for size_gb in GROWTH_GB:
        database = f"growth_{size_gb:g}"
        sizes[database] = build_data(place.cluster, database, size_gb)
    results = {database: Result() for database in sizes}
    memory = {}
    for database in sizes:
        place.use(database)
        first = make_first_backup(place)
        memory[database] = first.peak_memory
        shutil.rmtree(first.dump.parent)
    for _ in range(runs):
        for database, result in results.items():
            place.use(database)
            place.time_contender(place.backup(OURS), result)
            say(f"  {result.seconds[-1]:7.2f} s  {database}")
    per_gb = [results[database].median / (sizes[database] / GB) for database in sizes]
    largest = list(sizes)[-1]
    rows = [
        [
            f"{sizes[database] / GB:.2f} GB",
            f"{results[database].median:.2f} s",
            f"{min(results[database].seconds):.2f}–{max(results[database].seconds):.2f}",
            f"{seconds:.2f} s",
            f"{memory[database] / MB:.0f} MB",
        ]
        for database, seconds in zip(sizes, per_gb, strict=True)
    ]
    for database in sizes:
        place.cluster.drop_database(database)
    return Report(
        f"Growth, PostgreSQL {place.server_version}, {describe_runs(runs)}",
        (OURS, "time", "from–to", "time per GB", "peak memory"),
        rows,
        [Target("time per GB of the larger, of that of the smaller", per_gb[1] / per_gb[0], 1.2)],
        summary=f"Back up {sizes[largest] / GB:.2f} GB: {results[largest].median:.1f} s, with"
        f" {memory[largest] / MB:.0f} MB of memory.",
    )


def compare_restore(place: ServerWorkplace, size_gb: float, runs: int) -> Report:
    """The way back beside the way there: for information, it has no target."""
    data_bytes = build_data(place.cluster, "benchmark", size_gb)
    place.use("benchmark")
    first = make_first_backup(place)

    def restore(jobs: int) -> Contender:
        options = ["--dbname=restored", f"--jobs={jobs}", "--exit-on-error", str(first.dump)]
        make, drop = ["createdb", "--template=template0", "restored"], ["dropdb", "restored"]
        return Contender(f"pg_restore --jobs={jobs}", [make, ["pg_restore", *options], drop])

    rehearse = [str(environment.PYTHON), str(environment.TESTS / "rehearse.py"), str(first.dump)]
    serial = restore(1)
    contenders = [place.backup(OURS), serial, restore(2), Contender(REHEARSE, [rehearse])]
    results = place.time_in_turn(contenders, runs)
    base = results[serial.name].median
    place.cluster.drop_database("benchmark")
    shutil.rmtree(first.dump.parent)
    return Report(
        f"Restore, PostgreSQL {place.server_version}, {data_bytes / GB:.2f} GB of tables,"
        f" compression {first.compression}, {describe_runs(runs)}",
        ("", "time", "from–to", f"of {OURS}", f"of {serial.name}"),
        [
            [*timing_cells(name, result, results[OURS]), f"{result.median / base:.2f}"]
            for name, result in results.items()
        ],
        [],
    )


def compare_tables(place: ServerWorkplace, tables: int, runs: int) -> Report:
    """Whether many tables cost more than they cost pg_dump."""
    build_many_tables(place.cluster, "many_tables", tables)
    place.use("many_tables")
    results = place.time_in_turn([place.pg_dump(PLAIN), place.backup(OURS)], runs + 1)
    for result in results.values():
        del result.seconds[0]  # the server was not warm
    place.cluster.drop_database("many_tables")
    return Report(
        f"{tables} tables, PostgreSQL {place.server_version}, {describe_runs(runs)}",
        ("", "time", "from–to", "of pg_dump -Fc"),
        [timing_cells(name, result, results[PLAIN]) for name, result in results.items()],
        [
            Target(
                f"{OURS}, time of {PLAIN}, {tables} tables",
                results[OURS].median / results[PLAIN].median,
                1.5,
            )
        ],
        summary=f"Back up {tables} small tables: {results[OURS].median:.1f} s;"
        f" `{PLAIN}` takes {results[PLAIN].median:.1f} s.",
    )


def measure_old_backups(place: ServerWorkplace, runs: int) -> Report:
    """What many earlier backups cost: a run, which reads their metadata, and a list."""
    many, old = place.project / "many", place.project / "old"
    make_backups(place, many, MANY_BACKUPS, tables=4)
    make_backups(place, old, OLD_BACKUPS, OLD_TABLES)
    run_memory = place.peak_memory(place.ours("--output-dir", str(old)))
    list_memory = place.peak_memory(place.ours("--list", "--output-dir", str(old)))
    bare, listing = "python3 -c pass", f"{OURS} --list, {MANY_BACKUPS} backups"
    results = place.time_in_turn(
        [
            Contender(bare, [[str(environment.PYTHON), "-c", "pass"]]),
            Contender(listing, [place.ours("--list", "--output-dir", str(many))]),
        ],
        max(runs, 7),
    )
    beside = f"{OLD_BACKUPS} backups of {OLD_TABLES} tables"
    return Report(
        f"Many backups in the directory, PostgreSQL {place.server_version}",
        ("", "time", "from–to", f"of {bare}"),
        [timing_cells(name, result, results[bare]) for name, result in results.items()],
        [
            Target(
                f"{listing}, beside {bare}",
                results[listing].median - results[bare].median,
                0.7,
                " s",
            ),
            Target(f"{OURS}, peak memory beside {beside}", run_memory / MB, 100, " MB"),
            Target(f"{OURS} --list, peak memory beside {beside}", list_memory / MB, 100, " MB"),
        ],
    )


def make_backups(place: ServerWorkplace, folder: Path, count: int, tables: int) -> None:
    """Backups an hour apart, as far as a list and a run read them: metadata, copied from that of a
    real one, each beside a dump of its size that takes no room."""
    build_many_tables(place.cluster, f"tables_{tables}", tables)
    place.use(f"tables_{tables}")
    place.run(place.ours("--output-dir", str(folder)))
    (original,) = folder.glob("*.metadata.json")
    values = json.loads(original.read_text(encoding="utf-8"))
    for number in range(count):
        clock = time.gmtime(1_700_000_000 + number * 3600)
        stem = f"tables_{tables}_dev_{time.strftime('%Y-%m-%dT%H-%M-%SZ', clock)}"
        values["backup_timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", clock)
        values["backup_file"] = f"{stem}.dump"
        with (folder / f"{stem}.dump").open("wb") as dump:
            dump.truncate(values["backup_size_bytes"])
        text = json.dumps(values, indent=2)
        (folder / f"{stem}.metadata.json").write_text(text, encoding="utf-8")


def compare_start_up(place: Workplace, runs: int) -> Report:
    """What has to be there at once."""
    helping, bare = f"{OURS} --help", "python3 -c pass"
    results = place.time_in_turn(
        [
            Contender(bare, [[str(environment.PYTHON), "-c", "pass"]]),
            Contender(helping, [place.ours("--help")]),
        ],
        max(runs, 7),
    )
    return Report(
        "Start-up: medians",
        ("", "time", "from–to", f"of {bare}"),
        [timing_cells(name, result, results[bare]) for name, result in results.items()],
        [Target(helping, results[helping].median, 0.1, " s")],
    )


# -- the chart and the README ---------------------------------------------------------------------

CHART_TITLE = "Time for a backup; shorter is better"

# Greys that can be read on white and on near black: an image cannot know on which it is shown.
INK, OURS_FILL, PEER_FILL = "#7d8590", "#2f81f7", "#8b949e"
CHART_WIDTH, NAME_WIDTH, BAR_HEIGHT, GAP = 720, 310, 18, 8


def draw_chart(reports: Sequence[Report]) -> str:
    """Bars of time for every report that has some, as SVG."""
    body: list[str] = []
    y = 4
    for report in reports:
        if not report.bars:
            continue
        body.append(svg_text(0, y + 16, report.title, 'font-weight="bold"'))
        y += 26
        scale = (CHART_WIDTH - NAME_WIDTH - 70) / max(seconds for _name, seconds in report.bars)
        for name, seconds in report.bars:
            width = max(1, round(scale * seconds))
            fill = OURS_FILL if name == OURS else PEER_FILL
            place = f'x="{NAME_WIDTH}" y="{y}" width="{width}" height="{BAR_HEIGHT}"'
            base = y + BAR_HEIGHT - 5
            label = name.replace("pg_dump -Fc", "pg_dump -Fc (gzip)") if " -Z" not in name else name
            body.append(svg_text(NAME_WIDTH - 8, base, label, 'text-anchor="end"'))
            body.append(f'<rect {place} rx="2" fill="{fill}"/>')
            body.append(svg_text(NAME_WIDTH + width + 6, base, f"{seconds:.1f} s"))
            y += BAR_HEIGHT + GAP
        y += 12
    size = f'width="{CHART_WIDTH}" height="{y}" viewBox="0 0 {CHART_WIDTH} {y}"'
    style = f'font-family="sans-serif" font-size="13" fill="{INK}" role="img"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([head, f"<title>{CHART_TITLE}</title>", *body, "</svg>", ""])


def svg_text(x: int, y: int, text: str, *attributes: str) -> str:
    place = " ".join([f'x="{x}" y="{y}"', *attributes])
    return f"<text {place}>{html.escape(text)}</text>"


def update_readme(reports: Sequence[Report], machine: str) -> None:
    """Write what everybody reads between the two marks, the chart and the tables beside this
    program."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    before, begin, rest = text.partition(README_MARKS[0])
    _old, end, after = rest.partition(README_MARKS[1])
    if not (begin and end):
        raise BenchmarkFailure(f"{README} does not have the lines {' and '.join(README_MARKS)}.")
    lines = []
    if any(report.bars for report in reports):
        CHART.write_text(draw_chart(reports), encoding="utf-8")
        say(f"Written: {CHART}")
        picture = CHART.relative_to(environment.PROJECT).as_posix()
        lines += [f"![{CHART_TITLE}]({picture})", ""]
    lines += [*(f"- {report.summary}" for report in reports if report.summary), ""]
    figures = [
        "# How fast: all figures",
        "",
        "Written by `python3 tests/benchmark.py --readme`.",
        "",
    ]
    figures += [f"Measured on {machine}. {MORE_RUNS}"]
    for report in reports:
        figures += ["", "\n".join(report.markdown()).rstrip()]
    FIGURES.write_text("\n".join([*figures, ""]), encoding="utf-8")
    place = FIGURES.relative_to(environment.PROJECT).as_posix()
    lines += [f"`pg_dump -Fc` compresses by gzip, its default. [All figures]({place})"]
    README.write_text("\n".join([before + begin, *lines, end + after]), encoding="utf-8")
    say(f"Written: {README}")


# -- the command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What to measure."""

    size_gb: float
    servers: Sequence[int]
    runs: int
    parts: frozenset[str]
    readme: bool


SERVER_PARTS = ("compare", "growth", "tables", "restore")


def parse_options(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        type=float,
        default=1.0,
        metavar="GB",
        help=f"of the chat, with {NARROW_ROWS_PER_GB // 10**6} million narrow rows for each GB"
        " (default: 1)",
    )
    parser.add_argument(
        "--server",
        type=int,
        nargs="+",
        default=[17],
        metavar="MAJOR",
        help="15 to 18 (default: 17)",
    )
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N", help="of what takes long (default: 3)"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write README.md's figures, the chart and all tables"
    )
    group = parser.add_argument_group("instead of the comparison of times and sizes")
    group.add_argument(
        "--growth",
        action="store_true",
        help=f"time per GB at {GROWTH_GB[0]:g} and {GROWTH_GB[1]:g} GB",
    )
    group.add_argument("--tables", action="store_true", help="many small tables, many backups")
    group.add_argument(
        "--restore", action="store_true", help="restores and a rehearsal, beside the backup"
    )
    group.add_argument("--start-up", action="store_true", help="--help")
    group.add_argument("--all", action="store_true", help="all of these, and the comparison")
    values = parser.parse_args(arguments)
    if values.size <= 0 or values.runs <= 0:
        parser.error("--size and --runs must be more than 0")
    chosen = {name for name in ("growth", "tables", "restore", "start_up") if getattr(values, name)}
    if values.all:
        chosen = {*SERVER_PARTS, "start_up"}
    return Options(
        values.size, values.server, values.runs, frozenset(chosen or {"compare"}), values.readme
    )


def check_disk(directory: Path, options: Options) -> None:
    shares = {
        "compare": COMPARISON_DISK_SHARE * options.size_gb,
        "growth": GROWTH_DISK_SHARE * sum(GROWTH_GB),
        "restore": RESTORE_DISK_SHARE * options.size_gb,
    }
    need_gb = SERVER_DISK_GB + max(shares.get(part, 0.0) for part in options.parts)
    free_gb = shutil.disk_usage(directory).free / GB
    if free_gb < need_gb:
        raise BenchmarkFailure(
            f"{need_gb:.1f} GB are needed in {directory.parent}, {free_gb:.1f} GB are free there."
            " Choose another place by TMPDIR, or less data by --size."
        )


def measure(options: Options) -> list[Report]:
    reports = []
    if not options.parts.isdisjoint(SERVER_PARTS):
        for major in options.servers:
            with Cluster(installation(major), settings=SETTINGS) as cluster:
                check_disk(cluster.directory, options)
                place = ServerWorkplace(cluster)
                say(f"PostgreSQL {place.server_version}")
                if "compare" in options.parts:
                    reports.append(compare(place, options.size_gb, options.runs))
                    narrow_rows = round(options.size_gb * NARROW_ROWS_PER_GB)
                    reports.append(compare_narrow_rows(place, narrow_rows, options.runs))
                if "growth" in options.parts:
                    reports.append(compare_growth(place, options.runs))
                if "tables" in options.parts:
                    reports += [
                        compare_tables(place, tables, options.runs) for tables in MANY_TABLES
                    ]
                    reports.append(measure_old_backups(place, options.runs))
                if "restore" in options.parts:
                    reports.append(compare_restore(place, options.size_gb, options.runs))
    if "start_up" in options.parts:
        with tempfile.TemporaryDirectory() as directory:
            reports.append(compare_start_up(Workplace(Path(directory), ""), options.runs))
    return reports


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    try:
        python = environment.python_for("tests")
        if Path(sys.prefix) != environment.VENV:
            os.execv(python, [python, __file__, *arguments])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, interrupt)
        machine = describe_machine()
        load = os.getloadavg()[0]
        reports = measure(options)
        print(f"\n{machine}; load when it began: {load:.1f}\n{MORE_RUNS}")
        for report in reports:
            print("\n".join(report.lines()))
        if options.readme:
            update_readme(reports, machine)
    except (environment.EnvironmentFailure, ClusterError, BenchmarkFailure) as failure:
        print(f"\n✗ {failure}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        signal_name = signal.Signals(interrupted.args[0]).name
        say(f"\n✗ Stopped by {signal_name}")
        return 128 + int(interrupted.args[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
