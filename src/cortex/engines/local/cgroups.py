"""The control groups of the local engine: one for each supervisor, with all processes that it
forks, and one with the memory limit for each job that has `mem`.

The engine makes the groups, is alone in setting their limits, and ends the processes that are left
in one. A job can leave neither group: it finds no file of any group by a path, and may not write to
the files of its own groups. `cgroup_support` detects whether groups work, and in which folders.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from cortex.system.account import Account
from cortex.system.background import Background, in_thread, retrying
from cortex.worker import processes
from cortex.worker.cgroups import JOIN

log = structlog.get_logger()

END_TIMEOUT_S = 5.0
RETRY_DELAY_S = 1.0
REMOVE_TIMEOUT_S = 1.0
_POLL_INTERVAL_S = 0.005
# The files of each kind that get the limit, and whether a group must have them: the kernel's
# configuration decides on swap accounting.
_LIMIT = {
    "v2": [("memory.max", True), ("memory.swap.max", False)],
    "v1": [("memory.limit_in_bytes", True), ("memory.memsw.limit_in_bytes", False)],
}
_PEAK = ("memory.max_usage_in_bytes", "memory.peak", "memory.current")
# Files that freeze a group, with the contents that freeze and thaw it.
_FREEZERS = [("freezer.state", "FROZEN", "THAWED"), ("cgroup.freeze", "1", "0")]
_PROBE_OF_EARLIER_VERSIONS = re.compile(r"-probe\d+$")
_OWNER = re.compile(r"-(?:supervisor|probe)\.(\d+)\.(\d+)(?:\.limit)?$")


@dataclass(frozen=True)
class CgroupParent:
    """A folder in one hierarchy, with the groups of one data root and nothing else."""

    kind: str  # v1, v2
    folder: Path

    def create(self, account: Account | None) -> None:
        """Create the folder. `account` can join a group in it through a descriptor, and finds no
        group by its path.

        Raises:
            OSError: this user may not create it.
        """
        self.folder.mkdir(exist_ok=True)
        if self.kind == "v2":
            _try_write(self.folder / "cgroup.subtree_control", "+memory")
        if account is not None:
            os.chown(self.folder, 0, 0)  # earlier versions gave it to the account
            self.folder.chmod(0o700)
            if self.kind == "v2":
                # Moving a process takes this right in the common ancestor of both groups.
                _chown(self.folder / "cgroup.procs", account)

    def remove(self) -> None:
        """Remove the folder, unless it has groups."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def create_limited_group(self, name: str, amount: int, account: Account | None) -> Path:
        """Create a group with a memory limit. `account` may join it, but not change it.

        Raises:
            OSError: this user may not create it, or the kernel has no such limit here.
        """
        group = self.folder / name
        group.mkdir(exist_ok=True)  # the first order may have gone to a supervisor that had exited
        try:
            self._set_up(group, amount, account)
        except OSError:
            remove(group, timeout_s=0)
            raise
        return group

    def create_group_of(self, pid: int, name: str) -> Path:
        """Create a group and move a process into it.

        Raises:
            OSError: this user may not, or the process has exited.
        """
        group = self.folder / name
        group.mkdir()
        try:
            write(group / JOIN[self.kind], pid)
        except OSError:
            remove(group, timeout_s=0)
            raise
        return group

    def _set_up(self, group: Path, amount: int, account: Account | None) -> None:
        for file, is_required in _LIMIT[self.kind]:
            if is_required or (group / file).exists():
                # A job gets no swap: v1 limits the sum of both to the same amount, v2 limits swap
                # to 0.
                write(group / file, 0 if file == "memory.swap.max" else amount)
        if self.kind == "v2":
            write(group / "memory.oom.group", 1)
        if account is not None:
            _chown(group / JOIN[self.kind], account)
            if self.kind == "v1":
                _chown(group / "cgroup.event_control", account)


