"""README.md's recipes for a restore: typed as they stand, on a database with all that one can have.

Each is typed twice, and where it does not fit: nothing that is there may change.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cluster import Cluster, installation
from conftest import project_maker
from environment import TESTS
from sample import PASSWORD, USER, load_rows
from support import (
    SERVERS,
    Database,
    Project,
    Result,
    connect,
    metadata_path,
    new_database,
    program,
    readme_section,
)
from test_runbook import with_tools
from test_servers import EXTENSIONS

SECTION = readme_section("Restore")
# Each block of the section has its name here: one that is added has to be typed by a test.
(
    BEFORE,
    RUNBOOK,
    COPY,
    SWAP,
    LIST_LOST,
    BRING_LOST,
    REPLACE_ROWS,
    ORPHANS,
    SOME_ROWS,
    BRING_ROWS,
    MANAGED,
    NOT_VALID,
    BY_SCRIPT,
    CHECK,
    GLOBALS,
) = re.findall(r"^```\w+\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)

# The functions that one block defines for others.
DEFINE_COPY = COPY[: COPY.rindex("empty_copy")]
DEFINE_SWAP = SWAP[: SWAP.rindex("vacuumdb")]


def inline(beginning: str) -> str:
    """The one command in the text of the section that begins so."""
    found: set[str] = set(re.findall(rf"`({re.escape(beginning)}[^`\n]*)`", SECTION))
    (command,) = found
    return command


# Beside tests/mixed.sql and the sample database: what writes by itself, what points in a circle,
# another schema, partitions below partitions, a key of several columns.
ORDINARY = r"""
GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader; -- as for those that are made from now on
ALTER SCHEMA public OWNER TO chat;
CREATE SCHEMA shop AUTHORIZATION chat;
CREATE SCHEMA kinds AUTHORIZATION chat;
SET ROLE chat;
CREATE TYPE kinds.state AS ENUM ('new', 'it''s "done"');
CREATE DOMAIN kinds.score AS numeric CHECK (VALUE >= 0);
ALTER TABLE conversations ADD gone int, ADD state kinds.state DEFAULT 'new', ADD score kinds.score,
    ADD length int GENERATED ALWAYS AS (length(title)) STORED, ADD "Da""y" date,
    ADD pause interval DEFAULT '-1 day -02:03',
    ADD latest bigint REFERENCES messages DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE conversations DROP gone;
UPDATE conversations SET "Da""y" = '2024-03-04', score = id / 7.0, state = 'it''s "done"',
    latest = (SELECT max(id) FROM messages WHERE conversation_id = conversations.id);

CREATE TABLE audit (id serial PRIMARY KEY, what text, at timestamptz DEFAULT now());
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.audit (what) VALUES (TG_OP || TG_TABLE_NAME); RETURN NULL; END $$;
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN NEW.created_at := now(); RETURN NEW; END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON messages
    FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON conversations
    FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER "to""uch" BEFORE INSERT OR UPDATE ON messages
    FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER off BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION touch();
ALTER TABLE messages DISABLE TRIGGER off;

CREATE TABLE events (id int GENERATED ALWAYS AS IDENTITY, day date, kind text,
    created_at timestamptz, PRIMARY KEY (id, day, kind)) PARTITION BY RANGE (day);
CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (MINVALUE) TO ('2024-03-01')
    PARTITION BY LIST (kind);
CREATE TABLE shop.events_1a PARTITION OF events_1 FOR VALUES IN ('a');
CREATE TABLE events_1b PARTITION OF events_1 DEFAULT;
CREATE TABLE events_2 PARTITION OF events DEFAULT;
INSERT INTO events (day, kind, created_at) SELECT '2024-01-01'::date + i / 20, k, '2024-01-01'
    FROM generate_series(1, 2000) AS i, unnest('{a,b}'::text[]) AS k;
CREATE TRIGGER touch BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION touch();
CREATE TRIGGER audit AFTER INSERT OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TABLE shop.notes (event int, day date, kind text, note text,
    FOREIGN KEY (event, day, kind) REFERENCES events ON DELETE CASCADE);
INSERT INTO shop.notes SELECT id, day, kind, 'n' FROM events WHERE id % 100 = 0;
CREATE VIEW talk AS
    SELECT title, content FROM conversations AS c JOIN messages ON c.id = conversation_id;
