"""The exit record that the verdict makes of the evidence: each row is one way for a job to end."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cortex.worker import checks
from cortex.worker.cgroups import JobCgroup
from cortex.worker.messages import Order, Outcome
from cortex.worker.supervisor import verdict
from cortex.worker.supervisor.verdict import (
    EXITED,
    LOST,
    OUT_OF_MEMORY,
    STOPPED,
    TIMED_OUT,
    Evidence,
)

KILLED = signal.SIGKILL
SUCCESS, FAILURE = 0, 3 << 8  # as `waitpid` has them: an exit code in the high byte, a signal below
NO_KILL, OWN_LIMIT, MACHINE = "oom 0\noom_kill 0\n", "oom 1\noom_kill 1\n", "oom 0\noom_kill 1\n"
RESULT = Outcome(result=[7], has_result=True).dumps()
ERROR = Outcome(message="ValueError: bad").dumps()
UNUSABLE = Outcome(lost=True, message="the worker could not be set up: no folder").dumps()
LONG = Outcome(result="x" * 100_000, has_result=True).dumps()
NOT_VALID = b'{"has_result": "yes"}'
HALF = b'{"message": "Val'
NOT_KEPT = f"{checks.NOT_KEPT}: the outcome file is not valid: "
OVER_LIMIT = "exceeded its memory limit of 96 MiB"
LOG = b"loading\nlast words\n"
FATAL = b"Fatal Python error: Aborted\n\nCurrent thread:\n  File 'x'\n"

# What ended the run, the wait status, the memory events, the outcome file and the log;
# the ending, exit code, message and result of the record.
Row = tuple[str, int | None, str, bytes, bytes, str, int, str | None, object]
ROWS: dict[str, Row] = {
    "success without a result": (
        EXITED, SUCCESS, NO_KILL, b"", LOG,
        EXITED, 0, None, None,
    ),
    "success with a result": (
        EXITED, SUCCESS, NO_KILL, RESULT, LOG,
        EXITED, 0, None, [7],
    ),
    "a result of many pages": (
        EXITED, SUCCESS, NO_KILL, LONG, LOG,
        EXITED, 0, None, "x" * 100_000,
    ),
    "success with an outcome that is not valid": (
        EXITED, SUCCESS, NO_KILL, NOT_VALID, LOG,
        EXITED, 0, f"{NOT_KEPT}has_result is 'yes'; it must be true or false", None,
    ),
    "success with an outcome that is too long": (
        EXITED, SUCCESS, NO_KILL, b"x" * (checks.MAX_OUTCOME + 1), LOG,
        EXITED, 0, f"{NOT_KEPT}it takes over {checks.MAX_OUTCOME} bytes", None,
    ),
    "an exception": (
        EXITED, 1 << 8, NO_KILL, ERROR, LOG,
        EXITED, 1, "ValueError: bad", None,
    ),
    "an exit code, explained by the log": (
        EXITED, FAILURE, NO_KILL, b"", LOG,
        EXITED, 3, "exit code 3: last words", None,
    ),
    "an exit code and an empty log": (
        EXITED, FAILURE, NO_KILL, b"", b" \n",
        EXITED, 3, "exit code 3", None,
    ),
    "an exit code and a log of an earlier attempt": (
        EXITED, FAILURE, NO_KILL, b"", b"",
        EXITED, 3, "exit code 3", None,
    ),
    "a fatal error of the interpreter": (
        EXITED, signal.SIGABRT, NO_KILL, b"", FATAL,
        EXITED, -6, "killed by SIGABRT: Fatal Python error: Aborted", None,
    ),
    "a signal": (
        EXITED, signal.SIGSEGV, NO_KILL, b"", b"",
        EXITED, -11, "killed by SIGSEGV", None,
    ),
    "a signal with a core dump": (
        EXITED, signal.SIGSEGV | 0x80, NO_KILL, b"", b"",
        EXITED, -11, "killed by SIGSEGV", None,
    ),
    "a signal after the exception": (
        EXITED, signal.SIGSEGV, NO_KILL, ERROR, LOG,
        EXITED, -11, "killed by SIGSEGV: ValueError: bad", None,
    ),
    "a signal while it wrote its outcome": (
        EXITED, KILLED, NO_KILL, HALF, LOG,
        EXITED, -9, "killed by SIGKILL: last words", None,
    ),
    "a process over the limit was killed, the job's first": (
        EXITED, KILLED, OWN_LIMIT, b"", LOG,
        OUT_OF_MEMORY, -9, OVER_LIMIT, None,
    ),
    "a process over the limit was killed, and the job succeeded": (
        EXITED, SUCCESS, OWN_LIMIT, RESULT, LOG,
        OUT_OF_MEMORY, 0, OVER_LIMIT, None,
    ),
    "the machine ran out of memory": (
        EXITED, KILLED, MACHINE, b"", LOG,
        OUT_OF_MEMORY, -9, "killed because the machine ran out of memory", None,
    ),
    "the kernel reported the kill before the end": (
        OUT_OF_MEMORY, KILLED, OWN_LIMIT, b"", LOG,
        OUT_OF_MEMORY, -9, OVER_LIMIT, None,
    ),
    "the watchdog ended it": (
        OUT_OF_MEMORY, KILLED, NO_KILL, b"", LOG,
        OUT_OF_MEMORY, -9, OVER_LIMIT, None,
    ),
    "the timeout passed": (
        TIMED_OUT, KILLED, NO_KILL, b"", LOG,
        TIMED_OUT, -9, "timeout of 5 s passed", None,
    ),
    "the timeout passed, and the job ended by SIGTERM": (
        TIMED_OUT, signal.SIGTERM, NO_KILL, ERROR, LOG,
        TIMED_OUT, -15, "timeout of 5 s passed", None,
    ),
    "the timeout passed, and the job succeeded in its grace period": (
        TIMED_OUT, SUCCESS, NO_KILL, RESULT, LOG,
        TIMED_OUT, 0, "timeout of 5 s passed", None,
    ),
    "the timeout passed before the fork": (
        TIMED_OUT, None, NO_KILL, b"", b"",
        TIMED_OUT, -9, "timeout of 5 s passed", None,
    ),
    "a stop": (
        STOPPED, signal.SIGTERM, NO_KILL, b"", LOG,
        STOPPED, -15, "stopped", None,
    ),
    "a stop before the fork": (
        STOPPED, None, NO_KILL, b"", b"",
        STOPPED, -9, "stopped", None,
    ),
    "a stop, and a kill for memory in the grace period": (
        STOPPED, KILLED, OWN_LIMIT, b"", LOG,
        STOPPED, -9, "stopped", None,
    ),
    "the process could not be set up": (
        EXITED, 1 << 8, NO_KILL, UNUSABLE, b"",
        LOST, -9, "the worker could not be set up: no folder", None,
    ),
    "the process could not be set up, and was stopped": (
        STOPPED, KILLED, OWN_LIMIT, UNUSABLE, b"",
        LOST, -9, "the worker could not be set up: no folder", None,
    ),
}  # fmt: skip

Make = Callable[..., Evidence]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make evidence with real files: memory events, an outcome file and a log in a job's folder."""
    with ExitStack() as stack:

        def made(
            status: int | None, events: str, written: bytes, log: bytes, **more: Any
        ) -> Evidence:
            before = b"of an earlier attempt\n"
            (tmp_path / "log").write_bytes(before + log)
            (tmp_path / "memory.events").write_text(events)
            (tmp_path / "cgroup.procs").touch()
            order = Order(
                job_id="a-job", attempt=2, folder=str(tmp_path), grace_s=1, timeout=5, deadline=None,
                log_limit=1 << 20, mem=96 << 20, memory_kind="v2", memory_dir=str(tmp_path), gpus=[],
                visible_gpus=None, job={},
            )  # fmt: skip
            group = JobCgroup(order, os.open(tmp_path, os.O_RDONLY))
            group.open_control_files(select.poll())
            stack.callback(group.close)
            memory = os.memfd_create("outcome")
            stack.callback(os.close, memory)
            os.write(memory, written)
            folder = os.open(tmp_path, os.O_RDONLY)
            stack.callback(os.close, folder)
            facts: dict[str, Any] = {
                "wait_status": status, "start_ns": 1000, "end_ns": 2000, "outcome": memory,
                "folder": folder, "log_start": len(before), "leftovers": [], "refused": {},
            }  # fmt: skip
            return Evidence(order, group, **{**facts, **more})

        yield made


