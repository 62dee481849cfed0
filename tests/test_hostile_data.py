"""Names and values that look like something else, and a role that may not read them."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, ClusterError
from conftest import MakeProject
from sample import PASSWORD
from support import Database, Project, Result, assert_restores, finish, new_database, read_metadata

# As they stand, quoted by no one. The COPY statements are what a careless reader of a script
# takes for the beginning, or the end, of a table's data.
NAMES = [
    "COPY public.fake (a) FROM stdin;",
    "COPY x FROM stdin;\n1\n\\.\n",
    "\n\\.\n",
    "ends\nCOPY public.fake (a) FROM stdin;",
    'quo"te',
    '"',
    '""',
    "'; DROP TABLE x; --",
    "a.b",
    "a",
    "A",
    '"A"',
    " ",
    " leading and trailing ",
    "back\\slash \\n \\. \\",
    "tab\tand\rreturn\vand\x01",
    "% %s %(x)s {0}",
    "table",
    "select",
    "user",
    "Ünïcödé 会話 💬 \u202e",
    "$$; --",
    "-- comment",
    "\\restrict x",
    "SET x",
    "x" * 63,
]

VALUES = [*NAMES, "", "\\N", "\\.", "\\", "\n", "\r\n", "a\tb", "\\x41", "x" * 100_000]


# What the metadata's keys are to be: as SQL has them, in the order of creation.
KEYS = """
SELECT json_agg(CASE WHEN nspname = 'public' THEN '' ELSE quote_ident(nspname) || '.' END
                || quote_ident(relname) ORDER BY c.oid)
  FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
 WHERE relkind = 'r' AND c.oid >= 16384
