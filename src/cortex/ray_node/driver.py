"""Ray's driver, a process: `python -m cortex.ray_node.driver FD ADDRESS NAMESPACE NODE_DIR`.

The Ray engine's link starts it, and sends requests through the inherited socket. The process ends
when the socket closes. Agents are detached actors, and reservations are detached placement groups:
Ray finds both by name. The demand of waiting jobs alone belongs to the process, and ends with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pickle
import socket
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cortex.engines.base import NOTHING
from cortex.engines.ray.link import HEAD, Answer, NotSent
from cortex.engines.ray.messages import NodeState, Refusal, Wanted
from cortex.engines.ray.ray_errors import explain
from cortex.errors import InvalidProject
from cortex.projects.pack import pack_stored
from cortex.ray_node import reservations
from cortex.ray_node.agent import Agent
from cortex.ray_node.demand import Demand

T = TypeVar("T")
_MAX_THREADS = 64
_MAX_DETAIL = 16000
_FAILURES = {
    "call_agent": "the call to its agent failed",
    "pack_project": "the project cannot be packed",
    "release_lost": "Ray does not release the reservations of lost nodes",
    "demand": "Ray does not take the demand of waiting jobs",
    "end_agent": "its agent cannot be ended",
    "node_states": "Ray does not list its nodes",
}
"""What the failure of a request means, by its method."""
# Ray raises a plain RuntimeError where the cluster has other versions of Ray or Python.
_OTHER_VERSIONS = "Version mismatch"


class Driver:
    """Carries out the requests, each of which names a public method."""

    def __init__(self, namespace: str, node_dir: str) -> None:
        self._namespace = namespace
        self._node_dir = node_dir
        self._agents: dict[str, ActorHandle[Agent]] = {}
        self._demand = Demand()
        self._threads = ThreadPoolExecutor(_MAX_THREADS)

    async def node_states(self) -> tuple[NodeState, ...]:
        """The nodes of the cluster."""
        return await self._in_thread(reservations.node_states)

    async def release_lost(self) -> None:
        """Release the reservations of this operator on nodes that have left the cluster."""
        await self._in_thread(reservations.release_lost, f"{self._namespace}:")

    async def end_agent(self, node_id: str) -> None:
        """Kill a node's agent, whose jobs continue. The next call makes another."""
        agent = await self._agent(node_id)
        await self._in_thread(partial(ray.kill, agent, no_restart=True))
        self.forget_agent(node_id)

    async def demand(self, wanted: tuple[Wanted, ...]) -> None:
        """Replace the capacity for which this driver waits in Ray."""
        await self._in_thread(self._demand.replace, wanted)

    async def call_agent(
        self, node_id: str, method: str, arguments: tuple[object, ...], timeout_s: float
    ) -> object:
        """Call a method of a node's agent.

        Raises:
            NotSent: Ray has no agent on the node, and cannot start one now.
        """
        try:
            agent = await self._agent(node_id)
        except Exception as error:
            raise NotSent(f"cannot find or start its agent: {explain(error)}") from error
        call = getattr(agent, method).remote(*arguments)
        return await asyncio.wait_for(call, timeout_s)

    async def own_address(self) -> str:
        """The address under which this machine takes part in the cluster."""
        return str(get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray types a part of itself

    async def pack_project(self, folder: str, target: str) -> tuple[int, str]:
        """Pack a project into a file; its size in bytes, and its SHA-256."""
        return await self._in_thread(_pack, Path(folder), Path(target))

    def forget_agent(self, node_id: str) -> None:
        """Drop a dead agent. The next request finds it restarted, or makes another."""
        self._agents.pop(node_id, None)

    async def _agent(self, node_id: str) -> Any:
        if node_id not in self._agents:
            self._agents[node_id] = await self._in_thread(self._find_or_create_agent, node_id)
        return self._agents[node_id]

    def _find_or_create_agent(self, node_id: str) -> Any:
        remote = ray.remote(Agent).options(
            name=f"cortex-agent-{node_id}",
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        states = reservations.node_states()
        total = next((state.total for state in states if state.node_id == node_id), NOTHING)
        raylet = reservations.raylet_address(node_id)
        return remote.remote(self._namespace, node_id, self._node_dir, total, raylet)

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(work, *arguments)
        )


def _pack(folder: Path, target: Path) -> tuple[int, str]:
    with target.open("r+b") as file:
        pack_stored(folder, file)
        size = file.tell()
        file.seek(0)
        return size, hashlib.file_digest(file, "sha256").hexdigest()


async def answer(driver: Driver, method: str, arguments: tuple[object, ...]) -> Answer:
    """Carry out a request; the response, with the reason of a failure."""
    work: Callable[..., Awaitable[object]] = getattr(driver, method)
    try:
        return Answer(await work(*arguments))
    except NotSent as error:
        return Answer(unreachable=str(error), detail=_detail(error.__cause__), is_sent=False)
    except ActorUnavailableError as error:
        return _unreachable("its agent does not answer", error)
    except RayActorError as error:
        driver.forget_agent(str(arguments[0]))
        return _unreachable("its agent has died", error)
    except Exception as error:  # after any other exception, the outcome is unknown
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, Refusal | InvalidProject):
            return Answer(refused=str(cause), detail=_detail(cause.__cause__))
        return _unreachable(_FAILURES.get(method, f"{method} failed"), error, cause)


def _unreachable(failure: str, error: Exception, cause: Exception | None = None) -> Answer:
    reason = f"{failure}: {explain(cause or error)}"
    return Answer(unreachable=reason, detail=_detail(error))


def _detail(error: BaseException | None) -> str | None:
    """The whole text of an error, for the operator's log."""
    return None if error is None else f"{type(error).__name__}: {error}"[:_MAX_DETAIL]


async def serve(sock: socket.socket, driver: Driver) -> None:
    """Answer requests until the operator closes its end.

    Raises:
        IncompleteReadError, ConnectionError: the operator has closed its end.
    """
    reader, writer = await asyncio.open_connection(sock=sock)
    tasks: set[asyncio.Task[None]] = set()

    async def respond(number: int, data: bytes) -> None:
        method, arguments = pickle.loads(data)
        _send(writer, number, await answer(driver, method, arguments))

    _send(writer, 0, Answer())
    while True:
        length, number = HEAD.unpack(await reader.readexactly(HEAD.size))
        task = asyncio.create_task(respond(number, await reader.readexactly(length)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _send(writer: asyncio.StreamWriter, number: int, response: Answer) -> None:
    data = pickle.dumps(response)
    writer.write(HEAD.pack(len(data), number) + data)


def _not_joined(error: Exception) -> Answer:
    reason, detail = explain(str(error)), _detail(error)
    if not str(error).lstrip().startswith(_OTHER_VERSIONS):
        return Answer(unreachable=reason, detail=detail)
    return Answer(
        refused=f"{reason}. Install the same versions of Ray and Python on this machine and on all "
        "nodes",
        detail=detail,
    )


def main() -> None:
    fd, address, namespace, node_dir = sys.argv[1:]
    sock = socket.socket(fileno=int(fd))
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # the operator reports any of them
        data = pickle.dumps(_not_joined(error))
        sock.sendall(HEAD.pack(len(data), 0) + data)
        os._exit(1)
    try:
        asyncio.run(serve(sock, Driver(namespace, node_dir)))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the operator has closed its end
    finally:
        os._exit(0)  # threads that wait for Ray must not delay the exit


if __name__ == "__main__":
    main()
