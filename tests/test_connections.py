"""Every way to a server, every role, and names and passwords of every kind."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from cluster import Cluster
from conftest import MakeProject
from faults import DUMP, FILE, fake_call, let_go, paused, sessions_on
from sample import PASSWORD, USER
from support import Database, assert_restores, finish, new_database, read_metadata, wait_until
from test_counts import KINDS, KINDS_COUNTS


@pytest.fixture
def role(cluster: Cluster) -> Iterator[str]:
    """A role that may log in, and nothing else."""
    cluster.psql(f"CREATE ROLE plain LOGIN PASSWORD '{PASSWORD}'")
    yield "plain"
    databases = cluster.psql("SELECT datname FROM pg_database WHERE datallowconn").splitlines()
    for database in databases:
        cluster.psql("DROP OWNED BY plain", database)
    cluster.psql("DROP ROLE plain")


# -- roles ----------------------------------------------------------------------------------------

GRANTS = {
    "pg_read_all_data": "GRANT pg_read_all_data TO plain",
    "plain grants": """
        GRANT SELECT ON ALL TABLES IN SCHEMA public TO plain;
        GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO plain""",
    "member of the owner": "GRANT chat TO plain",
}


@pytest.mark.parametrize("grants", GRANTS.values(), ids=GRANTS)
def test_role_that_is_no_superuser(
    grants: str, role: str, sample_database: Database, make_project: MakeProject
) -> None:
    sample_database.psql(grants)
    project = make_project(settings=sample_database.settings(role, PASSWORD))
    assert_restores(project.back_up(), sample_database)


def test_role_without_a_second_connection(
    role: str, sample_database: Database, make_project: MakeProject
) -> None:
    sample_database.psql(f"GRANT pg_read_all_data TO {role}; ALTER ROLE {role} CONNECTION LIMIT 1")
    project = make_project(settings=sample_database.settings(role, PASSWORD))
    try:
        for _ in range(5):  # the server takes its time to see that a session has left
            result = project.run().failed_with(3, "Database connection error")
            assert 'too many connections for role "plain"' in result.stderr
            assert "two connections at once" in result.stderr
            assert 'ALTER ROLE "plain" CONNECTION LIMIT -1;' in result.stderr
            assert not project.dumps()
    finally:
        sample_database.psql(f"ALTER ROLE {role} CONNECTION LIMIT -1")


# -- ways to the server ---------------------------------------------------------------------------


def test_unix_socket(sample_database: Database, make_project: MakeProject) -> None:
    # No password is set, and over TCP the role would need one.
    settings = sample_database.settings(USER) | {
        "DEV_DB_HOST": str(sample_database.cluster.directory)
    }
    assert_restores(make_project(settings=settings).back_up(), sample_database)


@pytest.mark.parametrize("where", ["home", "PGPASSFILE"])
def test_password_file(where: str, sample_database: Database, make_project: MakeProject) -> None:
    settings = sample_database.settings(USER)
    project = make_project(settings=settings)
    path = project.directory / "home" / ".pgpass"
    if where == "PGPASSFILE":
        path = project.directory / "elsewhere"
        project.configure({**settings, "PGPASSFILE": str(path)})
    project.run().failed_with(3, "Database connection error")
    port, name = settings["DEV_DB_PORT"], sample_database.name
    path.write_text(f"127.0.0.1:{port}:{name}:{USER}:{PASSWORD}\n")
    path.chmod(0o600)
    project.back_up()


# What libpq would let win over the settings: another database, nobody's address, no encoding.
OVERRIDING = {
    "PGSERVICE": {"PGSERVICE": "other", "PGSERVICEFILE": "services"},
    "PGHOSTADDR": {"PGHOSTADDR": "127.9.9.9"},
    "PGCLIENTENCODING": {"PGCLIENTENCODING": "none"},
}


@pytest.mark.parametrize("variable", OVERRIDING)
def test_variable_that_would_override_the_settings_is_ignored(
    variable: str, sample_database: Database, make_project: MakeProject
) -> None:
    sample_database.psql("""CREATE TABLE "tä😀" AS SELECT 'é €' AS "ß" """)
    project = make_project(sample_database)
    (project.directory / "services").write_text("[other]\ndbname=postgres\n", encoding="utf-8")
    project.run(env=OVERRIDING[variable]).succeeded()
    (dump,) = project.dumps()
    assert read_metadata(dump)["database_name"] == sample_database.name
    assert_restores(dump, sample_database)


@pytest.fixture(scope="module")
def standby(cluster: Cluster) -> Iterator[Cluster]:
    """A hot standby of the server that the tests have, with no patience for its readers."""
    follower = Cluster(cluster.bin_dir)
    follower.follow(cluster)
    follower.configure({"max_standby_streaming_delay": "0"})
    with follower:
        yield follower


def arrived(standby: Cluster, cluster: Cluster) -> None:
    """Wait until the standby has all that the server has."""
    there = cluster.psql("SELECT pg_current_wal_insert_lsn()")
    wait_until(lambda: standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{there}'") == "t")


def test_hot_standby_is_backed_up_without_what_it_does_not_have(
    standby: Cluster, cluster: Cluster, database: Database, make_project: MakeProject
) -> None:
    database.psql(KINDS)
    # Of a sequence that counts on its own the standby is told 32 numbers more than were taken.
    database.psql("SELECT setval('plain_id_seq', 21), setval('identity_id_seq', 7)")
    arrived(standby, cluster)
    on_standby = Database(standby, database.name)
    assert on_standby.psql("SELECT pg_is_in_recovery()") == "t"
    dump = make_project(on_standby).back_up()
    metadata = read_metadata(dump)
    counts = {key: rows for key, rows in KINDS_COUNTS.items() if key != "unlogged"}
    assert metadata["table_counts"] == counts
    assert metadata["not_included"] == [
        "data of unlogged tables, which a standby does not have (unlogged)",
        "contents of materialized views, which a restore computes anew (counted)",
        'data of foreign tables ("Foreign", foreign_child)',
    ]
    database.psql("TRUNCATE unlogged")
    assert_restores(dump, database)


def test_standby_that_ends_its_readers(
    standby: Cluster,
    cluster: Cluster,
    sample_database: Database,
    make_project: MakeProject,
) -> None:
    """The server has removed rows that the backup's snapshot still sees."""
    arrived(standby, cluster)
    on_standby = Database(standby, sample_database.name)
    project = make_project(on_standby)
    # What a retry cannot mend: the dump is written, and pg_dump not yet gone. While its file grows,
    # nothing is asked: a question to the session that just ends would lose the server's words.
    grow = 'until [ -e "$HOME/go" ]; do printf x >>"$file"; sleep 0.02; done'
    fake_call(project, *DUMP, f'{FILE}; "$real" "$@"; touch "$HOME/paused"; {grow}')
    process = project.start()
    wait_until(lambda: paused(project))
    sample_database.psql("DELETE FROM messages")
    sample_database.psql("VACUUM messages")
    wait_until(lambda: not sessions_on(on_standby, "application_name = 'backup_db'"))
    let_go(project)
    result = finish(process).failed_with(7, "Backup creation error")
    assert "conflict with recovery" in result.stderr, result
    for setting in ("max_standby_streaming_delay", "hot_standby_feedback"):
        assert setting in result.stderr, result
    assert not project.dumps()


