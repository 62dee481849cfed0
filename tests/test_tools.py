"""pg_dump and pg_restore that are missing, unfit, broken, or say more than they should."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import MakeProject
from faults import (
    CONTENTS,
    DUMP,
    FILE,
    HOLD,
    TABLE_OF_CONTENTS,
    Proxy,
    fake_call,
    leading_to,
    let_go,
    paused,
    processes_of,
    sessions_on,
    untouched,
)
from pooler import Pooler
from support import (
    MOUNTING,
    Database,
    Project,
    assert_restores,
    finish,
    read_metadata,
    typed,
    wait_until,
)

TOOLS = ("pg_dump", "pg_restore")
VERSION = "--version"


def hide_tools(project: Project) -> dict[str, str]:
    """An environment like cron's: PATH leads to no PostgreSQL. Its programs lie where packages
    put them: in a folder that the script knows to look into."""
    script = project.directory / "backup_db.py"
    known = '    "/usr/lib/postgresql/*/bin",\n'
    text = script.read_text(encoding="utf-8")
    assert known in text
    script.write_text(text.replace(known, f"    {str(project.bin_dir)!r},\n"), encoding="utf-8")
    return {"PATH": str(project.fakes)}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_outside_path_is_found_for_the_crontab(tool: str, standing: Project) -> None:
    environ = hide_tools(standing)
    if tool == "pg_restore":
        standing.fake("pg_dump", 'exec "$real" "$@"')
    with untouched(standing):
        result = standing.run(env=environ).failed_with(6, "Tool error")
    assert f"Error: {tool} not found on PATH ({standing.fakes})\n" in result.stderr, result
    path = f"PATH={Path(sys.executable).parent}:{standing.bin_dir}:/usr/local/bin:"
    assert f"put this line above yours in the crontab: {path}" in result.stderr, result


def test_verification_names_the_path_line_too(standing: Project) -> None:
    (dump,) = standing.dumps()
    result = standing.run("--verify", dump, env=hide_tools(standing)).failed_with(6, "Tool error")
    assert f"It is in {standing.bin_dir}. For cron" in result.stderr, result


def test_older_tools_in_the_usual_folders_are_no_way_out(standing: Project) -> None:
    folder = standing.directory / "9" / "bin"
    folder.mkdir(parents=True)
    standing.rewrite({"TOOL_FOLDERS": ("9/bin",)})
    fake_call(standing, "pg_dump", VERSION, "echo 'pg_dump (PostgreSQL) 9.6.24'")
    (folder / "pg_dump").symlink_to(standing.fakes / "pg_dump")
    result = standing.run().failed_with(6, "Tool error")
    assert "crontab" not in result.stderr, result
    assert "client tools, version 14 or newer" in result.stderr, result


def test_pg_restore_beside_pg_dump_comes_before_one_that_is_earlier_on_path(
    standing: Project,
) -> None:
    older = standing.fakes / "pg_restore"
    older.write_text("#!/bin/sh\necho 'pg_restore (PostgreSQL) 9.6.24'\n")
    older.chmod(0o755)
    assert not (standing.fakes / "pg_dump").exists()
    standing.back_up()


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_that_may_not_be_executed(tool: str, standing: Project) -> None:
    for name in TOOLS:
        standing.fake(name, 'exec "$real" "$@"')
    (standing.fakes / tool).chmod(0o644)
    with untouched(standing):
        result = standing.run(env={"PATH": str(standing.fakes)}).failed_with(6, "Tool error")
    assert f"{standing.fakes / tool} is on PATH but may not be run by " in result.stderr, result
    assert f"chmod +x {standing.fakes / tool}\n" in result.stderr, result


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo hello", " --version does not answer with a version: hello"),
        ("exit 0", " --version does not answer with a version: no output"),
        ("head -c 3000 /dev/urandom", " --version does not answer with a version: "),
        ("kill -SEGV $$", " --version does not answer with a version: {} was ended by signal 11"),
        ("echo oops >&2; exit 1", " --version does not answer with a version: oops"),
        ("exec sleep 100", " --version has not answered within 1 seconds"),
        ("exec yes", " --version has not answered within 1 seconds"),
        ("sleep 100 & exec sleep 100", " --version has not answered within 1 seconds"),
    ],
    ids=["garbage", "nothing", "noise", "crash", "failure", "hang", "flood", "orphan"],
)
def test_tool_that_does_not_tell_a_fit_version(
    script: str, words: str, tool: str, standing: Project
) -> None:
    standing.rewrite({"TOOL_SECONDS": 1})
    fake_call(standing, tool, VERSION, script.format(tool))
    with untouched(standing):
        result = standing.run().failed_with(6, "Tool error")
    assert f"Error: {standing.fakes / tool}{words.format(tool)}" in result.stderr, result


@pytest.mark.parametrize(
    ("tool", "version", "words"),
    [
        ("pg_dump", "9.6.24", "and 14 is the oldest with which a backup can be verified"),
        ("pg_dump", "13.23", "and 14 is the oldest with which a backup can be verified"),
        ("pg_dump", "14.20", "too old for the server, which is version 17"),
        ("pg_restore", "9.6.24", "too old for archives of pg_dump 17."),
    ],
)
def test_tool_that_is_too_old(tool: str, version: str, words: str, standing: Project) -> None:
    fake_call(standing, tool, VERSION, f"echo '{tool} (PostgreSQL) {version}'")
    with untouched(standing):
        result = standing.run().failed_with(6, "Tool error")
    is_old = f"Error: {standing.fakes / tool} is version {version}, {words}"
    assert is_old in result.stderr, result


def test_compression_that_an_old_pg_dump_would_not_refuse(standing: Project) -> None:
    """14 takes any text, and writes uncompressed; 15 has only numbers."""
    for version in ("14.20", "15.16"):
        fake_call(standing, "pg_dump", VERSION, f"echo 'pg_dump (PostgreSQL) {version}'")
        for value in ("zstd:3", "lz4", "gzip", "zstd"):
            with untouched(standing):
                result = standing.run(env={"BACKUP_COMPRESS": value}).failed_with(2)
            assert f"BACKUP_COMPRESS is '{value}'" in result.stderr, result


def test_tool_that_leaves_a_process_behind_is_not_waited_for(standing: Project) -> None:
    fake_call(standing, "pg_dump", VERSION, 'sleep 30 & exec "$real" "$@"')
    finish(standing.start(), 20).succeeded()


@pytest.mark.parametrize("content", [b"\x7fELF garbage", b"#!/no/such/interpreter\n"])
def test_tool_that_is_no_program(content: bytes, standing: Project) -> None:
    tool = standing.fakes / "pg_dump"
    tool.write_bytes(content)
    tool.chmod(0o755)
    with untouched(standing):
        result = standing.run().failed_with(6, "Tool error")
    assert f"Error: {tool} --version cannot be run: " in result.stderr, result


@pytest.mark.parametrize(
    ("call", "script", "code", "words"),
    [
        (DUMP, "kill -SEGV $$", 7, "pg_dump was ended by signal 11: Segmentation fault"),
        (DUMP, 'echo "disc \tfull\a?" >&2; exit 3', 7, "Error: disc     full\\x07?\n"),
        (DUMP, "exit 0", 6, "wrote nothing into the dump: is it a wrapper that runs on another"),
        (
            TABLE_OF_CONTENTS,
            "kill -SEGV $$",
            8,
            "pg_restore was ended by signal 11: Segmentation fault",
        ),
        (TABLE_OF_CONTENTS, "exit 0", 8, "rows of table messages: not in the dump, 3420 expected"),
        (CONTENTS, "kill -SEGV $$", 8, "pg_restore was ended by signal 11: Segmentation fault"),
        (CONTENTS, "exit 0", 8, "lists the data of 5 tables, it holds that of 0"),
        (CONTENTS, "head -c 30000000 /dev/zero", 8, "a line that is no data and does not end"),
        (CONTENTS, '"$real" "$@" | head -c 3000', 8, "it breaks off within a table"),
    ],
)
def test_tool_that_fails_at_its_work(
    call: tuple[str, str], script: str, code: int, words: str, standing: Project
) -> None:
    fake_call(standing, *call, script)
    with untouched(standing):
        result = standing.run().failed_with(code)
    assert words in result.stderr, result


def test_pg_dump_that_is_killed_is_not_started_again(standing: Project) -> None:
    """The out-of-memory killer's way: it would be killed again."""
    fake_call(standing, *DUMP, 'echo x >>"$HOME/tries"; kill -KILL $$')
    with untouched(standing):
        result = standing.run().failed_with(7, "Backup creation error")
    assert "killed process" in result.stderr, result
    assert (standing.directory / "home" / "tries").read_text() == "x\n"


