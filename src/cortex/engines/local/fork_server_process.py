"""The process of a fork server, seen from the operator: its start, what comes through its socket, its end. Used by
`forkserver`.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from cortex.engines.base import Version
from cortex.engines.local import leftovers
from cortex.system.account import Account, identity
from cortex.system.background import in_thread
from cortex.worker.forkserver import main
from cortex.worker.messages import JOB_ID_ROOM, JOBS_FOLDER, MAX_MESSAGE, Setup

FDS = 2
"""A pidfd and a socket come with each supervising process."""
_END_S = 5
_COLLECTED_S = 1
"""For one that has ended: it takes longer only where a job traces it, and then as long as that job likes."""
_SCRIPT = str(Path(main.__file__).absolute())


def start(
    theirs: socket.socket,
    errors: IO[bytes] | None,
    version: Version,
    setup: Setup,
    account: Account | None,
) -> subprocess.Popen[bytes]:
    """Start one, with its end of the socket, and a file for what it says to people.

    Raises:
        OSError: it cannot be started.
    """
    with tempfile.TemporaryFile() as stdin:
        stdin.write(setup.dumps())
        stdin.seek(0)
        return subprocess.Popen(
            [str(version.python), "-s", _SCRIPT, str(theirs.fileno())],
            stdin=stdin,
            stdout=errors,
            stderr=errors,
            env={
                **_for_interpreter(setup.env),
                "CORTEX_JOB_ID": "-" * JOB_ID_ROOM,
                JOBS_FOLDER: leftovers.identity(Path(setup.import_dir).parent),
            },
            cwd=setup.project,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            **identity(account),
        )


def _for_interpreter(env: dict[str, str]) -> dict[str, str]:
    """Without the user's own folders: what lies there could shadow what the fork server is made of. It
    puts them on the path of jobs itself."""
    return {name: value for name, value in env.items() if name != "PYTHONPATH"}


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """The next message, and the descriptors that come with it.

    Raises:
        OSError: there is none now, or the connection is gone.
    """
    room = socket.CMSG_SPACE(FDS * array.array("i").itemsize)
    # Descriptors that arrive would else be inherited by whatever the operator starts.
    data, ancillary, _, _ = sock.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def is_socket(fd: int) -> bool:
    """Whether it is of the kind that supervising processes have."""
    try:
        with socket.socket(fileno=os.dup(fd)) as found:
            kind = found.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            return found.family == socket.AF_UNIX and kind == socket.SOCK_SEQPACKET
    except OSError:
        return False


async def ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of one, which is about to come, or bring it about."""
    try:
        await in_thread(_wait, process)
    except OSError:  # there is no thread to wait in
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_COLLECTED_S)


def _wait(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None and not _ends(process.pid):
        process.kill()
        _ends(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_COLLECTED_S)


def _ends(pid: int) -> bool:
    """Whether a child does so by itself within a time, by the kernel's clock: that of the system may be
    set meanwhile."""
    try:
        pidfd = os.pidfd_open(pid)  # it is not reaped yet: it is surely this one
    except OSError:
        return False  # there are no descriptors to wait with
    try:
        poller = select.poll()  # a select takes no descriptor from 1024 on
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(_END_S * 1000))
    finally:
        os.close(pidfd)
