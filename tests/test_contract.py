"""The contract's own samples, each held against what the script prints.

They stand here to the letter. A test gives the placeholders the values of its own backup (the file
name, the size, the digits of the checksum), found without the script, and compares every byte.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cluster import Cluster
from conftest import MakeProject
from environment import PROJECT
from sample import DATABASE
from support import Database, put_pair, read_metadata

SYNOPSIS = "backup_db.py [--env ENV] [--output-dir DIR] [--verify FILE] [--list] [--help]"

SUCCESS_OUTPUT = """\
✓ Backup created successfully

Backup File: db/backups/project_chat_dev_2025-01-27T14-30-00Z.dump
Metadata:    db/backups/project_chat_dev_2025-01-27T14-30-00Z.metadata.json
Size:        50.0 MB
Environment: dev
Database:    project_chat_dev
Tables:      4 (150 conversations, 3420 messages, 12 project_knowledge, 145 conversation_index)
Checksum:    a1b2c3d4e5f6...
Verified:    ✓ Integrity check passed
"""

VERIFICATION_OUTPUT = """\
✓ Backup verification passed

File:        db/backups/project_chat_dev_2025-01-27T14-30-00Z.dump
Checksum:    ✓ Match (a1b2c3d4e5f6...)
Structure:   ✓ Valid (pg_restore --list succeeded)
Size:        50.0 MB
Timestamp:   2025-01-27T14:30:00Z
"""

# Behind both, the one line that is ours.
CONTENTS = "Contents:    ✓ Match (3727 rows in 4 tables)\n"

ERROR_OUTPUT = """\
✗ Backup failed: Database connection error

Error: connection to server at "127.0.0.1", port 5432 failed: FATAL: database "project_chat_dev" \
does not exist

Troubleshooting:
  1. Verify database exists: psql -l
  2. Check database name in .env.local: DEV_DB_NAME
  3. Create database if needed: createdb project_chat_dev
"""

LIST_OUTPUT = """\
Backup Files (db/backups/):

Timestamp                Environment  Database            Size      Status
2025-01-27T15:00:00Z    prod         project_chat_prod    125.3 MB  ✓ Verified
2025-01-27T14:30:00Z    dev          project_chat_dev     50.0 MB   ✓ Verified
2025-01-27T10:00:00Z    prod         project_chat_prod    120.1 MB  ✓ Verified
"""


def fill(sample: str, values: Mapping[str, str]) -> str:
    """The sample with these values in the place of its own."""
    for placeholder, value in values.items():
        assert placeholder in sample
        sample = sample.replace(placeholder, value)
    return sample


def facts_of(dump: Path) -> dict[str, str]:
    """What both reports say of a dump of the sample database, by the contract's placeholders."""
    assert re.fullmatch(r"project_chat_dev_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ\.dump", dump.name)
    return {
        "project_chat_dev_2025-01-27T14-30-00Z": dump.name.removesuffix(".dump"),
        "50.0 MB": f"{dump.stat().st_size / 1024:.1f} KB",
        "a1b2c3d4e5f6": hashlib.sha256(dump.read_bytes()).hexdigest()[:12],
    }


def test_success_and_verification_output(make_project: MakeProject, cluster: Cluster) -> None:
    project = make_project(Database(cluster, DATABASE))
    made = project.run().succeeded()
    (dump,) = project.dumps()
    facts = facts_of(dump)
    assert made.stdout == fill(SUCCESS_OUTPUT, facts) + CONTENTS
    verified = project.run("--verify", f"db/backups/{dump.name}").succeeded()
    facts["2025-01-27T14:30:00Z"] = read_metadata(dump)["backup_timestamp"]
    assert verified.stdout == fill(VERIFICATION_OUTPUT, facts) + CONTENTS
    assert made.stderr + verified.stderr == ""


def test_error_output(make_project: MakeProject, cluster: Cluster) -> None:
    said = make_project(Database(cluster, "project_chat_gone")).run().failed_with(3).stderr
    # The commands carry what they need to work here, and behind all is the line for the log.
    options = f"-h 127.0.0.1 -p {cluster.port} -U postgres"
    error, _, for_the_log = said.rpartition("\n\n")
    values = {
        "project_chat_dev": "project_chat_gone",
        "5432": str(cluster.port),
        "psql -l": f"psql -l {options}",
        "createdb project_chat_gone": f"createdb project_chat_gone {options}",
    }
    assert f"{error}\n" == fill(ERROR_OUTPUT, values)
    assert for_the_log.endswith(f"Z dev project_chat_gone at 127.0.0.1, port {cluster.port}\n")


def test_list_output(make_project: MakeProject) -> None:
    """All but the spaces before the columns, which in the sample are off by one."""
    project = make_project()
    megabyte = 1024 * 1024
    prod, dev = "project_chat_prod", "project_chat_dev"
    put_pair(project.backups, prod, "prod", "2025-01-27T10:00:00Z", int(120.1 * megabyte))
    put_pair(project.backups, prod, "prod", "2025-01-27T15:00:00Z", int(125.3 * megabyte))
    put_pair(project.backups, dev, "dev", "2025-01-27T14:30:00Z", 50 * megabyte)
    result = project.run("--list").succeeded()
    lines, sample = result.stdout.splitlines(), LIST_OUTPUT.splitlines()
    assert lines[:3] == sample[:3]
    rows = lines[3:6]
    assert [row.split() for row in rows] == [row.split() for row in sample[3:]]
    for title in ("Environment", "Database", "Size", "Status"):
        column = lines[2].index(title)
        assert all(row[column - 2 : column] == "  " != row[column] for row in rows), title
    assert lines[6:8] == ["", "3 backups, 295.4 MB in all"]
    assert not result.stderr


def test_synopsis() -> None:
    """As it is typed: without `python3`, which takes an executable file."""
    environ = {"PATH": os.environ["PATH"]}
    command = [str(PROJECT / "backup_db.py"), "--help"]
    said = subprocess.run(command, env=environ, capture_output=True, check=True, text=True)
    assert said.stdout.startswith(f"usage: {SYNOPSIS}\n\n")
    assert not said.stderr
