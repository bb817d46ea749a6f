"""One supervising process, seen from the operator: its socket, and a pidfd that tells of its end. Made
by a fork server, given a job at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from typing import Protocol

from cortex.worker import wire
from cortex.worker.messages import MOST_MESSAGE, Order, Reply


def ask_to_end(pidfd: int) -> None:
    """SIGTERM to a supervising process; its job may have stopped it, and it would not see that."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)


def collect(pidfd: int) -> None:
    """Reap a supervising process that has ended: an operator that is PID 1 of a container inherits it from a
    fork server that has."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


class Owner(Protocol):
    """Who is told what becomes of it."""

    def recorded(self, supervisor: Supervisor, reply: Reply) -> None:
        """The start record of its job is made: the job has started."""

    def ended(self, supervisor: Supervisor, reply: Reply) -> None:
        """The exit record of its job is made."""

    def refused(self, reply: Reply) -> None:
        """It could not begin with its job, and is about to end."""

    def gone(self, supervisor: Supervisor) -> None:
        """The process is gone; a job that it had is in `order`."""


class Supervisor:
    """All of it happens on the event loop."""

    def __init__(self, pidfd: int, sock: socket.socket, owner: Owner) -> None:
        self.order: Order | None = None
        self.idle_since = 0.0
        self.is_spent = False
        """Whether it takes no more jobs: one that was told to stop may see that late, and must not
        take it to be about the next."""
        self._pidfd = pidfd
        self._sock = sock
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(pidfd, self._on_gone)
        self._loop.add_reader(sock, self._read)

    def give(self, order: Order) -> bool:
        """Let it run a job; False if it did not get the order, for it is gone."""
        try:
            wire.send(self._sock, order.dumps())
        except OSError:
            self.dismiss()
            return False
        self.order = order
        return True

    def go(self) -> bool:
        """Let it begin with an order that was held; False if it is gone, and has not begun."""
        try:
            wire.send(self._sock, wire.GO)
        except OSError:
            self.order = None
            return False
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
        ask_to_end(self._pidfd)

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
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _read(self) -> bool:
        """Take what it says next, if it says anything more."""
        try:
            data = self._sock.recv(MOST_MESSAGE)
        except BlockingIOError:
            return False
        except OSError:  # also where it was closed
            data = b""
        if not data:
            if self._sock.fileno() >= 0:
                self._loop.remove_reader(self._sock)
            return False
        reply = Reply.loads(data)
        if reply.error is not None:
            self.order, self.is_spent = None, True
            self._owner.refused(reply)
        elif reply.ended:
            self.order = None
            self._owner.ended(self, reply)
        else:
            self._owner.recorded(self, reply)
        return True

    def _on_gone(self) -> None:
        if self._pidfd < 0:
            return
        # What it said last is there before its end is.
        while self._read():
            pass
        collect(self._pidfd)
        self.close()
        self._owner.gone(self)
