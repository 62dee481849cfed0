"""The runbook in the metadata: typed as it stands, on a server that knows nothing of the backup."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, installation
from conftest import MakeProject
from environment import TESTS
from support import (
    Database,
    Project,
    Result,
    metadata_path,
    new_database,
    program,
    read_metadata,
)

from backup_db import DATABASE_FACTS, Metadata, restore_commands

EARLIER = TESTS / "earlier"
DUMPS = "*_dev_*.dump"

# Every server with its own tools, and into a newer one. (Of 15 the newest pg_dump 15 is needed: an
# older pg_dump writes down what only that server knows, pg_attver.)
PAIRS = [
    *(pytest.param(v, v, v, marks=pytest.mark.servers(v)) for v in (15, 16, 17, 18)),
    pytest.param(15, 15, 17, marks=pytest.mark.servers(15, 17)),
    pytest.param(17, 17, 18, marks=pytest.mark.servers(17, 18)),
]

HOSTILE = """a 'b' "c"\n$(touch harm) `touch harm` \\ %s; touch harm #"""

ROLES = r"""
CREATE ROLE reader CONNECTION LIMIT 0 VALID UNTIL 'infinity';
CREATE ROLE app LOGIN CREATEDB CREATEROLE REPLICATION BYPASSRLS CONNECTION LIMIT 7
    VALID UNTIL '2031-01-02 03:04:05.5+02' PASSWORD 'kept out of every backup';
CREATE ROLE heir NOINHERIT IN ROLE reader;
CREATE ROLE stranger;
CREATE ROLE setter;
CREATE ROLE visitor;
CREATE ROLE subscriber SUPERUSER;
CREATE ROLE :"hostile" SUPERUSER;
GRANT reader TO app WITH ADMIN OPTION;
GRANT pg_monitor TO app;
GRANT stranger TO app;
GRANT heir TO :"hostile";
ALTER ROLE app SET search_path = "$user", 'a b', 'it''s', 'quo"ted', 'x,y', "Select", public;
ALTER ROLE app SET default_transaction_read_only = on;
ALTER ROLE app SET role = heir;
ALTER ROLE app SET temp_tablespaces = 'a b', c;
ALTER ROLE app SET my.note = E'tab\t, line\nback\\slash ''quoted'' "a", b';
ALTER ROLE reader SET search_path = '';
ALTER ROLE reader SET my.list = 'a=b, c';
"""
# What only 16 and later can say: on two grounds, of which neither says all.
MEMBERSHIP = r"""
GRANT reader TO heir WITH ADMIN FALSE, INHERIT TRUE, SET FALSE;
SET ROLE app;
GRANT reader TO heir WITH ADMIN TRUE, INHERIT FALSE, SET TRUE;
"""

# What is in each of the databases. While rows come, triggers that are there too early change them:
# `--jobs` alone makes one on a partitioned table before its partitions are filled. This one has its
# turn right after the largest table, from which it is: most partitions are still empty then.
CONTENT = r"""
CREATE TABLE mine AS SELECT i FROM generate_series(1, 9) AS i;
ALTER TABLE mine OWNER TO :"hostile";
GRANT SELECT ON mine TO app WITH GRANT OPTION;
SET ROLE app;
GRANT SELECT ON mine TO reader, pg_monitor;
RESET ROLE;
ALTER DEFAULT PRIVILEGES FOR ROLE heir GRANT SELECT ON TABLES TO reader;
CREATE TABLE prices AS SELECT 1234::money AS price, ARRAY[5::money, NULL, (-6)::money] AS others;
CREATE TABLE lists AS SELECT ARRAY['a', NULL, 'NULL'] AS list;
CREATE TABLE largest AS SELECT md5(i::text) FROM generate_series(1, 3000) AS i;
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.largest VALUES (TG_TABLE_NAME); RETURN NULL;
END $$;
CREATE TABLE events (part int, id text) PARTITION BY LIST (part);
SELECT format('CREATE TABLE events_%1$s PARTITION OF events FOR VALUES IN (%1$s)', i)
  FROM generate_series(1, 20) AS i \gexec
INSERT INTO events SELECT i % 20 + 1, md5(i::text) FROM generate_series(1, 40000) AS i;
CREATE CONSTRAINT TRIGGER noting AFTER INSERT ON events FROM largest
    FOR EACH ROW EXECUTE FUNCTION tell();
"""

