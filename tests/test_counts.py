"""Exact counts of whatever pg_dump writes rows for, and of nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cluster import Cluster, ClusterError, copy_installation, installation
from conftest import MakeProject
from faults import transaction
from support import (
    Database,
    assert_restores,
    connect,
    finish,
    new_database,
    read_metadata,
)

# An extension as others are: tables that it fills itself, and such as users add rows to. A
# schema and a table of its own are in the way of whoever takes them for the user's.
EXTENSION = {
    "chat_settings.control": "default_version = '1.0'\nrelocatable = false\nsuperuser = true\n",
    "chat_settings--1.0.sql": """
        CREATE SCHEMA settings;
        CREATE TABLE settings.shipped (name text);
        INSERT INTO settings.shipped VALUES ('a'), ('b');
        CREATE TABLE settings.shipped_empty (name text);
        CREATE TABLE settings.all_rows (name text);
        SELECT pg_catalog.pg_extension_config_dump('settings.all_rows', '');
        CREATE TABLE settings.own_rows (name text, is_own bool DEFAULT true);
        INSERT INTO settings.own_rows VALUES ('shipped', false), ('shipped too', false);
        SELECT pg_catalog.pg_extension_config_dump('settings.own_rows', 'WHERE is_own');
        CREATE SEQUENCE settings.numbers;
        SELECT pg_catalog.pg_extension_config_dump('settings.numbers', '');
    """,
}

# Slots for the locks on TABLES tables, one for pg_dump and one for us (80 are enough; pg_dump alone
# takes 50), but not for those on their indexes too, which counting takes (120).
FEW_LOCKS = {"max_locks_per_transaction": "100", "max_connections": "20", "max_wal_senders": "4"}

# Every kind of relation, each table with another number of rows.
KINDS = """
CREATE TABLE plain (id serial PRIMARY KEY, content text);
INSERT INTO plain (content) SELECT repeat('x', n) FROM generate_series(1, 21) AS n;

CREATE TABLE parent (a int);
CREATE TABLE child (b int) INHERITS (parent);
CREATE TABLE grandchild () INHERITS (child);
INSERT INTO parent VALUES (1);
INSERT INTO child VALUES (1), (2);
INSERT INTO grandchild VALUES (1), (2), (3);

CREATE TABLE parted (region text, at int) PARTITION BY LIST (region);
CREATE TABLE parted_eu PARTITION OF parted FOR VALUES IN ('eu') PARTITION BY RANGE (at);
CREATE TABLE parted_eu_1 PARTITION OF parted_eu FOR VALUES FROM (0) TO (10);
CREATE TABLE parted_eu_2 PARTITION OF parted_eu FOR VALUES FROM (10) TO (20);
CREATE TABLE parted_rest PARTITION OF parted DEFAULT;
CREATE INDEX ON parted (at);
CREATE INDEX ON ONLY parted (region);  -- not valid, by intent: a restore has it so too
INSERT INTO parted SELECT 'eu', n FROM generate_series(6, 19) AS n;
INSERT INTO parted VALUES ('us', 1);
CREATE TABLE leafless (a int) PARTITION BY HASH (a);

CREATE UNLOGGED TABLE unlogged (a int);
INSERT INTO unlogged SELECT generate_series(1, 5);

