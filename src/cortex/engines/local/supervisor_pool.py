"""The supervising processes of one fork server, and the orders that wait for one of them. Owned by
`forkserver`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from cortex.engines.local.cgroups import Held
from cortex.engines.local.start_throttle import StartThrottle
from cortex.engines.local.supervisor import SupervisorHandle
from cortex.worker import processes
from cortex.worker.messages import Order, Reply

IDLE_S = 10.0
MOST_IDLE = 2  # that are kept for longer than that
MOST_READY = 4  # of those that are idle have the process of their next job forked ahead


class Listener(Protocol):
    """Who gives the orders."""

    def waits(self, order: Order, reason: str) -> None:
        """An order cannot be carried out yet."""

    def given(self, supervisor: SupervisorHandle, order: Order) -> None:
        """A supervising process has got its order."""

    def recorded(self, reply: Reply) -> None:
        """A start record is made: the job has started."""

    def ended(self, reply: Reply) -> None:
        """An exit record is made."""

    def refused(self, reply: Reply) -> None:
        """An order could not be begun with: no code has run, and none is going to."""

    def orphaned(self, order: Order, why: str | None) -> None:
        """The supervising process of an order is gone: its records tell what became of the job; where they tell
        nothing, this was wrong."""

    def not_forked(self, job_id: str, reason: str) -> None:
        """The order could not be carried out, and never will be."""

    def held_up(self, job_id: str, reason: str) -> None:
        """The order was given to nobody, for want of what the machine may have later."""

    def unanswered(self, job_id: str) -> None:
        """The order was given to nobody, for the fork server died."""


class SupervisorPool:
    """All of one fork server, whether or not that lives."""

    def __init__(
        self, listener: Listener, *, ask: Callable[[], None], drained: Callable[[], None]
    ) -> None:
        """
        Args:
            ask: called when more of them are wanted.
            drained: called when it gets no more orders, and those it has are given.
        """
        self.waiting: dict[str, Order] = {}  # by job, first in first out
        self._listener = listener
        self._ask = ask
        self._drained = drained
        self._is_retired = False
        self._idle: list[
            SupervisorHandle
        ] = []  # the one that has just ended a job is the warmest: last
        self._all: set[SupervisorHandle] = set()
        self._trimmer: asyncio.TimerHandle | None = None
        self._starts = StartThrottle(self._hand_out)

    @property
    def wanted(self) -> int:
        """How many more supervising processes there is work for now."""
        return min(len(self.waiting), max(0, self._starts.room))

    def pids(self) -> set[int]:
        """Of all of them.

        Raises:
            OSError: there are no descriptors to find out with.
        """
        return {processes.pid_of(each.pidfd) for each in self._all if each.pidfd >= 0}

    @property
    def is_gone(self) -> bool:
        """Whether there are none."""
        return not self._all

    def order(self, order: Order) -> None:
        """Give it to a supervising process, as soon as there is one and it is its turn."""
        self.waiting[order.job_id] = order
        self._hand_out()

    def prepare(self, order: Order) -> SupervisorHandle | None:
        """Give an order that is held to a supervising process that has none, if there is one."""
        while self._idle:
            supervisor = self._idle.pop()
            if supervisor.give(order):
                return supervisor
        return None

    def take_first(self) -> Order:
        """Take the order that has waited longest; there has to be one."""
        return self.waiting.pop(next(iter(self.waiting)))

    def withdraw(self, job_id: str) -> bool:
        """Take back an order that waits; False if it was given to somebody."""
        return self.waiting.pop(job_id, None) is not None

    def retire(self) -> None:
        """It gets no more orders: what is idle ends."""
        self._is_retired = True
        if self._trimmer is not None:
            self._trimmer.cancel()
        self._trim(0)

    def join(self, pidfd: int, sock: socket.socket, group: Held) -> None:
        """Another one was forked."""
        supervisor = SupervisorHandle(pidfd, sock, group, self)
        self._all.add(supervisor)
        self._free(supervisor)

    def recorded(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        self._starts.has_begun(supervisor)
        self._listener.recorded(reply)
        self._hand_out()

    def ended(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        self._starts.has_begun(supervisor)
        self._listener.ended(reply)
        self._free(supervisor)

    def refused(self, reply: Reply) -> None:
        self._listener.refused(reply)

    def gone(self, supervisor: SupervisorHandle) -> None:
        self._all.discard(supervisor)
        if supervisor in self._idle:
            self._idle.remove(supervisor)
        self._starts.has_begun(supervisor)
        if supervisor.order is not None:
            self._listener.orphaned(supervisor.order, supervisor.why)
        self._hand_out()

    def let_go(self) -> None:
        """Let go of all supervising processes: they end when their jobs do."""
        self._starts.close()
        for supervisor in self._all:
            supervisor.close()

    def _hand_out(self) -> None:
        """Give what waits to those that are idle, as far as there is room for starts."""
        while self.wanted:
            if not self._idle:
                self._ask()
                return
            supervisor = self._idle.pop()
            order = next(iter(self.waiting.values()))
            if supervisor.give(order):
                self._given(supervisor, self.take_first())

    def _given(self, supervisor: SupervisorHandle, order: Order) -> None:
        self._starts.begins(supervisor)
        self._listener.given(supervisor, order)
        if self._is_retired and not self.waiting:
            self._trim(0)
            self._drained()

    def _free(self, supervisor: SupervisorHandle) -> None:
        if supervisor.is_spent or (self._is_retired and not self.waiting):
            supervisor.dismiss()
            return
        loop = asyncio.get_running_loop()
        supervisor.idle_since = loop.time()
        self._idle.append(supervisor)
        self._hand_out()
        if supervisor.order is not None:
            return
        if len(self._idle) <= MOST_READY and not self.waiting:
            supervisor.get_ready()
        if self._trimmer is None and not self._is_retired:
            self._trimmer = loop.call_later(IDLE_S, self._trim_later)

    def _trim_later(self) -> None:
        self._trimmer = None
        self._trim(MOST_IDLE)
        if len(self._idle) > MOST_IDLE:
            loop = asyncio.get_running_loop()
            self._trimmer = loop.call_later(IDLE_S, self._trim_later)

    def _trim(self, most: int) -> None:
        """Dismiss those that were idle for long, the coldest first, but for `most`; with 0 all."""
        before = asyncio.get_running_loop().time() - (IDLE_S / 2 if most else 0)
        old = [s for s in self._idle[: max(0, len(self._idle) - most)] if s.idle_since <= before]
        for supervisor in old:
            self._idle.remove(supervisor)
            supervisor.dismiss()
