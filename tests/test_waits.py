"""What a run waits for: other sessions, prepared transactions, a pg_dump or a count that stands
still. Each wait has an end, which names what was waited for; and what moves is given its time."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import (
    DUMP,
    HOLD,
    STRACE,
    WIDE,
    Phase,
    Proxy,
    assert_nothing_runs,
    backend_of,
    counting,
    dumping,
    fake_call,
    let_go,
    paused,
    sessions_on,
    transaction,
)
from support import (
    Database,
    Project,
    Result,
    assert_restores,
    connect,
    finish,
    new_database,
    program,
    read_metadata,
    wait_until,
)

# A run that has a second for each wait is over by then.
ENDED_SECONDS = 15

OURS, PG_DUMPS = "backup\\_db", "backup\\_db %"  # the application names, as LIKE has them
PG_DUMP_WAITS = f"application_name LIKE '{PG_DUMPS}' AND wait_event_type = 'Lock'"
COPIES = "starts_with(query, 'COPY ')"
WE_WAIT = f"application_name LIKE '{OURS}' AND wait_event_type = 'Lock'"

# A second for each wait, and no long ones in between.
IMPATIENT = {
    "STALL_SECONDS": 1,
    "ANSWER_SECONDS": 0,
    "LOCK_RETRY_SECONDS": 0.1,
}

# In the order in which pg_dump writes them: enough for the file to grow, then a table that nobody
# reads without its TOAST, then a large object.
SCHEMA = f"""
CREATE TABLE messages AS SELECT n AS id, sha512(n::text::bytea)::text AS content
  FROM generate_series(1, 10000) AS n;
CREATE MATERIALIZED VIEW statistics AS SELECT count(*) FROM messages;
{WIDE}
SELECT lo_from_bytea(0, 'large');
"""


@pytest.fixture(scope="module")
def waits(each_cluster: Cluster) -> Iterator[Database]:
    """A database that no test changes."""
    with new_database(each_cluster) as database:
        database.psql(SCHEMA)
        yield database


@pytest.fixture
def patient(waits: Database, make_project: MakeProject) -> Project:
    """A private copy of the script that gives up after one second without movement."""
    return make_project(waits, constants=IMPATIENT)


def gave_up(process: subprocess.Popen[bytes], seconds: str = "1 second") -> Result:
    """The end of a run that has waited as long as it may."""
    result = finish(process, ENDED_SECONDS).failed_with(7, "Backup creation error")
    assert seconds in result.stderr, result
    return result


def hold_pg_dump(project: Project) -> subprocess.Popen[bytes]:
    """A run that holds its locks, and whose pg_dump waits to be let go."""
    fake_call(project, *DUMP, HOLD)
    run = project.start()
    wait_until(lambda: paused(project) or run.poll() is not None)
    return run


# -- other sessions, met in mid-file --------------------------------------------------------------


@pytest.mark.parametrize("waiting", [PG_DUMP_WAITS, WE_WAIT], ids=["pg_dump", "the count"])
def test_rebuilt_index_of_wide_values_is_named(
    waiting: str, waits: Database, patient: Project
) -> None:
    with counting(patient, waits) as process:
        wait_until(lambda: sessions_on(waits, waiting))
        result = gave_up(process)
        named = re.search(
            r"session (\d+) \(postgres, migration: REINDEX TABLE.*pg_terminate_backend\(\1\)",
            result.stderr,
            re.DOTALL,
        )
        assert named, result
        assert_nothing_runs(patient, waits)
    assert not patient.dumps()


def test_pg_dump_that_fails_while_a_count_waits(waits: Database, patient: Project) -> None:
    """Our session is not to be asked then; the cause is sought without it."""
    patient.rewrite({"STALL_SECONDS": 60})
    with counting(patient, waits) as process:
        waits.psql(f"SELECT pg_terminate_backend({backend_of(waits, PG_DUMPS)})")
        result = finish(process, ENDED_SECONDS).failed_with(7, "Backup creation error")
    assert "terminating connection due to administrator command" in result.stderr, result
    assert_nothing_runs(patient, waits)
    assert not patient.dumps()


def test_rebuilt_index_of_wide_values_is_waited_for(
    waits: Database, make_project: MakeProject
) -> None:
    project = make_project(waits)
    with counting(project, waits) as process:
        wait_until(lambda: sessions_on(waits, PG_DUMP_WAITS))
    finish(process).succeeded()
    assert_restores(project.dumps()[0], waits)


def test_parallel_worker_of_pg_dump_is_not_taken_for_it(
    database: Database, make_project: MakeProject
) -> None:
    """It has the same name; on a large catalog pg_dump's queries have some."""
    database.psql(f"ALTER DATABASE {database.name} SET debug_parallel_query = on")
    project = make_project(database)
    sleep = """"$(dirname "$real")/psql" -qc 'SELECT pg_sleep(2)' >&2"""
    fake_call(project, *DUMP, f'{sleep}; exec "$real" "$@"')
    process = project.start()
    wait_until(lambda: len(sessions_on(database, f"application_name LIKE '{PG_DUMPS}'")) == 2)
    now = database.psql("SELECT clock_timestamp()")
    asked = f"application_name LIKE '{OURS}' AND query_start > '{now}'"
    wait_until(lambda: sessions_on(database, asked))
    finish(process).succeeded()