# -- TLS ------------------------------------------------------------------------------------------


def test_server_is_verified_by_its_certificate(
    tls_cluster: Cluster, authority: trustme.CA, make_project: MakeProject, tmp_path: Path
) -> None:
    root = tmp_path / "root ca.pem"
    authority.cert_pem.write_to_path(str(root))
    with new_database(tls_cluster) as database:
        database.psql("CREATE TABLE t AS SELECT 1 AS x")
        project = make_project(
            settings={
                **database.settings(),
                "PGSSLMODE": "verify-full",
                "PGSSLROOTCERT": str(root),
            }
        )
        assert_restores(project.back_up(), database)


def test_server_that_cannot_be_verified(
    tls_cluster: Cluster, authority: trustme.CA, make_project: MakeProject, tmp_path: Path
) -> None:
    right, wrong = str(tmp_path / "right.pem"), str(tmp_path / "wrong.pem")
    authority.cert_pem.write_to_path(right)
    trustme.CA().cert_pem.write_to_path(wrong)
    way = {**Database(tls_cluster, "postgres").settings(), "PGSSLMODE": "verify-full"}
    for settings, words, step in (
        ({"PGSSLROOTCERT": wrong}, "certificate verify failed", "certificate authority"),
        (
            {"PGSSLROOTCERT": right, "DEV_DB_HOST": "localhost"},
            "does not match host name",
            "in the",
        ),
        ({"PGSSLROOTCERT": f"{right}.none"}, "does not exist", "certificate authority"),
        (
            {"PGSSLMODE": "disable"},
            "pg_hba.conf rejects connection",
            "set to require in .env.local",
        ),
    ):
        result = make_project(settings={**way, **settings}).run()
        assert words in result.failed_with(3, "Database connection error").stderr
        assert step in result.stderr.partition("Troubleshooting:")[2], result


