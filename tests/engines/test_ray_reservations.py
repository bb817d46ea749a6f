"""What Ray reserves for the jobs of a node, and what happens while Ray, the node's raylet or its
agent does not answer: on a node without Ray (`ray`)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import RayError

from cortex.engines.base import (
    Attempt,
    Capacity,
    CapacityFreed,
    Ended,
    Engine,
    Lost,
    NeverStarted,
    NodeInfo,
    Reachable,
    Unreachable,
)
from cortex.engines.ray import RayEngine, calls
from cortex.engines.ray import cluster as ray_cluster
from cortex.engines.ray.connection import AgentConnection
from cortex.ray_node import agent, node_reservations, raylet, reservations
from engines.engine_harness import until
from engines.in_process_ray import NAMESPACE, STATE, InProcessHarness, in_process_harness, ready

NOTHING = "def task(config): pass"
CPU_AND_MEMORY = Capacity(100, 0, 0)


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    monkeypatch.setattr(node_reservations, "_IDLE_S", 0.5)
    monkeypatch.setattr(node_reservations, "_ADOPTION_S", 4.0)
    monkeypatch.setattr(node_reservations, "_RETRY_DELAY_S", 0.1)
    monkeypatch.setattr(raylet, "_TIMEOUT_S", 0.5)
    with in_process_harness(tmp_path, monkeypatch) as made:
        yield made


def node_of(engine: Engine) -> NodeInfo:
    (node,) = engine.ledger.nodes()
    return node


def test_ray_reserves_what_a_job_takes_until_after_its_end(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: harness.ray.reservations)
        (reservation,) = harness.ray.reservations.values()
        assert reservation.amount == CPU_AND_MEMORY
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)


def test_a_job_runs_although_ray_makes_no_reservation(harness: InProcessHarness) -> None:
    harness.ray.has_capacity = False

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        await until(lambda: harness.ray.reservations)
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)


def test_a_reservation_that_ray_makes_late_counts_as_this_operators(
    harness: InProcessHarness,
) -> None:
    harness.ray.has_capacity = False

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        (node,) = engine.ledger.alive.values()
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: harness.ray.reservations)
        assert node._held == Capacity(0, 0, 0)
        harness.ray.has_capacity = True
        await until(lambda: node._held == CPU_AND_MEMORY)
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: node._held == Capacity(0, 0, 0))

    harness.run(scenario)


def test_the_next_job_uses_the_reservation_of_the_job_before(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_reservations, "_IDLE_S", 60.0)
    monkeypatch.setattr(node_reservations, "_BATCH_S", 0.0)

    async def scenario(engine: Engine) -> None:
        first = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: harness.ray.reservations)
        names = set(harness.ray.reservations)
        harness.finish_sleeper()
        await harness.ended(first)
        for _ in range(3):
            await harness.outcome(engine, harness.attempt(NOTHING))
        assert set(harness.ray.reservations) == names

    harness.run(scenario)


def test_an_idle_reservation_makes_room_for_a_job_that_takes_another_amount(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_reservations, "_IDLE_S", 60.0)

    async def scenario(engine: Engine) -> None:
        first = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: harness.ray.reservations)
        harness.finish_sleeper()
        await harness.ended(first)
        harness.marker.with_name("marker.go").unlink()
        second = await harness.start_attempt(engine, harness.sleeper(cpu_m=200))
        wanted = [Capacity(200, 0, 0)]
        await until(lambda: [each.amount for each in harness.ray.reservations.values()] == wanted)
        harness.finish_sleeper()
        await harness.ended(second)

    harness.run(scenario)


def test_a_request_to_ray_that_fails_is_repeated_and_leaves_nothing(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [0]

    def create(name: str, node_id: str, amount: Capacity, timeout_s: float) -> bool:
        failures[0] += 1
        if failures[0] == 1:
            raise RayError("nothing was made")
        made = harness.ray.create(name, node_id, amount, timeout_s)
        if failures[0] == 2:
            raise RayError("the reservation was made all the same")
        return made

    monkeypatch.setattr(reservations, "create", create)

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: any(each.is_created for each in harness.ray.reservations.values()))
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)
    assert failures[0] >= 2


def test_a_killed_agents_reservations_are_those_of_the_next_agent(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        await until(lambda: harness.ray.reservations)
        names = set(harness.ray.reservations)
        await harness.ray.kill_agent()
        await harness.observed(attempt, Reachable)
        await asyncio.sleep(5)  # longer than the reservations of no job would stay
        assert set(harness.ray.reservations) == names
        monkeypatch.setattr(node_reservations, "_ADOPTION_S", 600.0)
        await harness.ray.kill_agent()
        await until(lambda: harness.observations.count(Reachable(attempt.spec.job_id, 1)) == 2)
        agent = harness.ray.agent
        assert agent is not None
        await until(lambda: agent._reservations.held == CPU_AND_MEMORY)
        await asyncio.sleep(1)  # the job's reservation is found, and used
        harness.finish_sleeper()
        await harness.ended(attempt)
        # The time for which an agent keeps what it has found does not apply to what it has used.
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)


def test_the_next_agent_releases_what_a_killed_agent_left(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def release(_: str) -> None:
        raise RayError("the cluster does not answer now")

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: harness.ray.reservations)
        with monkeypatch.context() as patched:
            patched.setattr(reservations, "release", release)
            harness.finish_sleeper()
            await harness.ended(attempt)
            await harness.ray.kill_agent()
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)


@pytest.mark.parametrize("has_operator", [True, False], ids=["this operator", "the next operator"])
def test_what_a_lost_node_left_is_released(
    harness: InProcessHarness, *, has_operator: bool
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: harness.ray.reservations)
        agent = harness.ray.agent
        assert agent is not None
        await agent._reservations.close()
        if has_operator:
            harness.lose_node()
            assert isinstance(await harness.final(attempt), Lost)
        else:
            await engine.close()
            harness.lose_node()
            other = harness.new_engine()
            await other.open(harness.report)
            await other.close()
        await until(lambda: not harness.ray.reservations)
        harness.finish_sleeper()

    harness.run(scenario)


def test_a_job_waits_for_its_gpus(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_reservations, "_GPU_TIMEOUT_S", 1.0)
    harness.ray.has_capacity = False
    harness.ray.states = [replace(STATE, total=Capacity(4000, 1 << 33, 2))]
    command = ["/bin/sh", "-c", "echo [$CUDA_VISIBLE_DEVICES]"]

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(command=command, gpu=2)
        never = await harness.final(await harness.start_attempt(engine, attempt))
        assert isinstance(never, NeverStarted)
        assert never.held_up_by == "others have taken the free GPUs of its node"
        assert "waits for Ray to reserve its GPUs" in harness.wait_reasons
        await until(lambda: not harness.ray.reservations)
        harness.ray.has_capacity = True
        assert isinstance(
            await harness.final(await harness.start_attempt(engine, attempt, 2)), Ended
        )
        assert harness.log(attempt) == "[0,1]\n"
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)


def test_a_stop_ends_the_wait_for_gpus(harness: InProcessHarness) -> None:
    harness.ray.has_capacity = False
    harness.ray.states = [replace(STATE, total=Capacity(4000, 1 << 33, 2))]

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(NOTHING, gpu=1)
        attempt = await harness.start_attempt(engine, attempt)
        await until(lambda: harness.ray.reservations)
        engine.stop(attempt.spec.job_id)
        assert isinstance(await harness.final(attempt), NeverStarted)
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)


def test_a_node_whose_raylet_hangs_takes_no_new_job_and_keeps_its_jobs(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        harness.ray.raylet_hangs = True
        await until(lambda: node_of(engine).problem is not None)
        assert node_of(engine).problem == "its raylet does not answer"
        assert not node_of(engine).is_ready
        assert "its raylet does not answer" in str(engine.ledger.lacks(attempt.version.api.compute))
        harness.finish_sleeper()
        await harness.ended(attempt)
        assert engine.ledger.reserve("job", attempt.version.api.compute) is not None
        harness.observations.clear()
        harness.ray.raylet_hangs = False
        await until(lambda: node_of(engine).is_ready)
        assert CapacityFreed() in harness.observations
        assert node_of(engine).problem is None

    harness.run(scenario)


def test_a_node_whose_raylet_hangs_is_asked_for_no_reservation(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        agent = harness.ray.agent
        assert agent is not None
        harness.ray.raylet_hangs = True
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: agent._raylet.problem is not None)
        await harness.started(attempt)
        names = set(harness.ray.reservations)
        agent._reservations.add("another", Capacity(300, 0, 0))
        await asyncio.sleep(1)
        assert set(harness.ray.reservations) == names
        harness.ray.raylet_hangs = False
        await until(lambda: set(harness.ray.reservations) > names)
        agent._reservations.remove("another")
        harness.finish_sleeper()
        await harness.ended(attempt)

    monkeypatch.setattr(node_reservations, "_CHECK_INTERVAL_S", 0.1)
    harness.run(scenario)


def test_a_node_whose_agent_is_silent_takes_no_new_job_until_it_sends_again(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        with monkeypatch.context() as patched:
            patched.setattr(AgentConnection, "silent_s", ray_cluster.MAX_SILENCE_S + 1)
            await until(lambda: node_of(engine).problem == "its agent does not answer")
            assert not node_of(engine).is_ready
        await until(lambda: node_of(engine).is_ready)
        assert node_of(engine).problem is None
        assert not any(isinstance(each, Unreachable) for each in harness.observations)
        harness.finish_sleeper()
        await harness.ended(attempt)

    harness.run(scenario)


def test_a_node_that_takes_no_order_is_suspect_for_a_while(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SLOW_ORDER_S", 0.2)
    may_answer = asyncio.Event()

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        (node,) = engine.ledger.alive.values()
        harness.ray.before_call["start"] = may_answer.wait  # type: ignore[assignment]  # its result is ignored
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: node.problem == "its agent does not take orders")
        assert engine.ledger.reserve("job", attempt.version.api.compute) is not None
        may_answer.set()
        await harness.started(attempt)
        assert not node.is_ready
        node._suspected_until = 0
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: node.is_ready)

    harness.run(scenario)


def test_an_agent_of_another_version_is_replaced_and_ends_no_job(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        await engine.close()
        first = harness.ray.agent
        for module in (ray_cluster, agent):
            monkeypatch.setattr(module, "AGENT_VERSION", "next")
        assert first is not None
        hello = first.hello

        async def old_hello() -> object:
            with monkeypatch.context() as patched:
                patched.setattr(agent, "AGENT_VERSION", "before")
                return await hello()

        monkeypatch.setattr(first, "hello", old_hello)
        other = harness.new_engine()
        await other.open(harness.report)
        await other.recover(attempt)
        await until(lambda: harness.ray.agent not in (None, first))
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).result == "done"
        await other.close()

    harness.run(scenario)


def test_a_node_with_another_version_is_reported(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        await engine.close()
        monkeypatch.setattr(ray_cluster, "AGENT_VERSION", "next")
        other = harness.new_engine()
        await other.open(harness.report)
        await until(lambda: node_of(other).problem)
        assert "install the same version on both" in str(node_of(other).problem)
        assert harness.ray.calls.count("hello") >= 2
        await other.close()

    harness.run(scenario)


def test_an_attempt_that_is_recovered_after_its_nodes_raylet_has_hung_is_followed(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        harness.ray.raylet_hangs = True
        await until(lambda: node_of(engine).problem == "its raylet does not answer")
        await engine.close()
        harness.finish_sleeper()
        agent = harness.ray.agent
        assert agent is not None
        await until(lambda: not agent._orders)
        harness.observations.clear()
        other = harness.new_engine()
        await other.open(harness.report)
        await until(lambda: node_of(other).problem == "its raylet does not answer")
        await other.recover(attempt)
        assert (await harness.ended(attempt)).result == "done"
        await other.close()

    harness.run(scenario)


def test_an_agent_of_another_version_is_replaced_although_ray_did_not_do_it_at_once(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_agent = harness.ray.end_agent

    async def fail_once(_: str) -> None:
        monkeypatch.setattr(harness.ray, "end_agent", end_agent)
        raise RayError("the cluster does not answer now")

    monkeypatch.setattr(harness.ray, "end_agent", fail_once)

    async def scenario(engine: Engine) -> None:
        first = harness.ray.agent
        assert first is not None
        hello = first.hello

        async def old_hello() -> object:
            return replace(await hello(), version="before")

        monkeypatch.setattr(first, "hello", old_hello)
        await engine.close()
        other = harness.new_engine()
        await other.open(harness.report)
        await ready(other)
        assert harness.ray.agent is not first
        await other.close()

    harness.run(scenario)


def with_gpus(harness: InProcessHarness) -> None:
    harness.ray.states = [replace(STATE, total=Capacity(4000, 1 << 33, 2))]


def test_the_next_agent_releases_the_gpus_of_the_job_that_has_ended_and_no_others(
    harness: InProcessHarness,
) -> None:
    with_gpus(harness)
    code = """
        import os, time
        def task(config):
            while not os.path.exists(config["file"]):
                time.sleep(0.01)
    """

    async def scenario(engine: Engine) -> None:
        attempts: list[Attempt] = []
        names: list[str] = []
        files: list[Path] = []
        for number in range(2):
            file = harness.root / f"end{number}"
            attempt = harness.attempt(code, gpu=1, config={"file": str(file)})
            attempts.append(await harness.start_attempt(engine, attempt))
            await harness.started(attempts[number])
            names.append(*(set(harness.ray.reservations) - set(names)))
            files.append(file)
        await harness.ray.kill_agent()
        for attempt in attempts:
            await harness.observed(attempt, Reachable)
        for attempt, name, file in zip(attempts, names, files, strict=True):
            file.touch()
            await harness.ended(attempt)
            await until(lambda name=name: name not in harness.ray.reservations)
            assert set(harness.ray.reservations) == set(names[names.index(name) + 1 :])

    harness.run(scenario)


def test_jobs_keep_what_an_operator_before_version_2_reserved_for_them(
    harness: InProcessHarness,
) -> None:
    with_gpus(harness)

    async def scenario(engine: Engine) -> None:
        first = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(first)
        second = harness.attempt(command=["/bin/sh", "-c", "sleep 600"], gpu=1, cpu_m=100)
        second = await harness.start_attempt(engine, second)
        await harness.started(second)
        await until(lambda: len(harness.ray.reservations) == 2)
        await engine.close()
        await harness.ray.kill_agent()
        for name, each in list(harness.ray.reservations.items()):
            del harness.ray.reservations[name]
            job = second if each.amount.gpu else first
            old_name = f"{NAMESPACE}:{job.spec.job_id}:1"
            harness.ray.reservations[old_name] = replace(each, name=old_name)
        before = set(harness.ray.reservations)
        pending = reservations.Reservation(f"{NAMESPACE}:job:1", CPU_AND_MEMORY, False)
        harness.ray.reservations[pending.name] = pending
        harness.observations.clear()
        other = harness.new_engine()
        await other.open(harness.report)
        await other.recover(first)
        await other.recover(second)
        await until(lambda: set(harness.ray.reservations) == before)
        await asyncio.sleep(5)  # longer than the reservations of no job would stay
        assert set(harness.ray.reservations) == before
        other.stop(second.spec.job_id)
        await harness.ended(second)
        await until(lambda: len(harness.ray.reservations) == 1)
        assert first.spec.job_id in next(iter(harness.ray.reservations))
        harness.finish_sleeper()
        await harness.ended(first)
        await until(lambda: not harness.ray.reservations)
        await other.close()

    harness.run(scenario)


def test_gpus_that_ray_reserves_after_the_stop_of_their_job_are_released(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(harness)
    may_create = threading.Event()

    def create(name: str, node_id: str, amount: Capacity, timeout_s: float) -> bool:
        may_create.wait(60)
        return harness.ray.create(name, node_id, amount, timeout_s)

    monkeypatch.setattr(reservations, "create", create)

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(NOTHING, gpu=1)
        attempt = await harness.start_attempt(engine, attempt)
        await until(lambda: "waits for Ray to reserve its GPUs" in harness.wait_reasons)
        engine.stop(attempt.spec.job_id)
        assert isinstance(await harness.final(attempt), NeverStarted)
        await asyncio.sleep(1.5)  # longer than the release takes
        may_create.set()
        await until(lambda: harness.ray.reservations)
        await until(lambda: not harness.ray.reservations)

    harness.run(scenario)


def test_no_job_waits_while_ray_lists_the_reservations_of_lost_nodes(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "RESPONSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(ray_cluster, "RELEASE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ray_cluster, "RELEASE_RETRY_DELAY_S", 0.1)
    calls = [0]

    async def hang() -> None:
        calls[0] += 1
        await asyncio.sleep(3600)

    monkeypatch.setattr(harness.ray, "release_lost", hang)

    async def scenario(engine: Engine) -> None:
        assert isinstance(await harness.outcome(engine, harness.attempt(NOTHING)), Ended)
        await until(lambda: calls[0] >= 3)
        assert engine.capabilities.problem is None
        assert node_of(engine).is_ready

    harness.run(scenario)