# Database to what else is done to it, and how it is made. All are for every pair of servers.
DATABASES = {
    "-dash": 'ALTER DATABASE :"name" SET default_transaction_read_only = on',
    "a b": r"""
        ALTER DATABASE :"name" OWNER TO app;
        ALTER DATABASE :"name" CONNECTION LIMIT 3;
        ALTER DATABASE :"name" SET search_path = 'a b', public;
        ALTER DATABASE :"name" SET statement_timeout = '2s';
        ALTER DATABASE :"name" SET array_nulls = off;
        CREATE SUBSCRIPTION hears CONNECTION 'host=nowhere' PUBLICATION p
            WITH (connect = false, streaming);
        ALTER SUBSCRIPTION hears OWNER TO subscriber;
        ALTER ROLE setter IN DATABASE :"name" SET work_mem = '1MB';
        ALTER ROLE heir IN DATABASE :"name" SET lock_timeout = '2s';
        REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
        GRANT CREATE, CONNECT ON DATABASE :"name" TO reader WITH GRANT OPTION;
        GRANT TEMPORARY ON DATABASE :"name" TO visitor;
        COMMENT ON DATABASE :"name" IS E'it''s\na comment'""",
}
# And these once.
NAMES = {
    "dbname=k host='v": 'ALTER DATABASE :"name" SET session_replication_role = replica',
    HOSTILE + "\xa0\u200f": "COMMENT ON DATABASE :\"name\" IS 'hostile'",
}
OPTIONS = {"-dash": ("--encoding=LATIN1", "--locale=POSIX", "--template=template0")}

ABOUT_ROLE = r"""
SET TimeZone = 'UTC';
SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication,
       rolbypassrls, rolconnlimit, rolvaliduntil, rolconfig FROM pg_roles WHERE rolname = :'role';
SELECT roleid::regrole::text, bool_or(admin_option), {options} FROM pg_auth_members
 WHERE member::regrole::text = quote_ident(:'role') AND roleid::regrole::text <> 'stranger'
 GROUP BY 1 ORDER BY 1
"""
COMMENT = """
SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()
"""
ANALYZED = "SELECT sum(analyze_count) FROM pg_stat_user_tables"


@pytest.fixture(scope="session")
def locales() -> Iterator[str]:
    """A LOCPATH with two locales, of which only what money looks like takes time to be made."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # the server is another user's
        for name in ("es_CL", "de_DE"):
            copied = dict.fromkeys(("COLLATE", "CTYPE"), "POSIX")
            others = ("ADDRESS", "IDENTIFICATION", "MEASUREMENT", "MESSAGES", "MONETARY", "NAME")
            copied |= dict.fromkeys((*others, "NUMERIC", "PAPER", "TELEPHONE", "TIME"), name)
            source = Path(folder, f"{name}.source")
            parts = (f'LC_{k}\ncopy "{v}"\nEND LC_{k}\n' for k, v in copied.items())
            source.write_text("".join(parts))
            localedef = program("localedef", "locales")
            command = [localedef, "-f", "UTF-8", "-i", str(source), f"{folder}/{name}.UTF-8"]
            subprocess.run(command, check=True)
        yield folder


def run_sql(cluster: Cluster, sql: str, database: str = "postgres", **variables: str) -> str:
    """Run it where psql's variables stand for names."""
    bare = ("--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1")
    given = (f"--set={name}={value}" for name, value in variables.items())
    return cluster.run("psql", *bare, *given, "--file=-", database=database, stdin=sql)


def with_tools(project: Project, bin_dir: Path) -> Project:
    path = project.environ["PATH"].replace(str(project.bin_dir), str(bin_dir))
    return replace(project, environ={**project.environ, "PATH": path}, bin_dir=bin_dir)


