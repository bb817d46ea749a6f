"""Follows the attempts on a cluster to their ends: reports each end once, whatever the node reports or
fails to report. Called by the Ray engine, and by `cluster` with changes of nodes and the observations of
their agents.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict, deque
from functools import partial

import structlog

from cortex.engines.base import (
    Attempt,
    CapacityFreed,
    Ended,
    Lost,
    NeverStarted,
    Observation,
    Report,
    Started,
    Unreachable,
    Waits,
)
from cortex.engines.ray.calls import AgentCalls
from cortex.engines.ray.cluster import RETRY_S, Cluster
from cortex.engines.ray.link import LinkError, Refused
from cortex.engines.ray.log_copies import LogCopies
from cortex.engines.ray.messages import Lock, LogPiece, Poll
from cortex.engines.ray.placement import Node
from cortex.engines.ray.tracked import TrackedAttempt, taken_up
from cortex.engines.ray.validation import checked, checked_lock, checked_piece
from cortex.errors import StorageUnavailable, is_storage
from cortex.system.background import Background
from cortex.worker import checks

log = structlog.get_logger()

_MAX_LEFT = 100

Last = Ended | Lost | NeverStarted


class Attempts:
    """A `cluster.Listener`. All methods are called on the event loop."""

    def __init__(self, cluster: Cluster, orders: AgentCalls, copies: LogCopies) -> None:
        self._cluster = cluster
        self._nodes = cluster.nodes
        self._orders = orders
        self._copies = copies
        self._live: dict[str, TrackedAttempt] = {}
        self._on_node: dict[str, dict[str, TrackedAttempt]] = {}  # the same, by node and by job
        # Reservations by node of the attempts that ended last: an agent may die before it frees them.
        self._left: defaultdict[str, deque[str]] = defaultdict(partial(deque, maxlen=_MAX_LEFT))
        self._background = Background("the Ray engine failed")
        self._report: Report = lambda _: None

    def open(self, report: Report) -> None:
        """Report to `report` from now on."""
        self._report = report

    async def close(self) -> None:
        """Forget all attempts; jobs go on."""
        await self._background.close()
        self._live.clear()
        self._on_node.clear()

    def start(self, attempt: Attempt) -> None:
        """See `Engine.start`."""
        live = taken_up(attempt)
        self._take_on(live)
        self._background.run(self._begin(live))

    def stop(self, job_id: str) -> None:
        """See `Engine.stop`."""
        live = self._live.get(job_id)
        if live is not None and not live.stop:
            live.stop = True
            if live.sent:
                self._background.run(self._tell_stop(live))

    def recover(self, attempt: Attempt) -> None:
        """See `Engine.recover`."""
        live = taken_up(attempt)
        live.sent = True
        self._take_on(live)
        # The disk is full: the next piece that is copied tries again.
        with contextlib.suppress(OSError):
            self._copies.take_up(live.job_id, live.base)
        self._nodes.reserve_granted(live.job_id, attempt.version.api.compute, live.node_id)
        node = self._nodes.alive.get(live.node_id)
        if node is None and self._cluster.is_joined:
            self._lose(live, "its node is not in the cluster any more")
        elif node is None or not node.is_ready:
            pass  # `reached` queries the agent once it answers
        else:
            self._background.run(self._until_told(live))

    def report_freed(self) -> None:
        """Report that a job that did not fit before may fit now."""
        self._report(CapacityFreed())

    def hint_to_all(self, method: str, *arguments: object) -> None:
        """Call a method of every agent that has answered; a call that fails is not repeated."""
        for node_id in self._cluster.hellos:
            self._background.run(self._orders.hint(node_id, method, *arguments))

    def looked(self) -> None:
        for live in list(self._live.values()):
            if live.node_id not in self._nodes.alive:
                self._lose(live, "its node is not in the cluster any more")

    def lost(self, node: Node) -> None:
        """The attempts on the node are lost. The node's guard ends their processes."""
        self._give_up_left(node)
        for live in self._on(node):
            self._lose(live, f"the node {node.name} was lost")

    async def reached(self, node: Node) -> None:
        self._give_up_left(node)
        for live in self._on(node):
            if live.sent and not live.ending:
                await self._ask_after(live)

    def out_of_reach(self, node: Node, reason: str) -> None:
        for live in self._on(node):
            self._unreachable(live, reason)

    def cursors(self, node: Node) -> dict[str, int]:
        # Until the attempt has started, its node may have the log of an earlier attempt.
        return {
            live.job_id: self._copies.offset(live.job_id, live.base)
            for live in self._on(node)
            if live.started and not live.ending and live.copied
        }

    async def told(self, node: Node, poll: Poll) -> None:
        there = self._on_node.get(node.node_id, {})
        for job_id, piece in poll.logs.items():
            live = there.get(job_id)
            if live is not None and not live.ending:
                await self._copy(live, piece)
        for seen in poll.seen:
            if isinstance(seen, CapacityFreed):
                continue
            if isinstance(seen, Lock):
                self._keep_lock(seen)
                continue
            live = there.get(seen.job_id)
            if live is not None and live.number == seen.attempt:
                try:
                    self._take_in(live, checked(seen))
                except checks.Invalid as error:
                    self._lose(live, f"its node reported something invalid: {error}")

    def _keep_lock(self, lock: Lock) -> None:
        try:
            self._background.run(self._orders.keep_lock(checked_lock(lock)))
        except checks.Invalid as error:
            log.warning("invalid lock file of a node", reason=str(error))

    def freed(self) -> None:
        if self._nodes.pop_refused():
            self.report_freed()

    def _give_up_left(self, node: Node) -> None:
        for seat in self._left.pop(node.node_id, ()):
            self._background.run(self._orders.give_up(seat))

    def _lose(self, live: TrackedAttempt, reason: str) -> None:
        # Where the node or its folder is lost, no agent frees the reservation.
        self._background.run(self._orders.give_up(self._orders.seat(live)))
        if not live.ending:
            self._settle(live, live.lost(reason) if live.sent else live.never())

    def _take_in(self, live: TrackedAttempt, seen: Observation) -> None:
        if isinstance(seen, Started):
            self._started(live, seen)
        elif isinstance(seen, Unreachable):
            self._unreachable(live, seen.reason)
        elif isinstance(seen, Waits):
            self._report(seen)
        elif isinstance(seen, Ended | Lost | NeverStarted) and not live.ending:
            live.ending = True
            self._background.run(self._finish(live, seen))

    async def _copy(self, live: TrackedAttempt, piece: LogPiece) -> None:
        try:
            piece = checked_piece(piece)
            await asyncio.to_thread(self._copies.write, live.job_id, live.base, piece)
        except (OSError, checks.Invalid) as error:
            log.warning("cannot copy a log", job=live.job_id, error=str(error))
            # With the next poll the node sends the piece again.
            live.copied = isinstance(error, OSError) and is_storage(error)
            await asyncio.sleep(RETRY_S)

    async def _finish(self, live: TrackedAttempt, last: Last) -> None:
        """Copy the rest of the log, and report the end, which is known: a failure from now on loses no
        more than a part of the log."""
        has_log = not isinstance(last, NeverStarted)  # otherwise it is that of an earlier attempt
        while has_log and live.node_id in self._nodes.alive and live.copied:
            offset = self._copies.offset(live.job_id, live.base)
            try:
                piece = await self._orders.log_from(live, offset)
                if piece.end == offset:
                    break
                await self._copy(live, piece)
            except LinkError:
                await asyncio.sleep(RETRY_S)
            except checks.Invalid:
                break
        self._settle(live, last)

    async def _begin(self, live: TrackedAttempt) -> None:
        """Reserve its capacity in Ray, and send it to its node. Query the node where the outcome of that
        is unknown."""
        try:
            gpus = await self._orders.take_seat(live)
            locks = await self._orders.locks(live)
        except (LinkError, Refused, StorageUnavailable, OSError) as error:
            # Before the report: the reservation may exist or appear, and no operator looks for it later.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(live.left_s):
                    await self._orders.give_up(self._orders.seat(live))
            self._do_not_start(live, str(error))
            return
        if self._is_off(live):
            self._do_not_start(live)
            return
        live.sent = True
        try:
            while not await self._orders.start(live, gpus, locks):
                live.sent = False
                await self._orders.send_project(live)
                if self._is_off(live):
                    self._do_not_start(live)
                    return
                live.sent = True
        except Refused as error:
            self._do_not_start(live, str(error))
        except LinkError as error:
            if not live.sent:
                self._do_not_start(live, str(error))
                return
            self._unreachable(live, str(error))
            await self._until_told(live)
        if live.stop:
            await self._tell_stop(live)

    def _is_off(self, live: TrackedAttempt) -> bool:
        return live.stop or self._live.get(live.job_id) is not live

    def _do_not_start(self, live: TrackedAttempt, held_up_by: str | None = None) -> None:
        self._background.run(self._orders.give_up(self._orders.seat(live)))
        self._settle(live, live.never(held_up_by))

    async def _until_told(self, live: TrackedAttempt) -> None:
        while self._live.get(live.job_id) is live and not live.ending:
            try:
                await self._ask_after(live)
            except LinkError:
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _ask_after(self, live: TrackedAttempt) -> None:
        """Let its node report the state of an attempt. The node fences off one that it does not know."""
        try:
            await self._orders.ask_after(live)
        except Refused as error:
            self._lose(live, str(error))
            return
        if live.unreachable:
            live.unreachable = False
            self._report(live.reachable())
        if live.stop:
            await self._orders.stop(live)

    async def _tell_stop(self, live: TrackedAttempt) -> None:
        while self._live.get(live.job_id) is live:
            try:
                await self._orders.stop(live)
            except LinkError:
                await asyncio.sleep(RETRY_S)
            except Refused as error:
                log.warning("cannot stop a job", job=live.job_id, error=str(error))
                return
            else:
                return

    def _started(self, live: TrackedAttempt, seen: Started) -> None:
        if not live.started or live.unreachable:
            live.started, live.unreachable = True, False
            with contextlib.suppress(OSError):  # the first piece that is copied creates the log
                self._copies.touch(live.job_id)  # followers of the log watch it from now on
            self._report(seen)

    def _unreachable(self, live: TrackedAttempt, reason: str) -> None:
        if live.sent and not live.unreachable:
            live.unreachable = True
            self._report(live.out_of_reach(reason))

    def _settle(self, live: TrackedAttempt, last: Last) -> None:
        if self._live.get(live.job_id) is not live:
            return
        self._let_go(live)
        if live.node_id in self._nodes.alive:
            self._left[live.node_id].append(self._orders.seat(live))
        freed = self._nodes.give_back(live.job_id) and self._nodes.pop_refused()
        self._report(last)
        if freed:
            self.report_freed()

    def _on(self, node: Node) -> list[TrackedAttempt]:
        return list(self._on_node.get(node.node_id, {}).values())

    def _take_on(self, live: TrackedAttempt) -> None:
        self._live[live.job_id] = live
        self._on_node.setdefault(live.node_id, {})[live.job_id] = live

    def _let_go(self, live: TrackedAttempt) -> None:
        del self._live[live.job_id]
        there = self._on_node[live.node_id]
        del there[live.job_id]
        if not there:
            del self._on_node[live.node_id]
