"""Messages through a SEQPACKET socket, with open files if need be; one that is too long for it goes as a
memory file. Used between engine, supervising process and worker.
"""

from __future__ import annotations

import os

from cortex.worker import syscalls
from cortex.worker.messages import MOST_MESSAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

READY = b"ready"  # not JSON, as all that is said otherwise
GO = b"go"
_LONG = b"long"


def send(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    """Raises OSError if nobody gets it."""
    if len(data) <= MOST_MESSAGE:
        if fds:
            syscalls.send_fds(sock, data, fds)
        else:
            sock.send(data)
        return
    memory = os.memfd_create("message")
    try:
        with open(os.dup(memory), "wb") as file:
            file.write(data)
        syscalls.send_fds(sock, _LONG, (memory, *fds))
    finally:
        os.close(memory)


def receive(sock: socket.socket, most_fds: int = 0) -> tuple[bytes, list[int]]:
    """The next message; an empty one at the end."""
    data, fds = syscalls.receive_fds(sock, MOST_MESSAGE, most_fds + 1)
    if data == _LONG and fds:
        with open(fds.pop(0), "rb") as file:
            file.seek(0)
            data = file.read()
    return data, fds
