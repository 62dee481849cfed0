"""What a user sees of each mode: the contract's lines, streams and options, to the letter."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from environment import PROJECT
from sample import DATABASE
from support import (
    MOUNTING,
    Database,
    Project,
    Result,
    contents_of,
    finish,
    put_pair,
    read_metadata,
)

import backup_db

TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ"
OPTIONS = {"--env", "--output-dir", "--verify", "--list", "--help"}


@pytest.fixture
def sample(make_project: MakeProject, cluster: Cluster) -> Project:
    """A private copy of the script, set up for the sample database itself, which it only reads."""
    return make_project(Database(cluster, DATABASE))


@pytest.fixture
def bare(make_project: MakeProject, sample_dump: Path) -> Project:
    """A private copy of the script with no settings at all, and a backup of the sample."""
    project = make_project()
    (project.directory / ".env.local").unlink()
    copy_pair(sample_dump, project.backups)
    return project


def copy_pair(dump: Path, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(backup_db.metadata_path(dump), directory)
    return Path(shutil.copy(dump, directory))


def change_metadata(dump: Path, **changes: object) -> None:
    path = backup_db.metadata_path(dump)
    path.write_text(json.dumps(read_metadata(dump) | changes), encoding="utf-8")


# -- default mode ---------------------------------------------------------------------------------


def test_steps_for_a_missing_database_work_when_they_are_pasted(
    make_project: MakeProject, cluster: Cluster
) -> None:
    name = 'it\'s a "name"; -- ünï $HOME'
    project = make_project(Database(cluster, name))
    said = project.run().failed_with(3).stderr
    steps = re.findall(r"^  \d\. .*: ((?:psql|createdb) .*)$", said, re.MULTILINE)
    environ = {"PATH": project.environ["PATH"], "PGPASSWORD": cluster.password}
    try:
        for step in steps:
            subprocess.run(["sh", "-c", step], env=environ, check=True, stdout=subprocess.DEVNULL)
        project.run().succeeded()
    finally:
        cluster.drop_database(name)
    assert len(steps) == 2


def test_more_than_six_tables_are_summed_up(database: Database, make_project: MakeProject) -> None:
    rows = {"a": 3, "b": 1, "c": 70, '"D e"': 5, "other.f": 6, "g": 4, '"select"': 8, "h": 2}
    database.psql(
        "CREATE SCHEMA other;"
        + "".join(
            f"CREATE TABLE {table} AS SELECT generate_series(1, {count});"
            for table, count in rows.items()
        )
        + "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER none FOREIGN DATA WRAPPER none;"
        "CREATE FOREIGN TABLE far (x int) SERVER none;"
        "CREATE MATERIALIZED VIEW filled AS SELECT 1; CREATE MATERIALIZED VIEW empty AS SELECT 1"
        " WITH NO DATA"
    )
    project = make_project(database)
    lines = project.run().succeeded().stdout.splitlines()
    assert lines[7] == (
        'Tables:      8 (3 a, 70 c, 5 "D e", 6 other.f, 4 g, 8 "select", and 2 more)'
    )
    assert lines[9:11] == [
        "Verified:    ✓ Integrity check passed",
        "Contents:    ✓ Match (99 rows in 8 tables)",
    ]
    assert lines[11:] == ["Not included: data of foreign tables (far)"]
    assert read_metadata(project.dumps()[0])["not_included"] == [
        "data of foreign tables (far)",
        "contents of materialized views, which a restore computes anew (filled)",
    ]


def test_empty_database_is_backed_up(database: Database, make_project: MakeProject) -> None:
    result = make_project(database).run().succeeded()
    lines = result.stdout.splitlines()
    assert lines[7] == "Tables:      0"
    assert result.stderr == (
        "Warning: the database has no table; is it the right one? It is set in .env.local: "
        "DEV_DB_NAME\n"
    )
    assert lines[9:11] == [
        "Verified:    ✓ Integrity check passed",
        "Contents:    ✓ Match (0 rows in 0 tables)",
    ]


@pytest.mark.parametrize(
    ("settings", "arguments", "environment"),
    [
        ({"DEV_DB_NAME": DATABASE, "DB_NAME": "gone"}, [], "dev"),
        ({"DB_NAME": DATABASE}, [], "prod"),
        ({"DB_NAME": DATABASE, "DEV_DB_NAME": "gone", "ENV_MODE": "Production"}, [], "prod"),
        ({"DB_NAME": DATABASE, "DEV_DB_NAME": "gone"}, ["--env", "prod"], "prod"),
        ({"DEV_DB_NAME": DATABASE, "ENV_MODE": "prod"}, ["--env=dev"], "dev"),
        ({"DEV_DB_NAME": DATABASE, "ENV_MODE": "dev"}, ["--env", "auto"], "dev"),
    ],
)
def test_environment_is_detected_or_chosen(
    settings: dict[str, str],
    arguments: Sequence[str],
    environment: str,
    make_project: MakeProject,
    cluster: Cluster,
) -> None:
    server = cluster.environment("any", prefix="")
    del server["DB_NAME"]
    project = make_project(settings=server | settings)
    result = project.run(*arguments).succeeded()
    (dump,) = project.dumps()
    expected = {"dev": "project_chat_dev", "prod": "project_chat_dev_prod"}[environment]
    assert re.fullmatch(rf"{expected}_{TIMESTAMP}\.dump", dump.name)
    assert f"Environment: {environment}\nDatabase:    {DATABASE}\n" in result.stdout
    assert read_metadata(dump)["environment"] == environment


# -- paths ----------------------------------------------------------------------------------------


def test_paths_are_relative_under_the_working_directory_only(bare: Project) -> None:
    (dump,) = bare.dumps()
    for cwd, shown in [
        (bare.directory, f"db/backups/{dump.name}"),
        (bare.backups, dump.name),
        (bare.directory / "home", str(dump)),
        (Path("/"), str(dump)),
    ]:
        verified = bare.run("--verify", dump, cwd=cwd).succeeded()
        assert verified.stdout.splitlines()[2] == f"File:        {shown}"
        listed = bare.run("--list", cwd=cwd).succeeded()
        folder = os.path.dirname(shown) or str(bare.backups)
        assert listed.stdout.splitlines()[0] == f"Backup Files ({folder}/):"


def test_output_directory_is_made_for_its_owner_alone(sample: Project) -> None:
    new = sample.directory / "deep" / "er"
    sample.run("--output-dir", "deep/er").succeeded()
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in [new, *new.iterdir()]}
    assert modes.pop(new) == stat.S_IMODE(new.parent.stat().st_mode) == 0o700
    assert set(modes.values()) == {0o600}
    assert not sample.backups.exists()


def test_output_directory_that_is_there_stays_as_it_is(sample: Project) -> None:
    sample.backups.mkdir(parents=True)
    sample.backups.chmod(0o2755)
    sample.run().succeeded()
    assert stat.S_IMODE(sample.backups.stat().st_mode) == 0o2755


def test_tilde_is_the_home_directory(bare: Project) -> None:
    (dump,) = bare.dumps()
    home = Path(bare.environ["HOME"])
    copy_pair(dump, home / "kept")
    listed = bare.run("--list", "--output-dir=~/kept").succeeded()
    assert listed.stdout.startswith("Backup Files (home/kept/):\n")
    bare.run(f"--verify=~/kept/{dump.name}").succeeded()


@pytest.mark.parametrize(
    ("directory", "shown"),
    [
        ("two words", "two words"),
        ("'quotes\" $HOME `id` \\", "'quotes\" $HOME `id` \\"),
        ("line\nbreak\x1b[31m", r"line\nbreak\x1b[31m"),
        ("-dash%41", "-dash%41"),
        ("Ünï😀", "Ünï😀"),
        (os.fsdecode(b"not utf-8 \xff"), r"not utf-8 \xff"),
        ("nested/../dots/.", "dots"),
    ],
)
def test_any_directory_name_is_served(directory: str, shown: str, sample: Project) -> None:
    if ".." in directory:
        (sample.directory / "nested").mkdir()
    made = sample.run(f"--output-dir={directory}").succeeded()
    assert f"\nBackup File: {shown}/project_chat_dev_" in made.stdout
    (dump,) = (sample.directory / directory).glob("*.dump")
    listed = sample.run("--list", f"--output-dir={directory}").succeeded()
    assert listed.stdout.startswith(f"Backup Files ({shown}/):\n")
    relative = os.path.join(directory, dump.name)
    verified = sample.run(f"--verify={relative}").succeeded()
    assert f"\nFile:        {shown}/{dump.name}\n" in verified.stdout
    assert not made.stderr + listed.stderr + verified.stderr


# -- --verify -------------------------------------------------------------------------------------


def test_verify_of_a_changed_byte_prints_the_same_lines_on_stderr(bare: Project) -> None:
    (dump,) = bare.dumps()
    with dump.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    found = subprocess.run(["sha256sum", dump], capture_output=True, check=True, text=True).stdout
    metadata = read_metadata(dump)
    digits = f"expected {metadata['checksum_sha256'][:12]}..., found {found[:12]}..."
    result = bare.run("--verify", dump).failed_with(8)
    lines = result.stderr.splitlines()
    assert lines[:10] == [
        "✗ Backup verification failed",
        "",
        f"File:        db/backups/{dump.name}",
        f"Checksum:    ✗ Mismatch ({digits})",
        "Structure:   ✓ Valid (pg_restore --list succeeded)",
        f"Size:        {dump.stat().st_size / 1024:.1f} KB",
        f"Timestamp:   {metadata['backup_timestamp']}",
        "",
        f"Error: This file has changed since it was written: {digits}",
        "",
    ]
    assert lines[10] == "Troubleshooting:"


def test_verify_of_other_counts_names_each_table(bare: Project) -> None:
    (dump,) = bare.dumps()
    counts, oids = (read_metadata(dump)[key] for key in ("table_counts", "table_oids"))
    change_metadata(
        dump,
        table_counts={**counts, "messages": 3421, "gone": 1, "other.x": 0},
        table_oids={**oids, "gone": 1, "other.x": 2},
    )
    result = bare.run("--verify", dump).failed_with(8)
    assert (
        "Contents:    ✗ Mismatch (expected 3729 rows in 6 tables, found 3727 rows in 4 tables)\n"
        in result.stderr
    )
    assert (
        "Error: rows of table messages: 3420 in the dump, 3421 expected\n"
        "rows of table gone: not in the dump, 1 expected\n"
        "rows of table other.x: not in the dump, 0 expected\n"
    ) in result.stderr


def test_verify_of_the_metadata_file_names_the_dump(bare: Project) -> None:
    (dump,) = bare.dumps()
    result = bare.run("--verify", backup_db.metadata_path(dump)).failed_with(8)
    assert f"1. Name the dump: python3 backup_db.py --verify {dump}\n" in result.stderr


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("db/backups/no.dump", "python3 backup_db.py --list --output-dir db/backups"),
        ("two words/no.dump", "python3 backup_db.py --list --output-dir 'two words'"),
        ("nowhere/no.dump", "python3 backup_db.py --list"),
    ],
)
def test_verify_names_the_command_that_lists_what_is_there(
    path: str, command: str, bare: Project
) -> None:
    (bare.directory / "two words").mkdir()
    result = bare.run("--verify", path).failed_with(8)
    assert result.stderr.endswith(f"  1. See which backups there are: {command}\n")
    bare.run(*shlex.split(command)[2:]).succeeded()


# -- --list ---------------------------------------------------------------------------------------


def ago(**span: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(**span)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_list_shows_every_broken_pair_and_hides_none(make_project: MakeProject) -> None:
    directory = make_project().backups
    put_pair(directory, "good", "dev", "2025-01-09T00:00:00Z", 10)
    put_pair(directory, "smaller", "dev", "2025-01-08T00:00:00Z", 10, backup_size_bytes=11)
    backup_db.metadata_path(
        put_pair(directory, "alone_dev", "dev", "2025-01-07T00:00:00Z", 7)
    ).unlink()
    broken = [
        "a_device",
        "a_directory",
        "a_pipe",
        "empty",
        "no_json_prod",
        "no_object",
        "not_utf_8",
    ]
    paths = [
        backup_db.metadata_path(put_pair(directory, name, "dev", "2025-01-06T00:00:00Z", 6))
        for name in broken
    ]
    for path in paths:
        path.unlink()
    device, folder, pipe, empty, no_json, no_object, not_utf_8 = paths
    device.symlink_to("/dev/zero")
    folder.mkdir()
    os.mkfifo(pipe)
    empty.touch()
    no_json.write_text("{")
    no_object.write_text("[]")
    not_utf_8.write_bytes(b'{"a": "\xff"}')
    key_missing = put_pair(directory, "key_missing", "dev", "2025-01-05T00:00:00Z", 5)
    change_metadata(key_missing, checksum_sha256=None)
    (directory / "hand-made.dump").write_bytes(b"abc")
    (directory / "gone.dump").symlink_to("/nowhere")
    (directory / "a_dev_2025-01-01T00-00-00Z.metadata.json").write_text("{}")
    (directory / ".hidden_dev_2025-01-01T00-00-00Z.dump.partial").write_bytes(b"")
    (directory / ".hidden.dump").write_bytes(b"")
    (directory / "notes.txt").write_text("")
    before = contents_of(directory)

    result = make_project().run("--list", "--output-dir", directory).succeeded()
    table, totals = result.stdout.split("\n\n")[1:]
    names = {path.name[:-26]: f"({path.name})" for path in directory.glob("*_2025-*.dump")}
    rows = [tuple(re.split(r"  +", line)) for line in table.splitlines()[1:]]
    assert rows == [
        ("2025-01-09T00:00:00Z", "dev", "good", "10 B", "✓ Verified"),
        ("2025-01-08T00:00:00Z", "dev", "smaller", "10 B", "✗ Size mismatch"),
        (
            *("2025-01-07T00:00:00Z", "dev", "alone_dev", "7 B"),
            f"✗ No metadata {names['alone_dev']}",
        ),
        *(
            (
                "2025-01-06T00:00:00Z",
                "prod" if name.endswith("_prod") else "-",
                name,
                "6 B",
                f"✗ Bad metadata {names[name]}",
            )
            for name in sorted(broken, reverse=True)
        ),
        (
            "2025-01-05T00:00:00Z",
            "-",
            "key_missing",
            "5 B",
            f"✗ Bad metadata {names['key_missing']}",
        ),
        ("-", "-", "-", "3 B", "✗ No metadata (hand-made.dump)"),
        ("-", "-", "-", "-", "✗ No metadata (gone.dump)"),
    ]
    assert re.fullmatch(
        r"""13 backups, 77 B in all, 12 not usable
