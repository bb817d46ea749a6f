"""The current folder of a job: the project as it was deployed, with what this job changes of it and no other job
sees. A supervising process (`serving`) has one workspace for all its jobs, one after another. What a job has
left untouched serves the next job as it is; what a job has changed is moved into that job's folder.

There are two ways, and the engine says which of them this machine allows (`engines.local.workspaces`): an overlay
at the project's own path (`overlay`), and a copy of the project (`copying`). A job never runs in the project itself.
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
    Way = Overlay | Copy

OVERLAY, COPY = "overlay", "copy"
NICE = 19
_LOCK_EX, _LOCK_NB = 2, 4
_MAX_CLAIMS = 10
_PATHS = ("project", "path", "python_path")


class Workspace:
    """One supervising process's."""

    __slots__ = ("_folder", "_lock", "_project_time", "_way", "is_ready", "setup")

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        """The version as jobs find it: a copy of the project lies elsewhere."""
        self._folder = ""
        self._lock = -1
        self._way: Way | None = None
        self._project_time = 0
        self.is_ready = False
        """Whether a job finds the project as it was deployed, unless it is deployed anew."""

    @property
    def files(self) -> tuple[int, ...]:
        """Descriptors that no job may have."""
        way = () if self._way is None else self._way.files
        return way if self._lock < 0 else (self._lock, *way)

    def prepare(self) -> bool:
        """Let the next job find the project as it was deployed. Whether the folder is another one than before: a
        process that has gone into the last one is of no use.

        Raises:
            OSError: the folder cannot be made now, so that no job may start.
        """
        way = self._way or self._first()
        now = way.project_time()
        if self.is_ready and now == self._project_time:
            return False
        self.is_ready = False
        way.make()
        self.is_ready, self._project_time = True, now
        return True

    def keep(self, folder: int) -> None:
        """A job has ended: what it made or changed is moved into its folder.

        Args:
            folder: the job's; an open one.

        Raises:
            OSError: not all of that could be moved.
        """
        way = self._way
        if way is not None and not way.is_untouched():
            self.is_ready = False
            way.move_changes(folder)

    def is_sound(self) -> bool:
        """Whether the next job can be given this workspace: one that had the right to mount has not done so."""
        return self._way is None or self._way.is_sound()

    def close(self) -> None:
        """Remove what is on the disk."""
        if self._way is not None:
            self._way.close()
        if self._folder:
            remove(self._folder)

    def _first(self) -> Way:
        if not self._folder:
            self._folder, self._lock = _claim(self.setup.own_root)
        way: Way | None = None
        if self.setup.own_folder == OVERLAY:
            way = Overlay.mounted(self.setup.project, self._folder)
        if way is None:
            way = Copy(self.setup.project, self._folder)
            self.setup = _moved(self.setup, way.project)
        self._way = way
        return way


def compile_ahead(project: str) -> None:
    """Compile the project's modules for all jobs, in a process that yields to every other one: a job that had to
    compile them would change its workspace. Called by the fork server, whose end ends that process."""
    if not os.access(project, os.W_OK) or os.fork():
        return
    try:
        processes.prctl(processes.PR_SET_PDEATHSIG, signal.SIGKILL)
        processes.close_all_but({0, 1, 2})
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os.nice(NICE)
        import compileall

        compileall.compile_dir(project, quiet=2)
    finally:
        os._exit(0)


def _claim(root: str) -> tuple[str, int]:
    """A new folder below this one, and the lock on it: an operator that opens removes those without a holder."""
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


def _moved(setup: Setup, project: str) -> Setup:
    """The version with its project elsewhere; this interpreter looks for modules there from now on."""
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
    return Setup(**fields)  # type: ignore[arg-type]  # they are another Setup's
