"""Names bind late: a schema is renamed under all locks, and what goes by its name goes elsewhere.

Whatever becomes of names while a backup is made, it shows those of one moment, each with the rows
that it had then.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import DUMP, WIDE, fake_call, let_go, paused, sessions_on, transaction
from support import (
    Database,
    Project,
    Terminal,
    assert_restores,
    finish,
    new_database,
    restored,
    wait_until,
)

# Two schemas, equal but for their rows. `mark` is written with each change of names.
SCHEMAS = """
CREATE TABLE mark (changed bool);
CREATE SCHEMA live;
CREATE SCHEMA next;
CREATE TABLE live.messages AS SELECT 'blue' AS colour FROM generate_series(1, 100);
CREATE TABLE next.messages AS SELECT 'green' AS colour FROM generate_series(1, 100);
"""

# A table that nobody reads without its TOAST. pg_dump, which goes by names, comes to it first; our
# count goes by age.
FIRST = f"CREATE SCHEMA first; SET search_path = first; {WIDE}; RESET search_path;"

SWAP = """
ALTER SCHEMA live RENAME TO old;
ALTER SCHEMA next RENAME TO live;
ALTER SCHEMA old RENAME TO next;
"""
CHANGES = {
    "swapped": SWAP,
    # Its new name is in no list of ours: whoever goes by names finds its rows nowhere.
    "replaced": "ALTER SCHEMA live RENAME TO old; ALTER SCHEMA next RENAME TO live;",
    "renamed": "ALTER SCHEMA live RENAME TO old;",
}


def change_names(change: str) -> str:
    return f"BEGIN; {change} INSERT INTO public.mark VALUES (true); COMMIT;"


@pytest.fixture
def blue_green(each_cluster: Cluster) -> Iterator[Database]:
    with new_database(each_cluster) as database:
        database.psql(SCHEMAS)
        yield database


def assert_one_moment(project: Project, database: Database, before: list[str]) -> None:
    """The backup has the names and rows from before the change, or those from after it."""
    (dump,) = project.dumps()
    with restored(dump, database.cluster) as copy:
        is_after = copy.psql("SELECT count(*) FROM mark") == "1"
        assert copy.contents() == (database.contents() if is_after else before)


def call_psql(project: Project, sql: str) -> str:
    """What a stub runs to have the server that it is led to do something."""
    return f"PGAPPNAME=deployment '{project.bin_dir / 'psql'}' --no-psqlrc --command='{sql}'"


@pytest.mark.parametrize("change", CHANGES)
def test_names_that_change_before_pg_dump_looks(
    change: str, blue_green: Database, make_project: MakeProject
) -> None:
    """Its snapshot has the old names, its locks and ours are by the new ones."""
    before = blue_green.contents()
    project = make_project(blue_green, constants={"LOCK_RETRY_SECONDS": 0.1})
    once = f'if mkdir "$HOME/changed"; then {call_psql(project, change_names(CHANGES[change]))}; fi'
    fake_call(project, *DUMP, f'({once}) >"$HOME/log" 2>&1; exec "$real" "$@"')
    project.run().succeeded()
    assert blue_green.psql("SELECT changed FROM mark") == "t"
    assert_one_moment(project, blue_green, before)


@pytest.mark.parametrize("schemas", [SCHEMAS + FIRST, FIRST + SCHEMAS], ids=["after", "before"])
@pytest.mark.parametrize("change", CHANGES)
def test_names_that_change_while_pg_dump_copies(
    change: str, schemas: str, each_cluster: Cluster, make_project: MakeProject
) -> None:
    """It has not come to those tables yet; it is after our count of them, or before."""
    with new_database(each_cluster) as database:
        database.psql(schemas)
        before = database.contents()
        project = make_project(database, constants={"LOCK_RETRY_SECONDS": 0.1})
        with transaction(database, "REINDEX TABLE first.wide"):
            run = project.start()
            is_pg_dump = "application_name LIKE 'backup\\_db %' AND wait_event_type = 'Lock'"
            wait_until(lambda: sessions_on(database, is_pg_dump))
            database.psql(change_names(CHANGES[change]))
        finish(run).succeeded()
        assert_one_moment(project, database, before)


def test_names_that_never_stay_end_the_run_with_what_happened_to_them(
    blue_green: Database, make_project: MakeProject
) -> None:
    project = make_project(blue_green, constants={"LOCK_RETRY_SECONDS": 0.1})
    swap = call_psql(project, change_names(SWAP))
    fake_call(project, *DUMP, f'{swap} >>"$HOME/log" 2>&1; exec "$real" "$@"')
    result = project.run().failed_with(7, "Backup creation error")
    assert re.search(r"schema\b.*\b(live|next)\b", result.stderr), result
    assert "renamed" in result.stderr, result
    assert blue_green.psql("SELECT count(*) FROM mark") == "3"  # times that pg_dump was started
    assert not project.dumps()


def test_server_that_lets_nobody_in_again_has_lost_us(
    blue_green: Database, make_project: MakeProject
) -> None:
    project = make_project(blue_green, constants={"LOCK_RETRY_SECONDS": 0.1})
    swap = call_psql(project, change_names(SWAP))
    closed = f'ALTER DATABASE "{blue_green.name}" ALLOW_CONNECTIONS false'
    close = f"PGDATABASE=postgres {call_psql(project, closed)}"
    fake_call(project, *DUMP, f'"$real" "$@" && ({swap} && {close}) >>"$HOME/log" 2>&1')
    result = project.run().failed_with(7, "Backup creation error")
    assert "lost" in result.stderr, result
    assert "not currently accepting connections" in result.stderr, result


@pytest.mark.parametrize(
    "change",
    [
        "GRANT USAGE ON SCHEMA live TO PUBLIC",
        "COMMENT ON SCHEMA live IS $$blue, today$$",
        "ALTER SCHEMA live OWNER TO pg_database_owner",
        "CREATE TEMPORARY TABLE pairs (id int)",  # with a schema for it, if it is the first
        "CREATE SCHEMA review",
    ],
)
def test_what_changes_no_name_of_the_backup_is_no_reason_to_begin_again(
    change: str, blue_green: Database, make_project: MakeProject
) -> None:
    project = make_project(blue_green)
    begin = f'echo begun >>"$HOME/begun"; {call_psql(project, change)} >"$HOME/log" 2>&1'
    fake_call(project, *DUMP, f'{begin} || exit 1; exec "$real" "$@"')
    dump = project.back_up()
    assert (project.directory / "home" / "begun").read_text() == "begun\n"
    with restored(dump, blue_green.cluster) as copy:
        assert copy.contents() == blue_green.contents()


# -- the names of everything else that has one ----------------------------------------------------

# What is used by name, and by whom. `{role}` stands for one that no other test has.
NAMED = """
CREATE SCHEMA other;
CREATE TYPE color AS ENUM ('red', 'green');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE grows AS (a int);
CREATE TABLE painted AS SELECT 'red'::color AS c, (1, 'x')::pair AS p, ROW(1)::grows AS g;
CREATE INDEX plain ON painted (c);
COMMENT ON INDEX plain IS 'of colours';
CREATE TYPE mood AS ENUM ('calm');
CREATE VIEW base AS SELECT 'calm'::mood AS mood, 1 AS n;
CREATE FUNCTION doubled(int) RETURNS int LANGUAGE sql AS 'SELECT $1 * 2';
CREATE VIEW upon AS SELECT mood, doubled(n) FROM base;
CREATE MATERIALIZED VIEW stored AS SELECT 1 AS n;
CREATE VIEW upon_stored AS SELECT * FROM stored;
CREATE FOREIGN DATA WRAPPER nothing;
CREATE SERVER nowhere FOREIGN DATA WRAPPER nothing;
CREATE FOREIGN TABLE abroad (n int) SERVER nowhere;
CREATE VIEW upon_abroad AS SELECT * FROM abroad;
CREATE TABLE parted (id int) PARTITION BY RANGE (id);
CREATE INDEX by_id ON parted (id);
CREATE TABLE part PARTITION OF parted DEFAULT;
CREATE SEQUENCE ones;
CREATE SEQUENCE hundreds START 100;
CREATE ROLE {role};
ALTER FUNCTION doubled OWNER TO {role};
"""

# Each with a pattern of the words for it.
RENAMES = {
    "ALTER TYPE color RENAME VALUE 'red' TO 'crimson'": 'label "red" was renamed to "crimson"',
    "ALTER TYPE pair DROP ATTRIBUTE b": 'attribute "b" was dropped',
    "ALTER TYPE grows ADD ATTRIBUTE b int": 'attribute "b" was added to a type',
    "ALTER TYPE grows RENAME ATTRIBUTE a TO z": 'attribute "a" was renamed to "z"',
    "ALTER FUNCTION doubled RENAME TO twice": 'function "doubled" was renamed to "twice"',
    "ALTER FUNCTION twice SET SCHEMA other": 'function "twice" was moved to another schema',
    "ALTER TYPE mood RENAME TO humour": 'type "mood" was renamed to "humour"',
    "ALTER TYPE humour SET SCHEMA other": 'type "humour" was moved to another schema',
    "ALTER TYPE pair RENAME TO couple": 'type "pair" was renamed to "couple"',
    "ALTER VIEW base RENAME TO ground": 'view "base" was renamed to "ground"',
    "ALTER VIEW ground SET SCHEMA other": 'view "ground" was moved to another schema',
    "ALTER MATERIALIZED VIEW stored RENAME TO kept": (
        'materialized view "stored" was renamed to "kept"'
    ),
    "ALTER FOREIGN TABLE abroad RENAME TO away": 'foreign table "abroad" was renamed to "away"',
    "ALTER INDEX plain RENAME TO plainer": 'index "plain" was renamed to "plainer"',
    "ALTER INDEX by_id RENAME TO by_number": 'index "by_id" was renamed to "by_number"',
    "ALTER SEQUENCE ones RENAME TO x; ALTER SEQUENCE hundreds RENAME TO ones;"
    " ALTER SEQUENCE x RENAME TO hundreds": (
        'sequence "(ones|hundreds)" was renamed to "(ones|hundreds)"'
    ),
    "ALTER SEQUENCE ones SET SCHEMA other": 'sequence "ones" was moved to another schema',
    "ALTER ROLE {role} RENAME TO {role}x": 'role "{role}" was renamed to "{role}x"',
}


@pytest.fixture
def named(each_cluster: Cluster) -> Iterator[tuple[Database, str]]:
    """A database with a name of every kind, and the role that is among them."""
    role = f"role_{uuid.uuid4().hex[:12]}"
    with contextlib.ExitStack() as stack:
        stack.callback(each_cluster.psql, f"DROP ROLE IF EXISTS {role}, {role}x")
        database = stack.enter_context(new_database(each_cluster))
        database.psql(NAMED.format(role=role))
        yield database, role


def change_before_each_dump(project: Project, changes: list[str]) -> None:
    """Have the n-th pg_dump come after the n-th change: its snapshot is from before that."""
    for number, change in enumerate(changes, 1):
        (project.directory / "home" / f"change-{number}").write_text(f"BEGIN; {change}; COMMIT")
    psql = f"PGAPPNAME=deployment '{project.bin_dir / 'psql'}' -X -v ON_ERROR_STOP=1"
    change = (
        f'file="$HOME/change-$(wc -l <"$HOME/begun")"; if [ -e "$file" ]; then {psql} -f "$file"'
    )
    fake_call(
        project,
        *DUMP,
        f'echo begun >>"$HOME/begun"; {change} >>"$HOME/log" 2>&1 || exit 1; fi; exec "$real" "$@"',
    )


def begun(project: Project) -> int:
    """How often pg_dump was started."""
    return len((project.directory / "home" / "begun").read_text().splitlines())


def test_name_of_any_kind_that_changes_is_a_reason_to_begin_again(
    named: tuple[Database, str], make_project: MakeProject
) -> None:
    """One after the other in one run. Each would give a backup that does not restore, or that
    restores with other values."""
    database, role = named
    each_reason_is_shown = {"LOCK_RETRY_SECONDS": 0.1, "TICK_SECONDS": 0.02, "REDRAW_SECONDS": 0}
    attempts = {"DUMP_ATTEMPTS": len(RENAMES) + 1}
    project = make_project(database, constants={**attempts, **each_reason_is_shown})
    change_before_each_dump(project, [change.format(role=role) for change in RENAMES])
    with Terminal(project, columns=200) as terminal:
        assert terminal.finish()[0] == 0, terminal.shown
    shown = "\n".join(terminal.progress)
    for words in RENAMES.values():
        # Where pg_dump did not find what it had seen, it has failed by itself.
        pattern = f"Waiting: {words.format(role=role)}( while it was dumped)?  "
        assert re.search(pattern, shown), words
    assert begun(project) == len(RENAMES) + 1
    assert_restores(project.dumps()[0], database)


def test_name_that_never_stays_is_told_by_its_kind(
    named: tuple[Database, str], make_project: MakeProject
) -> None:
    database, _role = named
    project = make_project(database, constants={"LOCK_RETRY_SECONDS": 0.1})
    names = ("doubled", "twice", "thrice", "fourfold")
    renames = [f"ALTER FUNCTION {a} RENAME TO {b}" for a, b in itertools.pairwise(names)]
    change_before_each_dump(project, renames)
    result = project.run().failed_with(7, "Backup creation error")
    change = 'function "thrice" was renamed to "fourfold"'
    assert f"gave up after 3 attempts: {change} while it was dumped\n" in result.stderr, result
    assert begun(project) == 3
    assert not project.dumps()


@contextlib.contextmanager
def in_mid_dump(project: Project, database: Database) -> Iterator[None]:
    """pg_dump writes rows while what is inside is done; the run then succeeds."""
    fake_call(project, *DUMP, 'echo begun >>"$HOME/begun"; exec "$real" "$@"')
    with transaction(database, "REINDEX TABLE first.wide"):
        run = project.start()
        is_pg_dump = "application_name LIKE 'backup\\_db %' AND wait_event_type = 'Lock'"
        wait_until(lambda: sessions_on(database, is_pg_dump) or run.poll() is not None)
        yield
    finish(run).succeeded()


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TYPE color RENAME VALUE 'red' TO 'crimson'",
        "ALTER TYPE pair DROP ATTRIBUTE b",
        "ALTER TYPE pair ADD ATTRIBUTE c int",
    ],
)
def test_rows_are_of_one_moment_with_their_types(
    change: str, named: tuple[Database, str], make_project: MakeProject
) -> None:
    """The table of its values comes after that: plain pg_dump would write them in new words, below
    the type as it was, and the restore would refuse each row."""
    database, _role = named
    database.psql(FIRST)
    project = make_project(database, constants={"LOCK_RETRY_SECONDS": 0.1})
    with in_mid_dump(project, database):
        database.psql(change)
    assert begun(project) == 2
    assert_restores(project.dumps()[0], database)


HARMLESS = """
CREATE TABLE new_table AS SELECT 1 AS n;
CREATE TYPE new_type AS (a int);
CREATE FUNCTION new_function() RETURNS int LANGUAGE sql AS 'SELECT 1';
ALTER TYPE color ADD VALUE 'blue';
CREATE SCHEMA new_schema;
CREATE VIEW new_schema.base AS SELECT 1 AS n;
CREATE INDEX ON parted (id);
CREATE TEMPORARY TABLE temporary AS SELECT 1 AS n;
CREATE TEMPORARY VIEW temporary_view AS SELECT 1 AS n;
ALTER TABLE temporary RENAME TO gone;
CREATE ROLE {role}x;
DROP FUNCTION unused();
DROP TYPE unused;
GRANT ALL ON FUNCTION doubled TO {role};
GRANT ALL ON TYPE color, pair, mood TO {role};
GRANT ALL ON SEQUENCE ones TO {role};
GRANT ALL ON SCHEMA other TO {role};
COMMENT ON TYPE pair IS 'two';
COMMENT ON COLUMN pair.a IS 'one';
CREATE OR REPLACE FUNCTION doubled(int) RETURNS int LANGUAGE sql AS 'SELECT $1 + $1';
ALTER FUNCTION doubled COST 7;
"""


def test_what_harms_no_dump_is_no_reason_to_begin_again(
    named: tuple[Database, str], make_project: MakeProject
) -> None:
    """All of it in one mid-dump."""
    database, role = named
    unused = "CREATE TYPE unused AS (a int); CREATE FUNCTION unused() RETURNS int RETURN 1;"
    database.psql(FIRST + unused)
    before = database.contents()
    project = make_project(database)
    with transaction(database, "CREATE TEMPORARY VIEW mine AS SELECT 1 AS n") as run:
        run("COMMIT")
        with in_mid_dump(project, database):
            database.psql(HARMLESS.format(role=role))
            run("ALTER VIEW mine RENAME TO still_mine")
    assert begun(project) == 1
    with restored(project.dumps()[0], database.cluster) as copy:
        assert copy.contents() == before


# -- the look at the names, and who is in its way -------------------------------------------------


def test_migration_that_waits_for_us_is_not_one_that_slipped_in(
    blue_green: Database, make_project: MakeProject
) -> None:
    """It has renamed, and waits for a table of ours; it goes on in the instant that we let go."""
    before = blue_green.contents()
    project = make_project(blue_green)
    hold = 'touch "$HOME/paused"; until [ -e "$HOME/go" ]; do sleep 0.05; done'
    fake_call(project, *DUMP, f'echo begun >>"$HOME/begun"; "$real" "$@" || exit; {hold}')
    run = project.start()
    wait_until(lambda: paused(project) or run.poll() is not None)
    migration = "BEGIN; ALTER SCHEMA live RENAME TO old; ALTER TABLE mark ADD more int; COMMIT"
    with ThreadPoolExecutor() as pool:
        migrating = pool.submit(blue_green.psql, migration)
        waits = "SELECT pid FROM pg_locks WHERE NOT granted"
        wait_until(lambda: blue_green.psql(waits) or migrating.done())
        assert not migrating.done()
        let_go(project)
        finish(run).succeeded()
        migrating.result()
    assert begun(project) == 1
    with restored(project.dumps()[0], blue_green.cluster) as copy:
        assert copy.contents() == before


@pytest.fixture
def limited(blue_green: Database) -> Iterator[str]:
    """A role with two connections, which may read all of the database."""
    role = f"role_{uuid.uuid4().hex[:12]}"
    blue_green.psql(f"CREATE ROLE {role} LOGIN PASSWORD 'secret' CONNECTION LIMIT 2")
    blue_green.psql(f"GRANT pg_read_all_data TO {role}")
    yield role
    blue_green.psql(f"DROP ROLE {role}")


def test_role_with_two_connections_sees_a_change_too(
    blue_green: Database, limited: str, make_project: MakeProject
) -> None:
    settings = blue_green.settings(limited, "secret")
    project = make_project(blue_green, settings=settings, constants={"LOCK_RETRY_SECONDS": 0.1})
    change = f"PGUSER=postgres PGPASSWORD='{blue_green.cluster.password}'"
    once = f'if mkdir "$HOME/changed"; then {change} {call_psql(project, change_names(SWAP))}; fi'
    begin = f'echo begun >>"$HOME/begun"; ({once}) >"$HOME/log" 2>&1'
    fake_call(project, *DUMP, f'{begin}; exec "$real" "$@"')
    dump = project.back_up()
    assert begun(project) == 2
    with restored(dump, blue_green.cluster) as copy:
        assert copy.contents() == blue_green.contents()


@pytest.mark.parametrize("changes", [0, 1])
def test_names_are_compared_where_no_second_session_is_to_be_had(
    changes: int, blue_green: Database, limited: str, make_project: MakeProject
) -> None:
    """Somebody takes the place that pg_dump has left, for as long as we look for one."""
    limits = {"FREED_SECONDS": 0.5, "LOCK_RETRY_SECONDS": 2}
    settings = blue_green.settings(limited, "secret")
    project = make_project(blue_green, settings=settings, constants=limits)
    superuser = f"PGUSER=postgres PGPASSWORD='{blue_green.cluster.password}'"
    psql = f"'{project.bin_dir / 'psql'}' --no-psqlrc"
    ask = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{limited}'"
    count = f'"$({superuser} {psql} --tuples-only --no-align --command="{ask}")"'
    change = f"{superuser} {call_psql(project, change_names(SWAP))}" if changes else ":"
    script = f"""
        echo begun >>"$HOME/begun"
        "$real" "$@" || exit
        [ "$(wc -l <"$HOME/begun")" = 1 ] || exit 0
        until [ {count} = 1 ]; do :; done
        {psql} --command='SELECT pg_sleep(1.5)' >/dev/null 2>&1 &
        until [ {count} = 2 ]; do :; done
        {change} >"$HOME/log" 2>&1
    """
    fake_call(project, *DUMP, script)
    dump = project.back_up()
    assert begun(project) == changes + 1
    with restored(dump, blue_green.cluster) as copy:
        assert copy.contents() == blue_green.contents()
