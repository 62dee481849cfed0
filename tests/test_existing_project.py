"""The script in a project that is there already: with modules and .env files of its own."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from environment import PROJECT
from sample import DATABASE
from support import Database, Project, contents_of, finish, readme_section

# What stands in another project's brain_core/config.py, and how its own error begins.
FOREIGN = {
    "its own API": (
        "def get_database_url(): return 'x'\n",
        "ImportError: cannot import name 'ConfigurationError' from 'brain_core.config'",
    ),
    "what is not installed": (
        "import no_such_package\n",
        "ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "connects at import": (
        "import psycopg2\npsycopg2.connect(host='127.0.0.1', port=1)\n",
        'OperationalError: connection to server at "127.0.0.1", port 1 failed: ',
    ),
    "raises": ("raise KeyError('a\\nb\\x1b')\n", r"KeyError: 'a\nb\x1b'"),
    "raises many lines": ("raise ValueError('a\\nb\\x1bc')\n", r"ValueError: a b\x1bc"),
    "exits": ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "no Python": ("def (\n", "SyntaxError: invalid syntax"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_config_of_another_project_is_named_with_its_own_error(
    kind: str, make_project: MakeProject, sample_dump: Path
) -> None:
    text, words = FOREIGN[kind]
    project = make_project(settings={"DB_NAME": "b", "DB_HOST": "127.0.0.1", "DB_PORT": "1"})
    (project.directory / "brain_core" / "config.py").write_text(text)
    stderr = project.run().failed_with(1, "General error").stderr
    problem = "brain_core/config.py is not the one that backup_db.py came with: "
    (error,) = re.findall(r"^Error: (.*)$", stderr, re.MULTILINE)
    assert error.startswith(problem + words), stderr
    assert error.isprintable()
    # What needs no settings does not care.
    project.run("--list").succeeded()
    project.run("--verify", sample_dump).succeeded()
    # The steps, taken: what is left is that there is no server.
    (move,) = re.findall(r": (mkdir .*)$", stderr, re.MULTILINE)
    subprocess.run(["sh", "-c", move], cwd=project.directory, check=True)
    own = dataclasses.replace(project, directory=project.directory / "backup")
    shutil.copytree(PROJECT / "brain_core", own.directory / "brain_core")
    own.run().failed_with(3, "Database connection error")


def test_line_of_another_program_is_nothing_to_us(
    make_project: MakeProject, cluster: Cluster
) -> None:
    """A warning would be a mail each night."""
    project = make_project(Database(cluster, DATABASE))
    with (project.directory / ".env.local").open("a") as file:
        file.write("npm run secret-0815\n")
    assert project.run().succeeded().stderr == ""


# -- a package that is missing --------------------------------------------------------------------


def test_command_for_a_missing_package_is_the_one_that_works_here(
    make_project: MakeProject,
) -> None:
    """First by the system's python, then by the .venv that its command has made."""
    project = make_project(settings={"DB_NAME": "b", "DB_HOST": "127.0.0.1", "DB_PORT": "1"})
    shutil.copy(PROJECT / "requirements.txt", project.directory)
    python = Path(sys.executable).resolve()  # that of no virtual environment: it has no packages

    def steps_of(*command: str) -> list[str]:
        process = subprocess.Popen(
            [*command, "backup_db.py"],
            cwd=project.directory,
            env=project.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        stderr = finish(process).failed_with(1, "General error").stderr
        return re.findall(r"^  \d\. .*: (.*)$", stderr, re.MULTILINE)

    pip, run = ".venv/bin/pip install -r requirements.txt", ".venv/bin/python3 backup_db.py"
    make = f"{python} -m venv .venv"
    assert steps_of(str(python), "-S") == [f"{make} && {pip}", run]
    subprocess.run([*make.split(), "--without-pip"], cwd=project.directory, check=True)
    assert steps_of(str(python), "-S") == [f"{make} && {pip}", run]
    (install,) = steps_of(".venv/bin/python3")
    assert install.endswith("/.venv/bin/python3 -m pip install -r requirements.txt")


# -- the README's commands, pasted ----------------------------------------------------------------

BESIDE, COPIED_IN = re.findall(
    r"^```bash\n(.*?)^```$", readme_section("Into an existing project"), re.MULTILINE | re.DOTALL
)


@pytest.fixture
def existing(make_project: MakeProject, cluster: Cluster) -> Project:
    """A stranger's project: his settings, his files, nothing of ours."""
    project = make_project(Database(cluster, DATABASE))
    (project.directory / "backup_db.py").unlink()
    shutil.rmtree(project.directory / "brain_core")
    (project.directory / "requirements.txt").write_text("psycopg2-binary")  # no end of line
    (project.directory / ".gitignore").write_text("*.log")
    # Its virtual environment is that of the tests: nothing is fetched.
    project.fake("python3", f'[ "$*" = "-m venv .venv" ] && ln -s "{sys.prefix}" .venv')
    return project


def paste(commands: str, project: Project) -> str:
    places = {
        "/path/to/your_project": str(project.directory),
        "/path/to/backup_db": str(PROJECT),
    }
    for place, here in places.items():
        commands = commands.replace(place, here)
    done = subprocess.run(
        ["sh", "-e", "-c", commands],
        env={**project.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_script_beside_a_project_touches_nothing_of_it(existing: Project) -> None:
    (existing.directory / "brain_core").mkdir()
    for name in ("__init__.py", "config.py"):
        (existing.directory / "brain_core" / name).write_text("raise RuntimeError('a stranger')\n")
    before = contents_of(existing.directory)
    assert "✓ Backup created successfully" in paste(BESIDE, existing)
    after = contents_of(existing.directory)
    assert {path: after[path] for path in after if path.split("/")[0] != "backup"} == before
    assert len(list((existing.directory / "backup" / "db" / "backups").glob("*.dump"))) == 1


def test_script_copied_into_a_project(existing: Project) -> None:
    assert "✓ Backup created successfully" in paste(COPIED_IN, existing)
    assert len(existing.dumps()) == 1
    merged = (existing.directory / "requirements.txt").read_text().splitlines()
    assert merged[0] == "psycopg2-binary"
    assert merged[1:] == (PROJECT / "requirements.txt").read_text().splitlines()
    assert (existing.directory / ".gitignore").read_text() == (
        "*.log\n/db/backups/\n/.venv/\n.env.local\n"
    )
