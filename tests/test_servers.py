"""Every server, with client tools as new as itself or newer, and a database that has everything.

BACKUP_TEST_SERVERS names the versions; the pairs of server and tools are made from it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cluster import Cluster, installation
from conftest import MakeProject
from environment import TESTS
from sample import DATABASE
from support import (
    CREATE_READER,
    SERVERS,
    Database,
    Project,
    assert_restores,
    new_database,
    read_metadata,
)

import backup_db

VERSIONS = (15, 16, 17, 18)


def pairs(fits: Callable[[int, int], bool]) -> pytest.MarkDecorator:
    """Runs a test for every server and tools that fit, where both were asked for."""
    return pytest.mark.parametrize(
        ("server", "tools"),
        [
            pytest.param(server, tools, marks=pytest.mark.servers(server, tools))
            for server in VERSIONS
            for tools in VERSIONS
            if fits(server, tools)
        ],
    )


newer_tools = pairs(lambda server, tools: tools > server)
older_tools = pairs(lambda server, tools: tools < server)

# What the builds bring is their own: 16 and 18 have pgvector and no contrib, 15 and 17 the reverse.
EXTENSIONS = {
    "vector": """
        CREATE TABLE embeddings (id integer PRIMARY KEY, v vector(8), h halfvec(4), s sparsevec(9));
        INSERT INTO embeddings SELECT i, array_fill(i / 7.0, ARRAY[8])::vector,
            '[1,2.5,-3,65504]', '{1:1.5,9:2}/9' FROM generate_series(1, 100) AS i;
        INSERT INTO embeddings (id) VALUES (0);
        CREATE INDEX ON embeddings USING hnsw (v vector_cosine_ops) WITH (m = 4);
        CREATE INDEX ON embeddings USING ivfflat (v vector_l2_ops) WITH (lists = 2)""",
    "pg_trgm": "CREATE INDEX trigrams ON typed USING gin (name gin_trgm_ops)",
    "hstore": """
        CREATE TABLE pairs (p hstore, ps hstore[]);
        INSERT INTO pairs VALUES ('a=>1, "b c"=>NULL', ARRAY['x=>"\\"y"'::hstore])""",
    "pgcrypto": """
        CREATE TABLE digests AS SELECT digest(i::text, 'sha256') AS d FROM generate_series(1, 9) i;
        CREATE VIEW hidden AS SELECT encode(d, 'hex') FROM digests""",
    "citext": "CREATE TABLE names (n citext UNIQUE); INSERT INTO names VALUES ('A'), ('b')",
}


@pytest.fixture(scope="session")
def mixed_databases(clusters: Callable[[int], Cluster]) -> Iterator[Callable[[int], Database]]:
    """A database on each server that has all that this build can have; only to be read."""
    made: dict[int, Database] = {}
    with contextlib.ExitStack() as stack:

        def mixed_database_of(major: int) -> Database:
            if major not in made:
                cluster = clusters(major)
                cluster.psql(CREATE_READER)
                available = cluster.psql("SELECT name FROM pg_available_extensions").splitlines()
                made[major] = stack.enter_context(new_database(cluster))
                made[major].psql((TESTS / "mixed.sql").read_text(encoding="utf-8"))
                for extension in EXTENSIONS.keys() & set(available):
                    made[major].psql(f"CREATE EXTENSION {extension}; {EXTENSIONS[extension]}")
            return made[major]

        yield mixed_database_of


# Into a server that is older than pg_restore: a part of README.md's way, which test_recipes types.
RESTORE_INTO_OLDER = """
pg_restore --file=- "$0" | sed '/^SET transaction_timeout = 0;$/d' |
    psql --quiet --set=ON_ERROR_STOP=1 --dbname="$1"
"""

# PostgreSQL 15.20 and what else was released on its day keep a number of their own in the options
# of every column. A pg_dump of before that day writes it down, a server of before it refuses it.
RESTORE_INTO_NEWER = """
pg_restore --file=- "$0" | sed '/^ALTER TABLE ONLY .* SET (pg_attver=[0-9]*);$/d' |
    psql --quiet --set=ON_ERROR_STOP=1 --dbname="$1"
