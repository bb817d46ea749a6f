"""The operator's handles of supervisors (`cortex.worker.supervisor.main`), one per process.

`SupervisorHandle` is owned by a `SupervisorPool`: a fork server of this operator forked the
process, and it runs one job after another. `AdoptedSupervisor` is owned by `attempts`: the process
was forked for an earlier operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from cortex.engines.local import leftovers
from cortex.engines.local.cgroups import SupervisorCgroup
from cortex.joblog.watch import FileWatch
from cortex.worker import beneath, checks, processes, wire
from cortex.worker.messages import MAX_MESSAGE, Order, Reply

log = structlog.get_logger()

FORGED_RECORD_POLL_S = 0.5
"""Between two polls whether a job still runs of which an exit record exists."""
_MAX_LAST_MESSAGES = 16
"""A supervisor that exits leaves fewer messages unread. More are those of a job that took its
socket."""


def send_signals(pidfd: int, *signals: signal.Signals) -> None:
    """Send these signals to a supervisor, if it is alive."""
    with contextlib.suppress(ProcessLookupError):
        for number in signals:
            signal.pidfd_send_signal(pidfd, number)


def request_end(pidfd: int) -> None:
    """Send SIGTERM to a supervisor, then SIGCONT: a stopped process would not act on SIGTERM, and
    its job can stop it."""
    send_signals(pidfd, signal.SIGTERM, signal.SIGCONT)


def reap(pidfd: int) -> None:
    """Reap a supervisor that has exited. Where the operator is PID 1 of a container, it inherits
    the supervisors of a fork server that has exited."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


