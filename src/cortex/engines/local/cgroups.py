"""Control groups as the local engine has them: one for each supervising process, in which all is that it forks, and
one with the limit for each job that has `mem`. The engine makes them, keeps what can be set in them to itself, and
ends what is left in one. A job can leave neither: it finds no file of any by a name, and may not write to its own.

Whether there are any and where they are is found out by `limits`.
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
from cortex.system.background import Background, in_thread
from cortex.worker import processes
from cortex.worker.cgroups import JOIN

log = structlog.get_logger()

END_S = 5.0
RETRY_S = 1.0
GONE_S = 1.0
_PAUSE_S = 0.005
# Each kind's files that are to be written with the limit, and whether they have to be there: swap accounting is a
# choice of the kernel's configuration.
_LIMIT = {
    "v2": [("memory.max", True), ("memory.swap.max", False)],
    "v1": [("memory.limit_in_bytes", True), ("memory.memsw.limit_in_bytes", False)],
}
_PEAK = ("memory.max_usage_in_bytes", "memory.peak", "memory.current")
# Files that stop all of a group, and what is written there for that and for its end.
_FREEZERS = [("freezer.state", "FROZEN", "THAWED"), ("cgroup.freeze", "1", "0")]
_PROBE_OF_OLD = re.compile(r"-probe\d+$")
_MADE_FOR = re.compile(r"-(?:supervisor|probe)\.(\d+)\.(\d+)(?:\.limit)?$")


@dataclass(frozen=True)
class Place:
    """A folder of one hierarchy, which holds groups of one data root and nothing else."""

    kind: str  # v1, v2
    folder: Path

    def open_up(self, account: Account | None) -> None:
        """Make it, so that `account` can join a group in it whose folder it is given, and finds none by itself.

        Raises:
            OSError: this user may not.
        """
        self.folder.mkdir(exist_ok=True)
        if self.kind == "v2":
            _put(self.folder / "cgroup.subtree_control", "+memory")
        if account is not None:
            os.chown(self.folder, 0, 0)  # earlier versions gave it away
            self.folder.chmod(0o700)
            if self.kind == "v2":  # who moves a process may do so in the group above both
                _give(self.folder / "cgroup.procs", account)

    def close(self) -> None:
        """Remove it, unless there are groups in it."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def limit(self, name: str, amount: int, account: Account | None) -> Path:
        """Make a group with a memory limit, which `account` may join and not change.

        Raises:
            OSError: this user may not, or the kernel has no such limit here.
        """
        group = self.folder / name
        group.mkdir(exist_ok=True)  # the order was given to one that is gone
        try:
            self._set_up(group, amount, account)
        except OSError:
            remove(group, within_s=0)
            raise
        return group

    def hold(self, name: str, pid: int) -> Path:
        """Make a group and move a process into it.

        Raises:
            OSError: this user may not, or the process is gone.
        """
        group = self.folder / name
        group.mkdir()
        try:
            put(group / JOIN[self.kind], pid)
        except OSError:
            remove(group, within_s=0)
            raise
        return group

    def _set_up(self, group: Path, amount: int, account: Account | None) -> None:
        for file, is_needed in _LIMIT[self.kind]:
            if is_needed or (group / file).exists():
                # Without swap the limit is that of both together (v1), or there is none (v2).
                put(group / file, 0 if file == "memory.swap.max" else amount)
        if self.kind == "v2":
            put(group / "memory.oom.group", 1)
        if account is not None:
            _give(group / JOIN[self.kind], account)
            if self.kind == "v1":
                _give(group / "cgroup.event_control", account)


