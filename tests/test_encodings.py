"""Names, data and messages in any encoding, and settings of roles and databases in any shape."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import psycopg2
import pytest
from cluster import Cluster, installation
from conftest import MakeProject
from faults import transaction, wait_for_refusals
from support import (
    Database,
    assert_restores,
    finish,
    new_database,
    program,
    read_metadata,
)

# -- databases that are not UTF-8 -----------------------------------------------------------------

# Encoding of the database; a table and a row's text, as bytes in that encoding. (psql passes on
# what surrogates stand for.) The second byte of 0x8fa2 of EUC_JP's kind may not be cut anywhere.
ENCODED = {
    "LATIN1": "Größe".encode("latin-1") + b"\x85\xa0\xff",
    "EUC_JP": "日本語の表".encode("euc_jp") + b"\x8f\xb0\xa1\x8e\xb1",
    "SQL_ASCII": b"caf\xe9 \xff\xfe\x80",
    "WIN1252": "€uro“".encode("cp1252"),
    "KOI8R": "таблица".encode("koi8_r"),
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_database_of_another_encoding(
    encoding: str, cluster: Cluster, make_project: MakeProject
) -> None:
    word = os.fsdecode(ENCODED[encoding])
    options = ("--template=template0", f"--encoding={encoding}")
    with new_database(cluster, *options) as database:
        database.psql(
            f"""SET client_encoding = '{encoding}';
            CREATE SCHEMA "{word}";
            CREATE TABLE "{word}"."t {word}" ("c {word}" text);
            INSERT INTO "{word}"."t {word}" SELECT '{word}' || i FROM generate_series(1, 9) AS i;
            COMMENT ON TABLE "{word}"."t {word}" IS 'comment {word}';
            CREATE TABLE plain AS SELECT '{word}' AS x"""
        )
        project = make_project(database)
        dump = project.back_up()
        assert "✓ Match (10 rows in 2 tables)" in project.run("--verify", dump).succeeded().stdout
        metadata = read_metadata(dump)
        assert metadata["encoding"] == encoding
        assert sorted(metadata["table_counts"].values()) == [1, 9]
        assert_restores(dump, database)


def test_names_are_text_in_the_metadata(cluster: Cluster, make_project: MakeProject) -> None:
    with new_database(cluster, "--template=template0", "--encoding=EUC_JP") as database:
        database.psql('CREATE TABLE "日本語" (x int)')
        dump = make_project(database).back_up()
        metadata = read_metadata(dump)
        assert metadata["table_counts"] == {'"日本語"': 0}


# -- names in an encoding that is not the database's ----------------------------------------------

# As the operating system passes the bytes of Latin-1. Roles and databases are shared by all
# databases of a server, whatever encoding these have.
MUELLER, BAER = (os.fsdecode(name.encode("latin-1")) for name in ("müller", "bär"))
IN_LATIN = ("--template=template0", "--encoding=LATIN1")


@pytest.fixture
def latin(cluster: Cluster) -> Iterator[Database]:
    """A database of Latin-1, and a superuser who was named there."""
    with new_database(cluster, *IN_LATIN) as database:
        database.psql(f'SET client_encoding = LATIN1; CREATE ROLE "{MUELLER}" LOGIN SUPERUSER')
        yield database
        database.psql(f'SET client_encoding = LATIN1; DROP ROLE "{MUELLER}"')


@pytest.mark.usefixtures("latin")
def test_role_whose_name_is_no_utf_8(cluster: Cluster, make_project: MakeProject) -> None:
    """It owns a table; and it is named where a session of it is in the way."""
    with new_database(cluster) as database:
        database.psql("CREATE TABLE own AS SELECT 1 AS x", user=MUELLER)
        project = make_project(database, constants={"STALL_SECONDS": 1, "LOCK_RETRY_SECONDS": 0.1})
        dump = project.back_up()
        roles = read_metadata(dump)["roles"]
        assert any(re.fullmatch(r"m.{1,6}ller", role) for role in roles), roles
        assert "✓ Match (1 row in 1 table)" in project.run("--verify", dump).succeeded().stdout
        with transaction(database, "LOCK TABLE own", user=MUELLER):
            result = project.run().failed_with(7, "Backup creation error")
        assert re.search(r"session \d+ \(m.{1,6}ller, migration", result.stderr), result


def test_extension_whose_name_is_no_utf_8(
    latin: Database, cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(cluster) as database:
        # No CREATE EXTENSION gives it one; a pg_upgrade or a dump restored by bytes can.
        database.psql(
            """SET allow_system_table_mods = on;
            UPDATE pg_extension SET extname = r.rolname FROM pg_roles AS r
             WHERE extname = 'plpgsql' AND r.rolname::text LIKE 'm%ller'"""
        )
        project = make_project(database)
        extensions = read_metadata(project.back_up())["extensions"]
        assert any(re.fullmatch(r"m.{1,6}ller", name) for name in extensions), extensions
    assert latin.psql("SELECT 1") == "1"


def test_database_whose_name_is_no_utf_8(
    latin: Database, cluster: Cluster, make_project: MakeProject
) -> None:
    options = "ENCODING 'UTF8' TEMPLATE template0"
    latin.psql(f'SET client_encoding = LATIN1; CREATE DATABASE "{BAER}" {options}')
    try:
        database = Database(cluster, BAER)
        database.psql("CREATE TABLE t AS SELECT 1 AS x")
        project = make_project(settings={**database.settings(), "DEV_DB_NAME": "ours"})
        result = project.run(env={"DEV_DB_NAME": BAER}).succeeded()
        assert re.search(r"^Database:    b.{1,6}r$", result.stdout, re.MULTILINE), result
        (dump,) = project.dumps()
        assert re.fullmatch(r"b.{1,6}r", read_metadata(dump)["database_name"])
        assert read_metadata(dump)["table_counts"] == {"t": 1}
        assert "✓ Verified" in project.run("--list").succeeded().stdout
        project.run(env={"DEV_DB_NAME": BAER, "BACKUP_KEEP": "1"}).succeeded()
        assert len(project.dumps()) == 1
        assert not dump.exists()
    finally:
        latin.psql(f'SET client_encoding = LATIN1; DROP DATABASE "{BAER}"')


def test_names_of_sql_ascii_are_read_as_utf_8_where_they_are(
    cluster: Cluster, make_project: MakeProject
) -> None:
    """The server knows of no encoding there, but nearly every application has UTF-8."""
    options = ("--template=template0", "--encoding=SQL_ASCII")
    with new_database(cluster, *options) as database:
        database.psql(
            f"""SET client_encoding = SQL_ASCII; CREATE SCHEMA "größe";
            CREATE TABLE "größe"."dépôt" AS SELECT 1 AS x;
            CREATE TABLE "会話" (x int); CREATE TABLE "{BAER}" (x int)"""
        )
        project = make_project(database)
        result = project.run().succeeded()
        (dump,) = project.dumps()
        counts = read_metadata(dump)["table_counts"]
        assert list(counts)[:2] == ['"größe"."dépôt"', '"会話"']
        assert re.fullmatch(r'"b.{1,6}r"', list(counts)[2]), counts
        assert '1 "größe"."dépôt", 0 "会話"' in result.stdout, result
        assert_restores(dump, database)


# -- names that no file may have ------------------------------------------------------------------


def test_database_whose_name_a_windows_born_mount_refuses(
    cluster: Cluster, make_project: MakeProject
) -> None:
    """CIFS, NTFS and exFAT take none of these characters, or others in their place."""
    name = r'a"b*c:d<e>f?g\h|i'
    cluster.create_database(name)
    try:
        project = make_project(Database(cluster, name))
        dump = project.back_up()
        files = [path.name for path in project.backups.iterdir()]
        assert not [file for file in files if set(file) & set('"*:<>?\\|')], files
        assert re.fullmatch(r"a%22b%2Ac%3Ad%3Ce%3Ef%3Fg%5Ch%7Ci_dev_.*Z\.dump", dump.name)
        assert read_metadata(dump)["database_name"] == name
        assert f"  {name}  " in project.run("--list").succeeded().stdout
        project.run("--verify", dump).succeeded()
        project.run(env={"BACKUP_KEEP": "1"}).succeeded()
        assert len(project.dumps()) == 1
    finally:
        cluster.drop_database(name)


# -- settings of the role or the database that would break or bend a dump ------------------------

# Shorter than the pauses below, or than those between two looks at pg_dump.
TIMEOUTS = {
    "statement_timeout": "300ms",
    "lock_timeout": "50ms",
    "idle_in_transaction_session_timeout": "50ms",
    "transaction_timeout": "300ms",  # 17 and newer
}
BENT = {
    "client_encoding": "SJIS",
    "search_path": "elsewhere, pg_catalog",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "quote_all_identifiers": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "row_security": "off",
    "enable_seqscan": "off",
    "array_nulls": "off",
    "client_min_messages": "error",
    "role": "reading",
}
FILL = """
CREATE TABLE plain (id serial, at timestamptz, span interval, raw bytea, number float8, note text);
INSERT INTO plain (at, span, raw, number, note)
    SELECT '2024-02-29 12:00+00', '1 year -2 days', '\\x00ff27', 1 / 3.0, '日本''\\'
      FROM generate_series(1, 50);
CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.plain (x text); CREATE TABLE "Quoted" ();
GRANT pg_read_all_data TO chatty;
GRANT SELECT ON ALL TABLES IN SCHEMA public, elsewhere TO reading;
GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO reading;
GRANT USAGE ON SCHEMA elsewhere TO reading
"""


@pytest.fixture
def filled_database(each_cluster: Cluster) -> Iterator[Database]:
    """A small database, and `chatty`, who may read it all by itself and as `reading`."""
    with new_database(each_cluster) as database:
        database.psql("CREATE ROLE reading; CREATE ROLE chatty LOGIN PASSWORD 'x' IN ROLE reading")
        database.psql(FILL)
        yield database
        each_cluster.psql(f'ALTER DATABASE "{database.name}" RESET ALL')
        database.psql("DROP OWNED BY reading, chatty; DROP ROLE reading, chatty")


def change(alter: str, database: Database, settings: dict[str, str]) -> None:
    known = database.psql("SELECT lower(name) FROM pg_settings UNION SELECT 'role'").splitlines()
    for name, value in settings.items():
        if name.lower() in known:
            quoted = value if name == "search_path" else f"'{value}'"
            database.cluster.psql(f"{alter} SET {name} = {quoted}")


def test_settings_do_not_bend_a_backup(
    filled_database: Database, make_project: MakeProject
) -> None:
    change(f'ALTER DATABASE "{filled_database.name}"', filled_database, BENT)
    project = make_project(filled_database, settings=filled_database.settings("chatty", "x"))
    dump = project.back_up()
    filled_database.cluster.psql(f'ALTER DATABASE "{filled_database.name}" RESET ALL')  # for psql
    counts = read_metadata(dump)["table_counts"]
    assert counts == {"plain": 50, "elsewhere.plain": 0, '"Quoted"': 0}
    assert_restores(dump, filled_database)


def test_timeouts_do_not_end_a_backup(filled_database: Database, make_project: MakeProject) -> None:
    change("ALTER ROLE chatty", filled_database, TIMEOUTS)
    project = make_project(filled_database, settings=filled_database.settings("chatty", "x"))
    # Our session is idle in its transaction while pg_dump has not yet come.
    project.fake("pg_dump", 'case "$*" in *--snapshot*) sleep 0.6 ;; esac; exec "$real" "$@"')
    # And it waits until another session lets go of a table.
    cluster = filled_database.cluster
    with contextlib.closing(
        psycopg2.connect(
            host=str(cluster.directory),
            port=cluster.port,
            dbname=filled_database.name,
            user="postgres",
        )
    ) as holder:
        holder.cursor().execute("LOCK plain")
        since = cluster.log.stat().st_size
        run = project.start()
        wait_for_refusals(filled_database, since)
        time.sleep(0.4)  # past each of the timeouts
    finish(run).succeeded()
    assert_restores(project.dumps()[0], filled_database)


# -- a server that speaks German, in Latin-1 ------------------------------------------------------

GERMAN = "de_DE.ISO-8859-1"

# Whose database, as whom, and what comes of it: exit code, category, words of the server's, a step.
GERMAN_FAILURES = {
    "wrong password": (
        {"DEV_DB_PASSWORD": "y"},
        (3, "Database connection error"),
        "Passwort-Authentifizierung für Benutzer »mueller« fehlgeschlagen",
        "and the password in .env.local: DEV_DB_PASSWORD",
    ),
    "name that is not Latin-1": (
        {"DEV_DB_USER": "müller 日本"},
        (3, "Database connection error"),
        "Passwort-Authentifizierung für Benutzer »müller 日本« fehlgeschlagen",
        "-U 'müller 日本'",
    ),
    "no such database": (
        {"DEV_DB_NAME": "nirgends"},
        (3, "Database connection error"),
        "Datenbank »nirgends« existiert nicht",
        "createdb nirgends",
    ),
    "no connections": (
        {"DEV_DB_NAME": "closed"},
        (4, "Permission error"),
        "keine Berechtigung für Datenbank »closed«",
        'GRANT CONNECT ON DATABASE "closed" TO "mueller"',
    ),
    "unreadable table": (
        {"DEV_DB_NAME": "postgres"},
        (4, "Permission error"),
        'table: public."öl"',
        'GRANT SELECT ON TABLE public."öl" TO mueller;',
    ),
}


@pytest.fixture(scope="session")
def german_cluster() -> Iterator[Cluster]:
    """Debian's 15 is the one with translations; the locale is made here, for it alone."""
    with tempfile.TemporaryDirectory() as locales:
        os.chmod(locales, 0o755)  # the server is another user's
        command = [program("localedef", "locales"), "-i", "de_DE", "-f", "ISO-8859-1"]
        subprocess.run([*command, f"{locales}/{GERMAN}"], check=True)
        with Cluster(
            installation(15),
            initdb_options=("--encoding=LATIN1", f"--locale={GERMAN}"),
            environ={"LOCPATH": locales, "LC_ALL": GERMAN},
        ) as cluster:
            assert "startet" in cluster.log.read_text("latin-1"), "it does not speak German"
            cluster.psql(
                "CREATE ROLE mueller LOGIN PASSWORD 'x'; CREATE TABLE öl (x int);"
                "CREATE DATABASE closed; REVOKE CONNECT ON DATABASE closed FROM PUBLIC"
            )
            yield cluster


@pytest.mark.servers(15)
@pytest.mark.parametrize("case", GERMAN_FAILURES)
def test_german_server_is_understood(
    case: str, german_cluster: Cluster, make_project: MakeProject
) -> None:
    settings, (code, category), words, step = GERMAN_FAILURES[case]
    database = Database(german_cluster, "postgres")
    way = {**database.settings("mueller", "x"), **settings}
    result = make_project(database, settings=way).run().failed_with(code, category)
    pattern = re.escape(words)
    if sys.version_info < (3, 12):  # 3.10, and 3.11.2, lose the text of a connection's error
        pattern += "|psql shows them"
    assert re.search(pattern, result.stderr)
    assert step in result.stderr


@pytest.mark.servers(15)
def test_german_database_is_restored_equal(
    german_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(german_cluster) as database:
        database.psql("CREATE TABLE größe (maß text); INSERT INTO größe VALUES ('Übermaß')")
        project = make_project(database)
        assert_restores(project.back_up(), database)