CREATE STATISTICS shop.together ON conversation_id, role FROM messages;
RESET ROLE;

ALTER TABLE conversations ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON conversations TO reader USING (started_by = current_user);
GRANT SELECT ON messages TO reader;
CREATE PUBLICATION talks FOR TABLE conversations, messages;
CREATE FUNCTION keep_watch() RETURNS event_trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO public.audit (what) VALUES (TG_TAG); END $$;
CREATE EVENT TRIGGER keeping ON ddl_command_end WHEN TAG IN ('CREATE EXTENSION')
    EXECUTE FUNCTION keep_watch();
"""
# What bends values, or stops a restore, and what `sed` could stumble over.
OF_THE_DATABASE = r"""
ALTER DATABASE project_chat OWNER TO chat;
ALTER DATABASE project_chat SET search_path = public, shop;
ALTER DATABASE project_chat SET datestyle = 'SQL, DMY';
ALTER DATABASE project_chat SET intervalstyle = postgres_verbose;
ALTER DATABASE project_chat SET extra_float_digits = 0;
ALTER DATABASE project_chat SET array_nulls = off;
ALTER DATABASE project_chat SET statement_timeout = '20s';
ALTER DATABASE project_chat SET my.note = E'a "b" DATABASE c ;\nd';
ALTER ROLE reader IN DATABASE project_chat SET work_mem = '7MB';
REVOKE TEMPORARY ON DATABASE project_chat FROM PUBLIC;
GRANT CONNECT ON DATABASE project_chat TO reader WITH GRANT OPTION;
COMMENT ON DATABASE project_chat IS E'first; DATABASE second\n  third "quoted"'
"""
# Beside those of EXTENSIONS, with nothing that uses them: a superuser has to make them.
BARE_EXTENSIONS = ("dblink", "postgres_fdw")


def load(database: Database) -> None:
    """Everything that the server's build can have."""
    server = database.cluster
    server.psql(f"CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{PASSWORD}'; CREATE ROLE reader")
    database.psql(f"GRANT CREATE ON SCHEMA public TO {USER}")
    load_rows(server, database.name, USER)
    database.psql((TESTS / "mixed.sql").read_text(encoding="utf-8"))
    database.psql(ORDINARY)
    available = server.psql("SELECT name FROM pg_available_extensions").splitlines()
    for extension in sorted({*EXTENSIONS, *BARE_EXTENSIONS} & set(available)):
        database.psql(f"CREATE EXTENSION {extension}; {EXTENSIONS.get(extension, '')}")
    database.psql(OF_THE_DATABASE)


def whole(database: Database, reader: Cluster | None = None) -> list[str]:
    """All that a database is but its name, a line each as pg_dump writes it, in any order.

    The one pg_dump reads both sides where their versions differ.
    """
    cluster = database.cluster
    way = (f"--host={cluster.directory}", f"--port={cluster.port}")
    script = (reader or cluster).run("pg_dump", "--create", *way, database=database.name)
    name = re.compile(rf"( DATABASE |^\\connect ){database.name}\b")
    lines, copying = [], ""
    for line in script.splitlines():
        if line.startswith("COPY "):
            copying = f"{line}: "
        elif line == r"\.":
            copying = ""
        elif copying or not re.match(r"--|\\(un)?restrict |$", line):
            lines.append(copying + name.sub(r"\1", line))
    return sorted(lines)


def assert_equal(database: Database, expected: list[str]) -> None:
    now = whole(database)
    assert set(expected) ^ set(now) == set()
    assert now == expected  # each as often, too


