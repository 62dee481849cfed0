"""What the tests of faults share: earlier backups, phases to strike in, and what must be left."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster import Cluster
from support import Database, Project, connect, contents_of, finish, program, wait_until

# A stub's way to be seen and to stay: a mark in the home directory, then nothing for a long time.
# `exec`, so that it is one process.
PAUSE = 'touch "$HOME/paused"; exec sleep 100'

# The same, until the test lets it go on: then the program runs, as if nothing had been.
HOLD = 'touch "$HOME/paused"; until [ -e "$HOME/go" ]; do sleep 0.05; done; exec "$real" "$@"'


# -- what was there before, and what is there after -----------------------------------------------


def published(directory: Path) -> dict[str, str]:
    """All that is in the output directory, but for the lock: who holds it is written into it."""
    return {
        name: content
        for name, content in contents_of(directory).items()
        if not re.fullmatch(r"\.[^/]+\.lock", name)
    }


@contextlib.contextmanager
def untouched(project: Project) -> Iterator[None]:
    """What happens inside leaves the output directory as it was, byte for byte."""
    before = published(project.backups)
    assert any(name.endswith(".dump") for name in before), "a fault needs earlier backups to spare"
    yield
    assert published(project.backups) == before


def assert_nothing_runs(project: Project, database: Database) -> None:
    """No child of a script that has ended, and no session: the server sees that in a moment, or,
    where it could not be told, when the query ends that runs."""
    assert processes_of(project) == {}
    wait_until(lambda: not sessions_on(database), 10)


def processes_of(project: Project) -> dict[int, str]:
    """The command lines of all that the script started: it runs in the project's directory."""
    return processes_in(project.directory)


def processes_in(directory: Path) -> dict[int, str]:
    """The command lines of all that has this working directory."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if (process / "cwd").readlink() == directory:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def sessions_on(database: Database, condition: str = "true") -> list[str]:
    """The sessions of the script and its pg_dump on the server, a line each."""
    # Without psql: tests poll, and to start a program takes longer than the look.
    postgres = Database(database.cluster, "postgres")
    with contextlib.closing(connect(postgres)) as session, session.cursor() as cursor:
        cursor.execute(
            "SELECT concat_ws('|', pid, application_name, state, wait_event_type,"
            " translate(query, E'\\n', ' ')) FROM pg_stat_activity"
            f" WHERE datname = '{database.name}' AND application_name LIKE 'backup\\_db%'"
            f" AND {condition}"
        )
        return [line for (line,) in cursor]


def backend_of(database: Database, application_name: str) -> int:
    """The process of the session whose application name is LIKE this, once it is the only one:
    that of a run before may take a moment to end."""
    found: list[str] = []

    def is_alone() -> bool:
        found[:] = sessions_on(database, f"application_name LIKE '{application_name}'")
        return len(found) == 1

    wait_until(is_alone)
    return int(found[0].split("|")[0])


# -- sessions that are in the way -----------------------------------------------------------------


@contextlib.contextmanager
def transaction(
    database: Database, sql: str, user: str = "postgres"
) -> Iterator[Callable[[str], None]]:
    """A session that has run `sql` and not committed it, nor ever does.

    It yields a function that runs more in it, and fails where the server refuses.
    """
    cluster = database.cluster
    with subprocess.Popen(
        [cluster.bin_dir / "psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"],
        env={
            "PGHOST": str(cluster.directory),
            "PGPORT": str(cluster.port),
            "PGUSER": user,
            "PGDATABASE": database.name,
            "PGAPPNAME": "migration",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as psql:
        stdin, stdout = psql.stdin, psql.stdout
        assert stdin
        assert stdout

        def run(statement: str) -> None:
            print(f"{statement};\n\\echo done", file=stdin, flush=True)
            assert stdout.readline() == "done\n"

        run("BEGIN")
        run(sql)
        try:
            yield run
        finally:
            stdin.close()


# A table of nothing but a wide value, so that nobody reads it without its TOAST; for `counting`.
WIDE = """
CREATE TABLE wide (content text);
ALTER TABLE wide ALTER content SET STORAGE EXTERNAL;
INSERT INTO wide VALUES (repeat('x', 10000));
"""


# -- addresses where not all is as it should be ---------------------------------------------------


def leading_to(listener: socket.socket) -> dict[str, str]:
    """The variables that lead the script to a listener on loopback."""
    host, port = listener.getsockname()
    return {"DEV_DB_HOST": host, "DEV_DB_PORT": str(port)}


@contextlib.contextmanager
def full_queue(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    """A listener that has no place for another connection: the kernel drops the packet that asks
    for one, and the client sends it again after a second."""
    with socket.socket() as listener:
        listener.bind((host, port))
        listener.listen(0)  # a place for one
        with socket.create_connection(listener.getsockname()):
            yield listener


def is_in_handshake(listener: socket.socket) -> bool:
    """Whether someone waits for this listener to take the connection."""
    host, port = listener.getsockname()
    address = f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{port:04X}"
    connections = Path("/proc/net/tcp").read_text(encoding="ascii")
    return f" {address} 02 " in connections  # a remote address, SYN_SENT


class Proxy:
    """What stands before a server: it passes everything on, until it falls silent. Of several
    servers each is given a connection in turn."""

    def __init__(self, listener: socket.socket, *clusters: Cluster) -> None:
        self._listener = listener
        self._turns = itertools.cycle(clusters)
        self._is_silent = self._hides_ends = False
        self._clients: list[socket.socket] = []
        self._servers: list[socket.socket] = []
        listener.listen()
        self._start(self._accept)

    def fall_silent(self) -> None:
        """Lose whatever comes, but the end of a connection."""
        self._is_silent = True

    def forget(self) -> None:
        """Lose that too: the server's sessions end, and their clients never hear of it."""
        self._is_silent = self._hides_ends = True
        shut_down(*self._servers)

    @staticmethod
    def _start(work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                client = self._listener.accept()[0]
                cluster = next(self._turns)
                server = socket.create_connection((cluster.host, cluster.port))
                self._clients.append(client)
                self._servers.append(server)
                self._start(self._pass_on, client, server)
                self._start(self._pass_on, server, client)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._is_silent:
                    target.sendall(data)
        if not self._hides_ends:
            shut_down(source, target)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_exception: object) -> None:
        shut_down(self._listener, *self._clients, *self._servers)


