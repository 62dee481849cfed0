"""Every exit code from 1 to 8, each by several situations as they happen, and the words for it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import installation
from conftest import Stage
from environment import PROJECT
from sample import DATABASE, PASSWORD, USER
from support import (
    UNPRIVILEGED,
    VISITOR,
    Database,
    Project,
    Result,
    assert_typeable,
    contents_of,
    finish,
    readme_section,
    small_disk,
)

import backup_db
from backup_db import ExitCode


@dataclass(frozen=True)
class Situation:
    """What happens, and what a person must be told then."""

    code: ExitCode
    words: str  # in the error: those of the tool that met it, if there is one
    step: str  # in one of the steps
    first: str  # in the first of them, which is to lead to the mend
    arrange: Callable[[Stage], Result]
    servers: Sequence[int]  # whose programs it takes, beside those of 17


SITUATIONS: list[Situation] = []


def situation(
    code: ExitCode, words: str, step: str, first: str = "", servers: Sequence[int] = ()
) -> Callable[[Callable[[Stage], Result]], Callable[[Stage], Result]]:
    def register(arrange: Callable[[Stage], Result]) -> Callable[[Stage], Result]:
        SITUATIONS.append(Situation(code, words, step, first, arrange, servers))
        return arrange

    return register


# -- 1: general error -----------------------------------------------------------------------------


@situation(
    ExitCode.GENERAL,
    "another backup of this database is running: process ",
    "",
    "ps -ef | grep -wE 1",
)
def another_backup_is_running(stage: Stage) -> Result:
    project = stage.project()
    lock = stage.stack.enter_context((project.backups / ".project_chat_dev.lock").open("w"))
    lock.write("pid 1\nstarted 2025-01-27T14:30:00Z\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    result = project.run()
    assert "process 1, started 2025-01-27T14:30:00Z" in result.stderr
    return result


@situation(
    ExitCode.GENERAL,
    "there is no directory nowhere",
    "--output-dir DIR",
    ": python3 backup_db.py --list",
)
def directory_to_list_is_missing(stage: Stage) -> Result:
    return stage.project().run("--list", "--output-dir", "nowhere")


@situation(ExitCode.GENERAL, "the output could not be written: No space left on", "Free space")
def output_does_not_fit(stage: Stage) -> Result:
    return stage.project().run("--list", prefix=("sh", "-c", 'exec "$@" >/dev/full', "sh"))


def run_without_packages(project: Project, env: Mapping[str, str]) -> Result:
    return finish(
        subprocess.Popen(
            [sys.executable, "-S", project.directory / "backup_db.py"],
            cwd=project.directory,
            env={**project.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )


@situation(ExitCode.GENERAL, "No module named 'dotenv'", "pip install -r requirements.txt")
def dotenv_is_not_installed(stage: Stage) -> Result:
    return run_without_packages(stage.project(), {})


@situation(ExitCode.GENERAL, "No module named 'psycopg2'", "pip install -r requirements.txt")
def psycopg2_is_not_installed(stage: Stage) -> Result:
    project = stage.project()
    (project.directory / ".env.local").unlink()
    return run_without_packages(project, Database(stage.cluster, DATABASE).settings())


@situation(ExitCode.GENERAL, "brain_core/config.py is missing: ModuleNotFoundError", "README.md")
def config_is_missing(stage: Stage) -> Result:
    project = stage.project()
    (project.directory / "brain_core" / "config.py").unlink()
    return project.run()


# -- 2: configuration error -----------------------------------------------------------------------


@situation(ExitCode.CONFIGURATION, "no database is configured", "python3 tests/sample.py")
def nothing_is_configured(stage: Stage) -> Result:
    return stage.make_project().run()


@situation(
    ExitCode.CONFIGURATION, "; .env.local is there, but lacks DB_NAME", "--env dev", "Set DB_NAME"
)
def database_name_is_missing(stage: Stage) -> Result:
    return stage.project().run("--env", "prod")


@situation(ExitCode.CONFIGURATION, "; there is no .env.local in ", "", "Set DB_NAME in ")
def settings_are_missing(stage: Stage) -> Result:
    project = stage.project()
    (project.directory / ".env.local").unlink()
    result = project.run("--env", "prod", env={"DATABASE_URL": "postgres://a:secret-0815@b/c"})
    assert "; DATABASE_URL is not read" in result.stderr
    assert "secret-0815" not in result.stderr
    assert "--env dev" not in result.stderr  # nothing is set for that one either
    return result


@situation(
    ExitCode.CONFIGURATION, "the port is not a number from 1 to 65535", "in .env.local: DEV_DB_PORT"
)
def port_is_none(stage: Stage) -> Result:
    return stage.project(settings={"DEV_DB_PORT": "65536"}).run()


@situation(ExitCode.CONFIGURATION, "ENV_MODE is 'stage'", "in the environment: ENV_MODE")
def env_mode_is_none(stage: Stage) -> Result:
    return stage.project().run(env={"ENV_MODE": "stage"})


@situation(ExitCode.CONFIGURATION, "BACKUP_KEEP is '0'", "in .env.local: BACKUP_KEEP")
def keep_is_none(stage: Stage) -> Result:
    return stage.project(settings={"BACKUP_KEEP": "0"}).run()


@situation(
    ExitCode.CONFIGURATION,
    'pg_dump: error: unrecognized compression algorithm: "zip"',
    "in .env.local: BACKUP_COMPRESS",
)
def compression_is_none(stage: Stage) -> Result:
    return stage.project(settings={"BACKUP_COMPRESS": "zip:3"}).run()


@situation(ExitCode.CONFIGURATION, "line 1 of ", "NAME=value")
def line_does_not_parse(stage: Stage) -> Result:
    project = stage.project()
    (project.directory / ".env.local").write_text("DEV_DB_PASSWORD secret-0815\n")
    result = project.run()
    assert "secret-0815" not in result.stderr
    return result


@situation(ExitCode.CONFIGURATION, r"DEV_DB_HOST is 'h\x1b\r': it ends in a", "DEV_DB_HOST")
def host_ends_in_a_carriage_return(stage: Stage) -> Result:
    return stage.project().run(env={"DEV_DB_HOST": "h\x1b\r"})


# -- 3: database connection error -----------------------------------------------------------------


@situation(ExitCode.CONNECTION, "Connection refused", "pg_isready -h 127.0.0.1 -p ")
def nobody_listens(stage: Stage) -> Result:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listened on
        return stage.project(settings={"DEV_DB_PORT": str(taken.getsockname()[1])}).run()


@situation(ExitCode.CONNECTION, "timeout expired", "pg_isready -h 127.0.0.1 -p ")
def nobody_answers(stage: Stage) -> Result:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        settings = {"DEV_DB_PORT": str(silent.getsockname()[1]), "PGCONNECT_TIMEOUT": "1"}
        return stage.project(settings=settings).run()


@situation(
    ExitCode.CONNECTION,
    'could not translate host name "host.invalid"',
    "in .env.local: DEV_DB_HOST",
)
def host_is_unknown(stage: Stage) -> Result:
    return stage.project(settings={"DEV_DB_HOST": "host.invalid"}).run()


@situation(
    ExitCode.CONNECTION,
    'connection to server on socket "/nowhere/.s.PGSQL.5432" failed: No such file or directory',
    "in .env.local: DEV_DB_HOST",
)
def socket_is_missing(stage: Stage) -> Result:
    return stage.project(settings={"DEV_DB_HOST": "/nowhere", "DEV_DB_PORT": "5432"}).run()


@situation(ExitCode.CONNECTION, 'FATAL: database "nowhere" does not exist', "createdb nowhere -h ")
def database_is_missing(stage: Stage) -> Result:
    return stage.project(settings={"DEV_DB_NAME": "nowhere"}).run()


@situation(
    ExitCode.CONNECTION, 'database "nowhere" does not exist', " --env prod --list", "psql -l "
)
def production_is_missing(stage: Stage) -> Result:
    """An empty one in its place would be backed up as a success."""
    settings = {"DB_NAME": "nowhere", **Database(stage.cluster, "nowhere").settings(prefix="")}
    result = stage.project(settings=settings).run("--env", "prod")
    assert "createdb" not in result.stderr
    return result


@situation(
    ExitCode.CONNECTION,
    f'FATAL: password authentication failed for user "{USER}"',
    "in .env.local: DEV_DB_PASSWORD",
    "in .env.local: DEV_DB_PASSWORD",
)
def password_is_wrong(stage: Stage) -> Result:
    return stage.run_as(Database(stage.cluster, DATABASE), USER, PASSWORD + "x")


@situation(
    ExitCode.CONNECTION,
    "FATAL: password authentication failed",
    "The password keeps its quotes. Remove the quotes in .env.local: DEV_DB_PASSWORD",
)
def password_keeps_its_quotes(stage: Stage) -> Result:
    return stage.run_as(Database(stage.cluster, DATABASE), USER, f'"{PASSWORD}"')


@situation(
    ExitCode.CONNECTION,
    "FATAL: password authentication failed",
    "",
    'The password stands without quotes, and has " #"',
)
def password_is_cut_by_a_comment(stage: Stage) -> Result:
    project = stage.make_project(Database(stage.cluster, DATABASE))
    with (project.directory / ".env.local").open("a") as file:
        file.write(f"DEV_DB_USER={USER}\nDEV_DB_PASSWORD=pass #word\n")
    return project.run()


@situation(
    ExitCode.CONNECTION, "no password supplied", "Set the password in .env.local: DEV_DB_PASSWORD"
)
def password_is_missing(stage: Stage) -> Result:
    return stage.run_as(Database(stage.cluster, DATABASE), USER, "")


@situation(ExitCode.CONNECTION, 'FATAL: role "nobody" does not exist', "in .env.local: DEV_DB_USER")
def role_is_missing(stage: Stage) -> Result:
    directory = str(stage.cluster.directory)
    return stage.project(settings={"DEV_DB_HOST": directory, "DEV_DB_USER": "nobody"}).run()


@situation(
    ExitCode.CONNECTION,
    "server does not support SSL, but SSL was required",
    "set to prefer in .env.local: PGSSLMODE",
)
def server_has_no_tls(stage: Stage) -> Result:
    return stage.project(settings={"PGSSLMODE": "require"}).run()


@situation(ExitCode.CONNECTION, "is not currently accepting", "", "ALLOW_CONNECTIONS true")
def database_is_closed(stage: Stage) -> Result:
    database = stage.database()
    stage.cluster.psql(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
    return stage.make_project(database).run()


@situation(ExitCode.CONNECTION, 'too many connections for role "role_', "", "CONNECTION LIMIT -1;")
def role_may_connect_once(stage: Stage) -> Result:
    return stage.run_as(stage.database(), stage.role("CONNECTION LIMIT 1"))


@situation(ExitCode.CONNECTION, "too many connections for database", "", "CONNECTION LIMIT -1;")
def database_is_full(stage: Stage) -> Result:
    role, database = stage.role(), stage.database()
    stage.cluster.psql(f"ALTER DATABASE {database.name} CONNECTION LIMIT 1")
    return stage.run_as(database, role)


@situation(ExitCode.CONNECTION, "is not permitted to log in", "LOGIN;")
def role_may_not_log_in(stage: Stage) -> Result:
    role = stage.role()
    stage.cluster.psql(f"ALTER ROLE {role} NOLOGIN")
    socket_directory = {"DEV_DB_HOST": str(stage.cluster.directory), "DEV_DB_USER": role}
    return stage.project(settings=socket_directory).run()


@situation(
    ExitCode.CONNECTION, "password retrieved from file", "The password in ~/.pgpass is wrong"
)
def password_in_pgpass_is_wrong(stage: Stage) -> Result:
    project = stage.make_project(settings=Database(stage.cluster, DATABASE).settings(USER))
    pgpass = project.directory / "home" / ".pgpass"
    pgpass.write_text("*:*:*:*:wrong\n")
    pgpass.chmod(0o600)
    return project.run(env={"PGPASSFILE": str(pgpass)})


@situation(ExitCode.CONNECTION, "Peer authentication failed", "set the host to 127.0.0.1 in ")
def socket_is_for_the_role_of_the_same_name(stage: Stage) -> Result:
    role = stage.role()
    stage.hba(f"local all {role} peer")
    socket_directory = {"DEV_DB_HOST": str(stage.cluster.directory), "DEV_DB_USER": role}
    return stage.project(settings=socket_directory).run()


@situation(ExitCode.CONNECTION, "pg_hba.conf rejects connection", "pg_hba.conf: host ")
def client_is_not_let_in(stage: Stage) -> Result:
    role = stage.role()
    stage.hba(f"host all {role} all reject")
    return stage.run_as(Database(stage.cluster, DATABASE), role)


@situation(ExitCode.CONNECTION, "no encryption", "set to require in .env.local: PGSSLMODE")
def server_demands_tls(stage: Stage) -> Result:
    role = stage.role()
    stage.hba(f"hostnossl all {role} all reject")
    settings = Database(stage.cluster, DATABASE).settings(role, "secret")
    return stage.make_project(settings={**settings, "PGSSLMODE": "disable"}).run()


@situation(ExitCode.CONNECTION, "", "", "in .env.local: PGSSLMODE")
def sslmode_is_none(stage: Stage) -> Result:
    return stage.project(settings={"PGSSLMODE": "required"}).run()


@situation(ExitCode.CONNECTION, "", "", "in the environment: PGTARGETSESSIONATTRS")
def session_attributes_are_none(stage: Stage) -> Result:
    return stage.project().run(env={"PGTARGETSESSIONATTRS": "best"})


@situation(ExitCode.CONNECTION, "", "", "in .env.local: PGOPTIONS")
def options_are_none(stage: Stage) -> Result:
    return stage.project(settings={"PGOPTIONS": "-c nonsense=1"}).run()


@situation(ExitCode.CONNECTION, "", "", "in .env.local: PGOPTIONS")
def options_do_not_parse(stage: Stage) -> Result:
    return stage.project(settings={"PGOPTIONS": "nonsense"}).run()


@situation(ExitCode.CONNECTION, "channel binding", "", "in .env.local: PGCHANNELBINDING")
def channel_cannot_be_bound(stage: Stage) -> Result:
    return stage.project(settings={"PGCHANNELBINDING": "require"}).run()


@situation(ExitCode.CONNECTION, " is too long", "to 127.0.0.1 in", "in .env.local: DEV_DB_HOST")
def socket_path_is_too_long(stage: Stage) -> Result:
    return stage.project(settings={"DEV_DB_HOST": "/tmp/" + "x" * 120}).run()


@situation(
    ExitCode.CONNECTION, "user with ID 12345 does not exist", "", "in .env.local: DEV_DB_USER"
)
def user_has_no_name(stage: Stage) -> Result:
    settings = Database(stage.cluster, DATABASE).settings()
    return stage.make_project(settings={**settings, "DEV_DB_USER": ""}).run(prefix=VISITOR)


@situation(ExitCode.CONNECTION, "not recognized by setlocale", "", "dpkg-reconfigure locales")
def locale_is_missing(stage: Stage) -> Result:
    database = stage.database()
    stage.cluster.psql(
        f"UPDATE pg_database SET datcollate = 'xx_YY.UTF-8' WHERE datname = '{database.name}'"
    )
    return stage.make_project(database).run()


# -- 4: permission error --------------------------------------------------------------------------


@situation(
    ExitCode.PERMISSION,
    'FATAL: permission denied for database "chat_',
    'GRANT CONNECT ON DATABASE "chat_',
)
def role_may_not_connect(stage: Stage) -> Result:
    database = stage.database()
    database.psql(f"REVOKE CONNECT ON DATABASE {database.name} FROM PUBLIC")
    return stage.run_as(database, stage.role())


@situation(ExitCode.PERMISSION, "table: public.a, public.b", "GRANT SELECT ON")
def tables_may_not_be_read(stage: Stage) -> Result:
    database = stage.database()
    database.psql("CREATE TABLE a (); CREATE TABLE b (); CREATE SEQUENCE s")
    result = stage.run_as(database, stage.role())
    assert "GRANT SELECT ON TABLE public.a, public.b TO role_" in result.stderr
    assert "GRANT SELECT ON SEQUENCE public.s TO role_" in result.stderr
    return result


@situation(ExitCode.PERMISSION, "row security: public.a", "BYPASSRLS")
def rows_would_be_hidden(stage: Stage) -> Result:
    role = stage.role()
    database = stage.database()
    database.psql("CREATE TABLE a (); ALTER TABLE a ENABLE ROW LEVEL SECURITY")
    database.psql(f"GRANT SELECT ON a TO {role}")
    return stage.run_as(database, role)


@situation(
    ExitCode.PERMISSION, "locked/.project_chat_dev.lock: Permission denied", ": ls -ld locked"
)
def directory_may_not_be_written(stage: Stage) -> Result:
    project = stage.project()
    (project.directory / "locked").mkdir(mode=0o500)
    return project.run("--output-dir", "locked", prefix=UNPRIVILEGED)


@situation(
    ExitCode.PERMISSION, ".dump: Not a directory", "--output-dir db/backups", " --verify db/"
)
def directory_is_a_dump(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    return project.run("--output-dir", dump.relative_to(project.directory))


@situation(ExitCode.PERMISSION, "backup_db.py: Not a directory", "--output-dir DIR", ": ls -ld ")
def directory_is_a_file(stage: Stage) -> Result:
    return stage.project().run("--output-dir", "backup_db.py")


@situation(ExitCode.PERMISSION, "Read-only file system", "--output-dir DIR")
def file_system_is_read_only(stage: Stage) -> Result:
    disk = stage.stack.enter_context(small_disk("ro"))
    return stage.project().run("--output-dir", disk / "backups")


@situation(ExitCode.PERMISSION, ".env.local: Permission denied", "", "chmod u+rwX ")
def settings_may_not_be_read(stage: Stage) -> Result:
    project = stage.project()
    (project.directory / ".env.local").chmod(0)
    return project.run(prefix=UNPRIVILEGED)


@situation(ExitCode.PERMISSION, ".env.local: Permission denied", "", ": sudo -u '#12345' ")
def settings_are_of_another_user(stage: Stage) -> Result:
    """Of the nightly job's: taken from it, that would fail from now on."""
    project = stage.project()
    path = project.directory / ".env.local"
    path.chmod(0o600)
    os.chown(path, 12345, 12345)
    result = project.run(prefix=UNPRIVILEGED)
    assert "chown" not in result.stderr
    return result