@pytest.mark.parametrize("name", ROWS)
def test_each_way_to_end_has_its_exit_record(name: str, make: Make) -> None:
    cause, status, events, outcome, log, ending, code, message, result = ROWS[name]
    record = verdict.judge(make(status, events, outcome, log), cause)
    assert record.fields() == {
        "v": 1,
        "job_id": "a-job",
        "attempt": 2,
        "ending": ending,
        "exit_code": code,
        "start_ns": 1000,
        "end_ns": 2000,
        "message": message,
        "result": result,
        "has_result": result is not None,
        "hints": [],
        "measures": [],
    }
    record.check()


def test_a_fault_of_the_supervisor_loses_the_job(make: Make) -> None:
    record = verdict.lost(make(SUCCESS, OWN_LIMIT, RESULT, LOG), "the supervisor failed: OSError()")
    found = record.ending, record.exit_code, record.message, record.has_result
    assert found == (LOST, -9, "the supervisor failed: OSError()", False)


def test_a_job_without_files_has_no_outcome(make: Make) -> None:
    record = verdict.judge(make(None, NO_KILL, RESULT, b"", outcome=None), STOPPED)
    assert (record.ending, record.message, record.has_result) == (STOPPED, "stopped", False)


@pytest.mark.parametrize(
    ("leftovers", "names"),
    [(["sh"], "sh"), ([*"abcde"], "a, b, c, d, e"), ([*"abcdefg"], "a, b, c, d, e and 2 more")],
)
def test_leftover_programs_of_a_successful_job_are_named(
    leftovers: list[str], names: str, make: Make
) -> None:
    record = verdict.judge(make(SUCCESS, NO_KILL, RESULT, LOG, leftovers=leftovers), EXITED)
    assert record.message == (
        f"it had left processes running, which were killed: {names}. "
        "A job has to wait for those that it needs"
    )
    assert record.result == [7]
    failed = verdict.judge(make(FAILURE, NO_KILL, b"", LOG, leftovers=leftovers), EXITED)
    assert failed.message == "exit code 3: last words"


