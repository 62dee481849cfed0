"""The progress line: only on a terminal, from real measures, and gone before the result."""

from __future__ import annotations

import pty
import re
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import CONTENTS, fake_call
from support import Database, Project, Terminal, assert_restores, connect, new_database, wait_until

import backup_db

# Two tables that gzip:9 takes a second for; the second is dumped last, and made first.
LARGE = """
CREATE TABLE z_messages AS
SELECT n AS id, sha512(n::text::bytea)::text || sha512((-n)::text::bytea) AS content
  FROM generate_series(1, 80000) AS n;
CREATE TABLE a_messages AS SELECT * FROM z_messages LIMIT 40000;
CREATE MATERIALIZED VIEW total AS SELECT count(*) FROM a_messages;
ANALYZE;
"""


@pytest.fixture(scope="module")
def large_database(cluster: Cluster) -> Iterator[Database]:
    with new_database(cluster) as new:
        new.psql(LARGE)
        yield new


@pytest.fixture
def large(make_project: MakeProject, large_database: Database) -> Project:
    return make_project(large_database, constants={"REDRAW_SECONDS": 0})


@pytest.fixture
def slow(large: Project, large_database: Database) -> Project:
    """The same, and pg_dump takes its time."""
    large.configure({**large_database.settings(), "BACKUP_COMPRESS": "gzip:6"})
    return large


def test_the_line_tells_how_far_a_backup_is(large: Project, large_database: Database) -> None:
    slow = {**large_database.settings(), "BACKUP_COMPRESS": "zstd:11"}  # to be seen in both tables
    large.configure(slow)
    fake_call(large, *CONTENTS, 'sleep 0.5; exec "$real" "$@"')  # or it is over within a tick
    with Terminal(large, columns=120) as terminal:
        status, left = terminal.finish()
    assert status == 0, left
    # Not a trace of it stays on the screen.
    assert left.startswith("✓ Backup created successfully\n\nBackup File: db/backups/"), left
    assert not re.search(r"[\r\x1b]|elapsed", left), left
    assert re.fullmatch(r"Took [1-9]\d* s\.", left.splitlines()[-1]), left

    lines = terminal.progress
    assert [line for line in lines if line][-1].startswith("Verifying  [")
    percent = [int(found) for found in re.findall(r"\] +(\d+) %", "\n".join(lines))]
    assert percent == sorted(percent)
    assert len(set(percent)) > 3, lines
    measured = re.compile(
        r"Dumping  \[#+-+\] +\d+ %(?P<left>  0:\d\d:\d\d left)?"
        r"  0:\d\d:\d\d elapsed  [\d.]+ [KM]B written"
    )
    found = [match for line in lines if (match := measured.fullmatch(line))]
    assert any(match["left"] for match in found), lines
    assert_restores(large.dumps()[0], large_database)


def test_whom_the_backup_waits_for_is_shown(large: Project, large_database: Database) -> None:
    with closing(connect(large_database)) as session, session.cursor() as cursor:
        cursor.execute("SET application_name = 'migration'")
        cursor.execute("BEGIN; LOCK TABLE a_messages")
        waiting = (
            f"Waiting: session {session.info.backend_pid}"
            " (postgres, migration: BEGIN …) holds the table a_messages"
        )
        with Terminal(large, columns=200) as terminal:
            shown = re.compile(rf"{re.escape(waiting)}  0:00:\d\d elapsed")
            wait_until(lambda: any(map(shown.fullmatch, terminal.progress)))
            cursor.execute("COMMIT")
            assert terminal.finish()[0] == 0


def test_time_left_does_not_count_what_came_before() -> None:
    keyboard, screen = pty.openpty()
    with open(keyboard, "rb", buffering=0) as reader, open(screen, "w", encoding="utf-8") as stream:
        progress = backup_db.Progress(stream)
        progress.show("Waiting: session 4711 holds the table messages")
        time.sleep(1.2)
        progress.show("Dumping", 0.0)
        time.sleep(0.3)
        progress.show("Dumping", 0.5)  # as long for the one half as for the other: no second
        shown = b""
        while shown.count(b"\x1b[K") < 3:
            shown += reader.read(4096)
    line = shown.decode().rpartition("\r")[2]
    assert line == "Dumping  [##########----------]   50 %  0:00:00 left  0:00:01 elapsed\x1b[K"


def test_whom_pg_dump_waits_for_is_shown(large: Project, large_database: Database) -> None:
    with closing(connect(large_database)) as session, session.cursor() as cursor:
        cursor.execute("BEGIN; REFRESH MATERIALIZED VIEW total")
        waiting = (
            f"Waiting: session {session.info.backend_pid} (postgres: BEGIN …) blocks pg_dump  0:"
        )
        with Terminal(large, columns=200) as terminal:
            wait_until(lambda: any(line.startswith(waiting) for line in terminal.progress))
            cursor.execute("COMMIT")
            assert terminal.finish()[0] == 0


@pytest.mark.parametrize("columns", [80, 40, 12])
def test_the_line_fits_the_terminal(columns: int, slow: Project) -> None:
    with Terminal(slow, columns=columns) as terminal:
        status, left = terminal.finish()
    assert status == 0, left
    assert max(map(len, terminal.progress)) < columns
    dumping = {line for line in terminal.progress if line.startswith("Dumping")}
    assert len(dumping) > 1 or columns < 20, terminal.progress
    for line in dumping:  # whole parts
        assert re.search(r"Dumping$|\]$| %$| left$| elapsed$| written$|\)$", line), line


def test_a_verification_has_one_too(slow: Project) -> None:
    dump = slow.back_up()
    with Terminal(slow, "--verify", dump) as terminal:
        status, left = terminal.finish()
    assert status == 0, left
    assert left.startswith("✓ Backup verification passed\n\nFile:        db/backups/"), left
    assert re.search(r"\)\nTook \d+ s\.\n$", left), left
    assert terminal.progress[-1] == ""
    lines = terminal.progress[:-1]
    assert lines
    assert all(line.startswith("Verifying  [") for line in lines), lines
    for before, after in pairwise(line.count("#") for line in lines):
        assert before <= after


def test_list_is_too_short_for_one(large: Project) -> None:
    with Terminal(large, "--list") as terminal:
        assert terminal.finish() == (0, "No backups yet in db/backups/\n")


def test_there_is_none_where_stderr_is_no_terminal(large: Project) -> None:
    creation = large.run()
    for result in (creation, large.run("--verify", large.dumps()[0])):
        result.succeeded()
        assert result.stderr == "", result
        assert not re.search(r"[\r\x1b]", result.stdout), result