class SupervisorOwner(Protocol):
    """The owner of a `SupervisorHandle`, which gets its events."""

    def on_job_started(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        """The start record of the supervisor's job exists: the job has started."""

    def on_job_ended(self, supervisor: SupervisorHandle, reply: Reply) -> None:
        """The exit record of the supervisor's job exists."""

    def on_order_refused(self, reply: Reply) -> None:
        """The supervisor could not begin its job, and is about to exit."""

    def on_supervisor_exited(self, supervisor: SupervisorHandle) -> None:
        """The supervisor has exited. If it had a job, `order` names it."""


class SupervisorHandle:
    """A supervisor of this operator: its socket, and a pidfd that reports its exit. All methods run
    on the event loop."""

    def __init__(
        self, pidfd: int, sock: socket.socket, group: SupervisorCgroup, owner: SupervisorOwner
    ) -> None:
        """
        Args:
            pidfd: closed by this object, like `sock`.
            group: the supervisor's control group.
        """
        self.order: Order | None = None
        """The order of the supervisor's current job."""
        self.protocol_error: str | None = None
        """Why a message of the supervisor was not valid. The handle kills the supervisor then."""
        self.exited_at: float | None = None
        """When the exit was observed. The processes that the supervisor left are ended before its
        owner gets `on_supervisor_exited`."""
        self.idle_since = 0.0
        self.is_spent = False
        """Whether it gets no more jobs. A supervisor may handle a SIGTERM late, and must not apply
        it to the next job."""
        self._has_begun = False
        self._pid = _pid(pidfd)
        self.pidfd = pidfd
        self._sock = sock
        self._group = group
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(pidfd, self._on_exit)
        self._loop.add_reader(sock, self._read)

    def send_order(self, order: Order) -> bool:
        """Give the supervisor a job; False if it has exited and did not receive the order."""
        folders = []
        if order.memory_dir is not None:
            with contextlib.suppress(OSError):  # a missing group ends the job, not the supervisor
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

    def send_go(self) -> bool:
        """Let the supervisor begin an order on hold; False if it has exited and did not begin."""
        try:
            wire.send(self._sock, wire.GO)
        except OSError:
            self.order = None
            return False
        if self.order is not None:
            self.order.held = False
        return True

    def withdraw_order_on_hold(self) -> None:
        """Withdraw an order on hold. The supervisor exits."""
        self.order = None
        self.dismiss()

    def send_ready(self) -> None:
        """Let the supervisor fork the process of its next job ahead."""
        with contextlib.suppress(OSError):  # it has exited, and its pidfd reports that
            wire.send(self._sock, wire.READY)

    def stop(self) -> None:
        """Let the supervisor end its job and then exit."""
        self.is_spent = True
        if self.pidfd >= 0:  # else the processes that it left are being ended
            request_end(self.pidfd)

    def dismiss(self) -> None:
        """Let the supervisor exit: now, or when its job ends. The owner still gets
        `on_supervisor_exited`."""
        self.is_spent = True
        if self._sock.fileno() >= 0 and self.order is None:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def close(self) -> None:
        """Detach from the supervisor. It exits when its job ends."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()
        if self.pidfd >= 0:
            self._loop.remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
            if self.order is None or self.order.held:
                self._group.remove_on_close()

    def _read(self) -> bool:
        """Read and handle one message; whether there was one."""
        try:
            data = self._sock.recv(MAX_MESSAGE)
        except BlockingIOError:
            return False
        except OSError:  # also where this side has closed the socket
            data = b""
        if not data:
            if self._sock.fileno() >= 0:
                self._loop.remove_reader(self._sock)
            return False
        try:
            reply = self._checked(data)
        except checks.Invalid as error:
            self._on_invalid_message(str(error))
            return False
        if reply.error is not None:
            self.order, self.is_spent = None, True
            self._kill()  # it is about to exit, unless its job wrote the message
            self._owner.on_order_refused(reply)
        elif reply.ended:
            self.order = None
            self._owner.on_job_ended(self, reply)
        else:
            self._has_begun = True
            self._owner.on_job_started(self, reply)
        return True

    def _checked(self, data: bytes) -> Reply:
        """A message of the supervisor, checked: a job can write to its supervisor's socket.

        Raises:
            checks.Invalid: the message is not possible in the state of the supervisor's job.
        """
        reply, order = Reply.loads(data), self.order
        if order is None or (reply.job_id, reply.attempt) != (order.job_id, order.attempt):
            raise checks.Invalid("it names a job that the supervisor does not run")
        if reply.error is not None and (self._has_begun or _has_start(order)):
            raise checks.Invalid("it reports a job that could not begin, but the job has begun")
        if not reply.ended and (self._has_begun or not (reply.recorded or reply.error)):
            raise checks.Invalid("it repeats an earlier message, or reports nothing")
        if reply.ended and processes.has_child(self._pid):
            raise checks.Invalid("it reports a job that has ended, but the job runs")
        return reply

    def _on_invalid_message(self, why: str) -> None:
        """Kill the supervisor: no message of it can be trusted any more. Its exit lets the owner
        find out how the job ended."""
        job_id = None if self.order is None else self.order.job_id
        log.warning("killing a supervisor after an invalid message", job=job_id, reason=why)
        self.protocol_error = f"a message of its supervisor is not valid: {why}"
        self.is_spent = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _on_exit(self) -> None:
        if self.pidfd < 0:
            return
        # Its last messages were sent before its exit.
        for _ in range(_MAX_LAST_MESSAGES):
            if not self._read():
                break
        self.exited_at = time.monotonic()
        reap(self.pidfd)
        self.close()
        self._group.end(lambda: self._owner.on_supervisor_exited(self))


class AdoptedSupervisor:
    """A supervisor of an earlier operator, observed through a pidfd. All methods run on the event
    loop.

    It reports to the earlier operator, if that one still runs. For this operator its job has ended
    when the process has exited, or when the exit record exists and no process of the job does: a
    job can create such a record itself. The exit alone is not enough, because a supervisor whose
    operator hangs does not exit after its job.
    """

    def __init__(
        self, pidfd: int, exit_record: Path, watch: FileWatch, on_end: Callable[[], None]
    ) -> None:
        """
        Args:
            pidfd: closed by this object.
            exit_record: an exit record that exists already is not reported; see `on_exit_record`.
            on_end: called once, when the process has exited, or when the record exists and no
                process of the job does.
        """
        self.pidfd = pidfd
        self._record = exit_record
        self._watch = watch
        self._on_end = on_end
        self._timer: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit)
        try:
            watch.watch_appearance(exit_record, self.on_exit_record)
        except OSError as error:  # the exit of the process reports the end as well
            log.warning("cannot watch an exit record", error=str(error))

    def stop(self) -> None:
        """Let the supervisor end its job and then exit."""
        if self.pidfd >= 0:
            request_end(self.pidfd)

    def on_exit_record(self) -> None:
        """The exit record exists. Report the end as soon as no process of the job does."""
        if self._timer is not None:
            self._timer.cancel()
        if self.pidfd < 0:
            return
        if self._has_job():
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FORGED_RECORD_POLL_S, self.on_exit_record)
        else:
            self._end()

    def close(self) -> None:
        """Detach from the supervisor. Its job goes on."""
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
            self._watch.remove(self._record, self.on_exit_record)
        if self._timer is not None:
            self._timer.cancel()

    def _has_job(self) -> bool:
        try:
            pid = processes.pid_of(self.pidfd)
            return leftovers.runs_below(pid, self._record.parent.name)
        except OSError:
            return True  # unknown for now: the next poll decides

    def _on_exit(self) -> None:
        reap(self.pidfd)
        self._end()

    def _end(self) -> None:
        self.close()
        self._on_end()


def _has_start(order: Order) -> bool:
    try:
        with beneath.opened(order.folder) as folder:
            return beneath.stat(folder, f"start.{order.attempt}") is not None
    except OSError:
        return False


def _pid(pidfd: int) -> int:
    try:
        return processes.pid_of(pidfd)
    except OSError:  # no descriptor is left to read it
        return -1