def shut_down(*sockets: socket.socket) -> None:
    """Wake up whoever waits for one of these."""
    for each in sockets:
        with contextlib.suppress(OSError):  # it is down already
            each.shutdown(socket.SHUT_RDWR)


# -- phases of a run ------------------------------------------------------------------------------

# Brings the script to a phase, and holds it there for as long as the context lasts.
Phase = Callable[[Project, Database], contextlib.AbstractContextManager[subprocess.Popen[bytes]]]


@contextlib.contextmanager
def connecting(project: Project, _database: Database) -> Iterator[subprocess.Popen[bytes]]:
    """The server takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        address = {"DEV_DB_HOST": "127.0.0.1", "DEV_DB_PORT": str(listener.getsockname()[1])}
        process = project.start(env=address)
        with listener.accept()[0]:
            yield process


def wait_for_refusals(database: Database, since: int, count: int = 1) -> None:
    """Wait until the server's log, from a position on, has so many refusals of our locks: they
    never wait themselves."""

    def refused() -> int:
        with database.cluster.log.open(errors="replace") as log:
            log.seek(since)
            return log.read().count("ERROR:  could not obtain lock on relation")

    wait_until(lambda: refused() >= count)


@contextlib.contextmanager
def waiting_for_a_lock(project: Project, database: Database) -> Iterator[subprocess.Popen[bytes]]:
    """A migration holds a table."""
    since = database.cluster.log.stat().st_size
    with transaction(database, "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"):
        process = project.start()
        wait_for_refusals(database, since)
        yield process


# Of the two sessions, the one that counts, while it does.
IN_COUNT = "application_name = 'backup_db' AND query LIKE 'COPY %' AND state = 'active'"


@contextlib.contextmanager
def counting(project: Project, database: Database) -> Iterator[subprocess.Popen[bytes]]:
    """A count waits for the index of a table's TOAST, which another session rebuilds; pg_dump does
    too, but only when it comes to that table."""
    with transaction(database, "REINDEX TABLE wide"):
        process = project.start()
        wait_until(lambda: sessions_on(database, f"{IN_COUNT} AND wait_event_type = 'Lock'"))
        yield process


@contextlib.contextmanager
def dumping(project: Project, database: Database) -> Iterator[subprocess.Popen[bytes]]:
    """pg_dump waits for another session, which no option of its own prevents."""
    with transaction(database, "REFRESH MATERIALIZED VIEW statistics"):
        process = project.start()
        in_dump = "application_name <> 'backup_db' AND wait_event_type = 'Lock'"
        wait_until(lambda: sessions_on(database, in_dump))
        yield process


def fake_call(project: Project, program: str, option: str, script: str) -> None:
    """Put a shell script in the place of the calls that have this option; others are real."""
    real = f'case "$*" in *"{option}"*) ;; *) exec "$real" "$@";; esac'
    project.fake(program, f"{real}\n{script}")


# The one call of each program that does the work; others only ask what it can.
DUMP = ("pg_dump", "--snapshot")
# In a script in its place: the output file that it is called with, as "$file".
FILE = 'for word; do case "$word" in --file=*) file="${word#--file=}" ;; esac; done'
TABLE_OF_CONTENTS = ("pg_restore", "--list /")
CONTENTS = ("pg_restore", "--data-only")


def paused(project: Project) -> bool:
    """Whether a script in the place of a program has come to PAUSE."""
    return (project.directory / "home" / "paused").exists()


def let_go(project: Project) -> None:
    """End a HOLD."""
    (project.directory / "home" / "go").touch()


def pausing(program: str, option: str) -> Phase:
    """The program does not come to an end."""

    @contextlib.contextmanager
    def phase(project: Project, _database: Database) -> Iterator[subprocess.Popen[bytes]]:
        fake_call(project, program, option, PAUSE)
        process = project.start()
        wait_until(lambda: paused(project))
        yield process
        (project.fakes / program).unlink()
        (project.directory / "home" / "paused").unlink()

    return phase


@contextlib.contextmanager
def between_the_renames(project: Project, _database: Database) -> Iterator[subprocess.Popen[bytes]]:
    """The metadata bears its name, the dump not yet: the kernel is slow to do it."""
    before = set(project.backups.glob("*.metadata.json"))
    # One rename is the metadata's, the second the dump's.
    slow = "inject=/^rename:delay_enter=700000:when=2"
    process = project.start(
        prefix=(program("strace", "strace"), *STRACE, "-e", "trace=/^rename", "-e", slow),
        env={"PYTHONDONTWRITEBYTECODE": "1"},  # Python renames these
    )
    wait_until(lambda: set(project.backups.glob("*.metadata.json")) - before)
    yield process


# -D: the script, not strace, is the child that a test sends its signals to.
STRACE = ("-D", "-qq", "-o", "/dev/null")

# In all of these nothing is published yet.
PHASES: dict[str, Phase] = {
    "connecting": connecting,
    "waiting for a lock": waiting_for_a_lock,
    "counting": counting,
    "dumping": dumping,
    "hashing": pausing(*TABLE_OF_CONTENTS),
    "reading back": pausing(*CONTENTS),
}


# -- signals --------------------------------------------------------------------------------------

# What the user, or the shutdown of a machine, has to wait at most.
GONE_SECONDS = 2

TERMINATING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NO_BACKUP = "No new backup; earlier backups are untouched."


def stopped(number: signal.Signals, outcome: str = NO_BACKUP) -> str:
    """What the script says when it dies of the signal."""
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    return f"✗ Stopped ({name}). {outcome}".rstrip() + "\n"


def strike(
    process: subprocess.Popen[bytes], number: signal.Signals, outcome: str = NO_BACKUP
) -> None:
    """Send the signal; the script dies of it, in time and with one line."""
    process.send_signal(number)
    result = finish(process, GONE_SECONDS)
    assert result.returncode == -number, result
    assert result.stdout == "", result
    assert result.stderr == stopped(number, outcome), result