class Groups:
    """Those of one engine. It opens with none."""

    def __init__(self) -> None:
        self.prefix = ""
        self.trees: Place | None = None
        """Where supervising processes have theirs."""
        self.memory: Place | None = None
        """Where jobs have theirs."""
        self.account: Account | None = None
        self._limits: dict[str, Path] = {}  # by job
        self._earlier: dict[str, Path] = {}  # by name
        self._ending: list[Path] = []
        self._followed: dict[int, Path] = {}  # by pidfd
        self._background = Background("a control group could not be ended")

    def limit(self, job_id: str, attempt: int, amount: int) -> str | None:
        """The group in which an attempt of a job will be held to so much memory.

        Raises:
            OSError: it cannot be made.
        """
        if self.memory is None:
            return None
        name = f"{self.prefix}{job_id}-{attempt}"
        try:
            group = self.memory.limit(name, amount, self.account)
        except (
            FileNotFoundError
        ):  # an operator that is superseded has removed the place as it closed
            self.memory.open_up(self.account)
            group = self.memory.limit(name, amount, self.account)
        self._limits[job_id] = group
        return str(group)

    def take_over(self, job_id: str, attempt: int) -> None:
        """A job that an earlier operator has started may have such a group."""
        group = self._earlier.pop(f"{self.prefix}{job_id}-{attempt}", None)
        if group is not None:
            self._limits[job_id] = group

    def release(self, job_id: str) -> None:
        """A job is over."""
        group = self._limits.pop(job_id, None)
        if group is not None:
            self.end(group)

    def hold(self, pidfd: int) -> Held:
        """Put a new supervising process into a group of its own. Blocking."""
        try:
            pid = processes.pid_of(pidfd)
            about = processes.stat(pid)
            if self.trees is not None and about is not None:
                name = f"{self.prefix}supervisor.{pid}.{about[2]}"
                try:
                    return Held(self, self.trees.hold(name, pid))
                except FileNotFoundError:  # as in `limit`
                    self.trees.open_up(self.account)
                    return Held(self, self.trees.hold(name, pid))
        except ProcessLookupError:
            pass  # it is gone
        except OSError as error:
            log.warning("a supervising process gets no control group", error=str(error))
        return Held(self, None)

    def end(self, group: Path | None, then: Callable[[], None] = lambda: None) -> None:
        """Nothing is to be left in a group, nor the group.

        Args:
            then: is called when that is so; at once, if it can be.
        """
        if group is None or remove(group, within_s=0):
            then()
        else:
            self._background.run(self._end(group, then))

    def let_go(self, group: Path | None) -> None:
        """Nothing is left in a group but a process that is about to end."""
        if group is not None:
            self._ending.append(group)

    def take_up(self, found: list[Path]) -> None:
        """End what is left in groups of processes that are gone, and, as soon as they are, in those of an earlier
        operator's that live.

        Args:
            found: all that there are of this data root.
        """
        for group in found:
            owner = _MADE_FOR.findall(group.name)
            if _PROBE_OF_OLD.search(group.name):
                self.end(group)
            elif not owner:
                self._earlier[group.name] = group
            elif (pidfd := processes.open_pidfd(*map(int, owner[0]))) is None:
                self.end(group)
            else:
                self._followed[pidfd] = group
                asyncio.get_running_loop().add_reader(pidfd, self._on_gone, pidfd)

    async def close(self) -> None:
        """Remove the groups that are not needed any more; what runs goes on."""
        for pidfd in list(self._followed):
            has_job = bool(processes.children(processes.pid_of(pidfd)))
            group = self._let_be(pidfd)
            if not has_job:
                self.let_go(group)
        await self._background.finish()
        await in_thread(self._remove)

    def _on_gone(self, pidfd: int) -> None:
        self.end(self._let_be(pidfd))

    def _let_be(self, pidfd: int) -> Path:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        return self._followed.pop(pidfd)

    def _remove(self) -> None:
        for group in self._ending:
            remove(group, END_S)

    async def _end(self, group: Path, then: Callable[[], None]) -> None:
        while True:
            try:
                is_ended = await in_thread(end, group)
            except OSError as error:
                log.warning("a control group cannot be ended", group=str(group), error=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                break
        if not is_ended:
            log.warning("what is left in a control group does not end", group=str(group))
        then()


class Held:
    """The group that a supervising process is in, if there is one."""

    def __init__(self, groups: Groups, group: Path | None) -> None:
        self._groups = groups
        self._group = group

    def end(self, then: Callable[[], None]) -> None:
        """The process is gone: nothing is to be left of its job.

        Args:
            then: is called when that is so; at once, if it can be.
        """
        self._groups.end(self._group, then)

    def let_go(self) -> None:
        """The process has no job, and is about to end by itself."""
        self._groups.let_go(self._group)


def is_orphaned(group: Path) -> bool:
    """Whether this is the group of a supervising process, or of an operator that tried whether groups work, and that
    is gone, or about to be: a zombie watches over nobody."""
    found = _MADE_FOR.findall(group.name)
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


def end(group: Path, within_s: float = END_S) -> bool:
    """Kill all that is in a group and in those below it, and remove them; False if that takes longer. Blocking.

    Raises:
        OSError: what is left cannot be told, for want of descriptors or memory.
    """
    until = time.monotonic() + within_s
    while True:
        for each in _with_below(group):
            _kill(each)
        if remove(group, within_s=_PAUSE_S):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(_PAUSE_S)


def remove(group: Path, within_s: float = GONE_S) -> bool:
    """Remove a group and those below it, if no process is in any. Right after its last process was reaped the kernel
    may still say EBUSY."""
    until = time.monotonic() + within_s
    while True:
        try:
            for each in _with_below(group):
                each.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() >= until:
                return False
            time.sleep(_PAUSE_S)
        else:
            return True


def members(group: Path) -> list[int]:
    """The processes in a group."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def put(file: Path, content: object) -> None:
    """Write to a file of a group, which is there.

    Raises:
        OSError: there is none, this user may not, or the kernel refuses it.
    """
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(content).encode())
    finally:
        os.close(fd)


def _give(file: Path, account: Account) -> None:
    os.chown(file, account.uid, account.gid)


def _with_below(group: Path) -> list[Path]:
    """A group and those in it, which a job with enough rights has made, the innermost first."""
    return [Path(folder) for folder, _, _ in os.walk(group, topdown=False)]


def _kill(group: Path) -> None:
    """At one stroke where the kernel can (v2 since 5.14), else while they are frozen: a fork bomb cannot outrun it."""
    if _put(group / "cgroup.kill", "1"):
        return
    for file, frozen, _ in _FREEZERS:
        _put(group / file, frozen)
    found = {pid: about[2] for pid in members(group) if (about := processes.stat(pid)) is not None}
    there = members(group)  # no other process has got such a pid in between
    short = processes.send({p: ticks for p, ticks in found.items() if p in there}, signal.SIGKILL)
    for file, _, thawed in _FREEZERS:
        _put(group / file, thawed)
    if short is not None:
        raise short


def _put(file: Path, text: str) -> bool:
    """Write to a file of a group, if there is such a file."""
    try:
        put(file, text)
    except OSError:
        return False  # there is not, or the group is gone
    return True
