"""Where the folders lie in which jobs have their projects to themselves (`cortex.worker.workspace`), and which way of
making them works on this machine. Called when the local engine opens, in threads.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cortex
from cortex.errors import StartupError
from cortex.system.account import Account
from cortex.system.folders import remove_from
from cortex.worker import beneath
from cortex.worker.workspace import COPY, OVERLAY

_CAP_SYS_ADMIN = 21
_PROBE_S = 20
# In a process of its own, for a mount namespace is a whole process's. What jobs do is tried: file systems differ in
# which of it they let an overlay do.
_TRIAL = """
import os, sys
sys.path.append(sys.argv[1])
from cortex.worker.overlay import Overlay
project = sys.argv[2] + "/project"
os.makedirs(project + "/folder")
open(project + "/file", "w").close()
lower = os.open(project, os.O_RDONLY)
overlay = Overlay(project, sys.argv[2])
overlay.make()
assert overlay.is_untouched()
os.rename(project + "/folder", project + "/renamed")
os.unlink(project + "/file")
open(project + "/made", "w").close()
assert not overlay.is_untouched()
assert sorted(os.listdir(project)) == ["made", "renamed"]
assert sorted(os.listdir(lower)) == ["file", "folder"]
overlay.close()
"""


def root_of(jobs: Path) -> Path:
    """Where they lie, below the folder of all jobs: a rename brings what a job has changed into its own folder."""
    return jobs / ".own"


def lay_out(root: Path, account: Account | None) -> None:
    """Make the folder of them all.

    Raises:
        StartupError: it cannot be made.
    """
    try:
        root.mkdir(0o700, exist_ok=True)
        if account is not None:
            account.own(root)
    except OSError as error:
        raise StartupError(
            f"the data folder {root.parent} cannot be written: {error}; choose another one"
        ) from error


def probe(root: Path, account: Account | None) -> str:
    """The best that works for the jobs' user, found by trying it."""
    if account is not None or not _may_mount():
        return COPY
    import_dir = str(Path(cortex.__file__).parents[1])
    with tempfile.TemporaryDirectory(prefix="probe-", dir=root) as folder:
        command = [sys.executable, "-I", "-S", "-c", _TRIAL, import_dir, folder]
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={},
                cwd="/",
                check=False,
                timeout=_PROBE_S,
            )
            if done.returncode == 0:
                return OVERLAY
    return COPY


def sweep(root: Path) -> None:
    """Remove what killed processes have left: each holds the lock on its folder for as long as it lives."""
    with suppress(OSError), beneath.opened(str(root)) as own:
        for name in beneath.names(own):
            with suppress(OSError):
                os.unlink(name, dir_fd=own)  # what is no folder is nobody's
            with suppress(OSError), _held(own, name):
                remove_from(own, root / name)


@contextmanager
def _held(own: int, name: str) -> Iterator[None]:
    fd = os.open(name, beneath.FOLDER, dir_fd=own)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _may_mount() -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_ADMIN & 1)
