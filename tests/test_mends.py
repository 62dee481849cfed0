"""What a message tells a person to type: it parses, its programs are there, and it mends."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from conftest import Stage
from environment import PROJECT
from faults import FILE, fake_call, transaction
from sample import DATABASE, PASSWORD, USER
from support import (
    UNPRIVILEGED,
    VISITOR,
    Database,
    Project,
    Result,
    assert_typeable,
    metadata_path,
    new_database,
    typed,
)

IMPATIENT = {"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.1}


# -- pasted, as the user who saw it, or as the superuser where the step says so -------------------


@dataclass(frozen=True)
class Mend:
    """A failure, and the pattern of the steps that are its mend, pasted in their order."""

    arrange: Callable[[Stage], Project]
    steps: str
    arguments: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()


MENDS: list[Mend] = []


def mend(
    steps: str, *arguments: str, prefix: tuple[str, ...] = ()
) -> Callable[[Callable[[Stage], Project]], Callable[[Stage], Project]]:
    def register(arrange: Callable[[Stage], Project]) -> Callable[[Stage], Project]:
        MENDS.append(Mend(arrange, steps, arguments, prefix))
        return arrange

    return register


def restricted(stage: Stage, sql: str = "", attributes: str = "") -> Project:
    """A project of a role that may do nothing, in a database with `sql` in it."""
    role = stage.role(attributes)
    database = stage.database()
    database.psql(sql.format(role=role, database=database.name))
    return stage.make_project(settings=database.settings(role, "secret"))


TABLES = """
CREATE SCHEMA closed; CREATE TABLE closed.a (n serial); INSERT INTO closed.a DEFAULT VALUES;
"""


@mend(r"GRANT pg_read_all_data")
def tables_are_all_closed(stage: Stage) -> Project:
    return restricted(stage, TABLES)


@mend(r"GRANT (USAGE|SELECT) ON")
def tables_are_each_closed(stage: Stage) -> Project:
    return restricted(stage, TABLES)


@mend(r"ON LARGE OBJECT")
def large_object_is_closed(stage: Stage) -> Project:
    return restricted(stage, "SELECT lo_from_bytea(0, 'x')")


@mend(r"BYPASSRLS")
def rows_are_hidden(stage: Stage) -> Project:
    return restricted(
        stage,
        "CREATE TABLE a (); GRANT SELECT ON a TO {role};ALTER TABLE a ENABLE ROW LEVEL SECURITY",
    )


@mend(r"GRANT CONNECT")
def role_may_not_connect(stage: Stage) -> Project:
    return restricted(stage, "REVOKE CONNECT ON DATABASE {database} FROM PUBLIC")


@mend(r"ALLOW_CONNECTIONS")
def database_is_closed(stage: Stage) -> Project:
    database = stage.database()
    stage.cluster.psql(f"ALTER DATABASE {database.name} ALLOW_CONNECTIONS false")
    return stage.make_project(database)


@mend(r" LOGIN;")
def role_may_not_log_in(stage: Stage) -> Project:
    project = restricted(stage, "ALTER ROLE {role} NOLOGIN")
    with (project.directory / ".env.local").open("a") as file:
        file.write(f"DEV_DB_HOST='{stage.cluster.directory}'\n")
    return project


@mend(r"ALTER ROLE .* CONNECTION LIMIT")
def role_may_connect_once(stage: Stage) -> Project:
    return restricted(stage, attributes="CONNECTION LIMIT 1")


@mend(r"ALTER DATABASE .* CONNECTION LIMIT")
def database_takes_nobody(stage: Stage) -> Project:
    return restricted(stage, "ALTER DATABASE {database} CONNECTION LIMIT 0")


@mend(r"\.pgpass")
def pgpass_has_another_host(stage: Stage) -> Project:
    project = stage.make_project(settings=Database(stage.cluster, DATABASE).settings(USER))
    pgpass = project.directory / "home" / ".pgpass"
    pgpass.write_text(f"localhost:*:*:*:{PASSWORD}\n")
    pgpass.chmod(0o600)
    return project


@mend(r"PGSSLMODE$")
def server_has_no_tls(stage: Stage) -> Project:
    return stage.project(settings={"PGSSLMODE": "require"})


@mend(r"pg_hba\.conf: host |pg_reload_conf")
def client_is_not_let_in(stage: Stage) -> Project:
    project = restricted(stage)
    (role,) = re.findall("role_[0-9a-f]+", (project.directory / ".env.local").read_text())
    stage.hba(f"host all {role} all reject")
    return project


@mend(r"pg_terminate_backend")
def session_holds_a_table(stage: Stage) -> Project:
    database = stage.database()
    database.psql("CREATE TABLE a ()")
    stage.stack.enter_context(contextlib.suppress(BrokenPipeError))
    stage.stack.enter_context(transaction(database, "LOCK TABLE a"))
    return stage.make_project(database, constants=IMPATIENT)


def closed_folder(stage: Stage) -> Project:
    project = stage.project()
    (project.directory / "closed").mkdir(mode=0o500)
    return project


@mend(r"chmod u", "--output-dir", "closed/backups", prefix=UNPRIVILEGED)
def directory_cannot_be_made(stage: Stage) -> Project:
    return closed_folder(stage)


@mend(r"sudo mkdir", "--output-dir", "closed/backups", prefix=VISITOR)
def directory_of_root_cannot_be_made_in(stage: Stage) -> Project:
    return closed_folder(stage)


@mend(r"sudo chown", prefix=VISITOR)
def directory_is_of_root(stage: Stage) -> Project:
    """As after a run by sudo."""
    project = stage.project()
    project.backups.chmod(0o700)
    return project


@mend(r"sudo chown", prefix=VISITOR)
def lock_is_of_root(stage: Stage) -> Project:
    project = stage.project()
    os.chown(project.backups, 12345, 12345)
    (project.backups / ".project_chat_dev.lock").touch(mode=0o600)
    return project


@mend(r"VALID UNTIL")
def password_has_expired(stage: Stage) -> Project:
    return restricted(stage, attributes="VALID UNTIL '2020-01-01'")


@mend(r"PGSSLMODE$")
def sslmode_is_mistyped(stage: Stage) -> Project:
    return stage.project(settings={"PGSSLMODE": "required"})


@mend(r"PGCHANNELBINDING")
def channel_cannot_be_bound(stage: Stage) -> Project:
    return stage.project(settings={"PGCHANNELBINDING": "require"})


@mend(r"chmod \+x")
def pg_dump_is_not_executable(stage: Stage) -> Project:
    project = stage.project(constants={"TOOL_FOLDERS": ()})
    project.fake("pg_dump", 'exec "$real" "$@"')
    (project.fakes / "pg_dump").chmod(0o644)
    return without_bin_dir(project)


@mend(r"crontab: PATH=")
def tools_are_not_on_path(stage: Stage) -> Project:
    project = stage.project(constants={"TOOL_FOLDERS": (str(stage.cluster.bin_dir),)})
    return without_bin_dir(project)


@mend(r"export PATH=")
def tools_are_not_on_the_path_of_a_shell(stage: Stage) -> Project:
    return tools_are_not_on_path(stage)


def without_bin_dir(project: Project) -> Project:
    """PATH as cron has it; pg_restore alone is where it is looked for."""
    (project.fakes / "pg_restore").symlink_to(project.bin_dir / "pg_restore")
    environ = {**project.environ, "PATH": f"{project.fakes}:/nowhere"}
    return Project(project.directory, environ, project.bin_dir)


@mend(r"BACKUP_COMPRESS$")
def compression_is_mistyped(stage: Stage) -> Project:
    return stage.project(settings={"BACKUP_COMPRESS": "zip:3"})


# What the setting is to be, where the step says it in words.
CHOSEN = {"PGSSLMODE": "prefer", "PGCHANNELBINDING": "prefer", "BACKUP_COMPRESS": "gzip:4"}


def paste(step: str, stage: Stage, project: Project, environ: dict[str, str]) -> None:
    """Do what the step says."""
    text = typed(step)
    if text.endswith(";"):
        database = re.search(r"in database (\w+): ", step)
        stage.cluster.psql(text, database[1] if database else "postgres")
    elif text.startswith("host "):
        stage.hba(text)
    elif text.startswith("PATH="):
        environ["PATH"] = text.removeprefix("PATH=")
    elif text.startswith("export "):
        show = ["/bin/sh", "-c", f'{text}; printf %s "$PATH"']
        environ["PATH"] = subprocess.check_output(show, env=project.environ, text=True)
    elif text in CHOSEN:
        with (project.directory / ".env.local").open("a") as file:
            file.write(f"{text}={CHOSEN[text]}\n")
    else:
        shell(text.replace("PASSWORD", PASSWORD), stage, project)


def shell(command: str, stage: Stage, project: Project) -> None:
    project.fake("sudo", 'exec "$@"')
    subprocess.run(
        ["sh", "-ec", command],
        cwd=project.directory,
        env={
            **project.environ,
            "PATH": f"{project.fakes}:{project.bin_dir}:{os.defpath}",
            "PGPASSWORD": stage.cluster.password,
        },
        check=True,
        stdout=subprocess.DEVNULL,
    )


def test_run_by_the_user_of_the_nightly_job(stage: Stage) -> None:
    """All is theirs, and somebody else runs it by hand."""
    project = stage.project()
    owned = [project.directory / ".env.local", project.backups, *project.backups.iterdir()]
    for path in owned:
        os.chown(path, 12345, 12345)
    (project.directory / ".env.local").chmod(0o600)
    (step, *_others) = steps_of(project.run(prefix=UNPRIVILEGED).failed_with(4))
    by_them = " ".join(VISITOR)
    project.fake("sudo", f'[ "$1 $2" = "-u #12345" ] && shift 2 && exec {by_them} "$@"')
    environ = {**project.environ, "PATH": f"{project.environ['PATH']}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-ec", typed(step)], cwd=project.directory, env=environ, check=True)
    assert len(project.dumps()) == 2
    assert {path.stat().st_uid for path in project.backups.iterdir()} == {12345}


def steps_of(result: Result) -> list[str]:
    return re.findall(r"^  \d\. (.+)$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("case", MENDS, ids=lambda case: case.arrange.__name__)
def test_mend_is_pasted_and_the_next_run_succeeds(case: Mend, stage: Stage) -> None:
    project = case.arrange(stage)
    result = project.run(*case.arguments, prefix=case.prefix)
    assert result.returncode, result
    steps = steps_of(result)
    chosen = [step for step in steps if re.search(case.steps, step)]
    assert chosen, f"no step says {case.steps!r}:{result}"
    environ: dict[str, str] = {}
    for step in chosen:
        paste(step, stage, project, environ)
    project.run(*case.arguments, prefix=case.prefix, env=environ).succeeded()


def test_orphan_metadata_is_removed_as_the_list_says(stage: Stage) -> None:
    project = stage.project()
    (dump,) = project.dumps()
    dump.unlink()
    line = project.run("--list").succeeded().stdout.splitlines()[-1]
    assert_typeable(line, project)
    shell(typed(line), stage, project)
    assert not metadata_path(dump).exists()
    assert "without a dump" not in project.run("--list").succeeded().stdout


# -- damage on the server, which no repetition heals ----------------------------------------------


def invalid_page(database: Database) -> None:
    """A page of the table itself, which the count and pg_dump read both."""
    path = database.psql("SELECT pg_relation_filepath('\"Odd table\"')")
    with (database.cluster.data_dir / path).open("r+b") as file:
        file.write(b"\xff" * 100)


def missing_chunk(database: Database) -> None:
    """A value's TOAST, which pg_dump alone reads."""
    path = database.psql(
        "SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE relname = 'Odd table'"
    )
    with (database.cluster.data_dir / path).open("r+b") as file:
        file.write(bytes(8192))