def test_warnings_of_pg_dump_are_passed_on(standing: Project) -> None:
    """Each line is one, without the words for it that are pg_dump's or the server's."""
    words = "pg_dump: warning: circular\\npg_dump: hint: none\\n\\nWARNING:  collation\\n"
    fake_call(standing, *DUMP, f"""printf '{words}' >&2; exec "$real" "$@\"""")
    result = standing.run().succeeded()
    assert result.stderr == "Warning: circular\nWarning: hint: none\nWarning: collation\n"
    assert "✓ Backup created successfully" in result.stdout


def test_hint_of_pg_restore_is_passed_on(standing: Project) -> None:
    """A later release may have some for a sound dump: it is no damage."""
    fake_call(standing, *CONTENTS, 'echo "pg_restore: hint: new" >&2; exec "$real" "$@"')
    warning = "Warning: pg_restore: hint: new\n"
    assert standing.run().succeeded().stderr == warning
    verified = standing.run("--verify", standing.dumps()[-1]).succeeded()
    assert verified.stderr == warning
    assert "Contents:    ✓ Match" in verified.stdout


# All that a later release may write besides data, before it and behind it.
ADDED_LINES = """
printf '%s\\n' '-- a hint' 'SELECT 1;' '\\restrict x' 'SET new = on;' "INSERT INTO t VALUES ('x');"
"$real" "$@" || exit
printf '%s\\n' '' '-- more' '\\unrestrict x' 'COPY;' 'copy t FROM stdin;'
"""


