#!/usr/bin/env python3
"""Run the tests: python3 tests/run.py [arguments for pytest]

Makes the environment first. The tests start the PostgreSQL servers that they need, by default
17 alone; BACKUP_TEST_SERVERS="15 16 17 18" has the tests that depend on the version run on each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import environment

# Each worker runs a server and, in turn, the tools: more of them than cores only wait.
WORKERS = min(os.cpu_count() or 1, 8)


def main(arguments: Sequence[str]) -> int:
    try:
        python = environment.python_for("tests")
    except environment.EnvironmentFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    os.chdir(environment.PROJECT)
    os.execv(python, [python, "-m", "pytest", f"--numprocesses={WORKERS}", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
