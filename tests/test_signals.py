"""A signal at any moment: the run is over at once, and nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
from pathlib import Path

import pytest
from faults import (
    DUMP,
    GONE_SECONDS,
    HOLD,
    PHASES,
    TABLE_OF_CONTENTS,
    TERMINATING,
    assert_nothing_runs,
    between_the_renames,
    dumping,
    fake_call,
    let_go,
    paused,
    processes_of,
    published,
    sessions_on,
    stopped,
    strike,
    transaction,
    untouched,
)
from support import Database, Project, Terminal, finish, wait_until


@pytest.mark.parametrize("phase", PHASES)
def test_signal_ends_the_run(phase: str, standing: Project, standing_database: Database) -> None:
    for number in TERMINATING:
        with untouched(standing), PHASES[phase](standing, standing_database) as process:
            strike(process, number)
            assert_nothing_runs(standing, standing_database)
    standing.back_up()


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGXCPU], ids=["QUIT", "XCPU"])
def test_signal_that_dumps_core_ends_the_run_like_any_other(
    number: signal.Signals, standing: Project, standing_database: Database
) -> None:
    """Ctrl-\\ and `ulimit -t`. A core would hold the password, so there is none."""
    with untouched(standing), dumping(standing, standing_database) as process:
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        strike(process, number)
        assert_nothing_runs(standing, standing_database)
    assert not list(standing.directory.glob("core*"))


def test_signal_ends_the_first_process_of_a_container(
    standing: Project, standing_database: Database
) -> None:
    """The kernel keeps from it every signal that it has no handler for: it cannot die of one."""
    prefix = ("unshare", "--pid", "--fork", *(() if os.geteuid() == 0 else ("--map-root-user",)))
    with (
        untouched(standing),
        transaction(standing_database, "REFRESH MATERIALIZED VIEW statistics"),
    ):
        for number in TERMINATING:
            process = standing.start(prefix=prefix)
            wait_until(lambda: sessions_on(standing_database, "wait_event_type = 'Lock'"))
            tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            os.kill(int(tasks.read_text()), number)
            result = finish(process, GONE_SECONDS)
            assert result.returncode == 128 + number, result
            assert (result.stdout, result.stderr) == ("", stopped(number))
            assert_nothing_runs(standing, standing_database)


@pytest.mark.parametrize("number", TERMINATING, ids=lambda number: str(number.name))
def test_signal_between_the_renames_leaves_a_whole_backup(
    number: signal.Signals, standing: Project, standing_database: Database
) -> None:
    before = published(standing.backups)
    with between_the_renames(standing, standing_database) as process:
        strike(process, number, "The new backup is whole and published.")
    assert_nothing_runs(standing, standing_database)
    after = published(standing.backups)
    assert after.items() > before.items()
    dump, metadata = sorted(after.keys() - before.keys())
    assert metadata == dump.removesuffix(".dump") + ".metadata.json"
    standing.run("--verify", standing.backups / dump).succeeded()


def test_signal_ends_a_verification(standing: Project) -> None:
    fake_call(standing, *TABLE_OF_CONTENTS, HOLD)
    process = standing.start("--verify", standing.dumps()[0])
    wait_until(lambda: paused(standing))
    strike(process, signal.SIGTERM, outcome="")


@pytest.mark.parametrize("call", [DUMP, TABLE_OF_CONTENTS], ids=lambda call: str(call[0]))
def test_program_that_ignores_signals_is_killed(
    call: tuple[str, str], standing: Project, standing_database: Database
) -> None:
    fake_call(
        standing, *call, "trap '' TERM INT HUP; touch $HOME/paused; while :; do sleep 0.1; done"
    )
    with untouched(standing):
        process = standing.start()
        wait_until(lambda: paused(standing))
        strike(process, signal.SIGTERM)
        assert_nothing_runs(standing, standing_database)


def test_further_signals_do_not_disturb_the_cleaning_up(
    standing: Project, standing_database: Database
) -> None:
    fake_call(  # it takes its time to end, and tells when it was asked to
        standing,
        *DUMP,
        "trap 'touch $HOME/asked' TERM; touch $HOME/paused; while :; do sleep 0.1; done",
    )
    with untouched(standing):
        process = standing.start()
        wait_until(lambda: paused(standing))
        process.terminate()
        wait_until((standing.directory / "home" / "asked").exists)
        for number in (*TERMINATING, *TERMINATING):
            process.send_signal(number)
        strike(process, signal.SIGTERM)
        assert_nothing_runs(standing, standing_database)


def test_pause_before_another_attempt_holds_no_connection(
    standing: Project, standing_database: Database
) -> None:
    """Nor a lock: a role that may have two connections gets both back."""
    standing.rewrite({"LOCK_RETRY_SECONDS": 100})
    fake_call(standing, *DUMP, "touch $HOME/paused; exit 1")
    with untouched(standing):
        process = standing.start()
        wait_until(lambda: paused(standing))
        wait_until(lambda: not sessions_on(standing_database), 10)
        strike(process, signal.SIGTERM)


def test_signal_that_nohup_ignores_stays_ignored(standing: Project) -> None:
    fake_call(standing, *TABLE_OF_CONTENTS, HOLD)
    process = standing.start(prefix=["nohup"])
    wait_until(lambda: paused(standing))
    process.send_signal(signal.SIGHUP)
    let_go(standing)
    finish(process).succeeded()


@pytest.mark.parametrize("number", TERMINATING, ids=lambda number: str(number.name))
def test_signal_while_python_loads_the_script_is_no_traceback(
    number: signal.Signals, standing: Project
) -> None:
    # Python looks beside the script first: one of its modules takes long to load.
    slow_module = "import os, time; open(os.environ['HOME'] + '/paused', 'x'); time.sleep(100)"
    (standing.directory / "argparse.py").write_text(slow_module)
    process = standing.start()
    wait_until(lambda: paused(standing))
    process.send_signal(number)
    result = finish(process, GONE_SECONDS)
    assert (result.returncode, result.stdout, result.stderr) == (-number, "", "")


def test_signal_ends_a_run_whose_settings_do_not_come(standing: Project) -> None:
    slow_module = "import os, time; open(os.environ['HOME'] + '/paused', 'x'); time.sleep(100)"
    (standing.directory / "brain_core" / "config.py").write_text(slow_module)
    process = standing.start()
    wait_until(lambda: paused(standing))
    strike(process, signal.SIGINT)


def test_ctrl_c_in_a_terminal_prints_one_line(
    standing: Project, standing_database: Database
) -> None:
    fake_call(standing, *TABLE_OF_CONTENTS, "touch $HOME/paused; exec sleep 100")
    with untouched(standing):
        with Terminal(standing) as terminal:
            wait_until(lambda: paused(standing))
            terminal.type("\x03")
            # The progress line, and the ^C behind it, are erased.
            assert terminal.finish(GONE_SECONDS) == (-signal.SIGINT, stopped(signal.SIGINT))
        assert_nothing_runs(standing, standing_database)


# -- SIGKILL: the script itself cannot clean up ---------------------------------------------------


@pytest.mark.parametrize("phase", [*PHASES, "between the renames"])
def test_next_run_sweeps_what_a_killed_one_left(
    phase: str, standing: Project, standing_database: Database
) -> None:
    before = published(standing.backups)
    stage = PHASES.get(phase, between_the_renames)
    with stage(standing, standing_database) as process:
        process.kill()
        finish(process)
        assert [dump.name for dump in standing.dumps()] == [n for n in before if n[-5:] == ".dump"]
    for left in processes_of(standing):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGTERM)
    wait_until(lambda: not processes_of(standing))
    dump = standing.back_up()
    metadata = dump.name.removesuffix(".dump") + ".metadata.json"
    after = published(standing.backups)
    assert after.items() > before.items()
    # Killed between the two renames it leaves metadata without a dump, which --list names.
    left_over = after.keys() - before.keys() - {dump.name, metadata}
    assert len(left_over) == (phase == "between the renames")


def test_pg_dump_that_outlives_a_killed_run_is_waited_for(
    standing: Project, standing_database: Database
) -> None:
    with dumping(standing, standing_database) as process:
        process.kill()
        finish(process)
        (command,) = processes_of(standing).values()
        assert "pg_dump" in command
        with untouched(standing):  # its file is still being written
            result = standing.run().failed_with(1, "General error")
        assert f"is running: process {process.pid}, started 20" in result.stderr, result
        (end,) = re.findall(r"If only its pg_dump is left, .*: (kill \d+)\n", result.stderr)
        subprocess.run(["sh", "-c", end], check=True)
    wait_until(lambda: not processes_of(standing))
    standing.back_up()
    assert not list(standing.backups.glob(f".{standing_database.name}_dev.dump.partial"))
