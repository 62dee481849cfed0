"""The password is shown to nobody but the server."""

from __future__ import annotations

import string
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from support import Database, Project, finish

# Every printable character of ASCII, controls, other scripts; and in front what shells, .env
# files, URLs and libpq's connection strings take for their own.
PASSWORDS = (
    " '\"\\$HOME${HOME}`id`#=%40@:/?&;|<>(){}[]!~^* ",
    string.ascii_letters + string.digits + string.punctuation,
    "a\nb\tc\x01\x7f",
    "пароль-密码-🔑-\u0301\ufb01",
    "host=elsewhere password=other",
    "postgres://other@elsewhere/x",
    "p" * 900,
)


@pytest.fixture(params=PASSWORDS, ids=range(len(PASSWORDS)))
def password(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[str]:
    secret = str(request.param)
    quoted = secret.replace("'", "''")
    cluster.psql("SET password_encryption = 'scram-sha-256'; CREATE ROLE keeper LOGIN;")
    cluster.psql(f"ALTER ROLE keeper PASSWORD '{quoted}'; GRANT pg_read_all_data TO keeper")
    yield secret
    cluster.psql("DROP ROLE keeper")


def shown_to_everybody() -> Iterator[str]:
    """The command lines of all processes, as `ps` shows them."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield (process / "cmdline").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue  # it has just ended


def test_password_is_nowhere(
    password: str, sample_database: Database, make_project: MakeProject
) -> None:
    project = make_project(sample_database, settings=sample_database.settings("keeper", password))
    # Each child tells its arguments and its environment; pg_restore's is kept apart.
    for tool in ("pg_dump", "pg_restore"):
        tell = f'env -0 >>"$HOME/{tool}.env"; printf "%s\\0" "$@" >>"$HOME/arguments"'
        project.fake(tool, f'{tell}; exec "$real" "$@"')
    process = project.start()
    seen: set[str] = set()
    while process.poll() is None:
        seen.update(shown_to_everybody())
        time.sleep(0.02)
    result = finish(process).succeeded()
    home = project.directory / "home"
    public = [*seen, (home / "arguments").read_text(), result.stdout, result.stderr]
    public += [path.read_text() for path in project.backups.glob("*.metadata.json")]
    public += [path.read_text() for path in project.backups.glob(".*.lock")]
    public.append((home / "pg_restore.env").read_text())
    for text in public:
        assert password[:16] not in text, text  # a part of it is too much
    assert f"PGPASSWORD={password}\0" in (home / "pg_dump.env").read_text()
    assert any(str(project.directory) in command for command in seen)
    (dump,) = project.dumps()
    assert password.encode() not in dump.read_bytes()


@pytest.mark.parametrize("password", PASSWORDS[:1], indirect=True, ids=[0])
def test_password_is_in_no_error(
    password: str, sample_database: Database, make_project: MakeProject
) -> None:
    settings = sample_database.settings("keeper", password)
    for wrong, code in (
        ({"DEV_DB_USER": "nobody"}, 3),
        ({"DEV_DB_NAME": "no_such"}, 3),
        ({"DEV_DB_PORT": "1"}, 3),
        ({"DEV_DB_PORT": "x"}, 2),
        ({"DEV_DB_PASSWORD": password[:-1] + "?"}, 3),
    ):
        project = make_project(sample_database, settings={**settings, **wrong})
        result = project.run().failed_with(code)
        assert password[:16] not in result.stderr, result


def test_line_that_cannot_be_parsed_is_not_shown(project: Project) -> None:
    (project.directory / ".env.local").write_text("DEV_DB_PASSWORD='half a secret\n")
    result = project.run().failed_with(2, "Configuration error")
    assert "secret" not in result.stderr, result


def test_programs_get_no_setting_that_is_not_theirs(
    sample_database: Database, make_project: MakeProject
) -> None:
    project = make_project(sample_database, settings={"PGSSLMODE": "prefer", "DB_PASSWORD": "s1"})
    project.fake("pg_restore", 'env >>"$HOME/env"; exec "$real" "$@"')
    password = sample_database.cluster.password
    surroundings = {"PGPASSWORD": "s2", "DEV_DB_PASSWORD": password, "PGPASSFILE": "/s4"}
    project.run(env=surroundings).succeeded()
    told = (project.directory / "home" / "env").read_text()
    names = {line.partition("=")[0] for line in told.splitlines()}
    assert {name for name in names if "DB_" in name} == set()
    assert {name for name in names if name.startswith("PG")} == {"PGHOST", "PGPORT"}