def test_locked_large_objects_are_named(waits: Database, patient: Project) -> None:
    """pg_dump comes to them last; we are through with our counts then."""
    run = hold_pg_dump(patient)
    with transaction(waits, "LOCK TABLE pg_largeobject"):
        let_go(patient)
        result = gave_up(run)
        assert "(postgres, migration: LOCK TABLE" in result.stderr, result
        assert_nothing_runs(patient, waits)
    assert not patient.dumps()


def test_locked_large_objects_are_waited_for(waits: Database, make_project: MakeProject) -> None:
    project = make_project(waits)
    run = hold_pg_dump(project)
    with transaction(waits, "LOCK TABLE pg_largeobject"):
        let_go(project)
        wait_until(lambda: sessions_on(waits, PG_DUMP_WAITS))
    finish(run).succeeded()
    assert_restores(project.dumps()[0], waits)


# -- others, who wait for us meanwhile ------------------------------------------------------------

# None of it is committed, and the table is free of it. pg_dump waits before its first byte, in
# mid-file, behind its last table; our count waits too, or is through.
IN_THE_WAY = {
    "before the first byte": ("REFRESH MATERIALIZED VIEW statistics", "wide"),
    "in mid-file, with our count": ("REINDEX TABLE wide", "messages"),
    "at the end": ("LOCK TABLE pg_largeobject", "messages"),
}
BEGUN = 'echo begun >>"$HOME/begun"'


@pytest.mark.parametrize("phase", IN_THE_WAY)
def test_migration_behind_a_backup_that_waits_is_let_through(
    phase: str, waits: Database, make_project: MakeProject
) -> None:
    """What pg_dump waits for may last; who wants a table of ours waits no longer than a moment."""
    project = make_project(waits)
    fake_call(project, *DUMP, f"{BEGUN}; {HOLD}")
    run = project.start()
    wait_until(lambda: paused(project) or run.poll() is not None)
    in_the_way, table = IN_THE_WAY[phase]
    with transaction(waits, in_the_way):
        let_go(project)
        wait_until(lambda: sessions_on(waits, PG_DUMP_WAITS))
        waits.psql(f"SET lock_timeout = '3s'; BEGIN; LOCK TABLE {table}; COMMIT")
    finish(run).succeeded()
    assert_restores(project.dumps()[0], waits)
    assert (project.directory / "home" / "begun").read_text() == "begun\nbegun\n"


def test_backup_that_nobody_waits_for_waits_in_peace(
    waits: Database, make_project: MakeProject
) -> None:
    """A view that is refreshed all the time is met by every pg_dump: to begin again each time would
    never end."""
    project = make_project(waits)
    fake_call(project, *DUMP, f'{BEGUN}; exec "$real" "$@"')
    refresh = "BEGIN; REFRESH MATERIALIZED VIEW statistics; SELECT pg_sleep(0.5); COMMIT"
    with repeating(waits, refresh):
        refreshes = "query LIKE '%REFRESH%' AND state = 'active' AND wait_event = 'PgSleep'"
        asked = f"SELECT pid FROM pg_stat_activity WHERE {refreshes} AND pid <> pg_backend_pid()"
        wait_until(lambda: waits.psql(asked))
        run = project.start()
        wait_until(lambda: sessions_on(waits, PG_DUMP_WAITS) or run.poll() is not None)
        finish(run).succeeded()
    assert (project.directory / "home" / "begun").read_text() == "begun\n"


