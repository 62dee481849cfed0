"""The counting of rows in the script of `pg_restore --data-only`, wherever a read may end."""

from __future__ import annotations

import io
import itertools

import pytest
import values

from backup_db import ArchiveError, Contents, Metadata, ScriptReader, compare_contents

# As pg_restore writes it; every name and value that could be taken for something else is one.
HOSTILE = (
    b"--\n-- PostgreSQL database dump\n--\n\n\\restrict k\n\n"
    b"SET statement_timeout = 0;\nSET client_encoding = 'UTF8';\n"
    b"SELECT pg_catalog.set_config('search_path', '', false);\n\n"
    b"--\n-- Data for Name: COPY x FROM stdin; Type: TABLE DATA; Schema: public; Owner: a\n--\n\n"
    b'COPY public."COPY x FROM stdin;\n\\.\n" (a, "b ""\n FROM stdin;\n", "\\.") FROM stdin;\n'
    b"1\tCOPY public.t (a) FROM stdin;\t\\\\.\n"
    b'2\t"\t\\N\n'
    b"\\\\.\t\\n\\\\.\\n\t\n"
    b"\\.\n\n\n"
    b'COPY public."a.b" ("c.d") FROM stdin;\n\\.\n\n\n'
    b'COPY "s "" FROM stdin;"."t"""  FROM stdin;\n\n\n\n\\.\n\n\n'
    b"COPY public.zero  FROM stdin;\n\n\n\\.\n\n\n"
    b'COPY public."K\xc3\xb6nig" (n) FROM stdin;\n\xe2\x82\xac\n\\.\n\n\n'
    b"BEGIN;\n\nSELECT pg_catalog.lo_open('4711', 131072);\n"
    b"SELECT pg_catalog.lowrite(0, '\\x434f5059');\n"
    b"SELECT pg_catalog.lo_close(0);\n\n"
    b"SELECT pg_catalog.lo_open('4712', 131072);\n"
    b"SELECT pg_catalog.lo_close(0);\n\nCOMMIT;\n\n"
    b"--\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict k\n\n"
)

HOSTILE_ROWS = [3, 0, 3, 2, 1]


def read(*blocks: bytes) -> ScriptReader:
    reader = ScriptReader(len(HOSTILE_ROWS))
    for block in blocks:
        reader.feed(block)
    reader.finish()
    return reader


def is_right(reader: ScriptReader) -> bool:
    return reader.blocks == HOSTILE_ROWS and reader.large_objects == 2


def test_hostile_script_is_read_as_it_is_meant() -> None:
    reader = read(HOSTILE)
    assert reader.blocks == HOSTILE_ROWS
    assert reader.large_objects == 2


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 997])
def test_blocks_of_any_size_read_the_same(size: int) -> None:
    starts = range(0, len(HOSTILE), size)
    assert is_right(read(*(HOSTILE[start : start + size] for start in starts)))


def test_script_split_anywhere_reads_the_same() -> None:
    for split in range(len(HOSTILE) + 1):
        assert is_right(read(HOSTILE[:split], HOSTILE[split:])), split


def test_end_of_data_split_at_any_two_places_is_found() -> None:
    script = b"COPY a.b (c) FROM stdin;\n\\\\.\n\\.\n\nCOPY a.d  FROM stdin;\n\\.\n\n"
    for first, second in itertools.combinations(range(len(script) + 1), 2):
        reader = read(script[:first], script[first:second], script[second:])
        assert reader.blocks == [1, 0], (first, second)


def test_script_cut_within_a_table_is_damaged() -> None:
    script = b'COPY public."a\nb" (c) FROM stdin;\n1\n2\n\\.\n'
    for length in range(1, len(script)):
        with pytest.raises(ArchiveError):
            read(script[:length])
    assert read(script).blocks == [2]


