"""The operator's view of the cluster: joins it through a link, which is replaced when it breaks, polls its
nodes every second, and follows the agent of each node. Called by the Ray engine, whose `attempts` listen.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

import structlog

import cortex
from cortex.engines.ray.link import Link, LinkError, Refused
from cortex.engines.ray.messages import Hello, Poll
from cortex.engines.ray.placement import Node, Placement

log = structlog.get_logger()

JOIN_S = 30.0
POLL_INTERVAL_S = 1.0
ANSWER_S = 10.0
HELLO_S = 60.0  # a cold node loads Python and this package first
POLL_S = 10.0
RETRY_S = 1.0


class Listener(Protocol):
    """Receives changes of nodes and the observations of their agents."""

    def looked(self) -> None:
        """The nodes of the cluster were polled."""

    def lost(self, node: Node) -> None:
        """A node has left the cluster."""

    async def reached(self, node: Node) -> None:
        """The agent of a node answers, for the first time or again.

        Raises:
            LinkError: the agent does not answer any more.
        """

    def out_of_reach(self, node: Node, reason: str) -> None:
        """The agent of a node does not answer."""

    def cursors(self, node: Node) -> dict[str, int]:
        """The offsets, by job, from which on the operator lacks the logs of a node's jobs."""

    async def told(self, node: Node, poll: Poll) -> None:
        """The agent of a node has observed this."""

    def freed(self) -> None:
        """More capacity may be free than before."""


class Cluster:
    """All methods are called on the event loop."""

    def __init__(
        self, address: str, namespace: str, node_dir: str | None, nodes: Placement
    ) -> None:
        self.nodes = nodes
        self.hellos: dict[str, Hello] = {}
        self._address = address
        self._namespace = namespace
        self._node_dir = node_dir
        self._listener: Listener  # given to `open`
        self._link: Link | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._attending: dict[str, asyncio.Task[None]] = {}

    @property
    def is_joined(self) -> bool:
        return self._link is not None and not self._link.gone.is_set()

    async def open(self, listener: Listener) -> None:
        """Join the cluster, and poll it once before this returns.

        Raises:
            LinkError: the cluster cannot be joined; the message says why.
        """
        self._listener = listener
        self._link = await self._joined()
        try:
            await self._look(self._link)
        except LinkError:
            await self._link.close()
            raise
        self._keeping = asyncio.create_task(self._keep_joined(), name="ray cluster")

    async def close(self) -> None:
        """Leave the cluster; agents and jobs go on."""
        tasks = [*self._attending.values(), *([self._keeping] if self._keeping else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.close()

    async def call(self, method: str, *arguments: object, within_s: float = ANSWER_S) -> object:
        """Call a method of the Ray driver (`cortex.ray_node.driver`).

        Raises:
            LinkError: whether the call took effect is unknown.
            Refused: the call had no effect.
        """
        if self._link is None:
            raise LinkError(f"the Ray cluster at {self._address} cannot be reached")
        return await self._link.call(method, *arguments, within_s=within_s)

    async def ask(
        self, node_id: str, method: str, *arguments: object, within_s: float = ANSWER_S
    ) -> object:
        """Call a method of a node's agent (`cortex.ray_node.agent`). Raises what `call` does."""
        return await self.call(
            "ask", node_id, method, arguments, within_s, within_s=within_s + RETRY_S
        )

    async def _joined(self) -> Link:
        link = Link(self._address, self._namespace, self._node_dir)
        await link.open(JOIN_S)
        return link

    async def _keep_joined(self) -> None:
        """Poll the cluster, and join it again whenever that fails."""
        while True:
            try:
                if self._link is None:
                    self._link = await self._joined()
                await self._look(self._link)
            except LinkError as error:
                if self._link is not None:
                    log.warning("ray cluster out of reach", address=self._address, error=str(error))
                    await self._link.close()
                    self._link = None
                    await self._unattend(str(error))
                await asyncio.sleep(RETRY_S)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._link.gone.wait(), POLL_INTERVAL_S)

    async def _look(self, link: Link) -> None:
        before = {node_id: node.free for node_id, node in self.nodes.alive.items()}
        states = await link.call("look", within_s=ANSWER_S)
        assert isinstance(states, tuple)
        lost = self.nodes.update(states)
        for node in lost:
            self._lose(node)
        self._listener.looked()
        for node_id, node in self.nodes.alive.items():
            if node_id not in self._attending:
                task = asyncio.create_task(self._attend(node), name=f"ray node {node_id}")
                self._attending[node_id] = task
        # A lost node changes what a waiting job waits for.
        if lost or any(node.free != before.get(each) for each, node in self.nodes.alive.items()):
            self._listener.freed()

    def _lose(self, node: Node) -> None:
        log.warning("ray node lost", node=node.name, node_id=node.node_id)
        self.hellos.pop(node.node_id, None)
        task = self._attending.pop(node.node_id, None)
        if task is not None:
            task.cancel()
        self._listener.lost(node)

    async def _unattend(self, reason: str) -> None:
        tasks = list(self._attending.values())
        self._attending.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in self.nodes.alive.values():
            self._out_of_reach(node, reason)

    async def _attend(self, node: Node) -> None:
        """Receive the observations of a node's agent until the node leaves the cluster."""
        while True:
            try:
                hello = await self._greet(node)
                await self._listener.reached(node)
                node.is_ready, node.problem = True, None
                self._listener.freed()
                await self._listen(node, hello)
            except (LinkError, Refused) as error:
                self._out_of_reach(node, str(error))
            except Exception as error:
                log.exception("lost contact with node agent", node=node.name)
                self._out_of_reach(node, repr(error))
            await asyncio.sleep(RETRY_S)

    async def _greet(self, node: Node) -> Hello:
        hello = await self.ask(node.node_id, "hello", within_s=HELLO_S)
        assert isinstance(hello, Hello)
        if hello.version != cortex.__version__:
            raise Refused(
                f"{node.name} has version {hello.version} of cortex-tasks, and the operator "
                f"{cortex.__version__}: install the same on both"
            )
        self.hellos[node.node_id] = hello
        return hello

    async def _listen(self, node: Node, hello: Hello) -> None:
        """Poll the agent until it has dropped observations that this operator lacks; then every attempt must
        be queried."""
        seq = hello.seq
        while True:
            cursors = self._listener.cursors(node)
            poll = await self.ask(
                node.node_id,
                "poll",
                hello.incarnation,
                seq,
                cursors,
                POLL_S,
                within_s=POLL_S + ANSWER_S,
            )
            assert isinstance(poll, Poll)
            if poll.incarnation != hello.incarnation:
                return
            seq = poll.seq
            await self._listener.told(node, poll)

    def _out_of_reach(self, node: Node, reason: str) -> None:
        if node.problem != reason:
            log.warning("ray node out of reach", node=node.name, reason=reason)
        node.is_ready, node.problem = False, reason
        self._listener.out_of_reach(node, reason)
