"""Every night: BACKUP_KEEP, and a month of nights with writes and faults."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import MakeProject, Stage
from faults import DUMP, FILE, HOLD, fake_call, let_go, paused
from support import (
    MOUNTING,
    Database,
    Project,
    Result,
    contents_of,
    finish,
    metadata_path,
    read_metadata,
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


def moment_of(dump: Path) -> datetime:
    stamp = dump.name.removesuffix(".dump").rpartition("_")[2]
    return datetime.strptime(stamp, "%Y-%m-%dT%H-%M-%SZ").replace(tzinfo=timezone.utc)


def aged(dump: Path, days: float, **changes: object) -> Path:
    """A copy of a backup that says it was made that many days earlier, with other metadata too."""
    prefix = dump.name.rpartition("_")[0]
    moment = moment_of(dump) - timedelta(days=days)
    old = dump.with_name(f"{prefix}_{moment:%Y-%m-%dT%H-%M-%SZ}.dump")
    shutil.copy(dump, old)
    metadata = read_metadata(dump)
    metadata |= {"backup_timestamp": f"{moment:%Y-%m-%dT%H:%M:%SZ}", "backup_file": old.name}
    metadata_path(old).write_text(json.dumps(metadata | changes))
    return old


def visible(directory: Path) -> dict[str, str]:
    """What anyone would take for a backup, or for a file of their own."""
    found = contents_of(directory)
    return {name: content for name, content in found.items() if not name.startswith(".")}


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
    assert keeping.dumps() == [first, newest]
    assert not any(metadata_path(gone).exists() for gone in (oldest, older, old))
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
    metadata_path(aged(first, 15)).unlink()
    aged(first, 16).unlink()
    metadata_path(aged(first, 17)).write_text("{")
    # Another database whose name begins or ends like this one's, by file name alone; a copy.
    other = aged(first, 18)
    for name in (f"x_{other.stem}", f"{stem}_x_dev_2020-01-01T00-00-00Z", f"{other.stem} (2)"):
        shutil.copy(other, folder / f"{name}.dump")
        shutil.copy(metadata_path(other), folder / f"{name}.metadata.json")
    other.unlink()
    metadata_path(other).unlink()
    (folder / f"{stem}_2020-01-01T00-00-00Z.dump.gz").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (folder / f"{stem}_2019-01-01T00-00-00Z.dump").mkdir()
    before = visible(folder)
    for _ in range(3):
        keeping.run().succeeded()
    after = visible(folder)
    assert before.keys() - after.keys() == pair(first)
    assert before.items() - after.items() == {(name, before[name]) for name in pair(first)}


@pytest.mark.parametrize("value", ["0", "7d,0w", "three", "7h", "7d,", "3,4", "", " "])
def test_what_keeps_nothing_is_a_configuration_error(
    value: str, small_database: Database, make_project: MakeProject
) -> None:
    settings = small_database.settings() | {"BACKUP_KEEP": value}
    project = make_project(small_database, settings=settings)
    if not value:  # an empty variable counts as unset
        project.run().succeeded()
        return
    result = project.run().failed_with(2, "Configuration error")
    assert f"BACKUP_KEEP is {value!r}" in result.stderr
    assert "7d,4w,6m,2y" in result.stderr
    assert not project.backups.exists()


def test_failed_run_removes_nothing(keeping: Project) -> None:
    first = keeping.back_up()
    for days in range(1, 5):
        aged(first, days)
    keeping.fake("pg_dump", 'case "$*" in *--snapshot*) exit 1 ;; esac; exec "$real" "$@"')
    before = visible(keeping.backups)
    keeping.run().failed_with(7)
    keeping.run(env={"DEV_DB_NAME": "nowhere"}).failed_with(3)
    assert visible(keeping.backups) == before


def test_backup_just_made_stays_though_the_clock_was_set_back(
    small_database: Database, make_project: MakeProject
) -> None:
    settings = small_database.settings() | {"BACKUP_KEEP": "1"}
    project = make_project(small_database, settings=settings)
    first = project.back_up()
    slightly, future = aged(first, -0.5), aged(first, -400)
    newest = project.back_up()
    # One from the future, where the clock was once, neither counts nor goes.
    assert project.dumps() == [newest, future]
    assert not slightly.exists()


def test_nights_by_the_calendar(small_database: Database, make_project: MakeProject) -> None:
    settings = small_database.settings() | {"BACKUP_KEEP": "2,7d,4w,6m,2y"}
    project = make_project(small_database, settings=settings)
    first = project.back_up()
    made = {first, *(aged(first, days) for days in range(1, 400))}
    project.run().succeeded()
    kept = {moment_of(dump).date() for dump in project.dumps()}
    days = {moment_of(dump).date() for dump in made.union(project.dumps())}
    periods = {"%Y-%m-%d": 7, "%G-%V": 4, "%Y-%m": 6, "%Y": 2}
    assert kept == {moment_of(first).date()} | {
        max(day for day in days if day.strftime(period) == name)
        for period, count in periods.items()
        for name in sorted({day.strftime(period) for day in days})[-count:]
    }
    assert len(project.dumps()) < 20
    assert first in project.dumps()  # one of the newest two


def test_file_that_cannot_be_removed_is_a_warning(keeping: Project) -> None:
    first = keeping.back_up()
    for days in (1, 2, 3):
        aged(first, days)
    stuck = aged(first, 2)
    # Mounted on itself, for the run alone: not even root can unlink it.
    mount = 'mount --bind "$0" "$0" && exec "$@"'
    result = keeping.run(prefix=[*MOUNTING, "sh", "-c", mount, str(stuck)]).succeeded()
    assert stuck.exists()
    assert metadata_path(stuck).exists()
    assert f"Warning: db/backups/{stuck.name} was not removed: " in result.stderr
    assert len(keeping.dumps()) == 3  # the new one, the first, and the one that is stuck


# -- a month --------------------------------------------------------------------------------------

AS_USUAL = 'exec "$real" "$@"'
DUMPING = 'case "$*" in *--snapshot*)'


def stopped_by(number: int) -> Callable[[Project, Path], Result]:
    """A night on which a signal ends the run while it dumps."""

    def run(project: Project, folder: Path) -> Result:
        fake_call(project, *DUMP, HOLD)
        run = project.start("--output-dir", folder)
        wait_until(lambda: paused(project))
        run.send_signal(number)
        result = finish(run)
        assert result.returncode == -number
        # The pg_dump of a run that was killed holds the lock to its end; by the next night it has.
        let_go(project)
        (lock,) = folder.glob(".*.lock")
        wait_until(lambda: is_free(lock))
        for mark in ("paused", "go"):
            (project.directory / "home" / mark).unlink()
        return result

    return run


def is_free(lock: Path) -> bool:
    with lock.open() as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def failing_dump(project: Project, folder: Path) -> Result:
    project.fake("pg_dump", f"{DUMPING} echo no luck >&2; exit 1 ;; esac; {AS_USUAL}")
    return project.run("--output-dir", folder).failed_with(7)


def damaged_dump(project: Project, folder: Path) -> Result:
    cut = f'{FILE}; truncate -s -9 "$file"'
    project.fake("pg_dump", f'{DUMPING} "$real" "$@"; {cut}; exit ;; esac; {AS_USUAL}')
    return project.run("--output-dir", folder).failed_with(8)


def full_disk(project: Project, folder: Path) -> Result:
    filler = folder.parent / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    result = project.run("--output-dir", folder).failed_with(5)
    filler.unlink()
    return result


def no_server(project: Project, folder: Path) -> Result:
    return project.run("--output-dir", folder, env={"DEV_DB_PORT": "1"}).failed_with(3)


# After a month of nights without a fault, as the last ones went; None is one more of those.
NIGHTS = (
    None,
    no_server,
    failing_dump,
    None,
    stopped_by(signal.SIGKILL),
    stopped_by(signal.SIGKILL),
    full_disk,
    None,
    damaged_dump,
    stopped_by(signal.SIGTERM),
    None,
)
KEEP = 7


def test_month_of_nights(small_database: Database, make_project: MakeProject) -> None:
    settings = small_database.settings() | {"BACKUP_KEEP": str(KEEP), "BACKUP_COMPRESS": "none"}
    project = make_project(small_database, settings=settings)
    first = project.back_up()
    history = sorted(aged(first, days).name for days in range(1, 31))
    for file in (first, metadata_path(first)):
        file.unlink()
    held: dict[str, list[str]] = {}  # by dump: what the database held that night
    with small_disk("size=2m") as disk:
        folder = Path(shutil.copytree(project.backups, disk / "backups"))
        for number, night in enumerate(NIGHTS):
            small_database.psql(
                "INSERT INTO notes (note) SELECT repeat(md5(random()::text), 9)"
                " FROM generate_series(1, 200);"
                f"UPDATE notes SET note = 'night {number}' WHERE id % 7 = {number % 7};"
                f"DELETE FROM notes WHERE id % 11 = {number}"
            )
            before = visible(folder)
            if night:
                night(project, folder)
                assert visible(folder) == before
                continue
            project.fake("pg_dump", AS_USUAL)
            project.run("--output-dir", folder).succeeded()
            (new,) = {n for n in visible(folder) if n.endswith(".dump")} - before.keys()
            held[new] = small_database.contents()
            dumps = sorted(folder.glob("*.dump"))
            assert [dump.name for dump in dumps] == [*history, *held][-KEEP:]
            # No metadata without its dump, and nothing that a killed run left.
            assert visible(folder).keys() == set().union(*map(pair, dumps))
            assert not list(folder.glob(".*.partial"))

        assert len(held) == NIGHTS.count(None)
        listing = project.run("--list", "--output-dir", folder).succeeded().stdout
        assert listing.count("✓ Verified") == KEEP
        for name in (min(held), max(held)):
            project.run("--verify", folder / name).succeeded()
            with restored(folder / name, small_database.cluster) as copy:
                assert copy.contents() == held[name]


# -- a database that shrank, a server that is another one -----------------------------------------


def test_last_full_backup_outlives_an_emptied_database(
    sample_database: Database, make_project: MakeProject
) -> None:
    """For more nights than are kept; what shrank is told once, what is held back each night."""
    project = make_project(sample_database, settings={"BACKUP_KEEP": "2,2m"})
    full = project.back_up()
    counts = read_metadata(full)["table_counts"] | {"messages": 10**6}
    older = aged(full, 62, table_counts=counts)  # of another month
    sample_database.psql("TRUNCATE messages, conversations CASCADE")
    first = project.run().succeeded()
    assert "\nVerified:    ✓ Integrity check passed\n" in first.stdout
    shrunk = "Warning: fewer rows than in any of the last 2 backups: messages 0 (at least 3420 "
    assert first.stderr.startswith(shrunk), first
    for _ in range(3):
        night = project.run().succeeded()
        assert "fewer rows" not in night.stderr, night
        held = f"Warning: db/backups/{full.name} is kept beyond BACKUP_KEEP: it has 3727 rows, "
        assert night.stderr.startswith(f"{held}the newer ones at most 0. If "), night
        assert {full, older} < set(project.dumps())
        assert len(project.dumps()) == 4
    command = night.stderr[night.stderr.index("rm -- ") :]  # for when it is meant
    subprocess.run(["sh", "-c", command], cwd=project.directory, check=True)
    assert project.run().succeeded().stderr == ""
    assert len(project.dumps()) == 3


def test_backups_of_a_server_that_hides_its_identifier_are_of_any_server(
    stage: Stage, sample_database: Database
) -> None:
    """A role may lack the right to see it: the same nights go on, and older ones are removed."""
    settings = sample_database.settings() | {"BACKUP_KEEP": "1"}
    project = stage.make_project(settings=settings)
    first = project.back_up()
    assert read_metadata(first)["system_identifier"]
    role = stage.role("IN ROLE pg_read_all_data")
    sample_database.psql("REVOKE EXECUTE ON FUNCTION pg_control_system FROM PUBLIC")
    project.configure(settings | sample_database.settings(role, "secret"))
    second = project.back_up()
    assert read_metadata(second)["system_identifier"] is None
    assert project.dumps() == [second]


def test_backups_of_another_server_are_left_alone(
    sample_database: Database, make_project: MakeProject
) -> None:
    project = make_project(sample_database, settings={"BACKUP_KEEP": "1"})
    other = project.back_up()
    values = read_metadata(other)
    values["table_counts"]["messages"] = 1_000_000  # were it ours, a table that shrank
    metadata_path(other).write_text(json.dumps({**values, "system_identifier": "4711"}))
    ours = project.back_up()
    newest = project.back_up()
    assert project.dumps() == [other, newest]
    assert not ours.exists()
    listed = project.run("--list").succeeded().stdout
    assert f"of server 4711 (PostgreSQL {values['postgresql_version']}): 1 backup, " in listed, (
        listed
    )
    values["system_identifier"] = None  # made before: of the same server
    metadata_path(other).write_text(json.dumps(values))
    held = f"Warning: db/backups/{other.name} is kept beyond BACKUP_KEEP: it has 1000307 rows, "
    assert project.run().succeeded().stderr.startswith(held)
