"""The children of a fork server: the supervisors that it forked, and what it inherits from one that
was killed. A supervisor that ends by itself leaves nothing; what a killed one leaves belongs to nobody
and is killed here, also where it has left its session and cleared its environment. What a fork server leaves that is
killed itself, the operator looks for: whatever descends from a fork server is marked.
"""

from __future__ import annotations

import os
import resource

from cortex.worker import processes

# RLIMIT_LOCKS. Since Linux 2.4 nothing is limited by it, but it is inherited, and only root can raise a hard limit.
_MARK = 10
_MARKED_BY = "Max file locks"
_HIGHEST = 1 << 62


def mark() -> None:
    """Mark this process, and all that will descend from it, as not of its parent's own."""
    soft, hard = (_finite(limit) for limit in resource.getrlimit(_MARK))
    hard -= 1
    resource.setrlimit(_MARK, (min(soft, hard), hard))


def marked(parent: int) -> set[int]:
    """The children of a process that have a mark, which it does not have itself; zombies among them.

    Raises:
        OSError: there are no descriptors to find out with.
    """
    own = _hard_limit(parent)
    return {pid for pid in processes.children(parent) if _hard_limit(pid) < own}


def _hard_limit(pid: int) -> int:
    """As anybody may read it: what another user's is, the system call tells to root alone, and not to every one."""
    try:
        with open(f"/proc/{pid}/limits") as file:
            words = next((line.split() for line in file if line.startswith(_MARKED_BY)), [])
    except (FileNotFoundError, ProcessLookupError):
        return _HIGHEST
    return _finite(int(words[-2])) if words and words[-2].isdigit() else _HIGHEST


def _finite(limit: int) -> int:
    return limit if 0 <= limit < _HIGHEST else _HIGHEST


class Children:
    """Made when the fork server is ready: what it has as children then is its own affair."""

    def __init__(self) -> None:
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        self.supervisors: set[int] = set()
        self._others = set(processes.children(os.getpid()))

    def reap(self) -> None:
        """Collect what has ended. Called at every SIGCHLD."""
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
        if suspicious:  # else a look would cost each job a list of all that run
            self._kill_orphans()

    def _kill_orphans(self) -> None:
        """The SIGCHLD of what is killed calls again, so what one look misses the next finds."""
        processes.end(
            lambda: (each for orphan in self._orphans() for each in processes.tree(orphan))
        )

    def _orphans(self) -> set[int]:
        return set(processes.children(os.getpid())) - self.supervisors - self._others
