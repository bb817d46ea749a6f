"""An engine that is opened while its Ray cluster is away, on a node without Ray (`in_process_ray`).

`test_ray` and `test_ray_operator` have the same with a real cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import (
    Attempt,
    Capacity,
    CapacityFreed,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Observation,
    Reachable,
    Started,
    Unreachable,
)
from cortex.engines.ray import RayEngine, cluster
from cortex.errors import StartupError
from cortex.spec.api import Compute
from engines.engine_harness import until
from engines.in_process_ray import (
    GIB,
    STATE,
    InProcessHarness,
    InProcessLink,
    in_process_harness,
    ready,
)

AWAY = "the Ray cluster at near:1 cannot be joined: cut off"
WAITS = "waits for the Ray cluster at near:1, which cannot be joined: cut off"


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    with in_process_harness(tmp_path, monkeypatch) as made:
        yield made


async def running_attempt(harness: InProcessHarness, engine: RayEngine) -> Attempt:
    attempt = await harness.start_attempt(engine, harness.sleeper())
    await harness.started(attempt)
    return attempt


@asynccontextmanager
async def recovered_while_away(
    harness: InProcessHarness, engine: RayEngine
) -> AsyncIterator[tuple[Attempt, RayEngine]]:
    """A running attempt, and the next operator, which has recovered it while the cluster is away."""
    attempt = await running_attempt(harness, engine)
    await engine.close()
    async with opened_while_away(harness) as other:
        await other.recover(attempt)
        yield attempt, other


@asynccontextmanager
async def opened_while_away(harness: InProcessHarness) -> AsyncIterator[RayEngine]:
    """The next operator's engine. It opens while the cluster is away, and observes anew."""
    harness.ray.is_cut_off = True
    harness.observations.clear()
    engine = harness.new_engine()
    await engine.open(harness.report)
    try:
        yield engine
    finally:
        await engine.close()


def problem_of(engine: RayEngine) -> str | None:
    return engine.capabilities.problem


def of_attempts(harness: InProcessHarness) -> list[Observation]:
    return [each for each in harness.observations if not isinstance(each, CapacityFreed)]


def test_jobs_wait_for_an_absent_cluster_with_a_true_reason_and_none_is_refused(
    harness: InProcessHarness,
) -> None:
    async def main() -> None:
        async with opened_while_away(harness) as engine:
            assert problem_of(engine) == AWAY
            assert engine.ledger.reserve("job", Compute()) == WAITS
            huge = Compute(gpu=99)
            assert engine.ledger.refusal(huge) is None
            harness.ray.is_cut_off = False
            await until(lambda: CapacityFreed() in harness.observations)
            await ready(engine)
            assert problem_of(engine) is None
            assert engine.ledger.reserve("job", Compute()) is None
            # The node with the GPUs may join a moment later.
            assert engine.ledger.refusal(huge) is None
        await harness.ray.kill_agent()

    asyncio.run(main())