CREATE TABLE no_columns ();
INSERT INTO no_columns DEFAULT VALUES;
INSERT INTO no_columns DEFAULT VALUES;
CREATE TABLE dropped_columns (a int, b text);
INSERT INTO dropped_columns VALUES (1, 'x'), (2, 'y'), (3, 'z');
ALTER TABLE dropped_columns DROP a, DROP b;
CREATE TABLE dropped_first (a bool, b bool GENERATED ALWAYS AS (true) STORED, "odd ""%s""
name" int, c text);
INSERT INTO dropped_first (c) VALUES ('x'), ('y'), (E'\\.'), (E'a\nb');
ALTER TABLE dropped_first DROP a;

CREATE TABLE generated (a int, twice int GENERATED ALWAYS AS (2 * a) STORED);
INSERT INTO generated SELECT generate_series(1, 6);
CREATE TABLE only_generated (one int GENERATED ALWAYS AS (1) STORED);
INSERT INTO only_generated DEFAULT VALUES;
CREATE TABLE policed (a int);
INSERT INTO policed SELECT generate_series(1, 11);
ALTER TABLE policed ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY nobody ON policed USING (false);
CREATE TABLE wide (content text, more jsonb NOT NULL);
ALTER TABLE wide ALTER content SET STORAGE EXTERNAL;
INSERT INTO wide SELECT repeat(E'line\n', 10000), '{}' FROM generate_series(1, 12);
CREATE TABLE identity (id int GENERATED ALWAYS AS IDENTITY, content text);
INSERT INTO identity (content) SELECT 'x' FROM generate_series(1, 7);
CREATE TYPE pair AS (a int, b text);
CREATE TABLE typed OF pair;
INSERT INTO typed SELECT n, 'x' FROM generate_series(1, 8) AS n;
CREATE TABLE empty (a int);

CREATE VIEW shown AS SELECT * FROM plain;
CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM plain;
CREATE MATERIALIZED VIEW not_counted AS SELECT count(*) FROM plain WITH NO DATA;
CREATE FOREIGN DATA WRAPPER nowhere;
CREATE SERVER away FOREIGN DATA WRAPPER nowhere;
CREATE FOREIGN TABLE "Foreign" (a int) SERVER away;
CREATE FOREIGN TABLE foreign_child () INHERITS (parent) SERVER away;
"""

# In the order of creation.
KINDS_COUNTS = {
    "plain": 21,
    "parent": 1,
    "child": 2,
    "grandchild": 3,
    "parted_eu_1": 4,
    "parted_eu_2": 10,
    "parted_rest": 1,
    "unlogged": 5,
    "no_columns": 2,
    "dropped_columns": 3,
    "dropped_first": 4,
    "generated": 6,
    "only_generated": 1,
    "policed": 11,
    "wide": 12,
    "identity": 7,
    "typed": 8,
    "empty": 0,
}

# Columns that are nowhere until they are read.
VIRTUAL = """
CREATE TABLE virtual (twice int GENERATED ALWAYS AS (2 * length(content)) VIRTUAL, content text);
INSERT INTO virtual (content) SELECT 'x' FROM generate_series(1, 13);
CREATE TABLE only_virtual (one int GENERATED ALWAYS AS (1) VIRTUAL);
INSERT INTO only_virtual DEFAULT VALUES;
INSERT INTO only_virtual DEFAULT VALUES;
"""
VIRTUAL_COUNTS = {"virtual": 13, "only_virtual": 2}

EXTENDED = """CREATE EXTENSION chat_settings;
INSERT INTO settings.all_rows VALUES ('mine');
INSERT INTO settings.own_rows VALUES ('mine'), ('mine too');
CREATE TABLE own_rows_child () INHERITS (settings.own_rows);
INSERT INTO own_rows_child VALUES ('a child''s');
CREATE TABLE settings.users_own (a int);
INSERT INTO settings.users_own SELECT generate_series(1, 9);
"""

# own_rows with the row of its child: where there is a condition, pg_dump reads both.
EXTENDED_COUNTS = {
    "settings.all_rows": 1,
    "settings.own_rows": 3,
    "own_rows_child": 1,
    "settings.users_own": 9,
}

TABLES = 3000
MANY_TABLES = f"""
DO $$ BEGIN
    FOR n IN 1 .. {TABLES} LOOP
        EXECUTE format('CREATE TABLE many_%s (a int PRIMARY KEY)', n);
        IF n % 10 = 0 THEN EXECUTE format('INSERT INTO many_%s VALUES (1)', n); END IF;
        IF n % 100 = 0 THEN COMMIT; END IF;  -- creating them takes locks too
    END LOOP;
END $$
"""


@pytest.fixture(scope="module")
def extended_cluster() -> Iterator[Cluster]:
    """A server of its own, from a copy of the installation that has the extension."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        os.chmod(folder, 0o755)  # the server's user is another
        bin_dir = copy_installation(installation(17), Path(folder))
        for name, text in EXTENSION.items():
            (bin_dir.parent / "share" / "extension" / name).write_text(text)
        with Cluster(bin_dir, settings=FEW_LOCKS) as cluster:
            yield cluster


def test_every_kind_of_relation_is_counted(
    each_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(each_cluster) as database, closing(connect(database)) as other:
        database.psql(KINDS)
        with other.cursor() as cursor:
            cursor.execute("CREATE TEMP TABLE temporary AS SELECT 1 AS a")
        dump = make_project(database).back_up()
        metadata = read_metadata(dump)
        assert metadata["table_counts"] == KINDS_COUNTS
        assert list(metadata["table_counts"]) == list(KINDS_COUNTS)
        assert metadata["not_included"] == [
            "contents of materialized views, which a restore computes anew (counted)",
            'data of foreign tables ("Foreign", foreign_child)',
        ]
        assert_restores(dump, database)


@pytest.mark.servers(18)
def test_table_of_virtual_columns_is_counted(
    clusters: Callable[[int], Cluster], make_project: MakeProject
) -> None:
    with new_database(clusters(18)) as database:
        database.psql(VIRTUAL)
        dump = make_project(database).back_up()
        assert read_metadata(dump)["table_counts"] == VIRTUAL_COUNTS
        assert_restores(dump, database)


def test_rows_of_an_extension_are_counted_as_it_asks(
    extended_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(extended_cluster) as database:
        database.psql(EXTENDED)
        dump = make_project(database).back_up()
        metadata = read_metadata(dump)
        assert metadata["table_counts"] == EXTENDED_COUNTS
        assert metadata["extensions"] == {"chat_settings": "1.0", "plpgsql": "1.0"}
        left_out = "rows of tables that belong to an extension (settings.shipped)"
        assert metadata["not_included"] == [left_out]


def test_thousands_of_tables_take_a_lock_each_and_no_more(
    extended_cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(extended_cluster) as database:
        database.psql(MANY_TABLES)
        dump = make_project(database).back_up()
        counts = read_metadata(dump)["table_counts"]
        assert len(counts) == TABLES
        assert sum(counts.values()) == TABLES / 10


# -- indexes, which a count has no use for --------------------------------------------------------

INDEXED_ROWS = 5000

# With a scan of the index alone as the cheapest way to the number of rows: VACUUM has to find them
# committed for good.
INDEXED = f"""
SET synchronous_commit = on;
CREATE TABLE messages (id int, content text);
INSERT INTO messages SELECT n, repeat('x', 1000) FROM generate_series(1, {INDEXED_ROWS}) AS n;
CREATE INDEX messages_id ON messages (id);
VACUUM ANALYZE messages;
"""

# The index takes no part in this, as after the crash of a disk that lied.
STALE = """
SET synchronous_commit = on;
UPDATE pg_index SET indisready = false WHERE indexrelid = 'messages_id'::regclass;
INSERT INTO messages VALUES (0, 'not in the index');
UPDATE pg_index SET indisready = true WHERE indexrelid = 'messages_id'::regclass;
VACUUM messages;
"""


def zero_first_page(index: Path) -> None:
    with index.open("r+b") as file:
        file.write(bytes(8192))


def make_empty(index: Path) -> None:
    os.truncate(index, 0)


@pytest.mark.parametrize("damage", [zero_first_page, make_empty])
def test_damaged_index_is_not_in_the_way(
    damage: Callable[[Path], None], cluster: Cluster, make_project: MakeProject
) -> None:
    with new_database(cluster) as sound:
        sound.psql(INDEXED)
        # Copied file by file: of the copy's index the server holds no page in memory.
        files = (f"--template={sound.name}", "--strategy=file_copy")
        with new_database(cluster, *files) as database:
            path = database.psql("SELECT pg_relation_filepath('messages_id')")
            damage(cluster.data_dir / path)
            dump = make_project(database).back_up()
            with pytest.raises(ClusterError):
                database.psql("SELECT count(*) FROM messages")
        assert read_metadata(dump)["table_counts"] == {"messages": INDEXED_ROWS}
        assert_restores(dump, sound)


def test_stale_index_is_not_asked(database: Database, make_project: MakeProject) -> None:
    database.psql(INDEXED)
    database.psql(STALE)
    assert database.psql("SELECT count(*) FROM messages") == str(INDEXED_ROWS)
    dump = make_project(database).back_up()
    assert read_metadata(dump)["table_counts"] == {"messages": INDEXED_ROWS + 1}
    assert_restores(dump, database)


def test_index_that_is_being_rebuilt_is_not_waited_for(
    database: Database, make_project: MakeProject
) -> None:
    database.psql(INDEXED)
    with transaction(database, "REINDEX INDEX messages_id"):
        finish(make_project(database).start(), seconds=30).succeeded()
