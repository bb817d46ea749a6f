"""The promises of the Ray engine when a part of the cluster dies or hangs, or when other programs
use it.

The cluster is real, and the tests kill its processes. The last two tests leave it with one node.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from cortex.engines.base import (
    Attempt,
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
from cortex.engines.ray import RayEngine, transfers
from cortex.engines.ray import cluster as ray_cluster
from cortex.errors import StartupError
from cortex.joblog.reader import Log, read
from cortex.spec.api import Compute
from engines.engine_harness import LIMIT_S, exists, until
from engines.ray_harness import RayHarness, agent_pid, ready

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]
MIB = 1 << 20


def test_a_killed_agent_ends_no_job(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        os.kill(ray_harness.agent_of(attempt), signal.SIGKILL)
        await ray_harness.unreachable(attempt)
        await ray_harness.observed(attempt, Reachable)
        ray_harness.finish_sleeper()
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


def test_an_end_while_the_cluster_was_unreachable_is_reported_afterwards(
    ray_harness: RayHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        with ray_harness.hanging_cluster(engine):
            unreachable = await ray_harness.unreachable(attempt)
            assert unreachable.reason
            ray_harness.finish_sleeper()
            await until((ray_harness.folder(attempt) / "exit.1").exists)
            assert not any(isinstance(each, Ended) for each in ray_harness.observations)
        assert (await ray_harness.ended(attempt)).result == "done"
        assert "pid" in ray_harness.log(attempt)

    ray_harness.run(scenario)


def test_a_job_that_still_runs_is_reported_as_reachable_again(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.sleeper()
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        assert isinstance(engine, RayEngine)
        assert engine._cluster._link is not None
        assert engine._cluster._link._process is not None
        # Ray kills a driver that was cut off from its cluster for long.
        engine._cluster._link._process.kill()
        await ray_harness.unreachable(attempt)
        await ray_harness.observed(attempt, Reachable)
        ray_harness.finish_sleeper()
        assert (await ray_harness.ended(attempt)).result == "done"
        assert sum(isinstance(each, Unreachable) for each in ray_harness.observations) == 1

    ray_harness.run(scenario)


def test_a_job_waits_for_capacity_that_others_have_taken(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        async with ray_harness.foreign_reservations(cpus=8):
            await until(lambda: all(node.free.cpu_m == 0 for node in engine.ledger.nodes()))
            assert (
                engine.ledger.reserve("job", Compute(cpu_m=500))
                == "needs 0.5 CPU, 0 free on one node"
            )
            ray_harness.observations.clear()
        await until(lambda: CapacityFreed() in ray_harness.observations)
        assert engine.ledger.reserve("job", Compute(cpu_m=500)) is None
        engine.ledger.release("job")

    ray_harness.run(scenario)


def test_a_hanging_raylet_stops_no_start_on_another_node(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        second = engine.ledger.alive[ray_harness.shared.cluster.node_id("second")]
        sleeper = ray_harness.sleeper()
        await ray_harness.start_on("second", engine, sleeper)
        await ray_harness.printed(sleeper, "pid")
        # Ray's head would wait for a reservation that is being made as the raylet hangs.
        await until(lambda: second._held.cpu_m >= sleeper.version.api.compute.cpu_m)
        with ray_harness.shared.cluster.raylet_stopped(second.node_id):
            # Ray reserves GPUs on the head's node, and no reservation waits for the second node.
            await until(lambda: second.problem == "its raylet does not answer")
            for gpu in (0, 1):
                await ray_harness.outcome(engine, ray_harness.attempt("def task(_): pass", gpu=gpu))
        await until(lambda: second.is_ready)
        ray_harness.finish_sleeper()
        assert (await ray_harness.ended(sleeper)).result == "done"

    ray_harness.run(scenario)


def test_an_agent_that_is_replaced_ends_no_job(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        attempt = ray_harness.sleeper()
        await ray_harness.start_on("second", engine, attempt)
        await ray_harness.printed(attempt, "pid")
        pid = ray_harness.agent_of(attempt)
        node_id = ray_harness.shared.cluster.node_id("second")
        await engine._cluster.call_driver("end_agent", node_id)
        await until(lambda: ray_harness.agent_of(attempt) != pid)
        await ray_harness.observed(attempt, Reachable)
        ray_harness.finish_sleeper()
        assert (await ray_harness.ended(attempt)).result == "done"

    ray_harness.run(scenario)
    assert ray_harness.marker.read_text() == "ran\n"


def test_a_job_that_fits_no_node_is_refused_with_the_reason(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        assert engine.ledger.refusal(Compute(gpu=8)) == "needs 8 GPUs, the largest node has 2"
        assert engine.ledger.refusal(Compute(cpu_m=9000)) == "needs 9 CPU, the largest node has 8"
        assert (
            engine.ledger.refusal(Compute(mem=1 << 40)) == "needs 1 TiB, the largest node has 4 GiB"
        )
        assert engine.ledger.refusal(Compute(cpu_m=8000, gpu=2)) is None

    ray_harness.run(scenario)


def test_a_job_gets_the_gpus_that_ray_assigns(ray_harness: RayHarness) -> None:
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


def test_ray_reserves_the_capacity_of_a_job_until_its_end(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        before = await stable_taken_cpu_m(engine)
        attempt = ray_harness.sleeper(cpu_m=300)
        await ray_harness.start(engine, attempt)
        await ray_harness.printed(attempt, "pid")
        await wait_until_taken(engine, before, [0, 300])
        ray_harness.finish_sleeper()
        await ray_harness.ended(attempt)
        await wait_until_taken(engine, before, [0, 0])

    async def stable_taken_cpu_m(engine: Engine) -> list[int]:
        """The taken CPU once it is stable. Ray's figures lag, and at times Ray keeps a
        reservation that was released while it was being made. A reservation of an earlier job
        stays for two seconds."""
        figures = [await ray_harness.taken_cpu_m(engine)]
        while len(figures) < 80 or figures[-80:] != figures[-1:] * 80:
            await asyncio.sleep(0.05)
            figures.append(await ray_harness.taken_cpu_m(engine))
        return figures[-1]

    async def wait_until_taken(engine: Engine, before: list[int], expected: list[int]) -> None:
        until_s = time.monotonic() + LIMIT_S
        more: list[int] = []
        while more != expected:
            assert time.monotonic() < until_s, (before, more)
            await asyncio.sleep(0.05)
            now = await ray_harness.taken_cpu_m(engine)
            more = sorted(after - earlier for earlier, after in zip(before, now, strict=True))

    ray_harness.run(scenario)


def test_a_failed_build_is_reported_with_the_resolvers_output(
    ray_harness: RayHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        ray_harness.write("./no-such-1.0-py3-none-any.whl\n", "requirements.txt")
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.start(engine, attempt)
        lost = await ray_harness.final(attempt)
        assert isinstance(lost, Lost)
        assert lost.reason.startswith("the environment could not be built")
        assert "no-such-1.0" in ray_harness.log(attempt)

    ray_harness.run(scenario)


def require_package(ray_harness: RayHarness, backend: str) -> None:
    """Require a project whose build runs this code."""
    ray_harness.write(
        """
        [project]
        name = "package"
        version = "1"
        [build-system]
        requires = []
        build-backend = "backend"
        backend-path = ["."]
        """,
        "package/pyproject.toml",
    )
    ray_harness.write(backend, "package/backend.py")
    ray_harness.write("./package\n", "requirements.txt")


def require_endless_build(ray_harness: RayHarness) -> None:
    """Require a project whose build never ends."""
    require_package(ray_harness, "import time\ntime.sleep(300)\n")


def test_a_build_waits_while_the_disk_of_its_node_is_full(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        require_package(ray_harness, "import os\nraise OSError(28, os.strerror(28))\n")
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.start(engine, attempt)
        never = await ray_harness.final(attempt)
        assert isinstance(never, NeverStarted)
        assert never.held_up_by == "its node's disk is full, and the environment not built"

    ray_harness.run(scenario)


def test_the_timeout_ends_the_wait_for_an_environment(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        require_endless_build(ray_harness)
        attempt = ray_harness.attempt("def task(config): pass", timeout=1)
        await ray_harness.start(engine, attempt)
        assert isinstance(await ray_harness.final(attempt), NeverStarted)

    ray_harness.run(scenario)


def test_a_stop_while_the_environment_is_built_takes_effect_at_once(
    ray_harness: RayHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        require_endless_build(ray_harness)
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.start(engine, attempt)
        await until(lambda: list(ray_harness.shared.nodes.glob("*/environments/*/*/source")))
        engine.stop(attempt.spec.job_id)
        assert isinstance(await ray_harness.final(attempt), NeverStarted)

    ray_harness.run(scenario)


def test_the_copy_of_a_log_over_its_limit_is_cut(ray_harness: RayHarness) -> None:
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
        on_node = (ray_harness.folder(attempt) / "log").stat()
        assert offset == on_node.st_size

    ray_harness.run(scenario)


def test_forgotten_jobs_are_removed_from_the_nodes(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = ray_harness.attempt("def task(config): pass")
        await ray_harness.outcome(engine, attempt)
        folder = ray_harness.folder(attempt)
        assert folder.exists()
        engine.forget(jobs=[attempt.spec.job_id])
        await until(lambda: not folder.exists())

    ray_harness.run(scenario)


def test_a_cluster_that_hangs_at_the_start_is_joined_when_it_answers(
    ray_harness: RayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "JOIN_TIMEOUT_S", 4)
    monkeypatch.setattr(ray_cluster, "OPEN_TIMEOUT_S", 1)

    async def main() -> None:
        ray_harness.changed = asyncio.Event()
        engine = ray_harness.new_engine()
        try:
            with ray_harness.shared.cluster.head_stopped():
                await engine.open(ray_harness.report)
                assert "it did not answer within 1 s" in str(engine.capabilities.problem)
                waits = "which cannot be joined: it did not answer within 4 s"
                await until(lambda: waits in str(engine.ledger.lacks(Compute())))
                monkeypatch.undo()
            await ready(engine)
            assert engine.ledger.reserve("job", Compute()) is None
        finally:
            await engine.close()

    asyncio.run(main())


def test_another_version_of_ray_is_an_error_at_the_start(ray_harness: RayHarness) -> None:
    async def main() -> None:
        engine = ray_harness.new_engine()
        with pytest.raises(
            StartupError, match=r"the cluster has Ray 1\.0\.0 .* Install the same versions of Ray"
        ):
            await engine.open(ray_harness.report)
        await engine.close()

    with ray_harness.shared.cluster.other_versions():
        asyncio.run(main())


def test_without_ray_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StartupError, match=r"pip install 'cortex-tasks\[ray\]'"):
        asyncio.run(RayEngine(tmp_path, "127.0.0.1:1", "unused-namespace").open(lambda _: None))


def large_project(ray_harness: RayHarness) -> tuple[Attempt, str]:
    """A job of a project of 50 MB, and the SHA-256 that it returns."""
    data = random.randbytes(50 * 1_000_000)
    (ray_harness.project / "data").write_bytes(data)
    attempt = ray_harness.attempt(
        """
        import hashlib
        def task(config):
            with open("data", "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()
        """
    )
    return attempt, hashlib.sha256(data).hexdigest()


def test_a_large_project_arrives(ray_harness: RayHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt, digest = large_project(ray_harness)
        assert (await ray_harness.outcome(engine, attempt)).result == digest
        assert re.search(r"\(\d+ of 50 MB\)", "".join(ray_harness.wait_reasons))

    ray_harness.run(scenario)


def test_a_large_project_arrives_although_its_agent_is_killed_meanwhile(
    ray_harness: RayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STALL_TIMEOUT_S", LIMIT_S)

    def arriving() -> list[Path]:
        return [
            path
            for path in ray_harness.shared.nodes.glob("*/projects/.incoming-*")
            if path.is_file() and path.stat().st_size > MIB
        ]

    async def scenario(engine: Engine) -> None:
        attempt, digest = large_project(ray_harness)
        await ray_harness.start(engine, attempt)
        await until(arriving)
        os.kill(agent_pid(arriving()[0].parents[1]), signal.SIGKILL)
        assert (await ray_harness.ended(attempt)).result == digest
        assert not arriving()

    ray_harness.run(scenario)


DAEMON = """
    import os, signal, time
    def task(config):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                # One write: another process writes to the same log.
                os.write(1, f"daemon {os.getpid()}\\n".encode())
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
        daemon = await ray_harness.number_in_log(attempt, "daemon")
        cluster.kill("second")
        lost = await ray_harness.final(attempt)
        assert isinstance(lost, Lost)
        assert re.fullmatch(r"the node \S+ was lost", lost.reason)
        assert "ready" in ray_harness.log(attempt), "the log of a lost node is incomplete"
        await until(lambda: not exists(daemon))
        await until(lambda: len(engine.ledger.nodes()) == 1)

    ray_harness.grace_s = 0.3
    ray_harness.run(scenario)


def test_after_the_head_died_and_came_back_every_job_has_its_right_status(
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
        await until(lambda: not cluster.live_raylets())
        pid = int(ray_harness.log(running).split()[1])
        await until(lambda: not exists(pid))
        await asyncio.to_thread(cluster.start_head)
        lost = await ray_harness.final(running)
        assert isinstance(lost, Lost)
        assert re.fullmatch(r"the node \S+ was lost", lost.reason)
        await ready(engine, 1)
        ray_harness.finish_sleeper()
        attempt = ray_harness.attempt("def task(config): return 1")
        assert (await ray_harness.outcome(engine, attempt)).result == 1
        # The next agent uses the folder of the lost node again, with the environments built
        # there.
        assert sorted(each.name for each in ray_harness.shared.nodes.glob("[0-9]*")) == ["0", "1"]
        of_jobs = [each for each in ray_harness.observations if not isinstance(each, CapacityFreed)]
        of_the_lost = [type(each) for each in of_jobs if each.job_id == running.spec.job_id]
        assert of_the_lost == [Started, Unreachable, Lost]

    ray_harness.run(scenario)
