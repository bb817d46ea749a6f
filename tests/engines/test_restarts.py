"""What every engine promises when the operator dies, or is stopped, and another takes up its jobs; and of a
job whose processes are lost, and that is tried again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

from cortex.engines.base import Attempt, Ended, Ending, Engine, Lost, NeverStarted
from cortex.worker.processes import with_variable
from engines.bench import Bench, exists, until


def test_a_job_outlives_its_operator_and_is_taken_up_again(bench: Bench) -> None:
    attempt = bench.killed_operator(bench.sleeper(), "started")

    async def scenario(engine: Engine) -> None:
        await engine.recover(attempt)
        started = await bench.started(attempt)
        assert engine.ledger.reserve("other", attempt.version.api.compute) is None
        bench.go()
        ended = await bench.ended(attempt)
        assert (ended.ending, ended.result) == (Ending.EXITED, "done")
        assert ended.start_ns == started.start_ns

    bench.run(scenario)
    assert bench.marker.read_text() == "ran\n"


def test_a_recovered_job_can_be_stopped(bench: Bench) -> None:
    attempt = bench.killed_operator(bench.sleeper(), "started")

    async def scenario(engine: Engine) -> None:
        await engine.recover(attempt)
        engine.stop(attempt.spec.job_id)
        assert (await bench.ended(attempt)).ending is Ending.STOPPED

    bench.run(scenario)


def test_a_job_that_finished_meanwhile_is_told_as_it_was(bench: Bench) -> None:
    attempt = bench.killed_operator(bench.sleeper(), "started")
    bench.go()

    async def scenario(engine: Engine) -> None:
        await until((bench.folder(attempt) / "exit.1").exists)
        await engine.recover(attempt)
        assert (await bench.ended(attempt)).result == "done"

    bench.run(scenario)


def test_a_job_outlives_a_closed_engine(bench: Bench) -> None:
    attempt = bench.sleeper()

    async def first(engine: Engine) -> None:
        nonlocal attempt
        attempt = await bench.begin(engine, attempt)
        await bench.printed(attempt, "pid")

    async def second(engine: Engine) -> None:
        await engine.recover(attempt)
        bench.go()
        assert (await bench.ended(attempt)).result == "done"

    bench.run_fresh(first)
    bench.run(second)
    assert sum(isinstance(o, Ended) for o in bench.seen) == 1


def test_claimed_but_never_started_is_told_so_and_never_runs(bench: Bench) -> None:
    attempt = bench.killed_operator(bench.sleeper(), "claimed")

    async def scenario(engine: Engine) -> None:
        await engine.recover(attempt)
        assert isinstance(await bench.last(attempt), NeverStarted)
        engine.start(attempt)  # as if its order had been on its way all the time
        await bench.last(attempt)
        assert not bench.marker.exists()
        bench.go()
        again = await bench.begin(engine, attempt, 2)
        assert (await bench.ended(again)).result == "done"

    bench.run(scenario)
    assert bench.marker.read_text() == "ran\n"


def test_an_operator_killed_at_any_moment_starts_an_attempt_once_at_most(bench: Bench) -> None:
    bench.go()
    for moment in bench.moments:
        bench.marker.unlink(missing_ok=True)
        attempt = bench.killed_operator(bench.sleeper(), str(moment))

        async def scenario(engine: Engine, attempt: Attempt = attempt) -> None:
            await engine.recover(attempt)
            last = await bench.last(attempt)
            if isinstance(last, NeverStarted):
                last = await bench.last(await bench.begin(engine, attempt, 2))
            assert isinstance(last, Ended)
            assert last.result == "done"

        bench.run(scenario)
        assert bench.marker.read_text() == "ran\n"


def test_a_lost_attempt_may_be_followed_by_another_that_knows_of_it(bench: Bench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = bench.attempt("""
            import os, time
            def task(config):
                print("attempt", os.environ["CORTEX_ATTEMPT"], os.getpid(), flush=True)
                while os.environ["CORTEX_ATTEMPT"] == "1":
                    time.sleep(0.01)
                return "done"
        """)
        await bench.start(engine, attempt)
        await bench.printed(attempt, "attempt 1")
        worker = int(bench.log(attempt).split()[2])
        os.kill(json.loads(bench.start_record(attempt).read_bytes())["pid"], signal.SIGKILL)
        assert isinstance(await bench.last(attempt), Lost)
        # What is left of it has no memory any more, and can run nothing.
        assert not with_variable("CORTEX_JOB_ID", attempt.spec.job_id)
        await until(lambda: not exists(worker))
        told = replace(attempt, losses=1, lost="attempt 1 was lost: as asked")
        again = await bench.begin(engine, told, 2)
        assert (await bench.ended(again)).result == "done"
        first, second, third = bench.log(attempt).splitlines()
        assert first == f"attempt 1 {worker}"
        assert second == "cortex: attempt 1 was lost: as asked; attempt 2 begins"
        assert third.startswith("attempt 2 ")

    bench.run(scenario)