def run_shell(
    script: str, project: Project, server: Cluster | None = None, shell: str = "dash"
) -> Result:
    """What is typed in the folder of the dump, on the way to a server."""
    way = {"PGHOST": str(server.directory), "PGPORT": str(server.port)} if server else {}
    done = subprocess.run(
        [program(shell, shell)],
        input=script,
        cwd=project.backups,
        env={**project.environ, **way, "PGUSER": "postgres"},
        capture_output=True,
        text=True,
    )
    return Result(script, done.returncode, done.stdout, done.stderr)


def first_command(dump: Path) -> str:
    """That by which the first line says to show all of them."""
    return str(read_metadata(dump)["restore"][0]).partition(": ")[2]


def type_runbook(
    dump: Path, project: Project, server: Cluster, shell: str = "dash", change: str = ""
) -> Result:
    """Paste all of it into a shell; `change` is what a person edits, a script for sed."""
    edit = f"sed '{change}' | " if change else ""
    script = f"{first_command(dump)} | {edit}{shell}\n"
    return run_shell(script, project, server)


def type_comments(dump: Path, project: Project) -> None:
    """As an interactive zsh takes them, to which a `#` is a command like any other."""
    lines = read_metadata(dump)["restore"]
    script = "\n".join(re.sub("^#", ":", line) for line in lines if line.startswith("#"))
    done = run_shell(f"set -e\n{script}\n", project)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done


# What no two dumps have in common, and what two versions say of equal things: 15 has a number of
# its own in each column's options, and names the only table of a view; it has no run_as_owner.
UNLIKE = (
    r"^\\(un)?restrict .*\n",
    r"^-- Dumped from.*\n",
    r'^ALTER (FOREIGN )?TABLE ONLY ([^";]|"[^"]*")* SET \(pg_attver=\d+\);\n',
    r"(?<=[ (])(measures|ruled|typed|up_to)\.(?=\w)",
    r", run_as_owner = true",
)


def dumped(server: Cluster, reader: Cluster, database: str) -> list[str]:
    """All of the database, as one and the same pg_dump reads it on both sides, in any order."""
    options = "-c lc_monetary=C -c TimeZone=UTC -c bytea_output=hex"
    way = f"host={server.directory} port={server.port} options='{options}'"
    create = [] if "\n" in database else ["--create"]  # as text, psql could not connect to it
    text = reader.run("pg_dump", *create, f"--dbname={way}", database=database)
    for pattern in UNLIKE:
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    return sorted(text.splitlines())


def about_role(cluster: Cluster, role: str, options: str) -> str:
    return run_sql(cluster, ABOUT_ROLE.format(options=options), role=role)


MONEY = (
    "CREATE TABLE t (prices money[])",
    "CREATE TYPE price AS (amount money, since date)",
    "CREATE DOMAIN price AS money",
    "CREATE TYPE prices AS RANGE (SUBTYPE = money)",
)


def test_settings_name_what_shapes_the_rows(database: Database, make_project: MakeProject) -> None:
    """As pg_dump had it; what money looks like only where there is money."""
    database.psql(
        f"""ALTER DATABASE {database.name} SET bytea_output = escape;
        ALTER DATABASE {database.name} SET timezone = 'Asia/Kathmandu';
        CREATE TABLE t AS SELECT '2026-01-01 12:00+00'::timestamptz AS moment, 'a b'::bytea"""
    )
    dump = make_project(database).back_up()
    assert read_metadata(dump)["settings"] == {"bytea_output": "escape"}
    rows = database.cluster.run("pg_restore", "--data-only", "--file=-", str(dump))
    assert "\n2026-01-01 12:00:00+00\ta b\n" in rows
    for sql in MONEY:
        facts = database.psql(f"BEGIN; DROP TABLE t; {sql}; {DATABASE_FACTS}; ROLLBACK")
        assert json.loads(facts)["settings"] == {"bytea_output": "escape", "lc_monetary": "C"}, sql


