"""The supervisors of one fork server, and the orders that wait for a supervisor. Owned by
`fork_server`.

Only a few supervisors begin their orders at the same time (`StartThrottle`). More than the cores
can run would share the cores' time and caches: all jobs would begin later, and each start would
cost more.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Protocol

from cortex.engines.local.cgroups import SupervisorCgroup
from cortex.engines.local.supervisor import SupervisorHandle
from cortex.worker import processes
from cortex.worker.messages import Order, Reply

IDLE_TIMEOUT_S = 10.0
"""After which the pool dismisses idle supervisors beyond MAX_IDLE."""
MAX_IDLE = 2
MAX_READY = 4
"""The idle supervisors that fork the process of their next job ahead."""
MAX_STARTING = 3 * len(os.sched_getaffinity(0))
START_TIMEOUT_S = 1.0
"""After which a start counts as complete: a job may stop its supervisor before that reports the
start."""


class OrderListener(Protocol):
    """The sender of orders, which gets the outcome of each."""

    def on_order_waits(self, order: Order, reason: str) -> None:
        """The order cannot be carried out yet."""

    def on_order_received(self, supervisor: SupervisorHandle, order: Order) -> None:
        """A supervisor has received the order."""

    def on_start_recorded(self, reply: Reply) -> None:
        """The start record exists: the job has started."""

    def on_exit_recorded(self, reply: Reply) -> None:
        """The exit record exists."""

    def on_order_refused(self, reply: Reply) -> None:
        """A supervisor could not begin the order. No code of the job has run, and none will."""

    def on_order_orphaned(self, order: Order, protocol_error: str | None) -> None:
        """The supervisor of the order has exited. The job's records show how the job ended.

        Args:
            protocol_error: why the supervisor was killed; the reason of the loss if no record shows
                another one.
        """

    def on_order_failed(self, job_id: str, reason: str) -> None:
        """No supervisor received the order, and none will."""

    def on_order_blocked(self, job_id: str, reason: str) -> None:
        """No supervisor received the order: the machine lacks something that it may have later."""

    def on_order_unanswered(self, job_id: str) -> None:
        """No supervisor is known to have received the order: the fork server died."""


class SupervisorPool:
    """All supervisors of one fork server. They outlive the fork server."""

    def __init__(
        self,
        listener: OrderListener,
        *,
        request_forks: Callable[[], None],
        on_drained: Callable[[], None],
    ) -> None:
        """
        Args:
            request_forks: called when orders could start but no supervisor is idle.
            on_drained: called when the pool is retired and no order waits.
        """
        self.waiting: dict[str, Order] = {}  # by job, first in first out
        self._listener = listener
        self._request_forks = request_forks
        self._on_drained = on_drained
        self._is_retired = False
        # The supervisor that ended a job last is the warmest. It is the last one.
        self._idle: list[SupervisorHandle] = []
        self._all: set[SupervisorHandle] = set()
        self._trim_timer: asyncio.TimerHandle | None = None
        self._throttle = StartThrottle(self._send_orders)

    @property
    def startable(self) -> int:
        """The number of waiting orders that the throttle lets start now."""
        return min(len(self.waiting), max(0, self._throttle.free))

    def pids(self) -> set[int]:
        """The pids of all supervisors.

        Raises:
            OSError: no descriptor is left to read them.
        """
        return {processes.pid_of(each.pidfd) for each in self._all if each.pidfd >= 0}

    @property
    def is_empty(self) -> bool:
        """Whether no supervisor is alive."""
        return not self._all

    def submit_order(self, order: Order) -> None:
        """Send the order to a supervisor as soon as one is idle and the throttle allows."""
        self.waiting[order.job_id] = order
        self._send_orders()

    def send_order_on_hold(self, order: Order) -> SupervisorHandle | None:
        """Send an order on hold to an idle supervisor, if there is one."""
        while self._idle:
            supervisor = self._idle.pop()
            if supervisor.send_order(order):
                return supervisor
        return None

    def pop_first_order(self) -> Order:
        """Remove the order that has waited longest. At least one has to wait."""
        return self.waiting.pop(next(iter(self.waiting)))

    def withdraw_order(self, job_id: str) -> bool:
        """Remove an order that waits; False if none of this job does."""
        return self.waiting.pop(job_id, None) is not None

    def retire(self) -> None:
        """Dismiss the idle supervisors. The pool gets no more orders."""
        self._is_retired = True
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        self._trim(0)

    def add_supervisor(self, pidfd: int, sock: socket.socket, group: SupervisorCgroup) -> None:
        """Add a supervisor that the fork server has forked."""
        supervisor = SupervisorHandle(pidfd, sock, group, self)
        self._all.add(supervisor)
        self._on_idle(supervisor)

    def on_job_started(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        self._throttle.remove(supervisor)
        self._listener.on_start_recorded(reply)
        self._send_orders()

    def on_job_ended(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        self._throttle.remove(supervisor)
        self._listener.on_exit_recorded(reply)
        self._on_idle(supervisor)

    def on_order_refused(self, reply: Reply) -> None:
        self._listener.on_order_refused(reply)

    def on_supervisor_exited(self, supervisor: SupervisorHandle) -> None:
        self._all.discard(supervisor)
        if supervisor in self._idle:
            self._idle.remove(supervisor)
        self._throttle.remove(supervisor)
        if supervisor.order is not None:
            self._listener.on_order_orphaned(supervisor.order, supervisor.protocol_error)
        self._send_orders()

    def detach(self) -> None:
        """Detach from all supervisors. They exit when their jobs end."""
        self._throttle.close()
        for supervisor in self._all:
            supervisor.close()

    def _send_orders(self) -> None:
        """Send waiting orders to idle supervisors, as far as the throttle allows."""
        while self.startable:
            if not self._idle:
                self._request_forks()
                return
            supervisor = self._idle.pop()
            order = next(iter(self.waiting.values()))
            if supervisor.send_order(order):
                self._on_sent(supervisor, self.pop_first_order())

    def _on_sent(self, supervisor: SupervisorHandle, order: Order) -> None:
        self._throttle.add(supervisor)
        self._listener.on_order_received(supervisor, order)
        if self._is_retired and not self.waiting:
            self._trim(0)
            self._on_drained()

    def _on_idle(self, supervisor: SupervisorHandle) -> None:
        if supervisor.is_spent or (self._is_retired and not self.waiting):
            supervisor.dismiss()
            return
        loop = asyncio.get_running_loop()
        supervisor.idle_since = loop.time()
        self._idle.append(supervisor)
        self._send_orders()
        if supervisor.order is not None:
            return
        if len(self._idle) <= MAX_READY and not self.waiting:
            supervisor.send_ready()
        if self._trim_timer is None and not self._is_retired:
            self._trim_timer = loop.call_later(IDLE_TIMEOUT_S, self._trim_idle)

    def _trim_idle(self) -> None:
        self._trim_timer = None
        self._trim(MAX_IDLE)
        if len(self._idle) > MAX_IDLE:
            loop = asyncio.get_running_loop()
            self._trim_timer = loop.call_later(IDLE_TIMEOUT_S, self._trim_idle)

    def _trim(self, remaining: int) -> None:
        """Dismiss supervisors that have been idle for long, the coldest first.

        Args:
            remaining: the number of supervisors to leave; 0 dismisses all, however long they were
                idle.
        """
        before = asyncio.get_running_loop().time() - (IDLE_TIMEOUT_S / 2 if remaining else 0)
        excess = self._idle[: max(0, len(self._idle) - remaining)]
        old = [supervisor for supervisor in excess if supervisor.idle_since <= before]
        for supervisor in old:
            self._idle.remove(supervisor)
            supervisor.dismiss()


class StartThrottle:
    """Limits how many supervisors of a pool begin their orders at the same time."""

    def __init__(self, on_free: Callable[[], None]) -> None:
        """
        Args:
            on_free: called when a start has timed out and others may begin.
        """
        self._since: dict[SupervisorHandle, float] = {}  # by the loop's clock, in this order
        self._on_free = on_free
        self._timer: asyncio.TimerHandle | None = None

    @property
    def free(self) -> int:
        """How many more supervisors may begin."""
        return MAX_STARTING - len(self._since)

    def add(self, supervisor: SupervisorHandle) -> None:
        """A supervisor has received its order."""
        self._since[supervisor] = asyncio.get_running_loop().time()
        self._schedule_timeout()

    def remove(self, supervisor: SupervisorHandle) -> None:
        """A supervisor has reported the start or the end of its job, or has exited."""
        self._since.pop(supervisor, None)

    def close(self) -> None:
        """Call `on_free` no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _remove_timed_out(self) -> None:
        self._timer = None
        before = asyncio.get_running_loop().time() - START_TIMEOUT_S
        for supervisor, since in list(self._since.items()):
            if since <= before:
                del self._since[supervisor]
        if self.free > 0:
            self._on_free()
        self._schedule_timeout()

    def _schedule_timeout(self) -> None:
        """Start the timer if no more supervisors may begin and the timer does not run."""
        if self._timer is None and self.free <= 0:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(START_TIMEOUT_S, self._remove_timed_out)
