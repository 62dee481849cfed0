#!/usr/bin/env python3
"""Run the tests: python3 tests/run.py [arguments for pytest]

Makes the environment first. The tests start the PostgreSQL servers that they need, by default
17 alone; BACKUP_TEST_SERVERS="15 16 17 18" has the tests that depend on the version run on each.

Where to look for what:

    what a user sees          test_contract, test_command_line, test_progress, test_text
    failures and their mends  test_exit_codes, test_mends
    settings, passwords       test_config, test_secrets, test_existing_project
    the way to the server     test_connections, test_ways, test_poolers, test_server_faults
    versions, tools           test_servers, test_tools, test_earlier
    what a backup holds       test_counts, test_facts, test_encodings, test_hostile_data
    one moment, locks, waits  test_snapshot, test_names, test_waits
    nobody else's code runs   test_owners, test_planted
    what "verified" means     test_verification, test_contents, test_script_reader
    files, disks, limits      test_directory, test_disks, test_durability, test_limits
    signals, every night      test_signals, test_nights, test_retention
    the day of the restore    test_runbook, test_recipes, test_rehearse
    README, sample database   test_readme, test_sample

    the rehearsal itself      rehearse, values
    what the tests share      support, faults, conftest, cluster, environment, sample
    speed and size            benchmark (no test: it is run by hand)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import environment

# Two for each core: half of a test's time is a wait for something to happen.
WORKERS = min(2 * (os.cpu_count() or 1), 8)
OPTIONS = (
    f"--numprocesses={WORKERS}",
    "--dist=worksteal",  # tests of one file, which share a server, stay together
    "--durations=10",
)


def main(arguments: Sequence[str]) -> int:
    try:
        python = environment.python_for("tests")
    except environment.EnvironmentFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    os.chdir(environment.PROJECT)
    os.execv(python, [python, "-m", "pytest", *OPTIONS, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