def make_databases(source: Cluster, databases: Mapping[str, str]) -> None:
    is_16 = int(source.psql("SHOW server_version_num")) >= 160000
    run_sql(source, ROLES + (MEMBERSHIP if is_16 else ""), hostile=HOSTILE)
    for name, sql in databases.items():
        source.create_database(name, *OPTIONS.get(name, ()))
        run_sql(source, CONTENT, name, hostile=HOSTILE)
        run_sql(source, sql, name, name=name)
    mixed = (TESTS / "mixed.sql").read_text(encoding="utf-8")
    run_sql(source, f"SET search_path = public; {mixed}", "a b")


@pytest.mark.parametrize(("server", "tools", "target"), PAIRS)
def test_everything_comes_back_on_a_fresh_server(
    server: int, tools: int, target: int, locales: str, make_project: MakeProject
) -> None:
    """The databases one after the other, as the roles of one are there for the next. Each is typed
    twice: the second time nothing is touched."""
    here = {"LOCPATH": locales}
    databases = DATABASES | (NAMES if server == target == 17 else {})
    with ExitStack() as stack:
        money = {"lc_monetary": "es_CL.UTF-8"}
        source = Cluster(installation(server), settings=money, environ=here)
        fresh = Cluster(installation(target), environ=here)
        stack.enter_context(source)
        stack.enter_context(fresh)
        make_databases(source, databases)
        roles = set()
        for i, name in enumerate(databases):
            project = with_tools(make_project(Database(source, name)), installation(tools))
            dump = project.back_up()
            metadata = read_metadata(dump)
            roles |= set(metadata["roles"])
            assert "kept out" not in json.dumps(metadata)
            assert dump.name.isprintable()
            assert all(line.isprintable() for line in metadata["restore"])
            left_out = "# Left out is the membership of app in stranger"
            assert (left_out in metadata["restore"]) == ("app" in metadata["roles"])
            type_comments(dump, project)

            shell = ("dash", "bash")[i % 2]
            result = type_runbook(dump, project, fresh, shell).succeeded()
            assert 'role "postgres" already exists' in result.stderr
            expected = dumped(source, fresh, name)
            assert "{NULL,a,NULL}" not in expected
            assert dumped(fresh, fresh, name) == expected
            analyzed = int(run_sql(fresh, ANALYZED, name))
            assert analyzed

            since_then = "TRUNCATE mine; COMMENT ON DATABASE :\"name\" IS 'since then'"
            run_sql(
                fresh, f"SET default_transaction_read_only = off; {since_then}", name, name=name
            )
            again = type_runbook(dump, project, fresh, shell)
            assert again.returncode == 1, again
            assert re.search(r"database .* already exists", again.stderr, re.DOTALL), again
            assert run_sql(fresh, "SELECT count(*) FROM mine", name) == "0\n"
            assert run_sql(fresh, COMMENT, name) == "since then\n"
            assert int(run_sql(fresh, ANALYZED, name)) == analyzed
            source.psql("ALTER ROLE postgres SET lc_monetary = 'de_DE.UTF-8'")  # for the next
            assert not (project.backups / "harm").exists()

        expected_roles = {"postgres", "app", "heir", "setter", "visitor", "subscriber", "reader"}
        assert roles == {*expected_roles, HOSTILE}
        options = "bool_or(inherit_option), bool_or(set_option)" if server >= 16 else "NULL"
        for role in roles - {"postgres"}:
            assert about_role(fresh, role, options) == about_role(source, role, options)


# Five tables whose rows, or what belongs to them, a server refuses; and what is left of them.
REFUSED = r"""
CREATE TABLE limits AS SELECT 50 AS most;
CREATE FUNCTION fold(i int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT i';
CREATE FUNCTION allowed(i int) RETURNS bool IMMUTABLE LANGUAGE plpgsql SET search_path = public
    AS 'BEGIN RETURN i <= most FROM limits; END';
CREATE TABLE numbers AS SELECT i FROM generate_series(1, 9) AS i;
CREATE TABLE doubled AS TABLE numbers;
CREATE UNIQUE INDEX doubled_index ON doubled (fold(i));
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int CONSTRAINT child_key REFERENCES parent);
ALTER TABLE child DISABLE TRIGGER ALL;
INSERT INTO child VALUES (1);
ALTER TABLE child ENABLE TRIGGER ALL;
CREATE TABLE checked (i int CHECK (allowed(i)));
INSERT INTO checked TABLE numbers;
CREATE TABLE generated (i int, is_allowed bool GENERATED ALWAYS AS (allowed(i)) STORED);
INSERT INTO generated TABLE numbers;
CREATE MATERIALIZED VIEW seen AS SELECT i, allowed(i) FROM numbers;
CREATE INDEX numbers_index ON numbers (i);
CREATE VIEW last_of_all AS SELECT count(*) FROM doubled;
SELECT lo_from_bytea(1, 'a large object');
CREATE OR REPLACE FUNCTION fold(i int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT 1';
ALTER FUNCTION allowed RESET search_path;
"""
ERRORS = (
    'could not create unique index "doubled_index"',
    'violates foreign key constraint "child_key"',
    *['relation "limits" does not exist'] * 3,
)


