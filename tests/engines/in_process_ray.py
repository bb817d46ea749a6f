"""A cluster of one node without Ray: its agent is in this process, and the test sets Ray's part
(the nodes, the reservations). The engine, the agent and the connection between them, the driver's
answers, the guard and the jobs are real."""

from __future__ import annotations

import asyncio
import contextlib
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
from cortex.engines.ray.link import Answer, LinkError, NotSent, Refused
from cortex.engines.ray.messages import Drain, NodeState, Wanted
from cortex.ray_node import reservations
from cortex.ray_node.agent import Agent
from cortex.ray_node.driver import Driver, answer
from cortex.ray_node.server import AgentServer
from engines.engine_harness import LIMIT_S, EngineHarness, processes

NAMESPACE = "near"
GIB = 1 << 30
STATE = NodeState("node-a", "a", True, Capacity(4000, 8 * GIB, 0), Capacity(0, 0, 0))


class InProcessRay(Driver):
    """Ray's part of the cluster, which the real driver class would ask Ray for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(NAMESPACE, str(folder))
        self.states = [STATE]
        self.reservations: dict[str, reservations.Reservation] = {}
        self.has_capacity = True
        """Whether Ray makes reservations; else others have taken the node's capacity."""
        self.raylet_hangs = False
        self._raylet: asyncio.Server | None = None
        self._creating = asyncio.Lock()
        self.agent: Agent | None = None
        self.is_cut_off = False
        self.before_call: dict[str, Callable[[], Coroutine[object, object, None]]] = {}
        """Coroutines to run before a call to the agent, by the name of the agent's method."""
        self.calls: list[str] = []
        """The names of the agent's methods that were called."""
        self.called_nodes: set[str] = set()
        """The nodes of whose agents one was requested."""
        self.demands: list[tuple[Wanted, ...]] = []
        self.demand_failures: list[Exception] = []
        self._kill: asyncio.Task[None] | None = None

    async def node_states(self) -> tuple[NodeState, ...]:
        return tuple(self.states)

    async def release_lost(self) -> None:
        alive = {state.node_id for state in self.states if state.is_alive}
        for name in list(self.reservations):
            if name.split(":")[1] not in alive and self.reservations[name].node_id not in alive:
                del self.reservations[name]

    async def end_agent(self, node_id: str) -> None:
        await self.kill_agent()

    def create(self, name: str, node_id: str, amount: Capacity, timeout_s: float) -> bool:
        self.reservations[name] = reservations.Reservation(
            name, amount, self.has_capacity, node_id if self.has_capacity else ""
        )
        return self.has_capacity

    def find(self, name: str) -> reservations.Reservation | None:
        if name in self.reservations and self.has_capacity:
            self.reservations[name] = replace(
                self.reservations[name], is_created=True, node_id=STATE.node_id
            )
        return self.reservations.get(name)

    def existing(self, prefix: str) -> list[reservations.Reservation]:
        return [each for name, each in self.reservations.items() if name.startswith(prefix)]

    def release(self, name: str) -> None:
        self.reservations.pop(name, None)

    def reserved_gpus(self, name: str, count: int, timeout_s: float) -> tuple[int, ...]:
        return tuple(range(count))

    async def call_agent(
        self, node_id: str, method: str, arguments: tuple[object, ...], within_s: float
    ) -> object:
        self.called_nodes.add(node_id)
        async with self._creating:
            if self.agent is None:
                raylet = await self._start_raylet()
                total = self.states[0].total
                self.agent = Agent(NAMESPACE, node_id, self._node_dir, total, raylet)
                self.agent._server = ObservedServer(self.agent, self)
        await self.on_call(method)
        work = getattr(self.agent, method)(*pickle.loads(pickle.dumps(arguments)))
        return await asyncio.wait_for(work, within_s)

    async def on_call(self, method: str) -> None:
        self.calls.append(method)
        if method in self.before_call:
            await self.before_call[method]()

    async def _start_raylet(self) -> tuple[str, int]:
        """Accept connections as a raylet does; its address."""

        async def settings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                if not self.raylet_hangs:
                    writer.write(b"settings")
                await reader.read()
            writer.transport.abort()

        if self._raylet is None:
            self._raylet = await asyncio.start_server(settings, "127.0.0.1", 0)
        host, port = self._raylet.sockets[0].getsockname()
        return host, port

    def close(self) -> None:
        if self._raylet is not None:
            self._raylet.close()
            self._raylet = None

    async def demand(self, wanted: tuple[Wanted, ...]) -> None:
        if self.demand_failures:
            raise self.demand_failures.pop()
        self.demands.append(wanted)

    async def kill_agent(self) -> None:
        """End everything in this process that would die with the agent's own process. That does not
        end halfway, even if the caller is cancelled: the guard would kill this process."""
        if self._kill is None or self._kill.done():
            self._kill = asyncio.create_task(self._kill_agent())
        await asyncio.shield(self._kill)

    async def _kill_agent(self) -> None:
        agent, self.agent = self.agent, None
        if agent is not None:
            connections = list(agent._server._connections)
            tasks = [*agent._tasks, *(task for each in connections for task in each._tasks)]
            await agent._server.close()
            # A test may kill the agent within a call to it.
            tasks = [task for task in tasks if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await agent._engine.close()
            await agent._logs.close()
            await agent._checkpoints.close()
            await agent._reservations.close()
            await agent._raylet.close()
            agent._agent_folder._lock.close()
        self.close()


class ObservedServer(AgentServer):
    """The server of the agent, whose calls the test observes and delays."""

    def __init__(self, agent: Agent, ray: InProcessRay) -> None:
        super().__init__(agent)
        self._ray = ray

    async def carry_out(self, method: str, arguments: tuple[object, ...]) -> Answer:
        await self._ray.on_call(method)
        if self._ray.agent is not self._agent:
            return Answer(unreachable="its agent was killed")
        return await super().carry_out(method, arguments)


class InProcessLink:
    """The engine's link to an `InProcessRay`."""

    def __init__(self, ray: InProcessRay) -> None:
        self._ray = ray
        self.closed = asyncio.Event()

    async def call(self, method: str, *arguments: object, timeout_s: float) -> object:
        if self.closed.is_set():
            raise NotSent("the link was closed")
        if self._ray.is_cut_off:
            raise LinkError("cut off")
        try:
            # In Python 3.11 `asyncio.wait_for` may swallow a cancellation.
            async with asyncio.timeout(timeout_s):
                response = await answer(self._ray, method, arguments)
        except TimeoutError:
            raise LinkError(f"the Ray cluster did not answer within {timeout_s:g} s") from None
        if response.unreachable is not None:
            raise (LinkError if response.is_sent else NotSent)(response.unreachable)
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
        self.checkpoints: Any = None
        self.has_autoscaler = False

    def new_engine(self) -> RayEngine:
        engine = RayEngine(
            self.root,
            "near:1",
            NAMESPACE,
            self.grace_s,
            str(self.root),
            self.locks,
            checkpoints=self.checkpoints,
            has_autoscaler=self.has_autoscaler,
        )

        async def open_link() -> InProcessLink:
            if self.ray.is_cut_off:
                raise LinkError("cut off")
            return InProcessLink(self.ray)

        engine._cluster._open_link = open_link  # type: ignore[assignment,method-assign]  # instead of Ray
        return engine

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        try:
            async with super().engine() as engine:
                await ready(engine)
                try:
                    yield engine
                finally:
                    await self.ray.kill_agent()
        finally:
            self.ray.close()

    @property
    def agent_folder(self) -> Path:
        return self.root.parent / "nodes" / NAMESPACE / "0"

    def folder(self, attempt: Attempt) -> Path:
        return self.agent_folder / "jobs" / attempt.spec.job_id

    def lose_node(self, death: str = "") -> None:
        """Let the cluster report the node as dead."""
        self.ray.states = [replace(STATE, is_alive=False, death=death)]

    def drain_node(self, left_s: float | None) -> None:
        """Let the cluster report the node as being drained, with these seconds until its end."""
        self.ray.states = [replace(STATE, drain=Drain(left_s))]

    async def replace_node(self, engine: Engine, before: str, name: str) -> None:
        """Lose the only node, and join another one, with an agent and a folder of its own."""
        await self.ray.kill_agent()
        lost = replace(STATE, node_id=f"node-{before}", name=before, is_alive=False)
        self.ray.states = [lost, replace(STATE, node_id=f"node-{name}", name=name)]
        end = time.monotonic() + LIMIT_S
        while [each.name for each in engine.ledger.nodes() if each.is_ready] != [name]:
            assert time.monotonic() < end, engine.ledger.nodes()
            await asyncio.sleep(0.01)


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
    for name in ("create", "find", "existing", "release", "reserved_gpus"):
        monkeypatch.setattr(reservations, name, getattr(made.ray, name))
    try:
        yield made
    finally:
        raylet.kill()
        raylet.wait()
        end = time.monotonic() + LIMIT_S
        while processes(str(folder), []) and time.monotonic() < end:
            time.sleep(0.02)
        assert processes(str(folder), []) == []
