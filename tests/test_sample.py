"""What the other tests stand on: the sample database, the servers, the oracles."""

from __future__ import annotations

import errno
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import (
    USERS,
    Cluster,
    ClusterError,
    User,
    installation,
    server_user,
    users_of_processes,
)
from conftest import MakeProject
from environment import TESTS
from sample import DATABASE, PASSWORD, TABLES, USER, load_rows
from support import (
    UNPRIVILEGED,
    Database,
    Project,
    assert_restores,
    contents_of,
    new_database,
    small_disk,
    wait_until,
)

# Starts a server, tells where it is, and waits to be killed.
PARENT = """
import sys
from cluster import Cluster, installation
with Cluster(installation(17)) as cluster:
    print(cluster.directory, cluster.port, cluster.pid, flush=True)
    sys.stdin.read()
"""

# A prefix for a command that root runs: it is run by a user who is nobody we know.
STRANGER = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")

# -- the sample database --------------------------------------------------------------------------


def test_sample_has_the_rows_of_the_contract_in_its_order(each_cluster: Cluster) -> None:
    sample = Database(each_cluster, DATABASE)
    tables = sample.psql(TABLES).splitlines()
    assert [(table, int(sample.psql(f"SELECT count(*) FROM {table}"))) for table in tables] == [
        ("conversations", 150),
        ("messages", 3420),
        ("project_knowledge", 12),
        ("conversation_index", 145),
    ]


def test_sample_is_the_same_each_time(cluster: Cluster, database: Database) -> None:
    database.psql(f"ALTER DATABASE {database.name} SET timezone = 'Asia/Kathmandu'")
    load_rows(cluster, database.name, "postgres")
    database.psql(f"ALTER DATABASE {database.name} RESET timezone")
    assert database.contents() == Database(cluster, DATABASE).contents()


def test_sample_holds_together(sample_database: Database) -> None:
    assert sample_database.psql(
        "SELECT conrelid::regclass, confrelid::regclass FROM pg_constraint"
        " WHERE contype = 'f' AND convalidated ORDER BY conrelid, confrelid"
    ).splitlines() == [
        "messages|conversations",
        "project_knowledge|conversations",
        "conversation_index|conversations",
        "conversation_index|messages",
    ]
    with pytest.raises(ClusterError, match="violates foreign key constraint"):
        sample_database.psql("UPDATE messages SET conversation_id = 151 WHERE id = 1")


