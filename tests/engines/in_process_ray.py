"""A cluster of one node without Ray: its agent is in this process, and the test sets Ray's part
(the nodes, the reservations). The engine, the agent, the driver's answers, the guard and the
jobs are real."""

from __future__ import annotations

import asyncio
import contextlib
import io
import pickle
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cortex.engines.base import Attempt, Capacity, Engine
from cortex.engines.ray import RayEngine
from cortex.engines.ray.link import LinkError, Refused
from cortex.engines.ray.messages import NodeState, Reservation
from cortex.projects.pack import pack_stored
from cortex.ray_node import reservations
from cortex.ray_node.agent import Agent
from cortex.ray_node.driver import Driver, answer
from engines.engine_harness import LIMIT_S, EngineHarness, processes

NAMESPACE = "near"
GIB = 1 << 30
STATE = NodeState("node-a", "a", True, Capacity(4000, 8 * GIB, 0), Capacity(0, 0, 0))


class InProcessRay(Driver):
    """Ray's part of the cluster, which the real driver class would ask Ray for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(NAMESPACE, str(folder))
        self.states = [STATE]
        self.reservations: set[str] = set()
        self.agent: Agent | None = None
        self.is_cut_off = False
        self.before_call: dict[str, Callable[[], Coroutine[object, object, None]]] = {}
        """Coroutines to run before a call to the agent, by the name of the agent's method."""
        self.calls: list[str] = []
        """The names of the agent's methods that were called."""
        self._running_calls: set[asyncio.Task[object]] = set()

    async def node_states(self) -> tuple[NodeState, ...]:
        return tuple(self.states)

    async def reserve(self, seat: Reservation, within_s: float) -> tuple[int, ...]:
        self.reservations.add(seat.name)
        return ()

    async def release(self, name: str) -> None:
        self.reservations.discard(name)

    async def send_project(self, node_id: str, project_id: str, folder: str) -> None:
        packed = io.BytesIO()
        pack_stored(Path(folder), packed)
        await self.call_agent(node_id, "unpack", (project_id, packed.getvalue()), 60)

    async def call_agent(
        self, node_id: str, method: str, arguments: tuple[object, ...], within_s: float
    ) -> object:
        self.calls.append(method)
        if method in self.before_call:
            await self.before_call[method]()
        if self.agent is None:
            self.agent = Agent(NAMESPACE, node_id, self._node_dir, STATE.total)
        agent = self.agent
        work = getattr(agent, method)(*pickle.loads(pickle.dumps(arguments)))
        call = asyncio.create_task(work)
        self._running_calls.add(call)
        try:
            done, _ = await asyncio.wait({call}, timeout=within_s)
            if not done:
                raise TimeoutError
            if agent is not self.agent:
                raise RuntimeError("its agent was killed")
            return call.result()
        finally:
            self._running_calls.discard(call)

    async def kill_agent(self) -> None:
        """End everything in this process that would die with the agent's own process."""
        agent, self.agent = self.agent, None
        if agent is not None:
            tasks = [*agent._tasks, *self._running_calls]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await agent._engine.close()
            await agent._logs.close()
            agent._agent_folder._lock.close()


class InProcessLink:
    """The engine's link to an `InProcessRay`."""

    def __init__(self, ray: InProcessRay) -> None:
        self._ray = ray
        self.closed = asyncio.Event()

    async def call(self, method: str, *arguments: object, timeout_s: float) -> object:
        if self._ray.is_cut_off:
            raise LinkError("cut off")
        response = await asyncio.wait_for(answer(self._ray, method, arguments), timeout_s)
        if response.unreachable is not None:
            raise LinkError(response.unreachable)
        if response.refused is not None:
            raise Refused(response.refused)
        return response.value

    async def close(self) -> None:
        self.closed.set()


class InProcessHarness(EngineHarness):
    """The project, the jobs and the node of one test."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None)
        self.ray = InProcessRay(folder / "nodes")
        self.locks: Any = None

    def new_engine(self) -> RayEngine:
        engine = RayEngine(self.root, "near:1", NAMESPACE, self.grace_s, str(self.root), self.locks)

        async def open_link() -> InProcessLink:
            if self.ray.is_cut_off:
                raise LinkError("cut off")
            return InProcessLink(self.ray)

        engine._cluster._open_link = open_link  # type: ignore[assignment,method-assign]  # instead of Ray
        return engine

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        async with super().engine() as engine:
            await ready(engine)
            try:
                yield engine
            finally:
                await self.ray.kill_agent()

    @property
    def agent_folder(self) -> Path:
        return self.root.parent / "nodes" / NAMESPACE / "0"

    def folder(self, attempt: Attempt) -> Path:
        return self.agent_folder / "jobs" / attempt.spec.job_id

    def lose_node(self) -> None:
        """Let the cluster report the node as dead."""
        self.ray.states = [replace(STATE, is_alive=False)]


async def ready(engine: Engine) -> None:
    end = time.monotonic() + LIMIT_S
    while not any(node.is_ready for node in engine.ledger.nodes()):
        assert time.monotonic() < end, engine.ledger.nodes()
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def in_process_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    """A harness whose raylet only sleeps: the guard waits for the end of the raylet."""
    made = InProcessHarness(folder)
    raylet = subprocess.Popen(["sleep", "600"])
    monkeypatch.setenv("RAY_RAYLET_PID", str(raylet.pid))
    monkeypatch.setattr(reservations, "release", made.ray.reservations.discard)
    try:
        yield made
    finally:
        raylet.kill()
        raylet.wait()
        end = time.monotonic() + LIMIT_S
        while processes(str(folder), []) and time.monotonic() < end:
            time.sleep(0.02)
        assert processes(str(folder), []) == []
