"""One moment of the database, whatever writers and migrations do meanwhile."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import WIDE, wait_for_refusals
from psycopg2.extensions import connection as Connection  # noqa: N812 - a class, oddly named
from support import (
    Database,
    Project,
    assert_restores,
    connect,
    finish,
    new_database,
    read_metadata,
    restored,
    wait_until,
)

ROWS = 100

# A table in its usual company. Whatever a migration does below, it leaves ROWS rows.
SCHEMA = f"""
CREATE SCHEMA chat;
CREATE TABLE chat.messages (id int, content text);
INSERT INTO chat.messages SELECT n, 'old' FROM generate_series(1, {ROWS}) AS n;
CREATE VIEW chat.recent AS SELECT id FROM chat.messages;
CREATE SEQUENCE chat.numbers;
CREATE SEQUENCE chat."data is corrupt";
CREATE TABLE chat.parted (id int) PARTITION BY RANGE (id);
CREATE TABLE chat.part PARTITION OF chat.parted DEFAULT;
"""

# Commits that come after the snapshot and before pg_dump looks. Of the first four, those who
# lock nothing before their snapshot dump an empty table, and exit with 0.
MIGRATIONS = {
    "TRUNCATE": f"""
        BEGIN; TRUNCATE chat.messages;
        INSERT INTO chat.messages SELECT n, 'new' FROM generate_series(1, {ROWS}) AS n; COMMIT""",
    "ALTER TYPE": "ALTER TABLE chat.messages ALTER content TYPE bytea USING content::bytea",
    "ADD COLUMN with rewrite": "ALTER TABLE chat.messages ADD at float DEFAULT random()",
    "DROP and CREATE": f"""
        BEGIN; DROP TABLE chat.messages CASCADE;
        CREATE TABLE chat.messages AS SELECT n FROM generate_series(1, {ROWS}) AS n; COMMIT""",
    "RENAME": "ALTER TABLE chat.messages RENAME TO letters",
    "RENAME of the schema": "ALTER SCHEMA chat RENAME TO talk",
    "DROP VIEW": "DROP VIEW chat.recent",
    "DROP SEQUENCE": "DROP SEQUENCE chat.numbers",
    "DROP SEQUENCE by the name of damage": 'DROP SEQUENCE chat."data is corrupt"',
    "RENAME of a partitioned table": "ALTER TABLE chat.parted RENAME TO divided",
}


class Background:
    """Statements that wait for a lock, each in a thread of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pool = ThreadPoolExecutor()
        self._begun: list[Future[str]] = []

    def psql(self, sql: str) -> Future[str]:
        self._begun.append(self._pool.submit(self._database.psql, sql))
        return self._begun[-1]

    def close(self) -> None:
        """Wait for all of them; each must have succeeded."""
        self._pool.shutdown()
        for statement in self._begun:
            statement.result()


@pytest.fixture
def background(request: pytest.FixtureRequest) -> Iterator[Callable[[Database], Background]]:
    del request
    with ExitStack() as stack:
        yield lambda database: stack.enter_context(closing(Background(database)))


@pytest.fixture
def chat(each_cluster: Cluster) -> Iterator[Database]:
    with new_database(each_cluster) as database:
        database.psql(SCHEMA)
        yield database


@pytest.fixture
def observer(chat: Database) -> Iterator[Connection]:
    """A session to look at the others with."""
    with closing(connect(chat)) as session:
        yield session


def execute(session: Connection, sql: str) -> list[tuple[object, ...]]:
    with session.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


def sessions(observer: Connection, condition: str) -> list[tuple[object, ...]]:
    """When the last query of the session for which `condition` holds began; empty if none does."""
    return execute(
        observer,
        "SELECT query_start FROM pg_stat_activity"
        f" WHERE datname = current_database() AND {condition}",
    )


def waiting(observer: Connection, condition: str) -> list[tuple[object, ...]]:
    """Since when the session for which `condition` holds waits for a lock; empty if none does."""
    return sessions(observer, f"wait_event_type = 'Lock' AND {condition}")


def wait_for(observer: Connection, condition: str) -> object:
    """Wait until it waits; since when it does."""
    found: list[tuple[object, ...]] = []

    def look() -> bool:
        found.extend(waiting(observer, condition))
        return bool(found)

    wait_until(look)
    return found[0][0]


OUR_COUNT = "application_name = 'backup_db' AND query LIKE 'COPY %'"
PG_DUMP = "application_name LIKE 'backup_db %'"


def table_counts(dump: Path) -> dict[str, int]:
    counts = read_metadata(dump)["table_counts"]
    assert isinstance(counts, dict)
    return counts