class CgroupManager:
    """The control groups of one engine. The engine sets the attributes when it opens."""

    def __init__(self) -> None:
        self.prefix = ""
        """What the names of all groups begin with."""
        self.trees: CgroupParent | None = None
        """The folder of the supervisors' groups."""
        self.memory: CgroupParent | None = None
        """The folder of the jobs' groups, which have memory limits."""
        self.account: Account | None = None
        self._limits: dict[str, Path] = {}  # by job
        self._earlier: dict[str, Path] = {}  # jobs' groups that an earlier operator made, by name
        self._to_remove: list[Path] = []
        self._watched: dict[int, Path] = {}  # by the pidfd of an earlier operator's supervisor
        self._background = Background("a control group could not be ended")

    def limit_memory(self, job_id: str, attempt: int, amount: int) -> str | None:
        """Create the group that limits the memory of an attempt; None where this machine has no
        groups.

        Raises:
            OSError: the group cannot be created.
        """
        if self.memory is None:
            return None
        name = f"{self.prefix}{job_id}-{attempt}"
        try:
            group = self.memory.create_limited_group(name, amount, self.account)
        except FileNotFoundError:  # a superseded operator has removed the folder when it closed
            self.memory.create(self.account)
            group = self.memory.create_limited_group(name, amount, self.account)
        self._limits[job_id] = group
        return str(group)

    def adopt_limit(self, job_id: str, attempt: int) -> None:
        """Take over the memory group of an earlier operator's attempt, if it has one."""
        group = self._earlier.pop(f"{self.prefix}{job_id}-{attempt}", None)
        if group is not None:
            self._limits[job_id] = group

    def release_limit(self, job_id: str) -> None:
        """End the memory group of a job whose attempt is over."""
        group = self._limits.pop(job_id, None)
        if group is not None:
            self.end_group(group)

    def enclose_supervisor(self, pidfd: int) -> SupervisorCgroup:
        """Move a new supervisor into a group of its own. Blocking."""
        try:
            pid = processes.pid_of(pidfd)
            about = processes.stat(pid)
            if self.trees is not None and about is not None:
                name = f"{self.prefix}supervisor.{pid}.{about[2]}"
                try:
                    return SupervisorCgroup(self, self.trees.create_group_of(pid, name))
                except FileNotFoundError:  # as in `limit_memory`
                    self.trees.create(self.account)
                    return SupervisorCgroup(self, self.trees.create_group_of(pid, name))
        except ProcessLookupError:
            pass  # it has exited
        except OSError as error:
            log.warning("cannot create the control group of a supervisor", error=str(error))
        return SupervisorCgroup(self, None)

    def end_group(self, group: Path | None, then: Callable[[], None] = lambda: None) -> None:
        """Kill all processes in a group, and remove the group.

        Args:
            then: called when that is done; before this method returns, if the group is empty.
        """
        if group is None or remove(group, timeout_s=0):
            then()
        else:
            self._background.run(self._end(group, then))

    def remove_on_close(self, group: Path | None) -> None:
        """End a group in `close`: its supervisor has no job, and is about to exit."""
        if group is not None:
            self._to_remove.append(group)

    def recover_groups(self, existing: list[Path]) -> None:
        """End the groups of supervisors that have exited. End those of living supervisors of an
        earlier operator as soon as they exit.

        Args:
            existing: all groups of this data root.
        """
        for group in existing:
            owner = _OWNER.findall(group.name)
            if _PROBE_OF_EARLIER_VERSIONS.search(group.name):
                self.end_group(group)
            elif not owner:
                self._earlier[group.name] = group
            elif (pidfd := processes.open_pidfd(*map(int, owner[0]))) is None:
                self.end_group(group)
            else:
                self._watched[pidfd] = group
                asyncio.get_running_loop().add_reader(pidfd, self._on_exit, pidfd)

    async def close(self) -> None:
        """Remove the groups that are no longer needed. Running jobs go on."""
        for pidfd in list(self._watched):
            has_job = bool(processes.children(processes.pid_of(pidfd)))
            group = self._unwatch(pidfd)
            if not has_job:
                self.remove_on_close(group)
        await self._background.finish()
        await in_thread(self._remove)

    def _on_exit(self, pidfd: int) -> None:
        self.end_group(self._unwatch(pidfd))

    def _unwatch(self, pidfd: int) -> Path:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        return self._watched.pop(pidfd)

    def _remove(self) -> None:
        for group in self._to_remove:
            remove(group, END_TIMEOUT_S)

    async def _end(self, group: Path, then: Callable[[], None]) -> None:
        is_ended = await retrying(
            lambda: in_thread(kill_and_remove, group),
            (OSError,),
            delay_s=RETRY_DELAY_S,
            warning="cannot end a control group",
            group=str(group),
        )
        if not is_ended:
            log.warning("processes in a control group do not end", group=str(group))
        then()


