"""The promises of every engine when an operator dies or is stopped and the next one recovers its
jobs, and when a job's processes are lost and the job gets a new attempt."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

from cortex.engines.base import Attempt, Ended, Ending, Engine, Lost, NeverStarted
from cortex.worker.processes import with_variable
from engines.engine_harness import EngineHarness, exists, until


def test_a_job_outlives_its_operator_and_is_recovered(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")

    async def scenario(engine: Engine) -> None:
        await engine.recover(attempt)
        started = await harness.started(attempt)
        assert engine.ledger.reserve("other", attempt.version.api.compute) is None
        harness.finish_sleeper()
        ended = await harness.ended(attempt)
        assert (ended.ending, ended.result) == (Ending.EXITED, "done")
        assert ended.start_ns == started.start_ns

    harness.run(scenario)
    assert harness.marker.read_text() == "ran\n"


def test_a_recovered_job_can_be_stopped(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")

    async def scenario(engine: Engine) -> None:
        await engine.recover(attempt)
        engine.stop(attempt.spec.job_id)
        assert (await harness.ended(attempt)).ending is Ending.STOPPED

    harness.run(scenario)


def test_a_job_that_finished_without_an_operator_is_reported_with_its_result(
    harness: EngineHarness,
) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")
    harness.finish_sleeper()

    async def scenario(engine: Engine) -> None:
        await until((harness.folder(attempt) / "exit.1").exists)
        await engine.recover(attempt)
        assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_a_job_outlives_a_closed_engine(harness: EngineHarness) -> None:
    attempt = harness.sleeper()

    async def first(engine: Engine) -> None:
        nonlocal attempt
        attempt = await harness.start_attempt(engine, attempt)
        await harness.printed(attempt, "pid")

    async def second(engine: Engine) -> None:
        await engine.recover(attempt)
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).result == "done"

    harness.run_with_new_engine(first)
    harness.run(second)
    assert sum(isinstance(o, Ended) for o in harness.observations) == 1


def test_an_attempt_that_was_claimed_but_not_started_never_runs(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "claimed")

    async def scenario(engine: Engine) -> None:
        await engine.recover(attempt)
        assert isinstance(await harness.final(attempt), NeverStarted)
        engine.start(attempt)  # as if the order of the killed operator arrived late
        await harness.final(attempt)
        assert not harness.marker.exists()
        harness.finish_sleeper()
        again = await harness.start_attempt(engine, attempt, 2)
        assert (await harness.ended(again)).result == "done"

    harness.run(scenario)
    assert harness.marker.read_text() == "ran\n"


def test_an_operator_killed_at_any_moment_starts_an_attempt_once_at_most(
    harness: EngineHarness,
) -> None:
    harness.finish_sleeper()
    for moment in harness.kill_delays_s:
        harness.marker.unlink(missing_ok=True)
        attempt = harness.killed_operator(harness.sleeper(), str(moment))

        async def scenario(engine: Engine, attempt: Attempt = attempt) -> None:
            await engine.recover(attempt)
            last = await harness.final(attempt)
            if isinstance(last, NeverStarted):
                last = await harness.final(await harness.start_attempt(engine, attempt, 2))
            assert isinstance(last, Ended)
            assert last.result == "done"

        harness.run(scenario)
        assert harness.marker.read_text() == "ran\n"


def test_the_attempt_after_a_lost_one_runs_and_its_log_says_why(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("""
            import os, time
            def task(config):
                print("attempt", os.environ["CORTEX_ATTEMPT"], os.getpid(), flush=True)
                while os.environ["CORTEX_ATTEMPT"] == "1":
                    time.sleep(0.01)
                return "done"
        """)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "attempt 1")
        worker = int(harness.log(attempt).split()[2])
        os.kill(json.loads(harness.start_record(attempt).read_bytes())["pid"], signal.SIGKILL)
        assert isinstance(await harness.final(attempt), Lost)
        # The remaining processes have no memory any more, and can run no code.
        assert not with_variable("CORTEX_JOB_ID", attempt.spec.job_id)
        await until(lambda: not exists(worker))
        after_loss = replace(attempt, losses=1, lost="attempt 1 was lost: as asked")
        again = await harness.start_attempt(engine, after_loss, 2)
        assert (await harness.ended(again)).result == "done"
        first, second, third = harness.log(attempt).splitlines()
        assert first == f"attempt 1 {worker}"
        assert second == "cortex: attempt 1 was lost: as asked; attempt 2 begins"
        assert third.startswith("attempt 2 ")

    harness.run(scenario)
