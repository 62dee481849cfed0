"""What can lie between the script and the server: slow, deaf and talkative ways, and their ends."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import (
    GONE_SECONDS,
    IN_COUNT,
    Proxy,
    assert_nothing_runs,
    full_queue,
    is_in_handshake,
    leading_to,
    sessions_on,
    shut_down,
    stopped,
    strike,
    transaction,
    untouched,
)
from support import Database, Project, finish, new_database, program, wait_until

# The script's own limits, shortened: without movement; and for a connection, beyond libpq's own.
STALL = {"STALL_SECONDS": 1, "ANSWER_SECONDS": 1}
BACKSTOP = {"CONNECT_LIMIT_SECONDS": 0}

IMPATIENT = {"PGCONNECT_TIMEOUT": "1"}

STOPPING = (signal.SIGINT, signal.SIGTERM)

# -- ways that are slow ---------------------------------------------------------------------------


def test_handshake_that_takes_a_second(standing: Project, cluster: Cluster) -> None:
    with full_queue() as listener:
        process = standing.start(env=leading_to(listener))
        wait_until(lambda: is_in_handshake(listener))
        with Proxy(listener, cluster):
            finish(process).succeeded()


def test_host_that_swallows_packets_is_passed_over(standing: Project, cluster: Cluster) -> None:
    with full_queue("127.0.0.2", cluster.port):
        way = {"DEV_DB_HOST": f"127.0.0.2,{cluster.host}", **IMPATIENT}
        standing.run(env=way).succeeded()


def test_host_list_without_a_server_names_each_host(standing: Project, cluster: Cluster) -> None:
    """Each has its time: the script's own limit does not end the wait before libpq's does."""
    standing.rewrite({"CONNECT_LIMIT_FACTOR": 1, "CONNECT_LIMIT_SECONDS": 0.5})
    silent = ("127.0.0.2", "127.0.0.3")
    with untouched(standing), contextlib.ExitStack() as stack:
        for host in silent:
            stack.enter_context(full_queue(host, cluster.port))
        way = {"DEV_DB_HOST": ",".join([*silent, "127.0.0.4"]), **IMPATIENT}
        result = standing.run(env=way).failed_with(3, "Database connection error")
    for host in (*silent, "127.0.0.4"):
        words = "timeout expired" if host in silent else "Connection refused"
        failed = f'connection to server at "{host}", port {cluster.port} failed: {words}'
        assert failed in result.stderr, result


# -- servers that do not let us in ----------------------------------------------------------------


class Way(NamedTuple):
    """The variables that lead the script there, and whether it is where the way ends."""

    settings: Mapping[str, str]
    is_reached: Callable[[], bool]


@contextlib.contextmanager
def unanswered_handshake() -> Iterator[Way]:
    with full_queue() as listener:
        yield Way(leading_to(listener), lambda: is_in_handshake(listener))


# What a server does on a connection; it has come to the point whenever it yields.
Behaviour = Callable[[socket.socket], Iterator[None]]


def say_nothing(_client: socket.socket) -> Iterator[None]:
    yield


def begin_tls(client: socket.socket) -> Iterator[None]:
    """Agree to TLS, and say nothing to the first message in it."""
    client.recv(8)
    client.sendall(b"S")
    client.recv(1)
    yield


def message(kind: bytes, body: bytes) -> bytes:
    """One of PostgreSQL's messages, as they go over the wire."""
    return kind + struct.pack("!i", 4 + len(body)) + body


AUTHENTICATED = message(b"R", struct.pack("!i", 0))
# As good as a notice to keep a client waiting, and libpq prints nothing of it.
PARAMETER = message(b"S", b"application_name\0backup_db\0")


def let_in(client: socket.socket) -> None:
    """Let a client in without TLS or a password."""
    while client.recv(8)[4:] in (struct.pack("!i", code) for code in (80877103, 80877104)):
        client.sendall(b"N")  # it asked for TLS, or for GSSAPI
    client.recv(65536)
    client.sendall(AUTHENTICATED)


def dribble(client: socket.socket) -> Iterator[None]:
    """Say something all the time, but never that the session may begin."""
    let_in(client)
    while True:
        client.sendall(PARAMETER)
        yield
        time.sleep(0.03)


def flood(client: socket.socket) -> Iterator[None]:
    """The same, faster than anybody reads."""
    let_in(client)
    while True:
        client.sendall(PARAMETER * 1000)
        yield


