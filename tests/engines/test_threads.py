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
from engines.bench import Bench
from engines.test_recovery import pid_of


@pytest.fixture
def bench(local_bench: Bench) -> Bench:
    return local_bench


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
    bench: Bench, full: threading.Event, scenario: Callable[[LocalEngine], Awaitable[None]]
) -> None:
    """With an engine whose loop has no threads yet."""

    async def main() -> None:
        engine = LocalEngine(bench.root, None, 1, "watchdog")
        engine._attempts.report = bench._saw
        engine._prepare_machine()
        full.set()
        try:
            await scenario(engine)
        finally:
            full.clear()
            await engine.close()

    bench.changed = asyncio.Event()
    asyncio.run(main())


def test_a_job_is_taken_up_once_there_is_room(bench: Bench, full: threading.Event) -> None:
    attempt = bench.killed_operator(bench.sleeper(), "started")

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        await bench.unreachable(attempt)
        full.clear()
        await bench.started(attempt)
        bench.go()
        assert (await bench.ended(attempt)).result == "done"
        assert [type(seen) for seen in bench.seen] == [Unreachable, Started, Ended]

    run(bench, full, scenario)


def test_a_killed_job_is_told_as_lost_once_there_is_room(
    bench: Bench, full: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = bench.killed_operator(bench.sleeper(), "started")
    refused: list[str] = []

    async def no_thread_at_first(function: Callable[[Path], None], root: Path) -> None:
        if not refused:
            refused.append(function.__name__)
            raise OSError(errno.EAGAIN, "can't start new thread")
        await in_thread(function, root)

    async def scenario(engine: LocalEngine) -> None:
        full.clear()
        await engine.recover(attempt)
        await bench.started(attempt)
        monkeypatch.setattr("cortex.engines.local.engine.in_thread", no_thread_at_first)
        os.kill(pid_of(bench, attempt), signal.SIGKILL)
        assert isinstance(await bench.last(attempt), Lost)
        assert refused == ["sweep"]

    run(bench, full, scenario)


def test_a_fork_server_that_cannot_be_started_holds_its_job_up_with_the_reason(
    bench: Bench, full: threading.Event
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt("def task(config): ...")
        await bench.start(engine, attempt)
        last = await bench.last(attempt)
        assert isinstance(last, NeverStarted)
        assert "can't start new thread" in (last.held_up_by or "")

    run(bench, full, scenario)


def test_a_fork_server_that_cannot_be_waited_for_is_ended(
    bench: Bench, full: threading.Event
) -> None:
    before = children(os.getpid())

    async def scenario(engine: LocalEngine) -> None:
        full.clear()
        await bench.outcome(engine, bench.attempt("def task(config): ..."))
        pool = asyncio.get_running_loop()
        pool.set_default_executor(ThreadPoolExecutor(thread_name_prefix="asyncio"))
        full.set()
        await engine._servers.close()
        assert set(children(os.getpid())) <= set(before)

    run(bench, full, scenario)