@dataclass(frozen=True)
class Place:
    """A server with a database; the backup of it is called FILE in the folder."""

    server: Cluster
    project: Project
    dump: Path
    original: list[str]

    @property
    def version(self) -> int:
        return int(self.server.psql("SHOW server_version_num")) // 10000

    @property
    def copy(self) -> Database:
        return Database(self.server, "restored")

    def type(self, text: str, *, user: str = "postgres", server: Cluster | None = None) -> Result:
        """What a shell makes of it, pasted behind what is typed before everything."""
        server = server or self.server
        text = f"{BEFORE}\n{text}".replace("PGUSER=postgres", f"PGUSER={user}")
        text = text.replace("127.0.0.1", str(server.directory)).replace("5432", str(server.port))
        done = subprocess.run(
            ["sh"],
            input=text,
            cwd=self.project.backups,
            env=self.project.environ,
            capture_output=True,
            text=True,
        )
        return Result(text, done.returncode, done.stdout, done.stderr)

    def make(self, name: str) -> Database:
        """The database as it was when it was backed up, under this name."""
        self.server.drop_database(name)
        self.server.create_database(name, "--template=original")
        self.server.psql(OF_THE_DATABASE.replace("project_chat", name))
        return Database(self.server, name)

    @contextmanager
    def cut(self, part: float) -> Iterator[None]:
        """FILE.dump ends early, as a copy that was interrupted."""
        path = self.project.backups / "FILE.dump"
        path.unlink()
        content = self.dump.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        yield
        path.unlink()
        path.symlink_to(self.dump)


def back_up(database: Database, project: Project, reader: Cluster | None = None) -> Place:
    dump = project.back_up()
    (dump.parent / "FILE.dump").symlink_to(dump)
    (dump.parent / "FILE.metadata.json").symlink_to(metadata_path(dump))
    return Place(database.cluster, project, dump, whole(database, reader))


@pytest.fixture(scope="module", params=SERVERS, ids="postgresql-{}".format)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    with Cluster(installation(request.param)) as server:
        server.create_database("project_chat")
        database = Database(server, "project_chat")
        load(database)
        server.psql("CREATE DATABASE original TEMPLATE project_chat")
        project = project_maker(tmp_path_factory.mktemp("recipes"), server)(database)
        yield back_up(database, project)


@pytest.fixture
def live(place: Place) -> Iterator[Database]:
    """The database in use, which a test may damage."""
    yield place.make("project_chat")
    for name in ("project_chat", "restored", "project_chat_old"):
        place.server.drop_database(name)


# -- the server is lost ---------------------------------------------------------------------------


# What jq prints, without it.
PRINT_RUNBOOK = inline("python3 -c")


@pytest.mark.servers(15)
def test_runbook_by_jq(place: Place) -> None:
    program("jq", "jq")
    shown, run = RUNBOOK.splitlines()
    assert place.type(shown).succeeded().stdout == place.type(PRINT_RUNBOOK).stdout
    assert run == f"{shown} | sh"


def test_the_server_is_lost(place: Place) -> None:
    run = f"{PRINT_RUNBOOK} | sh"
    nightly = GLOBALS.split(maxsplit=5)[5]
    place.type(nightly).succeeded()
    saved = Path(place.project.environ["HOME"]) / "globals.sql"
    assert saved.stat().st_mode & 0o777 == 0o600
    saved.rename(place.project.backups / "globals.sql")
    passwords = "SELECT rolname, rolpassword FROM pg_authid WHERE rolname <> 'postgres' ORDER BY 1"
    with Cluster(place.server.bin_dir) as fresh:
        place.type(inline("psql --dbname=postgres --file=globals.sql"), server=fresh).succeeded()
        assert fresh.psql(passwords) == place.server.psql(passwords)
        place.type(run, server=fresh).succeeded()
        again = Database(fresh, "project_chat")
        assert_equal(again, place.original)
        assert place.type(run, server=fresh).returncode != 0
        assert_equal(again, place.original)


# -- a copy beside it -----------------------------------------------------------------------------


def test_copy_beside_the_live_database(place: Place, live: Database) -> None:
    place.type(COPY).succeeded()
    assert_equal(place.copy, place.original)
    twice = place.type(COPY)
    assert twice.returncode != 0
    assert 'database "restored" already exists' in twice.stderr
    for database in (live, place.copy):
        assert_equal(database, place.original)


@pytest.mark.parametrize("part", [0.001, 0.6], ids=["in its contents", "in its rows"])
def test_copy_of_a_dump_that_breaks(part: float, place: Place, live: Database) -> None:
    with place.cut(part):
        assert place.type(COPY).returncode != 0
    assert_equal(live, place.original)


