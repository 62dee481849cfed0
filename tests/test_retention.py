"""What BACKUP_KEEP keeps, and what a shrunken database is: rules over figures, from tables."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from backup_db import (
    Backup,
    Metadata,
    Series,
    Status,
    backups_to_keep,
    last_full_backup,
    shrunk_tables,
)
from brain_core.config import Retention, Settings, load_config


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def retention(text: str) -> Retention:
    """As a person writes it."""
    settings = Settings({"DB_NAME": "b", "BACKUP_KEEP": text}, {}, Path())
    found = load_config("prod", settings).retention
    assert found
    return found


def made_at(text: str, rows: int = 0) -> Backup:
    """A backup of that minute, with so many rows."""
    timestamp = f"{moment(text):%Y-%m-%dT%H:%M:00Z}"
    dump = Path(f"chat_prod_{timestamp}.dump")
    series = Series("chat", "prod")
    return Backup(dump, 1, Status.VERIFIED, timestamp, series, total_rows=rows)


def kept_of(moments: Iterable[str], keep: str) -> list[str]:
    there = [made_at(text) for text in sorted(moments, reverse=True)]
    kept = backups_to_keep(there, retention(keep))
    assert kept <= set(there)
    return [f"{backup.moment:%Y-%m-%d %H:%M}" for backup in there if backup in kept]


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
    made, *others = map(made_at, ["2026-11-20 02:00", "2026-11-22 02:00", "2026-11-21 02:00"])
    assert backups_to_keep([made, *others], retention(keep)) == {made}


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


# -- databases that shrank ------------------------------------------------------------------------

# The rows of every backup, the newest first; BACKUP_KEEP; and the one that is held back beside
# those that are kept. The first is of 5 November.
HELD_BACK: dict[str, tuple[list[int], str, int | None]] = {
    "nothing would go": ([10, 1000], "2", None),
    "an ordinary day": ([1010, 1000, 990, 980], "2", None),
    "emptied today, and yesterday's is kept": ([0, 1000, 1000], "2", None),
    "emptied two nights ago": ([0, 0, 1000, 990], "2", 2),
    "emptied some nights ago: not the newest that would go": ([0, 0, 0, 0, 1000, 990], "2", 4),
    "half emptied": ([500, 500, 1000, 1001, 1002], "2", 3),
    "filled anew, not half": ([400, 0, 0, 1000, 1000], "2", 3),
    "filled anew": ([600, 0, 0, 1000], "2", None),
    "one row left": ([1, 1, 2, 3], "2", 3),
    "never any row": ([0, 0, 0, 0], "2", None),
    "an older one of the calendar is full": ([0, 0, 0, 0, 0, 990, 990], "1,2m", None),
    "full, and newer than a full one of the calendar": ([0, 0, 0, 990, 980, 970], "1,2m", 3),
}


@pytest.mark.parametrize(("rows", "keep", "held"), HELD_BACK.values(), ids=HELD_BACK)
def test_last_full_backup(rows: list[int], keep: str, held: int | None) -> None:
    there = list(map(made_at, nights("2026-11-05", len(rows)), rows))
    full = last_full_backup(there, backups_to_keep(there, retention(keep)))
    assert full == (None if held is None else there[held])


def test_last_full_backup_stays_for_more_nights_than_are_kept() -> None:
    """Night after night with what the night before left: it is there for as long as it is asked."""
    there: list[Backup] = []
    for number, night in enumerate(reversed(nights("2026-11-22", 60))):
        there.insert(0, made_at(night, 1000 + number if number < 20 else number - 20))
        kept = backups_to_keep(there, retention("5"))
        full = last_full_backup(there, kept)
        there = [backup for backup in there if backup in kept or backup == full]
        assert len(there) <= 6
    assert [backup.total_rows for backup in there] == [39, 38, 37, 36, 35, 1019]


def backup(rows: dict[str, int], partition_of: dict[str, str] | None = None) -> Metadata:
    return Metadata(
        backup_timestamp="2026-11-22T02:00:00Z",
        environment="prod",
        database_name="chat",
        backup_file="chat_prod_2026-11-22T02-00-00Z.dump",
        backup_size_bytes=1,
        checksum_sha256="0" * 64,
        table_counts=rows,
        pg_dump_version="17.5",
        postgresql_version="17.5",
        partition_of=partition_of,
    )


# The rows of each table in the earlier backups and in that of tonight, and what is told.
SHRUNK: dict[str, tuple[list[dict[str, int]], dict[str, int], list[tuple[str, int, int]]]] = {
    "the first backup": ([], {"a": 0}, []),
    "no table": ([{}, {}], {}, []),
    "more and fewer, ordinarily": ([{"a": 100, "b": 9}, {"a": 90, "b": 8}], {"a": 45, "b": 99}, []),
    "fewer than half of the least": ([{"a": 100}, {"a": 90}], {"a": 44}, [("a", 44, 90)]),
    "empty": ([{"a": 1}, {"a": 2}], {"a": 0}, [("a", 0, 1)]),
    "gone": ([{"a": 1, "b": 1}, {"a": 2, "b": 1}], {"b": 1}, [("a", 0, 1)]),
    "gone, but it was not always there": ([{"a": 9}, {}], {}, []),
    "gone, but it was sometimes empty": ([{"a": 9}, {"a": 0}], {}, []),
    "new since some nights, and empty": ([{}, {"a": 9}], {"a": 0}, [("a", 0, 9)]),
    "new": ([{}], {"a": 9, "b": 0}, []),
    "a queue that is sometimes empty": ([{"a": 5000}, {"a": 0}, {"a": 7}], {"a": 0}, []),
    "the night after": ([{"a": 100}, {"a": 100}, {"a": 3}], {"a": 3}, []),
    "the night after it was gone": ([{"a": 100}, {"a": 100}, {}], {}, []),
    "the largest loss first": (
        [{"a": 10, "b": 1000, "c": 100}],
        {"a": 0, "b": 490, "c": 0},
        [("b", 490, 1000), ("c", 0, 100), ("a", 0, 10)],
    ),
}


@pytest.mark.parametrize(("earlier", "now", "told"), SHRUNK.values(), ids=SHRUNK)
def test_shrunk_tables(
    earlier: list[dict[str, int]], now: dict[str, int], told: list[tuple[str, int, int]]
) -> None:
    assert shrunk_tables(backup(now), [backup(rows) for rows in earlier]) == told


def log(*months: int, rows: int = 100) -> Metadata:
    """A table with a partition for each month, of which some are there."""
    names = [f"log_{month:02}" for month in months]
    return backup(dict.fromkeys(names, rows) | {"a": 1}, dict.fromkeys(names, "log"))


def test_partitions_count_as_one_table() -> None:
    earlier = [log(1, 2, 3), log(2, 3, 4), log(3, 4, 5)]
    assert shrunk_tables(log(4, 5, 6), earlier) == []  # one dropped each night
    assert shrunk_tables(log(5, 6), earlier) == []
    assert shrunk_tables(log(6), earlier) == [("log", 100, 300)]
    assert shrunk_tables(log(4, 5, 6, rows=0), earlier) == [("log", 0, 300)]
    assert shrunk_tables(log(), earlier) == [("log", 0, 300)]


def test_partitions_of_a_backup_that_does_not_know_them() -> None:
    """Made before there was `partition_of`; or before it was attached, or after it was detached."""
    alone = backup({"log_01": 100, "log_02": 100, "a": 1})
    assert shrunk_tables(log(1, 2), [alone]) == []
    assert shrunk_tables(log(2, 3), [alone, log(1, 2)]) == []
    assert shrunk_tables(alone, [log(1, 2)]) == []
