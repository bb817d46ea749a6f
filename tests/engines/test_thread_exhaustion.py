"""The local engine on a machine that can start no more threads, as during a fork bomb."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cortex.engines.base import Ended, Lost, NeverStarted, Started, Unreachable
from cortex.engines.local import LocalEngine
from cortex.system.background import in_thread
from cortex.worker.processes import children
from engines.engine_harness import EngineHarness
from engines.test_recovery import pid_of


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set while no thread of a loop's pool can be started. A real lack of threads would affect
    all other tests on the machine."""
    start, no_threads = threading.Thread.start, threading.Event()

    def start_unless_set(thread: threading.Thread) -> None:
        if no_threads.is_set() and thread.name.startswith("asyncio_"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_unless_set)
    return no_threads


def run(
    harness: EngineHarness,
    no_threads: threading.Event,
    scenario: Callable[[LocalEngine], Awaitable[None]],
) -> None:
    """Run a scenario with an engine whose loop has no threads yet."""

    async def main() -> None:
        engine = LocalEngine(harness.root, None, 1, "watchdog")
        engine._attempts.report = harness.report
        engine._prepare_machine()
        no_threads.set()
        try:
            await scenario(engine)
        finally:
            no_threads.clear()
            await engine.close()

    harness.changed = asyncio.Event()
    asyncio.run(main())


def test_a_job_is_recovered_once_a_thread_can_start(
    harness: EngineHarness, no_threads: threading.Event
) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        await harness.unreachable(attempt)
        no_threads.clear()
        await harness.started(attempt)
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).result == "done"
        assert [type(each) for each in harness.observations] == [Unreachable, Started, Ended]

    run(harness, no_threads, scenario)


def test_a_killed_job_is_reported_as_lost_once_a_thread_can_start(
    harness: EngineHarness, no_threads: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")
    refused: list[str] = []

    async def no_thread_at_first(function: Callable[[Path], None], root: Path) -> None:
        if not refused:
            refused.append(function.__name__)
            raise OSError(errno.EAGAIN, "can't start new thread")
        await in_thread(function, root)

    async def scenario(engine: LocalEngine) -> None:
        no_threads.clear()
        await engine.recover(attempt)
        await harness.started(attempt)
        monkeypatch.setattr("cortex.engines.local.engine.in_thread", no_thread_at_first)
        os.kill(pid_of(harness, attempt), signal.SIGKILL)
        assert isinstance(await harness.final(attempt), Lost)
        assert refused == ["sweep"]

    run(harness, no_threads, scenario)


def test_a_job_whose_fork_server_cannot_start_waits_with_the_reason(
    harness: EngineHarness, no_threads: threading.Event
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(config): ...")
        await harness.start(engine, attempt)
        last = await harness.final(attempt)
        assert isinstance(last, NeverStarted)
        assert "can't start new thread" in (last.held_up_by or "")

    run(harness, no_threads, scenario)


def test_a_fork_server_that_no_thread_can_wait_for_is_ended(
    harness: EngineHarness, no_threads: threading.Event
) -> None:
    before = children(os.getpid())

    async def scenario(engine: LocalEngine) -> None:
        no_threads.clear()
        await harness.outcome(engine, harness.attempt("def task(config): ..."))
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix="asyncio"))
        no_threads.set()
        await engine._servers.close()
        assert set(children(os.getpid())) <= set(before)

    run(harness, no_threads, scenario)
