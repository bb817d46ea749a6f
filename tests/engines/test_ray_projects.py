"""Projects on their way to nodes: in small pieces, once for all jobs, and whatever fails meanwhile.
On a node without Ray (`ray`)."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayError

from cortex.engines.base import Ended, Engine, NeverStarted
from cortex.engines.ray import RayEngine, cluster, placement, transfers
from cortex.engines.ray.link import NotSent
from cortex.engines.ray.messages import PIECE_BYTES, Refusal
from cortex.ray_node import incoming
from engines.engine_harness import until
from engines.in_process_ray import InProcessHarness, in_process_harness, ready

FULL = OSError(errno.ENOSPC, "No space left on device")
PROJECT_BYTES = 40 * PIECE_BYTES
READS_PROJECT = """
    import hashlib
    def task(config):
        with open("data", "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    monkeypatch.setattr(transfers, "REPORT_INTERVAL_S", 0.01)
    monkeypatch.setattr(transfers, "RETRY_DELAY_S", 0.02)
    with in_process_harness(tmp_path, monkeypatch) as made:
        # Incompressible, so that the archive is as large.
        (made.project / "data").write_bytes(random.Random(1).randbytes(PROJECT_BYTES))
        yield made


def incoming_files(harness: InProcessHarness) -> list[Path]:
    return list((harness.agent_folder / "projects").glob(".incoming-*"))


async def slow() -> None:
    await asyncio.sleep(0.02)


async def hang() -> None:
    await asyncio.Event().wait()


async def no_answer() -> None:
    raise RayError("no answer")


def test_a_project_arrives_and_its_jobs_report_the_progress(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.ray.before_call["receive_project"] = slow
        digest = (await harness.outcome(engine, harness.attempt(READS_PROJECT))).result
        assert digest == harness_digest(harness)
        reasons = harness.wait_reasons
        assert reasons[0] == "its project is being sent to a"
        sent = [
            int(found[1]) for each in reasons if (found := re.search(r"\((\d) of 2 MB\)", each))
        ]
        assert sent == sorted(sent)
        assert 1 in sent
        begins = [
            each for each in reasons if each == "its node has its project; it is about to start"
        ]
        assert len(begins) == 1
        assert reasons[reasons.index(begins[0]) + 1].startswith(
            "its environment is being built on "
        )
        assert incoming_files(harness) == []

    harness.run(scenario)


def harness_digest(harness: InProcessHarness) -> str:
    return hashlib.sha256((harness.project / "data").read_bytes()).hexdigest()


def test_jobs_of_a_project_share_one_transfer(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.ray.before_call["receive_project"] = slow
        harness.write(READS_PROJECT)
        attempts = [harness.attempt() for _ in range(5)]
        for attempt in attempts:
            await harness.start(engine, attempt)
        for attempt in attempts:
            assert (await harness.ended(attempt)).result == harness_digest(harness)
        calls = harness.ray.calls
        assert calls.count("begin_project") == 1
        # The archive has a header, and the project's code.
        assert calls.count("receive_project") == 1 + PROJECT_BYTES // PIECE_BYTES

    harness.run(scenario)


def test_a_transfer_outlives_the_job_that_began_it_while_another_waits(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        harness.write(READS_PROJECT)
        first, second = harness.attempt(), harness.attempt()

        async def stop() -> None:
            engine.stop(first.spec.job_id)
            await slow()

        harness.ray.before_call["receive_project"] = stop
        await harness.start(engine, first)
        await harness.start(engine, second)
        assert isinstance(await harness.final(first), NeverStarted)
        assert (await harness.ended(second)).result == harness_digest(harness)
        assert harness.ray.calls.count("begin_project") == 1

    harness.run(scenario)


def test_two_operators_may_send_the_same_project(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.ray.before_call["receive_project"] = slow
        other = harness.new_engine()
        await other.open(harness.report)
        await ready(other)
        harness.write(READS_PROJECT)
        attempts = [harness.attempt(), harness.attempt()]
        for each, attempt in zip((engine, other), attempts, strict=True):
            await harness.start(each, attempt)
        for attempt in attempts:
            assert (await harness.ended(attempt)).result == harness_digest(harness)
        assert harness.ray.calls.count("begin_project") == 2
        await other.close()

    harness.run(scenario)


def test_a_transfer_begins_again_after_its_agent_was_killed(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        async def kill_once() -> None:
            if harness.ray.calls.count("receive_project") == 20:
                await harness.ray.kill_agent()

        harness.ray.before_call["receive_project"] = kill_once
        ended = await harness.outcome(engine, harness.attempt(READS_PROJECT))
        assert ended.result == harness_digest(harness)
        assert harness.ray.calls.count("begin_project") == 2
        assert incoming_files(harness) == []

    harness.run(scenario)


def test_a_job_waits_if_its_nodes_agent_is_replaced_again_and_again(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        async def restart() -> None:
            if harness.ray.agent is not None:
                harness.ray.agent._incoming._incoming.clear()  # as in the next agent

        harness.ray.before_call["receive_project"] = restart
        attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert "the agent of a was replaced 4 times" in str(final.held_up_by)

    harness.run(scenario)


def test_a_node_that_accepts_no_piece_is_suspect_and_its_job_goes_elsewhere(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(placement, "_PAUSE_S", 1)
    monkeypatch.setattr(cluster, "POLL_TIMEOUT_S", 0.5)
    asked = asyncio.Event()

    async def own_address() -> str:
        asked.set()
        return "10.0.0.5"

    async def scenario(engine: Engine) -> None:
        monkeypatch.setattr(harness.ray, "own_address", own_address)
        harness.ray.before_call["receive_project"] = no_answer
        attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        reason = "a does not answer the driver at 10.0.0.5"
        assert final.held_up_by == f"its project cannot be sent: {reason}"
        waits = engine.ledger.lacks(attempt.version.api.compute)
        assert waits == f"waits for a node that takes jobs (a: {reason})"
        del harness.ray.before_call["receive_project"]
        await ready(engine)
        assert [node.problem for node in engine.ledger.nodes()] == [None]
        await harness.ended(await harness.start_attempt(engine, attempt, 2))

    harness.run(scenario)
    assert asked.is_set()


def test_the_address_of_the_driver_is_left_out_where_it_is_unknown(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STALL_TIMEOUT_S", 0.1)

    async def own_address() -> str:
        raise RayError("unknown")

    async def scenario(engine: Engine) -> None:
        monkeypatch.setattr(harness.ray, "own_address", own_address)
        harness.ray.before_call["begin_project"] = no_answer
        attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert str(final.held_up_by).endswith("a does not answer the driver")

    harness.run(scenario)


def test_no_node_is_suspect_while_the_cluster_is_out_of_reach(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)

        async def lose_link() -> None:
            if (link := engine._cluster._link) is not None:  # else another piece has closed it
                await link.close()
            await hang()

        harness.ray.before_call["receive_project"] = lose_link
        attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert "the connection to the agent of a broke" in str(final.held_up_by)

    harness.run(scenario)


def test_a_damaged_project_is_not_installed(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = incoming._write

    def damage(fd: int, data: bytes, offset: int) -> None:
        write(fd, b"\0" + data[1:] if offset else data, offset)

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(incoming, "_write", damage)
            attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
            final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert "its files arrived damaged" in str(final.held_up_by)
        assert os.listdir(harness.agent_folder / "projects") == []
        await harness.ended(await harness.start_attempt(engine, attempt, 2))

    harness.run(scenario)


@pytest.mark.parametrize("step", ["begin", "receive", "install"])
def test_a_job_waits_while_its_node_cannot_store_its_project(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise FULL

    async def scenario(engine: Engine) -> None:
        assert harness.ray.agent is not None
        with monkeypatch.context() as patched:
            if step == "begin":
                patched.setattr(incoming, "_create", full)
            elif step == "receive":
                patched.setattr(incoming, "_write", full)
            else:
                patched.setattr(harness.ray.agent._provisions, "store_project", full)
            attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
            final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        expected = "its node cannot store its files: No space left on device"
        assert final.held_up_by == expected
        assert [node.is_ready for node in engine.ledger.nodes()] == [True]
        assert incoming_files(harness) == []
        await harness.ended(await harness.start_attempt(engine, attempt, 2))

    harness.run(scenario)


def test_a_job_waits_while_the_operators_disk_is_full(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise FULL

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "TemporaryFile", full)
            attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
            final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert "No space left on device" in str(final.held_up_by)
        await harness.ended(await harness.start_attempt(engine, attempt, 2))

    harness.run(scenario)


def test_a_project_that_cannot_be_packed_is_the_reason_why_its_job_waits(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(READS_PROJECT)
        shutil.rmtree(harness.project)
        attempt = await harness.start_attempt(engine, attempt)
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert "No such file or directory" in str(final.held_up_by)

    harness.run(scenario)


def test_a_slow_installation_is_no_stall(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "INSTALL_POLL_S", 0.05)

    async def scenario(engine: Engine) -> None:
        assert harness.ray.agent is not None
        store = harness.ray.agent._provisions.store_project

        def slow_store(*arguments: object) -> None:
            while harness.ray.calls.count("install_project") < 5:
                pass
            store(*arguments)  # type: ignore[arg-type]  # those of `store_project`

        monkeypatch.setattr(harness.ray.agent._provisions, "store_project", slow_store)
        await harness.outcome(engine, harness.attempt(READS_PROJECT))
        assert harness.ray.calls.count("begin_project") == 1

    harness.run(scenario)


def test_a_stopped_jobs_half_sent_project_is_removed(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "IDLE_TIMEOUT_S", 0.2)

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(READS_PROJECT)

        async def stop() -> None:
            if harness.ray.calls.count("receive_project") == 20:
                assert incoming_files(harness)
                engine.stop(attempt.spec.job_id)
            await slow()

        harness.ray.before_call["receive_project"] = stop
        await harness.start(engine, attempt)
        assert isinstance(await harness.final(attempt), NeverStarted)
        await until(lambda: not incoming_files(harness))
        assert harness.ray.calls.count("start") == 1

    harness.run(scenario)


def test_a_timeout_passes_while_the_project_is_sent(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.ray.before_call["receive_project"] = hang
        attempt = harness.attempt(READS_PROJECT, timeout=1)
        await harness.start(engine, attempt)
        assert await harness.final(attempt) == NeverStarted(attempt.spec.job_id, 1)

    harness.run(scenario)


def test_an_operator_that_ends_during_a_transfer_leaves_a_job_that_can_be_tried_again(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        harness.ray.before_call["receive_project"] = hang
        attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
        await until(lambda: "receive_project" in harness.ray.calls)
        (packing,) = engine._attempts._transfers._packings.values()
        archive = packing.task.result().file
        await engine.close()
        await until(lambda: archive.closed)
        del harness.ray.before_call["receive_project"]
        other = harness.new_engine()
        await other.open(harness.report)
        await ready(other)
        await other.recover(attempt)
        assert isinstance(await harness.final(attempt), NeverStarted)
        await harness.ended(await harness.start_attempt(other, attempt, 2))
        assert harness.ray.calls.count("begin_project") == 2
        await other.close()

    harness.run(scenario)


def not_reached(_: object) -> None:
    raise AssertionError


def test_repeated_calls_of_a_transfer_do_nothing(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose answer was late or lost is repeated, and may arrive after later ones."""
    monkeypatch.setattr(incoming, "IDLE_TIMEOUT_S", 0.1)

    async def scenario(_: Engine) -> None:
        assert harness.ray.agent is not None
        incoming_projects = harness.ray.agent._incoming
        assert not await incoming_projects.receive("lost", 0, b"data")
        assert await incoming_projects.install("lost", 4, "", 1, not_reached) is False
        await asyncio.gather(incoming_projects.begin("a"), incoming_projects.begin("a"))
        assert len(incoming_files(harness)) == 1
        assert await incoming_projects.receive("a", 2, b"ta")
        await incoming_projects.begin("a")
        assert await incoming_projects.receive("a", 0, b"da")
        assert await incoming_projects.receive("a", 0, b"da")
        assert incoming_files(harness)[0].read_bytes() == b"data"
        digest = "0" * 64
        calls = [incoming_projects.install("a", 4, digest, 60, not_reached) for _ in range(2)]
        refusals = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in refusals] == [Refusal, Refusal]
        assert incoming_files(harness) == []

    harness.run(scenario)


def test_an_order_that_was_certainly_not_sent_never_started(harness: InProcessHarness) -> None:
    async def not_sent(*_: object, **__: object) -> object:
        raise NotSent("its agent cannot be started")

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        engine._cluster.call_agent = not_sent  # type: ignore[method-assign]  # an agent that is away
        attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
        harness.lose_node()
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert final.held_up_by == "its agent cannot be started"

    harness.run(scenario)


def test_a_job_whose_node_is_lost_while_its_project_is_sent_says_so(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        harness.ray.before_call["receive_project"] = hang
        attempt = await harness.start_attempt(engine, harness.attempt(READS_PROJECT))
        await until(lambda: "receive_project" in harness.ray.calls)
        harness.lose_node()
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert final.held_up_by == "the node a was lost"

    harness.run(scenario)


def test_large_logs_and_results_arrive_whole(harness: InProcessHarness) -> None:
    writes = """
        def task(config):
            print("x" * 300_000 + config["name"], flush=True)
            return "y" * 40_000
    """

    async def scenario(engine: Engine) -> None:
        harness.write(writes)
        attempts = [harness.attempt(config={"name": f"end{number}"}) for number in range(4)]
        for attempt in attempts:
            await harness.start(engine, attempt)
        for number, attempt in enumerate(attempts):
            ended = await harness.ended(attempt)
            assert isinstance(ended, Ended)
            assert ended.result == "y" * 40_000
            assert harness.log(attempt) == "x" * 300_000 + f"end{number}\n"

    harness.run(scenario)
