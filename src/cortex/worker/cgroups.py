"""The control groups of one job: a memory limit (v1 or v2), and a v2 group that kills the tree at
one stroke. Made and removed by the job's supervisor; an engine clears what a killed one left.
"""

from __future__ import annotations

import ctypes
import os
import select
import time

from cortex.worker.processes import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cortex.worker.messages import Order

_EFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK


def put(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def counters(path: str) -> dict[str, int]:
    """A file of `name number` lines."""
    with open(path) as file:
        return {name: int(number) for name, number in (line.split() for line in file)}


def paths(order: Order) -> list[str]:
    found = []
    if order.mem is not None and order.memory_dir is not None:
        found.append(order.memory_dir)
    if order.kill_dir is not None and order.kill_dir not in found:
        found.append(order.kill_dir)
    return found


def to_join(order: Order) -> list[str]:
    """The files that a job's process has to write 0 to, before any code of the user."""
    # A single-threaded process that moves itself by `tasks` (v1) does not wait for an RCU
    # grace period: 0.05 ms against 12-20 ms, in which nobody on the machine can fork.
    by_thread = order.memory_dir if order.memory_kind == "v1" else None
    return [f"{path}/{'tasks' if path == by_thread else 'cgroup.procs'}" for path in paths(order)]


class Groups:
    """As `order` wants them; without any, every method does nothing."""

    def __init__(self, order: Order) -> None:
        self._paths = paths(order)
        self._kill = order.kill_dir
        self._kind = order.memory_kind if order.memory_dir in self._paths else None
        self._memory = order.memory_dir or ""
        self._limit = order.mem or 0

    def create(self) -> None:
        for path in self._paths:
            os.mkdir(path)
        if self._kind == "v2":
            put(f"{self._memory}/memory.max", str(self._limit))
            put(f"{self._memory}/memory.oom.group", "1")
            _put_if_there(f"{self._memory}/memory.swap.max", "0")
        elif self._kind == "v1":
            put(f"{self._memory}/memory.limit_in_bytes", str(self._limit))
            _put_if_there(f"{self._memory}/memory.memsw.limit_in_bytes", str(self._limit))

    def watch(self, poller: select.poll) -> int | None:
        """Wake the poller when the limit is hit; the returned file descriptor tells that it was."""
        if self._kind == "v2":
            fd = os.open(f"{self._memory}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
            poller.register(fd, select.POLLPRI)
            return fd
        if self._kind == "v1":
            event = int(libc.eventfd(0, _EFD_FLAGS))
            if event < 0:
                raise OSError(ctypes.get_errno(), "eventfd failed")
            control = os.open(f"{self._memory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            put(f"{self._memory}/cgroup.event_control", f"{event} {control}")
            os.close(control)
            poller.register(event, select.POLLIN)
            return event
        return None

    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of the job for memory."""
        if self._kind is None:
            return False
        name = "memory.events" if self._kind == "v2" else "memory.oom_control"
        try:
            return counters(f"{self._memory}/{name}").get("oom_kill", 0) > 0
        except OSError:
            return False

    def limit_was_hit(self) -> bool:
        """Tells the job's own limit from a machine that ran out of memory."""
        try:
            if self._kind == "v2":
                return counters(f"{self._memory}/memory.events").get("oom", 0) > 0
            # Not failcnt: kernels of late no longer count it. The high-water mark is a page or so
            # below the limit when a charge of several pages fails.
            return _number(f"{self._memory}/memory.max_usage_in_bytes") > self._limit * 0.95
        except OSError:
            return True

    def kill(self) -> bool:
        """Kill all of it at one stroke; False where that is not possible."""
        if self._kill is None:
            return False
        try:
            put(f"{self._kill}/cgroup.kill", "1")
        except OSError:
            return False
        return True

    def remove(self) -> None:
        for path in self._paths:
            remove(path)


def remove(path: str, within_s: float = 1.0) -> bool:
    """Remove a group. Right after its last process was reaped the kernel may still say EBUSY."""
    until = time.monotonic() + within_s
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        else:
            return True


def members(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs") as file:
            return [int(line) for line in file]
    except OSError:
        return []


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def _put_if_there(path: str, text: str) -> None:
    """Swap accounting is a choice of the kernel's configuration."""
    if os.path.exists(path):
        put(path, text)
