"""pg_dump and pg_restore that are missing, unfit, broken, or say more than they should."""

from __future__ import annotations

import pytest
from faults import CONTENTS, DUMP, TABLE_OF_CONTENTS, fake_call, untouched
from support import Project

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
    line = f"put this line above yours in the crontab: PATH={standing.bin_dir}:/usr/local/bin:"
    assert line in result.stderr, result


def test_verification_names_the_path_line_too(standing: Project) -> None:
    (dump,) = standing.dumps()
    result = standing.run("--verify", dump, env=hide_tools(standing)).failed_with(6, "Tool error")
    assert f"It is in {standing.bin_dir}. For cron" in result.stderr, result


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
        ("echo '{} (PostgreSQL) 9.6.24'", " is version 9.6.24, too old for the "),
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
    assert f"Error: {standing.fakes / tool}{words.format(tool)}" in result.stderr, result


@pytest.mark.parametrize("content", [b"\x7fELF garbage", b"#!/no/such/interpreter\n"])
def test_tool_that_is_no_program(content: bytes, standing: Project) -> None:
    tool = standing.fakes / "pg_dump"
    tool.write_bytes(content)
    tool.chmod(0o755)
    with untouched(standing):
        result = standing.run().failed_with(6, "Tool error")
    assert f"Error: {tool} cannot be run: " in result.stderr, result


@pytest.mark.parametrize(
    ("call", "script", "code", "words"),
    [
        (DUMP, "kill -SEGV $$", 7, "pg_dump was ended by signal 11 (SIGSEGV)"),
        (DUMP, "kill -KILL $$", 7, "killed process"),  # the out-of-memory killer's way
        (DUMP, 'echo "disc \tfull\a?" >&2; exit 3', 7, "Error: disc     full\\x07?\n"),
        (DUMP, "exit 0", 6, "wrote nothing into the dump: is it a wrapper that runs on another"),
        (TABLE_OF_CONTENTS, "kill -SEGV $$", 8, "pg_restore was ended by signal 11 (SIGSEGV)"),
        (TABLE_OF_CONTENTS, 'echo hm >&2; exec "$real" "$@"', 8, "hm\n"),
        (TABLE_OF_CONTENTS, "exit 0", 8, "table messages: not in the dump, 3420 rows expected"),
        (CONTENTS, "kill -SEGV $$", 8, "pg_restore was ended by signal 11 (SIGSEGV)"),
        (CONTENTS, 'echo hm >&2; exec "$real" "$@"', 8, "hm\n"),
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


def test_warning_of_pg_dump_is_passed_on(standing: Project) -> None:
    fake_call(standing, *DUMP, 'echo "pg_dump: warning: circular" >&2; exec "$real" "$@"')
    result = standing.run().succeeded()
    assert result.stderr == "Warning: pg_dump: warning: circular\n"
    assert "✓ Backup created successfully" in result.stdout


def test_program_that_talks_without_end_does_not_fill_the_memory(standing: Project) -> None:
    fake_call(standing, *DUMP, "head -c 60000000 /dev/zero | tr '\\0' x >&2; echo end >&2; exit 1")
    with untouched(standing):
        result = standing.run(prefix=["prlimit", "--as=400000000"]).failed_with(7)
    assert result.stderr.count("x") < 70_000
    assert "end\n" in result.stderr
