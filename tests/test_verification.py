"""What "verified" means: of a new backup, and of any damage to an old one."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path

import pytest
from cluster import Cluster, installation
from conftest import MakeProject, project_maker
from faults import FILE, fake_call
from support import Backup, Database, Project, Result, contents_of, finish, new_database

from backup_db import Metadata

# Small, and yet most of its dump is rows: damage is to hit those, not only names.
SCHEMA = """
CREATE TABLE messages (id int PRIMARY KEY, content text);
INSERT INTO messages SELECT n, repeat(md5(n::text), 1 + n % 3) FROM generate_series(1, 400) AS n;
CREATE TABLE empty (id int);
CREATE SCHEMA other;
CREATE TABLE other."Odd.name" (a int);
INSERT INTO other."Odd.name" SELECT generate_series(1, 3);
SELECT lo_from_bytea(4711, 'first'), lo_from_bytea(4712, '');
"""
COUNTS = {"messages": 400, "empty": 0, 'other."Odd.name"': 3}

# The places of the random damage; another number, other places.
SEED = 20250127


@pytest.fixture(scope="module")
def source(cluster: Cluster) -> Iterator[Database]:
    with new_database(cluster) as database:
        database.psql(SCHEMA)
        yield database


@pytest.fixture(scope="module")
def originals(
    source: Database, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Backup]:
    """One backup of each compression, made when first asked for. Not to be touched."""
    make = project_maker(tmp_path_factory.mktemp("originals"), source.cluster)
    made: dict[str, Backup] = {}

    def original(compression: str) -> Backup:
        if compression not in made:
            project = make(source, settings={"BACKUP_COMPRESS": compression})
            made[compression] = Backup(project.back_up(), project)
            assert made[compression].read_metadata()["table_counts"] == COUNTS
            made[compression].verify().succeeded()
        return made[compression]

    return original


@pytest.fixture
def backup(originals: Callable[[str], Backup], tmp_path: Path) -> Backup:
    """A backup that is a test's own."""
    return originals("zstd:3").copy_to(tmp_path / "damaged")


def dump_otherwise(source: Database, directory: Path, *options: str) -> bytes:
    """A dump by other options than ours."""
    path = directory / "otherwise"
    source.cluster.run("pg_dump", *options, f"--file={path}", database=source.name)
    return path.read_bytes()


# -- what --verify takes --------------------------------------------------------------------------


