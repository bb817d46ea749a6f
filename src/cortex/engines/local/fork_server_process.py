"""The process of a fork server, as the operator handles it: start it, receive its messages, wait
for its end. Used by `fork_server`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from cortex.engines.base import Version
from cortex.engines.local import leftovers
from cortex.system.account import Account, identity
from cortex.system.background import in_thread
from cortex.worker import processes, syscalls
from cortex.worker.forkserver import main
from cortex.worker.messages import JOB_ID_ROOM, JOBS_FOLDER, MAX_MESSAGE, Setup

FDS_PER_SUPERVISOR = 2
"""A pidfd and a socket come with the message of each new supervisor."""
_EXIT_TIMEOUT_S = 5
_REAP_TIMEOUT_S = 1
"""For a process that has exited. It takes longer only if a job traces the process: then until that
job lets go of it."""
_SCRIPT = str(Path(main.__file__).absolute())


def start_process(
    its_socket: socket.socket,
    errors: IO[bytes] | None,
    version: Version,
    setup: Setup,
    account: Account | None,
) -> subprocess.Popen[bytes]:
    """Start a fork server.

    Args:
        its_socket: the fork server's end of the socket pair.
        errors: the file that gets its standard output and standard error.

    Raises:
        OSError: the process cannot be started.
    """
    with tempfile.TemporaryFile() as stdin:
        stdin.write(setup.dumps())
        stdin.seek(0)
        return subprocess.Popen(
            [str(version.python), "-s", _SCRIPT, str(its_socket.fileno())],
            stdin=stdin,
            stdout=errors,
            stderr=errors,
            env={
                **_interpreter_env(setup.env),
                "CORTEX_JOB_ID": "-" * JOB_ID_ROOM,
                JOBS_FOLDER: leftovers.folder_identity(Path(setup.import_dir).parent),
            },
            cwd=setup.project,
            pass_fds=[its_socket.fileno()],
            start_new_session=True,
            **identity(account),
        )


def _interpreter_env(env: dict[str, str]) -> dict[str, str]:
    """The environment without PYTHONPATH: modules in the user's folders could shadow those of the
    fork server, which adds these folders to the path of jobs."""
    return {name: value for name, value in env.items() if name != "PYTHONPATH"}


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its descriptors.

    Raises:
        OSError: there is no message now, or the connection is broken.
    """
    return syscalls.receive_fds(sock, MAX_MESSAGE, FDS_PER_SUPERVISOR)


def is_socket(fd: int) -> bool:
    """Whether a descriptor is a socket of the kind that supervisors have."""
    try:
        with socket.socket(fileno=os.dup(fd)) as found:
            kind = found.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            return found.family == socket.AF_UNIX and kind == socket.SOCK_SEQPACKET
    except OSError:
        return False


def is_own(pidfd: int, account: Account | None) -> bool:
    """Whether a descriptor is the pidfd of a process that the fork server's user may signal. The
    operator, which may have more rights, sends signals to each supervisor; users' code, which runs
    in fork servers, must not choose another process for that.

    Args:
        account: the fork server's user, if that is not the operator's own.
    """
    try:
        with contextlib.suppress(ProcessLookupError):  # a pidfd of a process that has exited
            signal.pidfd_send_signal(pidfd, 0)
        if account is None:
            return True
        return processes.owner(processes.pid_of(pidfd)) == account.uid
    except OSError:
        return False


async def wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    """Wait for the exit of a fork server that is about to exit, and kill it if it does not."""
    try:
        await in_thread(_wait, process)
    except OSError:  # no thread is left to wait in
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_REAP_TIMEOUT_S)


def _wait(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None and not _exits(process.pid):
        process.kill()
        _exits(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_REAP_TIMEOUT_S)


def _exits(pid: int) -> bool:
    """Whether a child exits within the timeout, by the kernel's clock: an administrator may set the
    system's clock meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)  # the child is not reaped yet, so the pid is not reused
    except OSError:
        return False  # no descriptor is left to wait with
    try:
        poller = select.poll()  # select(2) takes no descriptor from 1024 on
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(_EXIT_TIMEOUT_S * 1000))
    finally:
        os.close(pidfd)
