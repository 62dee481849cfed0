"""Passwords, ours and other people's, are shown to nobody but the server."""

from __future__ import annotations

import re
import string
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import transaction, untouched
from support import Database, Project, Terminal, finish, metadata_path, wait_until

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


# -- a password in the wrong place ----------------------------------------------------------------

# What people paste there: libpq would take it for an address, and show all of it in an error.
PASTED = (
    "postgres://keeper:s3cret@localhost:5432/chat",
    "host=localhost password=s3cret dbname=chat",
    "password = 's3cret'",
    "PASSWD=s3cret",
    "pwd=s3cret",
    "//keeper:s3cret@localhost/chat",
    "postgres%3A%2F%2Fkeeper%3As3cret%40localhost%2Fchat",
    "keeper:s3cret\n@localhost/chat",
)
# Pieces of these, by the end of the variable's name.
PIECES = {
    "NAME": ("s3cret@localhost/chat", "keeper:s3cret@localhost"),
    "HOST": (
        "keeper:s3cret@localhost",
        "keeper:s3cret@localhost:5432",
        "keeper:s3cret@localhost:5432/chat",
        "keeper:s3cret@[::1]:5432/chat",
        "keeper:s3cret@::1",
        "localhost,keeper:s3cret@localhost",
        "'keeper:s3cret@localhost'",
        "localhost/chat?s3cret",
    ),
    "USER": ("keeper:s3cret", '"keeper:s3cret"'),
    "PORT": ("5432/chat?user=keeper&key=s3cret", "5432 s3cret", "s3cret "),
}


@pytest.mark.parametrize(
    "variable",
    ["DEV_DB_NAME", "DEV_DB_HOST", "DEV_DB_USER", "DEV_DB_PORT", "DB_NAME", "DB_HOST", "DB_PORT"],
)
def test_address_with_a_password_in_it_is_not_shown(
    variable: str, standing_database: Database, make_project: MakeProject
) -> None:
    right = standing_database.settings(prefix=variable.partition("DB_")[0])
    wrong = [{**right, variable: pasted} for pasted in (*PASTED, *PIECES[variable[-4:]])]
    project = make_project()
    results = project.run_each(*[()] * len(wrong), settings=wrong)
    for result in results:
        result.failed_with(2, "Configuration error")
        assert re.search(rf"\b{variable}\b", result.stderr), result
    (project.directory / ".env.local").unlink()
    files = [path for path in project.directory.rglob("*") if "fakes" not in str(path)]
    texts = [path.read_text(errors="replace") for path in files if path.is_file()]
    for text in (*map(str, results), *map(str, files), *texts):
        assert "s3cret" not in text, text
    assert not project.backups.exists()


# -- what another session does --------------------------------------------------------------------

# What it may be seen to do, and all that it says.
OTHERS = {
    "": "/* s3cret */ SELECT 1",
    "ALTER ROLE": "ALTER ROLE chat PASSWORD 's3cret'",
    "SELECT": "SELECT'1' AS s3cret",
    "COMMENT ON": "COMMENT ON TABLE messages IS E's3cret'",
    "DO": "DO 'BEGIN PERFORM $$s3cret$$; END'",
    "SET": "SET search_path='s3cret'",
}


def test_session_in_the_way_is_shown_by_its_first_words(
    standing: Project, standing_database: Database
) -> None:
    """In the progress line: a terminal, too, is seen by others."""
    standing.rewrite({"LOCK_RETRY_SECONDS": 0.1, "LOCK_TIMEOUT_MS": 50, "REDRAW_SECONDS": 0})
    with (
        transaction(standing_database, "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE") as run,
        Terminal(standing, columns=300) as terminal,
    ):

        def shows(words: str) -> bool:
            return any("Waiting: " in line and words in line for line in terminal.progress[-2:])

        for words, statement in OTHERS.items():
            run(f"{statement} \\g /dev/null")
            about = f"(postgres, migration: {words}" if words else ""
            wait_until(partial(shows, about))
        assert "s3cret" not in terminal.shown


