"""What the Ray engine promises when a part of the cluster dies, hangs or is taken by others; on a real
cluster, whose processes are killed. The last two tests leave it with one node."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path

import pytest

from cortex.engines.base import (
    CapacityFreed,
    Ended,
    Ending,
    Engine,
    Lost,
    NeverStarted,
    Reachable,
    Started,
    Unreachable,
)
from cortex.engines.ray import RayEngine, calls
from cortex.engines.ray import cluster as ray_cluster
from cortex.errors import StartupError
from cortex.joblog.reader import Log, read
from cortex.spec.api import Compute
from engines.engine_harness import LIMIT_S, Final, exists, until
from engines.ray_harness import RayHarness, ready

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]
MIB = 1 << 20


def test_a_killed_agent_takes_no_job_along(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        os.kill(ray_harness.agent_of(attempt), signal.SIGKILL)
        await ray_harness.unreachable(attempt)
        await ray_harness.seen_of(attempt, Reachable)
        ray_harness.go()
        assert (await ray_harness.ended(attempt)).result == "done"

    ray_harness.run(scenario)
    assert ray_harness.marker.read_text() == "ran\n"


def test_a_job_whose_agent_is_killed_can_be_stopped(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        os.kill(ray_harness.agent_of(attempt), signal.SIGKILL)
        engine.stop(attempt.spec.job_id)
        assert (await ray_harness.ended(attempt)).ending is Ending.STOPPED

    ray_harness.run(scenario)


def test_what_ended_while_the_cluster_was_out_of_reach_is_told_after_it(
    ray_harness: RayHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        with ray_harness.stopped_cluster(engine):
            unreachable = await ray_harness.unreachable(attempt)
            assert unreachable.reason
            ray_harness.go()
            await until((ray_harness.folder(attempt) / "exit.1").exists)
            assert not any(isinstance(seen, Ended) for seen in ray_harness.seen)
        assert (await ray_harness.ended(attempt)).result == "done"
        assert "pid" in ray_harness.log(attempt)

    ray_harness.run(scenario)


def test_a_job_that_runs_on_is_reachable_again(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        assert isinstance(engine, RayEngine)
        assert engine._cluster._link is not None
        assert engine._cluster._link._process is not None
        engine._cluster._link._process.kill()  # as Ray does with a driver that lost its cluster for long
        await ray_harness.unreachable(attempt)
        await ray_harness.seen_of(attempt, Reachable)
        ray_harness.go()
        assert (await ray_harness.ended(attempt)).result == "done"
        assert sum(isinstance(seen, Unreachable) for seen in ray_harness.seen) == 1

    ray_harness.run(scenario)


def test_what_others_take_of_the_cluster_is_waited_for(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        async with ray_harness.others(cpus=8, count=2):
            await until(lambda: all(node.free.cpu_m == 0 for node in engine.ledger.nodes()))
            assert (
                engine.ledger.reserve("job", Compute(cpu_m=500))
                == "needs 0.5 CPU, 0 free on one node"
            )
            ray_harness.seen.clear()
        await until(lambda: CapacityFreed() in ray_harness.seen)
        assert engine.ledger.reserve("job", Compute(cpu_m=500)) is None
        engine.ledger.release("job")

    ray_harness.run(scenario)


def test_what_ray_does_not_give_is_tried_again_later(
    ray_harness: RayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "RESERVATION_TIMEOUT_S", 0.5)

    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        assert engine.ledger.reserve(attempt.spec.job_id, attempt.version.api.compute) is None
        async with ray_harness.others(cpus=8, count=2):
            attempt = await ray_harness.begin(engine, attempt)
            never = await ray_harness.last(attempt)
            assert isinstance(never, NeverStarted)
            assert never.blocked_by == "others have taken the free capacity of its node"
        ray_harness.go()
        job_id, compute = attempt.spec.job_id, attempt.version.api.compute
        number = 1
        last: Final = never
        while isinstance(last, NeverStarted):  # as the dispatcher does
            number += 1
            # Ray's figures lag: to the engine its node may still be taken.
            await until(lambda: engine.ledger.reserve(job_id, compute) is None)
            last = await ray_harness.last(await ray_harness.begin(engine, attempt, number))
        assert isinstance(last, Ended)
        assert last.result == "done"

    ray_harness.run(scenario)


def test_what_no_node_has_is_refused_in_words(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        assert engine.ledger.refusal(Compute(gpu=8)) == "needs 8 GPUs, the largest node has 2"
        assert engine.ledger.refusal(Compute(cpu_m=9000)) == "needs 9 CPU, the largest node has 8"
        assert (
            engine.ledger.refusal(Compute(mem=1 << 40)) == "needs 1 TiB, the largest node has 4 GiB"
        )
        assert engine.ledger.refusal(Compute(cpu_m=8000, gpu=2)) is None

    ray_harness.run(scenario)


def test_gpus_are_those_that_ray_gives(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        command = ["/bin/sh", "-c", "echo [$CUDA_VISIBLE_DEVICES]"]
        attempts = [ray_harness.attempt(command=command, gpu=gpus) for gpus in (1, 2, 0)]
        logs = []
        for attempt in attempts:
            await ray_harness.outcome(engine, attempt)
            logs.append(ray_harness.log(attempt))
        assert logs[0] in ("[0]\n", "[1]\n")
        assert logs[1] in ("[0,1]\n", "[1,0]\n")
        assert logs[2] == "[]\n"

    ray_harness.run(scenario)


def test_ray_holds_what_a_job_takes_until_it_ends(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        before = await steady(engine)
        attempt = ray_harness.sleeper(cpu_m=300)
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        await settled(engine, before, [0, 300])
        ray_harness.go()
        await ray_harness.ended(attempt)
        await settled(engine, before, [0, 0])

    async def steady(engine: Engine) -> list[int]:
        """What is taken when nothing changes any more: Ray's figures lag, and at times it keeps what was
        given back while it was being given."""
        seen = [await ray_harness.taken(engine)]
        while len(seen) < 20 or seen[-20:] != seen[-1:] * 20:
            await asyncio.sleep(0.05)
            seen.append(await ray_harness.taken(engine))
        return seen[-1]

    async def settled(engine: Engine, before: list[int], wanted: list[int]) -> None:
        until_s = time.monotonic() + LIMIT_S
        more: list[int] = []
        while more != wanted:
            assert time.monotonic() < until_s, (before, more)
            await asyncio.sleep(0.05)
            now = await ray_harness.taken(engine)
            more = sorted(after - earlier for earlier, after in zip(before, now, strict=True))

    ray_harness.run(scenario)


def test_an_environment_that_cannot_be_built_is_told_with_the_resolvers_words(
    ray_harness: RayHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        ray_harness.write("./no-such-1.0-py3-none-any.whl\n", "requirements.txt")
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.start(engine, attempt)
        lost = await ray_harness.last(attempt)
        assert isinstance(lost, Lost)
        assert lost.reason.startswith("the environment could not be built")
        assert "no-such-1.0" in ray_harness.log(attempt)

    ray_harness.run(scenario)


def require(ray_harness: RayHarness, backend: str) -> None:
    """A requirement that is built by this code."""
    ray_harness.write(
        """
        [project]
        name = "odd"
        version = "1"
        [build-system]
        requires = []
        build-backend = "odd"
        backend-path = ["."]
        """,
        "odd/pyproject.toml",
    )
    ray_harness.write(backend, "odd/odd.py")
    ray_harness.write("./odd\n", "requirements.txt")


def slow_to_build(ray_harness: RayHarness) -> None:
    """A requirement whose build never ends."""
    require(ray_harness, "import time\ntime.sleep(300)\n")


def test_an_environment_waits_for_a_disk_that_is_full(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        require(ray_harness, "import os\nraise OSError(28, os.strerror(28))\n")
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.start(engine, attempt)
        never = await ray_harness.last(attempt)
        assert isinstance(never, NeverStarted)
        assert never.blocked_by == "its node's disk is full, and the environment not built"

    ray_harness.run(scenario)


def test_the_timeout_ends_the_wait_for_an_environment(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        slow_to_build(ray_harness)
        attempt = ray_harness.attempt("def task(config): pass", timeout=1)
        await ray_harness.start(engine, attempt)
        assert isinstance(await ray_harness.last(attempt), NeverStarted)

    ray_harness.run(scenario)


def test_a_stop_while_the_environment_is_built_is_at_once(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        slow_to_build(ray_harness)
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.start(engine, attempt)
        await until(lambda: list(ray_harness.shared.nodes.glob("*/environments/*/*/source")))
        engine.stop(attempt.spec.job_id)
        assert isinstance(await ray_harness.last(attempt), NeverStarted)

    ray_harness.run(scenario)


def test_a_log_over_its_limit_is_cut_in_the_copy_too(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.attempt(
            """
            def task(config):
                print("first")
                for number in range(60000):
                    print(number, "x" * 100)
                print("last")
            """,
            log_limit=1 * MIB,
        )
        await ray_harness.outcome(engine, attempt)
        log, offset, text = Log(ray_harness.root / attempt.spec.job_id / "log", 1 * MIB), 0, b""
        while (piece := read(log, offset, MIB)).data:
            text, offset = text + piece.data, piece.end
        assert text.startswith(b"first\n")
        assert text.endswith(b"last\n")
        assert b"\0" not in text
        assert re.search(rb"\[cortex: .* of the log are gone: limits.log is 1 MiB\]\n", text)
        there = (ray_harness.folder(attempt) / "log").stat()
        assert offset == there.st_size

    ray_harness.run(scenario)


def test_jobs_that_are_forgotten_leave_the_nodes(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.outcome(engine, attempt)
        folder = ray_harness.folder(attempt)
        assert folder.exists()
        engine.forget(jobs=[attempt.spec.job_id])
        await until(lambda: not folder.exists())

    ray_harness.run(scenario)


def test_a_node_of_another_version_says_so(
    ray_harness: RayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.__version__", "0.0.0-other")

    async def scenario(_: Engine) -> None:
        engine = ray_harness.made()
        await engine.open(lambda _: None)
        try:
            await until(lambda: all(node.problem for node in engine.ledger.nodes()))
            waits = engine.ledger.reserve("job", Compute())
            assert waits is not None
            assert "install the same version on both" in waits
        finally:
            await engine.close()

    ray_harness.run(scenario)


def test_a_cluster_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        engine = RayEngine(tmp_path, "127.0.0.1:1", "nobody")
        with pytest.raises(StartupError, match="nothing answers there"):
            await engine.open(lambda _: None)

    asyncio.run(main())


def test_a_cluster_that_hangs_is_given_up_after_a_time(
    ray_harness: RayHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "JOIN_TIMEOUT_S", 4)

    async def main() -> None:
        engine = RayEngine(tmp_path / "jobs", ray_harness.shared.cluster.address, "nobody")
        with pytest.raises(StartupError, match="it did not answer within 4 s"):
            await engine.open(lambda _: None)

    with ray_harness.shared.cluster.head_stopped():
        asyncio.run(main())


def test_without_ray_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StartupError, match=r"pip install 'cortex-tasks\[ray\]'"):
        asyncio.run(RayEngine(tmp_path, "127.0.0.1:1", "nobody").open(lambda _: None))


DAEMON = """
    import os, signal, time
    def task(config):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.write(1, f"daemon {os.getpid()}\\n".encode())  # at once: another process writes, too
                time.sleep(300)
            os._exit(0)
        os.wait()
        os.write(1, b"ready\\n")
        time.sleep(300)
