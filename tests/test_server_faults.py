"""What the server can do to a run: crash, hang up, fall silent, be full, be busy."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import (
    PHASES,
    WIDE,
    Phase,
    assert_nothing_runs,
    backend_of,
    counting,
    dumping,
    processes_in,
    sessions_on,
    transaction,
    untouched,
    waiting_for_a_lock,
)
from sample import DATABASE, PASSWORD, USER, load_sample
from support import MOUNTING, Database, Project, Result, finish, wait_until

# How long a run that was struck may take to notice, where it waits for no time limit.
NOTICED_SECONDS = 15

OURS, PG_DUMPS = "backup\\_db", "backup\\_db %"  # the application names, as LIKE has them


# -- sessions that are ended ----------------------------------------------------------------------


@pytest.mark.parametrize("phase", [waiting_for_a_lock, counting, dumping])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("pg_terminate_backend", "the connection to the server was lost while"),
        ("pg_cancel_backend", "canceling statement due to user request"),
    ],
)
def test_our_session_is_ended(
    phase: Phase, function: str, words: str, standing: Project, standing_database: Database
) -> None:
    if function == "pg_cancel_backend" and phase is not counting:
        return  # a LOCK that is cancelled is tried again; beside a pg_dump that waits nothing runs
    with untouched(standing), phase(standing, standing_database) as process:
        standing_database.psql(f"SELECT {function}({backend_of(standing_database, OURS)})")
        result = finish(process, NOTICED_SECONDS).failed_with(7, "Backup creation error")
        assert words in result.stderr, result
        assert_nothing_runs(standing, standing_database)
    standing.back_up()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("pg_terminate_backend", "terminating connection due to administrator command"),
        ("pg_cancel_backend", "canceling statement due to user request"),
    ],
)
def test_session_of_pg_dump_is_ended(
    function: str, words: str, standing: Project, standing_database: Database
) -> None:
    standing.rewrite({"DUMP_ATTEMPTS": 1})  # it has written nothing yet: it would try again
    with untouched(standing), dumping(standing, standing_database) as process:
        standing_database.psql(f"SELECT {function}({backend_of(standing_database, PG_DUMPS)})")
        result = finish(process, NOTICED_SECONDS).failed_with(7, "Backup creation error")
        assert words in result.stderr, result
        assert_nothing_runs(standing, standing_database)


# -- a server that goes away ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragile_database(cluster: Cluster) -> Iterator[Database]:
    """On a server of its own, with few connections, for the tests to break."""
    with Cluster(cluster.bin_dir, settings={"max_connections": "9"}) as own:
        load_sample(own)
        own.psql(f"CREATE MATERIALIZED VIEW statistics AS SELECT 1; {WIDE}", "project_chat_dev")
        own.psql(f"ALTER TABLE wide OWNER TO {USER}", "project_chat_dev")
        own.psql("CHECKPOINT")  # or a crash loses what was committed last
        yield Database(own, "project_chat_dev")


@pytest.fixture
def fragile(
    make_project: MakeProject,
    fragile_database: Database,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    """A private copy of the script, set up for that server, with an earlier backup."""
    project = make_project(
        fragile_database,
        settings={**fragile_database.settings(USER, PASSWORD), "PGCONNECT_TIMEOUT": "1"},
        constants={"STALL_SECONDS": 1, "ANSWER_SECONDS": 0},
    )
    earlier = tmp_path_factory.getbasetemp() / "backups-of-the-fragile-one"
    if not earlier.exists():
        project.back_up()
        project.backups.rename(earlier)
    shutil.copytree(earlier, project.backups)
    return project


@pytest.mark.parametrize("phase", [waiting_for_a_lock, counting, dumping])
@pytest.mark.parametrize("restart", [False, True], ids=["crash", "restart"])
def test_server_goes_away(
    phase: Phase, restart: bool, fragile: Project, fragile_database: Database
) -> None:
    cluster = fragile_database.cluster
    with untouched(fragile), phase(fragile, fragile_database) as process:
        if restart:
            cluster.restart()
        else:
            cluster.crash()
        result = finish(process, NOTICED_SECONDS).failed_with(7, "Backup creation error")
        assert "the connection to the server was lost while" in result.stderr, result
        if not restart:
            cluster.start()
    assert_nothing_runs(fragile, fragile_database)
    fragile.back_up()


@contextlib.contextmanager
def frozen(cluster: Cluster) -> Iterator[None]:
    """The server neither answers nor hangs up, as when a network loses everything."""
    processes = processes_in(cluster.data_dir)

    def tell_all(number: signal.Signals) -> None:
        for process in processes:
            # A backend that has just ended stays a zombie as long as the postmaster is stopped.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    assert cluster.pid in processes
    tell_all(signal.SIGSTOP)
    try:
        yield
    finally:
        tell_all(signal.SIGCONT)


@pytest.mark.parametrize("phase", [waiting_for_a_lock, counting, dumping])
def test_server_falls_silent(phase: Phase, fragile: Project, fragile_database: Database) -> None:
    with untouched(fragile), phase(fragile, fragile_database) as process:
        with frozen(fragile_database.cluster):
            # A second of silence, one for pg_dump to end.
            result = finish(process, NOTICED_SECONDS).failed_with(7, "Backup creation error")
        silent = r"no answer from .* within 1 s|gave up after 1 second: pg_dump has written nothing"
        assert re.search(silent, result.stderr), result
        assert_nothing_runs(fragile, fragile_database)
    fragile.back_up()


@pytest.mark.parametrize("phase", [waiting_for_a_lock, counting, dumping])
def test_signal_ends_a_run_on_a_silent_server(
    phase: Phase, fragile: Project, fragile_database: Database
) -> None:
    with untouched(fragile), phase(fragile, fragile_database) as process:
        with frozen(fragile_database.cluster):
            process.terminate()
            assert finish(process, 2).returncode == -signal.SIGTERM
        assert_nothing_runs(fragile, fragile_database)


def test_server_that_never_answers_is_given_up(
    fragile: Project, fragile_database: Database
) -> None:
    with untouched(fragile), PHASES["connecting"](fragile, fragile_database) as process:
        result = finish(process, 5).failed_with(3, "Database connection error")
    assert "failed: timeout expired" in result.stderr, result


# -- a server that is full ------------------------------------------------------------------------


def test_role_with_one_connection_is_told_of_two(
    fragile: Project, fragile_database: Database
) -> None:
    fragile_database.psql("ALTER ROLE chat CONNECTION LIMIT 1")
    try:
        with untouched(fragile):
            result = fragile.run().failed_with(3, "Database connection error")
        assert 'too many connections for role "chat"' in result.stderr, result
        assert 'ALTER ROLE "chat" CONNECTION LIMIT' in result.stderr, result
        fragile_database.psql("ALTER ROLE chat CONNECTION LIMIT 2")
        fragile.back_up()
    finally:
        fragile_database.psql("ALTER ROLE chat CONNECTION LIMIT -1")


def test_server_without_a_free_connection(fragile: Project, fragile_database: Database) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(6):  # of nine, three are for superusers
            stack.enter_context(transaction(fragile_database, "SET LOCAL work_mem = '1MB'"))
        with untouched(fragile):
            result = fragile.run().failed_with(3, "Database connection error")
    assert "remaining connection slots are reserved" in result.stderr, result
    fragile.back_up()


# -- a server that is busy ------------------------------------------------------------------------


def test_migration_that_lets_go_is_waited_for(
    standing: Project, standing_database: Database
) -> None:
    with waiting_for_a_lock(standing, standing_database) as process:
        pass
    finish(process).succeeded()


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        (
            waiting_for_a_lock,
            (
                "the tables could not be locked for reading: session NUMBER (postgres, migration:"
                " LOCK TABLE …) holds the table messages"
            ),
        ),
        (
            counting,
            (
                "pg_dump waits for a lock: session NUMBER (postgres, migration: REINDEX TABLE …)"
                " blocks it"
            ),
        ),
        (
            dumping,
            (
                "pg_dump waits for a lock: session NUMBER (postgres, migration: REFRESH"
                " MATERIALIZED …) blocks it"
            ),
        ),
    ],
)
def test_migration_that_never_lets_go_is_named(
    phase: Phase, words: str, standing: Project, standing_database: Database
) -> None:
    """And not another session, whose table has the same oid in another database: both are copies
    of one template."""
    standing.rewrite({"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.2})
    template = Database(standing_database.cluster, DATABASE)
    with (
        untouched(standing),
        transaction(template, "ALTER TABLE messages ADD more int"),
        phase(standing, standing_database) as process,
    ):
        result = finish(process, NOTICED_SECONDS).failed_with(7, "Backup creation error")
        assert_nothing_runs(standing, standing_database)
    said = re.sub(r"session \d+", "session NUMBER", result.stderr)
    assert f"Error: gave up after 1 second: {words}\n" in said, result


def test_catalog_that_is_locked_is_not_waited_for_without_an_end(
    standing: Project, standing_database: Database
) -> None:
    standing.rewrite({"STALL_SECONDS": 1})
    with transaction(standing_database, "LOCK TABLE pg_largeobject_metadata"):
        result: Result = standing.run().failed_with(7, "Backup creation error")
    assert "Error: while reading the catalog: ERROR: canceling statement" in result.stderr, result
    (look,) = re.findall(r"1\. See what waits, and for whom, .*: (SELECT .*)", result.stderr)
    assert standing_database.psql(look)
    wait_until(lambda: not processes_in(standing.directory))


# -- what the server is not told, and what is not the server's ------------------------------------


def test_query_of_a_killed_run_is_ended_by_the_server(
    standing: Project, standing_database: Database
) -> None:
    standing.rewrite({"ORPHAN_SECONDS": 1})
    with transaction(standing_database, "LOCK TABLE pg_largeobject_metadata"):
        process = standing.start()
        wait_until(lambda: sessions_on(standing_database, "wait_event_type = 'Lock'"))
        process.kill()
        finish(process)
        wait_until(lambda: not sessions_on(standing_database), 10)


# Runs a command where the only name server takes every question and answers none: it is a socket
# of the command's own, on a network of its own.
WITH_SILENT_RESOLVER = """
import fcntl, os, socket, struct, subprocess, sys
resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
up = struct.pack("16sh14x", b"lo", 1)  # IFF_UP
fcntl.ioctl(resolver, 0x8914, up)  # SIOCSIFFLAGS
resolver.bind(("127.0.0.1", 53))
resolver.set_inheritable(True)
for name, text in (("resolv.conf", "nameserver 127.0.0.1"), ("nsswitch.conf", "hosts: files dns")):
    with open(os.path.join(os.environ["HOME"], name), "w") as file:
        print(text, file=file)
    there = os.path.realpath(os.path.join("/etc", name))
    subprocess.run(["mount", "--bind", file.name, there], check=True)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def resolving(project: Project) -> Iterator[subprocess.Popen[bytes]]:
    """The script asks for the address of its host."""
    process = project.start(
        env={"DEV_DB_HOST": "db.example.test", "PGCONNECT_TIMEOUT": "4"},
        prefix=(*MOUNTING, "--net", sys.executable, "-c", WITH_SILENT_RESOLVER),
    )

    def has_asked() -> bool:
        assert process.poll() is None, "this test needs unshare with --mount and --net"
        sockets = Path(f"/proc/{process.pid}/net/udp").read_text(encoding="ascii").splitlines()
        # Its local address, and what is received but not read.
        return any(re.search(r": 0100007F:0035 .*:(?!0{8})[0-9A-F]{8} ", line) for line in sockets)

    wait_until(has_asked)
    yield process


def test_signal_ends_the_wait_for_a_name_server(standing: Project) -> None:
    with untouched(standing), resolving(standing) as process:
        process.terminate()
        assert finish(process, 2).returncode == -signal.SIGTERM


def test_name_server_that_never_answers_is_given_up(standing: Project) -> None:
    standing.rewrite({"CONNECT_LIMIT_FACTOR": 1, "CONNECT_LIMIT_SECONDS": 0})
    with untouched(standing), resolving(standing) as process:
        result = finish(process, 7).failed_with(3, "Database connection error")  # not twice 4
    assert 'no answer from "db.example.test", port ' in result.stderr
