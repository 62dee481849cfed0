"""README.md's sections on restoring and on the nights: every command in them is run as it stands.

What stands there for something of the reader's own (FILE.dump, /path/to/project_chat) is replaced.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from sample import PASSWORD, USER
from support import Database, Project, Result, program, read_metadata, readme_section


def blocks(title: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", readme_section(title), re.MULTILINE | re.DOTALL
    )


# The table of the restore section: what for, and the command, in which a table quotes each `|`.
RESTORES = {
    what: command.replace(r"\|", "|")
    for what, command in re.findall(
        r"^\| (.+?) \| `(pg_restore .+)` \|$", readme_section("Restore"), re.MULTILINE
    )
}
CRON = [line for block in blocks("Every night", "cron") for line in block.splitlines()]
UNITS = blocks("Every night", "ini")


def test_readme_is_read() -> None:
    """What is not found would not be tested."""
    assert len(RESTORES) == readme_section("Restore").count("| `pg_restore") == 6
    assert [line.split()[0] for line in CRON] == [
        "PATH=/usr/lib/postgresql/17/bin:/usr/local/bin:/usr/bin:/bin",
        "0",
        "0",
    ]
    assert len(UNITS) == 2


# -- restoring ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def elsewhere(cluster: Cluster) -> Iterator[Cluster]:
    """Another machine: a server that knows nothing of this database and its roles."""
    with Cluster(cluster.bin_dir) as other:
        yield other


def type_in(command: str, project: Project, cluster: Cluster) -> str:
    """What the command prints, typed into a shell of somebody who may do everything there."""
    way = {"PGHOST": str(cluster.directory), "PGPORT": str(cluster.port), "PGUSER": "postgres"}
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", command],
        cwd=project.backups,
        env={**project.environ, **way},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def backed_up(
    sample_database: Database, make_project: MakeProject, elsewhere: Cluster
) -> Iterator[tuple[Project, Database]]:
    """A backup called FILE.dump, and the sample database that it is of; its roles elsewhere."""
    project = make_project(sample_database)
    dump = project.back_up()
    metadata = read_metadata(dump)
    (dump.parent / "FILE.dump").symlink_to(dump)
    known = elsewhere.psql("SELECT rolname FROM pg_roles").splitlines()
    (create_role,) = re.findall(r"`(createuser NAME)`", readme_section("Restore"))
    for role in set(metadata["roles"]) - set(known):
        type_in(create_role.replace("NAME", shlex.quote(role)), project, elsewhere)
    yield project, sample_database
    for name in ("restored", sample_database.name):
        elsewhere.drop_database(name)


def test_restore_into_a_new_database(
    backed_up: tuple[Project, Database], elsewhere: Cluster
) -> None:
    project, original = backed_up
    (commands,) = blocks("Restore", "bash")
    type_in(commands, project, elsewhere)
    copy = Database(elsewhere, "restored")
    assert (copy.schema(), copy.contents()) == (original.schema(), original.contents())


def test_new_database_with_an_encoding_and_locale(
    backed_up: tuple[Project, Database], elsewhere: Cluster
) -> None:
    (command,) = re.findall(r"`(createdb .*--encoding.*)`", readme_section("Restore"))
    type_in(command, backed_up[0], elsewhere)
    assert Database(elsewhere, "restored").encoding() == "UTF8"


def test_restore_over_the_database_of_the_same_name(
    backed_up: tuple[Project, Database], elsewhere: Cluster
) -> None:
    project, original = backed_up
    elsewhere.create_database(original.name)
    copy = Database(elsewhere, original.name)
    copy.psql("CREATE TABLE messages (of text); CREATE TABLE left_over ()")
    type_in(RESTORES["restore over the database of the same name"], project, elsewhere)
    assert (copy.schema(), copy.contents()) == (original.schema(), original.contents())


def test_restore_of_one_table(backed_up: tuple[Project, Database], elsewhere: Cluster) -> None:
    project, original = backed_up
    elsewhere.create_database("restored", "--template=template0")
    copy = Database(elsewhere, "restored")
    one, rows = (command for what, command in RESTORES.items() if what.startswith("bring back"))
    (wanted,) = [line for line in original.contents() if line.startswith("messages|")]
    type_in(one, project, elsewhere)
    assert wanted in copy.contents()
    copy.psql("TRUNCATE messages")
    type_in(rows, project, elsewhere)
    assert copy.contents() == [wanted]


def test_restore_without_owners(backed_up: tuple[Project, Database], elsewhere: Cluster) -> None:
    project, original = backed_up
    elsewhere.create_database("restored", "--template=template0")
    type_in(RESTORES["leave owners and grants out"], project, elsewhere)
    copy = Database(elsewhere, "restored")
    assert copy.contents() == original.contents()
    assert (
        copy.psql("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'")
        == "postgres"
    )


def test_restore_by_way_of_a_script(
    backed_up: tuple[Project, Database], elsewhere: Cluster
) -> None:
    # On an older server, for which it is meant, test_servers.py runs it.
    project, original = backed_up
    elsewhere.create_database("restored", "--template=template0")
    (command,) = (c for c in RESTORES.values() if "sed" in c)
    type_in(command, project, elsewhere)
    assert Database(elsewhere, "restored").contents() == original.contents()


def test_list_of_what_is_in_it(backed_up: tuple[Project, Database], elsewhere: Cluster) -> None:
    listing = type_in(RESTORES["see what is in it"], backed_up[0], elsewhere)
    assert " TABLE DATA public messages chat" in listing


# -- every night ----------------------------------------------------------------------------------


@pytest.fixture
def nightly(sample_database: Database, make_project: MakeProject) -> Project:
    """The project as README.md has it: its own virtual environment, settings for production."""
    settings = sample_database.settings(USER, PASSWORD, prefix="")
    project = make_project(sample_database, settings=settings)
    (project.directory / ".venv").symlink_to(sys.prefix)
    return project


def as_here(text: str, project: Project) -> str:
    """README.md's places, as they are in this test."""
    places = {
        "/path/to/project_chat": str(project.directory),
        "/usr/lib/postgresql/17/bin": str(project.bin_dir),
        "/var/log/backup.log": str(project.directory / "log"),
    }
    for place, here in places.items():
        text = text.replace(place, here)
    return text


