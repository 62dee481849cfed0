"""What else is in the directory: other runs, other databases, and damage of every kind."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import CONTENTS, PAUSE, fake_call, paused, published, untouched
from support import (
    UNPRIVILEGED,
    Database,
    Project,
    finish,
    metadata_path,
    new_database,
    read_metadata,
    wait_until,
)

# -- other runs -----------------------------------------------------------------------------------


def test_second_run_for_one_database_is_told_of_the_first(standing: Project) -> None:
    fake_call(standing, *CONTENTS, PAUSE)
    with untouched(standing):
        before = datetime.now(timezone.utc).replace(microsecond=0)
        first = standing.start()
        wait_until(lambda: paused(standing))
        partial = sorted(standing.backups.glob(".*.partial"))
        result = standing.run().failed_with(1, "General error")
        assert sorted(standing.backups.glob(".*.partial")) == partial
        match = re.search(r"is running: process (\d+), started (\S+)\n", result.stderr)
        assert match, result
        assert int(match.group(1)) == first.pid
        started = datetime.strptime(match.group(2), "%Y-%m-%dT%H:%M:%S%z")
        assert before <= started <= datetime.now(timezone.utc)
        first.terminate()
        finish(first)


def test_two_databases_are_backed_up_into_one_directory_at_once(
    standing: Project, make_project: MakeProject, database: Database
) -> None:
    other = make_project(database)
    runs = [p.start("--output-dir", standing.backups) for p in (standing, other)]
    for run in runs:
        finish(run).succeeded()
    for dump in standing.dumps():
        standing.run("--verify", dump).succeeded()
    assert len(standing.dumps()) == 3


def test_databases_whose_files_begin_alike_keep_out_of_each_others_way(
    standing: Project, standing_database: Database, make_project: MakeProject
) -> None:
    """`x` and `x_dev` in dev share their file names, hence their lock; `x_dev_y` has its own."""
    name = standing_database.name
    cluster = standing_database.cluster
    fake_call(standing, *CONTENTS, PAUSE)
    first = standing.start()
    wait_until(lambda: paused(standing))
    for suffix, code in (("_dev", 1), ("_dev_y", 0)):
        cluster.create_database(name + suffix)
        other = make_project(Database(cluster, name + suffix))
        result = other.run("--output-dir", standing.backups)
        cluster.drop_database(name + suffix)
        assert result.returncode == code, result
    first.terminate()
    finish(first)


def test_database_with_a_dot_removes_nothing_of_another_whose_name_would_match(
    cluster: Cluster, make_project: MakeProject
) -> None:
    """What belongs to `axb` is no pattern's business: its partial files, its newer metadata."""
    with new_database(cluster) as database:
        name = f"{database.name}a.b"
        cluster.create_database(name)
        project = make_project(Database(cluster, name), settings={"BACKUP_KEEP": "1"})
        project.backups.mkdir(parents=True)
        stem = name.replace(".", "x") + "_dev_2025-01-27T14-30-00Z"
        partial = (f".{stem}.dump.partial", f".{stem}.metadata.json.partial")
        others = [project.backups / name for name in (*partial, f"{stem}.metadata.json")]
        for other in others:
            other.write_text("another's")
        try:
            project.back_up()
            project.back_up()
        finally:
            cluster.drop_database(name)
        assert [other.read_text() for other in others] == ["another's"] * 3
        assert len(project.dumps()) == 1


def test_clean_up_leaves_the_metadata_of_a_published_dump(standing: Project) -> None:
    """Beside a whole backup a partial dump of the same name, as after a clock was set back."""
    (dump,) = standing.dumps()
    left = dump.with_name(f".{dump.name[:-26]}.dump.partial")  # _2025-01-27T14-30-00Z.dump
    left.write_text("of a run that was killed")
    before = published(standing.backups)
    standing.back_up()
    assert before.items() - published(standing.backups).items() == {(left.name, before[left.name])}


def test_run_waits_for_a_second_whose_name_is_free(
    make_project: MakeProject, database: Database
) -> None:
    project = make_project(database)
    prefix = project.back_up().name.rpartition("_")[0]
    now = datetime.now(timezone.utc)
    seconds = [now + timedelta(seconds=number) for number in range(4)]
    taken = [project.backups / f"{prefix}_{moment:%Y-%m-%dT%H-%M-%SZ}.dump" for moment in seconds]
    for path in taken:
        path.write_text("somebody's")
    dump = project.back_up()
    assert dump.name > taken[-1].name
    assert {path.read_text() for path in taken} == {"somebody's"}
    project.run("--verify", dump).succeeded()


