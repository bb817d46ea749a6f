"""The guard of a node: a process that waits for the end of the raylet, and then ends what jobs are left
there. An agent starts it, as `python -I guard.py <slot's folder> <raylet's pid>`; one for each slot.

When the raylet is gone the cluster has lost the node, and takes its jobs to have ended. Their
supervising processes depend on nobody, which is what lets them outlive an agent: here it is too much.
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

if not __package__:  # in isolation, where this package need not be installed
    sys.path.append(str(Path(__file__).parents[2]))

from cortex.worker import processes

LOCK = "guard.lock"
AGENT_LOCK = "lock"
_LONGEST_S = 60.0
_IS_SUPERVISOR = b"CORTEX_JOB_ID=-"  # as its fork server was started; jobs have their ids there


def end_all(jobs: Path) -> None:
    """Ask all supervising processes of a folder to stop their jobs, which they do with the grace that
    they were given; kill them if that takes too long."""
    told = (_supervisor(record) for record in jobs.glob("*/start.*"))
    # A job may have spoilt its record.
    held = [fd for fd in (*told, *_found(jobs)) if fd is not None]
    for fd in held:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            signal.pidfd_send_signal(fd, signal.SIGCONT)  # its job may have stopped it
    until = time.monotonic() + _LONGEST_S
    for fd in held:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(max(0, until - time.monotonic()) * 1000):
            with contextlib.suppress(OSError):
                processes.kill_with_descendants(fd)
        os.close(fd)


def _end_agent(root: Path) -> None:
    """Else it would tell the operator that jobs were stopped, whose node was lost. It is about to end
    anyway, and is there as long as it holds its lock."""
    with (root / AGENT_LOCK).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read()), signal.SIGKILL)
            fcntl.flock(file, fcntl.LOCK_EX)


def _supervisor(record: Path) -> int | None:
    """A pidfd of the supervising process that made this start record, if it still has that job."""
    try:
        about = json.loads(record.read_bytes())
        pid, ticks = int(about["pid"]), int(about["ticks"])
        # A folder that machines share holds processes of the others, too.
        if (
            not pid
            or about["boot"] != _boot()
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


def _found(jobs: Path) -> Iterator[int | None]:
    """Pidfds of the supervising processes that have the folder of a job open."""
    above = f"{jobs.resolve()}/"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            pid = int(process.name)
            fd = os.pidfd_open(pid)
            try:
                is_one = _IS_SUPERVISOR in (process / "environ").read_bytes() and any(
                    str(path.readlink()).startswith(above) for path in (process / "fd").iterdir()
                )
            except OSError:
                is_one = False
            if is_one:
                yield fd
            else:
                os.close(fd)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def main() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever Ray's workers block
    root, raylet = Path(sys.argv[1]), int(sys.argv[2])
    try:
        fd = os.pidfd_open(raylet)
    except ProcessLookupError:
        return
    lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # there is one
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
