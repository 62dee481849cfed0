"""How the tests run the script as a user types it, and the oracles that they judge it by."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg2
from cluster import Cluster
from environment import PROJECT
from psycopg2.extensions import connection as Connection  # noqa: N812 - a class, oddly named

# The PostgreSQL versions for the tests that depend on the version.
SERVERS = tuple(map(int, os.environ.get("BACKUP_TEST_SERVERS", "17").split()))

# The python that runs the script: .ci/run has one with the oldest packages that it may have.
PYTHON = os.environ.get("BACKUP_TEST_PYTHON", sys.executable)

# More than any run of the script on a small database takes, on a busy machine too.
RUN_SECONDS = 120

# A prefix for a command that root runs: file permissions bind it all the same, as they do others.
UNPRIVILEGED = (
    ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
)

# Another user, who has no name. Pytest's folders are root's alone: this one may look into them.
VISITOR = (
    *("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)

NOTHING: Mapping[str, str] = MappingProxyType({})


def program(name: str, package: str) -> str:
    """The path of a program that Debian has in `package`; a machine without it fails the test."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert path, f"This test needs the program {name}: apt-get install {package}"
    return path


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Poll until `condition` holds, and fail where it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} seconds"
        time.sleep(0.02)


# -- the script -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a run of the script came to."""

    command: str
    returncode: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        outputs = f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}\n---"
        return f"\n$ {self.command}\nexit code {self.returncode}\n{outputs}"

    def succeeded(self) -> Result:
        assert self.returncode == 0, f"expected success, not{self}"
        assert "Traceback" not in self.stderr, f"a bug:{self}"
        return self

    def failed_with(self, code: int, category: str | None = None) -> Result:
        """A failure that the script foresaw; it speaks on stderr alone."""
        assert self.returncode == code, f"expected exit code {code}, not{self}"
        assert "Traceback" not in self.stderr, f"a bug:{self}"
        assert not self.stdout, f"expected nothing on stdout, not{self}"
        if category:
            headline = f"^✗ (Backup|Backup verification|Listing) failed: {re.escape(category)}$"
            assert re.search(headline, self.stderr, re.MULTILINE), f"expected {category}, not{self}"
        return self


def env_text(settings: Mapping[str, str]) -> str:
    """An .env.local, in single quotes: any value stands for itself, newlines included."""
    lines = []
    for name, value in settings.items():
        quoted = value.replace("\\", r"\\").replace("'", r"\'")
        lines.append(f"{name}='{quoted}'\n")
    return "".join(lines)


# Prints the outcome of each run; it forks before each.
RUN_EACH = """
import json, os, sys, tempfile
import backup_db
outcomes = []
for arguments, env_text in json.load(sys.stdin):
    if env_text is not None:
        with open(".env.local", "w", encoding="utf-8") as file:
            file.write(env_text)
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            code = backup_db.main(arguments)
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outputs = [os.pread(file.fileno(), 1 << 20, 0) for file in (stdout, stderr)]
    outcomes.append([code, *(output.decode("utf-8", "backslashreplace") for output in outputs)])
print(json.dumps(outcomes))
"""


