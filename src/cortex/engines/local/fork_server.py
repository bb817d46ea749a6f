"""One fork server of the operator: its process, its socket, and its pool of supervisors. Called by
`fork_server_pool`.
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
from cortex.engines.local.cgroups import CgroupManager, SupervisorCgroup
from cortex.engines.local.fork_server_health import HealthCheck
from cortex.engines.local.fork_server_process import (
    FDS_PER_SUPERVISOR,
    is_own,
    is_socket,
    receive,
    start_process,
    wait_or_kill,
)
from cortex.engines.local.supervisor_pool import OrderListener, SupervisorPool
from cortex.system.account import Account, without_new_privileges
from cortex.system.background import Background, in_thread
from cortex.system.oserrors import is_shortage
from cortex.worker import checks, processes
from cortex.worker.messages import Reply, Setup, shorten

PRELOAD_TIMEOUT_S = 60.0
_UNUSABLE = "the operator has too many open files, or the process does not run as the jobs' user"
_MAX_MESSAGES_AT_ONCE = 64  # read in one callback of the loop


class ForkServer:
    """A warm interpreter that forks supervisors for the waiting orders of its pool."""

    def __init__(
        self,
        version: Version,
        setup: Setup,
        account: Account | None,
        groups: CgroupManager,
        *,
        listener: OrderListener,
        on_died: Callable[[ForkServer], None],
        on_drained: Callable[[ForkServer], None],
    ) -> None:
        """
        Args:
            on_died: called when the process has exited although it was not closed, or could not
                start.
            on_drained: called when the fork server is retired and no order waits.
        """
        self.version = version
        self.setup = setup
        self.ready = False
        self._to_import = list(setup.preload)
        self.importing: str | None = None
        """The module that it imports ahead now, or was importing when it exited."""
        self.refused: str | None = None
        """Why that module must not be imported ahead, if the fork server has reported that."""
        self.has_shortage = False
        """Whether it could not start because the machine lacks something that it may have later."""
        self.supervisors = SupervisorPool(
            listener, request_forks=self._request_forks, on_drained=lambda: on_drained(self)
        )
        self._account = account
        self._groups = groups
        self._joining = Background("a supervisor could not join its pool")
        self._listener = listener
        self._on_died = on_died
        self._requested = 0  # forks without an answer
        self._unsent = 0  # of these, the requests that the socket has not taken yet
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._last_output = ""
        self._spawn_done = asyncio.Event()
        self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._has_timed_out = False
        self._is_untrusted = False
        self._exit_task: asyncio.Task[None] | None = None
        self._pidfd = -1
        self._health = HealthCheck(self)

    @property
    def is_finished(self) -> bool:
        """Whether it is closed and all its supervisors have exited."""
        return self._is_closed and self.supervisors.is_empty

    @property
    def has_work(self) -> bool:
        """Whether it has requests to answer, or is not ready yet."""
        is_alive = not self._is_closed and self._exit_task is None
        return is_alive and (not self.ready or self._requested > 0)

    @property
    def pid(self) -> int | None:
        """The pid of its process, until that has exited."""
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    @property
    def was_killed(self) -> bool:
        """Whether something else than the operator killed it: then its environment is not to blame.
        Known once it has died."""
        # A process that a job traces is not reaped before that job ends, and has no return code.
        killed = None, -signal.SIGKILL
        is_killed = self._process is not None and self._process.returncode in killed
        return is_killed and not (self._has_timed_out or self._is_untrusted)

    @property
    def why_waiting(self) -> str | None:
        """What the waiting orders wait for, in words; None if the fork server is ready."""
        if self._health.problem is not None:
            return self._health.problem
        if self.ready:
            return None
        if self.importing is not None:
            return f"waits for {self.importing} to be imported ahead (definition.preload)"
        return "waits for the interpreter of its environment to start"

    def last_output(self) -> str:
        """The end of its output, or why it could not start."""
        return shorten(self._last_output) or "it printed nothing"

    def why_not_imported(self) -> str:
        """Why `importing` must not be imported ahead. Known once the fork server has died."""
        if self.refused is not None:
            return self.refused
        if self._has_timed_out:
            return f"its import takes longer than {PRELOAD_TIMEOUT_S:g} s"
        return f"the interpreter exited during its import: {self.last_output()}"

    async def spawn(self) -> None:
        """Start the process."""
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
            ours, its_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._last_output, self.setup.preload = str(error), []
            self.has_shortage = is_shortage(error)
            self._spawn_done.set()
            self._on_died(self)
            return
        ours.setblocking(False)
        self._socket = ours
        try:
            self._process = await in_thread(
                without_new_privileges,
                start_process,
                its_socket,
                self._errors,
                self.version,
                self.setup,
                self._account,
            )
        except OSError as error:
            self._last_output = str(error)
            self.has_shortage = is_shortage(error)
            self.setup.preload = []  # it would fail again
        finally:
            its_socket.close()
            self._spawn_done.set()
        if self._is_closed:
            return
        loop = asyncio.get_running_loop()
        if self.setup.preload:
            self._timer = loop.call_later(PRELOAD_TIMEOUT_S, self._on_preload_timeout)
        loop.add_reader(ours, self._read)
        self._watch_process()
        self._health.start_polling()

    async def close(self) -> None:
        """Close the socket, and wait for the process: it exits when the socket closes."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._spawn_done.wait()
        if self._timer is not None:
            self._timer.cancel()
        self._health.close()
        self.supervisors.retire()
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
        self._unwatch_process()
        await self._joining.finish()
        if self._process is not None:
            if not self.ready:
                self._process.kill()  # it may be in a long import, and has forked nothing yet
            await wait_or_kill(self._process)
        if self._errors is not None:
            self._errors.close()

    def is_stopped(self) -> bool:
        """Whether its process is stopped or traced.

        Raises:
            OSError: no descriptor is left to read it.
        """
        about = None if self.pid is None else processes.stat(self.pid)
        return about is not None and about[0] in "Tt"

    def resume(self) -> None:
        """Send SIGCONT to its process, which may be stopped."""
        self.send_signal(signal.SIGCONT)

    def send_signal(self, number: signal.Signals) -> None:
        """Send its process a signal, if it has one."""
        if self._process is not None:
            self._process.send_signal(number)

    async def kill_if_stopped(self) -> None:
        """Kill its process if that is stopped, and wait until it has exited."""
        with contextlib.suppress(OSError):
            while self.is_stopped():
                self.send_signal(signal.SIGKILL)
                await asyncio.sleep(0.001)

    def report_waiting_orders(self) -> None:
        """Report for each waiting order what it waits for."""
        why = self.why_waiting
        if why is not None:
            for order in self.supervisors.waiting.values():
                self._listener.on_order_waits(order, why)

    def _watch_process(self) -> None:
        """Observe the exit of the process by a pidfd too: a job may have a copy of its end of the
        socket, which then stays open."""
        if self._process is not None:
            with contextlib.suppress(OSError):  # no descriptor is left, or the process has exited
                self._pidfd = os.pidfd_open(self._process.pid)
                asyncio.get_running_loop().add_reader(self._pidfd, self._on_process_exit)

    def _unwatch_process(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_process_exit(self) -> None:
        self._unwatch_process()
        self._read()  # its last messages
        if not self._is_closed and self._exit_task is None:
            self._on_exit()

    def _read(self) -> None:
        assert self._socket is not None
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            if self._is_closed or self._exit_task is not None:
                return
            try:
                data, fds = receive(self._socket)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self._on_exit()
                return
            self._health.reset()
            try:
                self._handle(Reply.loads(data), fds)
            except checks.Invalid as error:
                self._on_invalid_message(str(error))
                return
            finally:
                for fd in fds:
                    os.close(fd)

    def _handle(self, reply: Reply, fds: list[int]) -> None:
        """
        Args:
            fds: the descriptors of the message. Those that this method uses are removed from the
                list.

        Raises:
            checks.Invalid: the message is not possible in this state.
        """
        if reply.pid or reply.error:
            if self._requested <= 0:
                raise checks.Invalid("it reports a process that was not requested")
            self._on_forked(reply, fds)
        elif self.ready or self.refused is not None:
            raise checks.Invalid("it reports the end of its start more than once")
        elif reply.importing is not None:
            if reply.importing not in self._to_import:
                raise checks.Invalid(f"it imports {reply.importing}, which is not in its list")
            self._to_import.remove(reply.importing)
            self.importing = reply.importing
            self.report_waiting_orders()
        elif reply.refused is not None:
            self.refused = reply.refused
        else:
            self.ready = True
            if self._timer is not None:
                self._timer.cancel()
            self._request_forks()

    def _on_invalid_message(self, why: str) -> None:
        """Kill the fork server. Users' code runs in it and wrote the message: no message of it can
        be trusted any more."""
        assert self._socket is not None
        assert self._process is not None
        self._last_output = f"a message of it is not valid: {why}"
        self._is_untrusted = True
        self._process.kill()
        self._on_exit()

    def _on_forked(self, reply: Reply, fds: list[int]) -> None:
        if len(fds) == FDS_PER_SUPERVISOR and is_own(fds[0], self._account) and is_socket(fds[1]):
            sock = socket.socket(fileno=fds.pop())
            self._joining.run(self._join(fds.pop(), sock))
            return
        self._requested -= 1
        if self.supervisors.waiting:
            job_id, reason = self.supervisors.pop_first_order().job_id, reply.error or _UNUSABLE
            if is_shortage(OSError(reply.errno, reason)):
                self._listener.on_order_blocked(job_id, reason)
            else:
                self._listener.on_order_failed(job_id, reason)
            self._request_forks()

    async def _join(self, pidfd: int, sock: socket.socket) -> None:
        """Add a supervisor to the pool, once it is in its control group."""
        try:
            group = await in_thread(self._groups.enclose_supervisor, pidfd)
        except OSError:  # no thread is left
            group = SupervisorCgroup(self._groups, None)
        self._requested -= 1
        if not self._is_closed:
            self.supervisors.add_supervisor(pidfd, sock, group)
            return
        os.close(pidfd)
        sock.close()
        group.remove_on_close()

    def _request_forks(self) -> None:
        """Request a supervisor for each order that may start. Without such an order and without a
        supervisor, request one ahead."""
        if not self.ready or self._is_closed:
            return
        wanted = self.supervisors.startable or int(self.supervisors.is_empty)
        self._unsent += max(0, wanted - self._requested)
        self._requested = max(wanted, self._requested)
        if self._requested:
            self._health.start_polling()
        self._send_requests()

    def _on_exit(self) -> None:
        assert self._socket is not None
        assert self._errors is not None
        asyncio.get_running_loop().remove_reader(self._socket)
        self._unwatch_process()
        with contextlib.suppress(OSError):
            end = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, end - 2000))
            text = self._errors.read().decode("utf-8", "replace").strip()
            self._last_output = self._last_output or text[-400:]
        self._exit_task = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        if self._process is not None:
            await wait_or_kill(self._process)
        if not self._is_closed:
            self._on_died(self)

    def _send_requests(self) -> None:
        if self._is_closed or self._socket is None:
            return
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                self._socket.send(b"fork")
            except BlockingIOError:
                loop.add_writer(self._socket, self._send_requests)
                return
            except OSError:
                break  # it has died: `_read` observes that
            self._unsent -= 1
        loop.remove_writer(self._socket)

    def _on_preload_timeout(self) -> None:
        """Kill the process: its imports take too long, and jobs that may not need them wait."""
        if self._process is not None and not self.ready:
            self._has_timed_out = True
            self._process.send_signal(signal.SIGKILL)
