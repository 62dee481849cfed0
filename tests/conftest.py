"""Fixtures: servers, databases, private copies of the script."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import trustme
from cluster import PLACE, Cluster, installation
from environment import PROJECT
from faults import WIDE
from sample import DATABASE, load_sample
from support import SERVERS, Database, Project, Result, metadata_path, new_database

# -- servers and databases ------------------------------------------------------------------------

# Each database is some 300 files. A disk takes longer to make and remove them than a test takes to
# use them: so the servers live in memory, where there is plenty.
MEMORY = Path("/dev/shm")
PLENTY = 4 << 30


def is_place_for_servers(directory: Path) -> bool:
    """It may have to take a server's programs too (see `copy_installation`)."""
    if not directory.is_dir():
        return False
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize > PLENTY and not status.f_flag & os.ST_NOEXEC


@pytest.fixture(scope="session")
def clusters() -> Iterator[Callable[[int], Cluster]]:
    """A server of each version, the sample database in it; started when it is first asked for."""
    running: dict[int, Cluster] = {}
    with contextlib.ExitStack() as stack:

        def cluster_of(major: int) -> Cluster:
            if major not in running:
                running[major] = stack.enter_context(Cluster(installation(major)))
                load_sample(running[major])
            return running[major]

        yield cluster_of


@pytest.fixture(scope="session")
def cluster(clusters: Callable[[int], Cluster]) -> Cluster:
    return clusters(17)


@pytest.fixture(scope="session", params=SERVERS, ids="postgresql-{}".format)
def each_cluster(request: pytest.FixtureRequest, clusters: Callable[[int], Cluster]) -> Cluster:
    """For the tests that depend on PostgreSQL's version."""
    return clusters(request.param)


@pytest.fixture(scope="session")
def elsewhere(cluster: Cluster) -> Iterator[Cluster]:
    """Another machine: a server that knows nothing of this database and its roles."""
    with Cluster(cluster.bin_dir) as other:
        yield other


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def tls_cluster(cluster: Cluster, authority: trustme.CA) -> Iterator[Cluster]:
    """A server that takes nothing but TLS over TCP."""
    certificate = authority.issue_cert("127.0.0.1")
    own = Cluster(cluster.bin_dir, settings={"ssl": "on"}, hba=["hostnossl all all all reject"])
    owner = own.data_dir.stat()
    key, chain = own.data_dir / "server.key", own.data_dir / "server.crt"
    certificate.private_key_pem.write_to_path(str(key))
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    for path in (key, chain):
        path.chmod(0o600)
        os.chown(path, owner.st_uid, owner.st_gid)
    with own:
        yield own


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    """An empty database."""
    with new_database(cluster) as new:
        yield new


@pytest.fixture
def sample_database(cluster: Cluster) -> Iterator[Database]:
    """A copy of the sample database, for the test to do with as it likes."""
    with new_database(cluster, f"--template={DATABASE}") as new:
        yield new


# -- copies of the script -------------------------------------------------------------------------


class MakeProject(Protocol):
    def __call__(
        self,
        database: Database | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        constants: Mapping[str, object] | None = None,
    ) -> Project: ...


# What a test that asks for nothing else would only wait for: the pause before another attempt.
HURRIED = {"LOCK_RETRY_SECONDS": 0.1}


def project_maker(parent: Path, cluster: Cluster) -> MakeProject:
    """For fixtures that live longer than a test; a test takes `make_project`."""

    def make(
        database: Database | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        constants: Mapping[str, object] | None = None,
    ) -> Project:
        bin_dir = (database.cluster if database else cluster).bin_dir
        directory = parent / f"project-{len(list(parent.glob('project-*')))}"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / "brain_core", directory / "brain_core", ignore=ignore)
        shutil.copy(PROJECT / "backup_db.py", directory)
        project = Project(
            directory,
            {
                "PATH": f"{directory / 'fakes'}:{bin_dir}:/usr/bin:/bin",
                "HOME": str(directory / "home"),
                "TMPDIR": str(directory / "home"),
            },
            bin_dir,
        )
        project.fakes.mkdir()
        (directory / "home").mkdir()
        project.configure({**(database.settings() if database else {}), **(settings or {})})
        project.rewrite({**HURRIED, **(constants or {})})
        return project

    return make


@pytest.fixture
def make_project(tmp_path: Path, cluster: Cluster) -> MakeProject:
    """A private copy of the script, whose .env.local leads to `database` and says `settings`."""
    return project_maker(tmp_path, cluster)