class SupervisorCgroup:
    """The control group of one supervisor, if it has one."""

    def __init__(self, manager: CgroupManager, group: Path | None) -> None:
        self._manager = manager
        self._group = group

    def end(self, then: Callable[[], None]) -> None:
        """End all processes that the supervisor left when it exited.

        Args:
            then: called when that is done; before this method returns, if the group is empty.
        """
        self._manager.end_group(self._group, then)

    def remove_on_close(self) -> None:
        """See `CgroupManager.remove_on_close`."""
        self._manager.remove_on_close(self._group)


def is_orphaned(group: Path) -> bool:
    """Whether the supervisor of this group has exited, or the operator that made the group as a
    probe. A zombie counts as exited: it supervises nothing."""
    found = _OWNER.findall(group.name)
    if not found:
        return False
    pid, ticks = map(int, found[0])
    return processes.ticks_if_alive(pid) != ticks


def was_used(group: Path) -> bool:
    """Whether a process was ever in this group with a memory limit."""
    if members(group):
        return True
    for name in _PEAK:
        with contextlib.suppress(OSError, ValueError):
            return int((group / name).read_text()) > 0
    return False


def kill_and_remove(group: Path, timeout_s: float = END_TIMEOUT_S) -> bool:
    """Kill all processes in a group and in the groups below it, and remove these groups; False if
    that takes longer. Blocking.

    Raises:
        OSError: no descriptor or memory is left to list the processes.
    """
    until = time.monotonic() + timeout_s
    while True:
        for each in _with_groups_below(group):
            _kill(each)
        if remove(group, timeout_s=_POLL_INTERVAL_S):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_INTERVAL_S)


def remove(group: Path, timeout_s: float = REMOVE_TIMEOUT_S) -> bool:
    """Remove a group and the groups below it, if they have no process; whether that succeeded. The
    kernel may answer EBUSY for a while after the last process was reaped."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            for each in _with_groups_below(group):
                each.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_INTERVAL_S)
        else:
            return True


def members(group: Path) -> list[int]:
    """The pids of the processes in a group."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def write(file: Path, content: object) -> None:
    """Write to an existing file of a group.

    Raises:
        OSError: the file does not exist, this user may not write to it, or the kernel refuses the
            content.
    """
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(content).encode())
    finally:
        os.close(fd)


def _chown(file: Path, account: Account) -> None:
    os.chown(file, account.uid, account.gid)


def _with_groups_below(group: Path) -> list[Path]:
    """A group and the groups that a job with enough rights made below it, the innermost first."""
    return [Path(folder) for folder, _, _ in os.walk(group, topdown=False)]


def _kill(group: Path) -> None:
    """Kill all processes in a group: with one write where the kernel can (v2 since 5.14), else
    while they are frozen. A fork bomb outruns neither."""
    if _try_write(group / "cgroup.kill", "1"):
        return
    for file, frozen, _ in _FREEZERS:
        _try_write(group / file, frozen)
    found = {pid: about[2] for pid in members(group) if (about := processes.stat(pid)) is not None}
    alive_now = members(group)  # their pids were not reused in between
    shortage = processes.send_signals(
        {pid: ticks for pid, ticks in found.items() if pid in alive_now}, signal.SIGKILL
    )
    for file, _, thawed in _FREEZERS:
        _try_write(group / file, thawed)
    if shortage is not None:
        raise shortage


def _try_write(file: Path, text: str) -> bool:
    """Write to a file of a group; False if it does not exist, or refuses the content."""
    try:
        write(file, text)
    except OSError:
        return False
    return True
