"""Prepares the local engine's folders: the folder of all jobs, the import folder of workers, and
the folder of workspaces, in which each job has the project to itself (`cortex.worker.workspace`).
Called in threads when the local engine opens, and to remove the workspaces of killed processes.
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
from cortex.system.account import Account, identity
from cortex.system.folders import remove_from
from cortex.worker import beneath
from cortex.worker.workspace import COPY, OVERLAY

_CAP_SYS_ADMIN = 21
_PROBE_TIMEOUT_S = 20
# Runs in a process of its own, because a mount namespace belongs to a whole process. It does what
# jobs do: file systems differ in the operations that they allow an overlay.
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


def prepare_jobs(root: Path, import_dir: Path, account: Account | None) -> None:
    """Create the folder of all jobs, and the import folder: in it workers find this package and the
    module names that Cortex gave it, and nothing else.

    Raises:
        StartupError: the folder cannot be written, or jobs could not start there as `account`.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        import_dir.mkdir(exist_ok=True)
        package = Path(cortex.__file__).parent
        for each in (package, package.with_name("cortex_internal")):
            _link(import_dir / each.name, each)
        _link(import_dir / "cortex_task.py", package / "worker" / "job" / "stand_in.py")
    except OSError as error:
        raise _not_writable(root, error) from error
    if account is not None:
        _check_access(account, import_dir)


def workspaces_of(jobs: Path) -> Path:
    """The folder of workspaces, below the folder of all jobs: a rename moves the changes of a job
    into the job's own folder."""
    return jobs / ".own"


def prepare_workspaces(root: Path, account: Account | None) -> None:
    """Create the folder of workspaces.

    Raises:
        StartupError: the folder cannot be created.
    """
    try:
        root.mkdir(0o700, exist_ok=True)
        if account is not None:
            account.own(root)
    except OSError as error:
        raise _not_writable(root.parent, error) from error


def probe(root: Path, account: Account | None) -> str:
    """The best kind of workspace that works for the jobs' user, found by a trial."""
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
                timeout=_PROBE_TIMEOUT_S,
            )
            if done.returncode == 0:
                return OVERLAY
    return COPY


def sweep(root: Path) -> None:
    """Remove the workspaces of killed processes. A living process has the lock on its workspace."""
    with suppress(OSError), beneath.opened(str(root)) as own:
        for name in beneath.names(own):
            with suppress(OSError):
                os.unlink(name, dir_fd=own)  # a file is no workspace
            with suppress(OSError), _locked(own, name):
                remove_from(own, root / name)


@contextmanager
def _locked(own: int, name: str) -> Iterator[None]:
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


def _not_writable(data_dir: Path, error: OSError) -> StartupError:
    return StartupError(
        f"the data folder {data_dir} cannot be written: {error}; choose another one"
    )


def _link(link: Path, to: Path) -> None:
    # The link is not replaced without need: jobs of the previous operator may be importing from
    # there.
    if not (link.is_symlink() and link.readlink() == to):
        link.unlink(missing_ok=True)
        link.symlink_to(to)


def _check_access(account: Account, import_dir: Path) -> None:
    """Check that jobs of another user can start here. Otherwise each of them would fail.

    Raises:
        StartupError: that user cannot run this Python, or cannot reach Cortex or the data folder.
    """
    code = "import sys; open(sys.argv[1]).close(); import ctypes, json, socket"
    script = import_dir / "cortex" / "worker" / "forkserver" / "main.py"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, str(script)],
            cwd="/",
            env={},
            capture_output=True,
            text=True,
            check=False,
            **identity(account),
        )
        problem = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise StartupError(
            f"jobs cannot run as {account.name!r}: {problem}. Install Python and Cortex where that "
            "user can read them, and let that user pass through the folders above the data folder."
        )
