"""README.md's commands, on the first backup and on the nights: run as they stand.

Those for a restore are in test_recipes.

What stands there for something of the reader's own (FILE.dump, /path/to/project_chat) is replaced.
What changes the machine, the installation of packages, is only parsed.
"""

from __future__ import annotations

import http.server
import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import MakeProject
from environment import PROJECT, TESTS
from sample import PASSWORD, USER
from support import (
    MOUNTING,
    Database,
    Project,
    Result,
    new_database,
    program,
    readme_section,
)


def blocks(title: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", readme_section(title), re.MULTILINE | re.DOTALL
    )


(SUCCESS,) = re.findall(
    r"^```console\n\$ python3 backup_db\.py\n(.*?)^```$",
    (PROJECT / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
# The crontab's lines, by what tells them apart.
CRON = [line for block in blocks("Every night", "cron") for line in block.splitlines()]
PATH_LINE, LOG, OWN_LOG, MAILTO, MAIL, PING, FRESH, MOUNT, MONTHLY, QUARTERLY = CRON
ONCE, USER_OF_ITS_OWN, COPY, COMPARE = blocks("Every night", "bash")
# By the name that each unit's first line gives it.
UNITS = {
    Path(name).name: f"# {name}\n{text}"
    for name, text in (
        re.fullmatch(r"# (\S+)\n(.*)", block, re.DOTALL).groups()  # type: ignore[union-attr]
        for block in blocks("Every night", "ini")
    )
}


def test_readme_is_read() -> None:
    """What is not found would not be tested."""
    assert PATH_LINE.startswith("PATH=/path/to/project_chat/.venv/bin:")
    assert MAILTO == "MAILTO=you@example.org"
    contract = "cd /path/to/project_chat && python3 backup_db.py --env prod"
    assert f"0 2 * * * {contract} >> /var/log/backup.log 2>&1" == LOG
    assert all(contract in line for line in (OWN_LOG, MAIL, PING, MOUNT))
    assert list(UNITS) == ["backup-db.service", "backup-db.timer", "backup-db-failed.service"]


def test_shell_commands_parse() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    install = re.search(r"^\| elsewhere .*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert install
    found += re.findall(r"`(.+?)`", install[0])
    for command in found:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command


# -- the first backup -----------------------------------------------------------------------------


def without_values(text: str, database: Database) -> str:
    """Output without what differs from run to run, and between README.md and this test."""
    for pattern, replacement in (
        (rf"{database.name}|project_chat(_dev)?", "DATABASE"),
        (rf"(port|-p) ({database.cluster.port}|5432)", r"\1 PORT"),
        (r"_(dev|prod)(?=_)", ""),
        (r"Environment: (dev|prod)", "Environment: ENVIRONMENT"),
        (r"\d{4}-\d\d-\d\dT\d\d([-:])\d\d\1\d\dZ", r"TIME\1"),
        (r"\d+\.\d KB", "SIZE"),
        (r"[0-9a-f]{12}\.\.\.", "CHECKSUM..."),
    ):
        text = re.sub(pattern, replacement, text)
    return text.strip()


def test_first_backup(sample_database: Database, make_project: MakeProject) -> None:
    """The role and the settings of README.md, and what it shows of a success and of a failure."""
    cluster, project = sample_database.cluster, make_project()
    env_local = project.directory / ".env.local"
    env_local.unlink()
    shutil.copy(PROJECT / ".env.example", project.directory)
    sample_database.psql(
        "ALTER TABLE messages ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY nobody ON messages USING (false)"
    )
    (make_role,) = blocks("Your own database", "sql")
    (settings,) = blocks("Your own database", "ini")
    copying = blocks("Your own database", "bash")[1].splitlines()[1]
    try:
        # Of a terminal, \password would ask.
        sample_database.psql(
            make_role.replace("\\password backup", "ALTER ROLE backup PASSWORD 'your password';")
        )
        shell(copying, project)
        assert stat.S_IMODE(env_local.stat().st_mode) == 0o600
        env_local.write_text(f"{settings}DB_PORT={cluster.port}\n")
        failed = project.run("--env", "prod").failed_with(3)
        there = {"DB_NAME": sample_database.name}
        succeeded = project.run("--env", "prod", env=there).succeeded()
    finally:
        cluster.psql("DROP ROLE IF EXISTS backup")
    (failure,) = blocks("When a backup fails", "console")
    typed = failed.stderr.replace(f"{project.directory}/", "")
    for shown, real in ((failure, typed), (SUCCESS, succeeded.stdout)):
        assert without_values(shown, sample_database) == without_values(real, sample_database)


# -- every night ----------------------------------------------------------------------------------


@pytest.fixture
def nightly(sample_database: Database, make_project: MakeProject) -> Project:
    """The project as README.md has it: its own virtual environment, settings for production."""
    settings = sample_database.settings(USER, PASSWORD, prefix="")
    project = make_project(sample_database, settings=settings)
    (project.directory / ".venv").symlink_to(sys.prefix)
    # A shell of root's, who needs no sudo; and a mail server that keeps what it is given.
    (project.fakes / "sudo").write_text('#!/bin/sh\n[ "$1" = -u ] && shift 2\nexec "$@"\n')
    (project.fakes / "mail").write_text('#!/bin/sh\n{ echo "$@"; cat; } >"$HOME/mail"\n')
    for fake in project.fakes.iterdir():
        fake.chmod(0o755)
    return project


def as_here(text: str, project: Project) -> str:
    """README.md's places, as they are in this test."""
    places = {
        "/path/to/project_chat": str(project.directory),
        "/usr/lib/postgresql/17/bin": str(project.bin_dir),
        "/var/log/backup.log": str(project.directory / "log"),
        "/mnt/backups": str(project.directory / "mount"),
    }
    for place, here in places.items():
        text = text.replace(place, here)
    return text


def cron(line: str, project: Project, prefix: Sequence[str] = ()) -> Result:
    """Run a line of the crontab as cron does: hardly any environment, and a `%` is a newline."""
    command = as_here(line.split(maxsplit=5)[5], project)
    assert "%" not in command
    environ = [as_here(PATH_LINE, project), f"HOME={project.directory / 'home'}", "SHELL=/bin/sh"]
    done = subprocess.run(
        [*prefix, "env", "-i", *environ, "sh", "-c", command],
        cwd="/",
        capture_output=True,
        text=True,
    )
    return Result(command, done.returncode, done.stdout, done.stderr)


def shell(
    command: str, project: Project, prefix: Sequence[str] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    """Type a command of README.md into a shell in the project's folder."""
    return subprocess.run(
        [*prefix, "sh", "-e", "-c", as_here(command, project)],
        cwd=project.directory,
        env={**project.environ, **environ},
        check=True,
        capture_output=True,
        text=True,
    )


def misconfigure(project: Project) -> None:
    """From here on every backup fails: nobody listens there."""
    project.configure({"DB_NAME": "nowhere", "DB_HOST": "127.0.0.1", "DB_PORT": "1"})


@pytest.mark.parametrize(
    ("line", "log"), [(LOG, "log"), (OWN_LOG, "home/backup.log")], ids=["root's", "of one's own"]
)
def test_nightly_line_with_a_log(line: str, log: str, nightly: Project) -> None:
    result = cron(line, nightly).succeeded()
    assert (result.stdout, result.stderr) == ("", "")
    text = (nightly.directory / log).read_text()
    assert text.startswith("✓ Backup created successfully\n")
    assert "Environment: prod" in text
    assert len(nightly.dumps()) == 1
    misconfigure(nightly)
    assert cron(line, nightly).returncode == 3
    assert "\n✗ Backup failed: " in (nightly.directory / log).read_text()


def test_log_that_may_not_be_written_and_the_command_that_creates_it(nightly: Project) -> None:
    log = nightly.directory / "log"
    log.mkdir()
    assert cron(LOG, nightly).returncode != 0
    assert not nightly.backups.exists()
    log.rmdir()
    shell(ONCE, nightly, USER=pwd.getpwuid(os.geteuid()).pw_name)
    assert (log.read_bytes(), stat.S_IMODE(log.stat().st_mode)) == (b"", 0o600)
    cron(LOG, nightly).succeeded()


def test_only_failures_are_mailed(nightly: Project) -> None:
    result = cron(MAIL, nightly).succeeded()
    assert (result.stdout, result.stderr) == ("", "")
    misconfigure(nightly)
    assert cron(MAIL, nightly).failed_with(3).stderr.startswith("✗ Backup failed: ")


class Pinged(http.server.BaseHTTPRequestHandler):
    """A dead man's switch: it notes what it hears."""

    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"OK")

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.mark.servers(15)
def test_dead_mans_switch_hears_of_success_alone(nightly: Project) -> None:
    program("curl", "curl")
    with http.server.HTTPServer(("127.0.0.1", 0), Pinged) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = PING.replace("https://hc-ping.com", f"http://127.0.0.1:{server.server_port}")
        result = cron(line, nightly).succeeded()
        assert (result.stdout, result.stderr) == ("", "")
        assert Pinged.paths == ["/YOUR-UUID"]
        misconfigure(nightly)
        cron(line, nightly).failed_with(3)
        assert Pinged.paths == ["/YOUR-UUID"]
        server.shutdown()


def test_freshness(nightly: Project) -> None:
    check = f"0 9 * * * {FRESH.split(maxsplit=5)[5].rpartition(' || ')[0]}"
    nightly.back_up("--env", "prod")
    (dump,) = nightly.dumps()
    for hours, is_fresh in ((0, True), (25.9, True), (26.1, False)):
        moment = dump.stat().st_mtime - hours * 3600
        os.utime(dump, (moment, moment))
        (nightly.backups / ".x_prod.dump.partial").write_bytes(b"half")
        (nightly.backups / "x_dev_2026-11-22T02-00-00Z.dump").write_bytes(b"another")
        assert cron(check, nightly).returncode == (0 if is_fresh else 1)
        told = cron(FRESH, nightly).succeeded()
        assert (told.stdout, told.stderr) == ("" if is_fresh else "No backup for 26 hours\n", "")
        dump.touch()
    # No folder, no backup: it is told too.
    nightly.backups.rename(nightly.directory / "gone")
    assert cron(check, nightly).returncode == 1
    assert cron(FRESH, nightly).stdout == "No backup for 26 hours\n"


def test_mount_that_is_not_there_is_told(nightly: Project) -> None:
    mount = nightly.directory / "mount"
    mount.mkdir()
    result = cron(MOUNT, nightly)
    assert (result.returncode, result.stdout) == (1, f"{mount} is not mounted\n")
    # With a file system of its own there; seen by this run alone.
    mounted = 'mount -t tmpfs tmpfs "$0" && "$@" && ls "$0"'
    result = cron(MOUNT, nightly, [*MOUNTING, "sh", "-c", mounted, str(mount)]).succeeded()
    assert [Path(name).suffix for name in result.stdout.split()] == [".dump", ".json"]
    assert not list(mount.iterdir())
    assert not nightly.backups.exists()


def test_monthly_verification(nightly: Project) -> None:
    cron(MAIL, nightly).succeeded()
    (first,) = nightly.dumps()
    cron(MAIL, nightly).succeeded()
    result = cron(MONTHLY, nightly).succeeded()
    assert (result.stdout, result.stderr) == ("", "")
    with first.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damage")
    result = cron(MONTHLY, nightly)
    assert result.stdout == ""
    assert result.stderr.count("✗ Backup verification failed\n") == 1
    assert first.name in result.stderr


def test_quarterly_rehearsal(nightly: Project) -> None:
    (nightly.directory / "tests").symlink_to(TESTS)
    cron(MAIL, nightly).succeeded()
    result = cron(QUARTERLY, nightly).succeeded()
    assert (result.stdout, result.stderr) == ("", "")
    # Of the newest alone: the others are whole.
    cron(MAIL, nightly).succeeded()
    newest = max(nightly.dumps(), key=lambda dump: dump.stat().st_mtime)
    with newest.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damage")
    result = cron(QUARTERLY, nightly)
    assert result.stdout == ""
    assert newest.name in result.stderr
    assert result.stderr.splitlines()[-1].startswith("✗ Not rehearsed: ")


def test_two_databases_in_one_folder(nightly: Project, sample_database: Database) -> None:
    (other,) = re.findall(r"`(DB_NAME=other .*?)`", readme_section("Every night"))
    line = MAIL.replace("python3 backup_db.py --env prod", other)
    with new_database(sample_database.cluster, f"--template={sample_database.name}") as database:
        for _ in range(2):
            for each in (MAIL, line.replace("=other", f"={database.name} BACKUP_KEEP=1")):
                result = cron(each, nightly).succeeded()
                assert (result.stdout, result.stderr) == ("", "")
        names = [dump.name.partition("_prod_")[0] for dump in nightly.dumps()]
    assert sorted(names) == sorted([sample_database.name] * 2 + [database.name])


def test_line_by_hand(nightly: Project) -> None:
    """The way to see what cron sees: here, what is missing with a PATH without our folders."""
    (command,) = re.findall(r"`(env -i [^`]*'LINE')`", readme_section("When a backup fails"))
    line = as_here(LOG.split(maxsplit=5)[5], nightly).split(" >> ")[0]
    home = {"HOME": str(nightly.directory / "home"), "PATH": "/usr/bin:/bin"}
    bare = nightly.directory / "bare"  # this machine may have tools in /usr/bin
    bare.mkdir()
    (bare / "env").symlink_to(program("env", "coreutils"))
    (bare / "sh").symlink_to(program("sh", "dash"))
    path = as_here(PATH_LINE, nightly).removeprefix("PATH=")
    without_tools = f"{path.split(':')[0]}:{bare}"
    for path_there, code, words in ((path, 0, ""), (without_tools, 6, "pg_dump not found on PATH")):
        typed = command.replace("LINE", line).replace("/usr/bin:/bin", path_there)
        done = subprocess.run(["sh", "-c", typed], env=home, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert words in done.stderr


@pytest.mark.parametrize(
    "value", [*re.findall(r"`BACKUP_KEEP=(\S+)`", readme_section("Every night")), "2y", "3,14d"]
)
def test_value_of_backup_keep(value: str, nightly: Project) -> None:
    assert f"{value}`" in readme_section("Every night")
    nightly.run("--env", "prod", env={"BACKUP_KEEP": value}).succeeded()


# -- copies elsewhere -----------------------------------------------------------------------------


@pytest.mark.servers(15)
def test_copy_off_the_machine(nightly: Project, tmp_path: Path) -> None:
    nightly.back_up("--env", "prod")
    program("rsync", "rsync")
    (nightly.backups / ".x_prod.dump.partial").write_bytes(b"half")
    (nightly.backups / "mine.txt").write_bytes(b"mine")
    copies = tmp_path / "copies"
    shell(COPY.replace("backup@elsewhere:backups/", f"{copies}/"), nightly)
    (dump,) = nightly.dumps()
    assert {path.name for path in copies.iterdir()} == {dump.name, f"{dump.stem}.metadata.json"}
    assert nightly.run("--list", "--output-dir", copies).succeeded().stdout.count("✓ Verified") == 1
    nightly.run("--verify", copies / dump.name).succeeded()


@pytest.mark.servers(15)
def test_copies_are_compared_with_their_metadata(nightly: Project) -> None:
    program("jq", "jq")
    nightly.run("--env", "prod", env={"BACKUP_COMPRESS": "none"}).succeeded()
    nightly.back_up("--env", "prod")
    first, second = nightly.dumps()
    compare = f"cd '{nightly.backups}'; {COMPARE}"
    assert not shell(compare, nightly).stdout
    with first.open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        shell(compare, nightly)
    assert caught.value.stdout == f"{first.name}: FAILED\n"
    second.unlink()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        shell(compare, nightly)
    assert f"{second.name}: FAILED open or read\n" in caught.value.stdout


# -- systemd --------------------------------------------------------------------------------------


def unit_value(unit: str, key: str, project: Project) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", as_here(UNITS[unit], project), re.MULTILINE)
    assert isinstance(value, str)
    return value


@pytest.mark.servers(15)
def test_systemd_knows_every_line_of_the_units(nightly: Project, tmp_path: Path) -> None:
    folder = tmp_path / "etc" / "systemd" / "system"
    folder.mkdir(parents=True)
    for name, unit in UNITS.items():
        assert f"/etc/systemd/system/{name}" in unit.splitlines()[0]
        (folder / name).write_text(as_here(unit, nightly))
    verify = [program("systemd-analyze", "systemd"), "verify", "--man=no"]
    done = subprocess.run(
        [*verify, *(folder / name for name in UNITS)], capture_output=True, text=True
    )
    # It tells what it knows of the machine's other units too.
    assert not [line for line in done.stderr.splitlines() if "backup-db" in line], done.stderr
    (command,) = re.findall(
        r"`sudo (systemctl enable --now backup-db\.timer)`", readme_section("Every night")
    )
    offline = command.replace("--now", f"--root={tmp_path}")
    subprocess.run(shlex.split(offline), check=True, capture_output=True)
    assert (folder / "timers.target.wants" / "backup-db.timer").is_symlink()


@pytest.mark.servers(15)
def test_service_writes_only_where_it_may(nightly: Project) -> None:
    """Its own line, on a file system that is read-only but for ReadWritePaths= and PrivateTmp=."""
    assert {"PrivateTmp=yes", "ProtectSystem=strict"} < set(UNITS["backup-db.service"].split())
    start = unit_value("backup-db.service", "ExecStart", nightly)
    path = unit_value("backup-db.service", "Environment", nightly)
    writable = unit_value("backup-db.service", "ReadWritePaths", nightly)
    nightly.backups.mkdir(parents=True)
    assert Path(writable) == nightly.backups
    # The whole of /tmp cannot be replaced here: the project is in it.
    read_only = (
        'mount --bind "$0" "$0" && mount -t tmpfs tmpfs /var/tmp && mount -o remount,bind,ro /'
        ' && exec "$@"'
    )
    strict = [*MOUNTING, "sh", "-c", read_only, writable]
    command = [*strict, "env", "-i", path, *shlex.split(start)]
    done = subprocess.run(command, cwd=nightly.directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(nightly.dumps()) == 1
    elsewhere = [*command, "--output-dir", nightly.directory / "elsewhere"]
    assert subprocess.run(elsewhere, cwd=nightly.directory, capture_output=True).returncode == 4


@pytest.mark.servers(15)
def test_user_of_its_own(nightly: Project) -> None:
    """Made in a copy of /etc, seen by these commands alone."""
    user = unit_value("backup-db.service", "User", nightly)
    etc = nightly.directory / "etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    own_etc = 'mount --bind "$0" /etc && exec "$@"'
    path = f"{nightly.environ['PATH']}:/usr/sbin:/sbin"
    script = f"{USER_OF_ITS_OWN}\nid --user {user}\nstat --format='%U %a' db/backups .env.local"
    (nightly.directory / ".env.local").chmod(0o600)
    done = shell(script, nightly, [*MOUNTING, "sh", "-c", own_etc, str(etc)], PATH=path)
    uid, *owners = done.stdout.splitlines()
    assert int(uid) != 0
    assert owners == [f"{user} 700", f"{user} 600"]


def test_failure_is_mailed_by_its_unit(nightly: Project) -> None:
    assert unit_value("backup-db.service", "OnFailure", nightly) in UNITS
    nightly.fake("journalctl", 'echo "of $*"')
    start = unit_value("backup-db-failed.service", "ExecStart", nightly)
    assert "%" not in start  # systemd would replace it
    subprocess.run(shlex.split(start), env=nightly.environ, check=True)
    assert (nightly.directory / "home" / "mail").read_text() == (
        "-s Backup failed you@example.org\nof --unit=backup-db --lines=30\n"
    )
