"""Detects by trial which control groups work on this machine: groups that limit memory, and groups
that enclose the processes of a supervisor. Called once when the local engine opens, in a thread.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.local import cgroups
from cortex.engines.local.cgroups import CgroupParent
from cortex.system.account import Account, identity
from cortex.worker import processes
from cortex.worker.cgroups import JOIN

METHODS = {"v2": "cgroup v2", "v1": "cgroup v1", "watchdog": "watchdog"}
_ROOT = "/sys/fs/cgroup"
_PROBE_BYTES = 64 << 20
_TRIAL_TIMEOUT_S = 10
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


@dataclass(frozen=True)
class CgroupSupport:
    """How the memory of jobs is limited, and the folders of the groups."""

    kind: str  # v2, v1 or watchdog
    memory: CgroupParent | None = None
    """The folder of groups that limit memory."""
    trees: CgroupParent | None = None
    """The folder of groups that enclose what supervisors fork."""

    @property
    def method(self) -> str:
        return METHODS[self.kind]


WATCHDOG = CgroupSupport("watchdog")
"""No control groups at all."""


def group_prefix(root: Path) -> str:
    """What the names of this data root's groups begin with. No two operators share it, nor do the
    operators of two containers, each of which has pids of its own."""
    seed = bytes(root.resolve())
    pid_namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # no Path follows this link
    if pid_namespace != _FIRST_PID_NAMESPACE:
        seed += b"%d" % pid_namespace
    return f"cortex-{hashlib.sha256(seed).hexdigest()[:12]}-"


def group_name(root: Path, job_id: str, attempt: int) -> str:
    """The name of an attempt's group, in every hierarchy."""
    return f"{group_prefix(root)}{job_id}-{attempt}"


def list_groups(root: Path) -> list[Path]:
    """All groups of this data root, in every hierarchy and by every operator."""
    parent = _parent_name(root)
    return [group for group in _folders_of(root) if group.name != parent]


def remove_parents(root: Path) -> None:
    """Remove this data root's group folders that are empty, in all hierarchies: the hierarchy that
    works may have changed since an operator made them."""
    parent = _parent_name(root)
    for folder in _folders_of(root):
        if folder.name == parent:
            with suppress(OSError):  # it has groups
                folder.rmdir()


def _parent_name(root: Path) -> str:
    """The name of the folder of groups in each hierarchy."""
    return f"{group_prefix(root)}jobs"


def _folders_of(root: Path) -> list[Path]:
    """The groups of this data root, and the folders of its groups."""
    prefix, parent = group_prefix(root), _parent_name(root)
    found = []
    for folder, names, _ in os.walk(_ROOT):
        own = [name for name in names if name.startswith(prefix)]
        found += [Path(folder, name) for name in own]
        names[:] = [name for name in names if name not in own or name == parent]
    return found


def probe(root: Path, account: Account | None = None) -> CgroupSupport:
    """The best support for this user, and for `account` if jobs run as that user. A process tries
    each candidate, because rights alone do not show it: a group may be writable although moving a
    process into it is forbidden."""
    prefix = group_prefix(root)
    mounts = _mounts()
    parents = {
        controller: [
            CgroupParent("v2" if controller == "" else "v1", folder / f"{prefix}jobs")
            for folder in folders
        ]
        for controller, folders in mounts.items()
    }
    v2 = parents.get("", [])
    for parent in v2:
        if _works(prefix, account, parent, parent):
            return CgroupSupport("v2", parent, parent)
    for folder, parent in zip(mounts.get("", []), v2, strict=True):
        if _delegate(folder) and _works(prefix, account, parent, parent):
            return CgroupSupport("v2", parent, parent)
    # Freezers first: entering a v2 group takes 12-20 ms, and killing frozen processes is as safe.
    candidates = [*parents.get("freezer", []), *v2, *parents.get("pids", [])]
    trees = next((parent for parent in candidates if _works(prefix, account, parent, None)), None)
    for parent in parents.get("memory", []):
        if _works(prefix, account, trees, parent):
            return CgroupSupport("v1", parent, trees)
    return CgroupSupport("watchdog", None, trees)


