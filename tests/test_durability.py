"""What a power cut, and another user of the machine, would find: by the system calls of a run.

And what a run makes of a file system that answers some of these calls as few do.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import project_maker
from faults import DUMP, HOLD, STRACE, fake_call, let_go, paused, published, untouched
from support import Database, Project, Result, finish, metadata_path, program, wait_until


@pytest.fixture(scope="module")
def calls(
    cluster: Cluster, standing_database: Database, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Every system call about files of a backup, its programs included, under a umask that lets
    everybody in. It goes into a new directory, below one that is new as well."""
    folder = tmp_path_factory.mktemp("calls")
    trace = folder / "trace"
    kinds = "trace=/^(open|creat|write|preadv|fadvise|fsync|rename|unlink|mkdir|chmod)"
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
    project = project_maker(folder, cluster)(standing_database)
    project.run("--output-dir", folder / "new" / "er", prefix=(*umask, *strace)).succeeded()
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
        "whoever reads it now reads the disk": position(calls, rf"fadvise.*{dump}.*DONTNEED"),
        "the hash begins": min(
            number for number, call in enumerate(calls) if re.search(rf"preadv.*{dump}", call)
        ),
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
    assert any(re.search(r"fsync\(\d+<[^>]*/calls0>", call) for call in calls[:published])


def test_files_are_private_from_their_first_byte(calls: list[str]) -> None:
    ours = [call for call in calls if "/new/er" in call]
    created = [call for call in ours if "O_CREAT" in call and "O_TRUNC" not in call]
    assert len(created) == 3, created  # the lock, the dump, the metadata
    assert all(call.partition(" = ")[0].endswith(", 0600)") for call in created), created
    assert not [call for call in ours if "chmod" in call]


def test_names_in_the_directory_are_not_trusted(calls: list[str]) -> None:
    """What is made is new, what is there is no link, and no name is opened again to be written."""
    created = [call for call in calls if "/new/er" in call and ", 0600)" in call]
    assert all("O_NOFOLLOW" in call for call in created), created
    assert all("O_EXCL" in call for call in created if ".partial" in call), created
    written = [call for call in calls if "/new/er" in call and "O_TRUNC" in call]
    assert all(call.split('"')[1].startswith("/dev/fd/") for call in written), written


def test_dump_is_synced_by_a_descriptor_that_may_write(calls: list[str]) -> None:
    """CIFS refuses it to any other."""
    synced = position(calls, r"fsync\(\d+<.*\.dump\.partial>")
    opened = [call for call in calls[:synced] if re.search(r'open.*\.dump\.partial"', call)]
    assert opened
    assert not [call for call in opened if "O_RDONLY" in call]


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


# -- file systems without a convenience: NFS, CIFS, FUSE, FAT -------------------------------------


def injecting(call: str, what: str, *options: str) -> tuple[str, ...]:
    """A prefix for a command one of whose system calls is answered otherwise."""
    strace = (program("strace", "strace"), "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null")
    return (*strace, *options, "-e", f"trace={call}", "-e", f"inject={call}:{what}")


