"""tests/rehearse.py as a user types it: what comes back equal, what does not, and what is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from environment import TESTS
from support import (
    CREATE_READER,
    MOUNTING,
    NOTHING,
    Database,
    Result,
    finish,
    metadata_path,
    new_database,
    read_metadata,
    wait_until,
)
from test_servers import EXTENSIONS

# Hash partitions by an enum: on another server the same rows come to other partitions. Each label
# has twice the rows of the one before, so that the numbers show it.
BY_ENUM = """
CREATE TYPE hue AS ENUM ('a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i', 'j', 'k', 'l');
CREATE TABLE painted (hue hue, i int) PARTITION BY HASH (hue);
CREATE TABLE painted_0 PARTITION OF painted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE painted_1 PARTITION OF painted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO painted SELECT hue, i
  FROM unnest(enum_range(NULL::hue)) WITH ORDINALITY AS label (hue, n),
       generate_series(1, (2 ^ (n - 1))::int) AS i;
"""

# What a database's settings can do to whoever counts in it.
BENT = """
ALTER DATABASE "{0}" SET search_path = evil, pg_catalog;
ALTER DATABASE "{0}" SET statement_timeout = '2s';
ALTER DATABASE "{0}" SET default_transaction_read_only = on;
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A TMPDIR of its own that the server's user may enter; whatever is in it was left behind."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def start(
    dump: Path, place: Path, *prefix: str, env: Mapping[str, str] = NOTHING
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*prefix, sys.executable, TESTS / "rehearse.py", dump],
        env={"PATH": os.defpath, "HOME": str(place), "TMPDIR": str(place), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def rehearse(dump: Path, place: Path) -> Result:
    result = finish(start(dump, place))
    assert "Traceback" not in result.stderr, result
    assert not list(place.iterdir()), result
    return result


def last_line(result: Result) -> str:
    return result.stderr.splitlines()[-1]


def prepare(database: Database) -> None:
    """All that a database can have."""
    database.psql(CREATE_READER)
    database.psql((TESTS / "mixed.sql").read_text(encoding="utf-8"))
    database.psql(BY_ENUM)


# -- equal ----------------------------------------------------------------------------------------


def test_backup_of_the_sample(sample_dump: Path, place: Path) -> None:
    result = rehearse(sample_dump, place).succeeded()
    lines = result.stdout.splitlines()
    commands = [line for line in read_metadata(sample_dump)["restore"] if line[0] != "#"]
    assert [line[2:] for line in lines if line.startswith("$ ")][1:] == commands
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("Table ")) + 1 :]
    assert [line.split() for line in table[:4]] == [
        ["messages", "3420", "3420"],
        ["conversations", "150", "150"],
        ["conversation_index", "145", "145"],
        ["project_knowledge", "12", "12"],
    ]
    steps = r"verified in [\d.]+ s, server started in .* s, restored in .* s, analyzed in .* s, .*"
    assert re.fullmatch(steps, lines[-2])
    assert lines[-1] == "✓ Restored and equal: 3727 rows in 4 tables"
    assert "\r" not in result.stderr + result.stdout


def test_backup_of_everything(
    each_cluster: Cluster, make_project: MakeProject, place: Path
) -> None:
    """With what the server's build brings, be it pgvector."""
    with new_database(each_cluster) as database:
        prepare(database)
        available = database.psql("SELECT name FROM pg_available_extensions").splitlines()
        for extension in EXTENSIONS.keys() & set(available):
            database.psql(f"CREATE EXTENSION {extension}; {EXTENSIONS[extension]}")
        database.psql(BENT.format(database.name))
        dump = make_project(database).back_up()
    result = rehearse(dump, place).succeeded()
    assert "✓ Restored and equal: " in result.stdout
    assert re.search(r"\npublic.painted, all partitions +4095 +4095\n", result.stdout), result
    assert re.search(r"\nlarge objects +2 +2\n", result.stdout), result