def test_a_job_that_fits_no_node_is_refused_once_the_nodes_have_had_time_to_join(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SETTLING_S", 2)

    async def main() -> None:
        async with opened_while_away(harness) as engine:
            assert engine.ledger.reserve("big", Compute(gpu=1)) == WAITS
            harness.ray.is_cut_off = False
            await ready(engine)
            assert engine.ledger.refusal(Compute(gpu=1)) is None
            assert engine.ledger.reserve("big", Compute(gpu=1)) == "needs 1 GPU, 0 free on one node"
            harness.observations.clear()
            await until(lambda: engine.ledger.refusal(Compute(gpu=1)) is not None)
            assert CapacityFreed() in harness.observations  # the dispatcher decides again
        await harness.ray.kill_agent()

    asyncio.run(main())


def test_a_node_that_joins_after_the_head_gets_the_job_that_waits_for_it(
    harness: InProcessHarness,
) -> None:
    async def main() -> None:
        small = replace(STATE, total=Capacity(1000, GIB, 0))
        harness.ray.states = [small]
        async with opened_while_away(harness) as engine:
            harness.ray.is_cut_off = False
            await ready(engine)
            assert engine.ledger.refusal(Compute(cpu_m=4000)) is None
            harness.ray.states = [STATE]
            await until(lambda: engine.ledger.reserve("job", Compute(cpu_m=4000)) is None)
        await harness.ray.kill_agent()

    asyncio.run(main())


def test_a_job_is_unknown_until_the_cluster_is_back_and_ends_with_its_result(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: RayEngine) -> None:
        async with recovered_while_away(harness, engine) as (attempt, other):
            assert (await harness.unreachable(attempt)).reason == AWAY
            harness.ray.is_cut_off = False
            await harness.observed(attempt, Reachable)
            # Its share counts as taken, although its node was not known when it was recovered.
            await until(lambda: other.ledger.nodes()[0].free.cpu_m == 3900)
            harness.finish_sleeper()
            assert (await harness.ended(attempt)).result == "done"
            kinds = [type(each) for each in of_attempts(harness)]
            assert [each for each in kinds if each is not Started] == [
                Unreachable,
                Reachable,
                Ended,
            ]

    harness.run(scenario)


def test_an_end_while_no_operator_reached_the_cluster_is_reported_afterwards(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: RayEngine) -> None:
        async with recovered_while_away(harness, engine) as (attempt, _):
            harness.finish_sleeper()
            await until((harness.folder(attempt) / "exit.1").exists)
            assert [type(each) for each in of_attempts(harness)] == [Unreachable]
            harness.ray.is_cut_off = False
            assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_a_stop_while_the_cluster_is_away_is_carried_out_afterwards(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: RayEngine) -> None:
        async with recovered_while_away(harness, engine) as (attempt, other):
            other.stop(attempt.spec.job_id)
            harness.ray.is_cut_off = False
            assert (await harness.ended(attempt)).ending is Ending.STOPPED

    harness.run(scenario)


def test_a_claim_that_never_reached_its_node_is_fenced_off_afterwards(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: RayEngine) -> None:
        attempt = harness.sleeper()
        assert engine.ledger.reserve(attempt.spec.job_id, attempt.version.api.compute) is None
        claimed = replace(attempt, handle=engine.claim(attempt.spec.job_id, 1))
        await engine.close()
        async with opened_while_away(harness) as other:
            await other.recover(claimed)
            harness.ray.is_cut_off = False
            assert isinstance(await harness.final(claimed), NeverStarted)

    harness.run(scenario)


def test_a_job_whose_node_is_gone_is_lost_once_and_only_after_the_nodes_were_read(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: RayEngine) -> None:
        attempt = await running_attempt(harness, engine)
        await engine.close()
        reading, may_read = asyncio.Event(), asyncio.Event()
        read = harness.ray.node_states

        async def read_later() -> object:
            reading.set()
            await may_read.wait()
            return await read()

        harness.lose_node()
        async with opened_while_away(harness) as other:
            harness.ray.node_states = read_later  # type: ignore[assignment,method-assign]  # slow
            harness.ray.is_cut_off = False
            await reading.wait()  # the link is open
            await other.recover(attempt)
            assert [type(each) for each in of_attempts(harness)] == [Unreachable]
            may_read.set()
            lost = await harness.final(attempt)
            assert lost == Lost(attempt.spec.job_id, 1, "its node a is no longer in the cluster")
            await until(lambda: not harness.ray.reservations)
            await asyncio.sleep(2 * cluster.REFRESH_INTERVAL_S)
            assert of_attempts(harness).count(lost) == 1
        harness.finish_sleeper()

    harness.run(scenario)


def test_a_job_that_is_recovered_while_its_node_joins_is_recovered_on_the_node(
    harness: InProcessHarness,
) -> None:
    """The dispatcher recovers jobs one by one, and the agent may answer in between."""

    async def scenario(engine: RayEngine) -> None:
        first = await running_attempt(harness, engine)
        await until(harness.marker.exists)
        harness.marker.unlink()
        second = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(second)
        await engine.close()
        async with opened_while_away(harness) as other:

            async def recover_second() -> None:
                del harness.ray.before_call["recover"]
                await other.recover(second)

            harness.ray.before_call["recover"] = recover_second
            await other.recover(first)
            harness.ray.is_cut_off = False
            harness.finish_sleeper()
            for attempt in (first, second):
                assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_an_operator_that_has_no_descriptor_left_still_joins_later(
    harness: InProcessHarness,
) -> None:
    async def main() -> None:
        engine, failures = harness.new_engine(), [OSError(24, "Too many open files")]

        async def open_link() -> object:
            if failures:
                raise failures.pop()
            return InProcessLink(harness.ray)

        engine._cluster._open_link = open_link  # type: ignore[assignment,method-assign]  # fails
        await engine.open(harness.report)
        assert "Too many open files" in str(problem_of(engine))
        await ready(engine)
        assert problem_of(engine) is None
        await engine.close()
        await harness.ray.kill_agent()

    asyncio.run(main())


def test_a_head_that_does_not_answer_delays_no_operator(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "OPEN_TIMEOUT_S", 0.2)
    answers = asyncio.Event()

    async def main() -> None:
        engine = harness.new_engine()

        async def open_link() -> object:
            await answers.wait()
            return InProcessLink(harness.ray)

        engine._cluster._open_link = open_link  # type: ignore[assignment,method-assign]  # hangs
        await engine.open(harness.report)
        waits = "which cannot be joined: it did not answer within 0.2 s"
        assert waits in str(engine.ledger.reserve("job", Compute()))
        answers.set()
        await ready(engine)
        assert engine.ledger.refusal(Compute(gpu=9)) is not None  # it was never away
        await engine.close()
        await harness.ray.kill_agent()

    asyncio.run(main())


def test_an_absent_cluster_is_reported_at_once_and_then_ever_less_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.engines.ray.join_attempts.MAX_DELAY_S", 0.001)

    async def main() -> None:
        engine = RayEngine(tmp_path / "jobs", "127.0.0.1:1", "unused")
        await engine.open(lambda _: None)
        printed = capsys.readouterr().out
        assert "cannot join the ray cluster" in printed
        assert "nothing answers there" in printed
        assert "failures=1 " in printed
        printed = ""
        async with asyncio.timeout(60):
            while "failures=8 " not in printed:
                await asyncio.sleep(0.01)
                printed += capsys.readouterr().out
        assert [f"failures={number} " in printed for number in range(2, 9)] == [
            number in (2, 4, 8) for number in range(2, 9)
        ]
        await engine.close()

    asyncio.run(main())


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = RayEngine(tmp_path / "file" / "jobs", "127.0.0.1:1", "unused")
    with pytest.raises(StartupError, match="cannot be written"):
        asyncio.run(engine.open(lambda _: None))


def test_an_engine_is_closed_while_it_joins(harness: InProcessHarness) -> None:
    async def main() -> None:
        engine = harness.new_engine()
        harness.ray.is_cut_off = True
        await engine.open(harness.report)
        await engine.close()
        harness.ray.is_cut_off = False
        await asyncio.sleep(2)
        assert not engine._cluster.is_joined

    asyncio.run(main())