def test_sample_is_shown_to_its_end() -> None:
    """README.md's first command: a conversation is there, is gone, and is there again."""
    done = subprocess.run([sys.executable, TESTS / "sample.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shown = re.findall(r"^ +title .*\n-.*\n(.*)\n", done.stdout, re.MULTILINE)
    assert shown == [" Data retention · open questions |       22", "(0 rows)", shown[0]]


# -- servers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_server_goes_with_its_parent(frozen: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=TESTS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout
        directory, port, postmaster = parent.stdout.readline().split()
        if frozen:
            os.kill(int(postmaster), signal.SIGSTOP)
        parent.kill()
    wait_until(lambda: not Path(directory).exists())
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", int(port))) == errno.ECONNREFUSED


def test_server_runs_from_a_place_that_its_user_cannot_enter(tmp_path: Path) -> None:
    package = installation(17).parent.parent
    home = tmp_path / "home"
    shutil.copytree(package, home / package.name, symlinks=True)
    home.chmod(0o700)
    with Cluster(home / package.name / "pginstall" / "bin") as cluster:
        assert cluster.psql("SELECT 1") == "1"


def test_server_takes_another_port_where_its_own_is_taken(cluster: Cluster) -> None:
    other = Cluster(cluster.bin_dir)
    other.configure({"port": str(cluster.port)})
    other.port = cluster.port
    with other:
        assert other.port != cluster.port
        assert other.psql("SHOW port") == str(other.port)


def test_server_survives_a_crash(cluster: Cluster) -> None:
    with Cluster(cluster.bin_dir) as own:
        port = own.port
        own.crash()
        assert own.pid is None
        own.start()
        assert (own.port, own.psql("SELECT 1")) == (port, "1")


def test_server_is_closed_to_other_users_of_the_machine(each_cluster: Cluster) -> None:
    """Whoever gets in as superuser can run programs as the user who runs the server."""
    rules = each_cluster.psql("SELECT DISTINCT type, auth_method FROM pg_hba_file_rules")
    assert set(rules.splitlines()) == {"local|trust", "host|scram-sha-256"}

    way = {"PGHOST": each_cluster.host, "PGPORT": str(each_cluster.port), "PGUSER": "postgres"}
    psql = [f"{each_cluster.bin_dir}/psql", "--no-password", "--command=SELECT 1"]
    over_loopback = subprocess.run(psql, env={**way, "HOME": "/nowhere"}, stderr=subprocess.PIPE)
    assert b"no password supplied" in over_loopback.stderr

    assert stat.S_IMODE(each_cluster.directory.stat().st_mode) == 0o700
    if os.geteuid() == 0:  # who is not cannot become another user
        entering = [*STRANGER, "ls", f"{each_cluster.directory}/.s.PGSQL.{each_cluster.port}"]
        assert b"Permission denied" in subprocess.run(entering, stderr=subprocess.PIPE).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="the server of a user is run by that user")
def test_user_of_a_server_is_nobody_else(cluster: Cluster) -> None:
    with Cluster(cluster.bin_dir) as other:
        users = {each.directory.stat().st_uid for each in (cluster, other)}
        assert len(users) == 2
        assert users <= set(USERS)
    # Whoever ended the one, by all processes of its user, has not ended the other.
    assert cluster.psql("SELECT 1") == "1"

    two = range(60001, 60003)
    with server_user(two) as first, server_user(two) as second:
        assert {first, second} == {User(uid, uid) for uid in two}
        with pytest.raises(ClusterError, match="none is free"), server_user(two):
            pass
    as_another = ["setpriv", f"--reuid={two[0]}", "--clear-groups", "sleep", "100"]
    with subprocess.Popen(as_another) as process:
        try:
            wait_until(lambda: two[0] in users_of_processes())
            with server_user(two) as free:
                assert free == User(two[1], two[1])
        finally:
            process.kill()
    account = min({account.pw_uid for account in pwd.getpwall()} - users_of_processes())
    with pytest.raises(ClusterError), server_user(range(account, account + 1)):
        pass


# -- copies of the script, and the oracles --------------------------------------------------------


def test_backup_restores_on_each_version(each_cluster: Cluster, make_project: MakeProject) -> None:
    with new_database(each_cluster, f"--template={DATABASE}", f"--owner={USER}") as sample:
        project = make_project(sample, settings=sample.settings(USER, PASSWORD))
        assert_restores(project.back_up(), sample)


def test_oracle_sees_every_kind_of_difference(sample_database: Database) -> None:
    seen = [(sample_database.schema(), sample_database.contents())]
    for change in (
        "UPDATE messages SET content = content || ' ' WHERE id = 3420",
        "DELETE FROM conversation_index WHERE conversation_id = 1",
        "SELECT nextval('conversations_id_seq')",
        "SELECT lo_create(4711)",
        "SELECT lo_put(4711, 0, 'x')",
        "COMMENT ON TABLE messages IS 'another'",
        "GRANT SELECT ON messages TO pg_monitor",
        'CREATE TABLE "it\'s ""new""" ("x.*" int, x int, row text)',
        """INSERT INTO "it's ""new\""" VALUES (1, 2, E'a\\nb')""",
        "CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM messages",
        "CREATE TABLE empty (); INSERT INTO empty DEFAULT VALUES",
    ):
        sample_database.psql(change)
        now = (sample_database.schema(), sample_database.contents())
        assert now not in seen, change
        seen.append(now)


def test_constants_of_a_copy_are_rewritten_or_missed(make_project: MakeProject) -> None:
    project = make_project(constants={"METADATA_VERSION": 0.5, "DEFAULT_HOST": "a\\b"})
    assert "\nMETADATA_VERSION = 0.5\n" in (project.directory / "backup_db.py").read_text()
    config = project.directory / "brain_core" / "config.py"
    assert "\nDEFAULT_HOST = 'a\\\\b'\n" in config.read_text()
    with pytest.raises(AssertionError, match="NO_SUCH_SECONDS is assigned 0 times"):
        project.rewrite({"NO_SUCH_SECONDS": 1})


def test_fake_program_stands_before_the_real_one(project: Project) -> None:
    project.fake("pg_dump", 'touch "$HOME/called"; exec "$real" "$@"')
    project.back_up()
    assert (project.directory / "home" / "called").exists()


def test_small_disk_is_small() -> None:
    with small_disk("size=64k") as disk:
        (disk / "half").write_bytes(bytes(32 * 1024))
        with pytest.raises(OSError, match="No space left on device"):
            (disk / "more").write_bytes(bytes(64 * 1024))
        assert set(contents_of(disk)) == {"half", "more"}
    assert not disk.exists()


def test_permissions_bind_the_unprivileged(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    touch = subprocess.run([*UNPRIVILEGED, "touch", closed / "file"], stderr=subprocess.PIPE)
    assert b"Permission denied" in touch.stderr
