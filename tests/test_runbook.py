"""The runbook in the metadata: typed as it stands, on a server that knows nothing of the backup."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, installation
from conftest import MakeProject
from environment import TESTS
from support import Database, Project, Result, metadata_path, new_database, read_metadata

from backup_db import Metadata, restore_commands

EARLIER = TESTS / "earlier"

# Every server with its own tools, and one with newer ones.
PAIRS = [
    *(pytest.param(v, v, v, marks=pytest.mark.servers(v)) for v in (15, 16, 17, 18)),
    pytest.param(15, 17, 17, marks=pytest.mark.servers(15, 17)),
    pytest.param(17, 17, 18, marks=pytest.mark.servers(17, 18)),
]

HOSTILE = """a 'b' "c"\n$(touch harm) `touch harm` \\ ; touch harm #"""

ROLES = r"""
CREATE ROLE reader;
CREATE ROLE app LOGIN CREATEDB CREATEROLE REPLICATION BYPASSRLS CONNECTION LIMIT 7
    PASSWORD 'kept out of every backup';
CREATE ROLE heir NOINHERIT IN ROLE reader;
CREATE ROLE stranger;
CREATE ROLE setter CONNECTION LIMIT 0;
CREATE ROLE subscriber SUPERUSER;
CREATE ROLE :"hostile" SUPERUSER;
GRANT reader TO app WITH ADMIN OPTION;
GRANT pg_monitor TO app;
GRANT stranger TO app;
GRANT heir TO :"hostile";
"""
# What only 16 and later can say: on two grounds, of which neither says all.
MEMBERSHIP = r"""
GRANT reader TO heir WITH ADMIN FALSE, INHERIT TRUE, SET FALSE;
SET ROLE app;
GRANT reader TO heir WITH ADMIN TRUE, INHERIT FALSE, SET TRUE;
"""

# What is in each of them.
CONTENT = r"""
CREATE TABLE mine AS SELECT i FROM generate_series(1, 9) AS i;
ALTER TABLE mine OWNER TO :"hostile";
GRANT SELECT ON mine TO app WITH GRANT OPTION;
SET ROLE app;
GRANT SELECT ON mine TO reader, pg_monitor;
RESET ROLE;
ALTER DEFAULT PRIVILEGES FOR ROLE heir GRANT SELECT ON TABLES TO reader;
"""

# Database to what else is done to it.
DATABASES = {
    "everything": r"""
        ALTER DATABASE :"name" OWNER TO app;
        ALTER DATABASE :"name" CONNECTION LIMIT 3;
        ALTER DATABASE :"name" SET search_path = 'a b', public;
        ALTER DATABASE :"name" SET statement_timeout = '1s';
        CREATE SUBSCRIPTION hears CONNECTION 'host=nowhere' PUBLICATION p
            WITH (connect = false, streaming);
        ALTER SUBSCRIPTION hears OWNER TO subscriber;
        ALTER ROLE setter IN DATABASE :"name" SET work_mem = '1MB';
        ALTER ROLE heir IN DATABASE :"name" SET lock_timeout = '2s';
        REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
        GRANT CREATE, CONNECT ON DATABASE :"name" TO reader WITH GRANT OPTION;
        COMMENT ON DATABASE :"name" IS E'it''s\na comment'""",
    "-dash": 'ALTER DATABASE :"name" SET default_transaction_read_only = on',
    "dbname=postgres host=nowhere": 'ALTER DATABASE :"name" SET session_replication_role = replica',
    HOSTILE: "COMMENT ON DATABASE :\"name\" IS 'hostile'",
}
OPTIONS = {"-dash": ("--encoding=LATIN1", "--locale=POSIX", "--template=template0")}

ABOUT_DATABASE = r"""
SELECT pg_encoding_to_char(encoding), datcollate, datctype, datlocprovider, datconnlimit,
       datdba::regrole::text, shobj_description(d.oid, 'pg_database'), spcname
  FROM pg_database d JOIN pg_tablespace t ON t.oid = dattablespace
 WHERE datname = current_database();
SELECT setrole::regrole::text, setconfig
  FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase
 WHERE datname = current_database() ORDER BY 1;
SELECT grantor::regrole::text, grantee::regrole::text, privilege_type, is_grantable
  FROM pg_database, aclexplode(datacl) WHERE datname = current_database() ORDER BY 1, 2, 3
"""
ABOUT_ROLE = r"""
SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication,
       rolbypassrls, rolconnlimit FROM pg_roles WHERE rolname = :'role';
SELECT roleid::regrole::text, bool_or(admin_option), {options} FROM pg_auth_members
 WHERE member::regrole::text = quote_ident(:'role') AND roleid::regrole::text <> 'stranger'
 GROUP BY 1 ORDER BY 1
"""