def test_verify_and_list_need_only_python_and_pg_restore(backup: Backup, tmp_path: Path) -> None:
    """On a bare rescue machine: no package, no settings, no server, not even brain_core."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pg_restore").symlink_to(backup.project.bin_dir / "pg_restore")
    script = shutil.copy(backup.project.directory / "backup_db.py", bare)
    python = [sys.executable, "-S"]  # without site-packages
    assert subprocess.run([*python, "-c", "import psycopg2"], capture_output=True).returncode == 1

    def run(*arguments: str | Path) -> Result:
        return finish(
            subprocess.Popen(
                [*python, script, *arguments],
                env={"PATH": str(bare)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )

    verified = run("--verify", backup.dump).succeeded()
    assert "Contents:    ✓ Match (403 rows in 3 tables, 2 large objects)" in verified.stdout
    assert "✓ Verified" in run("--list", "--output-dir", backup.dump.parent).succeeded().stdout


@pytest.mark.parametrize(
    ("major", "compression", "words"),
    [
        pytest.param(major, compression, words, marks=pytest.mark.servers(major))
        for major, compression, words in (
            (15, "gzip:4", ["is version 15.", "which pg_dump 17.", "version 17 or newer"]),
            (16, "gzip:4", ["is version 16.", "which pg_dump 17.", "version 17 or newer"]),
            (18, "zstd:3", ["is built without zstd", "BACKUP_COMPRESS=gzip"]),
        )
    ],
)
def test_unfit_pg_restore_is_a_tool_error(
    major: int, compression: str, words: list[str], originals: Callable[[str], Backup]
) -> None:
    backup = originals(compression)
    path = f"{installation(major)}:/usr/bin:/bin"
    result = backup.project.run("--verify", backup.dump, env={"PATH": path})
    result.failed_with(6, "Tool error")
    for word in words:
        assert word in result.stderr, result


def test_damage_is_told_before_an_old_pg_restore(backup: Backup, make_project: MakeProject) -> None:
    """Newer tools would not mend it."""
    project = make_project()
    fake_at_work(project, "pg_restore", "--version", "echo 'pg_restore (PostgreSQL) 9.6.24'")
    backup.dump.write_bytes(b"noise")
    result = project.run("--verify", backup.dump).failed_with(8)
    assert ", found 5\n" in result.stderr, result


@pytest.mark.servers(18)
def test_newer_pg_restore_will_do(originals: Callable[[str], Backup]) -> None:
    backup = originals("gzip:4")
    path = f"{installation(18)}:/usr/bin:/bin"
    backup.project.run("--verify", backup.dump, env={"PATH": path}).succeeded()


# -- what a new backup says of its verification ---------------------------------------------------


def test_metadata_says_what_was_read_back_and_how_long_the_run_took(
    source: Database, make_project: MakeProject
) -> None:
    """Of a read-back that takes longer than may pass without a movement, and moves all the time."""
    project = make_project(source, constants={"STALL_SECONDS": 1})
    slowly = "for _ in 1 2 3 4 5 6; do head -c 5000; sleep 0.25; done; cat"
    fake_at_work(project, "pg_restore", "--use-list", f'"$real" "$@" | {{ {slowly}; }}')
    started = time.monotonic()
    began = datetime.now(timezone.utc).replace(microsecond=0)
    metadata = Backup(project.back_up(), project).read_metadata()
    ended = datetime.now(timezone.utc)
    assert 1 <= metadata["duration_seconds"] <= time.monotonic() - started
    verification = metadata["verification"]
    verified_at = datetime.strptime(verification.pop("verified_at"), "%Y-%m-%dT%H:%M:%S%z")
    assert began <= verified_at <= ended
    version = source.cluster.run("pg_restore", "--version")
    assert f"pg_restore (PostgreSQL) {verification.pop('pg_restore_version')}" in version
    assert verification == {
        "rows_read_back": sum(COUNTS.values()),
        "tables_read_back": len(COUNTS),
        "large_objects_read_back": 2,
    }


# -- damage ---------------------------------------------------------------------------------------


def test_intact_copy_passes(backup: Backup) -> None:
    """That what fails below fails by its damage."""
    result = backup.verify().succeeded()
    assert "Checksum:    ✓ Match" in result.stdout
    assert "Structure:   ✓ Valid (pg_restore --list succeeded)" in result.stdout


CHANGED = "Error: This file has changed since it was written: expected "
CHECKSUM, STRUCTURE, CONTENTS = "Checksum:    ✗", "Structure:   ✗", "Contents:    ✗"


def change_last_digit(backup: Backup) -> None:
    checksum = backup.read_metadata()["checksum_sha256"]
    backup.edit(checksum_sha256=checksum[:-1] + ("1" if checksum[-1] == "0" else "0"))


def gzip_dump(backup: Backup) -> None:
    backup.dump.write_bytes(gzip.compress(backup.dump.read_bytes()))


NO_ARCHIVE = "it is no custom-format archive of pg_dump"

# What is done to a backup, the check that finds it, and what the error says.
DAMAGE: dict[str, tuple[Callable[[Backup], object], str, str]] = {
    "appended byte": (
        lambda b: b.dump.write_bytes(b.dump.read_bytes() + b"x"),
        CHECKSUM,
        CHANGED,
    ),
    "cut": (
        lambda b: os.truncate(b.dump, 3000),
        CHECKSUM,
        " bytes, found 3000\n",
    ),
    "empty": (lambda b: b.dump.write_bytes(b""), STRUCTURE, f" bytes, found 0\n{NO_ARCHIVE}"),
    "gzip of itself": (gzip_dump, STRUCTURE, NO_ARCHIVE),
    "other byte": (
        lambda b: b.dump.write_bytes(b.dump.read_bytes()[:-1] + b"x"),
        CHECKSUM,
        CHANGED,
    ),
    "metadata of another": (
        lambda b: b.edit(backup_file="other_dev.dump", checksum_sha256="0" * 64),
        CHECKSUM,
        "metadata.json describes another backup: other_dev.dump\n",
    ),
    "other checksum": (
        lambda b: b.edit(checksum_sha256="0" * 64),
        CHECKSUM,
        f"{CHANGED}000000000000..., found ",
    ),
    "other last digit of the checksum": (change_last_digit, CHECKSUM, CHANGED),
    "empty, forged": (lambda b: b.forge(b""), STRUCTURE, "could not read from input file"),
    "noise, forged": (lambda b: b.forge(b"noise" * 1000), STRUCTURE, NO_ARCHIVE),
    "half, forged": (
        lambda b: b.forge(b.dump.read_bytes()[: b.dump.stat().st_size // 2]),
        CONTENTS,
        "end of file",
    ),
    "last byte cut, forged": (
        lambda b: b.forge(b.dump.read_bytes()[:-1]),
        CONTENTS,
        "end of file",
    ),
    "a row more": (
        lambda b: b.count(messages=399),
        CONTENTS,
        "rows of table messages: 400 in the dump, 399 expected",
    ),
    "a row less": (
        lambda b: b.count(messages=401),
        CONTENTS,
        "rows of table messages: 400 in the dump, 401 expected",
    ),
    "row in an empty table": (
        lambda b: b.count(empty=1),
        CONTENTS,
        "rows of table empty: 0 in the",
    ),
    "no counts": (
        lambda b: b.edit(table_counts={}, table_oids={}),
        CONTENTS,
        "in the dump, but not counted",
    ),
    "table unknown": (lambda b: b.forget("empty"), CONTENTS, "in the dump, but not counted"),
    "table gone": (
        lambda b: b.edit(table_oids={**b.read_metadata()["table_oids"], "empty": 2**32 - 1}),
        CONTENTS,
        "rows of table empty: not in the dump, 0 expected",
    ),
    "large object more": (lambda b: b.edit(large_object_count=1), CONTENTS, "1 expected"),
    "large object less": (lambda b: b.edit(large_object_count=3), CONTENTS, "3 expected"),
    "large objects uncounted": (lambda b: b.edit(large_object_count=None), CONTENTS, "0 expected"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(damage: str, backup: Backup) -> None:
    inflict, check, words = DAMAGE[damage]
    inflict(backup)
    before = contents_of(backup.dump.parent)
    result = backup.verify().failed_with(8)
    assert result.stderr.startswith("✗ Backup verification failed\n\nFile: "), result
    assert check in result.stderr, result
    assert words in result.stderr, result
    assert contents_of(backup.dump.parent) == before


# Dumps that pg_restore itself can read, or could; the metadata vouches for each.
OTHERWISE = {
    "no rows": (
        ["--format=custom", "--schema-only"],
        CONTENTS,
        "rows of table messages: not in the dump",
    ),
    "no rows of one table": (
        ["--format=custom", "--exclude-table-data=messages"],
        CONTENTS,
        "rows of table messages: not in the dump, 400 expected",
    ),
    "no large objects": (
        ["--format=custom", "--no-large-objects"],
        CONTENTS,
        "large objects: 0 in the dump, 2 expected",
    ),
    "rows as INSERT": (["--format=custom", "--inserts"], CONTENTS, "it holds that of 0"),
    "tar": (["--format=tar"], STRUCTURE, NO_ARCHIVE),
    "plain SQL": (["--format=plain"], STRUCTURE, NO_ARCHIVE),
}


def test_what_to_do_with_a_damaged_dump(backup: Backup, tmp_path: Path) -> None:
    """Its steps, typed: the list of the others, and what this one still gives."""
    backup.dump.write_bytes(backup.dump.read_bytes()[:-4000])
    steps = backup.verify().failed_with(8).stderr.splitlines()
    assert any("Choose another backup: python3 backup_db.py --list" in line for line in steps)
    (salvage,) = (line.partition("it breaks: ")[2] for line in steps if "it breaks: " in line)
    done = subprocess.run(["sh", "-c", salvage], env=backup.project.environ, cwd=tmp_path)
    assert done.returncode != 0
    assert "CREATE TABLE public.messages" in (tmp_path / "salvaged.sql").read_text()


@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_other_dump_is_refused(
    otherwise: str, backup: Backup, source: Database, tmp_path: Path
) -> None:
    options, check, words = OTHERWISE[otherwise]
    backup.forge(dump_otherwise(source, tmp_path, *options))
    result = backup.verify().failed_with(8)
    assert check in result.stderr, result
    assert words in result.stderr, result


def test_what_is_no_dump_file_is_refused(backup: Backup, source: Database) -> None:
    folder = backup.dump.parent / "folder.dump"
    source.cluster.run("pg_dump", "--format=directory", f"--file={folder}", database=source.name)
    shutil.copy(backup.metadata, folder.with_name("folder.metadata.json"))
    toc = Path(shutil.copy(folder / "toc.dat", folder.with_name("toc.dump")))
    plain = folder.with_name("plain.dump")
    plain.write_bytes(dump_otherwise(source, folder.parent, "--format=plain"))
    for path, words in (
        (folder, "folder.dump is not a .dump file"),
        (backup.metadata, f"Name the dump: python3 backup_db.py --verify {backup.dump}"),
        (backup.dump.with_name("missing.dump"), "there is no file "),
        (Path("/dev/null"), "/dev/null is not a .dump file"),
        (plain, f"What the dump alone can tell: pg_restore --file=/dev/null {plain}\n"),
        (toc, f"What the dump alone can tell: pg_restore --file=/dev/null {toc}\n"),
    ):
        result = backup.project.run("--verify", path).failed_with(8)
        assert words in result.stderr, result


ILL_TYPED: dict[str, list[object]] = {
    "backup_timestamp": [None, 1, "", "yesterday", "2025-01-27T14:30:00+01:00"],
    "environment": [None, 1, ["dev"]],
    "database_name": [None, False],
    "backup_file": [None, {}],
    "backup_size_bytes": [None, "1", 1.5, True, -1],
    "checksum_sha256": [None, 0, "", "abc", "A" * 64],
    "table_counts": [None, [], 3, {"a": -1}, {"a": "1"}, {"a": None}],
    "pg_dump_version": [None, 17],
    "postgresql_version": [None, 17.5],
}


def test_each_required_key_has_ill_typed_values() -> None:
    assert set(ILL_TYPED) == set(Metadata._fields) - set(Metadata._field_defaults)


@pytest.mark.parametrize("key", ILL_TYPED)
def test_required_key_that_is_missing_or_ill_typed_is_named(key: str, backup: Backup) -> None:
    values = backup.read_metadata()
    broken = [{**values, key: value} for value in ILL_TYPED[key]]
    del values[key]
    dumps = []
    for number, metadata in enumerate([values, *broken]):
        copy = backup.copy_to(backup.dump.parent / str(number))
        copy.metadata.write_text(json.dumps(metadata), encoding="utf-8")
        dumps.append(copy.dump)
    for result in backup.project.run_each(*(("--verify", dump) for dump in dumps)):
        result.failed_with(8)
        assert f'.metadata.json cannot be used: the key "{key}" ' in result.stderr, result


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_metadata_that_is_no_object_fails(text: bytes, backup: Backup) -> None:
    backup.metadata.write_bytes(text)
    assert ".metadata.json cannot be used: it is no" in backup.verify().failed_with(8).stderr


def test_missing_metadata_fails(backup: Backup) -> None:
    backup.metadata.unlink()
    assert "there is no metadata file " in backup.verify().failed_with(8).stderr


def test_unknown_keys_are_ignored(backup: Backup) -> None:
    backup.edit(colour="green", duration_seconds="long", roles=3)
    backup.verify().succeeded()


@pytest.mark.parametrize("compression", ["gzip:4", "zstd:3"])
def test_random_damage_never_passes(
    compression: str, originals: Callable[[str], Backup], tmp_path: Path
) -> None:
    """200 flipped bits and 20 truncations; the truncations again where the metadata vouches."""
    places = random.Random(SEED)
    original = originals(compression)
    content = original.dump.read_bytes()
    metadata = original.read_metadata()

    def put(name: str, damaged: bytes, **vouching: object) -> Path:
        dump = tmp_path / f"{name}.dump"
        dump.write_bytes(damaged)
        text = json.dumps({**metadata, **vouching})
        dump.with_name(f"{name}.metadata.json").write_text(text, encoding="utf-8")
        return dump

    intact = put("intact", content)
    damaged = []
    for bit in places.sample(range(8 * len(content)), 200):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(put(f"bit-{bit}", bytes(flipped)))
    for length in places.sample(range(len(content)), 20):
        part = content[:length]
        vouching = {"backup_size_bytes": length, "checksum_sha256": sha256(part).hexdigest()}
        damaged.append(put(f"cut-{length}", part))
        damaged.append(put(f"forged-cut-{length}", part, **vouching))
    verify = original.project.run_each(*(("--verify", dump) for dump in [intact, *damaged]))
    assert verify[0].returncode == 0
    assert len(damaged) == 240
    passed = [str(result) for result in verify[1:] if result.returncode != 8]
    assert not passed, f"of {len(content)} bytes, with the seed {SEED}"


# -- programs that lie ----------------------------------------------------------------------------

# What a pg_dump that exits with 0 may have done; "$file" is its output file.
LYING_DUMPS = {
    "loses the last byte": '"$real" "$@" && truncate -s -1 "$file"',
    "loses the tail": '"$real" "$@" && truncate -s 6000 "$file"',
    "writes noise": 'head -c 9999 /dev/urandom > "$file"',
    "writes another format": '"$real" "$@" --format=tar --compress=0',
    "forgets the rows of a table": '"$real" "$@" --exclude-table-data=messages',
    "forgets a table": '"$real" "$@" --exclude-table=empty',
    "forgets the large objects": '"$real" "$@" --no-large-objects',
    "writes statements": '"$real" "$@" --inserts',
    "dumps another moment": """
        psql --quiet --command='INSERT INTO messages VALUES (0)'
        for argument; do
            shift
            case $argument in --snapshot=*) ;; *) set -- "$@" "$argument" ;; esac
        done
        "$real" "$@"
        psql --quiet --command='DELETE FROM messages WHERE id = 0'
    """,
}

STUCK = "is stuck"

# What a pg_restore may do while it reads the rows, though the archive is whole.
FAILING_RESTORES = {
    "is killed": ('"$real" "$@"; kill -KILL $$', "ended by signal 9: Killed"),
    "crashes at once": ("kill -SEGV $$", "ended by signal 11: Segmentation fault"),
    "fails": ('"$real" "$@"; exit 3', "pg_restore ended with exit status 3"),
    "says nothing": ("cat >/dev/null", "it holds that of 0"),
    "stops early": ('"$real" "$@" | head --lines=100', "it breaks off within a table"),
    "loses a table": ('"$real" "$@" | sed "/^COPY public.empty/,/^..$/d"', "it holds that of 2"),
    "adds a table": (
        r'"$real" "$@"; echo "COPY public.more (a) FROM stdin;"; echo "\."',
        "lists the data of 3 tables, it holds more",
    ),
    "loses a row": (
        '"$real" "$@" | sed "/^7\t/d"',
        "rows of table messages: 399 in the dump, 400 expected",
    ),
    STUCK: ("sleep 60", "pg_restore is stuck: silent for 1 second"),
}


def fake_at_work(project: Project, program: str, option: str, script: str) -> None:
    """As fake_call does, with the output file as "$file"."""
    fake_call(project, program, option, f"{FILE}\n{script}")


@pytest.mark.parametrize("lie", LYING_DUMPS)
def test_new_dump_that_lacks_something_is_not_published(
    lie: str, source: Database, originals: Callable[[str], Backup], make_project: MakeProject
) -> None:
    project = make_project(source)
    project.backups.parent.mkdir()
    originals("zstd:3").copy_to(project.backups)
    before = contents_of(project.backups)
    fake_at_work(project, "pg_dump", "--snapshot=", LYING_DUMPS[lie])
    result = project.run().failed_with(8, "Verification error")
    assert "Error: the new dump does not hold what the database held\n" in result.stderr
    assert files_but_lock(contents_of(project.backups)) == files_but_lock(before)


@pytest.mark.parametrize("failure", FAILING_RESTORES)
def test_backup_that_pg_restore_cannot_read_is_not_verified(
    failure: str, source: Database, backup: Backup, make_project: MakeProject
) -> None:
    script, words = FAILING_RESTORES[failure]
    project = make_project(source, constants={"STALL_SECONDS": 1} if failure == STUCK else {})
    fake_at_work(project, "pg_restore", "--use-list", script)
    created = project.run().failed_with(8, "Verification error")
    assert words in created.stderr, created
    assert not files_but_lock(contents_of(project.backups))
    verified = project.run("--verify", backup.dump).failed_with(8)
    assert CONTENTS in verified.stderr, verified
    assert words in verified.stderr, verified


def test_table_of_contents_that_names_a_table_twice_is_damage(
    backup: Backup, make_project: MakeProject
) -> None:
    """The second time its rows would be those that are compared."""
    project = make_project()
    entry = "; \\(.*TABLE DATA public messages \\)"
    project.fake(
        "pg_restore",
        f"""
        case $* in
            *--list*) "$real" "$@"; exec "$real" "$@" | sed -n 's/^[0-9]*{entry}/99999; \\1/p' ;;
            *--use-list*)
                sed /^99999/d | "$real" "$@"
                echo 'COPY public.messages (id) FROM stdin;'; seq 400; echo '\\.' ;;
            *) exec "$real" "$@" ;;
        esac
        """,
    )
    result = project.run("--verify", backup.dump).failed_with(8)
    assert CONTENTS in result.stderr, result
    assert "lists the data of 3 tables, it holds that of 4" in result.stderr, result


def files_but_lock(files: dict[str, str]) -> dict[str, str]:
    return {name: content for name, content in files.items() if not name.endswith(".lock")}
