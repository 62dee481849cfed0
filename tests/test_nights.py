"""Every night: BACKUP_KEEP, and a month of nights with writes and faults."""

from __future__ import annotations


import json
import os
import shutil

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import MakeProject
from support import (
    UNPRIVILEGED,
    Database,
    Project,
    assert_restores,
    contents_of,
    finish,
    restored,
    small_disk,
    wait_until,
)

SUFFIXES = (".dump", ".metadata.json")


@pytest.fixture
def small_database(database: Database) -> Database:
    database.psql("CREATE TABLE notes (id serial PRIMARY KEY, note text)")
    return database


@pytest.fixture
def keeping(small_database: Database, make_project: MakeProject) -> Project:
    return make_project(small_database, settings=small_database.settings() | {"BACKUP_KEEP": "2"})


def pair(dump: Path) -> set[str]:
    return {dump.name.removesuffix(".dump") + suffix for suffix in SUFFIXES}


def aged(dump: Path, days: int, **changes: object) -> Path:
    """A copy of a backup that says it was made that many days earlier, with other metadata too."""
    stem = dump.name.removesuffix(".dump")
    prefix, _, stamp = stem.rpartition("_")
    moment = datetime.strptime(stamp, "%Y-%m-%dT%H-%M-%SZ").replace(tzinfo=timezone.utc)
    moment -= timedelta(days=days)
    old = dump.with_name(f"{prefix}_{moment:%Y-%m-%dT%H-%M-%SZ}.dump")
    shutil.copy(dump, old)
    metadata = json.loads(dump.with_name(f"{stem}.metadata.json").read_text())
    metadata |= {"backup_timestamp": f"{moment:%Y-%m-%dT%H:%M:%SZ}", "backup_file": old.name}
    metadata_of(old).write_text(json.dumps(metadata | changes))
    return old


def metadata_of(dump: Path) -> Path:
    return dump.with_name(dump.name.removesuffix(".dump") + ".metadata.json")


# -- BACKUP_KEEP ----------------------------------------------------------------------------------


def test_all_are_kept_where_nothing_is_said(
    small_database: Database, make_project: MakeProject
) -> None:
    project = make_project(small_database)
    first = project.back_up()
    old = [aged(first, days) for days in range(1, 30)]
    assert "Removed" not in project.run().succeeded().stdout
    assert len(project.dumps()) == len(old) + 2


def test_oldest_beyond_the_newest_are_removed_and_named(keeping: Project) -> None:
    first = keeping.back_up()
    oldest, older, old = (aged(first, days) for days in (40, 3, 2))
    result = keeping.run().succeeded()
    (newest,) = set(keeping.dumps()) - {first}
    assert set(os.listdir(keeping.backups)) - {".lock"} >= pair(newest) | pair(first)
    assert keeping.dumps() == [first, newest]
    assert not any(metadata_of(gone).exists() for gone in (oldest, older, old))
    removed = [f"db/backups/{gone.name}" for gone in (old, older, oldest)]
    assert f"\nRemoved:     {', '.join(removed)}\n" in result.stdout


def test_what_is_not_a_verified_backup_of_this_database_is_never_touched(keeping: Project) -> None:
    first = keeping.back_up()
    stem = first.name.removesuffix(".dump").rpartition("_")[0]
    folder = keeping.backups

    aged(first, 10, database_name="another")
    aged(first, 11, environment="prod")
    aged(first, 12, verification=None)
    aged(first, 13, backup_size_bytes=1)
    aged(first, 14, checksum_sha256="none")
    metadata_of(aged(first, 15)).unlink()
    aged(first, 16).unlink()
    metadata_of(aged(first, 17)).write_text("{")
    for suffix in SUFFIXES:
        # Another database whose name begins or ends like this one's; a copy that somebody made.
        name = aged(first, 18)
        for other in (f"x_{name.stem}", f"{stem}_x_dev_2020-01-01T00-00-00Z", f"{name.stem} (2)"):
            shutil.copy(name, folder / f"{other}{suffix}")
        name.unlink()
        metadata_of(name).unlink()
    (folder / f"{stem}_2020-01-01T00-00-00Z.dump.gz").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / f"{stem}_2019-01-01T00-00-00Z.dump").mkdir()
    before = contents_of(folder)
    for _ in range(3):
        keeping.run().succeeded()
    after = contents_of(folder)
    gone = {name for name in before.keys() - after.keys()}
    assert gone == pair(first)
    assert {
        name: after[name] for name in before if name in after and not name.endswith(".lock")
    } == {
        name: content
        for name, content in before.items()
        if name not in gone and not name.endswith(".lock")
    }


@pytest.mark.parametrize("value", ["0", "-1", "three", "1.5", "", " ", "²", "1e3"])
def test_number_that_is_none_is_a_configuration_error(
    value: str, small_database: Database, make_project: MakeProject
) -> None:
    settings = small_database.settings() | {"BACKUP_KEEP": value}
    project = make_project(small_database, settings=settings)
    if not value:  # an empty variable counts as unset
        project.run().succeeded()
        return
    result = project.run().failed_with(2, "Configuration error")
    assert "BACKUP_KEEP" in result.stderr
    assert not project.backups.exists()


def test_failed_run_removes_nothing(keeping: Project) -> None:
    first = keeping.back_up()
    for days in range(1, 5):
        aged(first, days)
    keeping.fake("pg_dump", 'case "$*" in *--snapshot*) exit 1 ;; esac; exec "$real" "$@"')
    before = contents_of(keeping.backups)
    keeping.run().failed_with(7)
    keeping.run(env={"DEV_DB_NAME": "nowhere"}).failed_with(3)
    after = contents_of(keeping.backups)
    assert {n: c for n, c in after.items() if not n.endswith(".lock")} == {
        n: c for n, c in before.items() if not n.endswith(".lock")
    }


def test_backup_just_made_stays_though_the_clock_was_set_back(
    small_database: Database, make_project: MakeProject
) -> None:
    settings = small_database.settings() | {"BACKUP_KEEP": "1"}
    project = make_project(small_database, settings=settings)
    first = project.back_up()
    future = aged(first, -400)
    newest = project.back_up()
    assert project.dumps() == [newest]
    assert not future.exists()


def test_file_that_cannot_be_removed_is_a_warning(keeping: Project) -> None:
    first = keeping.back_up()
    for days in (1, 2, 3):
        aged(first, days)
    stuck = aged(first, 2)
    stuck.unlink()
    # A directory in the place of the dump: not even root can unlink it. Of the same size, so that
    # it is listed as verified; what a directory has is asked of the file system.
    stuck.mkdir()
    metadata = json.loads(metadata_of(stuck).read_text())
    metadata["backup_size_bytes"] = stuck.stat().st_size
    metadata_of(stuck).write_text(json.dumps(metadata))
    result = keeping.run().succeeded()
    assert stuck.is_dir()
    assert metadata_of(stuck).exists()
    assert f"Warning: db/backups/{stuck.name} was not removed: " in result.stderr
    assert len(keeping.dumps()) == 3  # the new one, the first, and the one that is stuck
