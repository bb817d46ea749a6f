"""What the engine does where a supervising process does not do its work."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from cortex.engines.base import Ending, NeverStarted
from cortex.engines.local import LocalEngine, backstop
from cortex.system.background import Background
from cortex.worker import processes
from engines.engine_harness import SLEEP, EngineHarness, exists, until
from engines.test_recovery import pid_of

TRACES = """
import ctypes, sys, time
print(ctypes.CDLL(None).ptrace(16, int(sys.argv[1]), 0, 0), flush=True)
time.sleep(300)
"""


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backstop, "POLL_INTERVAL_S", 0.1)


@contextlib.contextmanager
def held_up(pid: int) -> Iterator[None]:
    """A process that cannot go on, whatever signal it gets."""
    command = [sys.executable, "-c", TRACES, str(pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stdout is not None
            if tracer.stdout.readline() != "0\n":
                pytest.skip("processes of one user may not trace one another here")
            yield
        finally:
            tracer.kill()


def test_an_order_that_a_stopped_process_does_not_begin_with_is_taken_from_it(
    harness: EngineHarness,
) -> None:
    """A job of the same user may stop those that wait for others' jobs."""

    async def scenario(engine: LocalEngine) -> None:
        first = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, first)
        supervisor = pid_of(harness, first)
        with held_up(supervisor):
            following = replace(harness.attempt("def task(c): return 1"), version=first.version)
            await harness.start(engine, following)
            assert isinstance(await harness.last(following), NeverStarted)
        await until(lambda: not exists(supervisor))  # its fork server collects it

    harness.run(scenario)


def test_a_job_that_its_supervisor_does_not_end_is_ended(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the job has written into that process: here it was told of no deadline."""
    monkeypatch.setattr(backstop, "RUNNING_OVERDUE_S", 0.2)
    harness.grace_s = 0.1

    async def scenario(engine: LocalEngine) -> None:
        order = engine._order
        monkeypatch.setattr(engine, "_order", lambda each: order(replace(each, deadline=None)))
        first = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, first)  # the next begins long before its timeout
        attempt = harness.attempt(SLEEP, config={"file": str(harness.marker)}, timeout=2)
        begun = await harness.begin(engine, replace(attempt, version=first.version))
        assert (await harness.ended(begun)).ending is Ending.TIMED_OUT
        await until(lambda: not exists(pid_of(harness, begun)))

    harness.run(scenario)


@dataclass(eq=False)
class Late:
    """An attempt that should have been over long ago."""

    pidfd: int
    stopped_polls: int = 0
    is_force_killed: bool = False
    job_id: str = "late"
    must_end_by: float | None = 0.0
    has_begun: bool = True


def after_a_look(late: Late) -> None:
    async def look() -> None:
        background = Background("failed")
        watching = backstop.Backstop(lambda: [late], background)
        await watching._poll()
        await background.finish()

    asyncio.run(look())


def test_a_supervisor_that_has_nothing_to_end_any_more_is_left_alone() -> None:
    """Its record may wait until there is room on the disk."""
    with subprocess.Popen(["sleep", "300"]) as running:
        late = Late(os.pidfd_open(running.pid))
        after_a_look(late)
        assert (running.poll(), late.is_force_killed) == (None, False)
        running.kill()
        os.close(late.pidfd)


def test_what_cannot_be_ended_for_want_of_descriptors_is_ended_at_a_later_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "too many open files")

    with subprocess.Popen(["sleep", "300"]) as running:
        late = Late(os.pidfd_open(running.pid))
        running.send_signal(signal.SIGSTOP)
        asyncio.run(until(lambda: backstop._stopped([running.pid])))
        for where, name in (
            (processes, "kill_with_descendants"),
            (os, "dup"),
            (backstop, "_stopped"),
        ):
            with monkeypatch.context() as short:
                short.setattr(where, name, refuse)
                after_a_look(late)
            assert (running.poll(), late.is_force_killed) == (None, False)
        after_a_look(late)
        assert running.wait() == -signal.SIGKILL
        os.close(late.pidfd)
