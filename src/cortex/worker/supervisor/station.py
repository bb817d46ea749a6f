"""What a supervising process has for all its jobs: who it is, the socket to the engine, the process that
waits for the next job, and the last record that the engine has read. Made by `serving`.
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
    from cortex.worker.supervisor.main import Signals


class Station:
    """One for each supervising process."""

    __slots__ = (
        "_end",
        "_group",
        "_last",
        "_said",
        "boot",
        "found",
        "reuse",
        "setup",
        "signals",
        "slot",
        "sock",
        "ticks",
        "woken",
        "worker",
        "workspace",
    )

    def __init__(
        self,
        setup: Setup,
        signals: Signals,
        sock: socket.socket,
        slot: memoryview | None,
        found: task.CompiledTask | None = None,
    ) -> None:
        self.setup = setup
        self.workspace = Workspace(setup)
        self.signals = signals
        self.sock = sock
        self.slot = slot
        self.found = found
        self.worker: process.Worker | None = None  # of the next job
        self.reuse = reuse.Reuse()
        self._last: tuple[int, str] | None = None
        self._group: int | None = None
        self.woken = _poller(signals.wake, select.POLLIN)  # a supervisor waits by it
        self._said = _poller(sock.fileno(), select.POLLIN)
        self._said.register(signals.wake, select.POLLIN)
        self._end = _poller(sock.fileno(), 0)  # POLLHUP is told of unasked
        about = processes.stat("self")
        self.ticks = about[2] if about else 0
        self.boot = processes.boot_id()

    @property
    def files(self) -> tuple[int, ...]:
        """File descriptors that are this process's alone."""
        last = () if self._last is None else self._last[:1]
        own = self.signals.wake, self.signals.wake_write, self.sock.fileno()
        return *own, *self.workspace.files, *last, *self.reuse.open_files

    @property
    def last_folder(self) -> int | None:
        """The folder of the last job, which has no process left."""
        return None if self._last is None else self._last[0]

    def is_heard(self) -> bool:
        """Whether there is an engine at the other end."""
        return not self._end.poll(0)

    def keep(self, folder: int, name: str) -> None:
        """An engine that has read this record stores it. If it goes it may have had no time for that, so
        what it read last is put onto the disk when it does.

        Args:
            folder: of the record; an open one, which is closed when it has been kept.
        """
        if self._last is not None:
            os.close(self._last[0])
        self._last = folder, name

    def get_ready(self) -> None:
        """Fork the next job's process ahead, unless it is there."""
        if self.prepare_early() and self.worker is None:
            self.look()
            self.worker = process.Worker(self)

    def prepare(self) -> None:
        """Let the next job find its folder.

        Raises:
            OSError: it cannot be made now.
        """
        try:
            is_another = self.workspace.prepare()
        except OSError as error:
            where = "" if error.filename is None else f" ({error.filename})"
            words = f"the job's own copy of its project cannot be made: {error.strerror}{where}"
            raise OSError(error.errno, words) from error
        if is_another:
            self.dismiss()  # it has gone into the one before
            self.setup = self.workspace.setup

    def prepare_early(self) -> bool:
        """The same where no job waits for it: what fails is told to the one that comes."""
        try:
            self.prepare()
        except OSError:
            return False
        return True

    def restore(self) -> None:
        """Make anew what the last job has changed, before the next one comes."""
        if not self.workspace.is_ready:
            self.prepare_early()

    def dismiss(self) -> None:
        """The process that waits is not needed."""
        if self.worker is not None:
            self.worker.dismiss()
            self.worker = None

    def take(self, data: bytes) -> Order:
        """An order that has come. The process that waits for one gets ready while this one lays out."""
        order = Order.loads(data)
        if self.worker is not None:
            self.worker.announce(order)
        return order

    def take_group(self) -> int | None:
        """The folder of the control group that came with the order, if one did."""
        group, self._group = self._group, None
        return group

    def hear(self) -> bytes:
        """What the engine says next; nothing where it is gone, or a stop comes before it says anything."""
        while True:
            ready = [fd for fd, _ in self._said.poll()]
            if self.signals.wake in ready:
                os.read(self.signals.wake, 512)
            if self.sock.fileno() in ready:
                with contextlib.suppress(ConnectionError):
                    data, fds = wire.receive(self.sock, 1)
                    if fds:
                        [self._group] = fds
                    return data
                return b""
            if self.signals.stop:
                return b""

    def look(self) -> None:
        """See that a process that is forked now has what all jobs can be spared."""
        if self.setup.path is not None:
            self.found = task.find(self.setup, self.setup.path, self.found)

    def close(self) -> None:
        """There are no more jobs."""
        self.dismiss()
        self.workspace.close()
        if self._last is not None:
            with contextlib.suppress(OSError):
                files.sync(*self._last)


def _poller(fd: int, events: int) -> select.poll:
    poller = select.poll()
    poller.register(fd, events)
    return poller
