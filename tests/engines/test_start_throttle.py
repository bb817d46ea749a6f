"""Only a few supervisors of a version start at the same time; the other orders wait."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace

import pytest

from cortex.engines.base import Attempt, Ending, NeverStarted
from cortex.engines.local import LocalEngine, supervisor_pool
from cortex.spec.job import Json
from cortex.worker.processes import children
from engines.engine_harness import SLEEP, EngineHarness, until
from engines.test_recovery import pid_of

SILENT = """
    import os, signal, time
    def task(config):
        if config.get("silent"):
            os.kill(os.getppid(), signal.SIGSTOP)
            print("silent", flush=True)
            time.sleep(300)
"""


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


def stopping_attempt(harness: EngineHarness) -> Attempt:
    """A job that stops its supervisor, usually before the supervisor has reported the start."""
    return harness.attempt(SILENT, config={"silent": True}, api_id="one")


def short_attempt(harness: EngineHarness) -> Attempt:
    return harness.attempt(SILENT, api_id="one")


async def attempt_of_a_stopped_supervisor(harness: EngineHarness, engine: LocalEngine) -> Attempt:
    """An attempt that was ordered from a stopped supervisor, which therefore reports no start."""
    before = short_attempt(harness)
    await harness.outcome(engine, before)
    supervisor = pid_of(harness, before)
    # The process for the next job exists: the supervisor is done with this job.
    await until(lambda: children(supervisor))
    os.kill(supervisor, signal.SIGSTOP)
    attempt = replace(short_attempt(harness), version=before.version)
    await harness.start(engine, attempt)
    return attempt


@pytest.fixture
def one_start_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_pool, "MAX_STARTING", 1)
    monkeypatch.setattr(supervisor_pool, "START_TIMEOUT_S", 3600.0)


@pytest.mark.usefixtures("one_start_at_a_time")
def test_an_order_waits_until_there_is_room_for_its_start(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await attempt_of_a_stopped_supervisor(harness, engine)
        others = [replace(short_attempt(harness), version=first.version) for _ in range(2)]
        for attempt in others:
            await harness.start(engine, attempt)
        await asyncio.sleep(0.1)
        silent_until_ns = time.time_ns()
        engine.stop(first.spec.job_id)
        ended = [await harness.ended(attempt) for attempt in (first, *others)]
        assert ended[0].ending is Ending.STOPPED
        assert silent_until_ns <= ended[1].start_ns <= ended[2].start_ns

    harness.run(scenario)


@pytest.mark.usefixtures("one_start_at_a_time")
def test_a_stop_withdraws_an_order_that_waits_for_its_start(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await attempt_of_a_stopped_supervisor(harness, engine)
        second = replace(short_attempt(harness), version=first.version)
        await harness.start(engine, second)
        await asyncio.sleep(0.1)
        engine.stop(second.spec.job_id)
        assert isinstance(await harness.final(second), NeverStarted)
        engine.stop(first.spec.job_id)
        await harness.ended(first)

    harness.run(scenario)


@pytest.mark.usefixtures("one_start_at_a_time")
def test_a_retired_version_hands_out_its_waiting_orders(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await attempt_of_a_stopped_supervisor(harness, engine)
        second = replace(short_attempt(harness), version=first.version)
        await harness.start(engine, second)
        engine.forget(versions=["one"])
        engine.stop(first.spec.job_id)
        assert (await harness.ended(second)).exit_code == 0

    harness.run(scenario)


def test_supervisors_that_never_report_their_start_delay_other_orders_only_briefly(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_pool, "MAX_STARTING", 3)  # also where there are very many cores

    async def scenario(engine: LocalEngine) -> None:
        first = [stopping_attempt(harness) for _ in range(2 * supervisor_pool.MAX_STARTING)]
        for attempt in first:
            await harness.start(engine, attempt)
        assert (await harness.outcome(engine, short_attempt(harness))).exit_code == 0
        for attempt in first:
            engine.stop(attempt.spec.job_id)
            await harness.ended(attempt)

    harness.run(scenario)


def test_many_jobs_begin_while_others_run(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_pool, "MAX_STARTING", 3)

    async def scenario(engine: LocalEngine) -> None:
        config: Json = {"file": str(harness.marker)}
        running = [
            harness.attempt(SLEEP, config=config, cpu_m=10, api_id="one")
            for _ in range(3 * supervisor_pool.MAX_STARTING)
        ]
        for attempt in running:
            await harness.start(engine, attempt)
        for attempt in running:
            await harness.printed(attempt, "pid")
        harness.finish_sleeper()
        assert [(await harness.ended(attempt)).result for attempt in running] == ["done"] * len(
            running
        )

    harness.run(scenario)