def test_what_a_server_refuses_keeps_nothing_else_back(
    database: Database, elsewhere: Cluster, make_project: MakeProject
) -> None:
    database.psql(REFUSED)
    project = make_project(database)
    dump = project.back_up()
    result = type_runbook(dump, project, elsewhere)
    assert result.returncode == 1, result
    for error in set(ERRORS):
        assert result.stderr.count(error) == ERRORS.count(error), result
    copy = Database(elsewhere, database.name)
    lost = {line.partition("|")[0] for line in set(database.contents()) - set(copy.contents())}
    assert lost == {"checked", "generated", "seen"}
    gone = set(database.schema()) - set(copy.schema())
    gone = {line for line in gone if not line.startswith("--")}
    assert gone == {
        "CREATE UNIQUE INDEX doubled_index ON public.doubled USING btree (public.fold(i));",
        "    ADD CONSTRAINT child_key FOREIGN KEY (id) REFERENCES public.parent(id);",
        "ALTER TABLE ONLY public.child",
    }
    assert int(copy.psql(ANALYZED))
    elsewhere.drop_database(database.name)


def test_role_keeps_the_settings_that_the_server_takes(
    sample_dump: Path, elsewhere: Cluster, make_project: MakeProject
) -> None:
    """Of a newer server, say, that no longer knows one of them."""
    settings = ["gone_setting=1", "work_mem=1MB"]
    facts = Metadata.read(metadata_path(sample_dump))._replace(
        roles=["guarded"], role_attributes={"guarded": {"settings": settings}}
    )
    (line,) = (line for line in restore_commands(facts) if "CREATE ROLE" in line)
    project = make_project()
    project.backups.mkdir(parents=True)
    for _ in range(2):  # the second time it is there, and stays as it is
        result = run_shell(line, project, elsewhere).succeeded()
        config = elsewhere.psql("SELECT rolconfig FROM pg_roles WHERE rolname = 'guarded'")
        assert config == "{work_mem=1MB}"
        elsewhere.psql("ALTER ROLE guarded RESET ALL; ALTER ROLE guarded SET work_mem = '1MB'")
    assert 'role "guarded" already exists' in result.stderr
    assert "gone_setting" not in result.stderr
    elsewhere.psql("DROP ROLE guarded")


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
        dump = project.back_up()
        metadata = read_metadata(dump)
        assert metadata["tablespaces"] == [name]
        assert metadata["database_tablespace"] == (name if whose == "database" else None)
        (comment,) = (line for line in metadata["restore"] if "CREATE TABLESPACE" in line)
        assert shlex.quote(name) in comment
        type_comments(dump, project)
        failed = type_runbook(dump, project, elsewhere)
        assert failed.returncode == 1, failed
        assert f'ablespace "{name}" does not exist' in failed.stderr
        copy = Database(elsewhere, database.name)
        is_there = f"SELECT count(*) FROM pg_database WHERE datname = '{copy.name}'"
        assert elsewhere.psql(is_there) == ("0" if whose == "database" else "1")
        if whose == "table":
            assert comment.endswith(", or its tables go to pg_default")
            assert copy.contents() == database.contents()
        (again,) = (line for line in metadata["restore"] if "dropdb" in line)
        run_shell(again.partition(": ")[2], project, elsewhere)
        assert elsewhere.psql(is_there) == "0"

        elsewhere.psql(make)
        type_runbook(dump, project, elsewhere).succeeded()
        assert dumped(elsewhere, cluster, copy.name) == dumped(cluster, cluster, database.name)
        elsewhere.drop_database(database.name)
    for server in (cluster, elsewhere):
        server.psql(f'DROP TABLESPACE "{name}"')


