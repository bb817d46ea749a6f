"""The control group of one job that limits its memory (v1 or v2), as the job's supervisor sees it. The engine makes
and removes it, and hands its folder over with the order: a user who may not change the limit joins it.
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

# A single-threaded process that moves itself by `tasks` (v1) does not wait for an RCU grace period: 0.05 ms against
# 12-20 ms, in which nobody on the machine can fork.
JOIN = {"v1": "tasks", "v2": "cgroup.procs"}
_COUNTS = {"v1": "memory.oom_control", "v2": "memory.events"}
_EFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_MOST = 4096


class Group:
    """As `order` wants it; without a limit, every method does nothing."""

    __slots__ = ("_counts", "_folder", "_kind", "_limit", "_most", "event", "join")

    def __init__(self, order: Order, folder: int | None) -> None:
        """
        Args:
            folder: of the group, from the engine; it is closed here.
        """
        self._kind = order.memory_kind if order.memory_kind in JOIN else None
        self._limit = order.mem or 0
        self._folder = folder
        self._counts = self._most = -1
        self.event = -1
        """Tells a poller that the limit was hit."""
        self.join = -1
        """What the job's process writes 0 to, before any code of the user."""

    @property
    def files(self) -> tuple[int, ...]:
        """All open files, which a job must not have; but for `join`."""
        found = {self._counts, self._most, self.event, -1 if self._folder is None else self._folder}
        return tuple(fd for fd in found if fd >= 0)

    def open(self, poller: select.poll) -> None:
        """Have what the job needs to join it, and what wakes the poller when the limit is hit.

        Raises:
            OSError: there is no such group, or not as it has to be.
        """
        kind, folder = self._kind, self._folder
        if kind is None:
            return
        if folder is None:
            raise OSError(errno.ENOENT, "the job's control group is gone")
        self._counts = _open(_COUNTS[kind], os.O_RDONLY, folder)
        self.join = _open(JOIN[kind], os.O_WRONLY, folder)
        if kind == "v2":
            self.event = self._counts
            poller.register(self.event, select.POLLPRI)
        else:
            self._most = _open("memory.max_usage_in_bytes", os.O_RDONLY, folder)
            self.event = int(libc.eventfd(0, _EFD_FLAGS))
            if self.event < 0:
                raise OSError(ctypes.get_errno(), "eventfd failed")
            control = _open("cgroup.event_control", os.O_WRONLY, folder)
            os.write(control, f"{self.event} {self._counts}".encode())
            os.close(control)
            poller.register(self.event, select.POLLIN)
        os.close(folder)  # a job could enter another's group by it
        self._folder = None

    def joined(self) -> None:
        """Nobody else is to join it."""
        if self.join >= 0:
            os.close(self.join)
            self.join = -1

    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of the job for memory."""
        return self._count("oom_kill") > 0

    def limit_was_hit(self) -> bool:
        """Tells the job's own limit from a machine that ran out of memory."""
        if self._kind == "v2":
            return self._count("oom") > 0
        try:
            # Not failcnt: kernels of late no longer count it. The high-water mark is a page or so
            # below the limit when a charge of several pages fails.
            return int(os.pread(self._most, _MOST, 0)) > self._limit * 0.95
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """It is the engine's alone again."""
        for fd in self.files:
            os.close(fd)
        self.joined()
        self._folder = None
        self._counts = self._most = self.event = -1

    def _count(self, name: str) -> int:
        if self._counts < 0:
            return 0
        try:
            lines = os.pread(self._counts, _MOST, 0).decode().splitlines()
        except OSError:
            return 0  # it is removed
        return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def _open(name: str, flags: int, folder: int) -> int:
    return os.open(name, flags | os.O_CLOEXEC, dir_fd=folder)
