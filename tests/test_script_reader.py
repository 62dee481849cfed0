"""The counting of rows in the script of `pg_restore --data-only`, wherever a read may end."""

from __future__ import annotations

import itertools

import pytest

from backup_db import ArchiveError, Contents, ScriptReader, TableName, compare_contents

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

HOSTILE_ROWS: dict[TableName, int] = {
    ("public", "COPY x FROM stdin;\n\\.\n"): 3,
    ("public", "a.b"): 0,
    ('s " FROM stdin;', 't"'): 3,
    ("public", "zero"): 2,
    ("public", "König"): 1,
}


def read(*blocks: bytes) -> Contents:
    reader = ScriptReader()
    for block in blocks:
        reader.feed(block)
    return reader.finish()


def is_right(contents: Contents) -> bool:
    return contents.rows == HOSTILE_ROWS and contents.large_objects == 2


def test_hostile_script_is_read_as_it_is_meant() -> None:
    contents = read(HOSTILE)
    assert contents.rows == HOSTILE_ROWS
    assert contents.large_objects == 2


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
        contents = read(script[:first], script[first:second], script[second:])
        assert contents.rows == {("a", "b"): 1, ("a", "d"): 0}, (first, second)


def test_script_cut_within_a_table_is_damaged() -> None:
    script = b'COPY public."a\nb" (c) FROM stdin;\n1\n2\n\\.\n'
    for length in range(1, len(script)):
        with pytest.raises(ArchiveError):
            read(script[:length])
    assert read(script).rows == {("public", "a\nb"): 2}


@pytest.mark.parametrize(
    "damage",
    [
        b"INSERT INTO t VALUES (1);\n",
        b"SELECT 1;\n",
        b"1\t2\n",
        b"\\.\n",
        b"COPY t FROM stdin;\n",  # no schema: not as pg_restore writes it
        b'COPY "".t (a) FROM stdin;\n',
        b"COPY public.t (a) FROM stdin;\n\\.\nCOPY public.t (a) FROM stdin;\n\\.\n",
        b'COPY public.t (a) FROM stdin;\n\\.\nCOPY public."t" (a) FROM stdin;\n\\.\n',
    ],
)
def test_anything_else_is_damage(damage: bytes) -> None:
    with pytest.raises(ArchiveError):
        read(HOSTILE, damage)


def test_line_without_end_does_not_fill_the_memory() -> None:
    reader = ScriptReader()
    reader.feed(b"-" * reader.LONGEST_LINE_BYTES)
    with pytest.raises(ArchiveError, match="does not end"):
        reader.feed(b"-")


def test_statement_without_end_does_not_fill_the_memory() -> None:
    reader = ScriptReader()
    reader.feed(b'COPY public."t (a) FROM stdin;\n' + b"x" * reader.LONGEST_STATEMENT_BYTES)
    with pytest.raises(ArchiveError, match="does not end"):
        reader.feed(b"\n")


def test_names_are_read_in_the_encoding_that_the_script_sets() -> None:
    for encoding, raw, name in (
        ("UTF8", "König", "König"),
        ("LATIN1", "König", "König"),
        ("WIN1252", "€", "€"),
        ("EUC_JP", "会話", "会話"),
        ("KOI8R", "беседа", "беседа"),
        ("SQL_ASCII", "\xf6\xff", "\xf6\xff"),
    ):
        codec = {"WIN1252": "cp1252", "KOI8R": "koi8-r", "SQL_ASCII": "latin-1"}.get(
            encoding, encoding
        )
        script = (
            f"SET client_encoding = '{encoding}';\nCOPY public.\"{raw}\" (a) FROM stdin;\n\\.\n"
        )
        assert read(script.encode(codec)).rows == {("public", name): 0}, encoding


@pytest.mark.parametrize(
    ("counts", "large_objects", "problem"),
    [
        ({"a": 2}, 1, None),
        ({"public.a": 2}, 1, None),
        ({'"a"': 2}, 1, None),
        ({"a": 3}, 1, "table a: 2 rows in the dump, 3 expected"),
        ({"b": 2}, 1, "table b: not in the dump, 2 rows expected"),
        ({}, 1, "table public.a: in the dump, but not counted"),
        ({"a": 2, "b": 0}, 1, "table b: not in the dump, 0 rows expected"),
        ({"a": 2, "public.a": 2}, 1, "two keys of table_counts name the same table"),
        ({'"public.a"': 2}, 1, "table public.a: in the dump, but not counted"),
        ({"a": 2}, 0, "1 large object in the dump, 0 expected"),
        ({"a": 2}, None, "1 large object in the dump, 0 expected"),
        ({"a": 2}, 2, "1 large object in the dump, 2 expected"),
    ],
)
def test_every_difference_to_the_counts_is_said(
    counts: dict[str, int], large_objects: int | None, problem: str | None
) -> None:
    problems = compare_contents(Contents({("public", "a"): 2}, 1), counts, large_objects)
    assert (problem in problems) if problem else not problems
