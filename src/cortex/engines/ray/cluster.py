"""The operator's view of the cluster: a link to Ray, and a session with the agent of each node.

Ray finds and starts the agent. All requests to it go over a TCP connection (`connection`).

The link is replaced when it breaks, and the nodes are refreshed every second. `attempts` listens,
and the Ray engine calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from cortex.engines.base import NOTHING
from cortex.engines.capacity import capacity_of, selection_of
from cortex.engines.ray.connection import AgentConnection
from cortex.engines.ray.join_attempts import JoinAttempts
from cortex.engines.ray.link import Link, LinkError, NotSent, Refused
from cortex.engines.ray.messages import AGENT_VERSION, Hello, Poll, Wanted
from cortex.engines.ray.placement import Node, Placement
from cortex.engines.ray.ray_errors import explain
from cortex.engines.ray.validation import checked_node_report
from cortex.spec.api import Compute
from cortex.worker import checks

log = structlog.get_logger()

JOIN_TIMEOUT_S = 30.0
OPEN_TIMEOUT_S = 10.0
# The nodes of a cluster that has just started join it one by one.
SETTLING_S = 60.0
REFRESH_INTERVAL_S = 1.0
RESPONSE_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
MAX_SILENCE_S = 4.0
HELLO_TIMEOUT_S = 60.0  # a cold node loads Python and this package first
POLL_TIMEOUT_S = 10.0
DRAINED_POLL_TIMEOUT_S = 1.0
AGENT_IDLE_S = 30.0
DEMAND_TIMEOUT_S = 60.0
MIN_DEMAND, MAX_DEMAND = 20, 200
_MAX_NODE_IDS = 20_000
RETRY_DELAY_S = 1.0
# Ray lists every reservation that there was since the start of its head.
RELEASE_TIMEOUT_S = 600.0
RELEASE_RETRY_DELAY_S = 10.0


class ClusterListener(Protocol):
    """Receives changes of the nodes, and the observations of their agents."""

    def on_cluster_unreachable(self, reason: str) -> None:
        """The cluster cannot be joined now, for this reason."""

    def on_nodes_refreshed(self) -> None:
        """The list of alive nodes is up to date."""

    def on_node_lost(self, node: Node) -> None:
        """A node has left the cluster."""

    async def on_agent_reachable(self, node: Node) -> None:
        """The agent of a node answers, for the first time or again.

        Raises:
            LinkError: the agent has stopped answering meanwhile.
        """

    def on_agent_unreachable(self, node: Node, reason: str) -> None:
        """The agent of a node does not answer."""

    def log_cursors(self, node: Node) -> dict[str, int]:
        """The offsets from which on to read the logs of a node's jobs, by job."""

    def is_idle(self, node: Node) -> bool:
        """Whether a node has no attempt."""

    async def on_poll(self, node: Node, poll: Poll) -> None:
        """The agent of a node has answered a poll."""

    def on_capacity_changed(self) -> None:
        """More capacity may be free than before."""


