"""One fork server, seen from the operator: its process, its socket, and the supervising processes that
it forked. Called by `forkservers`.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from cortex.account import Account, identity
from cortex.background import in_thread
from cortex.engines.base import Version
from cortex.engines.local.supervisors import Supervisor
from cortex.worker import forkserver, processes
from cortex.worker.messages import JOB_ID_ROOM, MOST_MESSAGE, Order, Reply, Setup, shorten

READY_S = 60.0
IDLE_S = 10.0
MOST_IDLE = 2  # supervising processes of a version that are kept for longer than that
MOST_READY = 4  # of those that are idle have the process of their next job forked ahead
_END_S = 5
_UNUSABLE = "the operator has too many open files, or the process is not of the jobs' user"
_FDS = 2  # a pidfd and a socket come with each
_SCRIPT = str(Path(forkserver.__file__).absolute())


class Listener(Protocol):
    """Who gives the orders."""

    def given(self, supervisor: Supervisor, order: Order) -> None:
        """A supervising process has got its order."""

    def recorded(self, reply: Reply) -> None:
        """A start record is made: the job has started."""

    def ended(self, reply: Reply) -> None:
        """An exit record is made."""

    def refused(self, reply: Reply) -> None:
        """An order could not be begun with: no code has run, and none is going to."""

    def orphaned(self, order: Order) -> None:
        """The supervising process of an order is gone: its records tell what became of the job."""

    def not_forked(self, job_id: str, reason: str) -> None:
        """The order could not be carried out, and never will be."""

    def unanswered(self, job_id: str) -> None:
        """The order was given to nobody, for the fork server died."""


class ForkServer:
    """One process and its socket. Orders wait here until there is a supervising process for each."""

    def __init__(
        self,
        version: Version,
        setup: Setup,
        account: Account | None,
        *,
        listener: Listener,
        died: Callable[[ForkServer], None],
        drained: Callable[[ForkServer], None],
    ) -> None:
        self.version = version
        self.setup = setup
        self.ready = False
        self.retired = False
        self.waiting: dict[str, Order] = {}  # by job, first in first out
        self._account = account
        self._listener = listener
        self._died = died
        self._drained = drained
        self._idle: list[Supervisor] = []  # the one that has just ended a job is the warmest: last
        self._all: set[Supervisor] = set()
        self._asked = 0  # for how many supervising processes
        self._unsent = 0
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._words = ""
        self._spawned = asyncio.Event()
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._trimmer: asyncio.TimerHandle | None = None
        self._hurried = False
        self._ending: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left."""
        return self._closed and not self._all

    @property
    def was_killed(self) -> bool:
        """Whether somebody else ended it: that says nothing about its environment. Known once it
        has died."""
        code = None if self._process is None else self._process.returncode
        return code == -signal.SIGKILL and not self._hurried

    def order(self, order: Order) -> None:
        """Give it to a supervising process, as soon as there is one."""
        while self._idle:
            if self._give(self._idle.pop(), order):
                return
        self.waiting[order.job_id] = order
        self._ask()

    def prepare(self, order: Order) -> Supervisor | None:
        """Give an order that is held to a supervising process that has none, if there is one."""
        while self._idle:
            supervisor = self._idle.pop()
            if supervisor.give(order):
                return supervisor
        return None

    def withdraw(self, job_id: str) -> bool:
        """Take back an order that waits; False if it was given to somebody."""
        return self.waiting.pop(job_id, None) is not None

    def retire(self) -> None:
        """It gets no more orders: what is idle ends."""
        self.retired = True
        self._trim(0)

    def last_words(self) -> str:
        return shorten(self._words) or "it said nothing"

    async def spawn(self) -> None:
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._words, self.setup.preload = str(error), False
            self._spawned.set()
            self._died(self)
            return
        ours.setblocking(False)
        self._socket = ours
        try:
            self._process = await in_thread(self._popen, theirs)
        except OSError as error:
            self._words = str(error)
            self.setup.preload = False  # it would fail again
        finally:
            theirs.close()
            self._spawned.set()
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(READY_S, self._hurry) if self.setup.preload else None
        loop.add_reader(ours, self._read)

    async def close(self) -> None:
        """Its process ends by itself when the socket does; wait for that."""
        if self._closed:
            return
        self._closed = True
        await self._spawned.wait()
        for timer in (self._timer, self._trimmer):
            if timer is not None:
                timer.cancel()
        self._trim(0)
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
        if self._process is not None:
            if not self.ready:
                self._process.kill()  # it may be in a long import, and holds nothing yet
            await _ended(self._process)
        if self._errors is not None:
            self._errors.close()

    def _popen(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(self.setup.dumps())
            stdin.seek(0)
            return subprocess.Popen(
                [str(self.version.python), "-I", _SCRIPT, str(theirs.fileno())],
                stdin=stdin,
                stdout=self._errors,
                stderr=self._errors,
                env={**self.setup.env, "CORTEX_JOB_ID": "-" * JOB_ID_ROOM},
                cwd=self.setup.project,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                **identity(self._account),
            )

    def _read(self) -> None:
        assert self._socket is not None
        while not self._closed:
            try:
                data, fds = _receive(self._socket)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self._on_end()
                return
            reply = Reply.loads(data)
            if reply.pid or reply.error:
                self._forked(reply, fds)
            else:
                self.ready = True
                if self._timer is not None:
                    self._timer.cancel()
                self._ask()

    def _forked(self, reply: Reply, fds: list[int]) -> None:
        self._asked -= 1
        if len(fds) == _FDS and self._is_own(fds[0]):
            supervisor = Supervisor(fds[0], socket.socket(fileno=fds[1]), self)
            self._all.add(supervisor)
            self._free(supervisor)
            return
        for fd in fds:
            os.close(fd)
        if self.waiting:
            job_id = next(iter(self.waiting))
            del self.waiting[job_id]
            self._listener.not_forked(job_id, reply.error or _UNUSABLE)

    def _is_own(self, pidfd: int) -> bool:
        """Whether it is of a process that the fork server's user may signal: with more rights than that the
        operator does so for whoever is a supervising process, and users' code runs in fork servers."""
        if self._account is None:
            return True
        try:
            return processes.owner(processes.held(pidfd)) == self._account.uid
        except OSError:
            return False

    def recorded(self, reply: Reply) -> None:
        self._listener.recorded(reply)

    def ended(self, supervisor: Supervisor, reply: Reply) -> None:
        self._listener.ended(reply)
        self._free(supervisor)

    def refused(self, reply: Reply) -> None:
        self._listener.refused(reply)

    def gone(self, supervisor: Supervisor) -> None:
        self._all.discard(supervisor)
        if supervisor in self._idle:
            self._idle.remove(supervisor)
        if supervisor.order is not None:
            self._listener.orphaned(supervisor.order)

    def let_go(self) -> None:
        """Let go of all supervising processes: they end when their jobs do."""
        for supervisor in self._all:
            supervisor.close()

    def _give(self, supervisor: Supervisor, order: Order) -> bool:
        if not supervisor.give(order):
            return False
        self._listener.given(supervisor, order)
        if self.retired and not self.waiting:
            self._drained(self)
        return True

    def _free(self, supervisor: Supervisor) -> None:
        if supervisor.is_spent:
            supervisor.dismiss()
        elif self.waiting:
            order = self.waiting.pop(next(iter(self.waiting)))
            if not self._give(supervisor, order):
                self.order(order)
        elif self.retired or self._closed:
            supervisor.dismiss()
        else:
            loop = asyncio.get_running_loop()
            supervisor.idle_since = loop.time()
            self._idle.append(supervisor)
            if len(self._idle) <= MOST_READY:
                supervisor.get_ready()
            if self._trimmer is None:
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

    def _ask(self) -> None:
        """Ask for as many supervising processes as there are orders without one; for one ahead,
        once it is ready and there are none."""
        if not self.ready or self._closed:
            return
        wanted = len(self.waiting) or int(not self._all)
        self._unsent += max(0, wanted - self._asked)
        self._asked = max(wanted, self._asked)
        self._flush()

    def _on_end(self) -> None:
        assert self._socket is not None
        assert self._errors is not None
        asyncio.get_running_loop().remove_reader(self._socket)
        with contextlib.suppress(OSError):
            end = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, end - 2000))
            text = self._errors.read().decode("utf-8", "replace").strip()
            self._words = self._words or text[-400:]
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        if self._process is not None:
            await _ended(self._process)
        if not self._closed:
            self._died(self)

    def _flush(self) -> None:
        if self._closed or self._socket is None:
            return
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                self._socket.send(b"fork")
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except OSError:
                break  # it has died: the reader sees that
            self._unsent -= 1
        loop.remove_writer(self._socket)

    def _hurry(self) -> None:
        """An import that hangs must not hold up jobs that may not even need it."""
        if self._process is not None and not self.ready:
            self._hurried = True
            self._process.send_signal(signal.SIGKILL)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    room = socket.CMSG_SPACE(_FDS * array.array("i").itemsize)
    # Descriptors that arrive would else be inherited by whatever the operator starts.
    data, ancillary, _, _ = sock.recvmsg(MOST_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    try:
        await in_thread(_wait, process)
    except OSError:
        process.kill()
        process.wait()  # not for long


def _wait(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None and not _ends(process.pid):
        process.kill()
    process.wait()


def _ends(pid: int) -> bool:
    """Whether a child does so by itself within a time, by the kernel's clock: that of the system may be
    set meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)  # it is not reaped yet: it is surely this one
    except OSError:
        return False  # there are no descriptors to wait with
    try:
        poller = select.poll()  # a select takes no descriptor from 1024 on
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(_END_S * 1000))
    finally:
        os.close(pidfd)