"""

HUGE_BYTES = 100 * 1024 * 1024

# The most that our process needs, whatever the database holds.
OUR_MEMORY_BYTES = 64 * 1024 * 1024


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def hostile_schema(role: str) -> str:
    """A schema, a table, a column, a sequence, a comment and a large object of each name."""
    values = ", ".join(f"({literal(value)})" for value in VALUES)
    statements = []
    for number, name in enumerate(NAMES, 1):
        quoted = identifier(name)
        sequence = identifier(name[:59] + " seq")
        statements += [
            f"CREATE SCHEMA {quoted}",
            f"CREATE TABLE {quoted}.{quoted} ({quoted} text, {identifier(name[:59] + '2')} int)",
            f"CREATE TABLE {identifier(name[:60] + '.t')} ({quoted} text)",
            f"INSERT INTO {quoted}.{quoted} VALUES {values}",
            f"INSERT INTO {quoted}.{quoted} VALUES (NULL)",
            f"CREATE SEQUENCE {quoted}.{sequence} START {number}",
            f"COMMENT ON TABLE {quoted}.{quoted} IS {literal(name)}",
            f"SELECT lo_from_bytea({number}, convert_to({literal(name)}, 'UTF8'))",
            f"COMMENT ON LARGE OBJECT {number} IS {literal(name + chr(10) + name)}",
            f"GRANT SELECT ON {quoted}.{quoted} TO {role}",
            f"GRANT SELECT ON LARGE OBJECT {number} TO {role}",
            f"ALTER TABLE {quoted}.{quoted} OWNER TO {role}",
        ]
    # Two that are one when quotes or dots are read wrongly.
    statements += ['CREATE SCHEMA "c.d"', "CREATE SCHEMA c", 'CREATE TABLE "c.d".e (a int)']
    statements += ['CREATE TABLE c."d.e" (a int)', 'INSERT INTO c."d.e" VALUES (1), (2)']
    return ";\n".join(statements)


@pytest.fixture
def role(cluster: Cluster) -> Iterator[str]:
    """A role that owns and may do nothing, quoted; its name is as bad as the others."""
    quoted = identifier('hostile "role"\n会話')
    cluster.psql(f"CREATE ROLE {quoted} LOGIN PASSWORD '{PASSWORD}'")
    yield quoted
    cluster.psql(f"DROP ROLE {quoted}")


def test_hostile_names_and_values_are_restored(
    cluster: Cluster, role: str, make_project: MakeProject
) -> None:
    with new_database(cluster) as database:
        database.psql(hostile_schema(role))
        project = make_project(database)
        dump = project.back_up()
        metadata = read_metadata(dump)
        counts = metadata["table_counts"]
        assert isinstance(counts, dict)
        assert list(counts) == json.loads(database.psql(KEYS))
        assert Counter(counts.values()) == {len(VALUES) + 1: len(NAMES), 0: len(NAMES) + 1, 2: 1}
        assert counts['"c.d".e'] == 0
        assert counts['c."d.e"'] == 2
        assert metadata["large_object_count"] == len(NAMES)
        assert metadata["roles"] == ['hostile "role"\n会話', "postgres"]
        project.run("--verify", dump).succeeded()
        assert_restores(dump, database)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("LATIN1", "Größe"),
        ("WIN1252", "€uro"),
        ("KOI8R", "беседа"),
        ("EUC_JP", "会話"),
        ("EUC_TW", "會話"),
        ("SQL_ASCII", "any bytes: é"),
    ],
)
def test_names_in_any_encoding_are_restored(
    encoding: str, name: str, cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(cluster, "--template=template0", f"--encoding={encoding}") as database:
        database.psql(
            f"CREATE SCHEMA {identifier(name)};"
            f"CREATE TABLE {identifier(name)}.{identifier(name)} AS SELECT {literal(name)} AS a"
        )
        project = make_project(database)
        dump = project.back_up()
        assert read_metadata(dump)["encoding"] == encoding
        project.run("--verify", dump).succeeded()
        assert_restores(dump, database)


def make_huge(database: Database, columns: str, size_bytes: int) -> None:
    """A table of one row whose `content` has this size."""
    database.psql(
        f"CREATE TABLE huge ({columns}); ALTER TABLE huge ALTER content SET COMPRESSION lz4;"
        f"INSERT INTO huge (content) SELECT repeat('0123456789', {size_bytes // 10})"
    )


def test_one_huge_value_takes_no_memory_of_ours(
    database: Database, make_project: MakeProject
) -> None:
    make_huge(database, "content text, id int", HUGE_BYTES)
    project = make_project(database)
    peaks = [peak_memory(project)]
    (dump,) = project.dumps()
    assert read_metadata(dump)["table_counts"] == {"huge": 1}
    peaks.append(peak_memory(project, "--verify", dump))
    assert max(peaks) < OUR_MEMORY_BYTES
    assert_restores(dump, database)


def test_huge_value_in_a_table_of_nothing_else_is_held_three_times_at_most(
    database: Database, make_project: MakeProject
) -> None:
    """Counting reads a value there: libpq's buffer has it, libpq's row, and the row in Python."""
    size_bytes = HUGE_BYTES // 2
    make_huge(database, "content text", size_bytes)
    project = make_project(database)
    assert peak_memory(project) < OUR_MEMORY_BYTES + 3 * size_bytes
    (dump,) = project.dumps()
    assert read_metadata(dump)["table_counts"] == {"huge": 1}
    assert peak_memory(project, "--verify", dump) < OUR_MEMORY_BYTES


def peak_memory(project: Project, *arguments: str | Path) -> int:
    """The most memory that a run's own process had, in bytes; not that of the tools."""
    run = project.start(*arguments)
    peak = 0
    while run.poll() is None:
        status = Path(f"/proc/{run.pid}/status").read_text()
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):
            peak = int(found[1]) * 1024
        time.sleep(0.01)
    finish(run).succeeded()
    return peak


# -- what a role may not read ---------------------------------------------------------------------

FORBIDDEN = """
CREATE SCHEMA "odd "" schema"; CREATE SCHEMA closed;
CREATE TABLE open_table (a int); GRANT SELECT ON open_table TO PUBLIC;
CREATE TABLE closed_table (id serial, content text);
INSERT INTO closed_table (content) VALUES ('x');
CREATE TABLE "odd "" schema"."odd ""table"" \\ 会話" (a int);
CREATE TABLE closed.parted (a int) PARTITION BY RANGE (a);
CREATE TABLE closed.part PARTITION OF closed.parted DEFAULT;
CREATE SEQUENCE closed.numbers;
CREATE TABLE rows_hidden (a int); INSERT INTO rows_hidden VALUES (1);
ALTER TABLE rows_hidden ENABLE ROW LEVEL SECURITY; GRANT SELECT ON rows_hidden TO PUBLIC;
CREATE TABLE both_hidden (a int); ALTER TABLE both_hidden ENABLE ROW LEVEL SECURITY;
SELECT lo_from_bytea(4711, 'x'), lo_from_bytea(4712, 'y');
GRANT SELECT ON LARGE OBJECT 4712 TO PUBLIC;
CREATE VIEW closed.shown AS SELECT 1 AS a;
"""


