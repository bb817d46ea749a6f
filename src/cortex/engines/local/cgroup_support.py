"""Which control groups work on this machine, found by trying them: those that limit memory, and those that hold what
a supervising process forks. Called once when the local engine opens, in a thread.
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
from cortex.engines.local.cgroups import Place
from cortex.system.account import Account, identity
from cortex.worker import processes
from cortex.worker.cgroups import JOIN

METHODS = {"v2": "cgroup v2", "v1": "cgroup v1", "watchdog": "watchdog"}
_ROOT = "/sys/fs/cgroup"
_PROBE_BYTES = 64 << 20
_TRIAL_S = 10
_FIRST_PID_NAMESPACE = 0xEFFFFFFC


@dataclass(frozen=True)
class CgroupSupport:
    """How memory is limited (`kind`: v2, v1 or watchdog), and where groups are made."""

    kind: str
    memory: Place | None = None
    trees: Place | None = None
    """For what supervising processes fork."""

    @property
    def method(self) -> str:
        return METHODS[self.kind]


WATCHDOG = CgroupSupport("watchdog")
"""No control groups at all."""


def prefix(root: Path) -> str:
    """What names of groups of this data root begin with, so that two operators never meet; nor do those of two
    containers, each with pids of its own."""
    place = bytes(root.resolve())
    pids = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # no Path follows this link
    if pids != _FIRST_PID_NAMESPACE:
        place += b"%d" % pids
    return f"cortex-{hashlib.sha256(place).hexdigest()[:12]}-"


def group_name(root: Path, job_id: str, attempt: int) -> str:
    """What the group of an attempt is called, wherever it is."""
    return f"{prefix(root)}{job_id}-{attempt}"


def existing(root: Path) -> list[Path]:
    """All groups of this data root that are there, wherever an operator made them."""
    place = _place(root)
    return [group for group in _all_of(root) if group.name != place]


def remove_places(root: Path) -> None:
    """Remove the folders of groups of this data root in which none is, wherever an operator made them: which hierarchy
    works may have changed since."""
    place = _place(root)
    for folder in _all_of(root):
        if folder.name == place:
            with suppress(OSError):  # there are groups in it
                folder.rmdir()


def _place(root: Path) -> str:
    """The name of the folder of groups in each hierarchy."""
    return f"{prefix(root)}jobs"


def _all_of(root: Path) -> list[Path]:
    name, place = prefix(root), _place(root)
    found = []
    for parent, names, _ in os.walk(_ROOT):
        own = [each for each in names if each.startswith(name)]
        found += [Path(parent, each) for each in own]
        names[:] = [each for each in names if each not in own or each == place]
    return found


def probe(root: Path, account: Account | None = None) -> CgroupSupport:
    """The best that works for this user, and for `account` where jobs are its: tried with a process, because rights
    are not enough to tell (a group may be writable, and moving a process into it forbidden all the same)."""
    name = prefix(root)
    mounts = _mounts()
    places = {
        controller: [Place("v2" if controller == "" else "v1", f / f"{name}jobs") for f in folders]
        for controller, folders in mounts.items()
    }
    v2 = places.get("", [])
    for place in v2:
        if _works(name, account, place, place):
            return CgroupSupport("v2", place, place)
    for folder, place in zip(mounts.get("", []), v2, strict=True):
        if _delegate(folder) and _works(name, account, place, place):
            return CgroupSupport("v2", place, place)
    # Freezers first: to enter a v2 group takes 12-20 ms, and what is frozen is killed as surely.
    candidates = [*places.get("freezer", []), *v2, *places.get("pids", [])]
    trees = next((place for place in candidates if _works(name, account, place, None)), None)
    for place in places.get("memory", []):
        if _works(name, account, trees, place):
            return CgroupSupport("v1", place, trees)
    return CgroupSupport("watchdog", None, trees)


# What a supervising process and its job do.
_TRIAL = """
import os, sys
sys.stdin.read()
if sys.argv[1] != "-1":
    os.write(os.open(sys.argv[2], os.O_WRONLY, dir_fd=int(sys.argv[1])), b"0")
"""


def _works(name: str, account: Account | None, trees: Place | None, memory: Place | None) -> bool:
    """Whether a process of the account can be put into a group, and move itself into one with a limit."""
    about = processes.stat("self")
    trial = f"{name}probe.{os.getpid()}.{about[2] if about else 0}"
    places = {place for place in (trees, memory) if place is not None}
    join = "" if memory is None else JOIN[memory.kind]
    folder, process, is_done = -1, None, False
    try:
        for place in places:
            place.open_up(account)
        if memory is not None:
            group = memory.limit(f"{trial}.limit", _PROBE_BYTES, account)
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
            trees.hold(trial, process.pid)
        is_done = _ends_well(process)
    except OSError:
        pass
    finally:
        if folder >= 0:
            os.close(folder)
        if process is not None:
            process.kill()
            process.communicate()
        for place in places:
            for made in (trial, f"{trial}.limit"):
                cgroups.remove(place.folder / made)
        tried = memory or trees  # of two places the other works
        if tried is not None and not is_done:
            tried.close()
    return is_done


def _ends_well(process: subprocess.Popen[bytes]) -> bool:
    """Let a trial begin. It is waited for by its pidfd: `subprocess` would sleep, which no clock that is set may fail."""
    assert process.stdin is not None
    process.stdin.close()
    pidfd = os.pidfd_open(process.pid)
    try:
        end = select.poll()
        end.register(pidfd, select.POLLIN)
        return bool(end.poll(_TRIAL_S * 1000)) and process.wait() == 0
    finally:
        os.close(pidfd)


def _mounts() -> dict[str, list[Path]]:
    """Folders of the v2 hierarchy ("") and of v1's controllers: this process's own first, then those above it, up to
    the mount."""
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
    """Give a v2 group the memory controller for groups below it. v2 allows that only where no process is, so the
    operator moves one down, if it is alone there. In the group of a systemd service it does not: while jobs run below,
    systemd could not start the service again, for it starts processes right in that group."""
    try:
        if "memory" not in (folder / "cgroup.controllers").read_text().split():
            return False
        there = cgroups.members(folder)
        if set(there) - _family() or (there and folder.suffix == ".service"):
            return False
        if there:
            leaf = folder / "cortex-operator"
            leaf.mkdir(exist_ok=True)
            for pid in there:
                with suppress(ProcessLookupError):
                    cgroups.put(leaf / "cgroup.procs", pid)
        cgroups.put(folder / "cgroup.subtree_control", "+memory")
    except OSError:
        return False
    return True


def _family() -> set[int]:
    return {os.getpid(), *processes.descendants(os.getpid())}
