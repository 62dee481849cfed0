"""What an archive holds, and whether a copy of the database holds the same, value for value.

Both are read as the script that pg_restore writes. Of the rows of a table no more is kept than
their number and the sum of their hashes, which does not depend on their order.
"""

from __future__ import annotations

import hashlib
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup_db import printable

Name = tuple[bytes, bytes]  # schema and name, as the catalog has them


@dataclass(frozen=True)
class Rows:
    """How many there are, and the sum of their hashes: it tells whether two tables hold the same
    rows, in whatever order."""

    count: int = 0
    hashes: int = 0

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.count + other.count, self.hashes + other.hashes)


def names_in(sql: bytes) -> list[bytes]:
    """The names in it, unquoted: each PostgreSQL quotes other words."""
    found = re.findall(rb'"((?:[^"]|"")*)"|([^\s".,()]+)', sql)
    return [quoted.replace(b'""', b'"') or bare for quoted, bare in found]


def in_order(columns: Sequence[bytes], wanted: Sequence[bytes]) -> Callable[[bytes], bytes] | None:
    """What puts the fields of a row into another order; None where that is theirs, or not all are
    there. A field never holds a raw tab; and the end of the data stays as it is."""
    if columns == wanted or sorted(columns) != sorted(wanted):
        return None
    pick = operator.itemgetter(*map(columns.index, wanted))

    def order(row: bytes) -> bytes:
        fields = row[:-1].split(b"\t")
        return b"\t".join(pick(fields)) + b"\n" if len(fields) == len(wanted) else row

    return order


class Contents:
    """What is in the script that `pg_restore --data-only` writes. How it is read: as ScriptReader
    in backup_db.py does, which counts the rows but does not look at them."""

    OPTIONS = (
        "--data-only",
        "--no-owner",
        "--no-privileges",
        "--no-comments",
        "--no-security-labels",
    )
    STATEMENT = re.compile(
        rb'COPY (?P<table>(?:[^"\n]|"[^"]*")*) FROM stdin;\n'
        rb"|SELECT pg_catalog\.setval\('(?P<sequence>(?:[^']|'')*)', (?P<value>.+)\);\n"
        rb"|SELECT pg_catalog\.lo_open\('(?P<large_object>\d+)', .*\n"
        rb"|SELECT pg_catalog\.lowrite\(0, '\\+x(?P<piece>[0-9a-f]*)'\);\n"
        rb"|SELECT (?P<close>pg_catalog\.lo_close)\(.*\n"
        rb"|SET client_encoding = '(?P<encoding>\w+)';\n"
        rb"|SELECT pg_catalog\.(?:set_config|lo_create)\(.*\n"
        # Other lines are passed over, since releases add some; but none that may bring a value.
        rb"|(?!COPY |SELECT |INSERT ).*\n"
    )
    MAY_SPAN_LINES = (b"COPY ", b"SELECT pg_catalog.setval('")
    END_OF_DATA = b"\\.\n"

    def __init__(self, tops: Mapping[Name, Name], columns: dict[Name, list[bytes]]) -> None:
        """`tops`: the topmost tables of partitions, whose rows may come to another partition.
        `columns`: of each of these the order in which the fields are hashed; who reads it first
        sets it."""
        self.tables: dict[Name, Rows] = {}
        self.sequences: dict[Name, str] = {}
        self.large_objects = Rows()
        self.encoding = ""
        self._tops = tops
        self._columns = columns
        self._large_object = hashlib.sha256()

    def read(self, script: IO[bytes]) -> str:
        """Read the script to its end. Returns a statement that may bring a value, and that it does
        not know, if one comes."""
        statement = b""
        for line in script:
            statement += line
            if found := self.STATEMENT.fullmatch(statement):
                statement = b""
                if (header := found["table"]) is not None:
                    if not self._read_rows(header, script):
                        return "it breaks off among the rows of a table"
                else:
                    self._note(found)
            elif not statement.startswith(self.MAY_SPAN_LINES):
                break
        return printable(statement[:200].decode("latin-1"))

    def _read_rows(self, header: bytes, script: IO[bytes]) -> bool:
        """Returns whether the rows came to their end."""
        schema, table, *columns = names_in(header)
        name = (schema, table)
        wanted = self._columns.setdefault(self._tops.get(name, name), columns)
        rows = map(order, script) if (order := in_order(columns, wanted)) else script
        hashes = 0
        for count, row in enumerate(rows):
            if row == self.END_OF_DATA:
                # Hash partitions by an enum stand there under their topmost table's name.
                self.tables[name] = self.tables.get(name, Rows()) + Rows(count, hashes)
                return True
            hashes += hash(row)
        return False

    def _note(self, statement: re.Match[bytes]) -> None:
        """Take in a statement without rows."""
        if (text := statement["sequence"]) is not None:
            schema, sequence = names_in(text.replace(b"''", b"'"))
            self.sequences[schema, sequence] = statement["value"].decode()
        elif number := statement["large_object"]:
            self._large_object = hashlib.sha256(number + b":")
        elif piece := statement["piece"]:
            self._large_object.update(piece)
        elif statement["close"]:
            self.large_objects += Rows(1, hash(self._large_object.digest()))
        elif encoding := statement["encoding"]:
            self.encoding = encoding.decode()