@dataclass
class _Sleep:
    """The time in which a node has no agent."""

    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The next agent has answered, or has failed to."""


class Cluster:
    """The cluster, on the event loop."""

    def __init__(
        self,
        address: str,
        namespace: str,
        node_dir: str | None,
        nodes: Placement,
        *,
        has_autoscaler: bool = False,
    ) -> None:
        self.nodes = nodes
        self._has_autoscaler = has_autoscaler
        self._asleep: dict[str, _Sleep] = {}  # by node
        self.waiting: Sequence[Compute] = ()
        """What waiting jobs need. Ray's autoscaler gets to know those that fit on no node."""
        # With the nodes then; the demand is None where the driver may have another.
        self._sent_demand: tuple[Link, frozenset[str], tuple[Wanted, ...] | None] | None = None
        self._demand_task: asyncio.Task[None] | None = None
        self.hellos: dict[str, Hello] = {}
        self.problem: str | None = None
        """Why the cluster cannot be joined now."""
        self.connections: dict[str, AgentConnection] = {}
        """The connections to agents, by node. `AgentConnection.silent_s` says how long an agent has
        been silent."""
        self._address = address
        self._namespace = namespace
        self._node_dir = node_dir
        self._listener: ClusterListener  # set by `open`
        self._link: Link | None = None
        self._link_task: asyncio.Task[None] | None = None
        self._attempts = JoinAttempts(address)
        self._first_attempt: asyncio.Future[Refused | None]  # set by `open`
        self._has_joined = False
        self._settled_at: float | None = None
        self._agent_tasks: dict[str, asyncio.Task[None]] = {}
        self._replaced: set[str] = set()  # the nodes whose agent was replaced by this operator
        self._has_lost_nodes = True  # an earlier operator may have left reservations there
        self._release_task: asyncio.Task[None] | None = None

    @property
    def is_joined(self) -> bool:
        """Whether the link is up, and the nodes were read through it."""
        return self._link is not None and not self._link.closed.is_set()

    async def open(self, listener: ClusterListener) -> None:
        """Join the cluster, and read its nodes. A cluster that cannot be joined now is joined in
        the background, as soon as it can be: `problem` says why it cannot.

        Raises:
            Refused: the cluster has other versions of Ray or Python.
        """
        self._listener = listener
        first = self._first_attempt = asyncio.get_running_loop().create_future()
        self._link_task = asyncio.create_task(self._maintain_link(), name="ray cluster")
        done, _ = await asyncio.wait({first}, timeout=OPEN_TIMEOUT_S)
        if not done:
            first.set_result(None)
            self._mark_away(f"it did not answer within {OPEN_TIMEOUT_S:g} s")
        elif (refusal := first.result()) is not None:
            raise refusal

    async def close(self) -> None:
        """Leave the cluster. Agents and jobs continue."""
        single = (self._link_task, self._release_task, self._demand_task)
        tasks = [*self._agent_tasks.values(), *(task for task in single if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.close()

    async def call_driver(
        self, method: str, *arguments: object, timeout_s: float = RESPONSE_TIMEOUT_S
    ) -> object:
        """Call a method of the Ray driver (`cortex.ray_node.driver`).

        Raises:
            NotSent: the request was not sent.
            LinkError: the outcome is unknown.
            Refused: the request was not carried out.
        """
        if self._link is None:
            raise NotSent(f"the Ray cluster at {self._address} cannot be reached")
        return await self._link.call(method, *arguments, timeout_s=timeout_s)

    async def call_agent(
        self,
        node_id: str,
        method: str,
        *arguments: object,
        timeout_s: float = RESPONSE_TIMEOUT_S,
    ) -> object:
        """Call a method of a node's agent (`cortex.ray_node.agent`); see `call_driver`."""
        connection = self.connections.get(node_id)
        if connection is None:
            raise NotSent("there is no connection to its agent")
        return await connection.call(method, *arguments, timeout_s=timeout_s)

    def suspect(self, node_id: str, reason: str) -> None:
        """A node has not answered: see `Node.suspect`."""
        node = self.nodes.alive.get(node_id)
        if node is not None and node.is_ready:
            log.warning("ray node suspected", node=node.name, reason=reason)
            node.suspect(reason)
            self._listener.on_capacity_changed()  # jobs wait for another node, or reason

    def trust(self, node_id: str) -> None:
        """A node has taken an order: see `Node.trust`."""
        node = self.nodes.alive.get(node_id)
        if node is not None:
            node.trust()

    def is_asleep(self, node_id: str) -> bool:
        """Whether a node has no agent now, because it has no jobs."""
        return node_id in self._asleep

    async def wake_agent(self, node_id: str) -> None:
        """Make an agent for a node that has none, and return once it has answered or failed to."""
        sleep = self._asleep.get(node_id)
        if sleep is not None:
            sleep.is_over.set()
            await sleep.has_ended.wait()

    async def _open_link(self) -> Link:
        link = Link(self._address, self._namespace, self._node_dir)
        await link.open(JOIN_TIMEOUT_S)
        return link

    async def _maintain_link(self) -> None:
        """Refresh the nodes at an interval, and replace the link when that fails."""
        while True:
            try:
                if self._link is None:
                    self._link = await self._join()
                else:
                    await self._refresh(self._link)
            except (LinkError, Refused, OSError) as error:  # OSError: no descriptor is left
                if isinstance(error, Refused) and not self._first_attempt.done():
                    self._first_attempt.set_result(error)
                    return
                # A node that this operator has never seen may still be starting.
                self.nodes.is_settling |= not self._has_joined
                if self._link is not None:
                    await self._link.close()
                    self._link = None
                    await self._end_agent_sessions(str(error))
                delay_s = self._mark_away(str(error))
                if not self._first_attempt.done():
                    self._first_attempt.set_result(None)
                await asyncio.sleep(delay_s)
                continue
            self._mark_joined()
            self._check_silence()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._link.closed.wait(), REFRESH_INTERVAL_S)

    async def _join(self) -> Link:
        link = await self._open_link()
        try:
            await self._refresh(link)
        except BaseException:
            await link.close()
            raise
        return link

    def _mark_away(self, reason: str) -> float:
        """Say that the cluster cannot be joined; the seconds until the next attempt."""
        problem = f"the Ray cluster at {self._address} cannot be joined: {reason}"
        if problem != self.problem:
            self.problem = problem
            self.nodes.waits_for = (
                f"the Ray cluster at {self._address}, which cannot be joined: {reason}"
            )
            self._listener.on_cluster_unreachable(problem)
            self._listener.on_capacity_changed()  # jobs wait for another reason now
        return self._attempts.failed(reason)

    def _mark_joined(self) -> None:
        now = asyncio.get_running_loop().time()
        self._has_joined = True
        if not self._first_attempt.done():
            self._first_attempt.set_result(None)
        if self.problem is not None:
            self._attempts.succeeded()
            self.problem = self.nodes.waits_for = None
            self._settled_at = now + SETTLING_S
            self._listener.on_capacity_changed()
        if self._settled_at is not None and now >= self._settled_at:
            self._settled_at, self.nodes.is_settling = None, False
            self._listener.on_capacity_changed()  # jobs that no node can ever run are refused now

    async def _refresh(self, link: Link) -> None:
        before = {node_id: node.free for node_id, node in self.nodes.alive.items()}
        states = await link.call("node_states", timeout_s=RESPONSE_TIMEOUT_S)
        assert isinstance(states, tuple)
        # No job fits on a node without CPU, such as the operator's own: it gets no agent.
        usable = (each for each in states if each.total.cpu_m or each.node_id in before)
        lost = self.nodes.update(tuple(usable))
        for node in lost:
            self._remove(node)
        self._has_lost_nodes = self._has_lost_nodes or bool(lost)
        if self._has_lost_nodes and (self._release_task is None or self._release_task.done()):
            self._has_lost_nodes = False
            self._release_task = asyncio.create_task(self._release_lost(link), name="release")
        self._listener.on_nodes_refreshed()
        for node_id, node in self.nodes.alive.items():
            if node_id not in self._agent_tasks:
                node.problem = None  # that of an earlier link is over
                task = asyncio.create_task(
                    self._run_agent_session(node), name=f"ray node {node_id}"
                )
                self._agent_tasks[node_id] = task
        self._send_demand(link)
        # The loss of a node may change the reason why a job waits.
        if lost or any(node.free != before.get(each) for each, node in self.nodes.alive.items()):
            self._listener.on_capacity_changed()

    async def _release_lost(self, link: Link) -> None:
        """Release the reservations that lost nodes have left. No job waits for that."""
        try:
            await link.call("release_lost", timeout_s=RELEASE_TIMEOUT_S)
        except (LinkError, Refused) as error:
            log.warning("cannot release the reservations of lost nodes", error=str(error))
            await asyncio.sleep(RELEASE_RETRY_DELAY_S)
            self._has_lost_nodes = True

    def _check_silence(self) -> None:
        """Give no new job to nodes whose agents do not send the frame that each owes every second.
        Long before the connection is given up, their jobs would wait for nothing."""
        for node_id, connection in self.connections.items():
            node = self.nodes.alive.get(node_id)
            is_silent = connection.silent_s > MAX_SILENCE_S
            if node is not None and node.set_silent(is_silent=is_silent):
                log.warning("ray node", node=node.name, silent_s=round(connection.silent_s, 1))
                self._listener.on_capacity_changed()

    def _send_demand(self, link: Link) -> None:
        """Let Ray's autoscaler know what waiting jobs need, where that has changed."""
        if not self._has_autoscaler or (self._demand_task and not self._demand_task.done()):
            return
        # Each names all nodes: see `cortex.ray_node.demand`.
        limit = min(MAX_DEMAND, max(MIN_DEMAND, _MAX_NODE_IDS // max(1, len(self.nodes.alive))))
        unmet = self.nodes.unmet(self.waiting)[:limit]
        wanted = tuple(Wanted(capacity_of(each), selection_of(each)) for each in unmet)
        demand = link, frozenset(self.nodes.alive), wanted
        before = self._sent_demand
        was_empty = before is None or before[0] is not link or before[2] == ()
        if demand == before or (was_empty and not wanted):
            return
        self._sent_demand = demand
        self._demand_task = asyncio.create_task(self._call_demand(link, wanted), name="ray demand")

    async def _call_demand(self, link: Link, wanted: tuple[Wanted, ...]) -> None:
        try:
            await link.call("demand", wanted, timeout_s=DEMAND_TIMEOUT_S)
        except (LinkError, Refused) as error:
            log.warning("cannot report the demand of waiting jobs", error=str(error))
            self._sent_demand = link, frozenset(), None

    def _remove(self, node: Node) -> None:
        log.warning("ray node lost", node=node.name, node_id=node.node_id)
        self.hellos.pop(node.node_id, None)
        task = self._agent_tasks.pop(node.node_id, None)
        if task is not None:
            task.cancel()
        self._listener.on_node_lost(node)

    async def _end_agent_sessions(self, reason: str) -> None:
        tasks = list(self._agent_tasks.values())
        self._agent_tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in self.nodes.alive.values():
            self._mark_unreachable(node, reason)

    async def _run_agent_session(self, node: Node) -> None:
        """Receive the observations of a node's agent while the node is alive."""
        try:
            while True:
                try:
                    await self._follow_agent(node)
                    if (sleep := self._asleep.get(node.node_id)) is not None:
                        await sleep.is_over.wait()
                        continue
                except (LinkError, Refused, checks.Invalid) as error:
                    self._mark_unreachable(node, str(error))
                except Exception as error:
                    log.exception("lost contact with node agent", node=node.name)
                    self._mark_unreachable(node, explain(error))
                await asyncio.sleep(RETRY_DELAY_S)
        finally:
            self._end_sleep(node)

    async def _follow_agent(self, node: Node) -> None:
        try:
            try:
                hello = await self._begin_session(node)
                await self._listener.on_agent_reachable(node)
            finally:
                self._end_sleep(node)
            node.answered(None)
            self._listener.on_capacity_changed()
            await self._poll_agent(node, hello)
        finally:
            self._disconnect(node)

    async def _end_idle_agent(self, node: Node) -> bool:
        """End the agent of a node without attempts, unless it has something left to do.

        Ray takes a node with an actor for a node that is used: its autoscaler would never remove
        it, and a drained node would stay until its deadline.
        """
        self._asleep[node.node_id] = _Sleep()  # from here on, attempts wait for the next agent
        if not await self.call_agent(node.node_id, "is_idle"):
            self._end_sleep(node)
            return False
        await self.call_driver("end_agent", node.node_id)
        node.set_held(NOTHING)
        log.info("ended the agent of an idle node", node=node.name)
        return True

    def _end_sleep(self, node: Node) -> None:
        sleep = self._asleep.pop(node.node_id, None)
        if sleep is not None:
            sleep.has_ended.set()

    def _idle_limit_s(self, node: Node) -> float:
        """How long the agent of a node that has no attempts stays."""
        if node.state.drain is not None:
            return 0.0
        # A node that takes no job now says so until its agent reports otherwise.
        return AGENT_IDLE_S if self._has_autoscaler and node.is_ready else math.inf

    async def _begin_session(self, node: Node) -> Hello:
        """Find the agent through Ray, and connect to it."""
        hello = await self._hello(node)
        if hello.version != AGENT_VERSION and node.node_id not in self._replaced:
            # It has run since before an upgrade. Its jobs do not depend on it.
            log.info("replacing an agent", node=node.name, version=hello.version)
            await self.call_driver("end_agent", node.node_id)
            self._replaced.add(node.node_id)
            hello = await self._hello(node)
        if hello.version != AGENT_VERSION:
            raise Refused(
                f"{node.name} has version {hello.version} of cortex-tasks, but the operator has "
                f"{AGENT_VERSION}; install the same version on both"
            )
        self.connections[node.node_id] = await AgentConnection.open(
            node.name, hello.host, hello.port, hello.key, CONNECT_TIMEOUT_S
        )
        self.hellos[node.node_id] = hello
        return hello

    async def _hello(self, node: Node) -> Hello:
        hello = await self.call_driver(
            "call_agent",
            node.node_id,
            "hello",
            (),
            HELLO_TIMEOUT_S,
            timeout_s=HELLO_TIMEOUT_S + RETRY_DELAY_S,
        )
        assert isinstance(hello, Hello)
        return hello

    def _disconnect(self, node: Node) -> None:
        connection = self.connections.pop(node.node_id, None)
        if connection is not None:
            connection.close("the operator has closed it")

    async def _poll_agent(self, node: Node, hello: Hello) -> None:
        """Poll the agent until it was ended, or has dropped observations that this operator has not
        received. In the latter case, every attempt on the node has to be recovered.
        """
        seq, used_at = hello.seq, time.monotonic()
        while True:
            cursors = self._listener.log_cursors(node)
            timeout_s = POLL_TIMEOUT_S if node.state.drain is None else DRAINED_POLL_TIMEOUT_S
            poll = await self.call_agent(
                node.node_id,
                "poll",
                hello.incarnation,
                seq,
                cursors,
                timeout_s,
                timeout_s=timeout_s + RESPONSE_TIMEOUT_S,
            )
            assert isinstance(poll, Poll)
            if poll.incarnation != hello.incarnation:
                return
            seq = poll.seq
            was_ready = node.is_ready
            held, problem = checked_node_report(poll.held, poll.problem)
            node.set_held(held)
            node.answered(problem)
            if node.is_ready != was_ready:
                log.info("ray node", node=node.name, is_ready=node.is_ready, problem=node.problem)
                self._listener.on_capacity_changed()
            await self._listener.on_poll(node, poll)
            if not self._listener.is_idle(node):
                used_at = time.monotonic()
                continue
            is_over = time.monotonic() - used_at >= self._idle_limit_s(node)
            if is_over and await self._end_idle_agent(node):
                return

    def _mark_unreachable(self, node: Node, reason: str) -> None:
        if node.problem != reason:
            log.warning("ray node unreachable", node=node.name, reason=reason)
        was_ready = node.is_ready
        node.is_ready, node.problem = False, reason
        if was_ready:
            self._listener.on_capacity_changed()  # jobs wait for another node, or reason
        self._listener.on_agent_unreachable(node, reason)
