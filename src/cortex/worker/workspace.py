"""The workspace: the current folder of a job. It shows the project as it was deployed, and the
changes of this job alone. A supervising process (`supervisor.station`) has one workspace for all
its jobs, one after another. After each job, its changes are moved into the job's folder; if there
are none, the next job gets the workspace as it is.

There are two backends: an overlay at the project's own path (`overlay`), and a copy of the project
(`copying`). The engine decides which one the machine allows (`engines.local.workspaces`). A job
never runs in the project itself.
"""

from __future__ import annotations

import os
import sys

from cortex.worker import files, processes
from cortex.worker.copying import Copy
from cortex.worker.messages import Setup
from cortex.worker.overlay import Overlay
from cortex.worker.syscalls import signal
from cortex.worker.trees import remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    Backend = Overlay | Copy

OVERLAY, COPY = "overlay", "copy"
NICE = 19
_LOCK_EX, _LOCK_NB = 2, 4
_MAX_CLAIMS = 10
_PATHS = ("project", "path", "python_path")


class Workspace:
    """The workspace of one supervising process."""

    __slots__ = ("_backend", "_folder", "_lock", "_project_time", "is_ready", "setup")

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        """The version with the paths that jobs get: those of the copy, if it is one."""
        self._folder = ""
        self._lock = -1
        self._backend: Backend | None = None
        self._project_time = 0
        self.is_ready = False
        """Whether the workspace shows the project as it was deployed at `_project_time`."""

    @property
    def private_fds(self) -> tuple[int, ...]:
        """File descriptors that a job must not have."""
        backend = () if self._backend is None else self._backend.private_fds
        return backend if self._lock < 0 else (self._lock, *backend)

    def restore_project(self) -> bool:
        """Make the workspace show the project as it was deployed.

        Returns:
            whether the folder is a new one. A process whose current folder is the old one is
            useless.

        Raises:
            OSError: the folder cannot be made now. No job may start.
        """
        backend = self._backend or self._open_backend()
        now = backend.project_time()
        if self.is_ready and now == self._project_time:
            return False
        self.is_ready = False
        backend.make()
        self.is_ready, self._project_time = True, now
        return True

    def collect_changes(self, folder: int) -> None:
        """Move what a job has made or changed into the job's folder, after its end.

        Args:
            folder: the open folder of the job.

        Raises:
            OSError: not all changes could be moved.
        """
        backend = self._backend
        if backend is not None and not backend.is_untouched():
            self.is_ready = False
            backend.move_changes(folder)

    def is_reusable(self) -> bool:
        """Whether the next job can get this workspace. Not after a job has changed mounts."""
        return self._backend is None or self._backend.is_reusable()

    def close(self) -> None:
        """Remove the workspace from the disk."""
        if self._backend is not None:
            self._backend.close()
        if self._folder:
            remove(self._folder)

    def _open_backend(self) -> Backend:
        if not self._folder:
            self._folder, self._lock = _claim(self.setup.own_root)
        backend: Backend | None = None
        if self.setup.own_folder == OVERLAY:
            backend = Overlay.mounted(self.setup.project, self._folder)
        if backend is None:
            backend = Copy(self.setup.project, self._folder)
            self.setup = _with_project_at(self.setup, backend.project)
        self._backend = backend
        return backend


def compile_ahead(project: str) -> None:
    """Compile the project's modules for all jobs, in a new process of the lowest priority.
    Otherwise a job would compile them, and thereby change its workspace. Called by the fork server;
    the process is killed when the fork server ends."""
    if not os.access(project, os.W_OK) or os.fork():
        return
    try:
        processes.prctl(processes.PR_SET_PDEATHSIG, signal.SIGKILL)
        processes.close_all_but({0, 1, 2})
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        os.nice(NICE)
        import compileall

        compileall.compile_dir(project, quiet=2)
    finally:
        os._exit(0)


def _claim(root: str) -> tuple[str, int]:
    """Make a new folder below `root` and lock it: at its start, an operator removes the folders
    that no process has locked.

    Returns:
        the folder, and the descriptor that has the lock.
    """
    about = processes.stat("self")
    name = f"{root}/{os.getpid()}-{about[2] if about else 0}"
    for number in range(_MAX_CLAIMS):
        path = f"{name}-{number}"
        os.mkdir(path, 0o700)
        try:
            fd = files.open_folder(path)
        except FileNotFoundError:
            continue
        if processes.libc.flock(fd, _LOCK_EX | _LOCK_NB) == 0 and os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)
    raise BlockingIOError(f"other processes lock the folders below {root}")


def _with_project_at(setup: Setup, project: str) -> Setup:
    """The version with the paths of a moved project. Changes `sys.path` and `sys.argv` as well."""
    before = setup.project

    def moved(path: str) -> str:
        is_below = path == before or path.startswith(before + os.sep)
        return project + path[len(before) :] if is_below else path

    fields = setup.fields()
    for name in _PATHS:
        path = fields[name]
        fields[name] = moved(path) if isinstance(path, str) else None
    sys.path[:] = [moved(path) for path in sys.path]
    sys.argv[:] = [moved(path) for path in sys.argv]
    return Setup(**fields)  # type: ignore[arg-type]  # the fields of a Setup