@pytest.fixture(scope="session")
def sample_dump(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """A backup of the sample database, made once; tests work on copies of its two files."""
    make = project_maker(tmp_path_factory.mktemp("sample"), cluster)
    return make(Database(cluster, DATABASE)).back_up()


@pytest.fixture
def project(make_project: MakeProject, sample_database: Database) -> Project:
    """A private copy of the script, set up for the sample database."""
    return make_project(sample_database)


# -- a stage for failures -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a situation is made of, and how the script is run in it."""

    cluster: Cluster
    make_project: MakeProject
    sample_dump: Path
    stack: contextlib.ExitStack

    def project(
        self,
        *,
        settings: Mapping[str, str] | None = None,
        constants: Mapping[str, object] | None = None,
    ) -> Project:
        """For the sample database, with one earlier backup of it."""
        database = Database(self.cluster, DATABASE)
        project = self.make_project(database, settings=settings, constants=constants)
        project.backups.mkdir(parents=True)
        for path in (self.sample_dump, metadata_path(self.sample_dump)):
            shutil.copy(path, project.backups)
        return project

    def database(self) -> Database:
        return self.stack.enter_context(new_database(self.cluster))

    def role(self, attributes: str = "") -> str:
        """A role that may do nothing; make it before the database that grants it something."""
        name = f"role_{uuid.uuid4().hex[:12]}"
        self.cluster.psql(f"CREATE ROLE {name} LOGIN PASSWORD 'secret' {attributes}")
        self.stack.callback(self.cluster.psql, f"DROP ROLE {name}")
        return name

    def hba(self, line: str) -> None:
        """Put a line before all others in the server's pg_hba.conf, until the end."""
        path = self.cluster.data_dir / "pg_hba.conf"
        before = path.read_text()

        def write(text: str) -> None:
            path.write_text(text)
            self.cluster.psql("SELECT pg_reload_conf()")

        write(f"{line}\n{before}")
        self.stack.callback(write, before)

    def run_as(self, database: Database, role: str, password: str = "secret") -> Result:
        return self.make_project(settings=database.settings(role, password)).run()


@pytest.fixture
def stage(cluster: Cluster, make_project: MakeProject, sample_dump: Path) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        yield Stage(cluster, make_project, sample_dump, stack)


# -- for the tests of faults ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def standing_database(cluster: Cluster) -> Iterator[Database]:
    """A copy of the sample database with a materialized view; for tests that change nothing."""
    with new_database(cluster, f"--template={DATABASE}") as new:
        new.psql(f"CREATE MATERIALIZED VIEW statistics AS SELECT count(*) FROM messages; {WIDE}")
        yield new


@pytest.fixture
def standing(
    make_project: MakeProject,
    standing_database: Database,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    """A private copy of the script with backups that were made before, and a stranger's files.

    Some bear names much like ours, as a run of another database leaves them when it is killed.
    """
    project = make_project(standing_database)
    earlier = tmp_path_factory.getbasetemp() / "earlier-backups"
    if not earlier.exists():
        project.back_up()
        name = standing_database.name
        for stranger in (
            "notes.txt",
            f"{name}_2025-01-27T14-30-00Z.metadata.json",
            f".{name}_dev_x_dev.dump.partial",
            f".{name}_dev_dev.dump.partial",
            f".{name}_prod.metadata.json.partial",
            f".x{name}_dev.dump.partial",
            f".{name}_dev.dump.partial.partial",
        ):
            (project.backups / stranger).write_text(stranger)
        project.backups.rename(earlier)
    shutil.copytree(earlier, project.backups)
    return project


# -- a run of no tests is no success --------------------------------------------------------------


class ExecutedTests:
    """Fails the run in which every test was skipped; pytest does so where none was collected."""

    def __init__(self) -> None:
        self.count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.count += report.when == "call" and not report.skipped

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.count and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.count:
            terminalreporter.write_line("No test was executed: that is no success.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, and count as deselected, what is for servers that nobody asked for."""
    unasked = [
        item
        for item in items
        if any(set(mark.args) - set(SERVERS) for mark in item.iter_markers("servers"))
    ]
    config.hook.pytest_deselected(items=unasked)
    items[:] = [item for item in items if item not in unasked]


def pytest_configure(config: pytest.Config) -> None:
    if is_place_for_servers(MEMORY):
        os.environ[PLACE] = str(MEMORY)
    config.addinivalue_line(
        "markers",
        "servers(*versions): runs where BACKUP_TEST_SERVERS names these versions. That of 15, which"
        " is Debian's own, stands for some of Debian's other packages too (jq, curl, rsync,"
        " systemd, pgbouncer, locales): see .ci/run. strace is needed by all.",
    )
    # A worker sees only its own share of the tests.
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(ExecutedTests())
