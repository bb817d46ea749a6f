"""An attempt that is prepared while the store writes its claim: it begins when it is started,
and never without a start."""

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
    """A harness of the local engine: its fork server is warm after `next_attempt`."""
    return local_harness


def prepare(harness: EngineHarness, engine: Engine, attempt: Attempt) -> Attempt:
    """Reserve, claim and prepare, as the dispatcher does; the attempt with its handle."""
    job_id = attempt.spec.job_id
    assert engine.ledger.reserve(job_id, attempt.version.api.compute) is None
    attempt = replace(attempt, handle=engine.claim(job_id, attempt.number))
    engine.prepare(attempt)
    return attempt


async def next_attempt(harness: EngineHarness, engine: Engine, number: int = 2) -> Attempt:
    """An attempt of a version whose supervisor has just finished another job."""
    first = harness.attempt(CODE, config={"number": 1})
    assert (await harness.outcome(engine, first)).result == 1
    return replace(harness.attempt(CODE, config={"number": number}), version=first.version)


def test_a_prepared_attempt_begins_when_it_is_started(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepare(harness, engine, await next_attempt(harness, engine))
        await asyncio.sleep(0.1)
        assert not harness.start_record(attempt).exists()
        not_before_ns = time.time_ns()
        engine.start(attempt)
        end = await harness.ended(attempt)
        assert end.result == 2
        assert end.start_ns >= not_before_ns, "the attempt began before it was started"

    harness.run(scenario)


def test_a_prepared_attempt_that_is_released_never_runs(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepare(harness, engine, await next_attempt(harness, engine))
        engine.ledger.release(attempt.spec.job_id)
        another = replace(harness.attempt(CODE, config={"number": 3}), version=attempt.version)
        assert (await harness.outcome(engine, another)).result == 3
        assert not harness.start_record(attempt).exists()
        assert all(attempt.spec.job_id not in repr(each) for each in harness.observations)

    harness.run(scenario)


def test_the_files_of_a_prepared_attempt_are_made_before_its_start(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepare(warm, engine, await next_attempt(warm, engine))
        await until((warm.folder(attempt) / "log").exists)
        assert (warm.folder(attempt) / "job.json").exists()
        engine.start(attempt)
        assert (await warm.ended(attempt)).result == 2

    warm.run(scenario)


def supervisor_of(harness: EngineHarness, attempt: Attempt) -> int:
    """The pid of the supervisor that has the order: the parent of the process with the job's id."""
    [(pid, _)] = processes(attempt.spec.job_id, [])
    return parent(pid)


def test_a_prepared_attempt_starts_though_its_supervisor_was_killed(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepare(warm, engine, await next_attempt(warm, engine))
        await until(lambda: processes(attempt.spec.job_id, []))
        pid = supervisor_of(warm, attempt)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not exists(pid))
        engine.start(attempt)
        assert (await warm.ended(attempt)).result == 2

    warm.run(scenario)


def test_an_attempt_whose_supervisor_is_killed_at_its_start_has_not_begun(
    warm: EngineHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepare(warm, engine, await next_attempt(warm, engine))
        await until(lambda: processes(attempt.spec.job_id, []))
        os.kill(supervisor_of(warm, attempt), signal.SIGSTOP)
        engine.start(attempt)
        os.kill(supervisor_of(warm, attempt), signal.SIGKILL)
        assert isinstance(await warm.final(attempt), NeverStarted)

    warm.run(scenario)


def test_the_supervisor_of_a_prepared_attempt_ends_with_its_operator_and_starts_nothing(
    warm: EngineHarness,
) -> None:
    attempts: list[Attempt] = []

    async def scenario(engine: Engine) -> None:
        attempts.append(prepare(warm, engine, await next_attempt(warm, engine)))
        await until((warm.folder(attempts[0]) / "log").exists)

    warm.run(scenario)
    asyncio.run(until(lambda: not warm.leftovers()))
    assert not warm.start_record(attempts[0]).exists()


def test_a_failure_of_the_preparation_is_reported_at_the_start(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await next_attempt(warm, engine)
        (warm.folder(attempt) / "job.json").mkdir(parents=True)
        attempt = prepare(warm, engine, attempt)
        await asyncio.sleep(0.1)
        assert all(attempt.spec.job_id not in repr(each) for each in warm.observations)
        engine.start(attempt)
        lost = await warm.final(attempt)
        assert isinstance(lost, Lost)
        assert lost.reason.startswith("the job's folder cannot be written")

    warm.run(scenario)


def test_folders_that_are_missing_while_a_process_is_forked_ahead_fail_no_job(
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

    async def is_forked_while_missing(engine: Engine, version: Version, number: int) -> bool:
        go = elsewhere / f"go-{number}"
        config: Json = {"go": str(go)}
        first, second = (replace(warm.attempt(config=config), version=version) for _ in range(2))
        await warm.start(engine, first)
        await warm.printed(first, "runs")  # the job's process has read all files that it needs
        supervisor = pid_of(warm, first)
        folder = warm.root.parent
        moved = folder.rename(elsewhere / "moved")
        try:
            go.touch()
            await warm.ended(first)
            await asyncio.sleep(0.2)
            is_forked = bool(children(supervisor))
        finally:
            moved.rename(folder)
        assert (await warm.outcome(engine, second)).exit_code == 0
        return is_forked

    async def scenario(engine: Engine) -> None:
        version = warm.attempt(code).version
        # No process is forked ahead where its workspace must first be made again.
        for number in range(20):
            if await is_forked_while_missing(engine, version, number):
                return
        # The supervisor checks a copy of the project by its path, which is missing then.
        assert engine.capabilities.own_folder != "overlay", "no process was forked ahead"

    warm.run(scenario)


def test_a_stop_right_after_the_start_ends_a_prepared_attempt(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        first = await next_attempt(warm, engine)
        warm.write(SLEEP)
        sleeper = replace(warm.sleeper(), version=first.version)
        attempt = prepare(warm, engine, sleeper)
        engine.start(attempt)
        engine.stop(attempt.spec.job_id)
        end = await warm.final(attempt)
        # NeverStarted: the stop came before the supervisor had read its order.
        assert isinstance(end, NeverStarted) or (
            isinstance(end, Ended) and end.ending is Ending.STOPPED
        )

    warm.run(scenario)


def test_a_prepared_attempt_of_a_retired_version_still_starts(warm: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = prepare(warm, engine, await next_attempt(warm, engine))
        engine.forget(versions=[attempt.version.api.api_id])
        engine.start(attempt)
        assert (await warm.ended(attempt)).result == 2
        await until(lambda: not exists(pid_of(warm, attempt)))

    warm.run(scenario)