@pytest.mark.parametrize(("end_ns", "at_least"), [(0, 1001), (500, 1000)])
def test_an_end_time_that_is_unknown_or_before_the_start_is_corrected(
    end_ns: int, at_least: int, make: Make
) -> None:
    record = verdict.judge(make(SUCCESS, NO_KILL, b"", b"", end_ns=end_ns), EXITED)
    assert record.end_ns >= at_least
    assert (record.end_ns == 1000) == (end_ns == 500)


def test_hints_name_refused_modules_and_slow_imports(make: Make) -> None:
    outcome = Outcome(loading=[1.44, ["pandas", "sklearn"]]).dumps()
    refused = {"torch": "it starts threads"}
    record = verdict.judge(make(SUCCESS, NO_KILL, outcome, b"", refused=refused), EXITED)
    assert record.hints == [
        "torch is not imported ahead: it starts threads",
        "each job spends 1.4 s importing pandas, sklearn: `preload: [pandas, sklearn]` in the "
        "definition of cortex.yaml would spare it that; what it changes is in the guide",
    ]
    stopped = verdict.judge(make(KILLED, NO_KILL, outcome, b"", refused=refused), STOPPED)
    assert stopped.hints == record.hints[:1]


def test_metrics_are_those_of_a_job_that_exited(make: Make) -> None:
    series = [["counter", "rows", [], [3.0]]]
    outcome = Outcome(message="ValueError", measures=series).dumps()
    failed = verdict.judge(make(FAILURE, NO_KILL, outcome, b""), EXITED)
    assert (failed.message, failed.measures) == ("ValueError", series)
    stopped = verdict.judge(make(FAILURE, NO_KILL, outcome, b""), STOPPED)
    assert stopped.measures == []
