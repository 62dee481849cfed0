"""Functions of a table's owner: they never run as the backup's role, and never stop a backup."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator

import pytest
from cluster import Cluster, ClusterError
from conftest import MakeProject
from faults import DUMP, HOLD, fake_call, let_go, paused
from support import (
    Database,
    Project,
    assert_restores,
    finish,
    new_database,
    read_metadata,
    wait_until,
)

# What the server evaluates while it plans a query, each on the table of that name.
TRAPS = {
    "index_predicate": "CREATE INDEX ON shop.index_predicate (id) WHERE {call}",
    "index_expression": "CREATE INDEX ON shop.index_expression (({call}))",
    "statistics": "CREATE STATISTICS shop.trap ON ({call}), id FROM shop.statistics",
}
ROWS = {"index_predicate": 1, "index_expression": 2, "statistics": 3}

# Declared immutable, `evil` is called with constants as soon as a query over the table is planned,
# as the role that asks. A role that may run programs on the server leaves a file there: a
# transaction that only reads is no protection.
TRAPPED = """
CREATE FUNCTION shop.leave_mark(mark text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('COPY (SELECT 1) TO PROGRAM %L', 'cat > {marks}.' || mark);
EXCEPTION WHEN insufficient_privilege THEN
    RETURN;  -- the owner's own CREATE INDEX calls it too
END $$;
CREATE FUNCTION shop.evil(mark text, number int) RETURNS bool LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    PERFORM shop.leave_mark(mark);
    RETURN true;
END $$;
"""


def fill(table: str) -> str:
    return (
        f"CREATE TABLE shop.{table} (id int);"
        f" INSERT INTO shop.{table} SELECT generate_series(1, {ROWS[table]})"
    )


@pytest.fixture
def owner(each_cluster: Cluster) -> Iterator[str]:
    """A role that may do nothing but what an owner may."""
    name = f"owner_{uuid.uuid4().hex[:12]}"
    each_cluster.psql(f"CREATE ROLE {name} LOGIN")
    yield name
    each_cluster.psql(f"DROP ROLE {name}")


@pytest.fixture
def shop(each_cluster: Cluster, owner: str) -> Iterator[Database]:
    """A database with tables of the owner's; no trap is set yet."""
    with new_database(each_cluster) as database:
        database.psql(f"CREATE SCHEMA shop AUTHORIZATION {owner}")
        database.psql(";".join(map(fill, TRAPS)), owner)
        database.psql(TRAPPED.format(marks=each_cluster.directory / database.name), owner)
        yield database


def set_traps(shop: Database, owner: str) -> None:
    for table, trap in TRAPS.items():
        shop.psql(trap.format(call=f"shop.evil('{table}', 1)"), owner)


def marks(shop: Database) -> set[str]:
    """The tables whose trap has sprung."""
    return {path.suffix[1:] for path in shop.cluster.directory.glob(f"{shop.name}.*")}


def assert_no_trap_sprang(shop: Database) -> None:
    assert marks(shop) == set()
    # They were set: any query of the backup's role springs them.
    for table in TRAPS:
        shop.psql(f"BEGIN READ ONLY; SELECT count(*) FROM shop.{table}")
    assert marks(shop) == set(TRAPS)


def hold_pg_dump(project: Project) -> subprocess.Popen[bytes]:
    """A run that holds its locks, and whose pg_dump waits to be let go."""
    fake_call(project, *DUMP, HOLD)
    run = project.start()
    wait_until(lambda: paused(project) or run.poll() is not None)
    return run


def test_function_that_was_there_before_never_runs(
    shop: Database, owner: str, make_project: MakeProject
) -> None:
    set_traps(shop, owner)
    dump = make_project(shop).back_up()
    assert_no_trap_sprang(shop)
    assert read_metadata(dump)["table_counts"] == {f"shop.{key}": n for key, n in ROWS.items()}
    assert_restores(dump, shop)


def test_function_that_comes_while_the_tables_are_locked_never_runs(
    shop: Database, owner: str, make_project: MakeProject
) -> None:
    """No look beforehand would find it: CREATE INDEX does not wait for a lock to read."""
    project = make_project(shop)
    run = hold_pg_dump(project)
    set_traps(shop, owner)
    let_go(project)
    finish(run).succeeded()
    assert_no_trap_sprang(shop)
    (dump,) = project.dumps()
    assert read_metadata(dump)["table_counts"] == {f"shop.{key}": n for key, n in ROWS.items()}


# -- functions that fail --------------------------------------------------------------------------

# Whoever reads somebody else's database empties search_path, as pg_dump does: `fold` is not found
# then. A function in SQL is inlined, and so parsed, when a query is planned; others are called then
# where all they are given is constant. And what PUBLIC may not execute, a mere reader may not.
FAILING = """
CREATE FUNCTION fold(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT lower($1)';
CREATE FUNCTION inlined(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT $1';
CREATE FUNCTION called(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN $1; END';
CREATE FUNCTION revoked(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN $1; END';

CREATE TABLE inlined_index AS SELECT 'a' AS word FROM generate_series(1, 4);
CREATE INDEX ON inlined_index (inlined(word));
CREATE TABLE inlined_statistics AS SELECT 'a' AS word, 1 AS id FROM generate_series(1, 5);
CREATE STATISTICS folded ON inlined(word), id FROM inlined_statistics;
CREATE TABLE called_predicate AS SELECT 'a' AS word FROM generate_series(1, 6);
CREATE INDEX ON called_predicate (word) WHERE called('a') = 'a';
CREATE TABLE revoked_predicate AS SELECT 'a' AS word FROM generate_series(1, 7);
CREATE INDEX ON revoked_predicate (word) WHERE revoked('a') = 'a';
CREATE TABLE revoked_index AS SELECT 'a' AS word FROM generate_series(1, 8);
CREATE INDEX ON revoked_index (revoked('a'), word);

-- Only now: 17 does not make such an index any more, but an upgrade brings it along.
CREATE OR REPLACE FUNCTION inlined(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT fold($1)';
CREATE OR REPLACE FUNCTION called(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS
    'BEGIN RETURN fold($1); END';
REVOKE EXECUTE ON FUNCTION revoked FROM PUBLIC;
"""
FAILING_COUNTS = {
    "inlined_index": 4,
    "inlined_statistics": 5,
    "called_predicate": 6,
    "revoked_predicate": 7,
    "revoked_index": 8,
}


@pytest.fixture
def reader(each_cluster: Cluster) -> Iterator[str]:
    """A role for backups that may read everything, and is no superuser."""
    name = f"reader_{uuid.uuid4().hex[:12]}"
    each_cluster.psql(
        f"CREATE ROLE {name} LOGIN PASSWORD 'secret'; GRANT pg_read_all_data TO {name}"
    )
    yield name
    each_cluster.psql(f"DROP ROLE {name}")


def test_function_that_fails_is_not_in_the_way(
    each_cluster: Cluster, reader: str, make_project: MakeProject
) -> None:
    with new_database(each_cluster) as database, new_database(each_cluster) as copy:
        database.psql(FAILING)
        each_cluster.run("pg_dump", "--file=/dev/null", database=database.name, user=reader)
        for table in FAILING_COUNTS:
            with pytest.raises(ClusterError, match=r"does not exist|permission denied"):
                database.psql(f"SET search_path = ''; SELECT count(*) FROM public.{table}", reader)
        dump = make_project(database, settings=database.settings(reader, "secret")).back_up()
        assert read_metadata(dump)["table_counts"] == FAILING_COUNTS
        # Without the indexes: who makes them has to mend the functions first.
        rows = ("--exit-on-error", "--section=pre-data", "--section=data")
        each_cluster.run("pg_restore", *rows, f"--dbname={copy.name}", str(dump))
        assert copy.contents() == database.contents()