def test_lines_that_a_later_pg_restore_adds_are_no_damage(standing: Project) -> None:
    fake_call(standing, *CONTENTS, ADDED_LINES)
    standing.run().succeeded()
    standing.run("--verify", standing.dumps()[-1]).succeeded()


@pytest.mark.parametrize("mode", ["run", "verify"])
def test_script_of_more_tables_than_are_listed_is_not_read_to_its_end(
    mode: str, standing: Project
) -> None:
    """It has none, and takes no memory."""
    fake_call(standing, *CONTENTS, "yes \"$(printf 'COPY public.t (a) FROM stdin;\\n\\\\.')\"")
    (dump,) = standing.dumps()
    arguments = ("--verify", dump) if mode == "verify" else ()
    with untouched(standing):
        process = standing.start(*arguments, prefix=["prlimit", "--as=400000000"])
        result = finish(process, 20).failed_with(8)
    assert "lists the data of 5 tables, it holds more\n" in result.stderr, result
    assert processes_of(standing) == {}


def test_program_that_talks_without_end_does_not_fill_the_memory(standing: Project) -> None:
    fake_call(standing, *DUMP, "head -c 60000000 /dev/zero | tr '\\0' x >&2; echo end >&2; exit 1")
    with untouched(standing):
        result = standing.run(prefix=["prlimit", "--as=400000000"]).failed_with(7)
    assert result.stderr.count("x") < 70_000
    assert "end\n" in result.stderr


# -- what pg_dump says of the file that it writes -------------------------------------------------

# All that it can say (15 to 18), then what the system said, and the exit code that it comes to.
OWN_FILE = [
    ("could not open output file {}", "Disk quota exceeded", 5),
    ("could not open output file {}", "Permission denied", 4),
    ("could not write to output file", "Input/output error", 7),
    ("could not write to file", "No space left on device", 5),
    ("could not close archive file", "Disk quota exceeded", 5),
    ("could not close output file", "Input/output error", 7),
    ("could not close file", "No space left on device", 5),
    ("could not set seek position in archive file", "Illegal seek", 7),
    ("could not determine seek position in archive file", "Stale file handle", 7),
]

