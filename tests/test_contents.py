"""The contents of a dump against the counts: whose rows are whose, by the tables' object ids."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import MakeProject, project_maker
from faults import CONTENTS, HOLD, fake_call, let_go, paused, published
from support import Backup, Database, finish, new_database, program, restored, wait_until

# Each table has another number of rows. Two are one where dots are read wrongly.
SCHEMA = """
CREATE TABLE messages (id int);
INSERT INTO messages SELECT generate_series(1, 40);
CREATE TABLE empty (id int);
CREATE SCHEMA other;
CREATE TABLE other.messages (id int);
INSERT INTO other.messages SELECT generate_series(1, 3);
CREATE SCHEMA "c.d";
CREATE SCHEMA c;
CREATE TABLE "c.d".e (id int);
INSERT INTO "c.d".e SELECT generate_series(1, 5);
CREATE TABLE c."d.e" (id int);
INSERT INTO c."d.e" SELECT generate_series(1, 8);
CREATE TABLE "ends
COPY x FROM stdin;" (id int);
INSERT INTO "ends
COPY x FROM stdin;" VALUES (1);
SELECT lo_from_bytea(4711, 'first');
"""
ENDS = '"ends\nCOPY x FROM stdin;"'
COUNTS = {"messages": 40, "empty": 0, "other.messages": 3, '"c.d".e': 5, 'c."d.e"': 8, ENDS: 1}

# The tables' object ids as the server writes them, in a session with the usual search_path.
OIDS = """
SELECT json_object_agg(oid::regclass, oid::bigint ORDER BY oid) FROM pg_class
 WHERE relkind = 'r' AND oid >= 16384
"""


@pytest.fixture(scope="module")
def source(cluster: Cluster) -> Iterator[Database]:
    with new_database(cluster) as database:
        database.psql(SCHEMA)
        yield database


@pytest.fixture(scope="module")
def original(source: Database, tmp_path_factory: pytest.TempPathFactory) -> Backup:
    """Not to be touched."""
    project = project_maker(tmp_path_factory.mktemp("original"), source.cluster)(source)
    original = Backup(project.back_up(), project)
    assert original.read_metadata()["table_counts"] == COUNTS
    return original


@pytest.fixture
def backup(original: Backup, tmp_path: Path) -> Backup:
    """A backup that is a test's own."""
    return original.copy_to(tmp_path / "copy")


def test_metadata_has_each_table_s_oid(source: Database, original: Backup) -> None:
    metadata = original.read_metadata()
    assert metadata["table_oids"] == json.loads(source.psql(OIDS))
    assert list(metadata["table_oids"]) == list(metadata["table_counts"])


def swapped(values: dict[str, Any], one: str, other: str) -> dict[str, Any]:
    return {**values, one: values[other], other: values[one]}


def assert_differences(backup: Backup, differences: dict[str, tuple[int, int]]) -> None:
    """--verify names these tables, what is in the dump and what was counted; and no others."""
    result = backup.verify().failed_with(8)
    assert "Checksum:    ✓" in result.stderr, result
    assert "Contents:    ✗ Mismatch" in result.stderr, result
    for table, (found, expected) in differences.items():
        printed = table.replace("\n", r"\n")
        assert (
            f"rows of table {printed}: {found} in the dump, {expected} expected\n" in result.stderr
        )
    assert result.stderr.count(" in the dump, ") == len(differences), result


@pytest.mark.parametrize(
    ("one", "other"),
    [("messages", "other.messages"), ('"c.d".e', 'c."d.e"'), ("empty", ENDS)],
)
@pytest.mark.parametrize("key", ["table_counts", "table_oids"])
def test_swapped_tables_are_both_named(key: str, one: str, other: str, backup: Backup) -> None:
    """The sum of all counts is right, and so is each count, for another table."""
    backup.edit(**{key: swapped(backup.read_metadata()[key], one, other)})
    rows = COUNTS[one], COUNTS[other]
    found, expected = rows if key == "table_counts" else reversed(rows)
    assert_differences(backup, {one: (found, expected), other: (expected, found)})


