"""The children of a fork server: the supervisors that it forked, and what it inherits from one that
was killed. A supervisor that ends by itself leaves nothing; what a killed one leaves belongs to nobody
and is killed here, also where it has left its session and cleared its environment.
"""

from __future__ import annotations

import os

from cortex.worker import processes


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
