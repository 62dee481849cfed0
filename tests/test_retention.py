"""What BACKUP_KEEP keeps, and what a shrunken database is: rules over figures, from tables."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from backup_db import backups_to_keep
from brain_core.config import Retention, Settings, load_config


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def retention(text: str) -> Retention:
    """As a person writes it."""
    settings = Settings({"DB_NAME": "b", "BACKUP_KEEP": text}, {}, Path())
    found = load_config("prod", settings).retention
    assert found
    return found


def kept_of(moments: Iterable[str], keep: str) -> list[str]:
    newest_first = sorted(moments, reverse=True)
    kept = backups_to_keep([moment(text) for text in newest_first], retention(keep))
    assert kept <= set(range(len(newest_first)))
    return [newest_first[index] for index in sorted(kept)]


def nights(last: str, count: int) -> list[str]:
    """So many nights, each at 2 o'clock, up to this date."""
    end = moment(last)
    return [f"{end - timedelta(days=days):%Y-%m-%d} 02:00" for days in range(count)]


# For each, what is there (in any order), BACKUP_KEEP, and what stays, the newest first.
KEPT: dict[str, tuple[list[str], str, list[str]]] = {
    "nothing there": ([], "3,7d,4w", []),
    "fewer than may stay": (nights("2026-11-22", 3), "14", nights("2026-11-22", 3)),
    "the newest": (nights("2026-11-22", 30), "2", nights("2026-11-22", 2)),
    "days, the newest of each": (
        ["2026-11-22 14:00", "2026-11-22 02:00", "2026-11-21 23:59", "2026-11-21 00:00"],
        "2d",
        ["2026-11-22 14:00", "2026-11-21 23:59"],
    ),
    "many runs by hand push out no night": (
        [*(f"2026-11-22 15:{minute:02}" for minute in range(14)), *nights("2026-11-22", 5)],
        "4d",
        ["2026-11-22 15:13", *nights("2026-11-21", 3)],
    ),
    "a gap takes no place": (
        ["2026-11-22 02:00", "2026-11-02 02:00", "2026-11-01 02:00", "2025-03-01 02:00"],
        "3d",
        ["2026-11-22 02:00", "2026-11-02 02:00", "2026-11-01 02:00"],
    ),
    "a leap day is a day, and of February": (
        nights("2028-03-02", 60),
        "3d,3m",
        ["2028-03-02 02:00", "2028-03-01 02:00", "2028-02-29 02:00", "2028-01-31 02:00"],
    ),
    "no leap day": (
        nights("2026-03-02", 60),
        "3d,3m",
        ["2026-03-02 02:00", "2026-03-01 02:00", "2026-02-28 02:00", "2026-01-31 02:00"],
    ),
    # 2026 has 53 weeks: its last began on 28 December and ended on 3 January (a Sunday).
    "week 53, over the end of the year": (
        nights("2027-01-05", 20),
        "3w",
        ["2027-01-05 02:00", "2027-01-03 02:00", "2026-12-27 02:00"],
    ),
    # 29 December 2025 was a Monday: of week 1 of 2026. 1 January 2025 is of week 1 of 2025.
    "week 1, before the end of the year": (
        ["2026-01-02 02:00", "2025-12-29 02:00", "2025-12-28 02:00", "2025-01-01 02:00"],
        "9w",
        ["2026-01-02 02:00", "2025-12-28 02:00", "2025-01-01 02:00"],
    ),
    "a week ends on Sunday": (
        ["2026-11-23 00:00", "2026-11-22 23:59", "2026-11-16 00:00", "2026-11-15 23:59"],
        "9w",
        ["2026-11-23 00:00", "2026-11-22 23:59", "2026-11-15 23:59"],
    ),
    "the same week, month and day of another year is another": (
        ["2026-06-10 02:00", "2025-06-11 02:00", "2025-06-10 02:00"],
        "2d,2w,2m,2y",
        ["2026-06-10 02:00", "2025-06-11 02:00"],
    ),
    "years, the newest of each": (
        ["2026-01-01 00:00", "2025-12-31 23:59", "2025-01-01 00:00", "2024-12-31 23:59"],
        "2y",
        ["2026-01-01 00:00", "2025-12-31 23:59"],
    ),
    "what any part keeps stays": (
        ["2026-11-22 05:00", "2026-11-22 04:00", "2026-11-22 03:00", *nights("2026-11-21", 40)],
        "2,3d,2m",
        [
            "2026-11-22 05:00",
            "2026-11-22 04:00",
            "2026-11-21 02:00",
            "2026-11-20 02:00",
            "2026-10-31 02:00",
        ],
    ),
    "years of nights": (
        nights("2026-11-22", 1000),
        "7d,4w,6m,2y",
        [
            *nights("2026-11-22", 7),
            "2026-11-15 02:00",
            "2026-11-08 02:00",
            "2026-11-01 02:00",
            "2026-10-31 02:00",
            "2026-09-30 02:00",
            "2026-08-31 02:00",
            "2026-07-31 02:00",
            "2026-06-30 02:00",
            "2025-12-31 02:00",
        ],
    ),
}


@pytest.mark.parametrize(("there", "keep", "stays"), KEPT.values(), ids=KEPT)
def test_what_is_kept(there: list[str], keep: str, stays: list[str]) -> None:
    assert kept_of(there, keep) == stays


@pytest.mark.parametrize("keep", ["1", "1d", "1w", "1m", "1y"])
def test_first_stays_though_the_clock_was_set_back(keep: str) -> None:
    """The backup just made comes first, whatever the others say of their time."""
    made, *others = map(moment, ["2026-11-20 02:00", "2026-11-22 02:00", "2026-11-21 02:00"])
    assert backups_to_keep([made, *others], retention(keep)) == {0}


@pytest.mark.parametrize(
    ("keep", "count"), [("14", 14), ("7d,4w,6m,2y", 17), ("3,7d,4w", 10), ("14d,8w,12m", 31)]
)
def test_night_after_night_as_many_stay(keep: str, count: int) -> None:
    """Removing each night, for three years, leaves what removing once would, and never more."""
    there: list[str] = []
    every = nights("2028-12-31", 1100)
    for night in reversed(every):
        there = kept_of([*there, night], keep)
        assert len(there) <= count
    assert there == kept_of(every, keep)
