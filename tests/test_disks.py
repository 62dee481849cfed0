"""What a disk, a directory and its permissions can do to a run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeProject
from faults import CONTENTS, DUMP, FILE, HOLD, fake_call, let_go, paused, published, untouched
from support import (
    UNPRIVILEGED,
    Backup,
    Database,
    Project,
    finish,
    read_metadata,
    small_disk,
    wait_until,
)

PAGE = 4096  # a tmpfs gives room by the page


def earlier_size(project: Project) -> int:
    """What a dump of the standing database takes: the next one is as large."""
    return project.dumps()[0].stat().st_size


def with_backups(directory: Path, project: Project) -> Path:
    """The directory, with the earlier backups in it."""
    return Path(shutil.copytree(project.backups, directory))


# -- full disks -----------------------------------------------------------------------------------


# The free pages are those that the dump needs, less a half, or plus or minus one.
@pytest.mark.parametrize(
    ("pages", "words"),
    [
        (lambda _size: 0, "could not write to output file: No space left on device"),
        (lambda size: size // PAGE // 2, ": No space left on device"),
        # pg_dump 15 to 18 exit 0 when the last write of all fails.
        (lambda size: size // PAGE, "the disk is full: the new dump does not hold"),
        (lambda size: size // PAGE + 1, ".metadata.json.partial: No space left on device"),
    ],
    ids=["before", "during", "at the last buffer", "for the metadata"],
)
def test_full_disk(pages: Callable[[int], int], words: str, standing: Project) -> None:
    # Or it stops before; and no tick comes that could see the file grow, and stop it.
    constants = {"NEED_OF_LAST_BACKUP": 0, "NEED_OF_DATABASE": 0, "RESERVE_SHARE": 0}
    standing.rewrite({**constants, "TICK_SECONDS": 60})
    size = earlier_size(standing)
    assert size % PAGE, "the dump ends with a page, and so has no last buffer to lose"
    with small_disk("size=8m") as disk:
        directory = with_backups(disk / "backups", standing)
        space = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes((space.f_bavail - pages(size)) * space.f_frsize))
        before = published(directory)
        result = standing.run("--output-dir", directory).failed_with(5, "Disk space error")
        assert re.search(words, result.stderr), result
        assert f"df -h {directory}; df -i {directory}\n" in result.stderr, result
        assert published(directory) == before
        (disk / "filler").unlink()
        standing.run("--output-dir", directory).succeeded()
        assert published(directory).items() > before.items()


@pytest.mark.parametrize("growth", [1, 2, 0.5], ids=["as large", "grown", "shrunk"])
def test_disk_with_too_little_space_is_refused_before_anything_is_written(
    growth: float, standing: Project
) -> None:
    """Four fifths of the last backup, as far as the database has grown since, or shrunk."""
    standing.rewrite({"RESERVE_SHARE": 0})
    (dump,) = standing.dumps()
    database_size = int(read_metadata(dump)["database_size_bytes"] / growth)
    Backup(dump, standing).edit(database_size_bytes=database_size)
    need = 0.8 * growth * dump.stat().st_size
    with small_disk("size=4m") as disk:
        directory = with_backups(disk / "backups", standing)
        (disk / "filler").write_bytes(bytes(free_bytes(disk) - int(0.9 * need)))
        before = published(directory)
        fake_call(standing, *DUMP, "touch $HOME/called")
        result = standing.run("--output-dir", directory).failed_with(5, "Disk space error")
        assert published(directory) == before
    told = re.search(r"KB free, at least (\d+\.\d) KB needed", result.stderr)
    assert told, result
    assert float(told[1]) == pytest.approx(need / 1024, rel=0.05), result
    assert not (standing.directory / "home" / "called").exists()


@pytest.mark.parametrize("free", [0, 1])
def test_no_inodes(free: int, standing: Project) -> None:
    """For the dump and its metadata two are needed; the lock file is there."""
    with small_disk("size=8m,nr_inodes=40") as disk:
        directory = with_backups(disk / "backups", standing)
        for number in range(os.statvfs(disk).f_favail - free):
            (disk / str(number)).touch()
        before = published(directory)
        result = standing.run("--output-dir", directory).failed_with(5, "Disk space error")
        assert "No space left on device" in result.stderr, result
        assert f"df -i {directory}\n" in result.stderr, result
        assert published(directory) == before


@pytest.mark.parametrize("limit", [0, 100_000])
def test_limit_on_file_sizes(limit: int, standing: Project) -> None:
    with untouched(standing):
        result = standing.run(prefix=["prlimit", f"--fsize={limit}"])
        result.failed_with(7, "Backup creation error")
    assert "ulimit -f" in result.stderr, result
    standing.back_up()


# -- a disk that others live on -------------------------------------------------------------------

MB = 1024 * 1024
SHARED_MB = 512
RESERVE = SHARED_MB * MB // 50  # 2 % of the disk, which is less than 256 MB


def free_bytes(disk: Path) -> int:
    space = os.statvfs(disk)
    return space.f_bavail * space.f_frsize


def allocate(path: Path, size: int) -> None:
    """Make the file larger, all at once."""
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + size)


# A pg_dump whose file grows by 8 MB at once, and not again before somebody has looked. It is out of
# step with the ticks of the run, which must not stop it before the test has seen the growth.
STEP_MB = 8
GROWING = f"""
{FILE}
for step in $(seq 0 {STEP_MB} {SHARED_MB}); do
    fallocate --offset "${{step}}MiB" --length {STEP_MB}MiB "$file" || exit 1
    sleep 0.55
