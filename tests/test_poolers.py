"""A connection pooler in between: a backup may cost none of its other clients anything."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping

import pytest
from cluster import Cluster
from conftest import MakeProject
from pooler import Pooler
from sample import PASSWORD, USER
from support import Database, assert_restores, program, wait_until

# -- poolers, and the application behind them -----------------------------------------------------

Settings = Mapping[str, str]


@contextlib.contextmanager
def small_pooler(database: Database, mode: str, prefix: str) -> Iterator[Settings]:
    """The tests' own pooler before the database, and the settings that lead to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = database.settings(prefix=prefix)
        settings[f"{prefix}DB_PORT"] = str(listener.getsockname()[1])
        with Pooler(listener, database.cluster, database.name, mode):
            yield settings


@contextlib.contextmanager
def pgbouncer(database: Database, mode: str, prefix: str) -> Iterator[Settings]:
    """The same with pgbouncer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not in tmp_path: that is closed to the user that pgbouncer runs as in the place of root.
    users = database.cluster.directory / "users"
    users.write_text(f'"{USER}" "{PASSWORD}"\n')
    ini = database.cluster.directory / f"{mode}.ini"
    ini.write_text(
        "[databases]\n"
        f"* = host=127.0.0.1 port={database.cluster.port}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = scram-sha-256\nauth_file = {users}\npool_mode = {mode}\n"
    )
    as_nobody = ["--user", "nobody"] if os.geteuid() == 0 else []
    command = [program("pgbouncer", "pgbouncer"), *as_nobody, "--quiet", str(ini)]
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: answers(port) or process.poll() is not None)
            settings = database.settings(USER, PASSWORD, prefix)
            yield {**settings, f"{prefix}DB_PORT": str(port)}
        finally:
            process.terminate()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


POOLERS = [small_pooler, pytest.param(pgbouncer, marks=pytest.mark.servers(15))]
StartPooler = Callable[[Database, str, str], contextlib.AbstractContextManager[Settings]]

# What the application asks again and again, and what it must be told each time. A DateStyle that
# is not ISO makes psycopg2 change it, unless it was asked for at the connection's start.
QUESTION = """
SELECT current_setting('DateStyle'), current_setting('search_path'),
       current_setting('lock_timeout'), count(*) FROM conversations;
"""
ANSWER = 'SQL, DMY|"$user", public|0|150\n'
PREPARE = """
ALTER DATABASE "{0}" SET DateStyle = 'SQL, DMY'; ALTER DATABASE "{0}" SET log_statement = 'all'
"""


class Application:
    """Clients of the pooler, each with a connection of its own that is never idle for long."""

    def __init__(self, database: Database, settings: Settings, prefix: str, clients: int) -> None:
        names = ("HOST", "PORT", "USER", "PASSWORD")
        self._environ = {f"PG{name}": settings[f"{prefix}DB_{name}"] for name in names}
        self._environ |= {"PGDATABASE": database.name, "PGAPPNAME": "application"}
        self._psql = database.cluster.bin_dir / "psql"
        self._stopping = False
        self.answers: list[list[str]] = [[] for _ in range(clients)]
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Application:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: all(map(len, self.answers)))
        return self

    def __exit__(self, *_exception: object) -> None:
        # What was left behind in any session is found now, if it was not before.
        seen = [len(answers) for answers in self.answers]
        wait_until(
            lambda: all(
                len(answers) > count + 20 or not thread.is_alive()
                for answers, count, thread in zip(self.answers, seen, self._threads, strict=True)
            )
        )
        self._stopping = True
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        options = ("--no-psqlrc", "-qAt", "--set=ON_ERROR_STOP=1")
        with (
            contextlib.suppress(BrokenPipeError),  # its last words are there all the same
            subprocess.Popen(
                [self._psql, *options],
                env=self._environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as psql,
        ):
            assert psql.stdin
            assert psql.stdout
            answer = "none yet"
            while answer and not self._stopping:
                print(QUESTION, file=psql.stdin, flush=True)
                answer = psql.stdout.readline()
                self.answers[number].append(answer)

    def assert_unharmed(self) -> None:
        for answers in self.answers:
            assert set(answers) == {ANSWER}


@pytest.fixture
def chat(sample_database: Database) -> Iterator[Database]:
    """The sample database with what its application relies on, and whose statements are logged."""
    sample_database.psql(PREPARE.format(sample_database.name))
    yield sample_database
    sample_database.psql(f'ALTER DATABASE "{sample_database.name}" RESET ALL')


def statements(database: Database, since: int) -> list[str]:
    """What the server was asked in this database, but for the application's part in it."""
    with database.cluster.log.open(errors="replace") as log:
        log.seek(since)
        asked = [line.partition("statement: ")[2].strip() for line in log if "statement: " in line]
    return [words for words in asked if words and "current_setting" not in words]


