"""How the backups in this directory were made: once, with the `backup_db.py` of commit 47444ec.

Every later version has to read them as they are (tests/test_earlier.py), so they are not made
anew: when the script writes something else, add backups of other names. From the top directory:
`PYTHONPATH=tests tests/.venv/bin/python3 tests/earlier/make.py NAME`, a name from BACKUPS.
"""

import sys
import tempfile
from pathlib import Path

from cluster import Cluster, installation
from conftest import project_maker
from support import Database, metadata_path

EARLIER = Path(__file__).resolve().parent

# Schemas, two tables of one name, an empty one, one without columns, partitions, large objects.
MIXED = """
CREATE TABLE conversations (id int PRIMARY KEY, title text);
INSERT INTO conversations SELECT n, 'title ' || n FROM generate_series(1, 7) AS n;
CREATE TABLE empty (nothing text);
CREATE TABLE no_columns ();
INSERT INTO no_columns DEFAULT VALUES;
CREATE SCHEMA other;
CREATE TABLE other.conversations (id int);
INSERT INTO other.conversations SELECT generate_series(1, 3);
CREATE TABLE other."Odd.name" (a int);
INSERT INTO other."Odd.name" VALUES (1), (2);
CREATE TABLE measures (day date) PARTITION BY RANGE (day);
CREATE TABLE measures_2025 PARTITION OF measures FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE measures_rest PARTITION OF measures DEFAULT;
INSERT INTO measures SELECT '2025-12-28'::date + n FROM generate_series(1, 8) AS n;
SELECT lo_from_bytea(4711, 'first'), lo_from_bytea(4712, '');
"""

# Names, values and comments that look like something else in the script of pg_restore.
HOSTILE = r"""
CREATE TABLE "COPY x FROM stdin;" (a text);
INSERT INTO "COPY x FROM stdin;" VALUES ('COPY x FROM stdin;'), ('\.'), (E'\n\\.\n'), ('\N'), ('');
CREATE SCHEMA "COPY public.fake (a) FROM stdin;
1
\.
";
CREATE TABLE "COPY public.fake (a) FROM stdin;
1
\.
"."
\.
" ("b "" FROM stdin;
" int);
INSERT INTO "COPY public.fake (a) FROM stdin;
1
\.
"."
\.
" VALUES (1), (2);
CREATE TABLE "quo""te" (a int);
CREATE TABLE "100% %s {0}" (a int);
INSERT INTO "100% %s {0}" VALUES (1);
CREATE SCHEMA "c.d";
CREATE SCHEMA c;
CREATE TABLE "c.d".e (a int);
CREATE TABLE c."d.e" (a int);
INSERT INTO c."d.e" VALUES (1), (2), (3);
CREATE TABLE "Ünïcödé 会話 💬" ("'; --" text);
INSERT INTO "Ünïcödé 会話 💬" VALUES (E'tab\there'), (NULL), ('会話'), ('\\');
CREATE TABLE "select" (a int);
COMMENT ON TABLE "select" IS '
\.
COPY public.fake (a) FROM stdin;
';
SELECT lo_from_bytea(4711, 'COPY x FROM stdin;');
COMMENT ON LARGE OBJECT 4711 IS '
COPY public.fake (a) FROM stdin;
\.
';
"""

# Name of the database: version of the server and its tools, compression, what is in it.
BACKUPS = {
    "mixed": (17, "zstd:3", MIXED),
    "hostile": (17, "zstd:3", HOSTILE),
    "mixed_15": (15, "gzip:4", MIXED),
    "hostile_15": (15, "gzip:4", HOSTILE),
}


def make(name: str) -> None:
    major, compression, schema = BACKUPS[name]
    with Cluster(installation(major)) as cluster, tempfile.TemporaryDirectory() as scratch:
        cluster.create_database(name)
        database = Database(cluster, name)
        database.psql(schema)
        project = project_maker(Path(scratch), cluster)(
            database, settings={"BACKUP_COMPRESS": compression}
        )
        dump = project.back_up()
        for path in (dump, metadata_path(dump)):
            path.rename(EARLIER / path.name)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        make(argument)
