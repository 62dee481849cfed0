"""pg_dump and pg_restore that are missing, unfit, broken, or say more than they should."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from faults import (
    CONTENTS,
    DUMP,
    HOLD,
    TABLE_OF_CONTENTS,
    fake_call,
    let_go,
    paused,
    sessions_on,
    untouched,
)
from support import Database, Project, finish, wait_until

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
        ("echo '{} (PostgreSQL) 9.6.24'", " is version 9.6.24, {because} "),
        ("echo hello", " --version does not answer with a version: hello"),
        ("exit 0", " --version does not answer with a version: no output"),
        ("head -c 3000 /dev/urandom", " --version does not answer with a version: "),
        ("kill -SEGV $$", " --version does not answer with a version: {} was ended by signal 11"),
        ("echo oops >&2; exit 1", " --version does not answer with a version: oops"),
        ("exec sleep 100", " --version has not answered within 1 seconds"),
        ("exec yes", " --version has not answered within 1 seconds"),
        ("sleep 100 & exec sleep 100", " --version has not answered within 1 seconds"),
    ],
    ids=["old", "garbage", "nothing", "noise", "crash", "failure", "hang", "flood", "orphan"],
)
def test_tool_that_does_not_tell_a_fit_version(
    script: str, words: str, tool: str, standing: Project
) -> None:
    standing.rewrite({"TOOL_SECONDS": 1})
    fake_call(standing, tool, VERSION, script.format(tool))
    with untouched(standing):
        result = standing.run().failed_with(6, "Tool error")
    because = {"pg_dump": "and 14 is the oldest", "pg_restore": "too old for the archives of"}[tool]
    words = words.format(tool, because=because)
    assert f"Error: {standing.fakes / tool}{words}" in result.stderr, result


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
        (TABLE_OF_CONTENTS, "exit 0", 8, "table messages: not in the dump, 3420 expected"),
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
FILE = 'for word; do case "$word" in --file=*) file="${word#--file=}" ;; esac; done'

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
