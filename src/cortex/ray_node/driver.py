"""Ray's driver, in a process of its own: `python -m cortex.ray_node.driver FD ADDRESS NAMESPACE NODE_DIR`.
The Ray engine's link starts it and sends it requests through the inherited socket; it ends with that.

It holds nothing: agents are detached actors, seats detached placement groups, both found by name.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cortex.engines.base import NOTHING
from cortex.engines.ray.link import HEAD, Answer
from cortex.engines.ray.messages import NodeState, Refusal, Reservation
from cortex.errors import InvalidProject
from cortex.projects.pack import pack_stored
from cortex.ray_node import reservations
from cortex.ray_node.agent import Agent
from cortex.worker.messages import shorten

T = TypeVar("T")
_THREADS = 64


class Driver:
    """Carries out requests; the names of its public methods are those of the requests."""

    def __init__(self, namespace: str, node_dir: str) -> None:
        self._namespace = namespace
        self._node_dir = node_dir
        self._agents: dict[str, ActorHandle[Agent]] = {}
        self._threads = ThreadPoolExecutor(_THREADS)
        # Their own: others may have taken what seats wait for, and a look that has to wait breaks the link.
        self._takers = ThreadPoolExecutor(_THREADS)

    async def look(self) -> tuple[NodeState, ...]:
        return await self._blocking(reservations.look)

    async def take_seat(self, seat: Reservation, within_s: float) -> tuple[int, ...]:
        until = time.monotonic() + within_s
        return await asyncio.get_running_loop().run_in_executor(self._takers, _take, seat, until)

    async def let_go(self, name: str) -> None:
        await self._blocking(reservations.let_go, name)

    async def ask(
        self, node_id: str, method: str, arguments: tuple[object, ...], within_s: float
    ) -> object:
        agent = await self._agent(node_id)
        call = getattr(agent, method).remote(*arguments)
        return await asyncio.wait_for(call, within_s)

    async def send_project(self, node_id: str, project_id: str, folder: str) -> None:
        packed = io.BytesIO()
        await self._blocking(pack_stored, Path(folder), packed)
        agent = await self._agent(node_id)
        # Through the object store: it may be too large for an argument.
        reference = await self._blocking(ray.put, packed.getvalue())
        await agent.unpack.remote(project_id, reference)

    def forget_agent(self, node_id: str) -> None:
        """The next request looks for it again, and makes one if it is dead for good."""
        self._agents.pop(node_id, None)

    async def _agent(self, node_id: str) -> Any:
        if node_id not in self._agents:
            self._agents[node_id] = await self._blocking(self._find_or_make, node_id)
        return self._agents[node_id]

    def _find_or_make(self, node_id: str) -> Any:
        remote = ray.remote(Agent).options(
            name=f"cortex-agent-{node_id}",
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        found = (state.total for state in reservations.look() if state.node_id == node_id)
        total = next(found, NOTHING)
        return remote.remote(self._namespace, node_id, self._node_dir, total)

    async def _blocking(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(work, *arguments)
        )


def _take(seat: Reservation, until: float) -> tuple[int, ...]:
    left_s = until - time.monotonic()
    if left_s <= 0:  # it was let go of before it was there: nobody would do so again
        raise reservations.Taken("too many wait for others to give back what its node had free")
    return reservations.take(seat, left_s)


async def answer(driver: Driver, method: str, arguments: tuple[object, ...]) -> Answer:
    """What came of a request, in words where it failed."""
    work: Callable[..., Awaitable[object]] = getattr(driver, method)
    try:
        return Answer(await work(*arguments))
    except ActorUnavailableError as error:
        return _unreachable("its agent does not answer", error)
    except RayActorError as error:
        driver.forget_agent(str(arguments[0]))
        return _unreachable("its agent is gone", error)
    except Exception as error:  # whatever it is, nobody knows what was done
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, Refusal | reservations.Taken | InvalidProject):
            return Answer(refused=str(cause))
        return _unreachable(f"{method} failed", cause)


def _unreachable(what: str, why: Exception) -> Answer:
    return Answer(unreachable=f"{what}: {shorten(str(why) or type(why).__name__, 300)}")


async def serve(sock: socket.socket, driver: Driver) -> None:
    """Answer requests until the operator's end closes."""
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


def _send(writer: asyncio.StreamWriter, number: int, told: Answer) -> None:
    data = pickle.dumps(told)
    writer.write(HEAD.pack(len(data), number) + data)


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
    except Exception as error:  # told to the operator, whatever it is
        data = pickle.dumps(Answer(unreachable=shorten(str(error), 300)))
        sock.sendall(HEAD.pack(len(data), 0) + data)
        os._exit(1)
    try:
        asyncio.run(serve(sock, Driver(namespace, node_dir)))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the operator is gone
    finally:
        os._exit(0)  # no thread that waits for Ray may hold it up


if __name__ == "__main__":
    main()