def test_administrator_who_cancels_our_lock_makes_us_begin_again(
    waits: Database, make_project: MakeProject
) -> None:
    """While locks are held, a wait for the large objects' table is the only one that is long enough
    to be met."""
    project = make_project(waits, constants={"LOCK_TIMEOUT_MS": 60_000})
    with transaction(waits, "LOCK TABLE pg_largeobject"):
        run = project.start()
        wait_until(lambda: sessions_on(waits, WE_WAIT))
        pid = backend_of(waits, OURS)
        assert waits.psql(f"SELECT pg_cancel_backend({pid})") == "t"
        is_logged = "canceling statement due to user request"
        wait_until(lambda: is_logged in waits.cluster.log.read_text(errors="replace"))
    finish(run).succeeded()
    assert_restores(project.dumps()[0], waits)


# -- tables that are taken all the time -----------------------------------------------------------


@contextlib.contextmanager
def repeating(database: Database, statement: str, sessions: int = 1) -> Iterator[None]:
    """Sessions that run the statement over and over, and none of which waits for long."""
    stop = False

    def repeat() -> None:
        with contextlib.closing(connect(database)) as session, session.cursor() as cursor:
            cursor.execute("SET lock_timeout = '2s'")
            while not stop:
                cursor.execute(statement)

    with ThreadPoolExecutor() as pool:
        running = [pool.submit(repeat) for _ in range(sessions)]
        try:
            yield
        finally:
            stop = True
    for each in running:
        each.result()


@pytest.fixture
def staging(each_cluster: Cluster) -> Iterator[Database]:
    """A database whose table `staging` is filled anew all the time."""
    with new_database(each_cluster) as database:
        database.psql("CREATE TABLE messages (id int); CREATE TABLE staging (id int)")
        yield database


