"""The harness of the Ray engine. All tests of a test process share the cluster, the agents and
one open engine, because each takes seconds to start. Every test has its own jobs, projects and
environments."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cortex.engines.base import Attempt, Engine
from cortex.engines.ray import RayEngine
from engines.engine_harness import LIMIT_S, E, EngineHarness, processes, until
from engines.ray_cluster import RayCluster, cluster

NAMESPACE = "cortex-tests"
# Ray releases what it has reserved when it ends.
FOREIGN_PROGRAM = """
import sys
import ray
from ray.util import placement_group
address, cpus, *nodes = sys.argv[1:]
ray.init(address, namespace="others", logging_level="ERROR")
for node in nodes:
    group = placement_group([{"CPU": int(cpus)}], bundle_label_selector=[{"ray.io/node-id": node}])
    assert group.wait(60)
print("reserved", flush=True)
sys.stdin.read()
"""


@dataclass
class RaySession:
    """The parts that tests share. The loop does not run between tests."""

    folder: Path
    cluster: RayCluster
    runner: asyncio.Runner
    engine: RayEngine

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    @property
    def nodes(self) -> Path:
        """The parent of the agents' folders."""
        return self.folder / "nodes" / NAMESPACE


@contextlib.contextmanager
def open_session(folder: Path) -> Iterator[RaySession]:
    with cluster("second") as running, asyncio.Runner() as runner:
        engine = RayEngine(folder / "jobs", running.address, NAMESPACE, 5.0, str(folder / "nodes"))
        made = RaySession(folder, running, runner, engine)
        runner.run(_open(engine))
        try:
            yield made
        finally:
            runner.run(engine.close())
            running.shut_down()
            end = time.monotonic() + LIMIT_S
            while processes(str(folder), []) and time.monotonic() < end:
                time.sleep(0.1)
            assert processes(str(folder), []) == []


async def _open(engine: RayEngine) -> None:
    await engine.open(lambda _: None)
    await ready(engine)


async def ready(engine: Engine, count: int = 2) -> None:
    """Wait until the agents of `count` nodes answer."""
    await until(lambda: sum(node.is_ready for node in engine.ledger.nodes()) >= count, 180)


def agent_pid(agent_folder: Path) -> int:
    """The pid of the agent that has this folder."""
    return int((agent_folder / "lock").read_text())


class RayHarness(EngineHarness):
    """The project and the jobs of one test, on the shared cluster."""

    def __init__(self, folder: Path, shared: RaySession) -> None:
        super().__init__(folder, None)
        self.shared = shared
        self.root = shared.jobs
        self.kill_delays_s = [0.03]
        self._versions: set[str] = set()

    def run(self, scenario: Callable[[E], Awaitable[None]]) -> None:
        engine = self.shared.engine
        attempts = engine._attempts
        attempts._report, attempts._calls.grace_s = self.report, self.grace_s

        async def main() -> None:
            await scenario(cast(E, engine))

        self.changed = asyncio.Event()
        self.shared.runner.run(main())

    def new_engine(self) -> RayEngine:
        return RayEngine(*self.engine_arguments()[1])  # type: ignore[arg-type]

    def engine_arguments(self) -> tuple[str, tuple[object, ...]]:
        address, nodes = self.shared.cluster.address, str(self.shared.nodes.parent)
        return "ray", (self.root, address, NAMESPACE, self.grace_s, nodes)

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        async with super().engine() as engine:
            await ready(engine, 1)  # the tests that kill a node or the head leave one node
            yield engine

    def bare_environment(self, modules: Mapping[str, str]) -> None:
        """Let the nodes build an environment with these modules, from a wheel in the project."""
        name = "third-1.0-py3-none-any.whl"
        about = "third-1.0.dist-info"
        files = {
            **{f"{module}.py": code for module, code in modules.items()},
            f"{about}/METADATA": "Metadata-Version: 2.1\nName: third\nVersion: 1.0\n",
            f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        with zipfile.ZipFile(self.project / name, "w") as wheel:
            for path, content in files.items():
                wheel.writestr(path, content)
            wheel.writestr(f"{about}/RECORD", "".join(f"{path},,\n" for path in files))
        (self.project / "requirements.txt").write_text(f"./{name}\n")

    def attempt(self, *arguments: Any, **named: Any) -> Attempt:
        made = super().attempt(*arguments, **named)
        self._versions.add(made.version.api.api_id)
        return made

    def folder(self, attempt: Attempt) -> Path:
        return self._on_a_node(f"jobs/{attempt.spec.job_id}")

    def files(self, attempt: Attempt) -> Path:
        # More than one node may have the project; the job ran on the node that has the job's
        # folder.
        return self.folder(attempt).parents[1] / "projects" / attempt.version.api.project_id

    def agent_of(self, attempt: Attempt) -> int:
        """The pid of the agent that runs an attempt."""
        return agent_pid(self.folder(attempt).parents[1])

    async def start_on(self, name: str, engine: RayEngine, attempt: Attempt) -> None:
        """Start an attempt on the node of this raylet: the other nodes count as not ready."""
        wanted = self.shared.cluster.node_id(name)
        others = [n for n in engine.ledger.alive.values() if n.state.node_id != wanted]
        for node in others:
            node.is_ready = False
        await self.start(engine, attempt)
        for node in others:
            node.is_ready = True

    async def taken_cpu_m(self, engine: Engine) -> list[int]:
        """The CPU that Ray counts as taken on each node, in thousandths of a core."""
        assert isinstance(engine, RayEngine)
        states = await engine._cluster.call_driver("node_states")
        assert isinstance(states, tuple)
        return [state.taken.cpu_m for state in states if state.is_alive]

    @contextlib.asynccontextmanager
    async def foreign_reservations(self, cpus: int) -> AsyncIterator[None]:
        """Another program in the same cluster has reserved `cpus` cores of each node."""
        nodes = [node.state.node_id for node in self.shared.engine.ledger.alive.values()]
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FOREIGN_PROGRAM, self.shared.cluster.address, str(cpus), *nodes,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert program.stdout is not None
        try:
            assert await asyncio.wait_for(program.stdout.readline(), LIMIT_S) == b"reserved\n"
            yield
        finally:
            await program.communicate(b"")

    @contextlib.contextmanager
    def hanging_cluster(self, engine: Engine) -> Iterator[None]:
        """The cluster hangs, and the operator's link to it breaks."""
        assert isinstance(engine, RayEngine)
        assert engine._cluster._link is not None
        assert engine._cluster._link._process is not None
        with self.shared.cluster.head_stopped():
            engine._cluster._link._process.kill()
            yield

    def _on_a_node(self, below: str) -> Path:
        found = list(self.shared.nodes.glob(f"*/{below}"))
        return found[0] if found else self.shared.nodes / "0" / below

    def close(self) -> None:
        async def forget(engine: Engine) -> None:
            for api_id in self._versions:
                engine.forget(versions=[api_id])
            await asyncio.sleep(0.05)

        self.run(forget)

    def leftovers(self) -> list[str]:
        """The processes and control groups of this test's jobs."""
        found = [f"{pid}: {about}" for pid, about in processes("\0no folder", self.jobs)]
        for folder, names, _ in os.walk("/sys/fs/cgroup"):
            found += [f"{folder}/{name}" for name in names if any(job in name for job in self.jobs)]
        return found