"""


@contextlib.contextmanager
def restored_by(script: str, dump: Path, project: Project, cluster: Cluster) -> Iterator[Database]:
    """The dump in an empty database, restored by a shell script that uses the project's tools."""
    with new_database(cluster, "--template=template0") as copy:
        way = {"PGHOST": str(cluster.directory), "PGPORT": str(cluster.port), "PGUSER": "postgres"}
        subprocess.run(
            ["bash", "-o", "pipefail", "-c", script, dump, copy.name],
            env={**project.environ, **way},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        yield copy


def with_tools(project: Project, version: int) -> Project:
    """The same project, with the client programs of another PostgreSQL on its PATH."""
    bin_dir = installation(version)
    path = project.environ["PATH"].replace(str(project.bin_dir), str(bin_dir))
    return replace(project, environ={**project.environ, "PATH": path}, bin_dir=bin_dir)


def assert_default_compression(dump: Path, project: Project) -> None:
    """zstd where this build of pg_dump takes it, by its own words; before 16 it takes a number."""
    probe = ("--format=custom", "--compress=zstd:3", "--file=/dev/null", "--host=/nowhere")
    refusal = subprocess.run([project.bin_dir / "pg_dump", *probe], capture_output=True, text=True)
    expected = "gzip:4" if "compress" in refusal.stderr else "zstd:3"
    assert read_metadata(dump)["compression"] == expected
    listed = subprocess.check_output([project.bin_dir / "pg_restore", "--list", dump], text=True)
    algorithm, _, level = expected.partition(":")
    assert re.search(f"^; +Compression: ({algorithm}|{level})$", listed, re.MULTILINE)


@pytest.mark.parametrize("server", SERVERS)
def test_database_with_everything_is_restored_equal(
    server: int, mixed_databases: Callable[[int], Database], make_project: MakeProject
) -> None:
    database = mixed_databases(server)
    project = make_project(database)
    dump = project.back_up()
    project.run("--verify", dump).succeeded()
    assert_restores(dump, database)

    metadata = read_metadata(dump)
    extensions = database.psql("SELECT extname, extversion FROM pg_extension").splitlines()
    assert metadata["extensions"] == dict(line.split("|") for line in extensions)
    assert set(metadata["roles"]) == {"postgres", "reader"}
    assert metadata["large_object_count"] == 2
    assert_default_compression(dump, project)
    assert metadata["not_included"] == [
        "contents of materialized views, which a restore computes anew (summed, on_top)",
        "data of foreign tables (far)",
    ]
    counts = metadata["table_counts"]
    assert counts["pgagent.jobs"] == 3
    assert counts["vehicle"] == 1  # by itself, without the tables that inherit from it
    assert counts["no_columns"] == 2
    assert counts['"public.dotted"'] == 1
    assert '"Sales & ""more""".e2' in counts
    # What has no rows of its own: the upper levels of the partitions, and what is elsewhere.
    assert not counts.keys() & {"measures", "measures_2024", "measures_2024_a", "far", "summed"}


# A locale of the system's that is not the server's own, C; that where there is no other.
ANOTHER_CTYPE = """
SELECT COALESCE(min(collctype) FILTER (WHERE collctype NOT IN ('', 'C', 'POSIX')), 'C')
  FROM pg_collation WHERE collprovider = 'c' AND collencoding IN (-1, 6)
"""


@pytest.mark.parametrize("server", SERVERS)
def test_locale_is_that_of_the_database(
    server: int, clusters: Callable[[int], Cluster], make_project: MakeProject
) -> None:
    cluster = clusters(server)
    ctype = cluster.psql(ANOTHER_CTYPE)
    made: dict[tuple[str, ...], dict[str, str]] = {
        (f"--lc-ctype={ctype}",): {"ctype": ctype, "provider": "libc"}
    }
    if cluster.psql("SELECT count(*) FROM pg_collation WHERE collname LIKE '%-x-icu'") != "0":
        icu = ("--locale-provider=icu", "--icu-locale=de-DE")
        made[icu] = {"ctype": "C", "provider": "icu", "locale": "de-DE"}
    if server >= 17:
        builtin = ("--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        made[builtin] = {"ctype": "C", "provider": "builtin", "locale": "C.UTF-8"}
    for options, locale in made.items():
        with new_database(cluster, "--template=template0", *options) as database:
            dump = make_project(database).back_up()
        assert read_metadata(dump)["locale"] == {"collate": "C", **locale}


@newer_tools
def test_newer_tools_back_up_an_older_server(
    server: int, tools: int, mixed_databases: Callable[[int], Database], make_project: MakeProject
) -> None:
    database = mixed_databases(server)
    project = with_tools(make_project(database), tools)
    dump = project.back_up()
    project.run("--verify", dump).succeeded()
    assert read_metadata(dump)["pg_dump_version"].startswith(f"{tools}.")
    assert read_metadata(dump)["postgresql_version"].startswith(f"{server}.")
    assert_default_compression(dump, project)
    with restored_by(RESTORE_INTO_OLDER, dump, project, database.cluster) as copy:
        assert copy.schema() == database.schema()
        assert copy.contents() == database.contents()


@newer_tools
def test_backup_of_newer_tools_restores_on_the_newer_server(
    server: int, tools: int, clusters: Callable[[int], Cluster], make_project: MakeProject
) -> None:
    original = Database(clusters(server), DATABASE)
    project = with_tools(make_project(original), tools)
    dump = project.back_up()
    with restored_by(RESTORE_INTO_NEWER, dump, project, clusters(tools)) as copy:
        assert copy.contents() == original.contents()


@older_tools
def test_older_tools_are_refused(
    server: int, tools: int, clusters: Callable[[int], Cluster], make_project: MakeProject
) -> None:
    project = with_tools(make_project(Database(clusters(server), DATABASE)), tools)
    result = project.run().failed_with(6, "Tool error")
    assert f"is version {tools}." in result.stderr
    assert f"too old for the server, which is version {server}" in result.stderr
    first, then = re.findall(r"^  \d\. (.*)$", result.stderr, re.MULTILINE)
    assert first.endswith(f"version {server} or newer: sudo apt-get install postgresql-client")
    assert then.startswith(f"Where that is older than {server}, first: sudo apt-get install -y ")
    assert not list(project.backups.glob("*.dump"))


@pytest.mark.parametrize(
    ("folders", "best"),
    [
        ({"opt/homebrew/opt/postgresql@9/bin": 9, "opt/homebrew/opt/postgresql@17/bin": 17}, 1),
        ({"usr/local/opt/postgresql@16/bin": 16, "usr/local/opt/libpq/bin": 15}, 0),
        ({"usr/local/opt/postgresql@16/bin": 16, "usr/local/opt/libpq/bin": 18}, 1),
        ({"opt/homebrew/bin": 17, "opt/homebrew/opt/libpq/bin": 17}, 0),
        ({"Applications/Postgres.app/Contents/Versions/18/bin": 18, "usr/bin": 15}, 0),
        ({"usr/bin": 14, "opt/local/lib/postgresql15/bin": 15}, 1),
        ({"usr/lib/postgresql/15/bin": 15, "usr/pgsql-16/bin": 16}, 1),
    ],
    ids=str,
)
def test_tools_are_found_where_other_systems_have_them(
    folders: dict[str, int], best: int, make_project: MakeProject, tmp_path: Path
) -> None:
    """The newest by what it answers: the folder's name may have no number."""
    for folder, version in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        tool = tmp_path / folder / "pg_dump"
        tool.write_text(f"#!/bin/sh\necho 'pg_dump (PostgreSQL) {version}.1'\n")
        tool.chmod(0o755)
    below = tuple(f"{tmp_path}{pattern}" for pattern in backup_db.TOOL_FOLDERS)
    project = make_project(constants={"TOOL_FOLDERS": below})
    project.configure({"DB_NAME": "any"})
    result = project.run(env={"PATH": "/nowhere"}).failed_with(6, "Tool error")
    newest = tmp_path / list(folders)[best]
    assert f"It is in {newest}. For cron, put this line" in result.stderr, result