@contextlib.contextmanager
def server(behaviour: Behaviour, family: socket.AddressFamily = socket.AF_INET) -> Iterator[Way]:
    """A server that does this on each connection."""
    reached = threading.Event()
    clients: list[socket.socket] = []

    def serve(client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            for _ in behaviour(client):
                reached.set()

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                clients.append(listener.accept()[0])
                threading.Thread(target=serve, args=clients[-1:], daemon=True).start()

    with tempfile.TemporaryDirectory() as directory, socket.socket(family) as listener:
        if family == socket.AF_UNIX:
            listener.bind(f"{directory}/.s.PGSQL.5432")
            settings = {"DEV_DB_HOST": directory, "DEV_DB_PORT": "5432"}
        else:
            listener.bind(("127.0.0.1", 0))
            settings = leading_to(listener)
        listener.listen()
        threading.Thread(target=accept, daemon=True).start()
        yield Way(settings, reached.is_set)
        shut_down(listener, *clients)


DEAD_ENDS: dict[str, Callable[[], AbstractContextManager[Way]]] = {
    "an unanswered handshake": unanswered_handshake,
    "silence over TCP": lambda: server(say_nothing),
    "silence on a Unix socket": lambda: server(say_nothing, socket.AF_UNIX),
    "silence in TLS": lambda: server(begin_tls),
    "words without an end": lambda: server(dribble),
    "a flood": lambda: server(flood),
}


@pytest.mark.parametrize("end", DEAD_ENDS)
def test_dead_end_is_given_up(end: str, standing: Project) -> None:
    standing.rewrite(BACKSTOP)
    with untouched(standing), DEAD_ENDS[end]() as way:
        process = standing.start(env={**way.settings, **IMPATIENT})
        wait_until(way.is_reached)
        result = finish(process, 15).failed_with(3, "Database connection error")
    assert way.settings["DEV_DB_HOST"] in result.stderr, result


@pytest.mark.parametrize("end", DEAD_ENDS)
def test_signal_at_a_dead_end(end: str, standing: Project) -> None:
    for number in STOPPING:
        with untouched(standing), DEAD_ENDS[end]() as way:
            process = standing.start(env=way.settings)
            wait_until(way.is_reached)
            strike(process, number)


# -- a server that is gone in the middle ----------------------------------------------------------


@contextlib.contextmanager
def silent_in_mid_count(project: Project, database: Database) -> Iterator[subprocess.Popen[bytes]]:
    """The server still answers keepalives, and nothing of what it sends comes through."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Proxy(listener, database.cluster) as proxy,
    ):
        with transaction(database, "REINDEX TABLE wide"):
            process = project.start(env={**leading_to(listener), **IMPATIENT})
            wait_until(lambda: sessions_on(database, f"{IN_COUNT} AND wait_event_type = 'Lock'"))
            proxy.fall_silent()
        yield process
        assert_nothing_runs(project, database)


def test_server_that_falls_silent_in_mid_count_is_given_up(
    standing: Project, standing_database: Database
) -> None:
    standing.rewrite(STALL)
    with untouched(standing), silent_in_mid_count(standing, standing_database) as process:
        # To ask for the blocker's name takes another connection: PGCONNECT_TIMEOUT.
        finish(process, 15).failed_with(7, "Backup creation error")


def test_signal_ends_a_count_on_a_silent_server(
    standing: Project, standing_database: Database
) -> None:
    for number in STOPPING:
        with untouched(standing), silent_in_mid_count(standing, standing_database) as process:
            strike(process, number)


# -- rows that come faster than they are counted --------------------------------------------------

# 60 MB on the way, more than all buffers take, in a hundredth of that on disk.
WIDE_TABLE = """
CREATE TABLE wide (content text);
INSERT INTO wide SELECT repeat('x', 1000000) FROM generate_series(1, 60);
"""

# Microseconds for each piece that comes: the larger the pieces are, the more it takes for a count
# to last some seconds.
PIECE_MICROSECONDS = {"TCP": 50_000, "Unix socket": 10_000, "TLS": 10_000}


def slow_reader(way: str) -> tuple[str, ...]:
    """It takes its time with whatever it receives; pg_dump does not (-b). -D: the script, not
    strace, is the child that a test sends its signals to."""
    calls = ("-D", "-f", "-b", "execve", "-qq", "-o", "/dev/null", "-e", "trace=recvfrom")
    late = f"inject=recvfrom:delay_exit={PIECE_MICROSECONDS[way]}"
    return (program("strace", "strace"), *calls, "-e", late)


WAITS_FOR_US = f"{IN_COUNT} AND wait_event = 'ClientWrite'"


@pytest.mark.parametrize("way", PIECE_MICROSECONDS)
def test_signal_leaves_no_backend_that_waits_for_us(
    way: str, cluster: Cluster, tls_cluster: Cluster, make_project: MakeProject
) -> None:
    """It waits for room in our receive buffer. Of the mere end of the connection it would hear
    minutes later, and hold its locks and the snapshot until then."""
    where = tls_cluster if way == "TLS" else cluster
    settings = {"PGSSLMODE": "require" if way == "TLS" else "disable"}
    if way == "Unix socket":
        settings["DEV_DB_HOST"] = str(where.directory)
    with new_database(where) as database:
        database.psql(WIDE_TABLE)
        project = make_project(settings={**database.settings(), **settings})
        for number in STOPPING:
            process = project.start(prefix=slow_reader(way))
            wait_until(lambda: sessions_on(database, WAITS_FOR_US))
            process.send_signal(number)
            result = finish(process, GONE_SECONDS)
            assert result.returncode == -number, result
            assert stopped(number) in result.stderr, result  # strace may add to it
            wait_until(lambda: not sessions_on(database, IN_COUNT), GONE_SECONDS)
            assert_nothing_runs(project, database)
            assert not project.dumps()


# -- connections that die unseen ------------------------------------------------------------------

# By these the kernel notices a peer that is gone: while nothing is under way, and else.
KEEPALIVES = {"SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"}


def test_each_connection_has_keepalives(standing: Project, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = ("-f", "-qq", "-s", "4096", "-e", "trace=setsockopt,execve", "-o", str(trace))
    standing.run(prefix=(program("strace", "strace"), *calls)).succeeded()
    lines = trace.read_text(encoding="utf-8").splitlines()
    (dump_call,) = (line for line in lines if "execve(" in line and '"--snapshot=' in line)
    pg_dump = dump_call.split()[0]
    set_by: dict[str, set[str]] = {"the script": set(), "pg_dump": set()}
    for line in lines:
        if call := re.match(r"(\d+) +setsockopt\(\d+, \w+, (\w+), \[[1-9]\d*\]", line):
            process, option = call.groups()
            set_by["pg_dump" if process == pg_dump else "the script"].add(option)
    for who, options in set_by.items():
        assert options >= KEEPALIVES, (who, options)
    # Everybody can read a command line.
    (parameters,) = re.findall(r'"--dbname=([^"]*)"', dump_call)
    assert not re.search("(?<!_)(dbname|host|user|password)", parameters), parameters