def test_table_that_is_never_free_is_named_with_what_takes_it(
    staging: Database, make_project: MakeProject
) -> None:
    """Somebody else is before us whenever it is let go."""
    constants = {"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.1, "LOCK_TIMEOUT_MS": 50}
    project = make_project(staging, constants=constants)
    with repeating(staging, "TRUNCATE staging; SELECT pg_sleep(0.2)", sessions=2):
        wait_until(lambda: staging.psql("SELECT 1 FROM pg_locks WHERE NOT granted LIMIT 1"))
        result = gave_up(project.start())
    assert "holds the table staging\n" in result.stderr, result
    assert "TRUNCATE" in result.stderr, result


def test_table_that_is_taken_before_pg_dump_locks_it_is_named_with_what_takes_it(
    staging: Database, make_project: MakeProject
) -> None:
    """We get it each time, and each time a TRUNCATE is queued when pg_dump comes: we let go."""
    constants = {"STALL_SECONDS": 3, "LOCK_RETRY_SECONDS": 0.1}
    project = make_project(staging, constants=constants)
    queued = (
        "SELECT 1 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    psql = f"'{project.bin_dir / 'psql'}' --no-psqlrc --tuples-only --command=\"{queued}\""
    is_queued = f'until PGAPPNAME=test {psql} | grep -q 1; do sleep 0.05; done; exec "$real" "$@"'
    fake_call(project, *DUMP, is_queued)
    with repeating(staging, "TRUNCATE staging; SELECT pg_sleep(0.05)"):
        result = finish(project.start(), ENDED_SECONDS).failed_with(7, "Backup creation error")
    assert "TRUNCATE" in result.stderr, result
    assert "staging" in result.stderr, result
    assert not project.dumps()


# -- prepared transactions, and a server with little room -----------------------------------------


@pytest.fixture(scope="module")
def small_cluster(each_cluster: Cluster) -> Iterator[Cluster]:
    """With two-phase commit, few places in its lock table, and a log of every statement."""
    settings = {
        "max_connections": "10",
        "max_prepared_transactions": "2",
        "max_locks_per_transaction": "40",
        "max_worker_processes": "1",
        "autovacuum_max_workers": "1",
        "max_wal_senders": "0",
        "log_statement": "all",
        "log_line_prefix": "%a: ",
    }
    with Cluster(each_cluster.bin_dir, settings=settings) as own:
        yield own


def prepare(database: Database, gid: str, sql: str) -> None:
    """Have a transaction end its session, but not itself."""
    database.psql(f"BEGIN; {sql}; PREPARE TRANSACTION '{gid}'")


@pytest.mark.parametrize(
    ("held", "restarted"),
    [
        ("LOCK TABLE messages", False),
        ("LOCK TABLE messages", True),  # the server tells of it in other terms then
        ("REFRESH MATERIALIZED VIEW statistics", False),
        ("REINDEX TABLE wide", False),
    ],
)
def test_prepared_transaction_is_named_with_its_ways_out(
    held: str, restarted: bool, small_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(small_cluster) as database:
        database.psql(SCHEMA)
        project = make_project(database, constants=IMPATIENT)
        prepare(database, "innocent", "CREATE TABLE later ()")
        prepare(database, "order 4711", held)
        if restarted:
            small_cluster.restart()
        result = finish(project.start(), ENDED_SECONDS)
        database.psql("ROLLBACK PREPARED 'order 4711'")
        database.psql("ROLLBACK PREPARED 'innocent'")
        result.failed_with(7, "Backup creation error")
        assert "gave up after 1 second" in result.stderr, result
        assert "prepared transaction" in result.stderr, result
        assert "ROLLBACK PREPARED 'order 4711'" in result.stderr, result
        assert "COMMIT PREPARED 'order 4711'" in result.stderr, result
        for wrong in ("innocent", "pg_terminate_backend", "None"):
            assert wrong not in result.stderr, result
        assert not project.dumps()
        project.back_up()


def lock_table_room(cluster: Cluster) -> int:
    """For how many tables it has a place (PostgreSQL documentation, max_locks_per_transaction)."""
    return int(
        cluster.psql(
            "SELECT current_setting('max_locks_per_transaction')::int * (1 + sum(setting::int))"
            "  FROM pg_settings"
            " WHERE name IN ('max_connections', 'max_worker_processes', 'max_wal_senders',"
            "                'max_prepared_transactions')"
            # The slots are there whether workers run or not; before 18 there are as many.
            "    OR name = CASE WHEN current_setting('server_version_num')::int < 180000"
            "                   THEN 'autovacuum_max_workers' ELSE 'autovacuum_worker_slots' END"
        )
    )


def make_tables(database: Database, count: int) -> None:
    """Each in a transaction of its own, which needs few locks."""
    name = "format('CREATE TABLE t%s (id int)', n)"
    database.psql(f"SELECT {name} FROM generate_series(1, {count}) AS n \\gexec")


def test_lock_table_with_room_enough_is_not_refused(
    small_cluster: Cluster, make_project: MakeProject
) -> None:
    """Not the last place: some are for the catalogs that pg_dump reads."""
    with new_database(small_cluster) as database:
        tables = lock_table_room(small_cluster) // 2
        make_tables(database, tables)
        dump = make_project(database).back_up()
        assert len(read_metadata(dump)["table_counts"]) == tables


def test_lock_table_with_too_little_room_is_refused_before_the_first_lock(
    small_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(small_cluster) as database:
        make_tables(database, lock_table_room(small_cluster) + 10)
        logged = small_cluster.log.stat().st_size
        project = make_project(database)
        result = project.run().failed_with(7, "Backup creation error")
        assert "max_locks_per_transaction" in result.stderr, result
        with small_cluster.log.open(errors="replace") as log:
            log.seek(logged)
            assert "LOCK TABLE" not in log.read()
        assert not project.dumps()


# -- a pg_dump, or a count, that stands still -----------------------------------------------------


@contextlib.contextmanager
def stopped(process: int) -> Iterator[None]:
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize("phase", [dumping, counting])
def test_pg_dump_whose_backend_stands_still_is_ended(
    phase: Phase, waits: Database, patient: Project
) -> None:
    with contextlib.ExitStack() as stack:
        with phase(patient, waits) as process:
            wait_until(lambda: sessions_on(waits, PG_DUMP_WAITS))
            stack.enter_context(stopped(backend_of(waits, PG_DUMPS)))
        result = gave_up(process)
    assert "pg_dump" in result.stderr, result
    assert_nothing_runs(patient, waits)
    assert not patient.dumps()


def test_stranger_by_the_name_of_pg_dump_is_not_taken_for_it(
    waits: Database, patient: Project
) -> None:
    """The name stands in pg_stat_activity, for all to see."""
    with contextlib.ExitStack() as stack:
        waits.psql("CREATE ROLE stranger LOGIN")
        stack.callback(waits.psql, "DROP ROLE stranger")
        process = stack.enter_context(dumping(patient, waits))
        wait_until(lambda: sessions_on(waits, PG_DUMP_WAITS))
        name = waits.psql(f"SELECT application_name FROM pg_stat_activity WHERE {PG_DUMP_WAITS}")
        borrow = f"SET application_name = '{name.strip()}'"
        stack.enter_context(transaction(waits, borrow, user="stranger"))
        gave_up(process)


@pytest.mark.parametrize(
    ("phase", "lose"), [(dumping, Proxy.fall_silent), (counting, Proxy.forget)]
)
def test_pg_dump_whose_connection_is_lost_unseen_is_ended(
    phase: Phase, lose: Callable[[Proxy], None], waits: Database, patient: Project
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener, waits.cluster) as way:
        port = listener.getsockname()[1]
        fake_call(patient, *DUMP, f'PGPORT={port} exec "$real" "$@"')
        with phase(patient, waits) as process:
            wait_until(lambda: sessions_on(waits, PG_DUMP_WAITS))
            lose(way)
        result = gave_up(process)
    assert "pg_dump" in result.stderr, result
    assert_nothing_runs(patient, waits)
    assert not patient.dumps()


def test_count_that_stands_still_when_pg_dump_has_ended_is_ended(
    waits: Database, patient: Project
) -> None:
    with contextlib.ExitStack() as stack:
        with counting(patient, waits) as process:
            stack.enter_context(stopped(backend_of(waits, OURS)))
        wait_until(lambda: not sessions_on(waits, f"application_name LIKE '{PG_DUMPS}'"))
        gave_up(process)
    assert_nothing_runs(patient, waits)
    assert not patient.dumps()


def test_pg_dump_that_works_on_a_huge_catalog_is_left_in_peace(
    waits: Database, make_project: MakeProject
) -> None:
    """It writes nothing for longer than may pass without movement, but asks one query after the
    other: each takes long to reach the server."""
    project = make_project(waits, constants={"STALL_SECONDS": 1})
    slow = (*STRACE, "-e", "trace=sendto", "-e", "inject=sendto:delay_enter=40000")
    fake_call(project, *DUMP, f'exec {program("strace", "strace")} {" ".join(slow)} "$real" "$@"')
    dump = project.back_up()
    assert read_metadata(dump)["duration_seconds"] > 2
    assert_restores(dump, waits)


def test_signal_is_heard_between_many_small_tables(
    each_cluster: Cluster, make_project: MakeProject
) -> None:
    """No count of one of them lasts as long as a tick."""
    with new_database(each_cluster) as database:
        database.psql(
            "SELECT format('CREATE TABLE t%s AS SELECT 1', n) FROM generate_series(1, 200) AS n"
            " \\gexec"
        )
        slow = (*STRACE, "-f", "-e", "trace=sendto", "-e", "inject=sendto:delay_enter=30000")
        project = make_project(database)
        process = project.start(prefix=(program("strace", "strace"), *slow))
        wait_until(lambda: sessions_on(database, f"application_name LIKE '{OURS}' AND {COPIES}"))
        process.terminate()
        assert finish(process, 3).returncode == -signal.SIGTERM
        assert_nothing_runs(project, database)
