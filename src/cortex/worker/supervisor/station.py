"""What a supervising process keeps from one job to the next: its identity, the socket to the
engine, the workspace, the process that waits for the next job, and the last exit record that the
engine has read. Made by `supervisor.main`.
"""

from __future__ import annotations

import contextlib
import os
import select

from cortex.worker import files, processes, wire
from cortex.worker.job import process, task
from cortex.worker.messages import Order
from cortex.worker.supervisor import reuse
from cortex.worker.workspace import Workspace

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from cortex.worker.messages import Setup
    from cortex.worker.supervisor.signals import Signals


class Station:
    """The state of one supervising process that outlives its jobs."""

    __slots__ = (
        "_cgroup_fd",
        "_hangup_poller",
        "_last_record",
        "_order_poller",
        "boot",
        "compiled",
        "environ_slot",
        "poller",
        "preforked",
        "reuse",
        "setup",
        "signals",
        "sock",
        "ticks",
        "workspace",
    )

    def __init__(
        self,
        setup: Setup,
        signals: Signals,
        sock: socket.socket,
        environ_slot: memoryview | None,
        compiled: task.CompiledTask | None = None,
    ) -> None:
        self.setup = setup
        self.workspace = Workspace(setup)
        self.signals = signals
        self.sock = sock
        self.environ_slot = environ_slot
        self.compiled = compiled
        self.preforked: process.Preforked | None = None  # for the next job
        self.reuse = reuse.Reuse()
        self._last_record: tuple[int, str] | None = None  # its folder, open, and its name
        self._cgroup_fd: int | None = None
        self.poller = _poller(signals.wake, select.POLLIN)  # `watch.Supervisor` waits with it
        self._order_poller = _poller(sock.fileno(), select.POLLIN)
        self._order_poller.register(signals.wake, select.POLLIN)
        self._hangup_poller = _poller(sock.fileno(), 0)  # poll reports POLLHUP in any case
        about = processes.stat("self")
        self.ticks = about[2] if about else 0
        self.boot = processes.boot_id()

    @property
    def private_fds(self) -> tuple[int, ...]:
        """File descriptors that a job must not have."""
        last = () if self._last_record is None else self._last_record[:1]
        own = self.signals.wake, self.signals.wake_write, self.sock.fileno()
        return *own, *self.workspace.private_fds, *last, *self.reuse.private_fds

    @property
    def last_folder(self) -> int | None:
        """The open folder of the last job, which has no process left."""
        return None if self._last_record is None else self._last_record[0]

    def has_engine(self) -> bool:
        """Whether an engine has the other end of the socket open."""
        return not self._hangup_poller.poll(0)

    def remember_record(self, folder: int, name: str) -> None:
        """Remember an exit record that the engine has read and is about to store. Should the engine
        be killed before it has stored the record, `close` writes the record to the disk.

        Args:
            folder: the open folder of the record. This object closes it.
        """
        if self._last_record is not None:
            os.close(self._last_record[0])
        self._last_record = folder, name

    def prefork(self) -> None:
        """Fork the process of the next job ahead of its order, unless there is one."""
        if self.try_prepare_workspace() and self.preforked is None:
            self.refresh_compiled()
            self.preforked = process.Preforked(self)

    def prepare_workspace(self) -> None:
        """Make the workspace ready for the next job.

        Raises:
            OSError: the workspace cannot be made now.
        """
        try:
            has_moved = self.workspace.restore_project()
        except OSError as error:
            where = "" if error.filename is None else f" ({error.filename})"
            words = f"the job's own copy of its project cannot be made: {error.strerror}{where}"
            raise OSError(error.errno, words) from error
        if has_moved:
            self.kill_preforked()  # its current folder is the former one
            self.setup = self.workspace.setup

    def try_prepare_workspace(self) -> bool:
        """Prepare the workspace ahead of an order; False if that failed. The next order tries it
        again and reports the error."""
        try:
            self.prepare_workspace()
        except OSError:
            return False
        return True

    def restore_workspace(self) -> None:
        """Undo what the last job has changed in the workspace, before the next order comes."""
        if not self.workspace.is_ready:
            self.try_prepare_workspace()

    def kill_preforked(self) -> None:
        """Kill the process that waits for the next job, if there is one."""
        if self.preforked is not None:
            self.preforked.kill()
            self.preforked = None

    def load_order(self, data: bytes) -> Order:
        """Read an order, and send it on to the preforked process, which sets up its environment
        while this process lays out the job's folder."""
        order = Order.loads(data)
        if self.preforked is not None:
            self.preforked.send_order(order)
        return order

    def pop_cgroup_fd(self) -> int | None:
        """The open folder of the control group that came with the order, if one came. The caller
        owns it from now on."""
        fd, self._cgroup_fd = self._cgroup_fd, None
        return fd

    def receive(self) -> bytes:
        """Wait for the engine's next message; empty if the engine has closed the socket, or if a
        stop comes first."""
        while True:
            ready = [fd for fd, _ in self._order_poller.poll()]
            if self.signals.wake in ready:
                os.read(self.signals.wake, 512)
            if self.sock.fileno() in ready:
                with contextlib.suppress(ConnectionError):
                    data, fds = wire.receive(self.sock, 1)
                    if fds:
                        [self._cgroup_fd] = fds
                    return data
                return b""
            if self.signals.stop:
                return b""

    def refresh_compiled(self) -> None:
        """Compile the task's file again if it has changed. Processes that are forked from now on
        share the result."""
        if self.setup.path is not None:
            self.compiled = task.compile_task(self.setup, self.setup.path, self.compiled)

    def close(self) -> None:
        """Release what the jobs shared, after the last one."""
        self.kill_preforked()
        self.workspace.close()
        if self._last_record is not None:
            with contextlib.suppress(OSError):
                files.sync(*self._last_record)


def _poller(fd: int, events: int) -> select.poll:
    poller = select.poll()
    poller.register(fd, events)
    return poller
