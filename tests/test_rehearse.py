"""tests/rehearse.py as a user types it: what comes back equal, what does not, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import random
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
from cluster import PLACE, USERS, Cluster
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
    program,
    read_metadata,
    readme_section,
    wait_until,
)
from test_earlier import EARLIER
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

# Values whose text depends on settings, and columns that a restore puts into another order: the
# child's own comes before the one that its parent got later.
SHAPED = """
ALTER DATABASE "{0}" SET timezone = 'Asia/Kathmandu';
ALTER DATABASE "{0}" SET bytea_output = 'escape';
CREATE TABLE shaped (a money, b money[], c float8, d float4[], e bytea, f timestamptz, g interval);
INSERT INTO shaped VALUES
    (-1234.56, ARRAY[0.01, NULL]::money[], 0.1 + 0.2, ARRAY['-0', 'NaN', 1e-45]::float4[],
     decode('00ff5c41', 'hex'), '2026-03-29 01:30+01', '1 mon -1 day 00:00:01'),
    (NULL, '{{}}', 'Infinity', NULL, '', '-infinity', NULL);
CREATE TABLE parent (a int);
CREATE TABLE child (own text) INHERITS (parent);
ALTER TABLE parent ADD b text;
INSERT INTO child VALUES (1, 'own', 'b'), (2, E'tab\t', NULL);
"""

# Names that only look the same where a carriage return counts as a newline.
CARRIAGE_RETURNS = r"""
CREATE TABLE U&"a\000D\000Ab" (U&"c\000Dd" serial, x text DEFAULT E'1\r2');
CREATE TABLE U&"a\000Ab" (LIKE U&"a\000D\000Ab");
CREATE TABLE U&"part\000Ded" (i int) PARTITION BY HASH (i);
CREATE TABLE U&"\000Dpart" PARTITION OF U&"part\000Ded" FOR VALUES WITH (MODULUS 1, REMAINDER 0);
INSERT INTO U&"a\000D\000Ab" DEFAULT VALUES; INSERT INTO U&"part\000Ded" VALUES (1);
"""

# What an owner wrote, which a restore calls: in the midst of the rows, or at the end of them.
WHILE_ROWS_COME = "CREATE TABLE checked (i int CHECK (called(i)));"
AFTER_THE_ROWS = "CREATE TABLE checked (i int); CREATE INDEX ON checked (called(i));"


@pytest.fixture
def place() -> Iterator[Path]:
    """A TMPDIR of its own that the server's user may enter; whatever is in it was left behind."""
    with tempfile.TemporaryDirectory(dir=os.environ.get(PLACE, "/tmp")) as name:
        Path(name).chmod(0o711)
        yield Path(name)


def called(database: Database, body: str, when: str = AFTER_THE_ROWS) -> None:
    """Have the restore of this database, and nothing before, call a function of that body."""
    database.psql(
        f"""CREATE FUNCTION called(int) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT true';
        {when} INSERT INTO checked VALUES (1);
        CREATE FUNCTION in_fact() RETURNS bool LANGUAGE plpgsql
            AS $$ BEGIN {body}; RETURN true; END $$;
        CREATE OR REPLACE FUNCTION called(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql
            AS 'BEGIN RETURN public.in_fact(); END'"""
    )


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


def rehearse(dump: Path, place: Path, env: Mapping[str, str] = NOTHING) -> Result:
    result = finish(start(dump, place, env=env))
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
    legacy = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = rehearse(sample_dump, place, legacy).succeeded()
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
    steps = "verified in .* s, server started in .* s, restored in .* s, compared in .* s"
    assert re.fullmatch(steps, lines[-2])
    assert lines[-1] == "✓ Restored and equal: 3727 rows in 4 tables, 3 sequences"
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
        database.psql(SHAPED.format(database.name) + CARRIAGE_RETURNS)
        database.psql(BENT.format(database.name))
        dump = make_project(database).back_up()
    result = rehearse(dump, place).succeeded()
    assert "✓ Restored and equal: " in result.stdout
    assert re.search(r"\npainted +4095 +4095\n", result.stdout), result
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


