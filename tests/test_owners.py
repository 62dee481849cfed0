"""Functions of an owner, of a table, a schema or the database: they never run as the backup's role,
and never stop a backup."""

from __future__ import annotations

import re
import subprocess
import uuid
from collections.abc import Iterator
from functools import partial

import pytest
from cluster import Cluster, ClusterError
from conftest import MakeProject
from faults import DUMP, HOLD, WIDE, fake_call, let_go, paused, sessions_on, transaction
from support import (
    Database,
    Project,
    Terminal,
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


# -- a view in a table's place --------------------------------------------------------------------

# pg_dump and our count come first to a table that nobody reads without its TOAST. The owner has a
# second schema, with a view where the first has a table.
DECOY = f"""
CREATE SCHEMA first;
SET search_path = first;
{WIDE}
CREATE SCHEMA live;
CREATE TABLE live.orders AS SELECT 1 AS id;
CREATE SCHEMA decoy;
CREATE VIEW decoy.orders AS SELECT 1 AS id WHERE shop.evil('orders', 1);
"""
SWAP = """
BEGIN;
ALTER SCHEMA live RENAME TO old;
ALTER SCHEMA decoy RENAME TO live;
ALTER SCHEMA old RENAME TO decoy;
COMMIT;
"""


WAITS = "wait_event_type = 'Lock'"


@pytest.mark.parametrize("belongs_to_extension", [False, True], ids=["plain", "of an extension"])
def test_function_of_a_view_that_takes_a_tables_place_never_runs(
    belongs_to_extension: bool, shop: Database, owner: str, make_project: MakeProject
) -> None:
    """An extension's rows are chosen by a condition, and so read by a query that is planned."""
    shop.psql(f"ALTER DATABASE {shop.name} OWNER TO {owner}")
    shop.psql(DECOY, owner)
    if belongs_to_extension:
        shop.psql(IN_EXTENSION.format(table="live.orders"))
    project = make_project(shop, constants={"LOCK_RETRY_SECONDS": 0.1})
    with transaction(shop, "REINDEX TABLE first.wide"):
        run = project.start()
        for session in ("backup\\_db", "backup\\_db %"):
            wait_until(partial(sessions_on, shop, f"application_name LIKE '{session}' AND {WAITS}"))
        shop.psql(SWAP, owner)
    result = finish(run)
    assert marks(shop) == set()
    result.succeeded()
    shop.psql("BEGIN READ ONLY; SELECT * FROM live.orders")
    assert marks(shop) == {"orders"}  # it was set


# Whatever extension this server can have, as if its script had called pg_extension_config_dump.
IN_EXTENSION = """
SELECT name AS extension FROM pg_available_extensions WHERE name IN ('hstore', 'vector') \\gset
CREATE EXTENSION :extension SCHEMA public;
ALTER EXTENSION :extension ADD TABLE {table};
UPDATE pg_extension
   SET extconfig = ARRAY['{table}'::regclass::oid], extcondition = ARRAY['WHERE id > 0']
 WHERE extname = :'extension';
"""

# -- a search_path that leads to the owner's operators --------------------------------------------

# Found before pg_catalog's own, by whoever does not say which he means. What they do is harmless
# to the query, so that it goes on and shows nothing.
EVIL = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.rise() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM shop.leave_mark('search_path');
    ALTER ROLE {owner} SUPERUSER;
EXCEPTION WHEN insufficient_privilege OR read_only_sql_transaction THEN
    RETURN;
END $$;
SELECT format('
    CREATE FUNCTION evil.%1$s_equal(a pg_catalog.%1$s, b pg_catalog.%1$s) RETURNS bool
    LANGUAGE plpgsql AS $f$ BEGIN PERFORM evil.rise(); RETURN a OPERATOR(pg_catalog.=) b; END $f$;
    CREATE OPERATOR evil.= (FUNCTION = evil.%1$s_equal,
                            LEFTARG = pg_catalog.%1$s, RIGHTARG = pg_catalog.%1$s);
    CREATE DOMAIN evil.%1$s AS pg_catalog.%1$s CHECK (evil.rise() IS NOT NULL);', name)
  FROM unnest('{{oid,name,text,bool,int4,int8}}'::text[]) AS name \\gexec
ALTER DATABASE {database} SET search_path = evil, pg_catalog;
"""


@pytest.fixture
def evil_shop(shop: Database, owner: str) -> Database:
    shop.psql("CREATE TABLE messages (id int); CREATE MATERIALIZED VIEW total AS SELECT 1")
    shop.psql(f"ALTER DATABASE {shop.name} OWNER TO {owner}")
    shop.psql(EVIL.format(owner=owner, database=shop.name), owner)
    return shop


def assert_owner_did_not_rise(shop: Database, owner: str) -> None:
    assert marks(shop) == set()
    is_superuser = f"SELECT rolsuper FROM pg_roles WHERE rolname = '{owner}'"
    assert shop.cluster.psql(is_superuser) == "f"
    # It was set: any query that compares springs it.
    shop.psql("BEGIN READ ONLY; SELECT FROM pg_class WHERE relname = relname LIMIT 1")
    assert marks(shop) == {"search_path"}


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ("LOCK TABLE public.messages", "holds the table"),
        ("REFRESH MATERIALIZED VIEW public.total", "blocks"),
    ],
)
def test_operator_of_the_owner_never_runs_when_a_wait_ends(
    held: str, words: str, evil_shop: Database, owner: str, make_project: MakeProject
) -> None:
    constants = {"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.1}
    project = make_project(evil_shop, constants=constants)
    with transaction(evil_shop, f"SET search_path = pg_catalog; {held}"):
        result = project.run().failed_with(7, "Backup creation error")
    assert words in result.stderr, result
    assert_owner_did_not_rise(evil_shop, owner)


def test_operator_of_the_owner_never_runs_while_a_terminal_shows_a_wait(
    evil_shop: Database, owner: str, make_project: MakeProject
) -> None:
    project = make_project(evil_shop, constants={"LOCK_RETRY_SECONDS": 0.1})
    with Terminal(project, columns=200) as terminal:
        with transaction(evil_shop, "SET search_path = pg_catalog; LOCK TABLE public.messages"):
            wait_until(lambda: "Waiting: session " in terminal.shown)
        status, left = terminal.finish()
    assert status == 0, left
    assert_owner_did_not_rise(evil_shop, owner)


# -- every statement of ours ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def logging_cluster(each_cluster: Cluster) -> Iterator[Cluster]:
    """A server that logs every statement."""
    settings = {"log_statement": "all", "log_line_prefix": "%a|%p|"}
    with Cluster(each_cluster.bin_dir, settings=settings) as own:
        yield own


def statements_of_ours(cluster: Cluster) -> dict[str, list[str]]:
    """What each of our sessions has sent, in this order; pg_dump's have longer names."""
    log = cluster.log.read_text(encoding="utf-8", errors="replace")
    found: dict[str, list[str]] = {}
    for entry in re.finditer(
        r"^backup_db\|(\d+)\|LOG:  statement: (.*(?:\n\t.*)*)", log, re.MULTILINE
    ):
        found.setdefault(entry[1], []).append(entry[2].strip())
    return found


BEGIN_READ_ONLY = re.compile(r"BEGIN\b[^;]*\bREAD ONLY;.*\bSET LOCAL search_path = ''", re.DOTALL)


def test_every_statement_of_ours_only_reads_and_finds_nothing_by_search_path(
    logging_cluster: Cluster, make_project: MakeProject
) -> None:
    """Of whatever session: the one of a run, those that look for the cause of a failure."""
    constants = {"STALL_SECONDS": 1, "ANSWER_SECONDS": 0, "LOCK_RETRY_SECONDS": 0.1}
    with new_database(logging_cluster) as database:
        database.psql(
            "CREATE TABLE messages AS SELECT n FROM generate_series(1, 50000) AS n;"
            f"CREATE MATERIALIZED VIEW total AS SELECT 1; {WIDE}"
        )
        project = make_project(database, constants=constants)
        project.back_up()
        for held in (
            "LOCK TABLE messages",
            "REFRESH MATERIALIZED VIEW total",
            "REINDEX TABLE wide",
        ):
            with transaction(database, held):
                project.run().failed_with(7)
        project.run(env={"DEV_DB_NAME": "missing"}).failed_with(3)
        fake_call(project, *DUMP, "exit 1")
        project.run().failed_with(7)

    sessions = statements_of_ours(logging_cluster)
    assert len(sessions) > 6, sessions
    sent = "\n".join(statement for statements in sessions.values() for statement in statements)
    for expected in ("LOCK TABLE", "COPY ", "pg_stat_activity", "pg_database", "pg_locks"):
        assert expected in sent, expected
    for statements in sessions.values():
        in_transaction = False
        for statement in statements:
            if statement.startswith("BEGIN"):
                assert BEGIN_READ_ONLY.match(statement), statement
                in_transaction = True
            elif statement in {"COMMIT", "ROLLBACK"}:
                in_transaction = False
            elif statement != "SELECT pg_catalog.pg_backend_pid()":
                assert in_transaction, statement


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
