"""What a power cut, and another user of the machine, would find: by the system calls of a run."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from faults import STRACE, published, untouched
from support import Project, Result, metadata_path, program

# strace is one of Debian's packages.
pytestmark = pytest.mark.servers(15)


@pytest.fixture
def calls(standing: Project, tmp_path: Path) -> list[str]:
    """Every system call about files of a backup, its programs included, under a umask that lets
    everybody in. It goes into a new directory, below one that is new as well."""
    trace = tmp_path / "trace"
    kinds = "trace=open,openat,creat,write,fsync,fdatasync,/^rename,/^unlink,/^mkdir,/^chmod"
    umask = ("sh", "-c", 'umask 000; exec "$@"', "sh")
    strace = (
        program("strace", "strace"),
        "-f",
        "-y",
        "-qq",
        "-s",
        "200",
        "-o",
        str(trace),
        "-e",
        kinds,
    )
    standing.run("--output-dir", tmp_path / "new" / "er", prefix=(*umask, *strace)).succeeded()
    return trace.read_text(errors="replace").splitlines()


def position(calls: list[str], pattern: str) -> int:
    """Where the one call is that matches."""
    found = [number for number, call in enumerate(calls) if re.search(pattern, call)]
    assert len(found) == 1, f"{pattern} matches {[calls[number] for number in found]}"
    return found[0]


def test_all_is_on_the_disk_before_it_has_its_name_and_before_it_is_reported(
    calls: list[str],
) -> None:
    dump, metadata = r"\.dump\.partial>", r"\.metadata\.json\.partial>"
    directory = r"\bfsync\(\d+<[^>]*/new/er>"
    synced = [number for number, call in enumerate(calls) if re.search(directory, call)]
    assert len(synced) == 2, "once for each of the two names"
    order = {
        "the last byte of the dump is written": max(
            number for number, call in enumerate(calls) if re.search(rf"write\(\d+<.*{dump}", call)
        ),
        "the dump is synced": position(calls, rf"fsync\(\d+<.*{dump}"),
        "the metadata is written": position(calls, rf"write\(\d+<.*{metadata}"),
        "the metadata is synced": position(calls, rf"fsync\(\d+<.*{metadata}"),
        "the metadata gets its name": position(calls, r'rename.*, "[^"]*Z\.metadata\.json"'),
        "that name is synced": synced[0],
        "the dump gets its name": position(calls, r'rename.*, "[^"]*Z\.dump"'),
        "and that": synced[1],
        "it is reported": position(
            calls, r"write\(1<.*Backup created successfully".replace("✓", "")
        ),
    }
    assert list(order.values()) == sorted(order.values()), order


def test_new_directories_are_on_the_disk_too(calls: list[str]) -> None:
    published = position(calls, r'rename.*, "[^"]*Z\.dump"')
    assert position(calls, r"fsync\(\d+<[^>]*/new>") < published
    assert any(re.search(r"fsync\(\d+<[^>]*/test_[^/>]*>", call) for call in calls[:published])


def test_files_are_private_from_their_first_byte(calls: list[str]) -> None:
    ours = [call for call in calls if "/new/er" in call]
    created = [call for call in ours if "O_CREAT" in call and "O_TRUNC" not in call]
    assert len(created) == 3, created  # the lock, the dump, the metadata
    assert all(call.partition(" = ")[0].endswith(", 0600)") for call in created), created
    # Whatever writes to a file, pg_dump too, finds it there: it has got its name before.
    claimed = {match.group(1) for call in ours if (match := re.search(r'rename.*, "(.*)"', call))}
    written = [call.split('"')[1] for call in ours if "O_TRUNC" in call]
    assert len(written) == 2, written
    assert set(written) < claimed
    assert not [call for call in ours if "chmod" in call]


# -- what fails while the names are given ---------------------------------------------------------


def run_with_fault(project: Project, *fault: str) -> Result:
    """A run in which the kernel refuses a call of the script itself."""
    return project.run(
        prefix=(program("strace", "strace"), *STRACE, *fault),
        env={"PYTHONDONTWRITEBYTECODE": "1"},  # Python renames these
    )


def visible(project: Project) -> dict[str, str]:
    """What anyone would take for a backup; what is hidden the next run sweeps."""
    files = published(project.backups).items()
    return {name: content for name, content in files if not name.startswith(".")}


def test_rename_that_fails_publishes_nothing(standing: Project) -> None:
    """Each in turn. The last is the dump's, when the metadata has its name already."""
    before = published(standing.backups)
    for number in itertools.count(1):
        earlier = visible(standing)
        result = run_with_fault(standing, "-e", f"inject=/^rename:error=EIO:when={number}")
        if result.returncode == 0:
            break
        assert "Input/output error" in result.failed_with(7, "Backup creation error").stderr
        assert visible(standing) == earlier
    assert number > 2, "at least the metadata and the dump are renamed"
    (dump,) = (path for path in standing.dumps() if path.name not in before)
    new = published(standing.backups).keys() - before.keys()
    assert new == {dump.name, metadata_path(dump).name}


def test_directory_that_is_not_synced_shows_no_metadata_alone(standing: Project) -> None:
    """Once for the metadata's name, once for the dump's: then the backup is there, and whole."""
    calls = ("-P", str(standing.backups), "-e")
    with untouched(standing):
        result = run_with_fault(standing, *calls, "inject=fsync:error=EIO:when=1")
        assert "Input/output error" in result.failed_with(7, "Backup creation error").stderr
    before = published(standing.backups)
    result = run_with_fault(standing, *calls, "inject=fsync:error=EIO:when=2")
    assert "Error: db/backups: Input/output error\n" in result.failed_with(7).stderr
    (dump,) = (path for path in standing.dumps() if path.name not in before)
    new = published(standing.backups).keys() - before.keys()
    assert new == {dump.name, metadata_path(dump).name}
    standing.run("--verify", dump).succeeded()