def start_late(project: Project) -> tuple[subprocess.Popen[bytes], Path]:
    """A run whose first pg_dump waits for the file; the snapshot is taken by then."""
    started, go = project.directory / "started", project.directory / "go"
    project.fake(
        "pg_dump",
        f"""
        case $* in *--snapshot=*)
            if mkdir '{started}' 2>/dev/null; then
                while ! [ -e '{go}' ]; do sleep 0.02; done
            fi ;;
        esac
        exec "$real" "$@"
        """,
    )
    run = project.start()
    wait_until(lambda: started.exists() or run.poll() is not None)
    return run, go


# -- writers --------------------------------------------------------------------------------------


def test_tables_written_in_one_transaction_are_equal_in_every_backup(
    each_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(each_cluster) as database:
        database.psql("CREATE TABLE debit (n int); CREATE TABLE credit (n int);")
        stop = threading.Event()

        def write() -> None:
            with closing(connect(database)) as session:
                while not stop.is_set():
                    both = "INSERT INTO debit VALUES (1); INSERT INTO credit VALUES (1)"
                    execute(session, f"BEGIN; {both}; COMMIT")
                    execute(session, "BEGIN; DELETE FROM debit; ROLLBACK")

        project = make_project(database)
        with ThreadPoolExecutor() as pool:
            writers = [pool.submit(write) for _ in range(2)]
            try:
                dumps = [project.back_up() for _ in range(3)]
            finally:
                stop.set()
        for writer in writers:
            writer.result()
        previous = 0
        for dump in dumps:
            counts = table_counts(dump)
            assert counts["debit"] == counts["credit"] > previous
            previous = counts["debit"]
            with restored(dump, each_cluster) as copy:
                for table in ("debit", "credit"):
                    assert copy.psql(f"SELECT count(*) FROM {table}") == str(previous)


# -- migrations between our snapshot and pg_dump's locks ------------------------------------------


@pytest.mark.parametrize("migration", MIGRATIONS)
def test_rows_are_there_whatever_comes_before_pg_dump_looks(
    migration: str,
    chat: Database,
    observer: Connection,
    make_project: MakeProject,
    background: Callable[[Database], Background],
) -> None:
    project = make_project(chat, constants={"DUMP_LOCK_TIMEOUT": "500ms"})
    run, go = start_late(project)
    migrating = background(chat).psql(MIGRATIONS[migration])
    # It is done, or it waits for our locks: DDL that is queued behind them when pg_dump comes.
    wait_until(lambda: migrating.done() or waiting(observer, "application_name = 'psql'"))
    go.touch()
    finish(run).succeeded()
    migrating.result()
    (dump,) = project.dumps()
    counts = table_counts(dump)
    assert [rows for key, rows in counts.items() if key.endswith(("messages", "letters"))] == [ROWS]
    assert_restores(dump, chat)


# Two schemas that swap their names, after pg_dump and before our count have come to them.
SWAPPING = f"""
{WIDE}
CREATE SCHEMA live;
CREATE TABLE live.orders AS SELECT 1 AS id;
CREATE SCHEMA staged;
CREATE TABLE staged.orders AS SELECT 'x' AS name FROM generate_series(1, 2);
"""
SWAP = """
BEGIN;
ALTER SCHEMA live RENAME TO old;
ALTER SCHEMA staged RENAME TO live;
ALTER SCHEMA old RENAME TO staged;
COMMIT;
"""


def test_tables_that_take_each_others_places_before_they_are_counted(
    chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    """The one by that name does not even have the column that is counted by: once again."""
    chat.psql(SWAPPING)
    project = make_project(chat, constants={"LOCK_RETRY_SECONDS": 0.1})
    with closing(connect(chat)) as session:
        execute(session, "BEGIN; REINDEX TABLE wide")
        run = project.start()
        for counter in (OUR_COUNT, PG_DUMP):
            wait_for(observer, counter)
        chat.psql(SWAP)
        execute(session, "COMMIT")
    finish(run).succeeded()
    (dump,) = project.dumps()
    assert table_counts(dump)["live.orders"] == 2
    assert_restores(dump, chat)


@pytest.mark.parametrize(
    "error",
    [
        "could not open relation with OID 4711",
        # The server's disk, not ours.
        'query failed: ERROR:  could not write to file "base/pgsql_tmp": No space left on device',
    ],
)
def test_pg_dump_that_keeps_failing_is_tried_three_times(
    error: str, chat: Database, make_project: MakeProject
) -> None:
    project = make_project(chat)
    tries = project.directory / "tries"
    project.fake(
        "pg_dump",
        f"""
        case $* in *--snapshot=*)
            echo tried >> '{tries}'
            echo 'pg_dump: error: {error}' >&2
            exit 1 ;;
        esac
        exec "$real" "$@"
        """,
    )
    result = project.run().failed_with(7, "Backup creation error")
    assert f"Error: pg_dump: error: {error}\n" in result.stderr
    assert tries.read_text().splitlines() == 3 * ["tried"]
    assert not project.dumps()


# The list of tables is made, and its session rests before it locks them.
LISTED = {"LOCK_ROOM": "SELECT 1000 FROM pg_sleep(1)", "LOCK_RETRY_SECONDS": 0.1}
IS_LISTED = "wait_event = 'PgSleep'"


def test_table_created_between_the_locks_and_the_snapshot_is_in(
    chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    project = make_project(chat, constants=LISTED)
    run = project.start()
    wait_until(lambda: sessions(observer, IS_LISTED))
    chat.psql("CREATE TABLE chat.newest AS SELECT * FROM generate_series(1, 2)")
    finish(run).succeeded()
    (dump,) = project.dumps()
    assert table_counts(dump)["chat.newest"] == 2
    assert_restores(dump, chat)


@pytest.mark.parametrize(
    ("migration", "rows"),
    [
        ("DROP TABLE chat.messages CASCADE", None),
        ("DROP SCHEMA chat CASCADE", None),
        # The number of tables is what it was, and so are their names.
        ("DROP TABLE chat.messages CASCADE; CREATE TABLE chat.messages AS SELECT 1 AS id", 1),
    ],
    ids=["table", "schema", "table that is made anew"],
)
def test_what_is_dropped_while_it_is_being_locked_is_not_in(
    migration: str,
    rows: int | None,
    chat: Database,
    observer: Connection,
    make_project: MakeProject,
) -> None:
    """There is nothing to lock by then: once again."""
    chat.psql("CREATE TABLE stays AS SELECT 1 AS n")
    project = make_project(chat, constants=LISTED)
    run = project.start()
    wait_until(lambda: sessions(observer, IS_LISTED))
    chat.psql(migration)
    finish(run).succeeded()
    (dump,) = project.dumps()
    assert table_counts(dump).get("chat.messages") == rows
    assert_restores(dump, chat)


# -- migrations that hold a table when we come ----------------------------------------------------


def test_backup_waits_until_a_migration_lets_go(
    chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    project = make_project(chat, constants={"LOCK_RETRY_SECONDS": 0.1})
    since = chat.cluster.log.stat().st_size
    with closing(connect(chat)) as migration:
        execute(migration, "BEGIN; LOCK TABLE chat.messages; DELETE FROM chat.messages")
        run = project.start()
        wait_for_refusals(chat, since, 2)
        assert not waiting(observer, "application_name LIKE 'backup\\_db%'")
        execute(migration, "COMMIT")
    finish(run).succeeded()
    assert table_counts(project.dumps()[0])["chat.messages"] == 0


@pytest.mark.parametrize(
    ("held", "options", "doing"),
    [
        ("chat.messages", "", ": BEGIN …"),
        ("chat.parted", "", ": BEGIN …"),
        ("pg_largeobject", "", ": BEGIN …"),
        ("chat.messages", "-c role=pg_read_all_data", ""),  # who may not see what others do
    ],
)
def test_backup_gives_up_and_names_the_session_that_holds_the_table(
    held: str, options: str, doing: str, chat: Database, make_project: MakeProject
) -> None:
    limits = {"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.1}
    project = make_project(chat, settings={"PGOPTIONS": options}, constants=limits)
    with closing(connect(chat)) as migration:
        execute(migration, "SET application_name = 'nightly migration'")
        execute(migration, f"BEGIN; LOCK TABLE ONLY {held}")
        result = project.run().failed_with(7, "Backup creation error")
        pid = migration.info.backend_pid
    assert (
        "gave up after 1 second: the tables could not be locked for reading: "
        f"session {pid} (postgres, nightly migration{doing}) "
        f"holds the table {held}\n"
    ) in result.stderr, result
    assert not project.dumps()


@pytest.mark.parametrize("held", ["chat.part", "chat.parted", "chat.messages"])
def test_migration_that_wants_more_is_not_the_victim_of_a_deadlock(
    held: str, chat: Database, make_project: MakeProject
) -> None:
    """It holds one table and wants another, which the backup has for no longer than it takes to be
    refused the first."""
    project = make_project(chat, constants={"LOCK_RETRY_SECONDS": 0.01})
    since = chat.cluster.log.stat().st_size
    chat.psql("CREATE TABLE chat.last ()")  # refused when it has all others
    with closing(connect(chat)) as migration:
        execute(migration, "SET deadlock_timeout = '1ms'")
        execute(migration, "BEGIN; LOCK TABLE ONLY chat.last")
        run = project.start()
        for number in range(1, 4):
            wait_for_refusals(chat, since, 5 * number)
            execute(migration, "SAVEPOINT more; SET LOCAL lock_timeout = '2s'")
            execute(migration, f"LOCK TABLE {held}")  # no "deadlock detected"
            execute(migration, "ROLLBACK TO more")
        execute(migration, "COMMIT")
    finish(run).succeeded()
    assert_restores(project.dumps()[0], chat)


def test_backup_that_is_the_victim_of_a_deadlock_begins_again(
    chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    """It would have let go of its locks before the server looks for deadlocks, were it not for its
    limit on a wait for the large objects' table."""
    chat.psql(f"ALTER DATABASE {chat.name} SET deadlock_timeout = '1s'")
    project = make_project(chat, constants={"LOCK_TIMEOUT_MS": 60_000})
    since = chat.cluster.log.stat().st_size
    with closing(connect(chat)) as migration:
        execute(migration, "SET deadlock_timeout = '60s'")
        execute(migration, "BEGIN; LOCK TABLE pg_largeobject")
        run = project.start()
        wait_for(observer, "application_name = 'backup_db'")
        execute(migration, "LOCK TABLE chat.messages")  # which the backup has, until it is refused
        with chat.cluster.log.open(errors="replace") as log:
            log.seek(since)
            _before, found, refused = log.read().rpartition("ERROR:  deadlock detected\n")
        assert found
        assert "STATEMENT:  SELECT pg_relation_size(2613)" in refused
        execute(migration, "COMMIT")
    finish(run).succeeded()
    assert_restores(project.dumps()[0], chat)


def test_application_does_not_wait_while_we_wait_for_large_objects(
    chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    """Somebody has locked their table, as VACUUM FULL does; no lock of ours outlasts that wait."""
    project = make_project(chat)
    with closing(connect(chat)) as vacuum:
        execute(vacuum, "BEGIN; LOCK TABLE pg_largeobject")
        run = project.start()
        wait_for(observer, "application_name = 'backup_db'")
        chat.psql("SET lock_timeout = '3s'; ALTER TABLE chat.messages ADD more int")
        execute(vacuum, "COMMIT")
    finish(run).succeeded()
    assert_restores(project.dumps()[0], chat)


@pytest.mark.parametrize(
    ("held", "options"),
    [
        ("ALTER VIEW chat.recent RENAME TO latest", ""),
        ("ALTER SEQUENCE chat.numbers OWNER TO CURRENT_USER", ""),
        # As by ALTER ROLE … SET role: then pg_stat_activity hides even our own sessions from us.
        ("ALTER VIEW chat.recent RENAME TO latest", "-c role=pg_read_all_data"),
    ],
)
def test_migration_that_pg_dump_waits_for_is_not_the_victim_of_a_deadlock(
    held: str, options: str, chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    """It holds what cannot be locked beforehand, and wants a table that pg_dump has."""
    project = make_project(chat, settings={"PGOPTIONS": options})
    with closing(connect(chat)) as migration:
        execute(migration, f"BEGIN; {held}")
        run = project.start()
        wait_for(observer, PG_DUMP)
        # pg_dump's own look for deadlocks is over: whoever comes now is the victim.
        wait_until(lambda: waiting(observer, f"{PG_DUMP} AND now() > query_start + '1.1 s'"))
        execute(migration, "ALTER TABLE chat.messages ADD more int")  # no "deadlock detected"
        execute(migration, "COMMIT")
    finish(run).succeeded()
    assert_restores(project.dumps()[0], chat)


# -- what pg_dump waits for -----------------------------------------------------------------------


def test_pg_dump_that_waits_for_ever_is_ended_and_the_blocker_named(
    chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    """--lock-wait-timeout does not cover what pg_dump waits for here."""
    chat.psql("CREATE MATERIALIZED VIEW chat.total AS SELECT count(*) FROM chat.messages")
    project = make_project(chat, constants={"STALL_SECONDS": 1})
    with closing(connect(chat)) as session:
        execute(session, "BEGIN; REFRESH MATERIALIZED VIEW chat.total")
        result = project.run().failed_with(7, "Backup creation error")
        pid = session.info.backend_pid
        assert f"session {pid} (postgres: BEGIN …) blocks it" in result.stderr, result
        assert f"-c 'SELECT pg_terminate_backend({pid});'" in result.stderr, result
        assert not project.dumps()
        wait_until(lambda: not waiting(observer, PG_DUMP))
        execute(session, "COMMIT")
    assert_restores(project.back_up(), chat)


def test_pg_dump_may_wait_for_a_while(
    chat: Database, observer: Connection, make_project: MakeProject
) -> None:
    chat.psql("CREATE MATERIALIZED VIEW chat.total AS SELECT count(*) FROM chat.messages")
    project = make_project(chat)
    with closing(connect(chat)) as session:
        execute(session, "BEGIN; REFRESH MATERIALIZED VIEW chat.total")
        run = project.start()
        wait_for(observer, PG_DUMP)
        execute(session, "COMMIT")
    finish(run).succeeded()
    assert_restores(project.dumps()[0], chat)
