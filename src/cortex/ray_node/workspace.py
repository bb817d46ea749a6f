"""The folder of an agent on its node: `<node dir>/<namespace>/<slot>/`, with projects, environments
and jobs. Called by the agent, once.

Another raylet on the same machine has another slot. One that a raylet that is gone has left is used
again, for its projects and environments; what is left of its jobs is ended and removed.
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
_MOST = 1000


class AgentFolder:
    """One folder, which this process has to itself."""

    def __init__(self, root: Path, lock: IO[str], identity: str) -> None:
        self.projects = root / "projects"
        self.locks = root / "locks"
        self.environments = root / "environments"
        self.jobs = root / "jobs"
        self.identity = identity
        self._lock = lock  # held while this object is

    @classmethod
    def take(cls, namespace: str, node_id: str, node_dir: str) -> AgentFolder:
        """The slot of this node, or one that nobody has; its guard is started."""
        base = Path(node_dir or Path(platformdirs.user_data_dir("cortex"), "nodes")) / namespace
        base.mkdir(0o700, parents=True, exist_ok=True)
        with (base / "lock").open("w") as all_of_them:
            fcntl.flock(all_of_them, fcntl.LOCK_EX)
            root, lock, identity = _find(base, node_id)
            slot = cls(root, lock, identity)
            for folder in (slot.projects, slot.locks, slot.environments, slot.jobs):
                folder.mkdir(exist_ok=True)
            # In here: another agent that looks whether this node is alive locks what the guard does.
            _start_guard(root)
        return slot


def _find(base: Path, node_id: str) -> tuple[Path, IO[str], str]:
    roots = [base / str(number) for number in range(_MOST)]
    owners = {root: _owner(root) for root in roots if root.is_dir()}
    own = next((root for root, (owner, _) in owners.items() if owner == node_id), None)
    if own is not None:
        return own, _locked(own), owners[own][1]
    free = next((root for root in roots if root not in owners or not _is_alive(root)), None)
    if free is None:
        raise RuntimeError(f"all folders below {base} are taken")
    free.mkdir(0o700, exist_ok=True)
    lock = _locked(free)
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
    """Whether the raylet whose folder this is still there: its guard is."""
    try:
        with (root / guard.LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _locked(root: Path) -> IO[str]:
    file = (root / guard.AGENT_LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            raise RuntimeError(f"another agent works in {root}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _start_guard(root: Path) -> None:
    """It has to outlive this process, whose children Ray ends with it: so it is nobody's child."""
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