"""


def test_a_lost_node_loses_its_jobs_and_leaves_no_process(ray_harness: RayHarness) -> None:
    cluster = ray_harness.shared.cluster

    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.attempt(DAEMON)
        assert isinstance(engine, RayEngine)
        await ray_harness.start_on("second", engine, attempt)
        await ray_harness.printed(attempt, "ready")
        daemon = await ray_harness.number_after(attempt, "daemon")
        cluster.kill("second")
        lost = await ray_harness.last(attempt)
        assert isinstance(lost, Lost)
        assert re.fullmatch(r"the node \S+ was lost", lost.reason)
        assert "ready" in ray_harness.log(attempt), "what was written is kept"
        await until(lambda: not exists(daemon))
        await until(lambda: len(engine.ledger.nodes()) == 1)

    ray_harness.grace_s = 0.3
    ray_harness.run(scenario)


def test_when_the_head_dies_and_comes_back_every_job_is_told_as_it_is(
    ray_harness: RayHarness,
) -> None:
    cluster = ray_harness.shared.cluster

    async def scenario(engine: Engine) -> None:
        running = ray_harness.sleeper()
        await ray_harness.start(engine, running)
        await ray_harness.started(running)
        await ray_harness.printed(running, "pid")
        cluster.kill_head()
        await ray_harness.unreachable(running)
        await until(lambda: not cluster.raylets_left())
        pid = int(ray_harness.log(running).split()[1])
        await until(lambda: not exists(pid))
        await asyncio.to_thread(cluster.start_head)
        lost = await ray_harness.last(running)
        assert isinstance(lost, Lost)
        assert re.fullmatch(r"the node \S+ was lost", lost.reason)
        await ready(engine, 1)
        ray_harness.go()
        attempt = ray_harness.attempt("def task(config): return 1")
        assert (await ray_harness.outcome(engine, attempt)).result == 1
        # The folder of the node that was lost is used again, for what had been built there.
        assert sorted(each.name for each in ray_harness.shared.nodes.glob("[0-9]*")) == ["0", "1"]
        told = [seen for seen in ray_harness.seen if not isinstance(seen, CapacityFreed)]
        of_the_lost = [type(seen) for seen in told if seen.job_id == running.spec.job_id]
        assert of_the_lost == [Started, Unreachable, Lost]

    ray_harness.run(scenario)