NO_SUCH_FILE = (
    'echo "pg_dump: error: could not open output file \\"$file\\": No such file or directory" >&2;'
    " exit 1"
)


@pytest.mark.parametrize(("words", "reason", "code"), OWN_FILE)
def test_failure_at_its_own_file_is_one_of_this_directory(
    words: str, reason: str, code: int, standing: Project
) -> None:
    said = f"pg_dump: error: {words}: {reason}".format('\\"$file\\"')
    fake_call(standing, *DUMP, f'{FILE}; echo x >"$file"; echo "{said}" >&2; exit 1')
    with untouched(standing):
        result = standing.run().failed_with(code)
    assert words.partition(" {}")[0] in result.stderr, result
    assert reason in result.stderr, result
    steps = result.stderr.partition("Troubleshooting:")[2]
    assert str(standing.backups) in steps or "db/backups" in steps, result
    assert "server's log" not in result.stderr, result


@pytest.mark.parametrize(
    "script",
    [
        'echo elsewhere >"$HOME/elsewhere"; exit 0',
        f"{FILE}; {NO_SUCH_FILE}",
    ],
    ids=["elsewhere", "no such descriptor"],
)
def test_wrapper_that_writes_elsewhere(script: str, standing: Project) -> None:
    """`docker exec … pg_dump "$@"`, or one by ssh: there our file is not."""
    fake_call(standing, *DUMP, script)
    with untouched(standing):
        result = standing.run().failed_with(6, "Tool error")
    assert str(standing.fakes / "pg_dump") in result.stderr, result
    assert "wrapper" in result.stderr, result


# -- a pg_restore that has no way to the dump -----------------------------------------------------

# A wrapper that gives the program nothing but its standard streams.
CLOSES_DESCRIPTORS = """exec bash -c '
    for descriptor in /proc/self/fd/*; do
        number=${descriptor##*/}
        [ "$number" -le 2 ] || eval "exec $number>&-" 2>/dev/null
    done
    exec "$0" "$@"' "$real" "$@"
"""


def test_pg_restore_that_is_given_no_descriptor_is_no_damage(standing: Project) -> None:
    standing.fake("pg_restore", CLOSES_DESCRIPTORS)
    (dump,) = standing.dumps()
    with untouched(standing):
        results = [standing.run(), standing.run("--verify", dump)]
    for result in results:
        result.failed_with(6, "Tool error")
        assert f"{standing.fakes / 'pg_restore'} cannot open the dump: is it a wr" in result.stderr
        assert "first on PATH" in result.stderr, result


def test_damaged_dump_is_one_whatever_pg_restore_can_open(standing: Project) -> None:
    standing.fake("pg_restore", CLOSES_DESCRIPTORS)
    (dump,) = standing.dumps()
    content = bytearray(dump.read_bytes())
    content[-100] ^= 1
    dump.write_bytes(content)
    result = standing.run("--verify", dump).failed_with(8)
    assert "Checksum:    ✗ Mismatch" in result.stderr, result


def test_machine_without_proc(standing: Project) -> None:
    """A rescue system's chroot: /dev/fd leads nowhere."""
    (dump,) = standing.dumps()
    without_proc = (*MOUNTING, "sh", "-c", 'mount -t tmpfs tmpfs /proc && exec "$@"', "sh")
    with untouched(standing):
        results = [
            standing.run(prefix=without_proc),
            standing.run("--verify", dump, prefix=without_proc),
        ]
    for result in results:
        result.failed_with(6, "Tool error")
        assert "/dev/fd is missing" in result.stderr, result
        assert "mount -t proc proc /proc" in result.stderr, result


# -- a pg_restore without the archive's compression -----------------------------------------------

NO_ZSTD = "pg_restore: error: could not read: this build does not support compression with zstd"