@pytest.mark.parametrize(
    "lock", ["LOCK TABLE messages IN ACCESS EXCLUSIVE MODE", "REFRESH MATERIALIZED VIEW statistics"]
)
def test_session_that_was_waited_for_too_long_is_shown_so_too(
    lock: str, standing: Project, standing_database: Database
) -> None:
    standing.rewrite({"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.1})
    with untouched(standing), transaction(standing_database, lock) as run:
        run("ALTER ROLE chat PASSWORD 's3cret'")
        result = standing.run().failed_with(7, "Backup creation error")
    assert "(postgres, migration: ALTER ROLE" in result.stderr, result
    assert "s3cret" not in result.stderr, result
    assert "PASSWORD" not in result.stderr, result


# -- what a terminal would obey -------------------------------------------------------------------

# It sets the title of a window, erases the line, and colours what follows, in 7 bits and in 8.
ESCAPES = "x\x1b]0;owned\x07\x1b[2K\x08\x9b31m"


def is_harmless(shown: str) -> bool:
    """Nothing but text and lines, and what the progress line is made of."""
    return re.sub(r"\r|\x1b\[K|\n", "", shown).isprintable()


@pytest.fixture
def escaping(
    cluster: Cluster, make_project: MakeProject
) -> Iterator[tuple[Project, Database, dict[str, str]]]:
    """A database all of whose names are escape sequences, a project that leads to it as a role of
    such a name, and the settings."""
    name = identifier(ESCAPES)
    cluster.create_database(ESCAPES)
    database = Database(cluster, ESCAPES)
    try:
        database.psql(
            f"""CREATE ROLE {name} LOGIN SUPERUSER PASSWORD 'x'; CREATE SCHEMA {name};
            CREATE TABLE {name}.{name} ({name} text); INSERT INTO {name}.{name} VALUES ('x');
            CREATE TABLE {name} (x int); ALTER TABLE {name} OWNER TO {name};
            COMMENT ON EXTENSION plpgsql IS {literal(ESCAPES)};
            COMMENT ON DATABASE {name} IS {literal(ESCAPES)};
            CREATE FOREIGN DATA WRAPPER {name}; CREATE SERVER {name} FOREIGN DATA WRAPPER {name};
            CREATE FOREIGN TABLE {name}."{"f" + ESCAPES}" (x int) SERVER {name};
            SELECT lo_create(0)"""
        )
        settings = database.settings(ESCAPES, "x")
        yield make_project(settings=settings), database, settings
    finally:
        cluster.drop_database(ESCAPES)
        cluster.psql(f"DROP ROLE IF EXISTS {name}")


def identifier(name: str) -> str:
    return f'"{name}"'


def literal(text: str) -> str:
    return f"'{text}'"


Escaping = tuple[Project, Database, dict[str, str]]


def test_names_never_reach_a_terminal_as_they_are(escaping: Escaping) -> None:
    """In what succeeds: creation with progress, verification, the list, whole and broken pairs."""
    project, _, _ = escaping
    project.rewrite({"REDRAW_SECONDS": 0, "TICK_SECONDS": 0.01})
    directory = project.directory / ESCAPES
    for _ in range(2):
        with Terminal(project, "--output-dir", directory, columns=300) as terminal:
            assert terminal.finish()[0] == 0, terminal.shown
            assert terminal.progress
            assert is_harmless(terminal.shown), ascii(terminal.shown)
    broken, whole = sorted(directory.glob("*.dump"))
    metadata_path(broken).write_text("{}")
    (directory / f"{ESCAPES}.dump").touch()
    for arguments in (("--verify", whole), ("--verify", broken), ("--list",)):
        with Terminal(project, *arguments, "--output-dir", directory, columns=300) as terminal:
            terminal.finish()
            assert terminal.shown.count("owned") > 1, terminal.shown
            assert is_harmless(terminal.shown), ascii(terminal.shown)


# What a setting, an argument or a role does to a run that fails; as a superuser, where not said.
FAILURES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "database": ({"DEV_DB_NAME": f"no{ESCAPES}"}, ()),
    "host": ({"DEV_DB_HOST": ESCAPES}, ()),
    "port": ({"DEV_DB_PORT": ESCAPES}, ()),
    "user": ({"DEV_DB_USER": f"no{ESCAPES}"}, ()),
    "password": ({"DEV_DB_PASSWORD": ESCAPES}, ()),
    "mode": ({"ENV_MODE": ESCAPES}, ()),
    "compression": ({"BACKUP_COMPRESS": ESCAPES}, ()),
    "keep": ({"BACKUP_KEEP": ESCAPES}, ()),
    "timeout": ({"PGCONNECT_TIMEOUT": ESCAPES}, ()),
    "TLS": ({"PGSSLMODE": ESCAPES}, ()),
    "certificate": ({"PGSSLMODE": "verify-full", "PGSSLROOTCERT": f"/{ESCAPES}"}, ()),
    "no file": ({}, ("--verify", f"/{ESCAPES}.dump")),
    "no directory": ({}, ("--list", "--output-dir", f"/{ESCAPES}")),
    "no place": ({}, ("--output-dir", f"/dev/null/{ESCAPES}")),
    "environment": ({}, ("--env", ESCAPES)),
    "argument": ({}, (ESCAPES,)),
    "option": ({}, (f"--{ESCAPES}",)),
}


def test_names_in_failures_never_reach_a_terminal_as_they_are(escaping: Escaping) -> None:
    project, _, settings = escaping
    raw = []
    for what, (changed, arguments) in FAILURES.items():
        project.configure({**settings, **changed})
        result = project.run(*arguments)
        assert result.returncode, f"{what}: {result}"
        assert "Traceback" not in result.stderr, f"{what}: {result}"
        if not is_harmless(result.stdout + result.stderr):
            raw.append(what)
    assert not raw


def test_names_in_failures_of_the_database_are_harmless_too(escaping: Escaping) -> None:
    """What may not be read, and what is in the way."""
    project, database, _ = escaping
    name = identifier(ESCAPES)
    project.rewrite({"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.4, "REDRAW_SECONDS": 0})
    with transaction(database, f"SET ROLE {name}; LOCK TABLE {name}.{name}") as run:
        run(f"SET application_name = {literal(ESCAPES)}; COMMENT ON TABLE {name} IS 'x'")
        with Terminal(project, columns=300) as terminal:
            assert terminal.finish()[0] == 7, terminal.shown
            assert "Waiting: " in terminal.shown
            assert is_harmless(terminal.shown), ascii(terminal.shown)
    database.psql(f"ALTER ROLE {name} NOSUPERUSER; ALTER TABLE {name} OWNER TO postgres")
    database.psql(f"ALTER TABLE {name} ENABLE ROW LEVEL SECURITY; GRANT SELECT ON {name} TO PUBLIC")
    result = project.run().failed_with(4, "Permission error")
    assert result.stderr.count("owned") > 1, result
    assert is_harmless(result.stderr), ascii(result.stderr)
