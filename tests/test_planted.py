"""An output directory that belongs to somebody else, who lays something where a run will write.

Whoever owns a directory may rename and replace every file in it, root's too, at any moment.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from faults import CONTENTS, DUMP, HOLD, fake_call, let_go, paused, published
from support import Database, Project, finish, metadata_path, program, wait_until

STRANGER = 65534
PRECIOUS = "what nobody but its owner may change\n"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file elsewhere, which a planted name leads to."""
    path = tmp_path / "precious"
    path.write_text(PRECIOUS)
    path.chmod(0o600)
    return path


@pytest.fixture
def theirs(standing: Project) -> Project:
    """A project whose backups lie in another user's directory."""
    give_away(standing.backups)
    return standing


def give_away(path: Path) -> None:
    if os.geteuid() == 0:  # for anybody else what follows is as bad in a directory of their own
        os.chown(path, STRANGER, STRANGER)


def state(path: Path) -> tuple[str, int, int]:
    """All of a file that a run could change."""
    status = path.stat()
    return path.read_text(), status.st_mode, status.st_mtime_ns


# -- the lock -------------------------------------------------------------------------------------

Plant = Callable[[Path, Path], object]

LOCKS: dict[str, Plant] = {
    "a symbolic link": lambda lock, precious: lock.symlink_to(precious),
    "a link to nowhere": lambda lock, precious: lock.symlink_to(f"{precious}.new"),
    "a hard link": lambda lock, precious: os.link(precious, lock),
    "a FIFO": lambda lock, _precious: os.mkfifo(lock),
    "a directory": lambda lock, _precious: lock.mkdir(),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_lock_that_is_no_plain_file(
    kind: str, theirs: Project, standing_database: Database, precious: Path
) -> None:
    lock = theirs.backups / f".{standing_database.name}_dev.lock"
    lock.unlink()
    LOCKS[kind](lock, precious)
    before, precious_before = published(theirs.backups), state(precious)
    result = theirs.run().failed_with(4, "Permission error")
    assert lock.name in result.stderr, result
    assert re.search(rf"ls -l\w* \S*{lock.name}$", result.stderr, re.MULTILINE), result
    assert state(precious) == precious_before
    assert published(theirs.backups) == before
    assert not Path(f"{precious}.new").exists()


def test_lock_of_another_user_is_one(theirs: Project, standing_database: Database) -> None:
    """NFS and CIFS show other owners than those that made a file."""
    lock = theirs.backups / f".{standing_database.name}_dev.lock"
    lock.unlink()
    lock.touch(mode=0o600)
    give_away(lock)
    theirs.back_up()


# -- the files of a run that goes on --------------------------------------------------------------


def partial(project: Project, database: Database, suffix: str) -> Path:
    """The hidden file of the run that goes on."""
    (path,) = project.backups.glob(f".{database.name}_dev{suffix}.partial")
    return path


SWAPS: dict[str, Plant] = {
    "a symbolic link": lambda path, precious: path.symlink_to(precious),
    "a hard link": lambda path, precious: os.link(precious, path),
    "a copy": lambda path, precious: path.write_bytes(precious.read_bytes()),
    "a FIFO": lambda path, _precious: os.mkfifo(path),
}


@pytest.mark.parametrize(
    ("call", "suffix", "kind"),
    [
        (DUMP, ".dump", "a symbolic link"),
        (DUMP, ".dump", "a copy"),
        (DUMP, ".dump", "a FIFO"),
        (DUMP, ".metadata.json", "a hard link"),
        (CONTENTS, ".dump", "a symbolic link"),
        (CONTENTS, ".metadata.json", "a symbolic link"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[0]),
)
def test_file_swapped_while_the_run_goes_on(
    call: tuple[str, str],
    suffix: str,
    kind: str,
    theirs: Project,
    standing_database: Database,
    precious: Path,
) -> None:
    before, precious_before = published(theirs.backups), state(precious)
    fake_call(theirs, *call, HOLD)
    process = theirs.start()
    wait_until(lambda: paused(theirs))
    path = partial(theirs, standing_database, suffix)
    path.rename(path.with_name("mine"))
    SWAPS[kind](path, precious)
    let_go(theirs)
    result = finish(process, 20)
    assert result.returncode in (4, 7), result
    assert path.name in result.stderr, result
    assert state(precious) == precious_before
    (theirs.backups / "mine").unlink(missing_ok=True)
    left = published(theirs.backups)
    assert left.items() >= before.items()
    assert left.keys() - before.keys() <= {path.name}  # the stranger's own
    theirs.back_up()
    assert state(precious) == precious_before


@pytest.mark.parametrize("suffix", [".dump", ".metadata.json"])
def test_link_to_nowhere_under_the_final_name_stays(
    suffix: str, theirs: Project, standing_database: Database
) -> None:
    """A rename would replace it, and whoever laid it there would miss it."""
    before = published(theirs.backups)
    fake_call(theirs, *CONTENTS, HOLD)
    started = datetime.now(timezone.utc)
    process = theirs.start()
    wait_until(lambda: paused(theirs))
    seconds = int((datetime.now(timezone.utc) - started).total_seconds()) + 2
    links = [
        theirs.backups / f"{standing_database.name}_dev_{moment:%Y-%m-%dT%H-%M-%SZ}{suffix}"
        for moment in (started + timedelta(seconds=second) for second in range(seconds))
    ]
    for link in links:
        link.symlink_to("nowhere")
    let_go(theirs)
    result = finish(process).failed_with(4, "Permission error")
    assert "File exists" in result.stderr, result
    after = published(theirs.backups)
    assert after.items() - before.items() == {(link.name, after[link.name]) for link in links}
    assert all(os.readlink(link) == "nowhere" for link in links)


def test_everything_goes_through_the_descriptors(theirs: Project) -> None:
    """Both names lead elsewhere for the whole of pg_dump and of the read-back, and come back."""
    for number, (tool, option) in enumerate([DUMP, CONTENTS]):
        away = 'for f in .*.partial; do mv "$f" "away$f"; done'
        back = 'for f in away.*; do mv "$f" "${f#away}"; done'
        there = f'cd "{theirs.backups}"; touch $HOME/swapped{number}'
        fake_call(
            theirs,
            tool,
            option,
            f'({there}; {away}); "$real" "$@"; s=$?; ({there}; {back}); exit $s',
        )
    dump = theirs.back_up()
    assert {path.name for path in (theirs.directory / "home").iterdir()} == {"swapped0", "swapped1"}
    theirs.run("--verify", dump).succeeded()
    assert stat.S_ISREG(dump.lstat().st_mode)


def test_pg_dump_is_given_a_descriptor_of_its_own(theirs: Project) -> None:
    fake_call(theirs, *DUMP, 'printf "%s\\n" "$@" >$HOME/words; exec "$real" "$@"')
    theirs.back_up()
    (file,) = re.findall(
        r"^--file=(.*)$", (theirs.directory / "home" / "words").read_text(), re.MULTILINE
    )
    match = re.fullmatch(r"/dev/fd/(\d+)", file)
    assert match, file
    assert int(match.group(1)) >= 100  # none that pg_dump opens itself


# What a tool says of the file that it was given, and how its call is recognized.
WORDS = {
    "pg_dump": (DUMP, "pg_dump: error: could not write to output file {}: Input/output error"),
    "pg_restore": (CONTENTS, "pg_restore: error: could not read from input file {}"),
}


@pytest.mark.parametrize("tool", WORDS)
def test_messages_show_the_name_of_the_file(tool: str, theirs: Project) -> None:
    call, words = WORDS[tool]
    said = words.format('\\"$file\\"')
    fake_call(
        theirs,
        *call,
        'for word; do case "$word" in *.dump.partial|*/fd/*) file=${word#--file=} ;; esac; done;'
        f'echo "{said}" >&2; exit 1',
    )
    result = theirs.run()
    assert result.returncode in (7, 8), result
    assert "/dev/fd" not in result.stderr, result
    assert words.partition("{}")[0] in result.stderr, result
    assert re.search(r"dump(\.partial)?\"", result.stderr), result


# -- what is swept and retired --------------------------------------------------------------------


def test_link_among_the_leftovers_is_removed_and_not_what_it_leads_to(
    theirs: Project, standing_database: Database, precious: Path
) -> None:
    before = state(precious)
    stem = f".{standing_database.name}_dev"
    for suffix in (".dump.partial", ".metadata.json.partial"):
        (theirs.backups / (stem + suffix)).symlink_to(precious)
    theirs.back_up()
    assert state(precious) == before
    for suffix in (".dump.partial", ".metadata.json.partial"):
        assert not os.path.lexists(theirs.backups / (stem + suffix))


def test_link_that_is_retired_is_removed_and_not_what_it_leads_to(
    theirs: Project, tmp_path: Path
) -> None:
    (old,) = theirs.dumps()
    elsewhere = tmp_path / old.name
    old.rename(elsewhere)
    old.symlink_to(elsewhere)
    theirs.run(env={"BACKUP_KEEP": "1"}).succeeded()
    assert not old.is_symlink()
    assert elsewhere.exists()


def test_past_backups_are_read_and_removed_under_the_lock(theirs: Project, tmp_path: Path) -> None:
    """Another run could begin to read them, or remove the same ones. And they may be on a slow
    disk: they are read before any table is locked."""
    (old,) = theirs.dumps()
    trace = tmp_path / "trace"
    strace = (program("strace", "strace"), "-f", "--seccomp-bpf", "-y", "-qq", "-o", str(trace))
    kinds = ("-e", "trace=flock,openat,sendto,/^unlink,close,/^dup")
    theirs.run(prefix=(*strace, *kinds), env={"BACKUP_KEEP": "1"}).succeeded()
    assert not old.exists()
    calls = trace.read_text(errors="replace").splitlines()

    def moments(pattern: str) -> list[int]:
        return [number for number, call in enumerate(calls) if re.search(pattern, call)]

    (locked,) = moments(r"flock\(\d+<.*_dev\.lock>, LOCK_EX")
    reads = moments(rf'openat\(.*/{metadata_path(old).name}"')  # for the list, and for its tables
    (tables_locked,) = moments(r"sendto\(.*LOCK TABLE ONLY")
    (removed,) = moments(rf'unlink.*/{old.name}"')
    unlocked = max(moments(r"close\(\d+<.*_dev\.lock>"))
    assert locked < min(reads) <= max(reads) < tables_locked < removed < unlocked
