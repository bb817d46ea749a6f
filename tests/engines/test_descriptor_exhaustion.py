"""An operator with too few file descriptors, or with very many in use, takes no running process
for an exited one, and does not wait forever."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cortex.engines.base import Lost
from cortex.engines.local import LocalEngine, leftovers
from cortex.worker.processes import children
from engines.engine_harness import EngineHarness
from engines.test_recovery import pid_of

FEW_DESCRIPTORS = """
import os, resource, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from cortex.engines.local import records
from cortex.worker import processes
from cortex.worker.messages import StartRecord

folder, question = Path(sys.argv[1]), sys.argv[2]
opened = os.open(folder, os.O_RDONLY)  # as a supervisor has it
running = subprocess.Popen(["sleep", "300"], stdin=opened, stdout=subprocess.DEVNULL, env={**os.environ, "CORTEX_JOB_ID": folder.name})
start = StartRecord(pid=running.pid, ticks=processes.stat(running.pid)[2])
(folder / "start.1").write_bytes(start.dumps())
attempt = SimpleNamespace(number=1, handle=records.make_handle())


def answer():
    if question == "inspect":
        return type(records.inspect_attempt(folder, attempt)).__name__
    return records.is_supervised(folder, 1)


_, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
for free in range(8):
    used = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    for fd in used[20 - free :]:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used[-1] + 1, hard_limit))
    try:
        print(answer())
    except OSError as error:
        print(error.errno)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    for fd in used[: 20 - free]:
        os.close(fd)
running.kill()
"""


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


@pytest.mark.parametrize(("question", "answer"), [("inspect", "Alive"), ("supervised", "True")])
def test_a_supervisor_that_cannot_be_inspected_for_lack_of_descriptors_does_not_count_as_exited(
    tmp_path: Path, question: str, answer: str
) -> None:
    command = [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path), question]
    answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    few = "False" if question == "supervised" else str(errno.EMFILE)
    assert set(answers) <= {few, answer}
    assert answers[-1] == answer


def test_leftovers_of_a_killed_supervisor_are_ended_as_soon_as_possible(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_leftovers, attempts = leftovers.end_leftovers, []

    def fail_once(folder: Path, attempt: int) -> None:
        attempts.append(attempt)
        if len(attempts) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        end_leftovers(folder, attempt)

    monkeypatch.setattr(leftovers, "end_leftovers", fail_once)

    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.started(attempt)
        os.kill(pid_of(harness, attempt), signal.SIGKILL)
        assert isinstance(await harness.final(attempt), Lost)
        assert attempts == [1, 1]

    harness.run(scenario)


def test_a_fork_server_is_reaped_however_many_descriptors_are_open(harness: EngineHarness) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    used = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    before = children(os.getpid())

    async def scenario(engine: LocalEngine) -> None:
        await harness.outcome(engine, harness.attempt("def task(config): ..."))

    try:
        harness.run(scenario)
        assert set(children(os.getpid())) <= set(before)
    finally:
        for fd in used:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
