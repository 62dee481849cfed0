"""What the other tests stand on: the sample database, the servers, the oracles."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from os import kill
from pathlib import Path

import pytest
from cluster import Cluster, ClusterError, installation, read_pid
from conftest import MakeProject
from environment import TESTS
from sample import DATABASE, PASSWORD, TABLES, USER, load_rows
from support import (
    UNPRIVILEGED,
    Database,
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
    print(cluster.directory, flush=True)
    sys.stdin.read()
"""

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
        directory = Path(parent.stdout.readline().rstrip("\n"))
        postmaster = read_pid(directory / "data")
        assert postmaster
        if frozen:
            kill(postmaster, signal.SIGSTOP)
        parent.kill()
    wait_until(lambda: not directory.exists())
    with pytest.raises(ProcessLookupError):
        kill(postmaster, 0)


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


# -- copies of the script, and the oracles --------------------------------------------------------


def test_backup_restores_on_each_version(each_cluster: Cluster, make_project: MakeProject) -> None:
    with new_database(each_cluster, f"--template={DATABASE}", f"--owner={USER}") as sample:
        project = make_project(sample, settings=sample.settings(USER, PASSWORD))
        assert_restores(project.back_up(), sample)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE messages SET content = content || ' ' WHERE id = 3420",
        "DELETE FROM conversation_index WHERE conversation_id = 1",
        "SELECT nextval('conversations_id_seq')",
        "SELECT lo_create(4711)",
        "COMMENT ON TABLE messages IS 'another'",
    ],
)
def test_oracle_sees_a_difference(
    change: str, sample_database: Database, tmp_path: Path
) -> None:
    dump = tmp_path / "sample.dump"
    run_in(sample_database)
    assert_restores(dump, sample_database)
    sample_database.psql(change)
    with pytest.raises(AssertionError):
        assert_restores(dump, sample_database)


def test_oracle_reads_hostile_names(database: Database, tmp_path: Path) -> None:
    database.psql(
        'CREATE SCHEMA "s; DROP"; CREATE TABLE "s; DROP"."x" (x int, row text, "x.*" int);'
        """ INSERT INTO "s; DROP"."x" VALUES (1, E'a\\nb', 2); CREATE TABLE "it's ""new""" ();"""
        """ INSERT INTO "it's ""new""" DEFAULT VALUES; CREATE TABLE "row" (rows int)"""
    )
    ...