def cron(line: str, project: Project) -> Result:
    """Run a line of the crontab as cron does: hardly any environment, and a `%` is a newline."""
    path = as_here(CRON[0], project)
    command = as_here(line.split(maxsplit=5)[5], project)
    assert "%" not in command
    environ = ["env", "-i", path, f"HOME={project.directory / 'home'}", "SHELL=/bin/sh"]
    done = subprocess.run([*environ, "sh", "-c", command], cwd="/", capture_output=True, text=True)
    return Result(command, done.returncode, done.stdout, done.stderr)


def test_nightly_line(nightly: Project) -> None:
    result = cron(CRON[1], nightly).succeeded()
    assert (result.stdout, result.stderr) == ("", "")
    log = (nightly.directory / "log").read_text()
    assert log.startswith("✓ Backup created successfully\n")
    assert "Environment: prod" in log
    assert len(nightly.dumps()) == 1


def test_only_failures_are_mailed(nightly: Project) -> None:
    (redirection,) = re.findall(r">> \S+ 2>&1$", CRON[1])
    assert "`>/dev/null` in place of the log" in " ".join(readme_section("Every night").split())
    line = CRON[1].replace(redirection, ">/dev/null")
    result = cron(line, nightly).succeeded()
    assert (result.stdout, result.stderr) == ("", "")
    nightly.configure({"DB_NAME": "nowhere", "DB_HOST": "127.0.0.1", "DB_PORT": "1"})
    assert cron(line, nightly).failed_with(3).stderr.startswith("✗ Backup failed: ")


def test_monthly_verification(nightly: Project) -> None:
    cron(CRON[1], nightly).succeeded()
    (first,) = nightly.dumps()
    cron(CRON[1], nightly).succeeded()
    result = cron(CRON[2], nightly).succeeded()
    assert (result.stdout, result.stderr) == ("", "")
    with first.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damage")
    result = cron(CRON[2], nightly)
    assert result.stdout == ""
    assert result.stderr.count("✗ Backup verification failed\n") == 1
    assert first.name in result.stderr


def test_line_by_hand(nightly: Project) -> None:
    """The way to see what cron sees: here, that there are no PostgreSQL tools on its PATH."""
    (command,) = re.findall(r"`(env -i [^`]*'LINE')`", readme_section("Every night"))
    line = as_here(CRON[1].split(maxsplit=5)[5], nightly).split(" >> ")[0]
    home = {"HOME": str(nightly.directory / "home"), "PATH": "/usr/bin:/bin"}
    bare = nightly.directory / "bare"  # this machine may have tools in /usr/bin
    bare.mkdir()
    (bare / "env").symlink_to(program("env", "coreutils"))
    (bare / "sh").symlink_to(program("sh", "dash"))
    command = command.replace("LINE", line).replace("/usr/bin:/bin", str(bare))
    done = subprocess.run(["sh", "-c", command], env=home, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert "pg_dump not found on PATH" in done.stderr


@pytest.mark.servers(15)
def test_copy_off_the_machine(nightly: Project, tmp_path: Path) -> None:
    nightly.back_up("--env", "prod")
    program("rsync", "rsync")
    (nightly.backups / ".x_prod_2025-01-01T00-00-00Z.dump.partial").write_bytes(b"half")
    (nightly.backups / "mine.txt").write_bytes(b"mine")
    (command,) = blocks("Every night", "bash")
    copies = tmp_path / "copies"
    command = command.replace("backup@elsewhere:backups/", f"{copies}/")
    subprocess.run(["sh", "-c", command], cwd=nightly.directory, env=nightly.environ, check=True)
    (dump,) = nightly.dumps()
    assert {path.name for path in copies.iterdir()} == {dump.name, f"{dump.stem}.metadata.json"}
    assert nightly.run("--list", "--output-dir", copies).succeeded().stdout.count("✓ Verified") == 1
    nightly.run("--verify", copies / dump.name).succeeded()


@pytest.mark.servers(15)
def test_systemd_units(nightly: Project, tmp_path: Path) -> None:
    names = re.findall(
        r"`(?:/etc/systemd/system/)?(backup-db\.\w+)`", readme_section("Every night")
    )
    assert sorted(set(names)) == ["backup-db.service", "backup-db.timer"]
    for name, unit in zip(names, UNITS, strict=False):
        (tmp_path / name).write_text(as_here(unit, nightly))
    verify = [program("systemd-analyze", "systemd"), "verify", "--man=no"]
    done = subprocess.run(
        [*verify, tmp_path / "backup-db.timer", tmp_path / "backup-db.service"],
        capture_output=True,
        text=True,
    )
    # It says what it knows of the machine's other units too.
    assert not [line for line in done.stderr.splitlines() if "backup-db" in line], done.stderr
    start = re.search(r"^ExecStart=(.*)$", as_here(UNITS[0], nightly), re.MULTILINE)
    path = re.search(r"^Environment=(.*)$", as_here(UNITS[0], nightly), re.MULTILINE)
    assert start
    assert path
    subprocess.run(
        ["env", "-i", path[1], *shlex.split(start[1])], cwd=nightly.directory, check=True
    )
    assert len(nightly.dumps()) == 1