@contextlib.contextmanager
def failing(process: subprocess.Popen[bytes], call: str, path: Path, error: str) -> Iterator[None]:
    """The same for a process that runs, and its calls about one file."""
    strace = program("strace", "strace")
    options = ("-f", "-p", str(process.pid), "-P", str(path), "-o", "/dev/null")
    inject = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}")
    with subprocess.Popen([strace, *options, *inject], stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr
        assert b"attached" in tracer.stderr.readline()
        yield
        process.wait(60)
        tracer.send_signal(signal.SIGINT)


@pytest.mark.parametrize("error", ["EACCES", "EPERM", "EBADF", "ENOSYS", "EINVAL", "EIO"])
def test_directory_that_cannot_be_synced(error: str, standing: Project) -> None:
    """The files can, and are whole: that it is worse than not to be able to is worth a word."""
    before = published(standing.backups)
    prefix = injecting("fsync", f"error={error}", "-P", str(standing.backups))
    result = standing.run(prefix=prefix).succeeded()
    assert published(standing.backups).items() > before.items()
    if error == "EIO":
        assert re.search(r"^Warning: .*Input/output error", result.stderr, re.MULTILINE), result
        assert "db/backups" in result.stderr, result
    else:
        assert result.stderr == ""


@pytest.mark.parametrize("error", ["EIO", "EINVAL"])
def test_nothing_is_retired_behind_a_name_that_may_not_be_on_the_disk(
    error: str, standing: Project
) -> None:
    """The power may fail now, and the new backup be gone. The next night retires for both."""
    before = published(standing.backups)
    keep = {"BACKUP_KEEP": "1"}
    prefix = injecting("fsync", f"error={error}", "-P", str(standing.backups))
    result = standing.run(prefix=prefix, env=keep).succeeded()
    left = published(standing.backups).items()
    assert ("Removed:" in result.stdout) == (error != "EIO"), result
    assert (left > before.items()) == (error == "EIO"), result
    standing.run(env=keep).succeeded()
    assert len(standing.dumps()) == 1


@pytest.mark.parametrize(
    ("call", "kind", "named"),
    [
        ("fsync", "dump", "_dev.dump.partial"),
        ("fsync", "metadata.json", "_dev.metadata.json.partial"),
        ("/^lseek", "dump", "db/backups"),  # any other: where it was is said all the same
    ],
)
def test_call_that_fails_says_for_which_file(
    call: str, kind: str, named: str, standing: Project, standing_database: Database
) -> None:
    fake_call(standing, *DUMP, HOLD)
    with untouched(standing):
        process = standing.start()
        wait_until(lambda: paused(standing))
        (path,) = standing.backups.glob(f".{standing_database.name}_dev.{kind}.partial")
        with failing(process, call, path, "EIO"):
            let_go(standing)
        result = finish(process).failed_with(7, "Backup creation error")
    assert f"{named}: Input/output error" in result.stderr, result


def test_dump_that_is_gone_while_it_is_verified_is_named(standing: Project) -> None:
    """On NFS any call may fail so, when the file was removed on the other side."""
    (dump,) = standing.dumps()
    fault = injecting("/^lseek", "error=ESTALE", "-P", str(dump))
    result = standing.run("--verify", dump, prefix=fault).failed_with(8)
    assert f"{dump.name}: Stale file handle\n" in result.stderr, result


@pytest.mark.parametrize("call", ["/^ftruncate", "write"])
def test_lock_that_cannot_be_written(
    call: str, standing: Project, standing_database: Database
) -> None:
    lock = standing.backups / f".{standing_database.name}_dev.lock"
    with untouched(standing):
        result = standing.run(prefix=injecting(call, "error=EIO", "-P", str(lock)))
        result.failed_with(7, "Backup creation error")
    assert re.search(rf"^Error: .*{lock.name}: Input/output error$", result.stderr, re.MULTILINE)


def test_file_that_cannot_be_renamed(standing: Project, standing_database: Database) -> None:
    quiet = {"PYTHONDONTWRITEBYTECODE": "1"}  # Python renames these
    with untouched(standing):
        result = standing.run(prefix=injecting("/^rename", "error=EIO"), env=quiet)
        result.failed_with(7, "Backup creation error")
    error = rf"^Error: .*/\.{standing_database.name}_dev\..*\.partial: Input/output error"
    assert re.search(error, result.stderr, re.MULTILINE), result


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP"])
def test_mount_without_locks(error: str, standing: Project, standing_database: Database) -> None:
    with untouched(standing):
        result = standing.run(prefix=injecting("flock", f"error={error}"))
        result.failed_with(4, "Permission error")
    assert f".{standing_database.name}_dev.lock" in result.stderr, result
    assert "no locks" in result.stderr, result
    assert "--output-dir" in result.stderr, result


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("/^f?statfs$", "error=ENOSYS"),
        ("/^f?statfs$", f"poke_exit=@arg2={'00' * 64}"),  # 0 blocks
        ("/^fadvise64", "error=ENOSYS"),
    ],
    ids=["no free space told", "0 blocks", "no advice taken"],
)
def test_what_a_run_can_do_without(call: str, answer: str, standing: Project) -> None:
    standing.run(prefix=injecting(call, answer)).succeeded()


def test_blocks_that_root_alone_may_use_are_not_free(standing: Project) -> None:
    """ext4 keeps some back."""
    blocks, inodes, fragment = (1_000_000, 1_000_000, 0), (1_000_000, 1_000_000), (0, 255, 4096)
    answer = struct.pack("<14Q", 0xEF53, 4096, *blocks, *inodes, *fragment, 0, 0, 0, 0).hex()
    with untouched(standing):
        result = standing.run(prefix=injecting("/^f?statfs$", f"poke_exit=@arg2={answer}"))
        result.failed_with(5, "Disk space error")
    assert ": 0 B free, " in result.stderr, result


def test_file_system_that_ends_a_file_at_4_gb(standing: Project) -> None:
    """FAT32 does, by an error that few know."""
    words = "pg_dump: error: could not write to output file: File too large"
    fake_call(standing, *DUMP, f"echo '{words}' >&2; exit 1")
    with untouched(standing):
        result = standing.run().failed_with(7, "Backup creation error")
    assert words in result.stderr, result
    assert "FAT" in result.stderr, result
    assert "4 GB" in result.stderr, result