# Does what a supervisor and its job do.
_TRIAL = """
import os, sys
sys.stdin.read()
if sys.argv[1] != "-1":
    os.write(os.open(sys.argv[2], os.O_WRONLY, dir_fd=int(sys.argv[1])), b"0")
"""


def _works(
    prefix: str, account: Account | None, trees: CgroupParent | None, memory: CgroupParent | None
) -> bool:
    """Whether a process of the account can be moved into a group of `trees`, and can move itself
    into a group of `memory`, which has a limit."""
    about = processes.stat("self")
    trial = f"{prefix}probe.{os.getpid()}.{about[2] if about else 0}"
    parents = {parent for parent in (trees, memory) if parent is not None}
    join = "" if memory is None else JOIN[memory.kind]
    folder, process, has_succeeded = -1, None, False
    try:
        for parent in parents:
            parent.create(account)
        if memory is not None:
            group = memory.create_limited_group(f"{trial}.limit", _PROBE_BYTES, account)
            folder = os.open(group, os.O_PATH | os.O_CLOEXEC)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _TRIAL, str(folder), join],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[] if folder < 0 else [folder],
            env={},
            cwd="/",
            **identity(account),
        )
        if trees is not None:
            trees.create_group_of(process.pid, trial)
        has_succeeded = _run_trial(process)
    except OSError:
        pass
    finally:
        if folder >= 0:
            os.close(folder)
        if process is not None:
            process.kill()
            process.communicate()
        for parent in parents:
            for made in (trial, f"{trial}.limit"):
                cgroups.remove(parent.folder / made)
        tried = memory or trees  # where both are given, `trees` is known to work
        if tried is not None and not has_succeeded:
            tried.remove()
    return has_succeeded


def _run_trial(process: subprocess.Popen[bytes]) -> bool:
    """Let a trial begin, and wait for its end; whether it succeeded. It waits for a pidfd:
    `subprocess` polls by the clock, which an administrator may set meanwhile."""
    assert process.stdin is not None
    process.stdin.close()
    pidfd = os.pidfd_open(process.pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(_TRIAL_TIMEOUT_S * 1000)) and process.wait() == 0
    finally:
        os.close(pidfd)


def _mounts() -> dict[str, list[Path]]:
    """The folders of groups, by v1 controller or "" for v2: the group of this process first, then
    the groups above it, up to the mount."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    found: dict[str, list[Path]] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        top, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        for controller in [""] if kind == "cgroup2" else options.split(","):
            path = own.get(controller, "/")
            found.setdefault(controller, _upwards(Path(mount), top, path))
    return found


def _upwards(mount: Path, top: str, path: str) -> list[Path]:
    below = os.path.relpath(path, top)
    own = mount if below.startswith("..") else mount / below
    folders = [own, *own.parents]
    return [f for f in folders if f.is_relative_to(mount) and f.is_dir()]


def _delegate(folder: Path) -> bool:
    """Delegate the memory controller of a v2 group to the groups below it; whether that succeeded.

    v2 allows that only for a group without processes. If only the operator is in it, the operator
    moves itself into a new group below. It does not leave the group of a systemd service: systemd
    starts processes right in that group, and so could not restart the service while jobs run below.
    """
    try:
        if "memory" not in (folder / "cgroup.controllers").read_text().split():
            return False
        pids = cgroups.members(folder)
        if set(pids) - _own_processes() or (pids and folder.suffix == ".service"):
            return False
        if pids:
            leaf = folder / "cortex-operator"
            leaf.mkdir(exist_ok=True)
            for pid in pids:
                with suppress(ProcessLookupError):
                    cgroups.write(leaf / "cgroup.procs", pid)
        cgroups.write(folder / "cgroup.subtree_control", "+memory")
    except OSError:
        return False
    return True


def _own_processes() -> set[int]:
    return {os.getpid(), *processes.descendants(os.getpid())}