@pytest.mark.parametrize("name", ["postgres", "template1"])
def test_database_that_every_server_has(
    name: str, cluster: Cluster, elsewhere: Cluster, make_project: MakeProject
) -> None:
    """Nothing but an error stops the second time from adding the rows again."""
    database, copy = Database(cluster, name), Database(elsewhere, name)
    database.psql("CREATE TABLE only_here AS SELECT 1; CREATE TABLE and_here AS SELECT 2")
    try:
        project = make_project(database)
        dump = project.back_up()
        type_comments(dump, project)
        type_runbook(dump, project, elsewhere).succeeded()
        assert copy.contents() == database.contents()
        analyzed = int(copy.psql(ANALYZED))
        assert analyzed
        copy.psql("DROP TABLE only_here; INSERT INTO and_here VALUES (3)")
        since_then = copy.contents()
        again = type_runbook(dump, project, elsewhere, "bash")
        assert again.returncode == 1, again
        assert 'relation "and_here" already exists' in again.stderr
        assert copy.contents() == since_then
        assert int(copy.psql(ANALYZED)) < analyzed  # what the dropped one had is gone, none is new
    finally:
        for server in (database, copy):
            server.psql("DROP TABLE IF EXISTS only_here, and_here")


def test_runbook_says_what_it_takes(sample_dump: Path, make_project: MakeProject) -> None:
    """In comments; both commands that show it show the same."""
    facts = Metadata.read(metadata_path(sample_dump))._replace(
        extensions={"plpgsql": "1.0", "vector": "0.8.0", "pg_trgm": "1.6"},
        locale={"collate": "de_DE.UTF-8", "ctype": "C", "provider": "libc"},
        settings={"bytea_output": "hex", "lc_monetary": "my locale"},
    )
    lines = restore_commands(facts)
    assert "# For PostgreSQL 17 or newer, the server and its tools" in lines
    assert "# The server needs the packages of these extensions: pg_trgm 1.6, vector 0.8.0" in lines
    assert "# The server needs these locales, see locale -a: de_DE.UTF-8 'my locale'" in lines
    assert r"-c lc_monetary=my\ locale'" in lines[-1]
    project = make_project()
    project.backups.mkdir(parents=True)
    (project.backups / metadata_path(sample_dump).name).write_text(
        facts._replace(restore=[*lines, "# Größe"]).to_json(), encoding="utf-8"
    )
    by_jq, by_python = (line.partition(": ")[2] for line in lines[:2])
    shown = run_shell(by_jq, project).succeeded().stdout
    assert shown.splitlines() == [*lines, "# Größe"]
    assert run_shell(by_python, project).succeeded().stdout == shown


def test_no_program_asks_for_a_password(sample_dump: Path) -> None:
    """It would read the next line as one."""
    for line in read_metadata(sample_dump)["restore"]:
        for command in re.findall(r"\b(?:psql|pg_restore|vacuumdb) (?!\|).*?(?= ; |$)", line):
            assert line.startswith("#") or "--no-password" in command, line


def test_runbook_of_a_backup_made_before_there_were_any(tmp_path: Path) -> None:
    """Names of roles alone; and whatever somebody wrote into the file stays a word."""
    metadata = Metadata.read(metadata_path(next(EARLIER.glob(DUMPS))))
    assert metadata.restore is None
    assert metadata.role_attributes is None
    commands = restore_commands(metadata._replace(roles=["x'; touch harm; '"]))
    assert f" {metadata.backup_file} " in commands[-1]
    project_free = subprocess.run(
        ["sh", "-c", "\n".join(["psql() { printf '%s\\n' \"$@\"; }", *commands[:-1]])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--command=CREATE ROLE \"x'; touch harm; '\"\n" in project_free.stdout
    assert not list(tmp_path.iterdir())