def missing_file(database: Database) -> None:
    """The table's file is gone, which the count and pg_dump read both."""
    path = database.psql("SELECT pg_relation_filepath('\"Odd table\"')")
    (database.cluster.data_dir / path).unlink()


# In the place of pg_dump: it begins to write, and comes no further before the count does.
BEGIN_ALONE = f'{FILE}; printf x >"$file"; exec sleep 100'


@pytest.mark.parametrize("damage", [invalid_page, missing_file, missing_chunk])
def test_damage_on_the_server_is_named_and_the_rest_is_rescued(
    damage: Callable[[Database], None],
    stage: Stage,
) -> None:
    sound = stage.database()
    sound.psql(
        'CREATE TABLE "Odd table" (n int, content text); CREATE TABLE other AS SELECT 1 AS n;'
        'ALTER TABLE "Odd table" ALTER content SET STORAGE EXTERNAL;'
        "INSERT INTO \"Odd table\" VALUES (1, repeat('x', 10000)); CHECKPOINT"
    )
    # Copied file by file: of the copy's tables the server holds no page in memory.
    files = (f"--template={sound.name}", "--strategy=file_copy")
    with new_database(stage.cluster, *files) as database:
        damage(database)
        project = stage.make_project(database)
        if damage is not missing_chunk:
            fake_call(project, "pg_dump", "--snapshot", BEGIN_ALONE)
        result = project.run().failed_with(7)
        assert 'cannot read its own data of table public."Odd table"' in result.stderr, result
        assert "Run the backup again" not in result.stderr, result
        steps = re.findall(r"^  \d\. (.+)$", result.stderr, re.MULTILINE)
        for step in steps:
            assert_typeable(step, project)
        (rescue,) = (step for step in steps if "--exclude-table-data=" in step)
        shell(typed(rescue), stage, project)
        with new_database(stage.cluster) as copy:
            dump = project.directory / "rescued.dump"
            stage.cluster.run("pg_restore", f"--dbname={copy.name}", str(dump))
            assert copy.psql('SELECT count(*) FROM other, "Odd table"') == "0"
            assert copy.psql("SELECT n FROM other") == "1"


# -- what the README says -------------------------------------------------------------------------


def test_commands_of_the_readme_parse() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 3
    for block in blocks:
        subprocess.run(["sh", "-n", "-c", block], check=True)
        assert "…" not in block