@pytest.mark.servers(15)  # its folder is where Debian's packages are put
@pytest.mark.parametrize("elsewhere", ["16", "17", "18"])
def test_hint_leads_to_no_pg_restore_that_is_too_old_for_the_archive(
    elsewhere: str, standing: Project, tmp_path: Path
) -> None:
    """Where Debian's packages put it."""
    folder = tmp_path / elsewhere / "bin"
    folder.mkdir(parents=True)
    tool = folder / "pg_restore"
    tool.write_text(f"#!/bin/sh\necho 'pg_restore (PostgreSQL) {elsewhere}.1'\n")
    tool.chmod(0o755)
    installed = f'mount --bind {tmp_path} /usr/lib/postgresql && exec "$@"'
    fake_call(standing, *CONTENTS, f"echo '{NO_ZSTD}' >&2; exit 1")
    (dump,) = standing.dumps()
    result = standing.run("--verify", dump, prefix=(*MOUNTING, "sh", "-c", installed, "sh"))
    result.failed_with(6, "Tool error")
    assert "is built without zstd" in result.stderr, result
    is_old = elsewhere == "16"
    assert ("version 17 or newer" in result.stderr) == is_old, result
    assert (f"/usr/lib/postgresql/{elsewhere}/bin" in result.stderr) == (not is_old), result


# -- what a program leaves behind -----------------------------------------------------------------


def test_late_words_of_a_programs_child_go_nowhere(standing: Project) -> None:
    """A wrapper's child that outlives it has its stderr, and writes there when nobody listens."""
    late = '(until [ -e "$HOME/late" ]; do sleep 0.05; done; echo late >&2; touch "$HOME/said")'
    fake_call(standing, *DUMP, f'{late} & exec "$real" "$@"')
    fake_call(standing, *CONTENTS, HOLD)
    process = standing.start()
    wait_until(lambda: paused(standing))
    (standing.directory / "home" / "late").touch()
    wait_until((standing.directory / "home" / "said").exists)
    let_go(standing)
    result = finish(process).succeeded()
    assert result.stderr == ""


def test_descriptors_and_connections_are_given_back(
    standing: Project, standing_database: Database
) -> None:
    """Those of a pg_dump that is started again, and of programs that are asked for a version. While
    the dump is read back, nobody is held up by a lock or a snapshot of ours."""
    standing.rewrite({"LOCK_RETRY_SECONDS": 0.1})
    fake_call(
        standing,
        *DUMP,
        'echo x >>"$HOME/tries"; [ $(wc -l <"$HOME/tries") -lt 3 ] && exit 1; exec "$real" "$@"',
    )
    fake_call(standing, *CONTENTS, HOLD)
    process = standing.start()
    wait_until(lambda: paused(standing))

    def open_pipes() -> list[Path]:
        descriptors = Path(f"/proc/{process.pid}/fd").iterdir()
        others = [link for link in descriptors if int(link.name) > 2]
        return [link for link in others if "pipe:" in os.path.realpath(link)]

    wait_until(lambda: len(open_pipes()) <= 2)  # pg_restore's output and its words
    wait_until(lambda: not sessions_on(standing_database), 10)
    let_go(standing)
    finish(process).succeeded()


# -- servers of other versions --------------------------------------------------------------------


