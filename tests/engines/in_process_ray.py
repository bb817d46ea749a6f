"""A cluster of one node without Ray: its agent is in this process, and Ray's part (which nodes there are, who
holds a seat) is what the test says. Engine, agent, driver's answers, guard and jobs are the real ones.
"""

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
    """Ray's part of a node, and the link to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(NAMESPACE, str(folder))
        self.states = [STATE]
        self.seats: set[str] = set()
        self.agent: Agent | None = None
        self.is_cut_off = False
        self.before: dict[str, Callable[[], Coroutine[object, object, None]]] = {}
        """What happens before an agent is asked for something, by its name."""
        self.asked: list[str] = []
        self._calls: set[asyncio.Task[object]] = set()

    async def node_states(self) -> tuple[NodeState, ...]:
        return tuple(self.states)

    async def reserve(self, seat: Reservation, within_s: float) -> tuple[int, ...]:
        self.seats.add(seat.name)
        return ()

    async def release(self, name: str) -> None:
        self.seats.discard(name)

    async def send_project(self, node_id: str, project_id: str, folder: str) -> None:
        packed = io.BytesIO()
        pack_stored(Path(folder), packed)
        await self.call_agent(node_id, "unpack", (project_id, packed.getvalue()), 60)

    async def call_agent(
        self, node_id: str, method: str, arguments: tuple[object, ...], within_s: float
    ) -> object:
        self.asked.append(method)
        if method in self.before:
            await self.before[method]()
        if self.agent is None:
            self.agent = Agent(NAMESPACE, node_id, self._node_dir, STATE.total)
        agent = self.agent
        work = getattr(agent, method)(*pickle.loads(pickle.dumps(arguments)))
        call = asyncio.create_task(work)
        self._calls.add(call)
        try:
            done, _ = await asyncio.wait({call}, timeout=within_s)
            if not done:
                raise TimeoutError
            if agent is not self.agent:
                raise RuntimeError("its agent is gone")
            return call.result()
        finally:
            self._calls.discard(call)

    async def kill_agent(self) -> None:
        """All that is left of an agent's process when it is gone: nothing."""
        agent, self.agent = self.agent, None
        if agent is not None:
            tasks = [*agent._tasks, *self._calls]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await agent._engine.close()
            await agent._logs.close()
            agent._agent_folder._lock.close()


class InProcessLink:
    """What an engine has of it."""

    def __init__(self, ray: InProcessRay) -> None:
        self._ray = ray
        self.closed = asyncio.Event()

    async def call(self, method: str, *arguments: object, timeout_s: float) -> object:
        if self._ray.is_cut_off:
            raise LinkError("cut off")
        told = await asyncio.wait_for(answer(self._ray, method, arguments), timeout_s)
        if told.unreachable is not None:
            raise LinkError(told.unreachable)
        if told.refused is not None:
            raise Refused(told.refused)
        return told.value

    async def close(self) -> None:
        self.closed.set()


class InProcessHarness(EngineHarness):
    """One test's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None)
        self.ray = InProcessRay(folder / "nodes")
        self.locks: Any = None

    def made(self) -> RayEngine:
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
    def slot(self) -> Path:
        return self.root.parent / "nodes" / NAMESPACE / "0"

    def folder(self, attempt: Attempt) -> Path:
        return self.slot / "jobs" / attempt.spec.job_id

    def lost(self) -> None:
        """The node is not there any more."""
        self.ray.states = [replace(STATE, is_alive=False)]


async def ready(engine: Engine) -> None:
    end = time.monotonic() + LIMIT_S
    while not any(node.is_ready for node in engine.ledger.nodes()):
        assert time.monotonic() < end, engine.ledger.nodes()
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def in_process_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    """One whose raylet is a process that does nothing: the guard waits for its end."""
    made = InProcessHarness(folder)
    raylet = subprocess.Popen(["sleep", "600"])
    monkeypatch.setenv("RAY_RAYLET_PID", str(raylet.pid))
    monkeypatch.setattr(reservations, "release", made.ray.seats.discard)
    try:
        yield made
    finally:
        raylet.kill()
        raylet.wait()
        end = time.monotonic() + LIMIT_S
        while processes(str(folder), []) and time.monotonic() < end:
            time.sleep(0.02)
        assert processes(str(folder), []) == []
