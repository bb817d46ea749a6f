"""The children of a fork server: the supervising processes that it has forked, and the orphans that
it inherits when one of them is killed.

A supervising process that ends by itself leaves no process. The orphans of a killed one are killed
here, even if they have left their session and cleared their environment. If the fork server itself
is killed, the operator searches for the leftovers: all descendants of a fork server are marked.
"""

from __future__ import annotations

import os
import resource

from cortex.worker import processes

# RLIMIT_LOCKS limits nothing since Linux 2.4, but it is inherited, and only root can raise a hard
# limit.
_MARK_LIMIT = 10
_LIMIT_NAME = "Max file locks"
_MAX_LIMIT = 1 << 62


def mark() -> None:
    """Mark this process, and thereby all its future descendants."""
    soft, hard = (_finite(limit) for limit in resource.getrlimit(_MARK_LIMIT))
    hard -= 1
    resource.setrlimit(_MARK_LIMIT, (min(soft, hard), hard))


def marked(parent: int) -> set[int]:
    """The children of a process that are marked while the process itself is not; zombies included.

    Raises:
        OSError: out of file descriptors.
    """
    own = _hard_limit(parent)
    return {pid for pid in processes.children(parent) if _hard_limit(pid) < own}


def _hard_limit(pid: int) -> int:
    """The hard limit of a process, from /proc, which every user may read. prlimit(2) shows the
    limits of another user's process to root alone, and not to every root: it takes
    CAP_SYS_RESOURCE."""
    try:
        with open(f"/proc/{pid}/limits") as file:
            words = next((line.split() for line in file if line.startswith(_LIMIT_NAME)), [])
    except (FileNotFoundError, ProcessLookupError):
        return _MAX_LIMIT
    return _finite(int(words[-2])) if words and words[-2].isdigit() else _MAX_LIMIT


def _finite(limit: int) -> int:
    return limit if 0 <= limit < _MAX_LIMIT else _MAX_LIMIT


class Children:
    """The children of this process. Made when the fork server is ready: children that it has then
    are not orphans."""

    def __init__(self) -> None:
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        self.supervisors: set[int] = set()
        self._others = set(processes.children(os.getpid()))

    def reap(self) -> None:
        """Reap the children that have ended, and kill orphans. Called at every SIGCHLD."""
        suspicious = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                break
            suspicious = suspicious or status != 0 or pid not in self.supervisors
            self.supervisors.discard(pid)
        if suspicious:  # a search at each end would list all children once per job
            self._kill_orphans()

    def _kill_orphans(self) -> None:
        """Kill the orphans. The SIGCHLD of each killed process calls `reap` again, which finds
        orphans that this search has missed."""
        processes.kill_all(
            lambda: (each for orphan in self._orphans() for each in processes.tree(orphan))
        )

    def _orphans(self) -> set[int]:
        return set(processes.children(os.getpid())) - self.supervisors - self._others