def test_swap_and_the_way_back(place: Place, live: Database) -> None:
    copy = place.make("restored")
    copy.psql("CREATE TABLE of_the_copy ()")
    as_copied = whole(copy)
    application = connect(live)
    place.type(SWAP).succeeded()
    application.close()
    assert_equal(live, as_copied)
    assert_equal(Database(place.server, "project_chat_old"), place.original)

    application = connect(live)
    assert 'database "restored" does not exist' in place.type(SWAP).stderr
    place.server.create_database("restored")
    application.cursor().execute("SELECT 'of_the_copy'::regclass")  # it was left alone
    assert 'database "project_chat_old" already exists' in place.type(SWAP).stderr
    assert_equal(live, as_copied)
    place.server.drop_database("restored")

    place.type(f"{DEFINE_SWAP}{inline('swap project_chat_old')}").succeeded()
    assert_equal(live, place.original)
    assert_equal(copy, as_copied)
    place.type(f"{DEFINE_SWAP}{inline('swap project_chat_old').replace('_old restored', '_old x')}")
    assert_equal(live, place.original)


# -- one table ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        "DROP TABLE messages CASCADE",
        "DROP TABLE events CASCADE; DROP SCHEMA shop CASCADE",
        "DROP TABLE typed, measures, vehicle CASCADE; DROP SEQUENCE untouched",
        """DROP SCHEMA "Sales & ""more\""" CASCADE; DROP FUNCTION audit, standard CASCADE;
        DROP VIEW moods""",
        """DROP POLICY own ON conversations; DROP PUBLICATION talks, everything;
        DROP RULE no_delete ON ruled""",
    ],
    ids=["table", "partitions", "tables", "schema", "policy"],
)
def test_what_was_dropped(loss: str, place: Place, live: Database) -> None:
    live.psql(loss)
    assert place.type(LIST_LOST).succeeded().stdout != ""
    place.type(BRING_LOST).succeeded()
    assert_equal(live, place.original)
    assert "already exists" in place.type(BRING_LOST).stderr
    assert_equal(live, place.original)
    assert place.type(LIST_LOST).succeeded().stdout == ""
    place.type(BRING_LOST)
    assert_equal(live, place.original)


def test_what_was_dropped_and_a_dump_that_breaks(place: Place, live: Database) -> None:
    live.psql("DROP TABLE messages CASCADE")
    damaged = whole(live)
    for part in (0.001, 0.6):
        place.type(LIST_LOST).succeeded()
        with place.cut(part):
            assert place.type(BRING_LOST).returncode != 0
        assert_equal(live, damaged)


# What was done to rows, without a word to other tables. No number is given twice afterwards.
SPOIL = """
SET session_replication_role = replica;
UPDATE conversations SET started_by = 'wrong', title = 'wrong' || id;
DELETE FROM conversations WHERE id IN (7, 8);
UPDATE events SET created_at = now() WHERE id > 10;
DELETE FROM events WHERE kind = 'b';
SELECT setval('conversations_id_seq', 1000);
"""


def replace_rows(table: str, place: Place) -> str:
    """The recipe for this table, as README.md changes it for 15."""
    text: str = REPLACE_ROWS.replace("conversations", table)
    return text if place.version > 15 else text.replace("--table-and-children", "--table")


def find_orphans(place: Place) -> list[str]:
    psql = f"{inline('psql --no-align')} --set=ON_ERROR_STOP=1"
    done = place.type(f"{psql} <<'END'\n{ORPHANS}END").succeeded()
    return sorted(done.stdout.splitlines())


def test_wrong_rows(place: Place, live: Database) -> None:
    place.make("restored")
    live.psql(SPOIL)
    partitions = ("events_1b", "shop.events_1a", "events_2")
    for table in ("conversations", *(("events",) if place.version > 15 else partitions)):
        place.type(replace_rows(table, place)).succeeded()
    number = "SELECT pg_catalog.setval('public.conversations_id_seq', "
    expected = [line for line in place.original if not line.startswith(number)]
    expected = sorted([*expected, f"{number}1000, true);"])
    assert_equal(live, expected)
    place.type(replace_rows("conversations", place)).succeeded()
    assert_equal(live, expected)
    assert find_orphans(place) == []


def test_wrong_rows_where_nothing_would_come_back(place: Place, live: Database) -> None:
    partitions_left_out = replace_rows("events", place).replace("-and-children", "")
    assert place.type(partitions_left_out).returncode != 0  # there is no copy
    place.make("restored")
    assert place.type(partitions_left_out).returncode != 0
    assert_equal(live, place.original)
    live.psql("ALTER TABLE conversations ADD CHECK (id <> 99) NOT VALID")
    before = whole(live)
    assert place.type(replace_rows("conversations", place)).returncode != 0
    assert_equal(live, before)