def test_order_of_the_keys_means_nothing(backup: Backup) -> None:
    metadata = backup.read_metadata()
    oids, counts = sorted(metadata["table_oids"].items()), metadata["table_counts"].items()
    backup.edit(table_oids=dict(oids), table_counts=dict(reversed(counts)))
    backup.verify().succeeded()


Oids = dict[str, Any]

# What may stand in the place of the oids.
HOSTILE: dict[str, Callable[[Oids], object]] = {
    "a list": lambda oids: list(oids.values()),
    "a list of pairs": lambda oids: list(oids.items()),
    "a number": lambda _oids: 1,
    "a string": json.dumps,
    "true": lambda _oids: True,
    "nothing in it": lambda _oids: {},
    "a string for an oid": lambda oids: {**oids, "empty": str(oids["empty"])},
    "a bool for an oid": lambda oids: {**oids, "empty": True},
    "a float for an oid": lambda oids: {**oids, "empty": float(oids["empty"])},
    "null for an oid": lambda oids: {**oids, "empty": None},
    "a negative oid": lambda oids: {**oids, "empty": -oids["empty"]},
    "too large an oid": lambda oids: {**oids, "empty": 2**64},
    "nested": lambda oids: {**oids, "empty": {"oid": oids["empty"]}},
    "deeply nested": lambda oids: {**oids, "empty": json.loads("[" * 900 + "]" * 900)},
    "a key missing": lambda oids: {key: oid for key, oid in oids.items() if key != "empty"},
    "a key too many": lambda oids: {**oids, "more": 99999},
    "another key": lambda oids: {{"empty": "Empty"}.get(key, key): o for key, o in oids.items()},
    "an oid twice": lambda oids: {**oids, "empty": oids["messages"]},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_oids_that_cannot_be_are_a_failed_verification(kind: str, backup: Backup) -> None:
    backup.edit(table_oids=HOSTILE[kind](backup.read_metadata()["table_oids"]))
    assert '"table_oids"' in backup.verify().failed_with(8).stderr


# -- backups that were made before there were oids ------------------------------------------------

# What is done to the counts, so that they are not the dump's, whichever table has which.
ALTERED: dict[str, Callable[[Backup], object]] = {
    "a row more": lambda b: b.count(messages=41),
    "a row less": lambda b: b.count(messages=39),
    "a row in the empty table": lambda b: b.count(empty=1),
    "a row moved": lambda b: b.count(messages=39, **{"other.messages": 4}),
    "a table less": lambda b: b.forget("empty"),
    "a table more": lambda b: b.count(more=0),
    "a table's row in another": lambda b: b.edit(
        table_counts={**{key: COUNTS[key] for key in COUNTS if key != ENDS}, "messages": 41}
    ),
    "no counts": lambda b: b.edit(table_counts={}),
}


@pytest.fixture
def earlier(backup: Backup) -> Backup:
    metadata = backup.read_metadata()
    metadata.pop("table_oids", None)
    backup.metadata.write_text(json.dumps(metadata), encoding="utf-8")
    return backup


def test_backup_without_oids_is_verified(earlier: Backup) -> None:
    assert "(57 rows in 6 tables, 1 large object)" in earlier.verify().succeeded().stdout


@pytest.mark.parametrize("alteration", ALTERED)
def test_backup_without_oids_is_judged_by_its_counts(alteration: str, earlier: Backup) -> None:
    ALTERED[alteration](earlier)
    assert "Contents:    ✗ Mismatch" in earlier.verify().failed_with(8).stderr


# -- partitions by an enum: every COPY names their topmost table -----------------------------------

# The hash of an enum's value is another one in every database: which leaf has how many rows is
# chance, but as the values have 1, 2, 4 and 8 rows, no two leaves have the same, unless it is 0.
ONE_PARTITIONED_TABLE = """
CREATE TYPE state AS ENUM ('new', 'open', 'done', 'lost');
CREATE TABLE tasks (state state, id int) PARTITION BY HASH (state);
CREATE TABLE tasks_0 PARTITION OF tasks FOR VALUES WITH (MODULUS 3, REMAINDER 0);
CREATE TABLE tasks_1 PARTITION OF tasks FOR VALUES WITH (MODULUS 3, REMAINDER 1);
CREATE TABLE tasks_2 PARTITION OF tasks FOR VALUES WITH (MODULUS 3, REMAINDER 2);
INSERT INTO tasks SELECT state, n
  FROM unnest(enum_range(NULL::state)) WITH ORDINALITY AS s (state, i),
       generate_series(1, (2 ^ (i - 1))::int) AS n;
"""

# Another whose leaves lie elsewhere, or deeper; a hash below a range; one without rows.
SEVERAL_PARTITIONED_TABLES = f"""
CREATE TABLE plain (id int);
INSERT INTO plain SELECT generate_series(1, 3);
CREATE SCHEMA parts;
{ONE_PARTITIONED_TABLE}
CREATE TABLE "Jobs.x" (LIKE tasks, day date) PARTITION BY HASH (id, state);
CREATE TABLE parts."Jobs.x" PARTITION OF "Jobs.x" FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE jobs_1 PARTITION OF "Jobs.x" FOR VALUES WITH (MODULUS 2, REMAINDER 1)
    PARTITION BY RANGE (day);
CREATE TABLE jobs_1_rest PARTITION OF jobs_1 DEFAULT;
CREATE TABLE parts.tasks PARTITION OF jobs_1 FOR VALUES FROM ('2025-01-01') TO ('2025-02-01');
CREATE TABLE log (state state, id int) PARTITION BY RANGE (id);
CREATE TABLE log_1 PARTITION OF log FOR VALUES FROM (1) TO (5) PARTITION BY HASH (state);
CREATE TABLE log_1_a PARTITION OF log_1 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE log_1_b PARTITION OF log_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE log_rest PARTITION OF log DEFAULT;
CREATE TABLE unused (state state) PARTITION BY HASH (state);
CREATE TABLE unused_0 PARTITION OF unused FOR VALUES WITH (MODULUS 1, REMAINDER 0);
INSERT INTO "Jobs.x" SELECT state, id, '2025-01-25'::date + id FROM tasks;
INSERT INTO log SELECT * FROM tasks;
"""

LEAVES = """
SELECT format('SELECT %1$L, count(*) FROM ONLY %1$s', oid::regclass)
  FROM pg_class WHERE relkind = 'r' AND oid >= 16384 ORDER BY oid
\\gexec
"""

# What is in each table, all of its partitions together: a restore may put a row into another one.
WHOLE_TABLES = """
SELECT format('SELECT %1$L, count(*), md5(string_agg(x::text, '''' ORDER BY x::text)) FROM %1$s x',
              oid::regclass)
  FROM pg_class WHERE relkind IN ('r', 'p') AND oid >= 16384 AND NOT relispartition ORDER BY 1
\\gexec
"""


@pytest.mark.parametrize(
    "schema",
    [ONE_PARTITIONED_TABLE, SEVERAL_PARTITIONED_TABLES],
    ids=["one partitioned table", "several"],
)
def test_partitions_by_an_enum_are_backed_up(
    schema: str, each_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(each_cluster) as database:
        database.psql(schema)
        project = make_project(database)
        backup = Backup(project.back_up(), project)
        counts = backup.read_metadata()["table_counts"]
        leaves = [line.split("|") for line in database.psql(LEAVES).splitlines()]
        assert counts == {leaf: int(rows) for leaf, rows in leaves}
        script = each_cluster.run("pg_restore", "--file=-", "--data-only", str(backup.dump))
        assert script.count("\nCOPY public.tasks ") == 3, "this pg_dump has another way"
        backup.verify().succeeded()
        with restored(backup.dump, each_cluster) as copy:
            assert copy.schema() == database.schema()
            assert copy.psql(WHOLE_TABLES) == database.psql(WHOLE_TABLES)

        most, least = (choose(counts, key=counts.__getitem__) for choose in (max, min))
        backup.count(**{least: counts[least] + 1})
        assert_differences(backup, {least: (counts[least], counts[least] + 1)})
        backup.edit(table_counts=swapped(counts, most, least))
        found, expected = counts[most], counts[least]
        assert_differences(backup, {most: (found, expected), least: (expected, found)})


# -- what is hashed -------------------------------------------------------------------------------

# Of the reads of the given files by the script itself, threads included: not those of its programs.
STRACE = ("-D", "-qq", "-f", "-b", "execve", "-o", "/dev/null", "-e", "trace=/^preadv")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("retval=0:when=1+", " bytes, read 0 of "),
        ("error=EIO:when=1", ".dump.partial cannot be read: Input/output error\n"),
        ("error=EIO:when=2", ".dump.partial cannot be read: Input/output error\n"),
    ],
    ids=["an early end", "an error at the first read", "an error at the last read"],
)
def test_bytes_that_are_not_hashed_are_missed(
    fault: str, words: str, database: Database, make_project: MakeProject
) -> None:
    """The file system gives our process less than the file, and pg_restore all of it."""
    database.psql(SCHEMA)
    project = make_project(database)
    paths = ("-P", str(project.backups / f".{database.name}_dev.dump.partial"))
    strace = (program("strace", "strace"), *STRACE, *paths, "-e", f"inject=/^preadv:{fault}")
    result = project.run(prefix=strace).failed_with(8, "Verification error")
    assert words in result.stderr, result
    assert not [name for name in published(project.backups) if not name.endswith(".lock")]