@pytest.mark.parametrize(
    "line",
    [b"INSERT INTO t VALUES (1);\n", b"SELECT 1;\n", b"-- a hint\n", b"1\t2\n", b"\\.\n"],
)
def test_line_of_a_later_release_is_passed_over(line: bytes) -> None:
    assert is_right(read(line, HOSTILE, line))


def test_more_tables_than_the_table_of_contents_has_are_damage() -> None:
    with pytest.raises(ArchiveError, match=r"lists the data of 5 tables, it holds more"):
        read(HOSTILE, b"COPY public.t (a) FROM stdin;\n")


def test_statement_that_is_cut_is_damage() -> None:
    with pytest.raises(ArchiveError):
        read(HOSTILE, b"COPY public.t (a) FROM stdin\n")


@pytest.mark.parametrize("start", [b"-", b'COPY public."t (a) FROM stdin;\n'])
def test_statement_without_end_does_not_fill_the_memory(start: bytes) -> None:
    reader = ScriptReader(1)
    reader.feed(start.ljust(reader.LONGEST_STATEMENT_BYTES, b"-"))
    with pytest.raises(ArchiveError, match="does not end"):
        reader.feed(b"-")


@pytest.mark.parametrize("line", [b"\\later a 'word'\n", b"SET later_setting = 1;\n"])
def test_rehearsal_passes_over_what_a_later_release_adds(line: bytes) -> None:
    contents = values.Contents({}, {})
    assert contents.read(io.BytesIO(line + HOSTILE)) == ""
    assert [rows.count for rows in contents.tables.values()] == HOSTILE_ROWS


@pytest.mark.parametrize(
    "line",
    [
        b"SELECT pg_catalog.lo_put(1, 0, '\\x00');\n",
        b"INSERT INTO public.t VALUES (1);\n",
        b"COPY public.t (a) FROM later;\n",
    ],
)
def test_rehearsal_names_what_may_bring_a_value_and_is_not_compared(line: bytes) -> None:
    stopped_at = values.Contents({}, {}).read(io.BytesIO(line + HOSTILE))
    assert stopped_at.startswith(line[:-1].decode())


OTHER_NUMBERS = "the tables in the dump have other numbers of rows than were counted"


def expected(
    counts: dict[str, int], oids: dict[str, int] | None, large_objects: int | None
) -> Metadata:
    return Metadata(
        "", "", "", "", 0, "", counts, "", "", table_oids=oids, large_object_count=large_objects
    )


@pytest.mark.parametrize(
    ("counts", "oids", "large_objects", "problem"),
    [
        ({"a": 2}, {"a": 7}, 1, None),
        ({"a": 3}, {"a": 7}, 1, "rows of table a: 2 in the dump, 3 expected"),
        ({"b": 2}, {"b": 8}, 1, "rows of table b: not in the dump, 2 expected"),
        ({}, {}, 1, "table with the oid 7: in the dump, but not counted"),
        ({"a": 2, "b": 0}, {"a": 7, "b": 8}, 1, "rows of table b: not in the dump, 0 expected"),
        ({"a": 2}, {"a": 7}, 0, "large objects: 1 in the dump, 0 expected"),
        ({"a": 2}, {"a": 7}, None, "large objects: 1 in the dump, 0 expected"),
        ({"a": 2}, {"a": 7}, 2, "large objects: 1 in the dump, 2 expected"),
        # Made before there were oids.
        ({"a": 2}, None, 1, None),
        ({"a": 3}, None, 1, OTHER_NUMBERS),
        ({"a": 2, "b": 2}, None, 1, OTHER_NUMBERS),
        ({}, None, 1, OTHER_NUMBERS),
    ],
)
def test_every_difference_to_the_counts_is_said(
    counts: dict[str, int],
    oids: dict[str, int] | None,
    large_objects: int | None,
    problem: str | None,
) -> None:
    check = compare_contents(Contents({7: 2}, 1, ""), expected(counts, oids, large_objects))
    problems = check.problem.splitlines()
    assert (problem in problems) if problem else not problems