def test_clock_that_was_set_back_loses_nothing(
    make_project: MakeProject, database: Database
) -> None:
    """Seen from the directory: there are backups from the future, the very next seconds too."""
    project = make_project(database, settings={"BACKUP_KEEP": "100"})
    original = project.back_up()
    now = datetime.now(timezone.utc)
    for seconds in (1, 2, 86400):
        moment = now + timedelta(seconds=seconds)
        stem = f"{database.name}_dev_{moment:%Y-%m-%dT%H-%M-%SZ}"
        values = read_metadata(original)
        values |= {
            "backup_timestamp": f"{moment:%Y-%m-%dT%H:%M:%SZ}",
            "backup_file": f"{stem}.dump",
        }
        (project.backups / f"{stem}.metadata.json").write_text(json.dumps(values), encoding="utf-8")
        (project.backups / f"{stem}.dump").write_bytes(original.read_bytes())
    before = published(project.backups)
    dump = project.back_up()
    assert published(project.backups).items() > before.items()
    listed = project.run("--list").succeeded()
    assert listed.stdout.count("✓ Verified") == 5
    # Of two to keep, the one just made is one, however old its name.
    project.configure({**database.settings(), "BACKUP_KEEP": "2"})
    made = project.run().succeeded()
    assert len(project.dumps()) == 2, made
    assert any(f"Backup File: db/backups/{dump.name}\n" in made.stdout for dump in project.dumps())
    assert not dump.exists()


# -- damage ---------------------------------------------------------------------------------------

Metadata = dict[str, Any]


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def changed(**values: object) -> Callable[[Path], object]:
    """Metadata with other values; None takes the key away."""

    def change(path: Path) -> None:
        metadata = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))

    return change


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


NOT_JSON = "it is not a JSON object"
BAD_METADATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (text(""), NOT_JSON),
    "binary": (lambda path: path.write_bytes(os.urandom(1000) + b"\xff\0"), NOT_JSON),
    "cut off": (lambda path: os.truncate(path, 300), NOT_JSON),
    "deeply nested": (text("[" * 100_000), NOT_JSON),
    "nested in itself": (text('{"a":' * 100_000), NOT_JSON),
    "a list": (text("[]"), "it is not a JSON object"),
    "a number": (text("1e999"), "it is not a JSON object"),
    "null": (text("null"), "it is not a JSON object"),
    "an empty object": (text("{}"), 'the key "backup_timestamp" is missing'),
    "an endless number": (text('{"backup_timestamp":' + "9" * 100_000), NOT_JSON),
    "a directory": (replaced(Path.mkdir), ""),
    "a FIFO": (replaced(os.mkfifo), "it is no metadata file"),
    "a device": (replaced(lambda path: path.symlink_to("/dev/zero")), "it is no metadata file"),
    "a loop of links": (replaced(lambda path: path.symlink_to(path.name)), ""),
    **{
        f"without {key}": (changed(**{key: None}), f'the key "{key}" is missing')
        for key in ("checksum_sha256", "backup_size_bytes", "table_counts", "environment")
    },
    **{
        f"{key} is {value!r:.20}": (changed(**{key: value}), f'the key "{key}" is ')
        for key, value in [
            ("backup_timestamp", "yesterday"),
            ("backup_timestamp", 1769524200),
            ("environment", ["dev"]),
            ("database_name", {}),
            ("backup_size_bytes", "528783"),
            ("backup_size_bytes", True),
            ("backup_size_bytes", -1),
            ("backup_size_bytes", 1.5),
            ("checksum_sha256", "z" * 64),
            ("table_counts", []),
            ("table_counts", {"messages": "3420"}),
            ("table_counts", {"messages": -1}),
            ("table_counts", {"messages": 10**4000}),
        ]
    },
}


@pytest.fixture
def damaged(standing: Project) -> Path:
    """The one dump there is, for the test to damage; it needs no server, and no configuration."""
    (standing.directory / ".env.local").unlink()
    (dump,) = standing.dumps()
    return dump


def test_list_and_verify_name_bad_metadata(standing: Project, damaged: Path) -> None:
    pairs = {}
    for year, (name, (damage, _words)) in enumerate(BAD_METADATA.items(), 1950):
        dump = damaged.with_name(re.sub(r"_\d{4}(?=-\d\d-\d\dT)", f"_{year}", damaged.name))
        shutil.copy(damaged, dump)
        values = {**read_metadata(damaged), "backup_file": dump.name}
        metadata_path(dump).write_text(json.dumps(values), encoding="utf-8")
        damage(metadata_path(dump))
        pairs[name] = dump
    listed = standing.run("--list").succeeded().stdout.splitlines()
    # The file name tells the rest.
    bad = [line[:4] for line in listed if "✗ Bad metadata (" in line]
    assert sorted(bad) == [str(1950 + i) for i in range(len(pairs))]
    verify = standing.run_each(*(("--verify", dump) for dump in pairs.values()))
    for (name, dump), result in zip(pairs.items(), verify, strict=True):
        assert result.returncode in (4, 8), f"{name}: {result}"
        assert "Traceback" not in result.stderr, f"{name}: {result}"
        assert "✗ Backup verification failed" in result.stderr, f"{name}: {result}"
        assert metadata_path(dump).name in result.stderr, f"{name}: {result}"
        assert BAD_METADATA[name][1] in result.stderr, f"{name}: {result}"
    standing.run("--verify", damaged).succeeded()


