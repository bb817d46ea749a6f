"""What runs of a job or is left of it on this machine, told by processes and control groups whatever its records
say. Blocking; called by `records`, and by who ends what a killed supervisor has left.
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

CLEAN_S = 5.0
_LOOKS = 2  # that find nothing: in the midst of its exec, a process shows no environment
_GOES_S = 2.0  # what was laid out and finds the fence


def clean(folder: Path, attempt: int) -> None:
    """End whatever a killed supervisor has left of a job, and wait until it is gone. Where another operator did that
    while this one hung, what there is beside the groups of this attempt is of a later one, whose supervisor is there.

    Raises:
        OSError: what is left cannot be told, for want of descriptors or memory.
    """
    is_followed = _is_followed(folder, attempt) and _is_supervised(folder)
    name = cgroup_support.group_name(folder.parent, folder.name, attempt)
    for group in cgroup_support.existing(folder.parent):
        if group.name == name or cgroups.is_orphaned(group):
            cgroups.end(group, CLEAN_S)
    until = time.monotonic() + CLEAN_S
    looks = _LOOKS
    while looks > 0 and time.monotonic() < until:
        left = {} if is_followed else _processes(folder)
        looks = _LOOKS if left else looks - 1
        short = processes.send(left, signal.SIGKILL)
        if short is not None:
            raise short
        time.sleep(0.01)


def has_begun(folder: Path, attempt: int) -> bool:
    """Whether an attempt runs, or did in a group, that is fenced off: the job has removed its record, or
    written another. What had only been laid out is gone once it has found the fence."""
    name = cgroup_support.group_name(folder.parent, folder.name, attempt)
    if any(g.name == name and cgroups.was_used(g) for g in cgroup_support.existing(folder.parent)):
        return True
    until = time.monotonic() + _GOES_S
    while _processes(folder):
        if _is_followed(folder, attempt):
            return False
        if time.monotonic() > until:
            return True
        time.sleep(0.02)
    return False


def supervisor(folder: int) -> StartRecord | None:
    """The supervising process that has this folder open, told as its record would tell of it."""
    # Its environment is the fork server's, where jobs have their ids.
    for pid, ticks in processes.with_variable("CORTEX_JOB_ID", "-" * JOB_ID_ROOM).items():
        if has_open(pid, folder, if_unknown=False):
            return StartRecord(pid=pid, ticks=ticks, start_ns=time.time_ns())
    return None


def has_open(pid: int, folder: int, *, if_unknown: bool = True) -> bool:
    """Whether a process has this folder open, as a supervising process has that of its job.

    Args:
        if_unknown: the answer where the system does not let this user know.
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
    """Whether a job runs below its supervising process, whatever its records say. That process may have another job
    by now, or a process that waits for one: both have a variable that says so."""
    names = (processes.variables(child).get("CORTEX_JOB_ID") for child in processes.children(pid))
    return any(name is None or name == job_id for name in names)


def identity(root: Path) -> str:
    """What tells a folder of jobs from every copy of it.

    Raises:
        OSError: it cannot be asked now.
    """
    about = root.stat()
    return f"{about.st_dev}:{about.st_ino}"


def _is_supervised(folder: Path) -> bool:
    """Whether a supervising process has the folder open: a record of a later attempt may be the job's own making."""
    try:
        fd = files.open_folder(str(folder))
    except OSError:
        return False
    try:
        return supervisor(fd) is not None
    finally:
        os.close(fd)


def _is_followed(folder: Path, attempt: int) -> bool:
    try:
        starts = [path.suffix[1:] for path in folder.iterdir() if path.stem == "start"]
    except OSError:
        return False
    return any(number.isdigit() and int(number) > attempt for number in starts)


def _processes(folder: Path) -> dict[int, int]:
    """What runs of a job (pid: start ticks), but not what runs of it with another data folder, of which this one is
    a copy."""
    found = processes.with_variable("CORTEX_JOB_ID", folder.name)
    return {pid: ticks for pid, ticks in found.items() if not _is_elsewhere(pid, folder)}


def _is_elsewhere(pid: int, folder: Path) -> bool:
    variables = processes.variables(pid)
    with contextlib.suppress(OSError):
        if (root := variables.get(JOBS_FOLDER)) is not None:
            return root != identity(folder.parent)
        if (
            files := variables.get("CORTEX_JOB_DIR")
        ) is not None:  # what the job has started itself
            return not Path(files).parent.samefile(folder)
    return False
