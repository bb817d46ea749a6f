"""The engine's backstop: it acts where a supervisor does not do its work."""

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
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backstop, "POLL_INTERVAL_S", 0.1)


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    """Trace a process, which then cannot run, whatever signal it gets."""
    command = [sys.executable, "-c", TRACES, str(pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stdout is not None
            if tracer.stdout.readline() != "0\n":
                pytest.skip("processes of one user may not trace one another here")
            yield
        finally:
            tracer.kill()


def test_an_order_that_a_stopped_supervisor_does_not_begin_is_taken_from_it(
    harness: EngineHarness,
) -> None:
    """A job may stop supervisors of the same user that wait for other jobs."""

    async def scenario(engine: LocalEngine) -> None:
        first = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, first)
        supervisor = pid_of(harness, first)
        with traced(supervisor):
            following = replace(harness.attempt("def task(c): return 1"), version=first.version)
            await harness.start(engine, following)
            assert isinstance(await harness.final(following), NeverStarted)
        await until(lambda: not exists(supervisor))  # its fork server reaps it

    harness.run(scenario)


def test_the_engine_ends_a_job_that_its_supervisor_does_not_end(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor got no deadline, as if the job had overwritten its supervisor's memory."""
    monkeypatch.setattr(backstop, "RUNNING_OVERDUE_S", 0.2)
    harness.grace_s = 0.1

    async def scenario(engine: LocalEngine) -> None:
        order = engine._order
        monkeypatch.setattr(engine, "_order", lambda each: order(replace(each, deadline=None)))
        first = harness.attempt("def task(c): return 1")
        # The fork server is warm afterwards: the next job begins long before its timeout.
        await harness.outcome(engine, first)
        attempt = harness.attempt(SLEEP, config={"file": str(harness.marker)}, timeout=2)
        begun = await harness.start_attempt(engine, replace(attempt, version=first.version))
        assert (await harness.ended(begun)).ending is Ending.TIMED_OUT
        await until(lambda: not exists(pid_of(harness, begun)))

    harness.run(scenario)


@dataclass(eq=False)
class OverdueAttempt:
    """An attempt that should have ended long ago."""

    pidfd: int
    stopped_polls: int = 0
    is_force_killed: bool = False
    job_id: str = "late"
    must_end_by: float | None = 0.0
    has_begun: bool = True


def poll_once(attempt: OverdueAttempt) -> None:
    async def poll() -> None:
        background = Background("failed")
        poller = backstop.Backstop(lambda: [attempt], background)
        await poller._poll()
        await background.finish()

    asyncio.run(poll())


def test_a_supervisor_without_a_process_to_end_is_not_killed() -> None:
    """The supervisor may be waiting for room on the disk to write its exit record."""
    with subprocess.Popen(["sleep", "300"]) as running:
        attempt = OverdueAttempt(os.pidfd_open(running.pid))
        poll_once(attempt)
        assert (running.poll(), attempt.is_force_killed) == (None, False)
        running.kill()
        os.close(attempt.pidfd)


def test_a_kill_that_fails_for_lack_of_descriptors_is_retried_at_the_next_poll(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "too many open files")

    with subprocess.Popen(["sleep", "300"]) as running:
        attempt = OverdueAttempt(os.pidfd_open(running.pid))
        running.send_signal(signal.SIGSTOP)
        asyncio.run(until(lambda: backstop._stopped([running.pid])))
        for where, name in (
            (processes, "kill_with_descendants"),
            (os, "dup"),
            (backstop, "_stopped"),
        ):
            with monkeypatch.context() as short:
                short.setattr(where, name, refuse)
                poll_once(attempt)
            assert (running.poll(), attempt.is_force_killed) == (None, False)
        poll_once(attempt)
        assert running.wait() == -signal.SIGKILL
        os.close(attempt.pidfd)
