"""Backups that earlier versions of the script made, in tests/earlier, can still be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import MakeProject
from environment import TESTS
from support import metadata_path, read_metadata

EARLIER = TESTS / "earlier"
DUMPS = sorted(path.name for path in EARLIER.glob("*.dump"))


def test_no_earlier_backup_is_lost() -> None:
    assert len(DUMPS) == 4


@pytest.mark.parametrize("name", DUMPS)
def test_earlier_backup_is_verified(name: str, make_project: MakeProject) -> None:
    result = make_project().run("--verify", EARLIER / name).succeeded()
    assert "Contents:    ✓ Match (" in result.stdout


def test_earlier_backups_are_listed(make_project: MakeProject) -> None:
    result = make_project().run("--list", "--output-dir", EARLIER).succeeded()
    listed = result.stdout.splitlines()
    assert len([line for line in listed if line.endswith("  ✓ Verified")]) == len(DUMPS), result


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("name", DUMPS)
def test_earlier_backup_with_another_count_fails(
    name: str, by: int, make_project: MakeProject, tmp_path: Path
) -> None:
    dump = Path(shutil.copy(EARLIER / name, tmp_path))
    metadata = read_metadata(EARLIER / name)
    counts = metadata["table_counts"]
    table = max(counts, key=lambda key: int(counts[key]))
    counts[table] += by
    metadata_path(dump).write_text(json.dumps(metadata), encoding="utf-8")
    result = make_project().run("--verify", dump).failed_with(8)
    assert "Checksum:    ✓" in result.stderr, result
    assert "Contents:    ✗" in result.stderr, result