def printed_statements(result: Result) -> list[str]:
    """What the steps say to type: the SQL, as a person would copy it from the terminal."""
    return re.findall(r"^  \d+\. [^:]+: ((?:GRANT|ALTER) .*;)$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("for_good", [False, True], ids=["one by one", "pg_read_all_data"])
def test_role_that_may_not_read_is_told_what_to_grant(
    for_good: bool, cluster: Cluster, role: str, make_project: MakeProject
) -> None:
    # A line break in a name is shown escaped, and does not paste; anything else does.
    cluster.psql(f"ALTER ROLE {role} RENAME TO {(on_one_line := role.replace(chr(10), ' '))}")
    try:
        told_what_to_grant(for_good, cluster, on_one_line, make_project)
    finally:
        cluster.psql(f"ALTER ROLE {on_one_line} RENAME TO {role}")


def told_what_to_grant(
    for_good: bool, cluster: Cluster, role: str, make_project: MakeProject
) -> None:
    with new_database(cluster) as database:
        database.psql(FORBIDDEN)
        name = role[1:-1].replace('""', '"')
        project = make_project(database, settings=database.settings(name, PASSWORD))
        result = project.run().failed_with(4, "Permission error")
        assert not list(project.backups.glob("*.dump*"))
        assert not list(project.backups.glob(".*.partial"))
        for line in (
            "large object: 4711",
            "row security: public.rows_hidden, public.both_hidden",
            "sequence: public.closed_table_id_seq, closed.numbers",
        ):
            assert f"\n{line}\n" in result.stderr, result
        statements = printed_statements(result)
        assert len(statements) == 6, result
        of_tables = [s for s in statements if re.match("GRANT .* ON (TABLE|SEQUENCE|SCHEMA)", s)]
        whole = [s for s in statements if s.startswith("GRANT pg_read_all_data")]
        assert (len(of_tables), len(whole)) == (3, 1)
        for statement in statements:
            if statement not in (of_tables if for_good else whole):
                database.psql(statement)
        assert_restores(project.back_up(), database)
        database.psql(f"REVOKE pg_read_all_data FROM {role}; ALTER ROLE {role} NOBYPASSRLS")


# -- what is left out, and what is refused, in few words ------------------------------------------


def test_what_pg_dump_leaves_out_is_named(database: Database, make_project: MakeProject) -> None:
    database.psql(
        "CREATE TABLE doubled AS SELECT 1 AS a FROM generate_series(1, 2);"
        "CREATE TABLE member (a int); INSERT INTO member VALUES (1);"
        "ALTER EXTENSION plpgsql ADD TABLE member;"
        "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER none FOREIGN DATA WRAPPER none;"
    )
    database.psql(
        "SELECT format('CREATE FOREIGN TABLE far_away_%s (a int) SERVER none', n)"
        " FROM generate_series(1, 300) AS n \\gexec"
    )
    with pytest.raises(ClusterError, match="could not create unique index"):
        database.psql("CREATE UNIQUE INDEX CONCURRENTLY failed ON doubled (a)")
    result = make_project(database).run().succeeded()
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("Not included: "))
    assert "invalid indexes, which a failed build has left (failed on doubled)" in line
    assert "rows of tables that belong to an extension (member)" in line
    assert ", far_away_10, and 290 more)" in line
    assert len(line) < 1000


def test_thousands_of_objects_without_rights_are_told_in_short(
    database: Database, role: str, make_project: MakeProject
) -> None:
    database.psql("SELECT count(lo_from_bytea(0, 'x')) FROM generate_series(1, 5000)")
    name = role[1:-1].replace('""', '"')
    project = make_project(database, settings=database.settings(name, PASSWORD))
    result = project.run().failed_with(4, "Permission error")
    assert ", and 4990 more\n" in result.stderr, result
    assert len(result.stderr) < 4096
    # To grant ten of them is no mend. Where everybody may read them, nothing is to be granted.
    (every,) = (said for said in printed_statements(result) if said.startswith("ALTER ROLE"))
    database.psql(every.replace(r"\n", "\n"))  # the line break in the role's name
    assert_restores(project.back_up(), database)
