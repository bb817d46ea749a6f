"""One supervising process, seen from the operator: its socket, and a pidfd that tells of its end. Made
by a fork server, given a job at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from typing import Protocol

import structlog

from cortex.engines.local.cgroups import Held
from cortex.worker import beneath, checks, processes, wire
from cortex.worker.messages import MAX_MESSAGE, Order, Reply

log = structlog.get_logger()

_LAST_WORDS = 16  # more than one process ever leaves unread: who says more has taken its socket


def signal_to(pidfd: int, *signals: signal.Signals) -> None:
    """Send a supervising process these, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        for number in signals:
            signal.pidfd_send_signal(pidfd, number)


def _has_start(order: Order) -> bool:
    try:
        with beneath.opened(order.folder) as folder:
            return beneath.stat(folder, f"start.{order.attempt}") is not None
    except OSError:
        return False


def ask_to_end(pidfd: int) -> None:
    """SIGTERM to a supervising process; its job may have stopped it, and it would not see that."""
    signal_to(pidfd, signal.SIGTERM, signal.SIGCONT)


def collect(pidfd: int) -> None:
    """Reap a supervising process that has ended: an operator that is PID 1 of a container inherits it from a
    fork server that has."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


class Owner(Protocol):
    """Who is told what becomes of it."""

    def recorded(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        """The start record of its job is made: the job has started."""

    def ended(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        """The exit record of its job is made."""

    def refused(self, reply: Reply) -> None:
        """It could not begin with its job, and is about to end."""

    def gone(self, supervisor: SupervisorHandle) -> None:
        """The process is gone; a job that it had is in `order`."""


class SupervisorHandle:
    """All of it happens on the event loop."""

    def __init__(self, pidfd: int, sock: socket.socket, group: Held, owner: Owner) -> None:
        self.order: Order | None = None
        self.why: str | None = None
        """What was wrong with what it said, if anything: it is killed then."""
        self.gone_at: float | None = None
        """When it was seen to be gone: what it leaves is ended before its owner learns of that."""
        self.idle_since = 0.0
        self.is_spent = False
        """Whether it takes no more jobs: one that was told to stop may see that late, and must not
        take it to be about the next."""
        self._has_begun = False
        self._pid = _pid(pidfd)
        self.pidfd = pidfd
        self._sock = sock
        self._group = group
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(pidfd, self._on_gone)
        self._loop.add_reader(sock, self._read)

    def give(self, order: Order) -> bool:
        """Let it run a job; False if it did not get the order, for it is gone."""
        folders = []
        if order.memory_dir is not None:
            with contextlib.suppress(OSError):  # it is gone: that ends the job, not this process
                folders = [os.open(order.memory_dir, os.O_PATH | os.O_CLOEXEC)]
        try:
            wire.send(self._sock, order.dumps(), tuple(folders))
        except OSError:
            self.dismiss()
            return False
        finally:
            for fd in folders:
                os.close(fd)
        order.forget_job()
        self.order, self._has_begun = order, False
        return True

    def go(self) -> bool:
        """Let it begin with an order that was held; False if it is gone, and has not begun."""
        try:
            wire.send(self._sock, wire.GO)
        except OSError:
            self.order = None
            return False
        if self.order is not None:
            self.order.held = False
        return True

    def withdraw(self) -> None:
        """Take back an order that was held; it ends."""
        self.order = None
        self.dismiss()

    def get_ready(self) -> None:
        """Let it fork the process of its next job ahead."""
        with contextlib.suppress(OSError):  # it is gone, and `gone` is about to tell
            wire.send(self._sock, wire.READY)

    def stop(self) -> None:
        """It ends its job and then itself."""
        self.is_spent = True
        if self.pidfd >= 0:  # else what it has left is being ended
            ask_to_end(self.pidfd)

    def dismiss(self) -> None:
        """It ends now, or when the job that it has does. Its end is told all the same."""
        self.is_spent = True
        if self._sock.fileno() >= 0 and self.order is None:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def close(self) -> None:
        """Let go of it; it ends when the job that it has does."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
        if self.pidfd >= 0:
            self._loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
            if self.order is None or self.order.held:
                self._group.let_go()

    def _read(self) -> bool:
        """Take what it says next, if it says anything more."""
        try:
            data = self._sock.recv(MAX_MESSAGE)
        except BlockingIOError:
            return False
        except OSError:  # also where it was closed
            data = b""
        if not data:
            if self._sock.fileno() >= 0:
                self._loop.remove_reader(self._sock)
            return False
        try:
            reply = self._checked(data)
        except checks.Invalid as error:
            self._give_up(str(error))
            return False
        if reply.error is not None:
            self.order, self.is_spent = None, True
            self._kill()  # it is about to end, unless it is its job that says so
            self._owner.refused(reply)
        elif reply.ended:
            self.order = None
            self._owner.ended(self, reply)
        else:
            self._has_begun = True
            self._owner.recorded(self, reply)
        return True

    def _checked(self, data: bytes) -> Reply:
        """What it says: a job may have written that into its socket.

        Raises:
            checks.Invalid: it cannot say that now, of the job that it has.
        """
        reply, order = Reply.loads(data), self.order
        if order is None or (reply.job_id, reply.attempt) != (order.job_id, order.attempt):
            raise checks.Invalid("it speaks of a job that is not its own")
        if not reply.ended and (self._has_begun or not (reply.recorded or reply.error)):
            raise checks.Invalid("it says of its job what it has said before, or nothing")
        if reply.error is not None and _has_start(order):
            raise checks.Invalid("it says that its job could not begin, which has")
        if reply.ended and processes.has_child(self._pid):
            raise checks.Invalid("it says that its job has ended, which runs")
        return reply

    def _give_up(self, why: str) -> None:
        """Nothing that it says can be believed any more. What becomes of its job is told by its end."""
        job_id = None if self.order is None else self.order.job_id
        log.warning("a supervising process is killed", job=job_id, reason=why)
        self.why = f"what its supervising process said is not valid: {why}"
        self.is_spent = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _on_gone(self) -> None:
        if self.pidfd < 0:
            return
        # What it said last is there before its end is.
        for _ in range(_LAST_WORDS):
            if not self._read():
                break
        self.gone_at = time.monotonic()
        collect(self.pidfd)
        self.close()
        self._group.end(lambda: self._owner.gone(self))


def _pid(pidfd: int) -> int:
    try:
        return processes.pid_of(pidfd)
    except OSError:  # there are no descriptors to find out with
        return -1