@pytest.mark.parametrize(
    "values",
    [
        {"metadata_version": 1, "later": {"key": [1, 2]}},
        {"metadata_version": None, "verification": {}},
        {"large_object_count": "none", "not_included": 7, "locale": [], "roles": None},
    ],
)
def test_metadata_of_another_version_is_read(
    values: dict[str, object], standing: Project, damaged: Path
) -> None:
    changed(**values)(metadata_path(damaged))
    standing.run("--list").succeeded()
    standing.run("--verify", damaged).succeeded()


def test_metadata_of_a_newer_release_is_not_guessed_at(standing: Project) -> None:
    """Nor is that backup counted, or removed."""
    (dump,) = standing.dumps()
    changed(metadata_version=2, backup_db_version="2031.1", table_counts=[])(metadata_path(dump))
    result = standing.run("--verify", dump).failed_with(8)
    assert "a newer backup_db.py made this: 2031.1; this is 20" in result.stderr, result
    assert "Bring the metadata file back" not in result.stderr, result
    standing.run(env={"BACKUP_KEEP": "1"}).succeeded()
    listed = standing.run("--list").succeeded().stdout
    assert f"  ✗ Bad metadata ({dump.name})\n" in listed
    assert dump.exists()


def test_run_is_not_disturbed_by_a_damaged_neighbour(
    standing: Project,
) -> None:
    (old,) = standing.dumps()
    metadata = metadata_path(old)
    for damage in (
        replaced(os.mkfifo),
        replaced(text("{")),
        replaced(lambda path: path.symlink_to(path.name)),
    ):
        damage(metadata)
        before = published(standing.backups)
        standing.run().succeeded()
        assert published(standing.backups).items() > before.items()


def empty(dump: Path) -> None:
    os.truncate(dump, 0)


def cut(dump: Path) -> None:
    os.truncate(dump, dump.stat().st_size - 1)


def flip_a_bit(dump: Path) -> None:
    content = bytearray(dump.read_bytes())
    content[len(content) // 2] ^= 1
    dump.write_bytes(content)


def be_directory(dump: Path) -> None:
    dump.unlink()
    dump.mkdir()


def be_fifo(dump: Path) -> None:
    dump.unlink()
    os.mkfifo(dump)


def be_link_to_nowhere(dump: Path) -> None:
    dump.unlink()
    dump.symlink_to("nowhere")


def be_gone(dump: Path) -> None:
    dump.unlink()


@pytest.mark.parametrize(
    ("damage", "status", "words"),
    [
        (empty, "Size mismatch", "bytes, found 0)"),
        (cut, "Size mismatch", "Checksum:    ✗ Mismatch (expected "),
        (flip_a_bit, "Verified", "Checksum:    ✗ Mismatch (expected "),
        (be_directory, "Size mismatch", "is not a .dump file"),
        (be_fifo, "Size mismatch", "is not a .dump file"),
        (be_link_to_nowhere, "Size mismatch", "there is no file"),
        (be_gone, None, "there is no file"),
    ],
)
def test_damaged_dump(
    damage: Callable[[Path], None],
    status: str | None,
    words: str,
    standing: Project,
    damaged: Path,
) -> None:
    damage(damaged)
    listed = standing.run("--list").succeeded()
    lines = [line for line in listed.stdout.splitlines() if line.startswith("20")]
    assert [line.rsplit("  ", 1)[1][2:] for line in lines] == ([status] if status else []), listed
    result = standing.run("--verify", damaged)
    assert result.returncode == 8, result
    assert result.stdout == "", result
    assert "Traceback" not in result.stderr, result
    assert words in result.stderr, result


def test_files_that_may_not_be_read(standing: Project, damaged: Path) -> None:
    for path in (metadata_path(damaged), damaged):
        path.chmod(0)
        result = standing.run("--verify", damaged, prefix=UNPRIVILEGED)
        result.failed_with(4, "Permission error")
        assert f"{path.name}: Permission denied" in result.stderr, result
        listed = standing.run("--list", prefix=UNPRIVILEGED).succeeded()
        assert ("✗ Not readable" in listed.stdout) == (path != damaged), listed
        path.chmod(0o600)
    standing.backups.chmod(0o400)  # its names may be read, and nothing behind them
    listed = standing.run("--list", prefix=UNPRIVILEGED).succeeded()
    assert "✗ Not readable" in listed.stdout, listed


def test_thousands_of_strangers_are_no_matter(standing: Project) -> None:
    for number in range(3000):
        (standing.backups / f"{number}.sql").touch()
        (standing.backups / f"{number}.dump").touch()
    listed = standing.run("--list").succeeded()
    assert listed.stdout.count("✗ No metadata") == 3000
    assert listed.stdout.count("✓ Verified") == 1
    assert "3001 backups" in listed.stdout
    before = published(standing.backups)
    standing.run().succeeded()
    assert published(standing.backups).items() > before.items()