def test_orphans_are_named_by_every_kind_of_key(place: Place, live: Database) -> None:
    live.psql(
        """SET session_replication_role = replica;
        DELETE FROM conversations WHERE id = 42;
        DELETE FROM events WHERE id = 100;
        DELETE FROM egg"""
    )
    assert find_orphans(place) == [
        "chicken chicken_egg_fkey|1",
        "conversation_index conversation_index_conversation_id_fkey|1",
        "messages messages_conversation_id_fkey|22",
        "notes notes_event_day_kind_fkey|1",
    ]


# -- some rows ------------------------------------------------------------------------------------

LOSE_ONE = """
SET session_replication_role = replica;
DELETE FROM messages WHERE conversation_id = 42; DELETE FROM conversations WHERE id = 42;
"""


@pytest.mark.parametrize("user", ["postgres", USER])
def test_one_conversation(user: str, place: Place, live: Database) -> None:
    copy = place.make("restored")
    copy.psql("UPDATE conversations SET started_by = 'old' WHERE id = 1")
    place.server.psql(
        "ALTER DATABASE restored SET datestyle = 'SQL, MDY';"
        "ALTER DATABASE restored SET intervalstyle = sql_standard;"
        "ALTER DATABASE restored SET statement_timeout = '1ms'"
    )
    live.psql(
        f"{LOSE_ONE} ALTER TABLE messages ENABLE ALWAYS TRIGGER audit;"
        "ALTER DATABASE project_chat SET default_transaction_read_only = on"
    )
    before = [
        *place.original,
        "ALTER TABLE public.messages ENABLE ALWAYS TRIGGER audit;",
        "ALTER DATABASE  SET default_transaction_read_only TO 'on';",
    ]
    # Of the first, which is there as it is, nothing is overwritten.
    text = SOME_ROWS.replace("'id = 42'", "'id IN (1, 42)'") + BRING_ROWS
    for inserted in (["1", "22"], ["0", "0"]):
        done = place.type(text, user=user).succeeded()
        assert re.findall("INSERT 0 (.*)", done.stdout) == inserted
        assert_equal(live, sorted(before))
    assert find_orphans(place) == []