# -- the comparison -------------------------------------------------------------------------------


class Line(NamedTuple):
    """What the backup holds of a table or a sequence, and what the copy; None where it is not
    there."""

    name: str
    in_backup: int | str | None
    restored: int | str | None
    differs: bool

    def words(self) -> str:
        if self.in_backup == self.restored:
            return f"{self.name} (other values)"
        return f"{self.name} ({figure(self.restored)} in place of {figure(self.in_backup)})"


def figure(value: int | str | None) -> str:
    return "none" if value is None else str(value)


def display(name: Name) -> str:
    schema, table = (
        part if re.fullmatch(r"[a-z_][a-z0-9_]*", part) else '"' + part.replace('"', '""') + '"'
        for part in (printable(part.decode("utf-8", "surrogateescape")) for part in name)
    )
    return table if schema == "public" else f"{schema}.{table}"


def rows_line(name: str, archive: Rows | None, copy: Rows | None, by_value: bool) -> Line:
    in_backup = None if archive is None else archive.count
    restored = None if copy is None else copy.count
    return Line(name, in_backup, restored, archive != copy if by_value else in_backup != restored)


def total(tables: Mapping[Name, Rows], names: Iterable[Name]) -> Rows:
    return sum((tables[name] for name in names if name in tables), Rows())


def compare(
    archive: Contents, copy: Contents, tops: Mapping[Name, Name], by_value: bool
) -> list[Line]:
    """A line for the large objects, for each table, the largest first, and for each sequence that
    differs."""
    partitions: dict[Name, list[Name]] = {}
    for name in {**archive.tables, **copy.tables}:
        # An unlogged table has no rows on a standby, and is not in its archive.
        if name in archive.tables or copy.tables[name].count:
            partitions.setdefault(tops.get(name, name), []).append(name)
    lines: list[Line] = []
    for top, names in partitions.items():
        parts = [
            rows_line(display(name), archive.tables.get(name), copy.tables.get(name), by_value)
            for name in names
        ]
        # By an enum's hash, another one on each server, the same rows come to other partitions.
        both = total(archive.tables, names), total(copy.tables, names)
        whole = rows_line(f"{display(top)}, all partitions", *both, by_value)
        have_moved = len(parts) > 1 and any(part.differs for part in parts) and not whole.differs
        lines += [whole] if have_moved else parts
    lines.sort(key=lambda line: (-int(line.in_backup or 0), line.name))
    if archive.large_objects.count or copy.large_objects.count:
        both = archive.large_objects, copy.large_objects
        lines.insert(0, rows_line("large objects", *both, by_value=True))
    for name in {**archive.sequences, **copy.sequences}:
        values = archive.sequences.get(name), copy.sequences.get(name)
        if values[0] != values[1]:
            lines.append(Line(f"sequence {display(name)}", *values, differs=True))
    return lines
