"""A machine that has no room: for a process, a thread, memory or another open file.

That is neither a bug nor damage, and nothing is half-made.
"""

from __future__ import annotations

import itertools
import json

import pytest
from faults import STRACE, processes_of, published, untouched
from support import Project, Result, metadata_path, program

NO_ROOM = "Error: no room on this machine for memory, a process, a thread or an open file: "


def assert_no_room(result: Result, code: int, category: str, project: Project) -> None:
    result.failed_with(code, category)
    assert NO_ROOM in result.stderr, result
    assert "free -m; ulimit -a\n" in result.stderr, result
    assert processes_of(project) == {}


# Every third of them, until one is beyond the last that the script needs.
REFUSED = "/^(clone3?|v?fork)$"


@pytest.mark.servers(15)  # strace is one of Debian's packages
@pytest.mark.parametrize(
    ("mode", "code", "category"),
    [("run", 7, "Backup creation error"), ("verify", 1, "General error")],
)
def test_process_or_thread_that_is_refused(
    mode: str, code: int, category: str, standing: Project
) -> None:
    """From the n-th on each is, as by `ulimit -u`."""
    arguments = ("--verify", standing.dumps()[0]) if mode == "verify" else ()
    before = published(standing.backups)
    for number in itertools.count(1, 1 if mode == "verify" else 3):
        fault = ("-e", f"trace={REFUSED}", "-e", f"inject={REFUSED}:error=EAGAIN:when={number}+")
        prefix = (program("strace", "strace"), *STRACE, *fault)
        result = standing.run(*arguments, prefix=prefix)
        if result.returncode == 0:
            break
        assert_no_room(result, code, category, standing)
        assert published(standing.backups) == before
    assert number > 4, "more are needed"


def test_memory_that_is_used_up(standing: Project) -> None:
    """By the metadata of an earlier backup, here: somebody else may write to the directory."""
    (dump,) = standing.dumps()
    path = metadata_path(dump)
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "more": "x" * 160_000_000}), encoding="utf-8")
    little = ["prlimit", f"--as={250 * 1024 * 1024}"]
    with untouched(standing):
        made = standing.run(prefix=little)
        verified = standing.run("--verify", dump, prefix=little)
    assert_no_room(made, 7, "Backup creation error", standing)
    assert_no_room(verified, 1, "General error", standing)


def test_few_descriptors_are_enough(standing: Project) -> None:
    """None of 100 or more is to be had."""
    prefix = ["prlimit", "--nofile=64"]
    standing.run(prefix=prefix).succeeded()
    standing.run("--verify", standing.dumps()[-1], prefix=prefix).succeeded()


def test_descriptor_that_is_not_to_be_had_is_no_damage(standing: Project) -> None:
    (dump,) = standing.dumps()
    prefix = ["prlimit", "--nofile=11"]
    with untouched(standing):
        made = standing.run(prefix=prefix)
        verified = standing.run("--verify", dump, prefix=prefix)
    assert_no_room(made, 7, "Backup creation error", standing)
    assert_no_room(verified, 1, "General error", standing)
