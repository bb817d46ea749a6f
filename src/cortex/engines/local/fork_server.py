"""One fork server, seen from the operator: its process and its socket. What it forked is its `crew`. Called by
`forkservers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from typing import IO

from cortex.engines.base import Version
from cortex.engines.local.cgroups import Groups, Held
from cortex.engines.local.fork_server_health import HealthCheck
from cortex.engines.local.fork_server_process import FDS, ended, is_socket, receive, start
from cortex.engines.local.supervisor_pool import Listener, SupervisorPool
from cortex.system.account import Account, without_new_privileges
from cortex.system.background import Background, in_thread
from cortex.system.oserrors import is_shortage
from cortex.worker import checks, processes
from cortex.worker.messages import Reply, Setup, shorten

READY_S = 60.0
_UNUSABLE = "the operator has too many open files, or the process is not of the jobs' user"
_AT_A_TIME = 64  # messages that are read before others have their turn


class ForkServer:
    """It forks as many supervising processes as its crew has orders for."""

    def __init__(
        self,
        version: Version,
        setup: Setup,
        account: Account | None,
        groups: Groups,
        *,
        listener: Listener,
        died: Callable[[ForkServer], None],
        drained: Callable[[ForkServer], None],
    ) -> None:
        self.version = version
        self.setup = setup
        self.ready = False
        self._to_import = list(setup.preload)
        self.importing: str | None = None
        """The module that it imports ahead now, or was about to when it ended."""
        self.refused: str | None = None
        """Why that must not be imported ahead, once it has said so."""
        self.is_held_up = False
        """Whether it could not start for want of what the machine may have later."""
        self.crew = SupervisorPool(listener, ask=self._ask, drained=lambda: drained(self))
        self._account = account
        self._groups = groups
        self._joining = Background("a supervising process could not be taken on")
        self._listener = listener
        self._died = died
        self._asked = 0  # for how many supervising processes
        self._unsent = 0
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._words = ""
        self._spawned = asyncio.Event()
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._hurried = False
        self._is_spoilt = False
        self._ending: asyncio.Task[None] | None = None
        self._pidfd = -1
        self._pulse = HealthCheck(self)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left."""
        return self._closed and self.crew.is_gone

    @property
    def is_awaited(self) -> bool:
        """Whether it has something to do."""
        is_there = not self._closed and self._ending is None
        return is_there and (not self.ready or self._asked > 0)

    @property
    def pid(self) -> int | None:
        """Of its process, until that has ended."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def was_killed(self) -> bool:
        """Whether somebody else ended it: that says nothing about its environment. Known once it
        has died."""
        # One that a job traces is collected by nobody before that job ends.
        killed = None, -signal.SIGKILL
        is_killed = self._process is not None and self._process.returncode in killed
        return is_killed and not (self._hurried or self._is_spoilt)

    @property
    def why_waiting(self) -> str | None:
        """What an order waits for here, in words; None where it is ready."""
        if self._pulse.why_still is not None:
            return self._pulse.why_still
        if self.ready:
            return None
        if self.importing is not None:
            return f"waits for {self.importing} to be imported ahead (definition.preload)"
        return "waits for the interpreter of its environment to start"

    def last_words(self) -> str:
        return shorten(self._words) or "it said nothing"

    def why_not_imported(self) -> str:
        """Why the module that it imported last must not be imported ahead. Known once it has died."""
        if self.refused is not None:
            return self.refused
        if self._hurried:
            return f"its import takes longer than {READY_S:g} s"
        return f"the interpreter ended in its import: {self.last_words()}"

    async def spawn(self) -> None:
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._words, self.setup.preload = str(error), []
            self.is_held_up = is_shortage(error)
            self._spawned.set()
            self._died(self)
            return
        ours.setblocking(False)
        self._socket = ours
        try:
            self._process = await in_thread(
                without_new_privileges,
                start,
                theirs,
                self._errors,
                self.version,
                self.setup,
                self._account,
            )
        except OSError as error:
            self._words = str(error)
            self.is_held_up = is_shortage(error)
            self.setup.preload = []  # it would fail again
        finally:
            theirs.close()
            self._spawned.set()
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        if self.setup.preload:
            self._timer = loop.call_later(READY_S, self._hurry)
        loop.add_reader(ours, self._read)
        self._watch_process()
        self._pulse.watch()

    async def close(self) -> None:
        """Its process ends by itself when the socket does; wait for that."""
        if self._closed:
            return
        self._closed = True
        await self._spawned.wait()
        if self._timer is not None:
            self._timer.cancel()
        self._pulse.close()
        self.crew.retire()
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
        self._let_go_of_process()
        await self._joining.finish()
        if self._process is not None:
            if not self.ready:
                self._process.kill()  # it may be in a long import, and holds nothing yet
            await ended(self._process)
        if self._errors is not None:
            self._errors.close()

    def is_stopped(self) -> bool:
        """Whether somebody has stopped its process, or traces it.

        Raises:
            OSError: there are no descriptors to find out with.
        """
        about = None if self.pid is None else processes.stat(self.pid)
        return about is not None and about[0] in "Tt"

    def go_on(self) -> None:
        """Let its process go on if somebody has stopped that."""
        self.send_signal(signal.SIGCONT)

    def send_signal(self, number: signal.Signals) -> None:
        """Send its process this, if that is there."""
        if self._process is not None:
            self._process.send_signal(number)

    async def end_if_stopped(self) -> None:
        """End its process if somebody has stopped that, and wait until it is gone."""
        with contextlib.suppress(OSError):
            while self.is_stopped():
                self.send_signal(signal.SIGKILL)
                await asyncio.sleep(0.001)

    def tell_waiting(self) -> None:
        """Say to the jobs that have orders here what they wait for."""
        why = self.why_waiting
        if why is not None:
            for order in self.crew.waiting.values():
                self._listener.waits(order, why)

    def _watch_process(self) -> None:
        """Be told of its end also where a job has its end of the socket, and that does not end with it."""
        if self._process is not None:
            with contextlib.suppress(OSError):  # for want of descriptors, or it has ended
                self._pidfd = os.pidfd_open(self._process.pid)
                asyncio.get_running_loop().add_reader(self._pidfd, self._on_gone)

    def _let_go_of_process(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_gone(self) -> None:
        self._let_go_of_process()
        self._read()  # what it said last
        if not self._closed and self._ending is None:
            self._on_end()

    def _read(self) -> None:
        assert self._socket is not None
        for _ in range(_AT_A_TIME):
            if self._closed or self._ending is not None:
                return
            try:
                data, fds = receive(self._socket)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self._on_end()
                return
            self._pulse.heard()
            try:
                self._take(Reply.loads(data), fds)
            except checks.Invalid as error:
                self._give_up(str(error))
                return
            finally:
                for fd in fds:
                    os.close(fd)

    def _take(self, reply: Reply, fds: list[int]) -> None:
        """
        Args:
            fds: those that came with it; who takes one takes it out.

        Raises:
            checks.Invalid: it cannot say that now.
        """
        if reply.pid or reply.error:
            if self._asked <= 0:
                raise checks.Invalid("it tells of a process that nobody has asked it for")
            self._forked(reply, fds)
        elif self.ready or self.refused is not None:
            raise checks.Invalid("it says more than once how its start has ended")
        elif reply.importing is not None:
            if reply.importing not in self._to_import:
                raise checks.Invalid(f"it imports {reply.importing}, which it was not told to")
            self._to_import.remove(reply.importing)
            self.importing = reply.importing
            self.tell_waiting()
        elif reply.refused is not None:
            self.refused = reply.refused
        else:
            self.ready = True
            if self._timer is not None:
                self._timer.cancel()
            self._ask()

    def _give_up(self, why: str) -> None:
        """Users' code runs in it, and has spoken for it: nothing that it says can be believed any more."""
        assert self._socket is not None
        assert self._process is not None
        self._words = f"what it said is not valid: {why}"
        self._is_spoilt = True
        self._process.kill()
        self._on_end()

    def _forked(self, reply: Reply, fds: list[int]) -> None:
        if len(fds) == FDS and self._is_own(fds[0]) and is_socket(fds[1]):
            sock = socket.socket(fileno=fds.pop())
            self._joining.run(self._join(fds.pop(), sock))
            return
        self._asked -= 1
        if self.crew.waiting:
            job_id, reason = self.crew.take_first().job_id, reply.error or _UNUSABLE
            if is_shortage(OSError(reply.errno, reason)):
                self._listener.held_up(job_id, reason)
            else:
                self._listener.not_forked(job_id, reason)
            self._ask()

    async def _join(self, pidfd: int, sock: socket.socket) -> None:
        """Let it be one of the crew, once it is in its control group."""
        try:
            group = await in_thread(self._groups.hold, pidfd)
        except OSError:  # no thread is to be had
            group = Held(self._groups, None)
        self._asked -= 1
        if not self._closed:
            self.crew.join(pidfd, sock, group)
            return
        os.close(pidfd)
        sock.close()
        group.let_go()

    def _is_own(self, pidfd: int) -> bool:
        """Whether it is of a process that the fork server's user may signal: with more rights than that the
        operator does so for whoever is a supervising process, and users' code runs in fork servers."""
        try:
            with contextlib.suppress(ProcessLookupError):  # it is one, of a process that is gone
                signal.pidfd_send_signal(pidfd, 0)
            if self._account is None:
                return True
            return processes.owner(processes.pid_of(pidfd)) == self._account.uid
        except OSError:
            return False

    def _ask(self) -> None:
        """Ask for as many supervising processes as there is work for; for one ahead, once it is ready and
        there are none."""
        if not self.ready or self._closed:
            return
        wanted = self.crew.wanted or int(self.crew.is_gone)
        self._unsent += max(0, wanted - self._asked)
        self._asked = max(wanted, self._asked)
        if self._asked:
            self._pulse.watch()
        self._flush()

    def _on_end(self) -> None:
        assert self._socket is not None
        assert self._errors is not None
        asyncio.get_running_loop().remove_reader(self._socket)
        self._let_go_of_process()
        with contextlib.suppress(OSError):
            end = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, end - 2000))
            text = self._errors.read().decode("utf-8", "replace").strip()
            self._words = self._words or text[-400:]
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        if self._process is not None:
            await ended(self._process)
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
