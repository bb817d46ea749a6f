"""The supervising processes of a version that begin at the same time: few, and the others in their turn."""

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


def mute(harness: EngineHarness) -> Attempt:
    """Of a job that stops its supervising process, before that has said that it started if it is quick."""
    return harness.attempt(SILENT, config={"silent": True}, api_id="one")


def plain(harness: EngineHarness) -> Attempt:
    return harness.attempt(SILENT, api_id="one")


async def silent(harness: EngineHarness, engine: LocalEngine) -> Attempt:
    """One that is given to a supervising process which is stopped, and so says nothing of its start."""
    before = plain(harness)
    await harness.outcome(engine, before)
    supervisor = pid_of(harness, before)
    await until(lambda: children(supervisor))  # that of the next job: it is done with this one
    os.kill(supervisor, signal.SIGSTOP)
    attempt = replace(plain(harness), version=before.version)
    await harness.start(engine, attempt)
    return attempt


@pytest.fixture
def one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_pool, "MAX_STARTING", 1)
    monkeypatch.setattr(supervisor_pool, "START_TIMEOUT_S", 3600.0)


@pytest.mark.usefixtures("one_at_once")
def test_an_order_waits_until_there_is_room_for_its_start(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await silent(harness, engine)
        others = [replace(plain(harness), version=first.version) for _ in range(2)]
        for attempt in others:
            await harness.start(engine, attempt)
        await asyncio.sleep(0.1)
        silent_until_ns = time.time_ns()
        engine.stop(first.spec.job_id)
        ended = [await harness.ended(attempt) for attempt in (first, *others)]
        assert ended[0].ending is Ending.STOPPED
        assert silent_until_ns <= ended[1].start_ns <= ended[2].start_ns

    harness.run(scenario)


@pytest.mark.usefixtures("one_at_once")
def test_an_order_that_waits_for_its_turn_is_taken_back(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await silent(harness, engine)
        second = replace(plain(harness), version=first.version)
        await harness.start(engine, second)
        await asyncio.sleep(0.1)
        engine.stop(second.spec.job_id)
        assert isinstance(await harness.last(second), NeverStarted)
        engine.stop(first.spec.job_id)
        await harness.ended(first)

    harness.run(scenario)


@pytest.mark.usefixtures("one_at_once")
def test_a_version_that_is_replaced_hands_out_what_waits(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await silent(harness, engine)
        second = replace(plain(harness), version=first.version)
        await harness.start(engine, second)
        engine.forget(versions=["one"])
        engine.stop(first.spec.job_id)
        assert (await harness.ended(second)).exit_code == 0

    harness.run(scenario)


def test_those_that_never_say_that_they_began_hold_up_nobody_for_long(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_pool, "MAX_STARTING", 3)  # also where there are very many cores

    async def scenario(engine: LocalEngine) -> None:
        first = [mute(harness) for _ in range(2 * supervisor_pool.MAX_STARTING)]
        for attempt in first:
            await harness.start(engine, attempt)
        assert (await harness.outcome(engine, plain(harness))).exit_code == 0
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
        harness.go()
        assert [(await harness.ended(attempt)).result for attempt in running] == ["done"] * len(
            running
        )

    harness.run(scenario)