def test_clients_certificate(
    tls_cluster: Cluster, authority: trustme.CA, make_project: MakeProject, tmp_path: Path
) -> None:
    """One that is demanded, then a key that others may read; never a weaker pg_hba.conf."""
    authority.cert_pem.write_to_path(str(tls_cluster.data_dir / "ca.pem"))
    hba = tls_cluster.data_dir / "pg_hba.conf"
    hba.write_text(f"hostssl all client all cert\n{hba.read_text()}")
    for statement in (
        "CREATE ROLE client LOGIN SUPERUSER",
        "ALTER SYSTEM SET ssl_ca_file = 'ca.pem'",
        "SELECT pg_reload_conf()",
    ):
        tls_cluster.psql(statement)
    way = {**Database(tls_cluster, "postgres").settings("client"), "PGSSLMODE": "require"}
    project = make_project(settings=way)
    result = project.run().failed_with(3, "Database connection error")
    assert "requires a valid client certificate" in result.stderr, result
    assert (
        "  1. The server asks for this user's certificate; name its file in .env." in result.stderr
    )
    assert "pg_hba" not in result.stderr, result
    certificate = authority.issue_cert(common_name="client")
    key, chain = tmp_path / "a key", tmp_path / "certificate"
    certificate.private_key_pem.write_to_path(str(key))
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    key.chmod(0o644)
    project.configure({**way, "PGSSLKEY": str(key), "PGSSLCERT": str(chain)})
    result = project.run().failed_with(3, "Database connection error")
    (command,) = re.findall(r"^  1\. .*: (chmod .*)$", result.stderr, re.MULTILINE)
    subprocess.run(["sh", "-c", command], check=True)
    project.run().succeeded()


def test_certificates_of_the_system_are_not_those_of_psycopg2(
    tls_cluster: Cluster, make_project: MakeProject
) -> None:
    """The OpenSSL inside its wheel has its own idea of where they are; pg_dump finds them."""
    way = {**Database(tls_cluster, "postgres").settings(), "PGSSLMODE": "verify-full"}
    result = make_project(settings={**way, "PGSSLROOTCERT": "system"}).run()
    result.failed_with(3, "Database connection error")
    steps = result.stderr.partition("Troubleshooting:")[2]
    assert "SSL_CERT_FILE" in steps, result
    assert re.search(r"certificate authority in \S+: PGSSLROOTCERT", steps), result


# -- names and passwords of every kind ------------------------------------------------------------

# A database and the password of its role: what a shell, a conninfo string, a .env file or a file
# name would take for something else.
NAMES = {
    "spaces": ("  my  data", "  pass word  "),
    "quotes": ('it\'s "it"', "'\"'"),
    "slash": ("a/b/../c", "a/b"),
    "dash": ("-d", "-W"),
    "option": ("--list", "--help"),
    "dot": (".hidden", "."),
    "dots": ("..", ".."),
    "assignment": ("dbname=postgres", "k=v"),
    "addresses": ("x@h", "postgres://u:p@h/d"),
    "percent": ("100%41 %s", "%2F%"),
    "expansions": ("$HOME $PATH `id` \\", "${HOME}\\n$x"),
    "comment": ("# a #b", "pass #word"),
    "non-ASCII": ("Größe 数据 😀", "пароль 😀ﬁ"),
    "63 bytes": ("ä" * 31 + "x", "y" * 900),
    "newline": ("a\nb\n", "c\nd"),
    "control characters": ("a\t\x1b[31m\x7f", "\t\x01"),
    "capitals": ("SELECT", "null"),
    "like a backup": ("x_dev_2025-01-27T14-30-00Z.dump", "x"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_name_and_password(kind: str, cluster: Cluster, make_project: MakeProject) -> None:
    name, password = NAMES[kind]
    role = f"~{name}" if len(os.fsencode(name)) < 63 else "x" * 63
    cluster.create_database(name)
    try:
        cluster.psql(f"CREATE ROLE {quoted(role)} LOGIN PASSWORD {literal(password)}")
        database = Database(cluster, name)
        project = make_project(settings=database.settings(role, password))
        dump = project.back_up()
        assert read_metadata(dump)["database_name"] == name
        project.run("--verify", dump).succeeded()

        (project.directory / ".env.local").unlink()
        environ = database.settings(role, password, prefix="")
        project.run("--env", "prod", env=environ).succeeded()
        other = next(path for path in project.dumps() if path != dump)
        assert read_metadata(other)["database_name"] == name
        assert {path.parent for path in project.dumps()} == {project.backups}
        assert project.run("--list").succeeded().stdout.count("✓ Verified") == 2
    finally:
        cluster.drop_database(name)
        cluster.psql(f"DROP ROLE IF EXISTS {quoted(role)}")


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