@contextlib.contextmanager
def server_of(version: str, project: Project, database: Database) -> Iterator[dict[str, str]]:
    """The settings that lead to a server that gives itself out as this version. The project's
    pg_dump does so too, and works on the real one."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Pooler(listener, database.cluster, database.name, "session", version),
    ):
        for name in TOOLS:
            fake_call(project, name, VERSION, f"echo '{name} (PostgreSQL) {version}'")
        real = f"PGPORT={database.cluster.port}"
        path = project.fakes / "pg_dump"
        work = (
            f'case "$*" in *--snapshot*) echo "$*" >"$HOME/argv"; {real} exec "$real" "$@";; esac'
        )
        path.write_text(path.read_text().replace("\ncase", f"\n{work}\ncase", 1))
        yield leading_to(listener)


@pytest.mark.parametrize("version", ["13.23", "9.6.24"])
def test_server_that_is_too_old_is_backed_up_by_hand(
    version: str, standing: Project, standing_database: Database, tmp_path: Path
) -> None:
    with server_of(version, standing, standing_database) as way:
        (standing.fakes / "pg_dump").unlink()
        (standing.fakes / "pg_restore").unlink()
        with untouched(standing):
            result = standing.run(env=way).failed_with(6, "Tool error")
    assert f"the server is version {version.partition('.')[0]}, and 14 is" in result.stderr, result
    (step,) = re.findall(r"^  1\. .*", result.stderr, re.MULTILINE)
    real = str(standing_database.cluster.port)
    pasted = typed(step).replace(way["DEV_DB_PORT"], real)
    password = {"PGPASSWORD": standing_database.cluster.password}
    environ = {**standing.environ, **password}
    subprocess.run(["sh", "-c", pasted], cwd=tmp_path, env=environ, check=True)
    assert_restores(tmp_path / "by_hand.dump", standing_database)


def test_oldest_server_gets_a_level_of_gzip_alone(
    standing: Project, standing_database: Database
) -> None:
    with server_of("14.20", standing, standing_database) as way:
        standing.run(env=way).succeeded()
    argv = (standing.directory / "home" / "argv").read_text().split()
    assert [word for word in argv if "compress" in word] == ["--compress=4"]
    metadata = read_metadata(standing.dumps()[-1])
    assert metadata["postgresql_version"] == "14.20"
    assert metadata["compression"] == "gzip:4"


@pytest.mark.parametrize("version", ["19rc1", "19.0", "20devel"])
def test_server_of_a_later_release_is_not_refused(
    version: str, standing: Project, standing_database: Database
) -> None:
    with server_of(version, standing, standing_database) as way:
        dump = standing.run(env=way).succeeded()
        standing.run("--verify", standing.dumps()[-1]).succeeded()
    assert "✓ Integrity check passed" in dump.stdout


@pytest.mark.parametrize("language", ["C", "de_DE.UTF-8"])
def test_two_servers_behind_one_address(
    language: str, standing_database: Database, make_project: MakeProject
) -> None:
    """A reader address that balances: pg_dump comes to the other one, which does not know what our
    session has exported there."""
    cluster = standing_database.cluster
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Cluster(cluster.bin_dir))
        name, role = standing_database.name, f"role_{uuid.uuid4().hex[:12]}"
        stack.callback(cluster.psql, f"DROP ROLE IF EXISTS {role}")
        for each in (cluster, other):
            each.psql(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD 'secret'")
        other.create_database(name)
        settings = {**standing_database.settings(role, "secret")}
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.enter_context(Proxy(listener, cluster, other))
        settings |= leading_to(listener)
        project = make_project(settings=settings)
        if language != "C":
            words = "FEHLER:  Snapshot »\\1« existiert nicht"
            say = f'sed -E \'s/ERROR: .*"(.+)".*/{words}/\' "$HOME/words" >&2'
            fake_call(project, *DUMP, f'"$real" "$@" 2>"$HOME/words"; {say}; exit 1')
        result = project.run().failed_with(2, "Configuration error")
    assert "two servers answer at this address" in result.stderr, result
    assert "DEV_DB_HOST" in result.stderr, result
    assert ("existiert nicht" in result.stderr) == (language != "C"), result
    assert not project.dumps()


# What the server says of a row that is over 1 GB in its text form (up to 17, and 18).
ROW_TOO_LONG = """\
pg_dump: error: Dumping the contents of table "big" failed: PQgetResult() failed.
pg_dump: detail: Error message from server: ERROR:  {}
DETAIL:  Cannot enlarge string buffer containing 1073741790 bytes by 400000000 more bytes.
pg_dump: detail: Command was: COPY public.big (a, b, c) TO stdout;
"""


@pytest.mark.parametrize(
    "words", ["out of memory", "string buffer exceeds maximum allowed length (1073741823 bytes)"]
)
def test_row_over_1_gb_is_told_with_the_way_out(words: str, standing: Project) -> None:
    (standing.directory / "home" / "words").write_text(ROW_TOO_LONG.format(words))
    standing.rewrite({"LOCK_RETRY_SECONDS": 0.1})
    fake_call(standing, *DUMP, 'cat "$HOME/words" >&2; exit 1')
    with untouched(standing):
        result = standing.run().failed_with(7, "Backup creation error")
    assert "the server cannot read its own data of table public.big" in result.stderr, result
    assert "no repetition of the backup heals that" in result.stderr, result
    assert "--exclude-table-data=public.big" in result.stderr, result
