#!/usr/bin/env python3
"""Show backup_db.py at work: python3 tests/sample.py

Starts a PostgreSQL server of its own, loads the sample database of db/sample/ and types what a
user would: back up, verify, list, restore, and bring back one conversation that somebody deleted.
It works in a directory of its own, so that no settings or backups of yours are read or touched, and
leaves nothing behind.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import environment
from cluster import Cluster, ClusterError, installation

SERVER_VERSION = 17 if sys.platform == "linux" else 18
DATABASE, RESTORED = "project_chat_dev", "restored"
USER = "chat"
# Any user of the machine could come with one that is known, and lay a trap for the superuser.
PASSWORD = secrets.token_urlsafe(12)

# What the caller's environment may say about the caller's own databases.
ABOUT_DATABASES = re.compile(r"(DEV_)?DB_|PG|BACKUP_|ENV_MODE$")

TABLES = """
SELECT relname FROM pg_class
 WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY oid
"""

# Each table with what belongs to the conversation that is deleted, parents first.
LOST = {
    "conversations": "id = 42",
    "messages": "conversation_id = 42",
    "conversation_index": "conversation_id = 42",
}
COUNT = """
SELECT title, count(*) AS messages FROM conversations AS c JOIN messages ON conversation_id = c.id
 WHERE c.id = 42 GROUP BY title
"""


class SampleFailure(Exception):
    """A command did not do what the sample is here to show."""


class Interrupted(BaseException):
    """A signal that ends the sample; its number is the argument."""


def interrupt(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def copy_project(directory: Path, settings: Mapping[str, str]) -> None:
    """The script as a user has it, with a .env.local that leads to the sample database."""
    shutil.copytree(environment.PROJECT / "brain_core", directory / "brain_core")
    for name in ("backup_db.py", "requirements.txt"):
        shutil.copy(environment.PROJECT / name, directory)
    env_local = directory / ".env.local"
    env_local.touch(mode=0o600)
    env_local.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))


def load_sample(cluster: Cluster) -> None:
    """The sample database, as an application has one: with an owner who is no superuser."""
    cluster.psql(f"CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{PASSWORD}'")
    cluster.create_database(DATABASE, f"--owner={USER}")
    load_rows(cluster, DATABASE, USER)


def load_rows(cluster: Cluster, database: str, user: str) -> None:
    for name in ("schema.sql", "seed.sql"):
        sql = (environment.PROJECT / "db" / "sample" / name).read_text(encoding="utf-8")
        cluster.psql(sql, database, user)


def type_command(
    command: str, directory: Path, environ: Mapping[str, str], functions: str = ""
) -> None:
    """With shell functions it is a shell that reads it; they are not shown."""
    print(f"$ {command}", flush=True)
    words = ["sh", "-c", f"{functions}\n{command}"] if functions else shlex.split(command)
    with subprocess.Popen(words, cwd=directory, env=environ) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    print(flush=True)
    if status:
        raise SampleFailure(f"`{command}` exited with {status}.")


def compare_row_counts(cluster: Cluster) -> None:
    """Original and copy, counted by the server: the script has no part in this."""
    print(f"{'Table':<20}  {'Original':>8}  {'Restored':>8}")
    differing = []
    for table in cluster.psql(TABLES, DATABASE).splitlines():
        count = f'SELECT count(*) FROM "{table}"'
        original, restored = cluster.psql(count, DATABASE), cluster.psql(count, RESTORED)
        print(f"{table:<20}  {original:>8}  {restored:>8}")
        if original != restored:
            differing.append(table)
    if differing:
        raise SampleFailure(f"Restored with other row counts: {', '.join(differing)}.")


def bring_back(cluster: Cluster, directory: Path, environ: Mapping[str, str]) -> None:
    """The conversation, from the copy into the live database, as README.md has it."""
    readme = (environment.PROJECT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"^rows\(\) \{.*?^\}$", readme, re.MULTILINE | re.DOTALL)
    if not rows:
        raise SampleFailure("README.md has no function rows.")

    def everything() -> list[str]:
        return [cluster.psql(f"SELECT * FROM {t} WHERE {c}", DATABASE) for t, c in LOST.items()]

    there = everything()
    psql = f"psql --dbname={DATABASE}"
    count = f"{psql} --command='{' '.join(COUNT.split())}'"
    type_command(count, directory, environ)
    type_command(f"{psql} --command='DELETE FROM conversations WHERE id = 42'", directory, environ)
    type_command(count, directory, environ)
    print("The function rows stands in README.md, Restore, 5.\n")
    lost = " &&\n    ".join(f"rows {table} '{condition}'" for table, condition in LOST.items())
    type_command(f"{{ {lost}; }} > rows.sql", directory, environ, rows[0])
    type_command(f"{psql} --single-transaction --quiet --file=rows.sql", directory, environ)
    type_command(count, directory, environ)
    if everything() != there:
        raise SampleFailure("The conversation came back with other values.")


def show(cluster: Cluster) -> None:
    directory = cluster.directory / "project"
    directory.mkdir()
    settings = cluster.environment(DATABASE, USER, PASSWORD)
    copy_project(directory, settings)
    load_sample(cluster)

    # The server's own tools come first: what else is on PATH may be older than the server.
    environ = {k: v for k, v in os.environ.items() if not ABOUT_DATABASES.match(k)}
    folders = (environment.PYTHON.parent, cluster.bin_dir, environ.get("PATH", os.defpath))
    environ["PATH"] = os.pathsep.join(map(str, folders))
    environ |= {"TMPDIR": str(directory), "PSQLRC": os.devnull}

    type_command("cat .env.local", directory, environ)
    type_command("python3 backup_db.py", directory, environ)
    (dump,) = (directory / "db" / "backups").glob("*.dump")
    dump = dump.relative_to(directory)
    type_command(f"python3 backup_db.py --verify {dump}", directory, environ)
    type_command("python3 backup_db.py --list", directory, environ)

    libpq = {
        f"PG{name}": settings[f"DEV_DB_{name}"] for name in ("HOST", "PORT", "USER", "PASSWORD")
    }
    print("$ export", *(f"{name}={value}" for name, value in libpq.items()))
    environ |= libpq
    type_command(f"createdb --template=template0 {RESTORED}", directory, environ)
    restore = f"pg_restore --dbname={RESTORED} --exit-on-error {dump}"
    type_command(restore, directory, environ)
    compare_row_counts(cluster)
    print("\nSomebody deletes a conversation in the live database. It is in the copy:\n")
    bring_back(cluster, directory, environ)


def main() -> int:
    try:
        python = environment.python_for("sample")
        if Path(sys.prefix) != environment.VENV:
            os.execv(python, [python, __file__])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, interrupt)
        with Cluster(installation(SERVER_VERSION)) as cluster:
            show(cluster)
        print(
            "The server and its files are gone again. For your own database, copy .env.example to"
        )
        print(
            ".env.local and fill it in; then run python3 backup_db.py. README.md says how to go on."
        )
    except (environment.EnvironmentFailure, ClusterError, SampleFailure) as failure:
        print(f"\n✗ {failure}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return 128 + int(interrupted.args[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
