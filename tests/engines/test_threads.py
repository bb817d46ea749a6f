"""What the local engine does on a machine that has no room for another thread, as a fork bomb may have it."""

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
def full(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set while no thread of a loop's pool can be started. That the machine has no room for one cannot be made
    so without the rest of the tests having none."""
    start, is_full = threading.Thread.start, threading.Event()

    def begin(thread: threading.Thread) -> None:
        if is_full.is_set() and thread.name.startswith("asyncio_"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", begin)
    return is_full


def run(
    harness: EngineHarness,
    full: threading.Event,
    scenario: Callable[[LocalEngine], Awaitable[None]],
) -> None:
    """With an engine whose loop has no threads yet."""

    async def main() -> None:
        engine = LocalEngine(harness.root, None, 1, "watchdog")
        engine._attempts.report = harness._saw
        engine._prepare_machine()
        full.set()
        try:
            await scenario(engine)
        finally:
            full.clear()
            await engine.close()

    harness.changed = asyncio.Event()
    asyncio.run(main())


def test_a_job_is_taken_up_once_there_is_room(
    harness: EngineHarness, full: threading.Event
) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        await harness.unreachable(attempt)
        full.clear()
        await harness.started(attempt)
        harness.go()
        assert (await harness.ended(attempt)).result == "done"
        assert [type(seen) for seen in harness.seen] == [Unreachable, Started, Ended]

    run(harness, full, scenario)


def test_a_killed_job_is_told_as_lost_once_there_is_room(
    harness: EngineHarness, full: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")
    refused: list[str] = []

    async def no_thread_at_first(function: Callable[[Path], None], root: Path) -> None:
        if not refused:
            refused.append(function.__name__)
            raise OSError(errno.EAGAIN, "can't start new thread")
        await in_thread(function, root)

    async def scenario(engine: LocalEngine) -> None:
        full.clear()
        await engine.recover(attempt)
        await harness.started(attempt)
        monkeypatch.setattr("cortex.engines.local.engine.in_thread", no_thread_at_first)
        os.kill(pid_of(harness, attempt), signal.SIGKILL)
        assert isinstance(await harness.last(attempt), Lost)
        assert refused == ["sweep"]

    run(harness, full, scenario)


def test_a_fork_server_that_cannot_be_started_holds_its_job_up_with_the_reason(
    harness: EngineHarness, full: threading.Event
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(config): ...")
        await harness.start(engine, attempt)
        last = await harness.last(attempt)
        assert isinstance(last, NeverStarted)
        assert "can't start new thread" in (last.blocked_by or "")

    run(harness, full, scenario)


def test_a_fork_server_that_cannot_be_waited_for_is_ended(
    harness: EngineHarness, full: threading.Event
) -> None:
    before = children(os.getpid())

    async def scenario(engine: LocalEngine) -> None:
        full.clear()
        await harness.outcome(engine, harness.attempt("def task(config): ..."))
        pool = asyncio.get_running_loop()
        pool.set_default_executor(ThreadPoolExecutor(thread_name_prefix="asyncio"))
        full.set()
        await engine._servers.close()
        assert set(children(os.getpid())) <= set(before)

    run(harness, full, scenario)