@pytest.mark.parametrize("change", ['printf x >>"$dump"', 'truncate --size=-1 "$dump"'])
def test_dump_that_changes_while_it_is_read_back_is_not_published(
    change: str, database: Database, make_project: MakeProject
) -> None:
    """After its last byte was hashed, too: its own --verify would find it damaged."""
    database.psql(SCHEMA)
    project = make_project(database)
    fake_call(project, *CONTENTS, f'for dump; do :; done; "$real" "$@"; {change}')
    project.run().failed_with(8, "Verification error")
    assert not project.dumps()


def threads_of(process: subprocess.Popen[bytes]) -> int:
    return len(list(Path(f"/proc/{process.pid}/task").iterdir()))


def let_the_read_go_on(process: subprocess.Popen[bytes]) -> None:
    """End the strace that delays it."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    tracer = int(status.partition("TracerPid:")[2].split()[0])
    os.kill(tracer, signal.SIGKILL)


def test_byte_that_is_appended_while_the_hash_ends_is_found(
    backup: Backup, make_project: MakeProject
) -> None:
    """Its last read has found no more, and all else has been read."""
    project = make_project()
    fake_call(project, *CONTENTS, '"$real" "$@"; touch "$HOME/paused"')
    late = ("-P", str(backup.dump), "-e", "inject=/^preadv:delay_exit=30000000:when=2")
    strace = program("strace", "strace")
    process = project.start("--verify", backup.dump, prefix=(strace, *STRACE, *late))
    size = backup.dump.stat().st_size
    wait_until(lambda: paused(project))
    wait_until(lambda: threads_of(process) == 2)  # the main thread waits for the hash
    with backup.dump.open("ab") as file:
        file.write(b"x")
    let_the_read_go_on(process)
    result = finish(process).failed_with(8)
    assert re.search(rf"expected {size} bytes, .* of {size + 1}\b", result.stderr), result


def test_hash_and_contents_are_read_at_once(backup: Backup, make_project: MakeProject) -> None:
    """Each has begun before the other has ended."""
    project = make_project()
    fake_call(project, *CONTENTS, HOLD)
    late = ("-P", str(backup.dump), "-e", "inject=/^preadv:delay_enter=30000000:when=1")
    strace = program("strace", "strace")
    process = project.start("--verify", backup.dump, prefix=(strace, *STRACE, *late))
    try:
        wait_until(lambda: paused(project), 20)
        # Two read what pg_restore writes, to stdout and to stderr; one hashes.
        wait_until(lambda: threads_of(process) == 4, 20)
        let_the_read_go_on(process)
        wait_until(lambda: threads_of(process) == 3, 20)
    finally:
        let_go(project)
        result = finish(process)
    result.succeeded()
