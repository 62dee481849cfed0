"""Names bind late: a schema is renamed under all locks, and what goes by its name goes elsewhere.

Whatever becomes of names while a backup is made, it shows those of one moment, each with the rows
that it had then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import DUMP, WIDE, fake_call, sessions_on, transaction
from support import Database, Project, finish, new_database, restored, wait_until

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