def test_names_of_no_encoding(cluster: Cluster, make_project: MakeProject, place: Path) -> None:
    """And in the name of the database all that a shell, a path or libpq could take for its own."""
    name = "dbname=x host='y'\n$HOME \"z\" %s/;"
    cluster.create_database(name, "--template=template0", "--encoding=SQL_ASCII")
    try:
        database = Database(cluster, name)
        for rows, table in enumerate(("caf\udce9", "dépôt", "a\nb;", 'c"d.e'), 1):
            quoted = '"' + table.replace('"', '""') + '"'
            create = f"CREATE TABLE {quoted} AS SELECT generate_series(1, {rows})"
            database.psql(f"SET client_encoding = 'SQL_ASCII'; {create}")
        dump = make_project(database, settings={"BACKUP_COMPRESS": "gzip:1"}).back_up()
    finally:
        cluster.drop_database(name)
    result = rehearse(dump, place).succeeded()
    assert "✓ Restored and equal: 10 rows in 4 tables\n" in result.stdout


# -- not equal ------------------------------------------------------------------------------------


def test_rows_that_the_server_refuses(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    """Its backup is green: the function finds the table only where the search path leads to it."""
    database.psql(
        """CREATE TABLE lookup (v text); INSERT INTO lookup VALUES ('a');
        CREATE FUNCTION valid(text) RETURNS bool LANGUAGE sql
            AS 'SELECT EXISTS (SELECT FROM lookup WHERE v = $1)';
        CREATE TABLE orders (v text CHECK (valid(v))); INSERT INTO orders VALUES ('a')"""
    )
    result = rehearse(make_project(database).back_up(), place)
    assert result.returncode == 1, result
    assert last_line(result).startswith("✗ Not restored: "), result
    assert 'COPY failed for table "orders": ERROR:  relation "lookup" does' in last_line(result)


def test_rows_that_are_more_than_the_backup_has(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    """Its backup is green: what an index calls writes, into another table; ANALYZE calls it too."""
    database.psql(
        """CREATE TABLE "the log" (i int); CREATE TABLE noted (i int);
        CREATE FUNCTION write(int) RETURNS int LANGUAGE plpgsql
            AS $$ BEGIN INSERT INTO public."the log" VALUES ($1); RETURN 1; END $$;
        CREATE FUNCTION note(int) RETURNS int IMMUTABLE LANGUAGE plpgsql
            AS $$ BEGIN RETURN public.write($1); END $$;
        INSERT INTO noted VALUES (1), (2), (3); CREATE INDEX ON noted (note(i));
        TRUNCATE "the log" """
    )
    result = rehearse(make_project(database).back_up(), place)
    assert result.returncode == 1, result
    (restored,) = re.findall(r'^"the log" +(\d) +(\d)  ✗$', result.stdout, re.MULTILINE)
    assert last_line(result) == (
        f'✗ Restored, but not equal: "the log" has {restored[1]} in place of {restored[0]}'
    )


def change_metadata(dump: Path, directory: Path, **values: object) -> Path:
    """A copy of the backup in which somebody wrote other facts."""
    copy = Path(shutil.copy(dump, directory))
    metadata = {**read_metadata(dump), **values}
    metadata_path(copy).write_text(json.dumps(metadata), encoding="utf-8")
    return copy


def test_metadata_that_lies_about_a_row(sample_dump: Path, place: Path, tmp_path: Path) -> None:
    counts = {**read_metadata(sample_dump)["table_counts"], "messages": 3419}
    result = rehearse(change_metadata(sample_dump, tmp_path, table_counts=counts), place)
    assert result.returncode == 1, result
    assert "messages" in result.stderr
    assert last_line(result) == "✗ Not rehearsed: the backup did not pass its verification."


def test_commands_of_a_file_are_never_run(sample_dump: Path, place: Path, tmp_path: Path) -> None:
    dump = change_metadata(
        sample_dump,
        tmp_path,
        restore=["touch harm"],
        backup_file="x; touch harm",
        role_attributes={"chat": {"touch harm": True, "member_of": {"pg_x'; touch harm #": {}}}},
        postgresql_version="17; touch harm",
        extensions={"plpgsql": "1.0"},
    )
    result = rehearse(dump, place)
    assert result.returncode == 1
    assert 'role "pg_x\'; touch harm #" does not exist' in last_line(result)
    assert not list(tmp_path.rglob("harm"))


def test_extension_that_no_server_has(sample_dump: Path, place: Path, tmp_path: Path) -> None:
    dump = change_metadata(sample_dump, tmp_path, extensions={"nowhere": "1.0", "plpgsql": "1.0"})
    result = rehearse(dump, place)
    assert result.returncode == 1
    assert "No PostgreSQL 17 or newer here has nowhere: apt-get install postgresql-17-nowhere" in (
        last_line(result)
    )


def test_version_that_is_not_there(sample_dump: Path, place: Path, tmp_path: Path) -> None:
    result = rehearse(change_metadata(sample_dump, tmp_path, postgresql_version="99.1"), place)
    assert result.returncode == 1
    assert last_line(result) == "✗ It takes PostgreSQL 99 or newer: apt-get install postgresql-99"


# -- what it does to the machine ------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="the server of a user is run by that user")
def test_owner_who_would_read_what_root_reads(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    database.psql(
        """CREATE FUNCTION spy(int) RETURNS bool LANGUAGE sql AS 'SELECT true';
        CREATE TABLE t (i int CHECK (spy(i))); INSERT INTO t VALUES (1)"""
    )
    project = make_project(database)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        home = Path(name)
        home.chmod(0o755)
        secrets = home / ".env.local"
        secrets.touch(mode=0o600)
        secrets.write_text("DB_PASSWORD=stolen")
        command = f"id -un; cat {home}/*.dump {secrets} 2>&1; true"
        database.psql(
            f"""CREATE OR REPLACE FUNCTION spy(int) RETURNS bool LANGUAGE plpgsql AS $$
            DECLARE found text; BEGIN
                EXECUTE $_$CREATE TEMP TABLE said (line text)$_$;
                EXECUTE $_$COPY said FROM PROGRAM '{command}'$_$;
                EXECUTE 'SELECT string_agg(line, ''; '') FROM said' INTO found;
                RAISE EXCEPTION 'found %', found;
            END $$"""
        )
        project.run("--output-dir", home).succeeded()
        (dump,) = home.glob("*.dump")
        result = rehearse(dump, place)
    assert result.returncode == 1
    assert f"found nobody; cat: {dump}: Permission denied; cat: {secrets}: Permission denied" in (
        last_line(result)
    )
    assert "stolen" not in result.stdout + result.stderr


def servers_in(place: Path) -> list[Path]:
    return [path.parent.parent for path in place.glob("*/data/postmaster.pid")]


def processes_below(place: Path) -> list[str]:
    """The command lines of all that works below a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(place):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing_behind(
    number: signal.Signals, database: Database, make_project: MakeProject, place: Path
) -> None:
    database.psql(
        """CREATE FUNCTION slow(int) RETURNS bool LANGUAGE sql AS 'SELECT true';
        CREATE TABLE t (i int CHECK (slow(i))); INSERT INTO t VALUES (1);
        CREATE OR REPLACE FUNCTION slow(int) RETURNS bool LANGUAGE plpgsql
            AS 'BEGIN PERFORM pg_sleep(100); RETURN true; END'"""
    )
    process = start(make_project(database).back_up(), place)
    try:
        wait_until(
            lambda: any(
                line.startswith("postgres: ") and "COPY" in line for line in processes_below(place)
            )
        )
        (server,) = servers_in(place)
        assert stat.S_IMODE(server.stat().st_mode) == 0o700
        assert (server / "data" / "postmaster.pid").read_text().splitlines()[5] == ""  # its address
        process.send_signal(number)
    finally:
        result = finish(process, 30)
    assert result.returncode == 128 + number, result
    assert not list(place.iterdir())
    assert not processes_below(place)


def test_full_disk(database: Database, make_project: MakeProject, place: Path) -> None:
    database.psql("CREATE TABLE t AS SELECT i, i + 1 AS j FROM generate_series(1, 700000) AS i")
    dump = make_project(database).back_up()
    mounting = f'mount -t tmpfs -o size=70m,mode=1777 tmpfs {place} && exec "$@"'
    result = finish(start(dump, place, *MOUNTING, "sh", "-c", mounting, "sh"))
    assert result.returncode == 1, result
    assert "No space left on device" in last_line(result), result
    assert "TMPDIR" in last_line(result), result
    assert not list(place.iterdir())
