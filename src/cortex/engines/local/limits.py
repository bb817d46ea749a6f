"""Which way of limiting memory works on this machine, found by trying it. Called once when the local
engine opens, in a thread; the supervisors then make and remove the groups of their jobs.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cortex.account import Account, identity
from cortex.worker import cgroups

METHODS = {"v2": "cgroup v2", "v1": "cgroup v1", "watchdog": "watchdog"}
_PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class Limits:
    """How memory is limited (`kind`: v2, v1 or watchdog), and the folders in which jobs get their
    groups; `prefix` is this data root's own, so that two operators never meet."""

    kind: str
    prefix: str
    memory: Path | None = None
    kill: Path | None = None
    own: Path | None = None
    """A folder that was made for all groups of this data root, if there is one."""

    @property
    def method(self) -> str:
        return METHODS[self.kind]

    def memory_dir(self, job_id: str, attempt: int) -> str | None:
        return self._group(self.memory, job_id, attempt)

    def kill_dir(self, job_id: str, attempt: int) -> str | None:
        return self._group(self.kill, job_id, attempt)

    def stale(self) -> list[Path]:
        """Groups of this data root that are there now."""
        folders = {folder for folder in (self.memory, self.kill) if folder is not None}
        return [group for folder in folders for group in folder.glob(f"{self.prefix}*-*")]

    def close(self) -> None:
        """Remove what was made for all jobs, unless some go on."""
        if self.own is not None:
            cgroups.remove(str(self.own), within_s=0)

    def _group(self, folder: Path | None, job_id: str, attempt: int) -> str | None:
        return None if folder is None else f"{folder}/{self.prefix}{job_id}-{attempt}"


def prefix(root: Path) -> str:
    return f"cortex-{hashlib.sha256(bytes(root.resolve())).hexdigest()[:12]}-"


def group_name(root: Path, job_id: str, attempt: int) -> str:
    """What the groups of an attempt are called, wherever they are."""
    return f"{prefix(root)}{job_id}-{attempt}"


def belonging(groups: list[str], root: Path, job_id: str, attempt: int) -> list[str]:
    """Those that are an attempt's own by their place and name: the record that names them was the job's to
    write, and with more rights than the job has, others could be ended."""
    name = group_name(root, job_id, attempt)
    mounts = [folders[-1] for folders in _mounts() if folders]
    paths = [Path(group) for group in groups]
    return [
        str(path)
        for path in paths
        if path.name == name and ".." not in path.parts and any(m in path.parents for m in mounts)
    ]


def watchdog(root: Path) -> Limits:
    """No control groups at all."""
    return Limits("watchdog", prefix(root))


def probe(root: Path, account: Account | None = None) -> Limits:
    """The best that works for this user: tried with a process, because rights are not enough to
    tell (a group may be writable, and moving a process into it forbidden all the same).

    An empty v2 mount beside v1 is not used to kill by: to enter a v2 group takes 12-20 ms, and the
    supervisor's own sweeps end the same processes.
    """
    name = prefix(root)
    v2, v1 = _mounts()
    if account is not None:
        return _probe_as(account, name, {"v2": v2, "v1": v1}) or watchdog(root)
    probing = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        env={},
    )
    try:
        for folder in v2:
            if _works(folder, name, "v2", probing.pid):
                return Limits("v2", name, folder, folder)
        if v2 and _delegate(v2[0]) and _works(v2[0], name, "v2", probing.pid):
            return Limits("v2", name, v2[0], v2[0])
        for folder in v1:
            if _works(folder, name, "v1", probing.pid):
                return Limits("v1", name, folder)
        return watchdog(root)
    finally:
        probing.send_signal(signal.SIGKILL)
        probing.communicate()


# What a supervisor and its worker do with a group, all of it as their user.
_TRIAL = """
import os, sys
group, kind, amount = sys.argv[1:]
os.mkdir(group)
for name, text in {
    "v2": [("memory.max", amount), ("cgroup.procs", "0")],
    "v1": [("memory.limit_in_bytes", amount), ("tasks", "0")],
}[kind]:
    with open(os.path.join(group, name), "w") as file:
        file.write(text)
"""