dev good: 1 backup, 10 B; newest verified \d+ days old: good_2025-01-09T00-00-00Z\.dump
dev smaller: 1 backup, 10 B; none verified
1 metadata without a dump; .*: rm -- .*/a_dev_2025-01-01T00-00-00Z\.metadata\.json
Verified means verified when it was made. To check a file now: .* --verify .*/good_2025\S+
""",
        totals,
    )
    assert not result.stderr
    assert contents_of(directory) == before


@pytest.mark.parametrize(
    ("age", "shown"),
    [
        ({"seconds": 30}, r"[34]\d seconds"),
        ({"seconds": 70}, "1 minute"),
        ({"hours": 3, "minutes": 59}, "3 hours"),
        ({"hours": 25}, "1 day"),
        ({"days": 400}, "400 days"),
        ({"days": -1}, "0 seconds"),  # the clock was set back
    ],
)
def test_list_tells_how_old_the_newest_is(
    age: dict[str, float], shown: str, make_project: MakeProject
) -> None:
    project = make_project()
    put_pair(project.backups, "a", "dev", ago(**age), 1)
    put_pair(project.backups, "a", "dev", ago(days=500), 1)
    put_pair(project.backups, "a", "dev", ago(seconds=5), 1, backup_size_bytes=2)  # not verified
    series = project.run("--list").succeeded().stdout.splitlines()[-2]
    assert re.fullmatch(
        rf"dev a: 3 backups, 3 B; newest verified {shown} old: a_\S+Z\.dump", series
    )


def test_list_columns_widen_by_what_is_in_them(make_project: MakeProject) -> None:
    project = make_project()
    put_pair(project.backups, "a" * 30, "dev", "2025-01-01T00:00:00Z", 1)
    put_pair(project.backups, "é", "dev", "2025-01-02T00:00:00Z", 2)
    put_pair(project.backups, "x\ty", "dev", "2025-01-03T00:00:00Z", 3)
    rows = project.run("--list").succeeded().stdout.splitlines()[2:6]
    assert [
        row.index(size) for row, size in zip(rows, ("Size", "3 B", "2 B", "1 B"), strict=True)
    ] == [25 + 13 + 32] * 4
    assert r"  x\ty  " in rows[1]


def test_no_backups_yet(make_project: MakeProject) -> None:
    """In the usual place before the first backup too; a folder that is named should be there."""
    project = make_project()
    for _ in range(2):
        result = project.run("--list").succeeded()
        assert (result.stdout, result.stderr) == ("No backups yet in db/backups/\n", "")
        project.backups.mkdir(parents=True, exist_ok=True)
    project.run("--list", "--output-dir", "db/backup").failed_with(1)
    (project.directory / "wrong").mkdir()
    lines = project.run("--list", "--output-dir", "wrong").succeeded().stdout.splitlines()
    usual = f"The usual directory: python3 backup_db.py --list --output-dir {project.backups}"
    assert lines == ["No backups yet in wrong/", usual]


def footer_of(project: Project) -> list[str]:
    return project.run("--list").succeeded().stdout.rpartition("\n\n")[2].splitlines()[1:]


def test_list_tells_the_series_apart(make_project: MakeProject) -> None:
    """By environment, database and server, with its version: of two, one is often the upgraded
    one. What does not know its server stands apart."""
    project = make_project()
    for days, environment, name, server in [
        (1, "prod", "shop", "222"),
        (2, "prod", "shop", None),
        (3, "prod", "shop", "111"),
        (4, "prod", "shop", "111"),
        (5, "prod", "shop", None),
        (6, "dev", "shop", "333"),
        (7, "prod", "wiki", None),
    ]:
        put_pair(project.backups, name, environment, ago(days=days), days, system_identifier=server)
    put_pair(project.backups, "wiki", "prod", ago(days=0), 9, verification=None)
    lines = [re.sub(r"_20\S+Z", "", line) for line in footer_of(project)]
    shop = "prod shop of server {} (PostgreSQL 17.5): "
    assert lines[:-1] == [
        "prod wiki: 2 backups, 16 B; newest verified 7 days old: wiki.dump",
        shop.format("222") + "1 backup, 1 B; newest verified 1 day old: shop.dump",
        shop.format("unknown") + "2 backups, 7 B; newest verified 2 days old: shop.dump",
        shop.format("111") + "2 backups, 7 B; newest verified 3 days old: shop.dump",
        "dev shop: 1 backup, 6 B; newest verified 6 days old: shop.dump",
    ]


def test_list_names_what_needs_an_eye(make_project: MakeProject) -> None:
    project = make_project()
    folder = project.backups
    put_pair(folder, "a", "dev", "2099-01-01T00:00:00Z", 1)
    made = put_pair(folder, "a", "dev", ago(days=1), 1)
    renamed = folder / "it's kept.dump"
    for old, new in ((made, renamed), map(backup_db.metadata_path, (made, renamed))):
        old.rename(new)
    for days in range(3, 15):
        put_pair(folder, "a b_dev", "dev", ago(days=days), 1).unlink()
    # A run that is publishing; a stranger's.
    running = put_pair(folder, "b_dev", "dev", "2026-01-01T00:00:00Z", 1)
    running.rename(folder / ".b_dev.dump.partial")
    (folder / "c_2026-01-01T00-00-00Z.metadata.json").write_text("mine")

    assert "✓ Verified (it's kept.dump)\n" in project.run("--list").succeeded().stdout
    series, future, orphans, status = footer_of(project)
    assert series == "dev a: 1 backup, 1 B; newest verified 1 day old: it's kept.dump"
    assert future == (
        "1 dated in the future, left alone by BACKUP_KEEP: a_2099-01-01T00-00-00Z.dump"
    )
    verify = shlex.split(status.rpartition(": ")[2])
    assert verify == ["python3", "backup_db.py", "--verify", "db/backups/it's kept.dump"]
    # The command, typed in, removes what it names: ten at a time.
    for count in (12, 2):
        text, _, command = orphans.partition(": ")
        assert text == f"{count} metadata without a dump; remove what is not coming back"
        subprocess.run(["sh", "-c", command], cwd=project.directory, check=True)
        orphans = footer_of(project)[2]
    assert orphans == status
    assert sorted(path.name for path in folder.glob("[bc]*")) == [
        "b_dev_2026-01-01T00-00-00Z.metadata.json",
        "c_2026-01-01T00-00-00Z.metadata.json",
    ]


# What Asia/Kathmandu is, also where no time zones are installed.
KATHMANDU = {"TZ": "<+0545>-5:45"}


def test_times_are_utc_wherever_the_machine_is(sample: Project) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    sample.run(env=KATHMANDU).succeeded()
    after = datetime.now(timezone.utc)
    (dump,) = sample.dumps()
    metadata = read_metadata(dump)
    made = metadata["backup_timestamp"]
    for text in (made, metadata["verification"]["verified_at"]):
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        assert before <= moment <= after
    assert dump.name == f"project_chat_dev_{made.replace(':', '-')}.dump"
    listed = sample.run("--list", env=KATHMANDU).succeeded()
    assert f"\n{made}     dev  " in listed.stdout
    assert re.search(r"; newest verified \d+ seconds? old: ", listed.stdout)


# -- no configuration, no packages ----------------------------------------------------------------


def run_without_packages(project: Project, *arguments: str | Path) -> Result:
    """The script under a Python that sees its standard library alone."""
    return finish(
        subprocess.Popen(
            [sys.executable, "-I", "-S", project.directory / "backup_db.py", *arguments],
            cwd=project.directory,
            env={"PATH": project.environ["PATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )


def test_list_and_verify_need_no_settings_and_no_package(bare: Project) -> None:
    (dump,) = bare.dumps()
    assert "✓ Verified" in run_without_packages(bare, "--list").succeeded().stdout
    verified = run_without_packages(bare, "--verify", dump).succeeded()
    assert verified.stdout.startswith("✓ Backup verification passed\n")


def test_list_and_verify_ignore_settings_that_are_wrong(bare: Project) -> None:
    (bare.directory / ".env.local").write_text("not ' a line\n")
    (dump,) = bare.dumps()
    for arguments in (["--list"], ["--verify", dump]):
        bare.run(*arguments, env={"DB_PORT": "x", "ENV_MODE": "y"}).succeeded()


def test_backup_in_an_empty_environment(sample: Project) -> None:
    empty = ("env", "-i", f"PATH={sample.environ['PATH']}")
    made = sample.run(prefix=empty).succeeded()
    assert made.stdout.startswith("✓ Backup created successfully\n")


# -- standard streams -----------------------------------------------------------------------------

STREAMS = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>&1"]


@pytest.mark.parametrize("redirection", STREAMS)
def test_backup_is_published_whatever_the_streams(redirection: str, sample: Project) -> None:
    shell = ("sh", "-c", f'exec "$@" {redirection}', "sh")
    result = sample.run(prefix=shell).succeeded()
    (dump,) = sample.dumps()
    assert set(os.listdir(sample.backups)) == {
        dump.name,
        backup_db.metadata_path(dump).name,
        ".project_chat_dev.lock",
    }
    assert not result.stderr
    if ">&-" not in redirection.replace("2>&-", "") and "full" not in redirection:
        assert result.stdout.endswith(" tables)\n")
    # Of the other modes the output is the work; a stream that the user closed is not missed.
    for options in (("--verify", dump), ("--list",)):
        result = sample.run(*options, prefix=shell)
        assert result.returncode == (1 if "full" in redirection else 0), result
        if redirection == ">/dev/full":
            said = "\n\nError: the output could not be written: No space left on device\n\nTrouble"
            assert said in result.stderr, result
        else:
            assert not result.stderr
    # And a failure keeps its code.
    assert sample.run("--verify", "no such file", prefix=shell).returncode == 8


def test_lock_is_passed_on_where_every_stream_is_closed(sample: Project) -> None:
    # A lock that got the number of a stream would be lost to pg_dump, whose streams are its own.
    told = sample.directory / "descriptors"
    sample.fake("pg_dump", f'readlink /proc/$$/fd/* >>"{told}"\nexec "$real" "$@"')
    sample.run(prefix=("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")).succeeded()
    assert str(sample.backups / ".project_chat_dev.lock") in told.read_text().splitlines()


@pytest.mark.parametrize("mode", ["back up", "--list", "--verify"])
def test_reader_that_leaves_changes_nothing(mode: str, sample: Project) -> None:
    dump = sample.back_up()
    arguments = {"back up": (), "--list": ("--list",), "--verify": ("--verify", dump)}
    process = sample.start(*arguments[mode])
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 0


# What the locale makes of the output's letters: as they are, or escaped.
LOCALES = {
    "ascii output": ({"PYTHONIOENCODING": "ascii"}, "ascii"),
    "C": ({"LC_ALL": "C"}, "utf-8"),
    "C without UTF-8": (
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "ascii",
    ),
    "POSIX without UTF-8": (
        {"LANG": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "ascii",
    ),
    "a locale that is not there": ({"LC_ALL": "xx_YY.ISO-8859-1"}, "utf-8"),
}


@pytest.mark.parametrize("locale", LOCALES)
def test_names_are_the_same_in_every_locale(
    locale: str, make_project: MakeProject, cluster: Cluster
) -> None:
    name = "dätenbank 日本"
    database = Database(cluster, name)
    cluster.create_database(name)
    try:
        database.psql("""CREATE TABLE "tä😀" (x int); INSERT INTO "tä😀" VALUES (1)""")
        project = make_project(database)
        env, output = LOCALES[locale]
        made = project.run(env=env).succeeded()
        assert "Backup created successfully" in made.stdout
        (dump,) = project.dumps()
        assert re.fullmatch(rf"{name}_dev_{TIMESTAMP}\.dump", dump.name)
        assert read_metadata(dump)["database_name"] == name
        assert read_metadata(dump)["backup_file"] == dump.name
        assert read_metadata(dump)["table_counts"] == {'"tä😀"': 1}
        project.run("--verify", dump, env=env).succeeded()
        assert "Verified" in project.run("--list", env=env).succeeded().stdout
        # Names from the environment too, and a failure.
        gone = project.run(env={**env, "DEV_DB_NAME": "nichtdä"}).failed_with(3)
        words = 'database "nichtdä" does not exist'
        assert words.encode(output, "backslashreplace").decode(output) in gone.stderr
    finally:
        cluster.drop_database(name)


# -- options --------------------------------------------------------------------------------------


def test_help_is_the_docstring_and_the_options(make_project: MakeProject) -> None:
    result = make_project().run("--help").succeeded()
    assert not result.stderr
    assert backup_db.__doc__
    assert f"{backup_db.__doc__}\nThis is release {backup_db.BACKUP_DB_VERSION}.\n" in result.stdout
    assert "README.md" in result.stdout
    for default in ("auto", "db/backups/"):
        assert f"default: {default}" in " ".join(result.stdout.split())
    lines = result.stdout.splitlines()
    assert len(lines) <= 45
    assert sum(line.startswith("  python3 backup_db.py ") for line in lines) == 2
    codes = [f"  {int(code)}  {code.category}" for code in backup_db.ExitCode]
    assert lines[lines.index("exit codes:") + 1 :] == ["  0  Success", *codes]


def test_options_of_the_contract_are_the_only_ones() -> None:
    own = backup_db.build_parser().format_help().replace(backup_db.__doc__ or "", "")
    helped = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", own))
    assert helped == OPTIONS | {"-h"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "stage"], "argument --env: invalid choice: 'stage'"),
        (["--env"], "argument --env: expected one argument"),
        (["--env", "DEV"], "argument --env: invalid choice: 'DEV'"),
        (["--environment", "dev"], "unrecognized arguments: --environment dev"),
        (["--li"], "unrecognized arguments: --li"),
        (["--verify"], "argument --verify: expected one argument"),
        (["--verify", ""], "argument --verify: expected a path"),
        (["--output-dir", ""], "argument --output-dir: expected a path"),
        (["--list", "--verify", "x"], "argument --verify: not allowed with argument --list"),
        (["--verify", "x", "--list"], "argument --list: not allowed with argument --verify"),
        (["--force"], "unrecognized arguments: --force"),
        (["dump"], "unrecognized arguments: dump"),
    ],
)
def test_wrong_option_is_refused(
    arguments: Sequence[str], words: str, make_project: MakeProject
) -> None:
    project = make_project()
    result = project.run(*arguments).failed_with(2)
    usage, error = result.stderr.split("backup_db.py: error: ")
    assert usage.startswith("usage: backup_db.py [--env ENV] ")
    assert error.startswith(words)
    assert not project.backups.exists()


def test_several_dumps_to_verify_are_told_the_loop(bare: Project) -> None:
    copy_pair(bare.dumps()[0], bare.directory / "it's a copy")
    (dump,) = bare.dumps()
    shutil.copy(dump, bare.directory / "it's a copy" / "second.dump")
    result = bare.run("--verify", *sorted((bare.directory / "it's a copy").glob("*.dump")))
    *_usage, error, told = result.failed_with(2).stderr.splitlines()
    assert error.startswith("backup_db.py: error: unrecognized arguments: ")
    loop = told.removeprefix("Verify several one by one: ")
    done = subprocess.run(
        ["sh", "-c", loop],
        cwd=bare.directory,
        env=bare.environ,
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("✓ Backup verification passed") == 1
    assert done.stderr.count("✗ Backup verification failed") == 1


# -- the language ---------------------------------------------------------------------------------


def test_nothing_newer_than_python_3_10_is_used() -> None:
    vermin = Path(sys.executable).with_name("vermin")
    done = subprocess.run(
        [vermin, "--target=3.10-", "--no-tips", "--violations", "backup_db.py", "brain_core"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_older_python_gets_a_plain_line(make_project: MakeProject) -> None:
    project = make_project()
    script = project.directory / "backup_db.py"
    text = script.read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 8))  # or its SyntaxError would come before the line
    assert text.count("sys.version_info < (3, 10)") == 1
    script.write_text(text.replace("sys.version_info < (3, 10)", "sys.version_info < (99, 0)"))
    version = ".".join(map(str, sys.version_info[:3]))
    for arguments in ([], ["--list"]):
        assert project.run(*arguments).failed_with(1).stderr == (
            f"backup_db.py needs Python 3.10 or newer; this is {version} ({sys.executable})\n"
        )


# -- how the interpreter is started, and where ----------------------------------------------------


@pytest.mark.parametrize("option", ["-I", "-P", "PYTHONSAFEPATH"])
def test_interpreter_that_leaves_out_the_scripts_folder(option: str, project: Project) -> None:
    """It does not put the folder into sys.path, where brain_core is."""
    if option == "PYTHONSAFEPATH":
        project.run(env={option: "1"}).succeeded()
        return
    if option == "-P" and sys.version_info < (3, 11):
        return  # it came with 3.11
    isolate = f'exec "$0" {option} "$@"'
    project.run(prefix=("sh", "-c", isolate)).succeeded()
    project.run("--list", prefix=("sh", "-c", isolate)).succeeded()


def test_only_the_output_directory_can_be_written(project: Project) -> None:
    """As in a container with a read-only root: there is no place for temporary files."""
    project.backups.mkdir(parents=True)
    freeze = """
    mount --bind "$0" "$0" && mount -o remount,bind,ro / &&
    for place in /tmp /var /var/tmp /dev/shm; do
        if mountpoint -q $place; then mount -o remount,bind,ro $place || exit 1; fi
    done
    touch "$HOME/frozen" 2>/dev/null && exit 99
    exec "$@"
    """
    project.run(prefix=(*MOUNTING, "sh", "-c", freeze, str(project.backups))).succeeded()
    assert len(project.dumps()) == 1