@pytest.mark.parametrize("user", ["postgres", USER])
def test_one_conversation_where_something_breaks(user: str, place: Place, live: Database) -> None:
    live.psql(LOSE_ONE)
    before = whole(live)
    assert place.type(SOME_ROWS + BRING_ROWS, user=user).returncode != 0  # there is no copy
    copy = place.make("restored")
    for right, wrong in (
        ("conversation_id = 42", "1 / (id - 1500) < 2"),  # breaks in the midst of the rows
        ("conversation_id = 42", "id = 42 AND"),
        ("rows conversations 'id = 42' &&", ""),  # a key refuses
        ("rows conversations", "rows conversation"),
    ):
        assert place.type(SOME_ROWS.replace(right, wrong) + BRING_ROWS, user=user).returncode != 0
        assert_equal(live, before)
    if user == USER:  # who would see fewer rows
        copy.psql("ALTER TABLE messages ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        assert "row-level security" in place.type(SOME_ROWS + BRING_ROWS, user=user).stderr
        assert_equal(live, before)


@pytest.mark.parametrize(
    ("table", "lose"),
    [
        ("events", "DELETE FROM"),
        ("shop.events_1a", "DELETE FROM"),
        ("typed", "DELETE FROM"),
        ("egg", "DELETE FROM"),
        ("pairs or embeddings", "TRUNCATE"),  # with an extension's type: what the build has
        ("taxi", "TRUNCATE"),
        ('"Sales & ""more"""."COPY x (y) FROM stdin;"', "TRUNCATE"),
    ],
)
def test_rows_of_any_table(table: str, lose: str, place: Place, live: Database) -> None:
    """With keys in a circle, too: what README.md has put into the second block."""
    copy = place.make("restored")
    if " or " in table:
        either = table.replace(" or ", "|")
        table = copy.psql(f"SELECT tablename FROM pg_tables WHERE tablename ~ '^({either})$'")
    live.psql(f"SET session_replication_role = replica; {lose} {table}")
    make = SOME_ROWS.replace("rows conversations 'id = 42' &&", "")
    make = make.replace("rows messages 'conversation_id = 42'", f"rows '{table}' true")
    bring = BRING_ROWS.replace("'conversations'::regclass, 'messages'", f"'{table}'")
    bring = bring.replace("\\i ", f"{inline('SET session_replication_role')}\n\\i ")
    place.type(make + bring).succeeded()
    assert_equal(live, place.original)


# -- a managed server -----------------------------------------------------------------------------

# Rows, sequences, keys, and what is made, but not what a superuser has to make.
ALLOWED = re.compile(
    r"COPY |SELECT pg_catalog\.(setval|lo)|    ADD CONSTRAINT|ALTER TABLE .* (EN|DIS)ABLE"
    r"|CREATE (?!DATABASE|PUBLICATION|EVENT|EXTENSION|FOREIGN|SERVER|USER)"
)


@pytest.fixture
def manager(place: Place) -> Iterator[str]:
    """Somebody who may make databases and roles, and that is all."""
    place.server.psql("CREATE ROLE manager LOGIN CREATEDB CREATEROLE")
    yield "manager"
    place.server.drop_database("restored")
    place.server.psql("DROP OWNED BY manager; DROP ROLE manager")


def assert_only_refused(copy: Database, place: Place, owner: str) -> None:
    """All rows are there, and all else but what is refused."""
    expected = {line for line in place.original if ALLOWED.match(line)}
    missing = expected - set(whole(copy))
    # Of pgvector, which takes a superuser in the builds that have it.
    assert [line for line in missing if not re.search(r"\bembeddings", line)] == []
    owners = "SELECT DISTINCT tableowner FROM pg_tables WHERE tablename IN ('messages', 'events')"
    assert copy.psql(owners) == owner


def test_managed_server(manager: str, place: Place) -> None:
    for _ in range(2):
        assert place.type(MANAGED, user=manager).returncode == 1
        assert_only_refused(place.copy, place, manager)


def test_managed_server_with_one_owner(manager: str, place: Place) -> None:
    place.server.psql(f"GRANT {USER} TO {manager}")
    text = MANAGED.replace("createdb", inline("createdb --owner"))
    text = text.replace(inline("--no-privileges"), inline("--role"))
    assert place.type(text, user=manager).returncode == 1
    assert_only_refused(place.copy, place, USER)


def test_managed_server_with_all_owners(place: Place) -> None:
    runbook = place.type(PRINT_RUNBOOK).succeeded().stdout
    roles = "".join(line for line in runbook.splitlines(True) if "CREATE ROLE" in line)
    with Cluster(place.server.bin_dir) as fresh:
        fresh.psql("CREATE ROLE manager LOGIN CREATEDB CREATEROLE")
        if place.version > 15:
            roles = f"{inline('export PGOPTIONS')}\n{roles}"
        place.type(roles, user="manager", server=fresh)
        if place.version == 15:
            fresh.psql(inline("GRANT chat"), user="manager")
        text = MANAGED.replace(inline("--no-owner --no-privileges"), "")
        assert place.type(text, user="manager", server=fresh).returncode == 1
        assert_only_refused(Database(fresh, "restored"), place, USER)


# -- what is refused, other versions --------------------------------------------------------------


@pytest.fixture
def flawed(place: Place, tmp_path: Path) -> Iterator[Place]:
    """A backup of a database with orphans, and with a check that finds its table by a path."""
    with new_database(place.server) as database:
        load_rows(place.server, database.name, "postgres")
        database.psql(
            """CREATE FUNCTION is_known(text) RETURNS bool LANGUAGE sql
                AS 'SELECT EXISTS (SELECT FROM conversations WHERE title = $1)';
            CREATE TABLE mentions (title text CHECK (is_known(title)));
            SET session_replication_role = replica;
            DELETE FROM conversations WHERE id = 42;
            DELETE FROM conversation_index WHERE conversation_id = 42;
            INSERT INTO mentions SELECT title FROM conversations"""
        )
        yield back_up(database, project_maker(tmp_path, place.server)(database))
    place.server.drop_database("restored")


def test_something_is_refused(flawed: Place) -> None:
    made = flawed.type(f"{COPY.rstrip()} {inline('2> ')}; {inline('grep error')}")
    assert "messages_conversation_id_fkey" in made.stdout
    assert 'relation "conversations" does not exist' in made.stdout
    key = "SELECT convalidated FROM pg_constraint WHERE conname = 'messages_conversation_id_fkey'"
    assert flawed.copy.psql(key) == ""
    flawed.type(NOT_VALID).succeeded()
    assert flawed.copy.psql(key) == "f"
    before = whole(flawed.copy)
    assert "already exists" in flawed.type(NOT_VALID).stderr
    assert_equal(flawed.copy, before)

    flawed.copy.psql("ALTER TABLE messages DROP CONSTRAINT messages_conversation_id_fkey")
    flawed.copy.psql("DELETE FROM messages WHERE conversation_id = 42")
    for _ in range(2):
        again = flawed.type(inline("pg_restore --dbname=restored --section"))
        assert "already exists" in again.stderr
        assert flawed.copy.psql(key) == "t"
    in_the_way = {line for line in flawed.original if re.match(r".*messages .*: \d+\t42\t", line)}
    lost = {line for line in flawed.original if line.startswith("COPY public.mentions ")}
    assert set(flawed.original) - set(whole(flawed.copy)) == in_the_way | lost


def test_names_that_are_found_by_a_path(flawed: Place) -> None:
    flawed.type(COPY)
    before = whole(flawed.copy)
    assert "already exists" in flawed.type(DEFINE_COPY + BY_SCRIPT).stderr
    assert_equal(flawed.copy, before)
    flawed.type(f"{inline('dropdb restored')}; {DEFINE_COPY}{BY_SCRIPT}")
    (missing,) = set(flawed.original) - set(whole(flawed.copy))
    assert missing.startswith("    ADD CONSTRAINT messages_conversation_id_fkey ")


@pytest.mark.servers(15, 17)
@pytest.mark.parametrize(("source", "target"), [(17, 15), (15, 17)], ids=["older", "pg_attver"])
def test_other_versions(source: int, target: int, tmp_path: Path) -> None:
    """By the tools of 17: into an older server, and what a server of 15.20's day has in it."""
    tools = installation(17)
    with Cluster(installation(source)) as old, Cluster(installation(target)) as server:
        old.create_database("project_chat")
        database = Database(old, "project_chat")
        load(database)
        reader = old if source == 17 else server
        project = with_tools(project_maker(tmp_path, old)(database), tools)
        place = replace(back_up(database, project, reader), server=server)
        server.psql(f"CREATE ROLE {USER}; CREATE ROLE reader")
        done = place.type(DEFINE_COPY + BY_SCRIPT)
        # Of columns with a newline in their names, or their tables', it is refused and shown.
        assert done.stderr.count("ERROR: ") == (3 if source == 15 else 0), done
        differing = set(place.original) ^ set(whole(place.copy, reader))
        assert {line for line in differing if ALLOWED.match(line)} == set()


# -- the dump by itself ---------------------------------------------------------------------------


def test_without_this_tool(place: Place) -> None:
    good = place.type(CHECK).succeeded()
    assert good.stderr == ""
    assert good.stdout.startswith("FILE.dump: OK\n")
    assert "TABLE DATA public messages chat" in good.stdout
    with place.cut(0.9):
        bad = place.type(CHECK)
    assert bad.stdout.startswith("FILE.dump: FAILED\n")
    assert "pg_restore: error: could not read from input file" in bad.stderr


def test_damaged_dump(place: Place) -> None:
    with place.cut(0.9):
        assert place.type(inline("pg_restore --file=salvaged.sql")).returncode == 1
    assert "COPY public.conversations " in (place.project.backups / "salvaged.sql").read_text()


BLOCKS = re.findall(r"^```bash\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


def test_no_block_has_jobs_without_sections() -> None:
    """A row trigger of a partitioned table waits for its parent only, not for the partitions."""
    lines = [line for line in LINES if "--jobs" in line]
    assert lines
    assert all("--section=" in line for line in lines)


def test_every_block_can_be_pasted_at_a_prompt() -> None:
    """There a `!` recalls a command, and zsh knows no comments."""
    assert LINES
    assert [line for line in LINES if re.search(r"!|(^|\s)#", line)] == []
