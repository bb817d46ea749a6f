"""The folder of an agent: `<node dir>/<namespace>/<number>/`, with projects, environments and jobs.

Each raylet on a machine has a folder of its own. When a raylet has ended, another raylet reuses its
folder with the projects and environments. The leftovers of its jobs are ended and removed.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import IO

import platformdirs

from cortex.ray_node import guard
from cortex.system.folders import remove

_OWNER = "owner"
_MAX_FOLDERS = 1000


class AgentFolder:
    """A folder that this process has locked."""

    def __init__(self, root: Path, lock: IO[str], identity: str) -> None:
        self.projects = root / "projects"
        self.locks = root / "locks"
        self.environments = root / "environments"
        self.jobs = root / "jobs"
        self.checkpoints = root / "checkpoints"
        self.identity = identity
        self._lock = lock  # closing it would release the lock

    @classmethod
    def acquire(cls, namespace: str, node_id: str, node_dir: str) -> AgentFolder:
        """Lock the folder of this node, or a free one, and start its guard.

        Args:
            namespace: the operator's.
            node_id: the node's.
            node_dir: the parent of all folders; empty for the default.

        Raises:
            RuntimeError: another agent has the folder of this node, or no folder is free.
        """
        base = Path(node_dir or Path(platformdirs.user_data_dir("cortex"), "nodes")) / namespace
        base.mkdir(0o700, parents=True, exist_ok=True)
        with (base / "lock").open("w") as base_lock:
            fcntl.flock(base_lock, fcntl.LOCK_EX)
            root, lock, identity = find_or_create(base, node_id)
            folder = cls(root, lock, identity)
            for each in (folder.projects, folder.locks, folder.environments, folder.jobs):
                each.mkdir(exist_ok=True)
            # Within the lock: an agent that calls `_is_alive` takes the guard's lock for a moment.
            _start_guard(root)
        return folder


def find_or_create(base: Path, node_id: str) -> tuple[Path, IO[str], str]:
    """The folder of a node's agent: its earlier one, or one that no living agent uses.

    Returns:
        the folder, its lock, and its identity, which is new unless the folder was this node's.
    """
    roots = [base / str(number) for number in range(_MAX_FOLDERS)]
    owners = {root: _owner(root) for root in roots if root.is_dir()}
    own = next((root for root, (owner, _) in owners.items() if owner == node_id), None)
    if own is not None:
        return own, _lock_for_agent(own), owners[own][1]
    free = next((root for root in roots if root not in owners or not _is_alive(root)), None)
    if free is None:
        raise RuntimeError(f"all {_MAX_FOLDERS} folders below {base} are in use")
    free.mkdir(0o700, exist_ok=True)
    lock = _lock_for_agent(free)
    guard.end_all(free / "jobs")
    remove(free / "jobs")
    identity = uuid.uuid4().hex
    (free / _OWNER).write_text(f"{node_id} {identity}")
    return free, lock, identity


def _owner(root: Path) -> tuple[str, str]:
    try:
        node_id, identity = (root / _OWNER).read_text().split()
    except (OSError, ValueError):
        return "", ""
    return node_id, identity


def _is_alive(root: Path) -> bool:
    """Whether the raylet of this folder is alive: its guard then has its lock."""
    try:
        with (root / guard.LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock_for_agent(root: Path) -> IO[str]:
    file = (root / guard.AGENT_LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            raise RuntimeError(f"another agent uses {root}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _start_guard(root: Path) -> None:
    """Start the guard. It forks away from this process, whose children Ray would end with it."""
    raylet = os.environ.get("RAY_RAYLET_PID") or str(os.getppid())
    subprocess.run(
        [sys.executable, "-I", guard.__file__, str(root), raylet],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=True,
        check=True,
        start_new_session=True,
    )
