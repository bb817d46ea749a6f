"""The guard of a node: a process that ends the node's jobs after the end of the raylet.

An agent starts it as `python -I guard.py <agent's folder> <raylet's pid>`, one for each folder.
After the end of its raylet, the cluster has lost the node, and the operator reports its jobs as
lost. Their supervisors depend on no other process, so that they survive the end of an agent. Here,
they must end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run with -I, where this package may not be importable
    sys.path.append(str(Path(__file__).parents[2]))

from cortex.worker import processes

LOCK = "guard.lock"
AGENT_LOCK = "lock"
_STOP_TIMEOUT_S = 60.0
# The fork server starts with this variable, and its supervisors have it. Jobs have their ids there.
_SUPERVISOR_VARIABLE = b"CORTEX_JOB_ID=-"


def end_all(jobs: Path) -> None:
    """End all jobs of a folder.

    Their supervisors receive SIGTERM, and stop the jobs with the grace period that each has. After
    `_STOP_TIMEOUT_S`, the guard kills them with their jobs.

    Args:
        jobs: the folder of the jobs' folders.
    """
    recorded = (_supervisor_of(record) for record in jobs.glob("*/start.*"))
    # A job may have overwritten its record.
    pidfds = [fd for fd in (*recorded, *_running_supervisors(jobs)) if fd is not None]
    for fd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            signal.pidfd_send_signal(fd, signal.SIGCONT)  # the job may have stopped its supervisor
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for fd in pidfds:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            with contextlib.suppress(OSError):
                processes.kill_with_descendants(fd)
        os.close(fd)


def _end_agent(root: Path) -> None:
    """Kill the agent, and wait for its end.

    Ray is about to end it. Until then, it would report the jobs as stopped, but their node is lost.
    The agent has the lock while it is alive.
    """
    with (root / AGENT_LOCK).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read()), signal.SIGKILL)
            fcntl.flock(file, fcntl.LOCK_EX)


def _supervisor_of(record: Path) -> int | None:
    """A pidfd of the supervisor that wrote this start record; None if it has ended."""
    try:
        content = json.loads(record.read_bytes())
        pid, ticks = int(content["pid"]), int(content["ticks"])
        # In a folder that machines share, a record may be of a process on another machine.
        if (
            not pid
            or content["boot"] != _boot()
            or record.with_name(record.name.replace("start", "exit")).exists()
        ):
            return None
        fd = os.pidfd_open(pid)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        if int(stat.rpartition(")")[2].split()[19]) == ticks:
            return fd
    except (OSError, ValueError, IndexError):
        pass
    os.close(fd)
    return None


def _running_supervisors(jobs: Path) -> Iterator[int | None]:
    """Pidfds of the supervisors that have the folder of a job open."""
    prefix = f"{jobs.resolve()}/"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            pid = int(process.name)
            fd = os.pidfd_open(pid)
            try:
                is_supervisor = _SUPERVISOR_VARIABLE in (process / "environ").read_bytes() and any(
                    str(path.readlink()).startswith(prefix) for path in (process / "fd").iterdir()
                )
            except OSError:
                is_supervisor = False
            if is_supervisor:
                yield fd
            else:
                os.close(fd)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def main() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray's workers block signals
    root, raylet = Path(sys.argv[1]), int(sys.argv[2])
    try:
        fd = os.pidfd_open(raylet)
    except ProcessLookupError:
        return
    lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # the folder has a guard already
    if os.fork():
        os._exit(0)
    os.setsid()
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll()
    _end_agent(root)
    end_all(root / "jobs")


if __name__ == "__main__":
    main()
