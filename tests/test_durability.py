"""What a power cut, and another user of the machine, would find: by the system calls of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import Project, program

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