@pytest.fixture(scope="session")
def chilean_locale() -> Iterator[Mapping[str, str]]:
    """By LOCPATH a locale in which money has no decimals; the machine need not have it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as locales:
        os.chmod(locales, 0o755)  # the server is another user's
        command = [program("localedef", "locales"), "-i", "es_CL", "-f", "UTF-8"]
        subprocess.run([*command, f"{locales}/es_CL.UTF-8"], check=True)
        yield {"LOCPATH": locales}


def test_money_of_another_locale(
    cluster: Cluster, make_project: MakeProject, place: Path, chilean_locale: Mapping[str, str]
) -> None:
    """That of the server's configuration, which no dump brings; and what else is there alone."""
    settings = {"lc_monetary": "es_CL.UTF-8", "bytea_output": "escape"}
    with (
        Cluster(cluster.bin_dir, settings=settings, environ=chilean_locale) as own,
        new_database(own) as database,
    ):
        database.psql(
            "CREATE TABLE paid (m money, a money[], b bytea);"
            "INSERT INTO paid VALUES (99, '{7}', decode('00ff', 'hex'))"
        )
        dump = make_project(database).back_up()
    result = rehearse(dump, place, chilean_locale).succeeded()
    assert "✓ Restored and equal: 1 row in 1 table\n" in result.stdout
    result = rehearse(dump, place)
    assert result.returncode == 1, result
    assert last_line(result) == (
        "✗ This machine has no locale es_CL.UTF-8: apt-get install locales-all,"
        " or your system's package of it"
    )