def run_sql(cluster: Cluster, sql: str, database: str = "postgres", **variables: str) -> str:
    """Run it where psql's variables stand for names."""
    bare = ("--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1")
    given = (f"--set={name}={value}" for name, value in variables.items())
    return cluster.run("psql", *bare, *given, "--file=-", database=database, stdin=sql)


def with_tools(project: Project, bin_dir: Path) -> Project:
    path = project.environ["PATH"].replace(str(project.bin_dir), str(bin_dir))
    return replace(project, environ={**project.environ, "PATH": path}, bin_dir=bin_dir)


def type_runbook(commands: list[str], project: Project, cluster: Cluster) -> Result:
    """Paste all of it into a shell that stops at the first failure, in the folder of the dump."""
    way = {"PGHOST": str(cluster.directory), "PGPORT": str(cluster.port), "PGUSER": "postgres"}
    text = "\n".join(commands) + "\n"
    done = subprocess.run(
        ["sh", "-e"],
        input=text,
        cwd=project.backups,
        env={**project.environ, **way},
        capture_output=True,
        text=True,
    )
    return Result(text, done.returncode, done.stdout, done.stderr)


def about(reader: Cluster, cluster: Cluster, database: str) -> list[str]:
    """All that a restore has to bring back: of the database itself, and in it.

    The one pg_dump reads both sides, so that what it writes differs only where they do.
    """
    facts = run_sql(cluster, ABOUT_DATABASE, database).splitlines()
    way = (f"--host={cluster.directory}", f"--port={cluster.port}")
    schema = reader.run("pg_dump", "--schema-only", *way, database=database).splitlines()
    unlike = ("\\restrict ", "\\unrestrict ", "-- Dumped ")
    facts += [line for line in schema if not line.startswith(unlike)]
    return facts + Database(cluster, database).contents()


def about_role(cluster: Cluster, role: str, options: str) -> str:
    return run_sql(cluster, ABOUT_ROLE.format(options=options), role=role)


def type_comments(commands: list[str], project: Project) -> None:
    """As an interactive zsh takes them, to which a `#` is a command like any other."""
    script = "\n".join(re.sub("^#", ":", line) for line in commands if line.startswith("#"))
    done = subprocess.run(["sh", "-e", "-c", script], cwd=project.backups, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), script


@pytest.mark.parametrize(("server", "tools", "target"), PAIRS)
def test_runbook_typed_on_a_fresh_server(
    server: int, tools: int, target: int, make_project: MakeProject
) -> None:
    """Verbatim; the databases one after the other, as the roles of one are there for the next."""
    with ExitStack() as stack:
        source = stack.enter_context(Cluster(installation(server)))
        fresh = stack.enter_context(Cluster(installation(target)))
        run_sql(source, ROLES + (MEMBERSHIP if server >= 16 else ""), hostile=HOSTILE)
        for name, sql in DATABASES.items():
            source.create_database(name, *OPTIONS.get(name, ()))
            run_sql(source, CONTENT, name, hostile=HOSTILE)
            run_sql(source, sql, name, name=name)
        roles = set()
        for name in DATABASES:
            project = with_tools(make_project(Database(source, name)), installation(tools))
            metadata = read_metadata(project.back_up())
            roles |= set(metadata["roles"])
            assert "kept out" not in json.dumps(metadata)
            left_out = "# Left out is the membership of app in stranger"
            assert (left_out in metadata["restore"]) == ("app" in metadata["roles"])
            result = type_runbook(metadata["restore"], project, fresh).succeeded()
            assert 'role "postgres" already exists' in result.stderr
            assert about(fresh, fresh, name) == about(fresh, source, name)
            type_comments(metadata["restore"], project)
            assert not (project.backups / "harm").exists()

        assert roles == {"postgres", "app", "heir", "setter", "subscriber", "reader", HOSTILE}
        options = "bool_or(inherit_option), bool_or(set_option)" if server >= 16 else "NULL"
        for role in roles:
            assert about_role(fresh, role, options) == about_role(source, role, options)