done
"""


def test_reserve_is_left_to_whom_the_disk_is_shared_with(standing: Project) -> None:
    fake_call(standing, *DUMP, GROWING)
    with small_disk(f"size={SHARED_MB}m") as disk:
        directory = with_backups(disk / "backups", standing)
        allocate(disk / "theirs", free_bytes(disk) - 66 * MB)
        before = published(directory)
        process = standing.start("--output-dir", directory)
        least, written = free_bytes(disk), 0
        while process.poll() is None:
            growth = partial_size(directory) - written
            if growth > 0:
                written += growth
                allocate(disk / "theirs", growth // 2)
            if (least := min(least, free_bytes(disk))) < RESERVE:
                process.kill()
            time.sleep(0.01)
        result = finish(process).failed_with(5, "Disk space error")
        assert published(directory) == before
    assert least < RESERVE + 30 * MB, result
    # How far it came: a last step may be over before this test has seen it.
    (came,) = re.findall(r"now of (\d+)\.0 MB", result.stderr)
    assert int(came) - written // MB in {0, STEP_MB}, result
    assert f"{earlier_size(standing) / 1024:.1f} KB" in result.stderr, result  # the last backup
    assert f"{directory}: " in result.stderr, result


def partial_size(directory: Path) -> int:
    """What the dump that is being written has come to; the run may remove it at any moment."""
    sizes = [0]
    for path in directory.glob(".*.dump.partial"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            sizes.append(status.st_size if status.st_blocks else 0)
    return sum(sizes)


def test_reserve_is_left_by_pg_dump_itself(make_project: MakeProject, database: Database) -> None:
    """Of incompressible rows, by the slowest compression: it comes to some MB a second."""
    database.psql(
        "CREATE TABLE t AS SELECT sha512(i::text::bytea) FROM generate_series(1, 200000) i"
    )
    project = make_project(database, settings={"BACKUP_COMPRESS": "gzip:9"})
    with small_disk(f"size={SHARED_MB}m") as disk:
        allocate(disk / "theirs", free_bytes(disk) - RESERVE - 6 * MB)
        process = project.start("--output-dir", disk / "backups")
        least = free_bytes(disk)
        while process.poll() is None:
            least = min(least, free_bytes(disk))
            time.sleep(0.01)
        result = finish(process).failed_with(5, "Disk space error")
        assert "No space left on device" not in result.stderr, result
        assert [path.name for path in (disk / "backups").iterdir()] == [
            f".{database.name}_dev.lock"
        ]
    assert least >= RESERVE * 3 // 4, result  # a look may come late on a busy machine


def test_reserve_is_part_of_the_need(standing: Project) -> None:
    fake_call(standing, *DUMP, "touch $HOME/called")
    with small_disk(f"size={SHARED_MB}m") as disk:
        directory = with_backups(disk / "backups", standing)
        allocate(disk / "theirs", free_bytes(disk) - RESERVE)
        before = published(directory)
        standing.run("--output-dir", directory).failed_with(5, "Disk space error")
        assert published(directory) == before
    assert not (standing.directory / "home" / "called").exists()


# -- directories ----------------------------------------------------------------------------------


def be_a_file(path: Path) -> Path:
    path.touch()
    return path


def lie_below_a_file(path: Path) -> Path:
    path.touch()
    return path / "backups"


def be_a_dangling_link(path: Path) -> Path:
    path.symlink_to("nowhere")
    return path


def be_closed(path: Path) -> Path:
    path.mkdir(mode=0o500)
    return path


def lie_below_a_closed_one(path: Path) -> Path:
    path.mkdir(mode=0o500)
    return path / "backups"


def be_no_longer_searchable(path: Path) -> Path:
    path.mkdir(mode=0o600)
    return path


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (be_a_file, "{}: Not a directory"),
        (lie_below_a_file, "{}: Not a directory"),
        (be_a_dangling_link, "{}: Not a directory"),
        (be_closed, "{}/.{}_dev.lock: Permission denied"),
        (lie_below_a_closed_one, "{}: Permission denied"),
        (be_no_longer_searchable, "{}/.{}_dev.lock: Permission denied"),
    ],
)
def test_output_directory_that_cannot_be_used(
    prepare: Callable[[Path], Path],
    words: str,
    standing: Project,
    standing_database: Database,
    tmp_path: Path,
) -> None:
    directory = prepare(tmp_path / "odd")
    result = standing.run("--output-dir", directory, prefix=UNPRIVILEGED)
    result.failed_with(4, "Permission error")
    assert words.format(directory, standing_database.name) in result.stderr, result
    assert f"ls -ld {tmp_path}" in result.stderr, result


def test_read_only_disk(standing: Project) -> None:
    with small_disk("size=8m") as disk:
        directory = with_backups(disk / "backups", standing)
        holder = disk.parts[2]
        remount = ["nsenter", f"--mount=/proc/{holder}/ns/mnt", "mount", "-o", "remount,ro", "/tmp"]
        assert os.spawnvp(os.P_WAIT, remount[0], remount) == 0
        before = published(directory)
        result = standing.run("--output-dir", directory).failed_with(4, "Permission error")
        assert "Read-only file system" in result.stderr, result
        standing.run("--list", "--output-dir", directory).succeeded()
        standing.run("--verify", next(directory.glob("*.dump"))).succeeded()
        assert published(directory) == before


def test_lock_file_of_another_user(standing: Project, standing_database: Database) -> None:
    lock = standing.backups / f".{standing_database.name}_dev.lock"
    lock.unlink()
    lock.touch(mode=0o400)
    with untouched(standing):
        result = standing.run(prefix=UNPRIVILEGED).failed_with(4, "Permission error")
    assert f"{lock.name}: Permission denied" in result.stderr, result


@pytest.mark.parametrize(
    ("call", "code"), [(DUMP, 7), (CONTENTS, 7)], ids=["dumping", "reading back"]
)
def test_directory_removed_meanwhile(call: tuple[str, str], code: int, standing: Project) -> None:
    fake_call(standing, *call, HOLD)
    process = standing.start()
    wait_until(lambda: paused(standing))
    shutil.rmtree(standing.backups)
    let_go(standing)
    result = finish(process).failed_with(code)
    assert "No such file or directory" in result.stderr, result
    assert not standing.backups.exists()
    standing.back_up()


def test_directory_closed_meanwhile(standing: Project) -> None:
    """What has to stay is hidden; the next run sweeps it."""
    before = published(standing.backups)
    fake_call(standing, *CONTENTS, HOLD)
    process = standing.start(prefix=UNPRIVILEGED)
    wait_until(lambda: paused(standing))
    standing.backups.chmod(0o500)
    let_go(standing)
    result = finish(process).failed_with(4, "Permission error")
    assert "Permission denied" in result.stderr, result
    standing.backups.chmod(0o700)
    assert all(name.startswith(".") for name in published(standing.backups).keys() - before.keys())
    dump = standing.back_up()
    new = published(standing.backups).keys() - before.keys()
    assert new == {dump.name, dump.name.removesuffix(".dump") + ".metadata.json"}


def test_new_directory_is_private_and_an_old_one_stays_as_it_is(
    standing: Project, tmp_path: Path
) -> None:
    standing.run("--output-dir", tmp_path / "a" / "b").succeeded()
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    (tmp_path / "old").mkdir(mode=0o755)
    standing.run("--output-dir", tmp_path / "old").succeeded()
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o755
