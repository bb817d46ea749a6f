"""The attempts that run on a cluster. The engine reports the end of each exactly once.

It does so even if the node reports an end twice, late or never. The Ray engine calls this module.
`cluster` notifies it of nodes, and of the observations of their agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import structlog

from cortex.engines.base import (
    Attempt,
    CapacityFreed,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Observation,
    Report,
    Started,
    Unreachable,
    Waits,
)
from cortex.engines.ray.calls import AgentCalls
from cortex.engines.ray.checkpoints import CheckpointCopies, StoredCheckpoint
from cortex.engines.ray.cluster import RETRY_DELAY_S, Cluster
from cortex.engines.ray.link import LinkError, NotSent, Refused
from cortex.engines.ray.log_copies import LogCopies
from cortex.engines.ray.messages import Checkpoint, Lock, LogPiece, Poll
from cortex.engines.ray.placement import Node
from cortex.engines.ray.tracked import TrackedAttempt
from cortex.engines.ray.transfers import Transfers
from cortex.engines.ray.validation import (
    checked_checkpoint,
    checked_lock_file,
    checked_log_piece,
    checked_observation,
)
from cortex.errors import StorageUnavailable
from cortex.system.background import Background, in_thread
from cortex.system.oserrors import is_shortage, is_storage
from cortex.worker import checks

log = structlog.get_logger()

_MAX_LATE_HINTS = 1000
# Before the deadline of a drain: the refresh of the nodes, the order to stop, and the log's rest.
_DRAIN_MARGIN_S = 5.0
_MIN_DRAIN_GRACE_S = 1.0  # SIGTERM comes before SIGKILL, also where the deadline has passed

Final = Ended | Lost | NeverStarted
_FEW, _SMALL_BYTES = 4, 16 << 10  # pieces of logs that are written sooner than a thread begins


class Attempts:
    """A `cluster.ClusterListener`, on the event loop."""

    def __init__(
        self,
        cluster: Cluster,
        calls: AgentCalls,
        transfers: Transfers,
        log_copies: LogCopies,
        checkpoints: CheckpointCopies,
    ) -> None:
        self._cluster = cluster
        self._nodes = cluster.nodes
        self._calls = calls
        self._transfers = transfers
        self._log_copies = log_copies
        self._checkpoints = checkpoints
        self._tracked: dict[str, TrackedAttempt] = {}
        self._by_node: dict[str, dict[str, TrackedAttempt]] = {}  # the same, by node and by job
        self._late_hints: defaultdict[str, deque[tuple[str, tuple[object, ...]]]] = defaultdict(
            partial(deque, maxlen=_MAX_LATE_HINTS)
        )
        self._background = Background("the Ray engine failed")
        self._report: Report = lambda _: None

    def open(self, report: Report) -> None:
        """Send observations to `report` from now on."""
        self._report = report

    async def close(self) -> None:
        """Stop tracking attempts. Their jobs continue."""
        await self._background.close()
        await self._checkpoints.close()
        self._tracked.clear()
        self._by_node.clear()

    def start(self, attempt: Attempt) -> None:
        """See `Engine.start`."""
        tracked = TrackedAttempt.of(attempt)
        self._track(tracked)
        self._background.run(self._start(tracked))

    def stop(self, job_id: str) -> None:
        """See `Engine.stop`."""
        tracked = self._tracked.get(job_id)
        if tracked is not None and not tracked.stop_requested:
            tracked.stop_requested = True
            if tracked.is_sent:
                self._background.run(self._send_stop(tracked))

    def recover(self, attempt: Attempt) -> None:
        """See `Engine.recover`."""
        tracked = TrackedAttempt.of(attempt)
        tracked.is_sent = True
        self._track(tracked)
        # The disk may be full. Copying a piece of the log prepares the copy again.
        with contextlib.suppress(OSError):
            self._log_copies.recover(tracked.job_id, tracked.number, tracked.log_base)
        compute = attempt.version.api.compute
        self._nodes.reserve_granted(tracked.job_id, compute, tracked.node_id)
        node = self._nodes.alive.get(tracked.node_id)
        if node is None and self._cluster.is_joined:
            self._lose(tracked, tracked.left)
        elif self._cluster.problem is not None:
            self._mark_unreachable(tracked, self._cluster.problem)
        elif tracked.node_id in self._cluster.connections:
            # Whether or not the node takes new jobs: `on_agent_reachable` may have been called.
            self._background.run(self._recover_with_retries(tracked))
        # Else `on_agent_reachable` recovers it, or `on_nodes_refreshed` finds its node lost.

    def report_freed(self) -> None:
        """Report that a job that did not fit before may fit now."""
        self._report(CapacityFreed())

    def hint_to_all(self, method: str, *arguments: object) -> None:
        """Call a method of every agent that has answered; a call that fails is not repeated. A node
        that has no agent now receives the call with its next job."""
        for node_id in self._cluster.hellos:
            if self._cluster.is_asleep(node_id):
                self._late_hints[node_id].append((method, arguments))
            else:
                self._background.run(self._calls.hint(node_id, method, *arguments))

    def on_cluster_unreachable(self, reason: str) -> None:
        for tracked in list(self._tracked.values()):
            self._mark_unreachable(tracked, reason)

    def on_nodes_refreshed(self) -> None:
        for tracked in list(self._tracked.values()):
            if tracked.node_id not in self._nodes.alive:
                self._lose(tracked, tracked.left)
            else:  # an attempt that was recovered before the nodes were known
                compute = tracked.attempt.version.api.compute
                self._nodes.reserve_granted(tracked.job_id, compute, tracked.node_id)
        for node in self._nodes.alive.values():
            if node.state.drain is not None and node.state.drain.left_s is not None:
                self._drain(node, node.state.drain.left_s)

    def on_node_lost(self, node: Node) -> None:
        """Lose the attempts on the node, whose guard ends their jobs."""
        self._late_hints.pop(node.node_id, None)
        reason = f"the node {node.name} was lost"
        if node.death:
            reason = f"the node {node.name} was ended: {node.death}"
        elif node.state.drain is not None:
            reason = f"the node {node.name} was lost while it was being drained"
        for tracked in self._tracked_on(node):
            self._lose(tracked, reason)

    async def on_agent_reachable(self, node: Node) -> None:
        for method, arguments in self._late_hints.pop(node.node_id, ()):
            self._background.run(self._calls.hint(node.node_id, method, *arguments))
        recovered: set[str] = set()
        # `recover` may add attempts meanwhile.
        while tracked := self._next_to_recover(node, recovered):
            recovered.add(tracked.job_id)
            await self._recover(tracked)

    def on_agent_unreachable(self, node: Node, reason: str) -> None:
        for tracked in self._tracked_on(node):
            self._mark_unreachable(tracked, reason)

    def is_idle(self, node: Node) -> bool:
        return node.node_id not in self._by_node

    def log_cursors(self, node: Node) -> dict[str, int]:
        # Until an attempt has started, the node's log is that of an earlier attempt.
        return {
            tracked.job_id: self._copied(tracked)
            for tracked in self._tracked_on(node)
            if tracked.has_started and not tracked.is_ending and tracked.is_log_copied
        }

    async def on_poll(self, node: Node, poll: Poll) -> None:
        await self._copy_logs(node, poll)
        on_node = self._by_node.get(node.node_id, {})
        for observation in poll.seen:
            if isinstance(observation, CapacityFreed):
                continue
            if isinstance(observation, Lock):
                self._store_lock_file(observation)
                continue
            tracked = on_node.get(observation.job_id)
            if tracked is not None and tracked.number == observation.attempt:
                if isinstance(observation, Checkpoint):
                    self._copy_checkpoint(tracked, observation)
                    continue
                try:
                    self._process(tracked, checked_observation(observation), poll)
                except checks.Invalid as error:
                    self._lose(tracked, f"its node sent an invalid observation: {error}")

    def on_capacity_changed(self) -> None:
        if self._nodes.pop_refused():
            self.report_freed()

    def _drain(self, node: Node, left_s: float) -> None:
        """Stop the attempts of a node that is being drained, in time for their grace period. Until
        then, they may end by themselves."""
        if left_s > self._calls.grace_s + _DRAIN_MARGIN_S:
            return
        for tracked in self._tracked_on(node):
            if tracked.is_sent and not tracked.is_drained and not tracked.is_ending:
                tracked.is_drained = True
                log.warning("stopping a job of a drained node", job=tracked.job_id, node=node.name)
                grace_s = max(_MIN_DRAIN_GRACE_S, left_s - _DRAIN_MARGIN_S)
                self._background.run(self._send_stop(tracked, min(grace_s, self._calls.grace_s)))

    def _as_lost_by_drain(self, tracked: TrackedAttempt, final: Final) -> Final:
        """The end of an attempt: where a drain of its node stopped it, the platform failed it."""
        node = self._drained_node_of(tracked)
        if node is None or tracked.stop_requested:
            return final
        if not isinstance(final, Ended):
            return final
        # A SIGKILL before the deadline may reach a job before its supervisor knows of the stop.
        was_killed = tracked.is_drained and final.exit_code == -signal.SIGKILL
        if final.ending is not Ending.STOPPED and not was_killed:
            return final
        return tracked.lost(f"the node {node.name} is being drained")

    def _drained_node_of(self, tracked: TrackedAttempt) -> Node | None:
        node = self._nodes.alive.get(tracked.node_id)
        return None if node is None or node.state.drain is None else node

    def _store_lock_file(self, lock: Lock) -> None:
        try:
            self._background.run(self._calls.store_lock_file(checked_lock_file(lock)))
        except checks.Invalid as error:
            log.warning("ignored a node's invalid lock file", reason=str(error))

    def _copy_checkpoint(self, tracked: TrackedAttempt, checkpoint: Checkpoint) -> None:
        limit = tracked.attempt.version.api.limits.checkpoint
        try:
            self._checkpoints.copy(tracked.node_id, checked_checkpoint(checkpoint, limit))
        except checks.Invalid as error:
            log.warning("ignored a node's invalid checkpoint", reason=str(error))

    def _lose(self, tracked: TrackedAttempt, reason: str) -> None:
        if not tracked.is_ending:
            final = tracked.lost(reason) if tracked.is_sent else tracked.never_started(reason)
            self._finish(tracked, final)

    def _process(self, tracked: TrackedAttempt, observation: Observation, poll: Poll) -> None:
        if isinstance(observation, Started):
            self._mark_started(tracked, observation)
        elif isinstance(observation, Unreachable):
            self._mark_unreachable(tracked, observation.reason)
        elif isinstance(observation, Waits):
            self._report(observation)
        elif isinstance(observation, Ended | Lost | NeverStarted) and not tracked.is_ending:
            tracked.is_ending = True
            final = self._as_lost_by_drain(tracked, observation)
            if self._is_rest_of(tracked, poll.rests.get(tracked.job_id)):
                self._finish(tracked, final)
            else:
                self._background.run(self._copy_rest_and_finish(tracked, final))

    async def _copy_logs(self, node: Node, poll: Poll) -> None:
        """Write the pieces of an answer to the copies, all in one thread."""
        on_node = self._by_node.get(node.node_id, {})
        ended = {each.job_id: each.attempt for each in poll.seen if isinstance(each, Ended | Lost)}
        # The end of an earlier attempt may come late, with the log of that attempt.
        rests = (
            (job_id, rest)
            for job_id, rest in poll.rests.items()
            if job_id in on_node and on_node[job_id].number == ended.get(job_id)
        )
        pieces = [
            (tracked, piece)
            for job_id, piece in (*poll.logs.items(), *rests)
            if (tracked := on_node.get(job_id)) is not None
            and tracked.is_log_copied
            and not tracked.is_ending
        ]
        if pieces:
            await self._write(pieces)

    async def _write(self, pieces: Sequence[tuple[TrackedAttempt, LogPiece]]) -> None:
        checked: list[tuple[TrackedAttempt, LogPiece]] = []
        failures: list[tuple[TrackedAttempt, Exception]] = []
        for tracked, unchecked in pieces:
            try:
                checked.append((tracked, checked_log_piece(unchecked)))
            except checks.Invalid as error:
                failures.append((tracked, error))
        size = sum(len(piece.data) for _, piece in checked)
        if len(checked) <= _FEW and size <= _SMALL_BYTES:  # a thread would take longer
            failures += self._write_all(checked)
        else:
            write = asyncio.ensure_future(self._write_in_thread(checked))
            for tracked, _ in checked:
                tracked.write = write
            failures += await asyncio.shield(write)  # the thread goes on: `_finish` waits for it
        for tracked, failure in failures:
            log.warning("cannot copy a log", job=tracked.job_id, error=str(failure))
            # After a failure that may pass, the same piece is requested again.
            tracked.is_log_copied = isinstance(failure, OSError) and (
                is_storage(failure) or is_shortage(failure)
            )
        if failures:
            await asyncio.sleep(RETRY_DELAY_S)

    async def _write_in_thread(
        self, pieces: Sequence[tuple[TrackedAttempt, LogPiece]]
    ) -> list[tuple[TrackedAttempt, Exception]]:
        try:
            return await in_thread(self._write_all, pieces)
        except OSError as error:  # no thread can be started now
            return [(tracked, error) for tracked, _ in pieces]

    def _write_all(
        self, pieces: Sequence[tuple[TrackedAttempt, LogPiece]]
    ) -> list[tuple[TrackedAttempt, Exception]]:
        """Write the pieces that continue the copies. Blocking.

        Returns:
            The failures, each with its attempt.
        """
        failures: list[tuple[TrackedAttempt, Exception]] = []
        for tracked, piece in pieces:
            if self._tracked.get(tracked.job_id) is not tracked:
                continue  # it was lost meanwhile, and the next attempt may have begun
            try:
                # A piece may follow one that could not be written, or be known already. The gap may
                # have grown since.
                copied = self._copied(tracked)
                is_gap_alone = piece.cut is not None and piece.offset == copied == piece.end
                if piece.offset <= copied < piece.end or is_gap_alone:
                    self._log_copies.write(tracked.job_id, tracked.log_base, piece)
            except (OSError, checks.Invalid) as error:  # the record of a gap may be invalid
                failures.append((tracked, error))
        return failures

    def _is_rest_of(self, tracked: TrackedAttempt, rest: LogPiece | None) -> bool:
        """Whether the copy of a log contains this rest of it, and is therefore complete."""
        try:
            return checked_log_piece(rest).end <= self._copied(tracked)
        except checks.Invalid:
            return False

    def _copied(self, tracked: TrackedAttempt) -> int:
        """The offset in the node's log up to which the copy has it."""
        return self._log_copies.offset(tracked.job_id, tracked.log_base)

    async def _copy_rest_and_finish(self, tracked: TrackedAttempt, final: Final) -> None:
        """Copy the rest of the log, and report the end.

        The node has reported the end already: if the node is lost now, only the rest of the log is.
        """
        has_log = not isinstance(final, NeverStarted)  # else the log is an earlier attempt's
        while has_log and tracked.node_id in self._nodes.alive and tracked.is_log_copied:
            offset = self._copied(tracked)
            try:
                piece = await self._calls.read_log(tracked, offset)
                if piece.offset != offset:
                    break
                await self._write([(tracked, piece)])
                if piece.end == offset:
                    break
            except LinkError:
                await asyncio.sleep(RETRY_DELAY_S)
            except checks.Invalid:
                break
        self._finish(tracked, final)

    async def _start(self, tracked: TrackedAttempt) -> None:
        """Find what the attempt needs beside its project, and send the order."""
        try:
            locks = await self._calls.lock_files(tracked)
            await self._cluster.wake_agent(tracked.node_id)
            stored = await self._checkpoints.stored(tracked)
        except (StorageUnavailable, OSError) as error:
            self._abandon(tracked, str(error))
            return
        with contextlib.nullcontext() if stored is None else stored.file:
            await self._order(tracked, locks, stored)

    async def _order(
        self, tracked: TrackedAttempt, locks: dict[str, str], stored: StoredCheckpoint | None
    ) -> None:
        """Send the order to the node, after what the node lacks.

        After a failure with an unknown outcome, the node is asked for the state of the attempt.
        """
        checkpoint = None if stored is None else stored.checkpoint
        if self._is_cancelled(tracked):
            self._abandon(tracked)
            return
        if (node := self._drained_node_of(tracked)) is not None:
            self._abandon(tracked, f"its node {node.name} is being drained")
            return
        tracked.is_sent = True
        try:
            while lacking := await self._calls.start(tracked, locks, checkpoint):
                tracked.is_sent = False
                await self._send(tracked, stored if lacking == "checkpoint" else None)
                if self._is_cancelled(tracked):
                    self._abandon(tracked)
                    return
                tracked.is_sent = True
        except (Refused, NotSent, OSError) as error:
            self._abandon(tracked, str(error))
        except LinkError as error:
            if not tracked.is_sent:
                self._abandon(tracked, str(error))
                return
            if stored is not None:  # the node may be out of reach for long
                stored.file.close()
            self._mark_unreachable(tracked, str(error))
            await self._recover_with_retries(tracked)
        if tracked.stop_requested:
            await self._send_stop(tracked)

    async def _send(self, tracked: TrackedAttempt, stored: StoredCheckpoint | None) -> None:
        """Send the node a checkpoint, or the project of the attempt."""

        def report_phase(phase: str) -> None:
            self._report(tracked.waits(phase))

        is_cancelled = partial(self._is_cancelled, tracked)
        if stored is None:
            await self._transfers.send(tracked, report_phase, is_cancelled)
        else:
            await self._transfers.send_checkpoint(
                tracked, stored.checkpoint, stored.file, report_phase, is_cancelled
            )
        if not is_cancelled():
            what = "project" if stored is None else "checkpoint"
            report_phase(f"its node has its {what}; it is about to start")

    def _is_cancelled(self, tracked: TrackedAttempt) -> bool:
        is_over = tracked.remaining_s is not None and tracked.remaining_s <= 0
        is_other = self._tracked.get(tracked.job_id) is not tracked
        return tracked.stop_requested or is_over or is_other

    def _abandon(self, tracked: TrackedAttempt, blocked_by: str | None = None) -> None:
        """Report that the attempt has not started."""
        self._finish(tracked, tracked.never_started(blocked_by))

    async def _recover_with_retries(self, tracked: TrackedAttempt) -> None:
        while self._tracked.get(tracked.job_id) is tracked and not tracked.is_ending:
            try:
                await self._cluster.wake_agent(tracked.node_id)
                await self._recover(tracked)
            except LinkError:
                await asyncio.sleep(RETRY_DELAY_S)
            else:
                return

    async def _recover(self, tracked: TrackedAttempt) -> None:
        """Make the node report the state of the attempt, and fence an attempt that it never got.

        Raises:
            LinkError: the node does not answer.
        """
        try:
            await self._calls.recover(tracked)
        except Refused as error:
            self._lose(tracked, str(error))
            return
        if tracked.is_unreachable:
            tracked.is_unreachable = False
            self._report(tracked.reachable())
        if tracked.stop_requested:
            await self._calls.stop(tracked)

    async def _send_stop(self, tracked: TrackedAttempt, grace_s: float | None = None) -> None:
        while self._tracked.get(tracked.job_id) is tracked:
            try:
                await self._calls.stop(tracked, grace_s)
            except LinkError:
                await asyncio.sleep(RETRY_DELAY_S)
            except Refused as error:
                log.warning("cannot stop a job", job=tracked.job_id, error=str(error))
                return
            else:
                return

    def _mark_started(self, tracked: TrackedAttempt, started: Started) -> None:
        if not tracked.has_started or tracked.is_unreachable:
            tracked.has_started, tracked.is_unreachable = True, False
            # Followers of the log wait for this file. Copying a piece creates it as well, in case
            # the disk is full now.
            with contextlib.suppress(OSError):
                self._log_copies.touch(tracked.job_id)
            self._report(started)

    def _mark_unreachable(self, tracked: TrackedAttempt, reason: str) -> None:
        if tracked.is_sent and not tracked.is_unreachable:
            tracked.is_unreachable = True
            self._report(tracked.unreachable(reason))

    def _finish(self, tracked: TrackedAttempt, final: Final) -> None:
        """Report the end of an attempt, unless another report came first."""
        if self._tracked.get(tracked.job_id) is not tracked:
            return
        if tracked.write is not None and not tracked.write.done():
            # The log of the next attempt begins where the copy ends.
            tracked.is_ending = True
            self._background.run(self._finish_after(tracked.write, tracked, final))
            return
        self._untrack(tracked)
        if isinstance(final, Ended):
            self._checkpoints.remove(tracked)
        freed = self._nodes.remove_reservation(tracked.job_id) and self._nodes.pop_refused()
        self._report(final)
        if freed:
            self.report_freed()

    async def _finish_after(
        self, write: asyncio.Future[Any], tracked: TrackedAttempt, final: Final
    ) -> None:
        await asyncio.wait({write})
        self._finish(tracked, final)

    def _next_to_recover(self, node: Node, recovered: set[str]) -> TrackedAttempt | None:
        for tracked in self._tracked_on(node):
            if tracked.job_id not in recovered and tracked.is_sent and not tracked.is_ending:
                return tracked
        return None

    def _tracked_on(self, node: Node) -> list[TrackedAttempt]:
        return list(self._by_node.get(node.node_id, {}).values())

    def _track(self, tracked: TrackedAttempt) -> None:
        self._tracked[tracked.job_id] = tracked
        self._by_node.setdefault(tracked.node_id, {})[tracked.job_id] = tracked

    def _untrack(self, tracked: TrackedAttempt) -> None:
        del self._tracked[tracked.job_id]
        on_node = self._by_node[tracked.node_id]
        del on_node[tracked.job_id]
        if not on_node:
            del self._by_node[tracked.node_id]