@dataclass(frozen=True)
class Project:
    """A private copy of the script, with settings and backups of its own.

    `environ` is made from scratch: nothing of this machine leaks in. What a test puts into `fakes`
    comes first on its PATH, then the programs of PostgreSQL in `bin_dir`.
    """

    directory: Path
    environ: Mapping[str, str]
    bin_dir: Path

    @property
    def backups(self) -> Path:
        return self.directory / "db" / "backups"

    @property
    def fakes(self) -> Path:
        return self.directory / "fakes"

    def dumps(self) -> list[Path]:
        return sorted(self.backups.glob("*.dump"))

    def configure(self, settings: Mapping[str, str]) -> None:
        (self.directory / ".env.local").write_text(env_text(settings), encoding="utf-8")

    def rewrite(self, constants: Mapping[str, object]) -> None:
        """Give top-level constants of this copy other values.

        So limits of minutes are met in seconds, and none of the logic is patched.
        """
        paths = (self.directory / "backup_db.py", self.directory / "brain_core" / "config.py")
        for name, value in constants.items():
            value_there = r'(\(\n(    .*\n)+\)|"""(.*\n)+?"""|.*)'
            assignment = re.compile(rf"^{name}(: [^=\n]+)? = {value_there}$", re.MULTILINE)
            found = 0
            for path in paths:
                line = f"{name} = {value!r}".replace("\\", r"\\")
                text, count = assignment.subn(line, path.read_text(encoding="utf-8"))
                path.write_text(text, encoding="utf-8")
                found += count
            assert found == 1, f"{name} is assigned {found} times at the top level"

    def fake(self, program: str, script: str) -> None:
        """Put a shell script in the place of a program; in it, "$real" is the program itself."""
        if program == "pg_restore" and not (self.fakes / "pg_dump").exists():
            self.fake("pg_dump", 'exec "$real" "$@"')  # it is looked for beside pg_dump first
        path = self.fakes / program
        path.write_text(f"#!/bin/sh\nreal='{self.bin_dir / program}'\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    def start(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] = NOTHING,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start the script; `env` is added to `environ`, `prefix` is a program that runs it.

        (Such as UNPRIVILEGED, or `nohup`, or `prlimit --fsize=1000`.)
        """
        return subprocess.Popen(
            [*prefix, PYTHON, self.directory / "backup_db.py", *arguments],
            cwd=cwd or self.directory,
            env={**self.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(
        self,
        *arguments: str | Path,
        env: Mapping[str, str] = NOTHING,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> Result:
        return finish(self.start(*arguments, env=env, cwd=cwd, prefix=prefix))

    def run_each(
        self, *runs: Sequence[str | Path], settings: Sequence[Mapping[str, str]] = ()
    ) -> list[Result]:
        """Run the script with each of these arguments, and each with settings of its own if such
        are given: for many runs of which python's start is the most. They are processes all the
        same, made by a python that has loaded the script."""
        texts = list(map(env_text, settings)) if settings else [None] * len(runs)
        typed = [[*map(str, arguments)] for arguments in runs]
        done = subprocess.run(
            [PYTHON, "-c", RUN_EACH],
            cwd=self.directory,
            env=self.environ,
            input=json.dumps(list(zip(typed, texts, strict=True))),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return [
            Result(f"backup_db.py {' '.join(arguments)}", *outcome)
            for arguments, outcome in zip(typed, json.loads(done.stdout), strict=True)
        ]

    def back_up(self, *arguments: str | Path) -> Path:
        """The dump of a new backup in the usual place."""
        before = self.dumps()
        self.run(*arguments).succeeded()
        (dump,) = set(self.dumps()) - set(before)
        return dump


def finish(process: subprocess.Popen[bytes], seconds: float = RUN_SECONDS) -> Result:
    """Wait for a script to end. One that does not is killed, and what it said shown."""
    with process:
        try:
            outputs = process.communicate(timeout=seconds)
            ended = True
        except subprocess.TimeoutExpired:
            process.kill()
            outputs = process.communicate()
            ended = False
    assert isinstance(process.args, list)
    stdout, stderr = (output.decode("utf-8", "backslashreplace") for output in outputs)
    result = Result(" ".join(map(str, process.args)), process.returncode, stdout, stderr)
    assert ended, f"did not end within {seconds} seconds:{result}"
    return result


class Terminal:
    """A run of the script on a terminal of its own, and all that it shows there."""

    def __init__(self, project: Project, *arguments: str | Path, columns: int = 100) -> None:
        self._keyboard, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self._process = subprocess.Popen(
            ["setsid", "--ctty", PYTHON, project.directory / "backup_db.py", *arguments],
            cwd=project.directory,
            env=project.environ,
            stdin=screen,
            stdout=screen,
            stderr=screen,
        )
        os.close(screen)
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError), open(self._keyboard, "rb", buffering=0) as screen:
            while block := screen.read(4096):
                self._shown += block

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()  # one that has ended takes no harm
        self._process.wait()
        self._reader.join()

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    @property
    def shown(self) -> str:
        """Everything so far, control characters too."""
        return self._shown.decode("utf-8", "replace").replace("\r\n", "\n")

    @property
    def progress(self) -> list[str]:
        """What the progress line has been, one after the other."""
        return re.findall(r"\r([^\r\n]*)\x1b\[K", self.shown)

    def finish(self, seconds: float = RUN_SECONDS) -> tuple[int, str]:
        """The exit status, and what is left on the screen when the progress line is erased."""
        status = self._process.wait(seconds)
        self._reader.join()
        return status, re.sub(r"[^\n]*\r\x1b\[K", "", self.shown)


def metadata_path(dump: Path) -> Path:
    return dump.with_name(dump.name.removesuffix(".dump") + ".metadata.json")


def read_metadata(dump: Path) -> dict[str, Any]:
    values = json.loads(metadata_path(dump).read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def put_pair(
    directory: Path, database: str, environment: str, timestamp: str, size: int, **changes: object
) -> Path:
    """A pair as a listing sees one: the metadata, and a dump of this size with nothing in it."""
    directory.mkdir(parents=True, exist_ok=True)
    dump = directory / f"{database}_{timestamp.replace(':', '-')}.dump"
    with dump.open("wb") as file:
        file.truncate(size)
    metadata = {
        "backup_timestamp": timestamp,
        "environment": environment,
        "database_name": database,
        "backup_file": dump.name,
        "backup_size_bytes": size,
        "checksum_sha256": "0" * 64,
        "table_counts": {},
        "pg_dump_version": "17.5",
        "postgresql_version": "17.5",
        "verification": {"verified_at": timestamp},
    }
    metadata_path(dump).write_text(json.dumps(metadata | changes), encoding="utf-8")
    return dump


@dataclass(frozen=True)
class Backup:
    """The two files of a backup, to be damaged, and a project to verify them with."""

    dump: Path
    project: Project

    @property
    def metadata(self) -> Path:
        return metadata_path(self.dump)

    def read_metadata(self) -> dict[str, Any]:
        return read_metadata(self.dump)

    def edit(self, **values: object) -> None:
        self.metadata.write_text(json.dumps({**self.read_metadata(), **values}), encoding="utf-8")

    def count(self, **rows: int) -> None:
        """Give tables other counts."""
        self.edit(table_counts={**self.read_metadata()["table_counts"], **rows})

    def forget(self, table: str) -> None:
        """Take a table out of the metadata."""
        values = self.read_metadata()
        for key in ("table_counts", "table_oids"):
            values.get(key, {}).pop(table, None)
        self.edit(**values)

    def forge(self, content: bytes) -> None:
        """Replace the dump, and have the metadata vouch for it."""
        self.dump.write_bytes(content)
        self.edit(
            backup_size_bytes=len(content), checksum_sha256=hashlib.sha256(content).hexdigest()
        )

    def copy_to(self, directory: Path) -> Backup:
        directory.mkdir(exist_ok=True)
        shutil.copy(self.metadata, directory)
        return Backup(Path(shutil.copy(self.dump, directory)), self.project)

    def verify(self) -> Result:
        return self.project.run("--verify", self.dump)


def readme_section(title: str) -> str:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert section, f"README.md has no section {title}"
    return section


# -- databases, and whether a restored one is the same --------------------------------------------

# A query for each table, materialized view, sequence and the large objects: name and contents.
# `ROW(x.*)` whatever the columns are called; the rows in the order of their digests. As the bytes
# are: text of the encoding SQL_ASCII may be none in any other.
CONTENTS = r"""
SELECT set_config('client_encoding', getdatabaseencoding(), false) \gset
SELECT format(CASE WHEN c.relkind = 'S' THEN 'SELECT %1$L, last_value, is_called FROM %2$I.%3$I'
                   ELSE 'SELECT %1$L, count(*), md5(string_agg(digest, '''' ORDER BY digest))'
                        ' FROM (SELECT md5(ROW(x.*)::text) AS digest FROM ONLY %2$I.%3$I AS x) r'
              END, c.oid::regclass, n.nspname, c.relname)
  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'm', 'S') AND c.relispopulated
       AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
 ORDER BY n.nspname COLLATE "C", c.relname COLLATE "C"
\gexec
SELECT 'large object', oid, md5(lo_get(oid)) FROM pg_largeobject_metadata ORDER BY oid
"""


# The role that tests/mixed.sql grants to, on a server whose other tests may have made it.
CREATE_READER = "DO $$ BEGIN CREATE ROLE reader; EXCEPTION WHEN duplicate_object THEN END $$"


@dataclass(frozen=True)
class Database:
    cluster: Cluster
    name: str

    def psql(self, sql: str, user: str = "postgres") -> str:
        return self.cluster.psql(sql, self.name, user)

    def settings(
        self, user: str = "postgres", password: str = "", prefix: str = "DEV_"
    ) -> dict[str, str]:
        """The variables that lead the script here, over TCP; that of `postgres` is filled in."""
        return self.cluster.environment(self.name, user, password, prefix)

    def encoding(self) -> str:
        return self.psql("SHOW server_encoding")

    def contents(self) -> list[str]:
        """Every table's rows, as a digest, every sequence and every large object: a line each."""
        return self.psql(CONTENTS).splitlines()

    def schema(self) -> list[str]:
        """All that is not data, as pg_dump writes it."""
        script = self.cluster.run(
            "pg_dump", "--schema-only", f"--encoding={self.encoding()}", database=self.name
        )
        # These two hold a key that is another one every time.
        return [line for line in script.splitlines() if not re.match(r"\\(un)?restrict ", line)]


def connect(database: Database) -> Connection:
    """A session whose transactions a test begins and ends itself."""
    session = psycopg2.connect(
        host=str(database.cluster.directory),
        port=database.cluster.port,
        dbname=database.name,
        user="postgres",
    )
    session.autocommit = True
    return session


@contextlib.contextmanager
def new_database(cluster: Cluster, *createdb_options: str) -> Iterator[Database]:
    name = f"chat_{uuid.uuid4().hex[:12]}"
    # Copied file by file: the other strategy writes every page into the WAL too.
    cluster.create_database(name, "--strategy=file_copy", *createdb_options)
    try:
        yield Database(cluster, name)
    finally:
        cluster.drop_database(name)


@contextlib.contextmanager
def restored(dump: Path, cluster: Cluster, encoding: str = "UTF8") -> Iterator[Database]:
    """The dump, restored by the cluster's own pg_restore into a database that was empty."""
    with new_database(cluster, "--template=template0", f"--encoding={encoding}") as database:
        cluster.run("pg_restore", "--exit-on-error", f"--dbname={database.name}", str(dump))
        yield database


def assert_restores(dump: Path, original: Database) -> None:
    """The one proof of a backup: restored, it is equal to the original in all of its parts."""
    with restored(dump, original.cluster, original.encoding()) as copy:
        assert copy.schema() == original.schema()
        assert copy.contents() == original.contents()


# -- what a person is told to type ----------------------------------------------------------------

# They belong to a system, not to PostgreSQL; not every machine that runs tests has each.
OF_THE_SYSTEM = {
    *("sudo", "systemctl", "service", "brew", "dnf", "apt-get", "apk", "dmesg", "findmnt"),
    "/usr/share/postgresql-common/pgdg/apt.postgresql.org.sh",
    "dpkg-reconfigure",
}


def typed(step: str) -> str:
    """What follows the last ": " of a step; nothing where it only explains."""
    return step.rpartition(": ")[2] if ": " in step else ""


def shell_commands(line: str) -> list[list[str]]:
    """The words of each command of a line, `sudo` left out."""
    words = list(shlex.shlex(line, posix=True, punctuation_chars=";|&<>"))
    commands: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set(";|&"):
            commands.append([])
        else:
            commands[-1].append(word)
    commands = [command for command in commands if command]
    for command in commands:
        if command[0] == "sudo":  # sudo -u USER …
            del command[: 3 if command[1] == "-u" else 1]
    return commands


def assert_typeable(step: str, project: Project) -> None:
    """What the step tells to type is SQL with its role, a setting, an option of ours, or commands
    that parse, whose programs are here and whose psql finds the database."""
    text = typed(step)
    if text.endswith(";"):
        assert re.match(r"(GRANT|ALTER|CREATE|SELECT|SHOW|ROLLBACK|COMMIT) ", text), step
        assert re.search(r"\bas (a superuser|its owner|the owner)\b", step), step
    elif text.startswith("--"):
        assert text.split()[0] in {"--output-dir", "--env"}, step
    elif text and not re.fullmatch(r"[A-Z_]+(=\S*)?|/\S+|(host|local) .*", text):
        subprocess.run(["sh", "-n", "-c", text], check=True)
        assert "…" not in text, step
        for command in shell_commands(text):
            known = {"PATH": f"{project.bin_dir}:{os.environ['PATH']}:/usr/sbin:/sbin"}
            here = subprocess.run(["sh", "-c", 'command -v "$0"', command[0]], env=known)
            is_example = command[0].startswith(("/path/to/", ".venv/"))  # made by `-m venv` before
            assert here.returncode == 0 or is_example or command[0] in OF_THE_SYSTEM, step
            if command[0] == "psql" and "-l" not in command:
                assert {"-h", "-p", "-U", "-d"} <= set(command), step


# -- files ----------------------------------------------------------------------------------------


def contents_of(directory: Path) -> dict[str, str]:
    """All below `directory`, path to mode and content, to be compared with what it is later."""
    found = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        content = ""
        if stat.S_ISLNK(mode):
            content = os.readlink(path)
        elif stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(directory))] = f"{stat.filemode(mode)} {content}"
    return found


# A prefix for a command that may mount what only it sees.
MOUNTING = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))


@contextlib.contextmanager
def small_disk(options: str) -> Iterator[Path]:
    """A tmpfs with mount options such as `size=1m` or `nr_inodes=5,mode=500`.

    It is mounted in a mount namespace of its own, and seen through /proc: so it is gone when the
    process that holds it is, and takes no root where the kernel gives namespaces to everybody.
    """
    script = 'mount -t tmpfs -o "$0" tmpfs /tmp && echo mounted && exec cat'
    command = [*MOUNTING, "sh", "-c", script, options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline() == b"mounted\n", (
            f"This test needs a small tmpfs, and `{' '.join(command)}` gave none: run it as root."
        )
        try:
            yield Path(f"/proc/{holder.pid}/root/tmp")
        finally:
            holder.stdin.close()
