"""An attempt that is prepared while the store writes that it was claimed: it begins when it is started, and
never if it is not."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace

import pytest

from cortex.engines.base import Attempt, Ended, Ending, Engine, Lost, NeverStarted, Version
from cortex.spec.job import Json
from cortex.worker.processes import children
from engines.engine_harness import SLEEP, EngineHarness, exists, parent, processes, until
from engines.test_recovery import pid_of

CODE = "def task(c): return c['number']"


@pytest.fixture
def warm(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


def prepared(harness: EngineHarness, engine: Engine, attempt: Attempt) -> Attempt:
    job_id = attempt.spec.job_id
    assert engine.ledger.reserve(job_id, attempt.version.api.compute) is None
    attempt = replace(attempt, handle=engine.claim(job_id, attempt.number))
    engine.prepare(attempt)
    return attempt


async def following(harness: EngineHarness, engine: Engine, number: int = 2) -> Attempt:
    """An attempt of a version whose supervising process has just ended another's job."""
    first = harness.attempt(CODE, config={"number": 1})
    assert (await harness.outcome(engine, first)).result == 1
    return replace(harness.attempt(CODE, config={"number": number}), version=first.version)


def test_a_prepared_attempt_begins_when_it_is_started(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepared(harness, engine, await following(harness, engine))
        await asyncio.sleep(0.1)
        assert not harness.start_record(attempt).exists()
        not_before_ns = time.time_ns()
        engine.start(attempt)
        end = await harness.ended(attempt)
        assert end.result == 2
        assert end.start_ns >= not_before_ns, "it began when it was started"

    harness.run(scenario)


def test_a_prepared_attempt_that_is_released_never_runs(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepared(harness, engine, await following(harness, engine))
        engine.ledger.release(attempt.spec.job_id)
        another = replace(harness.attempt(CODE, config={"number": 3}), version=attempt.version)
        assert (await harness.outcome(engine, another)).result == 3
        assert not harness.start_record(attempt).exists()
        assert all(attempt.spec.job_id not in repr(seen) for seen in harness.seen)

    harness.run(scenario)


def test_it_is_laid_out_before(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepared(warm, engine, await following(warm, engine))
        await until((warm.folder(attempt) / "log").exists)
        assert (warm.folder(attempt) / "job.json").exists()
        engine.start(attempt)
        assert (await warm.ended(attempt)).result == 2

    warm.run(scenario)


def holder(harness: EngineHarness, attempt: Attempt) -> int:
    """The supervising process that holds an order: the parent of the process that has the job's id."""
    [(pid, _)] = processes(attempt.spec.job_id, [])
    return parent(pid)


def test_a_holder_that_is_killed_costs_the_job_nothing(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepared(warm, engine, await following(warm, engine))
        await until(lambda: processes(attempt.spec.job_id, []))
        pid = holder(warm, attempt)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not exists(pid))
        engine.start(attempt)
        assert (await warm.ended(attempt)).result == 2

    warm.run(scenario)


def test_a_holder_that_is_killed_as_it_is_told_to_begin_has_not_begun(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepared(warm, engine, await following(warm, engine))
        await until(lambda: processes(attempt.spec.job_id, []))
        os.kill(holder(warm, attempt), signal.SIGSTOP)
        engine.start(attempt)
        os.kill(holder(warm, attempt), signal.SIGKILL)
        assert isinstance(await warm.last(attempt), NeverStarted)

    warm.run(scenario)


def test_a_holder_without_an_operator_ends_and_has_begun_nothing(warm: EngineHarness) -> None:
    held: list[Attempt] = []

    async def scenario(engine: Engine) -> None:
        held.append(prepared(warm, engine, await following(warm, engine)))
        await until((warm.folder(held[0]) / "log").exists)

    warm.run(scenario)
    asyncio.run(until(lambda: not warm.left()))
    assert not warm.start_record(held[0]).exists()


def test_what_fails_ahead_is_told_of_when_it_is_started(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await following(warm, engine)
        (warm.folder(attempt) / "job.json").mkdir(parents=True)
        attempt = prepared(warm, engine, attempt)
        await asyncio.sleep(0.1)
        assert all(attempt.spec.job_id not in repr(seen) for seen in warm.seen)
        engine.start(attempt)
        lost = await warm.last(attempt)
        assert isinstance(lost, Lost)
        assert lost.reason.startswith("the job's folder cannot be written")

    warm.run(scenario)


def test_folders_that_are_away_as_a_process_is_forked_ahead_fail_no_job(
    warm: EngineHarness, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    code = """
        import os, time
        def task(config):
            print("runs", flush=True)
            while not os.path.exists(config["go"]):
                time.sleep(0.01)
    """

    async def is_forked_while_away(engine: Engine, version: Version, number: int) -> bool:
        go = elsewhere / f"go-{number}"
        config: Json = {"go": str(go)}
        first, second = (replace(warm.attempt(config=config), version=version) for _ in range(2))
        await warm.start(engine, first)
        await warm.printed(first, "runs")  # nothing that it is set up with is away
        supervisor = pid_of(warm, first)
        folder = warm.root.parent
        away = folder.rename(elsewhere / "away")
        try:
            go.touch()
            await warm.ended(first)
            await asyncio.sleep(0.2)
            is_forked = bool(children(supervisor))
        finally:
            away.rename(folder)
        assert (await warm.outcome(engine, second)).exit_code == 0
        return is_forked

    async def scenario(engine: Engine) -> None:
        version = warm.attempt(code).version
        for number in range(20):  # none is forked where its workspace has to be made anew first
            if await is_forked_while_away(engine, version, number):
                return
        # A copy of the project is looked at by its path, and there is none then.
        assert engine.capabilities.own_folder != "overlay", "no process was forked ahead"

    warm.run(scenario)


def test_a_stop_right_after_the_start_ends_it(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        first = await following(warm, engine)
        warm.write(SLEEP)
        sleeper = replace(warm.sleeper(), version=first.version)
        attempt = prepared(warm, engine, sleeper)
        engine.start(attempt)
        engine.stop(attempt.spec.job_id)
        end = await warm.last(attempt)
        # Never: where it came before the supervising process had looked at its order.
        assert isinstance(end, NeverStarted) or (
            isinstance(end, Ended) and end.ending is Ending.STOPPED
        )

    warm.run(scenario)


def test_a_version_that_is_retired_meanwhile_still_starts_it(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepared(warm, engine, await following(warm, engine))
        engine.forget(versions=[attempt.version.api.api_id])
        engine.start(attempt)
        assert (await warm.ended(attempt)).result == 2
        await until(lambda: not exists(pid_of(warm, attempt)))

    warm.run(scenario)