@situation(ExitCode.PERMISSION, "dev.lock: Permission denied", "", ": ls -ld ")
def directory_is_of_the_system(stage: Stage) -> Result:
    """Of root's, and not one that we make."""
    project = stage.project()
    directory = project.directory.parent / "backups"
    directory.mkdir(mode=0o755)
    result = project.run("--output-dir", directory, prefix=VISITOR)
    assert "chown" not in result.stderr
    return result


@situation(ExitCode.PERMISSION, ".dump: Permission denied", ".dump", "chmod u+rwX ")
def dump_may_not_be_read(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    dump.chmod(0)
    return project.run("--verify", dump, prefix=UNPRIVILEGED)


@situation(
    ExitCode.PERMISSION, "locked: Permission denied", "list another directory", "chmod u+rwX "
)
def directory_may_not_be_listed(stage: Stage) -> Result:
    project = stage.project()
    (project.directory / "locked").mkdir(mode=0o300)
    return project.run("--list", "--output-dir", "locked", prefix=UNPRIVILEGED)


# -- 5: disk space error --------------------------------------------------------------------------


@situation(ExitCode.DISK_SPACE, " free, at least ", "df -h ")
def disk_is_too_small(stage: Stage) -> Result:
    disk = stage.stack.enter_context(small_disk("size=12k"))
    return stage.project().run("--output-dir", disk)


@situation(ExitCode.DISK_SPACE, "No space left on device", "BACKUP_KEEP", "df -h ")
def disk_fills_while_writing(stage: Stage) -> Result:
    disk = stage.stack.enter_context(small_disk("size=200k"))
    project = stage.project()
    # No tick comes that could see the file grow, and stop it.
    project.rewrite({"NEED_OF_DATABASE": 0, "TICK_SECONDS": 60})
    result = project.run("--output-dir", disk)
    assert [path.name for path in disk.iterdir()] == [".project_chat_dev.lock"]
    return result


@situation(ExitCode.DISK_SPACE, "No space left on device", "df -i ")
def disk_has_no_inodes(stage: Stage) -> Result:
    disk = stage.stack.enter_context(small_disk("nr_inodes=2"))
    return stage.project().run("--output-dir", disk)


# -- 6: tool error --------------------------------------------------------------------------------


@situation(ExitCode.TOOL, "pg_dump not found on PATH (/nowhere)", "", "install postgresql-client")
def pg_dump_is_missing(stage: Stage) -> Result:
    return stage.project(constants={"TOOL_FOLDERS": ()}).run(env={"PATH": "/nowhere"})


@situation(ExitCode.TOOL, "pg_restore not found on PATH", "PATH=")
def pg_restore_is_elsewhere(stage: Stage) -> Result:
    bin_dir = str(stage.cluster.bin_dir)
    project = stage.project(constants={"TOOL_FOLDERS": (bin_dir,)})
    (project.fakes / "pg_dump").symlink_to(Path(bin_dir) / "pg_dump")
    result = project.run(env={"PATH": str(project.fakes)})
    here = Path(sys.executable).parent  # or cron would lose the virtual environment
    assert f"above yours in the crontab: PATH={here}:{bin_dir}:" in result.stderr
    return result


@situation(ExitCode.TOOL, "pg_restore not found on PATH (/nowhere)", "", "version 17 or newer")
def pg_restore_is_missing_to_verify(stage: Stage) -> Result:
    project = stage.project(constants={"TOOL_FOLDERS": ()})
    return project.run("--verify", *project.dumps(), env={"PATH": "/nowhere"})


@situation(ExitCode.TOOL, "is on PATH but may not be run", "chmod +x ")
def pg_dump_is_not_executable(stage: Stage) -> Result:
    project = stage.project(constants={"TOOL_FOLDERS": ()})
    (project.fakes / "pg_dump").touch(mode=0o644)
    return project.run(env={"PATH": str(project.fakes)})


@situation(ExitCode.TOOL, "--version does not answer with a version: libpq.so: gone", " --version")
def pg_dump_does_not_start(stage: Stage) -> Result:
    project = stage.project()
    project.fake("pg_dump", "echo libpq.so: gone >&2; exit 127")
    return project.run()


@situation(
    ExitCode.TOOL,
    "too old for the server, which is version 17",
    "version 17 or newer",
    servers=[16],
)
def pg_dump_is_older_than_the_server(stage: Stage) -> Result:
    old = installation(16)
    return stage.project(constants={"TOOL_FOLDERS": ()}).run(env={"PATH": f"{old}:/usr/bin:/bin"})


@situation(
    ExitCode.TOOL, "too old for this backup, which pg_dump 17", "version 17 or newer", servers=[16]
)
def pg_restore_is_older_than_the_dump(stage: Stage) -> Result:
    project = stage.project(constants={"TOOL_FOLDERS": ()})
    old = installation(16)
    return project.run("--verify", *project.dumps(), env={"PATH": f"{old}:/usr/bin:/bin"})


@situation(ExitCode.TOOL, "is built without zstd", "BACKUP_COMPRESS=gzip:4", servers=[18])
def pg_restore_is_built_without_the_compression(stage: Stage) -> Result:
    project = stage.project(constants={"TOOL_FOLDERS": ()})
    without_zstd = installation(18)
    return project.run("--verify", *project.dumps(), env={"PATH": f"{without_zstd}:/usr/bin:/bin"})


# -- 7: backup creation error ---------------------------------------------------------------------

# In the place of pg_dump: does what it says when it is to dump, and answers all else itself.
INSTEAD_OF_DUMPING = """
case "$*" in *--snapshot*) {} ;; esac
exec "$real" "$@"
"""


@situation(ExitCode.CREATION, "pg_dump: error: the moon is full", "server's log")
def pg_dump_fails(stage: Stage) -> Result:
    project = stage.project()
    action = "echo 'pg_dump: error: the moon is full' >&2; exit 1"
    project.fake("pg_dump", INSTEAD_OF_DUMPING.format(action))
    return project.run()


@situation(ExitCode.CREATION, "pg_dump: terminated by user", "", "nothing is wrong with the server")
def pg_dump_is_ended(stage: Stage) -> Result:
    project = stage.project()
    action = "echo 'pg_dump: terminated by user' >&2; exit 1"
    project.fake("pg_dump", INSTEAD_OF_DUMPING.format(action))
    result = project.run()
    assert "server's log" not in result.stderr
    return result


@situation(ExitCode.CREATION, "pg_dump was ended by signal 9: Killed", "", "dmesg")
def pg_dump_is_killed(stage: Stage) -> Result:
    project = stage.project()
    project.fake("pg_dump", INSTEAD_OF_DUMPING.format("kill -9 $$"))
    return project.run()


@situation(ExitCode.CREATION, "the connection to the server was lost", "Run the backup again")
def session_is_terminated(stage: Stage) -> Result:
    project = stage.project()
    terminate = (
        '"$(dirname "$real")/psql" -qc "SELECT pg_terminate_backend(pid) FROM pg_stat_activity'
        " WHERE application_name = 'backup_db'\" >/dev/null; exec sleep 60"
    )
    project.fake("pg_dump", INSTEAD_OF_DUMPING.format(terminate))
    return project.run()


@situation(ExitCode.CREATION, "the limit on file sizes was reached", "", "ulimit -f")
def file_size_is_limited(stage: Stage) -> Result:
    return stage.project().run(prefix=("prlimit", "--fsize=100000"))


@situation(ExitCode.CREATION, ": File name too long", "--output-dir DIR", "shorter path")
def directory_name_is_too_long(stage: Stage) -> Result:
    return stage.project().run("--output-dir", "x" * 300)


@situation(ExitCode.CREATION, "holds the table a", "pg_terminate_backend")
def table_stays_locked(stage: Stage) -> Result:
    database = stage.database()
    database.psql("CREATE TABLE a ()")
    constants = {"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.1}
    project = stage.make_project(database, constants=constants)
    psql = subprocess.Popen(
        [stage.cluster.bin_dir / "psql", "-qAt", "-U", "postgres", "-d", database.name],
        env={"PGHOST": str(stage.cluster.directory), "PGPORT": str(stage.cluster.port)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with psql:
        assert psql.stdin
        assert psql.stdout
        psql.stdin.write(b"BEGIN; LOCK TABLE a; SELECT 'locked';\n")
        psql.stdin.flush()
        assert psql.stdout.readline() == b"locked\n"
        return project.run()


# -- 8: verification error ------------------------------------------------------------------------


@situation(ExitCode.VERIFICATION, "the new dump does not hold what the database held", "dmesg")
def new_dump_is_cut_short(stage: Stage) -> Result:
    project = stage.project()
    cut = (
        'for file; do file="${file#--file=}"; case "$file" in *.partial) break;; esac; done;'
        ' "$real" "$@"; truncate -s -5000 "$file"; exit 0'
    )
    project.fake("pg_dump", INSTEAD_OF_DUMPING.format(cut))
    result = project.run()
    assert "pg_restore: error: could not " in result.stderr
    return result


@situation(
    ExitCode.VERIFICATION, "rows of table messages: 3419 in the dump, 3420 expected", "again"
)
def new_dump_lacks_a_row(stage: Stage) -> Result:
    project = stage.project()
    project.fake(
        "pg_restore",
        'case "$*" in *--data-only*) "$real" "$@" | sed "/^3420\\t/d"; exit ;; esac\n'
        'exec "$real" "$@"',
    )
    return project.run()


@situation(
    ExitCode.VERIFICATION,
    "This file has changed since it was written: expected ",
    "its bytes have changed",
)
def bytes_are_appended(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    with dump.open("ab") as file:
        file.write(b"x")
    return project.run("--verify", dump)


@situation(ExitCode.VERIFICATION, "This file has changed since it was written: ", "--list")
def a_byte_is_another(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    content = bytearray(dump.read_bytes())
    content[len(content) // 2] ^= 1
    dump.write_bytes(content)
    return project.run("--verify", dump)


@situation(
    ExitCode.VERIFICATION,
    "pg_restore: error: could not read from input file: end of file",
    "--list",
)
def dump_is_empty(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    dump.write_bytes(b"")
    return project.run("--verify", dump)


@situation(ExitCode.VERIFICATION, "there is no file nowhere.dump", "--list")
def dump_is_missing(stage: Stage) -> Result:
    return stage.project().run("--verify", "nowhere.dump")


@situation(
    ExitCode.VERIFICATION, "there is no file project_chat_", "", " --verify db/backups/project"
)
def dump_is_named_as_the_list_prints_it(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    return project.run("--verify", dump.name)


@situation(ExitCode.VERIFICATION, "is not a .dump file", "", "--list --output-dir db/backups")
def directory_is_to_be_verified(stage: Stage) -> Result:
    return stage.project().run("--verify", "db/backups/")


@situation(ExitCode.VERIFICATION, "there is no metadata file db/backups/", "pg_restore --file=/dev")
def metadata_is_missing(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    backup_db.metadata_path(dump).unlink()
    return project.run("--verify", dump)


@situation(ExitCode.VERIFICATION, "describes another backup: project_chat_", "own metadata file")
def metadata_is_another_backups(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    other = dump.with_name("other.dump")
    other.write_bytes(dump.read_bytes()[:-1])
    shutil.copy(backup_db.metadata_path(dump), backup_db.metadata_path(other))
    return project.run("--verify", other)


@situation(ExitCode.VERIFICATION, "there is no metadata file ", "--file=/dev/null")
def dump_is_plain_sql(stage: Stage) -> Result:
    project = stage.project()
    script = project.backups / "script.dump"
    script.write_text("SELECT 1;\n")
    return project.run("--verify", script)


@situation(ExitCode.VERIFICATION, 'the key "table_counts" is missing', "metadata file back")
def metadata_lacks_a_key(stage: Stage) -> Result:
    project = stage.project()
    (dump,) = project.dumps()
    path = backup_db.metadata_path(dump)
    values = json.loads(path.read_text())
    del values["table_counts"]
    path.write_text(json.dumps(values))
    return project.run("--verify", dump)


# -- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.arrange.__name__, marks=pytest.mark.servers(*case.servers))
        for case in SITUATIONS
    ],
)
def test_situation_has_its_code_its_words_and_its_steps(case: Situation, stage: Stage) -> None:
    result = case.arrange(stage)
    result.failed_with(case.code)
    headline, *body = result.stderr.split("\n\n")
    assert headline in {
        f"✗ Backup failed: {case.code.category}",
        f"✗ Listing failed: {case.code.category}",
        "✗ Backup verification failed"
        + ("" if case.code is ExitCode.VERIFICATION else f": {case.code.category}"),
    }
    if headline.startswith("✗ Backup failed"):  # one line for the log, with what is known
        place = r"(dev|prod) .+ at .+, port \d+|--env \w+"
        last = body.pop()
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ ({place})\n", last), result
    error, steps = body[-2:]
    assert error.startswith("Error: ")
    assert any(words in error for words in case.words.split("|")), f"no {case.words!r}:{result}"
    title, *numbered = steps.splitlines()
    assert title == "Troubleshooting:"
    for number, step in enumerate(numbered, 1):
        assert step.startswith(f"  {number}. "), f"not step {number}:{result}"
        assert_typeable(step, stage.make_project())
    assert any(case.step in step for step in numbered), f"no step says {case.step!r}:{result}"
    assert case.first in numbered[0], f"the first step does not say {case.first!r}:{result}"
    # No step moves, renames or removes a backup.
    assert not re.search(r"\b(mv|rm) .*\.(dump|metadata)", steps), result
    # Written for a file as well as for a terminal.
    assert not re.search(r"[\r\x1b]", result.stderr)


def test_every_code_has_several_situations() -> None:
    codes = [case.code for case in SITUATIONS]
    assert all(codes.count(code) >= 3 for code in ExitCode)
    assert [int(code) for code in ExitCode] == [1, 2, 3, 4, 5, 6, 7, 8]


# What is broken in the copy of the script by a value that its code cannot use.
BUGS: dict[str, tuple[dict[str, object], str]] = {
    "in the main thread": ({"TICK_SECONDS": "many"}, "Backup failed"),
    "in another thread": ({"HASH_BLOCK_BYTES": "many"}, "Backup failed"),
    "in --verify": ({"READ_BYTES": "many"}, "Backup verification failed"),
    "in --list": ({"METADATA_MAX_BYTES": "many"}, "Listing failed"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_a_line_a_traceback_and_exit_code_1(bug: str, stage: Stage) -> None:
    constants, headline = BUGS[bug]
    project = stage.project(constants=constants)
    before = contents_of(project.backups)
    mode = {"Backup failed": [], "Listing failed": ["--list"]}
    result = project.run(*mode.get(headline, ["--verify", *project.dumps()]))
    assert result.returncode == 1, result
    assert not result.stdout, result
    first, empty, second, *_frames, last = result.stderr.splitlines()
    assert first == f"✗ {headline}: a bug in backup_db.py; please report it with the lines below"
    assert (empty, second) == ("", "Traceback (most recent call last):"), result
    assert re.match(r"(TypeError|ValueError): ", last), result
    after = contents_of(project.backups)
    after.pop(".project_chat_dev.lock", None)
    assert after == before


@pytest.mark.parametrize("failing", [pg_dump_fails, new_dump_is_cut_short, database_is_missing])
def test_failure_leaves_the_backups_as_they_were(
    failing: Callable[[Stage], Result], stage: Stage, tmp_path: Path
) -> None:
    failing(stage)
    (backups,) = tmp_path.glob("project-*/db/backups")
    before, after = (
        {name: state for name, state in contents_of(folder).items() if not name.endswith(".lock")}
        for folder in (stage.sample_dump.parent, backups)
    )
    assert after == before


# -- what the README says -------------------------------------------------------------------------


def table_rows(section: str) -> Sequence[Sequence[str]]:
    """The cells of a section's only table, below its head."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    return rows[2:] if set("".join(rows[1])) <= {"-", " "} else rows


def test_readme_has_the_exit_codes() -> None:
    rows = table_rows(readme_section("Exit codes"))
    assert [tuple(row[:2]) for row in rows] == [
        ("0", ""),
        *((str(int(code)), code.category) for code in ExitCode),
        ("130, 143, 129", ""),
    ]


def test_readme_has_the_fields_of_the_metadata() -> None:
    rows = table_rows(readme_section("Files"))
    fields = list(backup_db.Metadata._fields)
    told = [key for row in rows for key in re.findall(r"`(\w+)`", row[0])]
    assert sorted(told) == sorted(fields)


def test_readme_has_the_options_of_the_contract() -> None:
    commands = [row[0].strip("`") for row in table_rows(readme_section("Your own database"))]
    options = {word for command in commands for word in command.split() if word.startswith("--")}
    assert options == {"--env", "--output-dir", "--verify", "--list"}


def test_first_commands_of_the_readme_are_there() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    first = text.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert first == ["python3 tests/sample.py", "python3 tests/run.py"]
    for command in first:
        assert (PROJECT / command.split()[1]).is_file()