def test_rows_that_came_to_another_partition(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    """One has its columns in another order, one a carriage return in its name."""
    database.psql(
        """CREATE TABLE range (i int, t text) PARTITION BY RANGE (i);
        CREATE TABLE first PARTITION OF range FOR VALUES FROM (0) TO (5);
        CREATE TABLE "sec\rond" PARTITION OF range FOR VALUES FROM (5) TO (10);
        INSERT INTO range SELECT i, i % 3 FROM generate_series(0, 9) AS i"""
    )
    called(
        database,
        """IF to_regclass('public.third') IS NULL THEN
            CREATE TABLE public.third (t text, i int);
            INSERT INTO public.third (i, t) SELECT i, t FROM public."sec\rond";
            DELETE FROM public."sec\rond";
            ALTER TABLE public.range DETACH PARTITION public."sec\rond";
            ALTER TABLE public.range ATTACH PARTITION public."sec\rond"
                FOR VALUES FROM (10) TO (15);
            ALTER TABLE public.range ATTACH PARTITION public.third FOR VALUES FROM (5) TO (10);
        END IF""",
    )
    result = rehearse(make_project(database).back_up(), place).succeeded()
    assert "✓ Restored and equal: 11 rows in 3 tables\n" in result.stdout
    assert re.search(r"\nrange, all partitions +10 +10\n", result.stdout), result


def test_login_trigger_that_writes(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    """Of the rehearsal's own sessions it hears nothing."""
    database.psql(
        """CREATE TABLE logins (at timestamptz);
        CREATE FUNCTION log_in() RETURNS event_trigger LANGUAGE plpgsql
            AS 'BEGIN INSERT INTO public.logins VALUES (now()); END';
        CREATE EVENT TRIGGER log_in ON login EXECUTE FUNCTION log_in();
        ALTER EVENT TRIGGER log_in ENABLE ALWAYS"""
    )
    result = rehearse(make_project(database).back_up(), place).succeeded()
    assert "✓ Restored and equal: " in result.stdout


# -- not equal ------------------------------------------------------------------------------------


def assert_not_equal(result: Result, difference: str) -> None:
    assert result.returncode == 1, result
    assert last_line(result) == f"✗ Restored, but not equal: {difference}", result


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
    assert last_line(result).startswith("✗ Not all restored: "), result
    assert 'COPY failed for table "orders": ERROR:  relation "lookup" does' in last_line(result)
    assert "; not equal: orders (0 in place of 1). " in last_line(result)
    assert last_line(result).endswith('README.md says under "Restore" what to do then')
    assert readme_section("Restore")


def test_check_that_changes_another_table(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    """Each table has as many rows as before. An earlier release could not tell."""
    database.psql("CREATE TABLE account (balance int); INSERT INTO account VALUES (100)")
    until_they_are_there = (
        "WHILE NOT EXISTS (SELECT FROM public.account) LOOP PERFORM pg_sleep(0.05); END LOOP;"
    )
    deposit = "UPDATE public.account SET balance = 101"
    called(database, f"{until_they_are_there} {deposit}", WHILE_ROWS_COME)
    dump = make_project(database).back_up()
    result = rehearse(dump, place)
    assert_not_equal(result, "account (other values)")
    assert re.search(r"^account +1 +1  ✗ other values$", result.stdout, re.MULTILINE), result

    values = read_metadata(dump)
    del values["settings"]
    metadata_path(dump).write_text(json.dumps(values), encoding="utf-8")
    result = rehearse(dump, place).succeeded()
    assert result.stdout.splitlines()[-1] == (
        "✓ Restored, the rows counted, not compared (an earlier release made it):"
        " 2 rows in 2 tables"
    )


# What a function of the owner's does once the rows are there, and what is told of it.
DONE_AFTER_THE_ROWS = {
    "PERFORM lo_create(4711) WHERE NOT EXISTS (SELECT FROM pg_largeobject_metadata)": (
        "large objects (1 in place of 0)"
    ),
    "DELETE FROM public.painted WHERE i = 1999": "painted_0 (1999 in place of 2000)",
    "DELETE FROM public.less WHERE i = 2": "less (1 in place of 2)",
    "UPDATE public.other SET i = 3 WHERE i = 2": "other (other values)",
    "DROP TABLE IF EXISTS public.empty": "empty (none in place of 0)",
    "CREATE TABLE IF NOT EXISTS public.made AS SELECT 1": "made (1 in place of none)",
    r"""PERFORM setval('public."it''s ""so"" "', 7)""": (
        r"""sequence "it's ""so"" " (7, true in place of 1, false)"""
    ),
}


def test_what_a_restore_calls_makes_a_difference(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    """More than once: whoever analyzes the copy calls it too. Each difference is told."""
    for table in ("less", "other", "equal"):
        database.psql(f"CREATE TABLE {table} (i int); INSERT INTO {table} VALUES (1), (2)")
    database.psql("CREATE TABLE empty (); CREATE TABLE painted (i int) PARTITION BY RANGE (i)")
    for number in range(2):
        bounds = f"FROM ({number * 2000}) TO ({(number + 1) * 2000})"
        database.psql(f"CREATE TABLE painted_{number} PARTITION OF painted FOR VALUES {bounds}")
    database.psql("INSERT INTO painted SELECT generate_series(0, 3999)")
    database.psql("""CREATE SEQUENCE "it's ""so"" "; CREATE SEQUENCE equal_too""")
    called(database, "; ".join(DONE_AFTER_THE_ROWS))
    result = rehearse(make_project(database).back_up(), place)
    assert_not_equal(result, ", ".join(DONE_AFTER_THE_ROWS.values()))


def test_large_object_with_another_content(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    """Of the same length, and longer than a piece in which it is written."""
    database.psql("SELECT lo_from_bytea(4711, repeat('x', 40000)::bytea), lo_create(12)")
    called(database, "PERFORM lo_put(4711, 39999, 'y')")
    result = rehearse(make_project(database).back_up(), place)
    assert_not_equal(result, "large objects (other values)")


def test_copy_that_cannot_be_read(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    database.psql("CREATE TABLE t (i int); INSERT INTO t VALUES (1)")
    remove = "EXECUTE format('COPY (SELECT) TO PROGRAM %L', 'cat >/dev/null; rm -f ' || {file})"
    called(database, remove.format(file="pg_relation_filepath('public.t')"))
    result = rehearse(make_project(database).back_up(), place)
    assert result.returncode == 1
    assert last_line(result).startswith("✗ Not compared: "), result
    assert 'Dumping the contents of table "t" failed' in last_line(result), result
    assert "pg_dump: detail: " in result.stdout, result


def test_earlier_backup(place: Path) -> None:
    result = rehearse(EARLIER / "mixed_15_dev_2026-11-25T11-28-52Z.dump", place).succeeded()
    assert result.stdout.splitlines()[-1].startswith("✓ Restored, the rows counted, not compared")


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
    assert "; all values are equal. " in last_line(result)
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


def test_file_that_is_not_there(place: Path, tmp_path: Path) -> None:
    result = rehearse(tmp_path / "x.dump", place)
    assert result.returncode == 1
    assert last_line(result) == f"✗ Not rehearsed: there is no file {tmp_path}/x.dump"
    assert f"backup_db.py --list --output-dir {tmp_path}\n" in result.stderr


def test_secrets_in_the_settings_of_roles(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    role = f"role_{random.randrange(10**9)}"
    database.psql(
        f"""CREATE ROLE {role}; ALTER ROLE {role} SET "pgrst.jwt_secret" = 'it''s secret';
        CREATE TABLE t (); ALTER TABLE t OWNER TO {role}"""
    )
    try:
        dump = make_project(database).back_up()
    finally:
        database.psql(f"DROP OWNED BY {role}; DROP ROLE {role}")
    result = rehearse(dump, place).succeeded()
    assert f"""ALTER ROLE "{role}" SET "pgrst.jwt_secret" TO '\"'\"'…'\"'\"'""" in result.stdout
    assert "s secret" not in result.stdout + result.stderr


# -- what it does to the machine ------------------------------------------------------------------


# The server of a user is run by that user.
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


@as_root
def test_owner_who_would_read_what_root_reads(
    database: Database, make_project: MakeProject, place: Path
) -> None:
    project = make_project(database)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        home = Path(name)
        home.chmod(0o755)
        secrets = home / ".env.local"
        secrets.touch(mode=0o600)
        secrets.write_text("DB_PASSWORD=stolen")
        command = f"id --user --name; id --groups; cat {home}/*.dump {secrets} 2>&1; true"
        read = f"""CREATE TEMP TABLE said (line text); COPY said FROM PROGRAM '{command}';
            RAISE EXCEPTION 'found %', (SELECT string_agg(line, '; ') FROM said)"""
        called(database, read, WHILE_ROWS_COME)
        project.run("--output-dir", home).succeeded()
        (dump,) = home.glob("*.dump")
        result = rehearse(dump, place)
    assert result.returncode == 1
    # A user without an account, and no group but one like it.
    assert (found := re.search(r"ERROR:  found (\d+); (\d+); (.*?\.env\.local)", last_line(result)))
    assert int(found[1]) == int(found[2]) in USERS
    assert f"cat: {dump}: Permission denied; cat: {secrets}" in found[3]
    assert "stolen" not in result.stdout + result.stderr


# What an owner may do to the server that root ends, typed in its directory: to its process id and
# its log, and a process of his own, which ends at the first signal or at one alone.
TRAPS = {
    "a process id that is not the server's": (
        "echo {foreign} >postmaster.pid; rm ../log && mkfifo ../log;"
        " setsid sleep {mark} >/dev/null 2>&1 &"
    ),
    "a pipe where its process id was": (
        "rm postmaster.pid && mkfifo postmaster.pid;"
        " trap '''' 1 2 3 15; setsid sleep {mark} >/dev/null 2>&1 &"
    ),
}


@as_root
@pytest.mark.parametrize("trap", TRAPS)
def test_owner_who_would_have_root_end_what_he_chooses(
    trap: str, database: Database, make_project: MakeProject, place: Path
) -> None:
    mark = f"1000.{random.randrange(10**9)}"
    with subprocess.Popen(["sleep", "1000"]) as foreign:
        try:
            command = TRAPS[trap].format(foreign=foreign.pid, mark=mark)
            # It reads what it is given, or the server may not be able to write it.
            typed = f"{command}\ncat >/dev/null"
            then = f"COPY (SELECT) TO PROGRAM '{typed}'; RAISE EXCEPTION 'done'"
            called(database, then, WHILE_ROWS_COME)
            result = rehearse(make_project(database).back_up(), place)
            assert result.returncode == 1
            assert last_line(result).startswith("✗ Not all restored: "), result
            assert "ERROR:  done" in last_line(result), result
            assert foreign.poll() is None, "it has ended what is not its own"
            assert not processes_below(place)
            assert not [line for line in command_lines() if mark in line]
        finally:
            foreign.kill()


def command_lines() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return found


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
    called(database, "PERFORM pg_sleep(100)", WHILE_ROWS_COME)
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
    # Who is not root is root only to mount, and then himself again.
    himself = "" if os.geteuid() == 0 else f"unshare --user --map-user={os.geteuid()}"
    mounting = f'mount -t tmpfs -o size=70m,mode=1777 tmpfs {place} && exec {himself} "$@"'
    result = finish(start(dump, place, *MOUNTING, "sh", "-c", mounting, "sh"))
    assert result.returncode == 1, result
    assert "No space left on device" in last_line(result), result
    assert "TMPDIR" in last_line(result), result
    assert not list(place.iterdir())
