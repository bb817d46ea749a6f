"""The supervisor's side of the control group (v1 or v2) that limits the memory of one job. The
engine makes and removes the group, and sends its open folder with the order: thus a process whose
user may not change the limit can join the group.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select

from cortex.worker.processes import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cortex.worker.messages import Order

# A single-threaded process that moves itself by `tasks` (v1) does not wait for an RCU grace period:
# it takes 0.05 ms instead of 12-20 ms, during which no process on the machine can fork.
JOIN = {"v1": "tasks", "v2": "cgroup.procs"}
_OOM_COUNTS = {"v1": "memory.oom_control", "v2": "memory.events"}
_EFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_READ_BYTES = 4096


class JobCgroup:
    """The control group of one order. If the order has none, every method does nothing."""

    __slots__ = ("_folder", "_kind", "_limit", "_oom_counts", "_peak", "join_fd", "oom_event")

    def __init__(self, order: Order, folder: int | None) -> None:
        """
        Args:
            folder: the open folder of the group, from the engine. This object closes it.
        """
        self._kind = order.memory_kind if order.memory_kind in JOIN else None
        self._limit = order.mem or 0
        self._folder = folder
        self._oom_counts = self._peak = -1
        self.oom_event = -1
        """Descriptor that wakes a poller when the limit is hit."""
        self.join_fd = -1
        """Descriptor to which the job's process writes 0 before it runs code of the user."""

    @property
    def private_fds(self) -> tuple[int, ...]:
        """File descriptors that a job must not have. `join_fd` is not among them."""
        found = {
            self._oom_counts,
            self._peak,
            self.oom_event,
            -1 if self._folder is None else self._folder,
        }
        return tuple(fd for fd in found if fd >= 0)

    def open_control_files(self, poller: select.poll) -> None:
        """Open the files through which the job joins the group, and register the OOM event.

        Raises:
            OSError: the group or one of its files does not exist.
        """
        kind, folder = self._kind, self._folder
        if kind is None:
            return
        if folder is None:
            raise OSError(errno.ENOENT, "the job's control group does not exist")
        self._oom_counts = _open(_OOM_COUNTS[kind], os.O_RDONLY, folder)
        self.join_fd = _open(JOIN[kind], os.O_WRONLY, folder)
        if kind == "v2":
            self.oom_event = self._oom_counts
            poller.register(self.oom_event, select.POLLPRI)
        else:
            self._peak = _open("memory.max_usage_in_bytes", os.O_RDONLY, folder)
            self.oom_event = int(libc.eventfd(0, _EFD_FLAGS))
            if self.oom_event < 0:
                raise OSError(ctypes.get_errno(), "eventfd failed")
            control = _open("cgroup.event_control", os.O_WRONLY, folder)
            os.write(control, f"{self.oom_event} {self._oom_counts}".encode())
            os.close(control)
            poller.register(self.oom_event, select.POLLIN)
        os.close(folder)  # a job could enter another group through it
        self._folder = None

    def close_join_fd(self) -> None:
        """Close `join_fd`: no other process is to join the group."""
        if self.join_fd >= 0:
            os.close(self.join_fd)
            self.join_fd = -1

    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of the job for memory."""
        return self._count("oom_kill") > 0

    def limit_was_hit(self) -> bool:
        """Whether the job hit its own limit; False if the machine ran out of memory."""
        if self._kind == "v2":
            return self._count("oom") > 0
        try:
            # Not failcnt: recent kernels no longer count it. When a charge of several pages fails,
            # the high-water mark is about a page below the limit.
            return int(os.pread(self._peak, _READ_BYTES, 0)) > self._limit * 0.95
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """Close all descriptors."""
        for fd in self.private_fds:
            os.close(fd)
        self.close_join_fd()
        self._folder = None
        self._oom_counts = self._peak = self.oom_event = -1

    def _count(self, name: str) -> int:
        if self._oom_counts < 0:
            return 0
        try:
            lines = os.pread(self._oom_counts, _READ_BYTES, 0).decode().splitlines()
        except OSError:
            return 0  # the group has been removed
        return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def _open(name: str, flags: int, folder: int) -> int:
    return os.open(name, flags | os.O_CLOEXEC, dir_fd=folder)