def test_runbook_typed_twice_drops_nothing(
    sample_database: Database, elsewhere: Cluster, make_project: MakeProject
) -> None:
    project = make_project(sample_database)
    commands = read_metadata(project.back_up())["restore"]
    type_runbook(commands, project, elsewhere).succeeded()
    copy = Database(elsewhere, sample_database.name)
    copy.psql("CREATE TABLE since_then ()")
    result = type_runbook(commands, project, elsewhere)
    assert result.returncode != 0
    assert f'database "{copy.name}" already exists' in result.stderr
    assert copy.psql("SELECT 'since_then'::regclass") == "since_then"
    elsewhere.drop_database(copy.name)


@pytest.mark.parametrize("whose", ["database", "table"])
def test_runbook_with_a_tablespace(
    whose: str, cluster: Cluster, elsewhere: Cluster, make_project: MakeProject
) -> None:
    """Its directory is for a person to choose; a comment names it."""
    name = f"fast 'disk' of {whose}"
    make = f"""SET allow_in_place_tablespaces = on; CREATE TABLESPACE "{name}" LOCATION ''"""
    cluster.psql(make)
    options = [f"--tablespace={name}"] if whose == "database" else []
    with new_database(cluster, *options) as database:
        in_it = f'TABLESPACE "{name}"' if whose == "table" else ""
        database.psql(f"CREATE TABLE t (i integer) {in_it}; INSERT INTO t VALUES (1)")
        project = make_project(database)
        metadata = read_metadata(project.back_up())
        assert metadata["tablespaces"] == [name]
        assert metadata["database_tablespace"] == (name if whose == "database" else None)
        commands = metadata["restore"]
        (comment,) = (line for line in commands if "CREATE TABLESPACE" in line)
        assert shlex.quote(name) in comment
        type_comments(commands, project)
        failed = type_runbook(commands, project, elsewhere)
        assert failed.returncode != 0
        assert f'ablespace "{name}" does not exist' in failed.stderr

        if "or without them: --no-tablespaces" in comment:
            elsewhere.drop_database(database.name)
            without = [
                line.replace("pg_restore", "pg_restore --no-tablespaces") for line in commands
            ]
            type_runbook(without, project, elsewhere).succeeded()
            assert Database(elsewhere, database.name).contents() == database.contents()
        elsewhere.drop_database(database.name)
        elsewhere.psql(make)
        type_runbook(commands, project, elsewhere).succeeded()
        assert about(cluster, elsewhere, database.name) == about(cluster, cluster, database.name)
        elsewhere.drop_database(database.name)
    for server in (cluster, elsewhere):
        server.psql(f'DROP TABLESPACE "{name}"')


@pytest.mark.parametrize("name", ["postgres", "template1"])
def test_runbook_of_a_database_that_every_server_has(
    name: str, cluster: Cluster, elsewhere: Cluster, make_project: MakeProject
) -> None:
    original = Database(cluster, name)
    original.psql("CREATE TABLE only_here AS SELECT 1")
    try:
        project = make_project(original)
        commands = read_metadata(project.back_up())["restore"]
        type_comments(commands, project)
        type_runbook(commands, project, elsewhere).succeeded()
        assert Database(elsewhere, name).contents() == original.contents()
    finally:
        for server in (cluster, elsewhere):
            server.psql("DROP TABLE IF EXISTS only_here", name)


def test_runbook_of_a_backup_made_before_there_were_any(tmp_path: Path) -> None:
    """Names of roles alone; and whatever somebody wrote into the file stays a word."""
    metadata = Metadata.read(metadata_path(next(EARLIER.glob("*_dev_*.dump"))))
    assert metadata.restore is None
    assert metadata.role_attributes is None
    commands = restore_commands(metadata._replace(roles=["x'; touch harm; '"]))
    assert commands[-1].endswith(metadata.backup_file)
    project_free = subprocess.run(
        ["sh", "-c", "\n".join(["psql() { printf '%s\\n' \"$@\"; }", *commands[:-1]])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "CREATE ROLE \"x'; touch harm; '\"" in project_free.stdout
    assert "NOINHERIT" not in project_free.stdout  # of what is not known, PostgreSQL's default
    assert not list(tmp_path.iterdir())