def _probe_as(account: Account, name: str, mounts: dict[str, list[Path]]) -> Limits | None:
    """The best that works for another user, in a folder that is made for it."""
    for kind, folders in mounts.items():
        for folder in folders:
            own = folder / f"{name}jobs"
            trial = own / f"{name}probe{os.getpid()}"
            try:
                own.mkdir(exist_ok=True)
                account.own(own)
            except OSError:
                continue
            command = [sys.executable, "-I", "-S", "-c", _TRIAL, str(trial), kind]
            done = subprocess.run(
                [*command, str(_PROBE_BYTES)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={},
                cwd="/",
                check=False,
                **identity(account),
            )
            cgroups.remove(str(trial))
            if done.returncode == 0:
                return Limits(kind, name, own, own if kind == "v2" else None, own)
            cgroups.remove(str(own), within_s=0)
    return None


def _mounts() -> tuple[list[Path], list[Path]]:
    """Folders of the v2 hierarchy and of v1's memory one: this process's own first, then those
    above it, up to the mount."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    v2: list[Path] = []
    v1: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        top, mount = before.split()[3:5]
        kind, _, options = after.split()
        if kind == "cgroup2" and not v2:
            v2 = _upwards(Path(mount), top, own.get("", "/"))
        elif kind == "cgroup" and "memory" in options.split(",") and not v1:
            path = next((p for c, p in own.items() if "memory" in c.split(",")), "/")
            v1 = _upwards(Path(mount), top, path)
    return v2, v1


def _upwards(mount: Path, top: str, path: str) -> list[Path]:
    below = os.path.relpath(path, top)
    own = mount if below.startswith("..") else mount / below
    folders = [own, *own.parents]
    return [f for f in folders if f.is_relative_to(mount) and f.is_dir()]


def _works(folder: Path, name: str, kind: str, pid: int) -> bool:
    group = folder / f"{name}probe{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        return False
    try:
        if kind == "v2":
            cgroups.put(f"{group}/memory.max", str(_PROBE_BYTES))
        elif kind == "v1":
            cgroups.put(f"{group}/memory.limit_in_bytes", str(_PROBE_BYTES))
        cgroups.put(f"{group}/cgroup.procs", str(pid))
        if kind != "v1" and not (group / "cgroup.kill").exists():
            return kind == "v2"
    except OSError:
        return False
    else:
        return True
    finally:
        _leave(group, folder, pid)


def _leave(group: Path, folder: Path, pid: int) -> None:
    if pid in cgroups.members(str(group)):
        for place in (folder, *folder.parents):
            try:
                cgroups.put(f"{place}/cgroup.procs", str(pid))
            except OSError:
                continue  # v2 takes no process where there are groups with controllers below
            break
    if not cgroups.remove(str(group), within_s=0.2):
        # Nowhere to go back to: the probing process ends in there.
        os.kill(pid, signal.SIGKILL)
        cgroups.remove(str(group))


def _delegate(own: Path) -> bool:
    """Give this process's own v2 group controllers for groups below it. v2 allows that only where
    no process is, so the operator moves one down, if it is alone there."""
    try:
        if "memory" not in (own / "cgroup.controllers").read_text().split():
            return False
        if set(cgroups.members(str(own))) - _family():
            return False
        leaf = own / "cortex-operator"
        leaf.mkdir(exist_ok=True)
        for pid in cgroups.members(str(own)):
            cgroups.put(f"{leaf}/cgroup.procs", str(pid))
        cgroups.put(f"{own}/cgroup.subtree_control", "+memory")
    except OSError:
        return False
    return True


def _family() -> set[int]:
    from cortex.worker.processes import descendants

    return {os.getpid(), *descendants(os.getpid())}
