"""An operator that has few file descriptors left, or very many in use, takes nothing to be gone that is there,
and waits for nothing that never comes."""

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

FEW = """
import os, resource, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from cortex.engines.local import records
from cortex.worker import processes
from cortex.worker.messages import StartRecord

folder, asked = Path(sys.argv[1]), sys.argv[2]
opened = os.open(folder, os.O_RDONLY)  # as a supervising process has it
running = subprocess.Popen(["sleep", "300"], stdin=opened, stdout=subprocess.DEVNULL, env={**os.environ, "CORTEX_JOB_ID": folder.name})
start = StartRecord(pid=running.pid, ticks=processes.stat(running.pid)[2])
(folder / "start.1").write_bytes(start.dumps())
attempt = SimpleNamespace(number=1, handle=records.make_handle())


def ask():
    if asked == "look":
        return type(records.inspect_attempt(folder, attempt)).__name__
    return records.is_supervised(folder, 1)


_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
for free in range(8):
    used = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
    for fd in used[20 - free :]:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used[-1] + 1, most))
    try:
        print(ask())
    except OSError as error:
        print(error.errno)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for fd in used[: 20 - free]:
        os.close(fd)
running.kill()
"""


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


@pytest.mark.parametrize(("asked", "answer"), [("look", "Alive"), ("supervised", "True")])
def test_what_there_are_too_few_to_ask_after_is_not_taken_to_be_gone(
    tmp_path: Path, asked: str, answer: str
) -> None:
    command = [sys.executable, "-c", FEW, str(tmp_path), asked]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    few = "False" if asked == "supervised" else str(errno.EMFILE)
    assert set(told) <= {few, answer}
    assert told[-1] == answer


def test_what_a_killed_supervisor_left_is_ended_as_soon_as_it_can_be(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, asked = leftovers.end_leftovers, []

    def few(folder: Path, attempt: int) -> None:
        asked.append(attempt)
        if len(asked) == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        clean(folder, attempt)

    monkeypatch.setattr(leftovers, "end_leftovers", few)

    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.started(attempt)
        os.kill(pid_of(harness, attempt), signal.SIGKILL)
        assert isinstance(await harness.last(attempt), Lost)
        assert asked == [1, 1]

    harness.run(scenario)


def test_a_fork_server_is_waited_for_however_many_are_in_use(harness: EngineHarness) -> None:
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
