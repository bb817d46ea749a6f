"""Finds and ends the processes of a job on this machine, by /proc and control groups: its records
may be forged. Blocking; called by `records`, and by the engines after a supervisor was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from cortex.engines.local import cgroup_support, cgroups
from cortex.worker import files, processes
from cortex.worker.messages import JOB_ID_ROOM, JOBS_FOLDER, StartRecord

END_TIMEOUT_S = 5.0
_EMPTY_POLLS = 2
"""Polls in a row without a process: a process shows no environment in the middle of its exec."""
_FENCED_TIMEOUT_S = 2.0
"""In which a process that a supervisor has prepared for the job observes the fence, and exits."""


def end_leftovers(folder: Path, attempt: int) -> None:
    """Kill all processes that a killed supervisor left of a job, and wait for their exit.

    Another operator may have done that while this one hung. Then a later attempt may run: this
    function spares its processes, and ends the groups of this attempt alone.

    Raises:
        OSError: no descriptor or memory is left to list the processes.
    """
    is_superseded = _has_later_start(folder, attempt) and _is_supervised(folder)
    name = cgroup_support.group_name(folder.parent, folder.name, attempt)
    for group in cgroup_support.list_groups(folder.parent):
        if group.name == name or cgroups.is_orphaned(group):
            cgroups.kill_and_remove(group, END_TIMEOUT_S)
    until = time.monotonic() + END_TIMEOUT_S
    polls_left = _EMPTY_POLLS
    while polls_left > 0 and time.monotonic() < until:
        left = {} if is_superseded else _processes(folder)
        polls_left = _EMPTY_POLLS if left else polls_left - 1
        shortage = processes.send_signals(left, signal.SIGKILL)
        if shortage is not None:
            raise shortage
        time.sleep(0.01)


def has_begun(folder: Path, attempt: int) -> bool:
    """Whether the job of a fenced attempt runs, or ran in a group: it may have removed or replaced
    its start record. A process that was only prepared exits when it observes the fence."""
    name = cgroup_support.group_name(folder.parent, folder.name, attempt)
    groups = cgroup_support.list_groups(folder.parent)
    if any(group.name == name and cgroups.was_used(group) for group in groups):
        return True
    until = time.monotonic() + _FENCED_TIMEOUT_S
    while _processes(folder):
        if _has_later_start(folder, attempt):
            return False
        if time.monotonic() > until:
            return True
        time.sleep(0.02)
    return False


def find_supervisor(folder: int) -> StartRecord | None:
    """The supervisor that has this job folder open, as a start record would name it."""
    # Supervisors have the fork server's environment, with dashes in place of a job's id.
    for pid, ticks in processes.with_variable("CORTEX_JOB_ID", "-" * JOB_ID_ROOM).items():
        if has_open(pid, folder, if_unknown=False):
            return StartRecord(pid=pid, ticks=ticks, start_ns=time.time_ns())
    return None


def has_open(pid: int, folder: int, *, if_unknown: bool = True) -> bool:
    """Whether a process has this folder open, as a supervisor has the folder of its job.

    Args:
        if_unknown: the answer where this user may not read the process's descriptors.
    """
    about = os.fstat(folder)
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(fd.stat(), about):
                    return True
    except PermissionError:
        return if_unknown
    except (FileNotFoundError, ProcessLookupError):
        return False
    return False


def runs_below(pid: int, job_id: str) -> bool:
    """Whether a job runs as a child of its supervisor, whatever its records say. The supervisor may
    have another job by now, or a process forked ahead. Their environments name another id."""
    names = (processes.variables(child).get("CORTEX_JOB_ID") for child in processes.children(pid))
    return any(name is None or name == job_id for name in names)


def folder_identity(root: Path) -> str:
    """The device and inode of a folder of jobs, in which it differs from all its copies.

    Raises:
        OSError: the folder cannot be read now.
    """
    about = root.stat()
    return f"{about.st_dev}:{about.st_ino}"


def _is_supervised(folder: Path) -> bool:
    """Whether a supervisor has the job folder open. A later attempt's record is no proof: the job
    may have forged it."""
    try:
        fd = files.open_folder(str(folder))
    except OSError:
        return False
    try:
        return find_supervisor(fd) is not None
    finally:
        os.close(fd)


def _has_later_start(folder: Path, attempt: int) -> bool:
    try:
        starts = [path.suffix[1:] for path in folder.iterdir() if path.stem == "start"]
    except OSError:
        return False
    return any(number.isdigit() and int(number) > attempt for number in starts)


def _processes(folder: Path) -> dict[int, int]:
    """The processes of a job (pid: start ticks), without those that run with another data folder,
    of which this one is a copy."""
    found = processes.with_variable("CORTEX_JOB_ID", folder.name)
    return {pid: ticks for pid, ticks in found.items() if not _is_elsewhere(pid, folder)}


def _is_elsewhere(pid: int, folder: Path) -> bool:
    variables = processes.variables(pid)
    with contextlib.suppress(OSError):
        if (root := variables.get(JOBS_FOLDER)) is not None:
            return root != folder_identity(folder.parent)
        # The job has started the process itself.
        if (files := variables.get("CORTEX_JOB_DIR")) is not None:
            return not Path(files).parent.samefile(folder)
    return False