ASK_WHO = "SELECT pg_catalog.pg_backend_pid()"

# -- transaction and statement mode ---------------------------------------------------------------


@pytest.mark.parametrize("start_pooler", POOLERS)
@pytest.mark.parametrize(
    ("mode", "prefix", "clients"),
    [("transaction", "DEV_", 3), ("transaction", "", 0), ("statement", "", 3)],
)
def test_pooler_of_transactions_or_statements_is_refused(
    mode: str,
    prefix: str,
    clients: int,
    start_pooler: StartPooler,
    chat: Database,
    make_project: MakeProject,
) -> None:
    """Before anything is written, or changed in a session that another client is given next."""
    with start_pooler(chat, mode, prefix) as settings:
        project = make_project(settings=settings)
        with Application(chat, settings, prefix, clients) as application:
            since = chat.cluster.log.stat().st_size
            result = project.run()
        application.assert_unharmed()
    result.failed_with(2, "Configuration error")
    assert "pooler" in result.stderr, result
    for step in (f"{prefix}DB_HOST", f"{prefix}DB_PORT", "-pooler", "6543", "5432", "pool_mode"):
        assert step in result.stderr, result
    assert ("DEV_DB" in result.stderr) == (prefix == "DEV_"), result
    assert not project.backups.exists()
    if start_pooler is small_pooler:  # pgbouncer has statements of its own
        assert set(statements(chat, since)) == {ASK_WHO}


# -- session mode, and none at all ----------------------------------------------------------------


@pytest.mark.parametrize("start_pooler", POOLERS)
def test_pooler_of_sessions_is_no_matter(
    start_pooler: StartPooler, chat: Database, make_project: MakeProject
) -> None:
    with start_pooler(chat, "session", "DEV_") as settings:
        project = make_project(settings=settings)
        with Application(chat, settings, "DEV_", 3) as application:
            # Twice: what the first run changed in a pooled session would be found by the second.
            for _ in range(2):
                dump = project.back_up()
        application.assert_unharmed()
    chat.psql(f'ALTER DATABASE "{chat.name}" RESET ALL')
    assert_restores(dump, chat)


def test_direct_connection_pays_one_comparison(chat: Database, make_project: MakeProject) -> None:
    project = make_project(chat)
    since = chat.cluster.log.stat().st_size
    project.back_up()
    asked = statements(chat, since)
    assert asked.index(ASK_WHO) == 0, asked[:5]
    assert asked.count(ASK_WHO) == 1


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_own_pooler_is_one(mode: str, chat: Database, cluster: Cluster) -> None:
    """What the tests above rely on: a setting stays where the mode says, and is met by others."""
    with small_pooler(chat, mode, "") as settings:
        way = f"host=127.0.0.1 port={settings['DB_PORT']} user=postgres dbname={chat.name}"
        subprocess.run([cluster.bin_dir / "psql", way, "-qc", "SET lock_timeout = 7"], check=True)
        with Application(chat, settings, "", 3) as application:
            pass
    changed = {answer != ANSWER for answers in application.answers for answer in answers}
    assert changed == ({False} if mode == "session" else {False, True})
