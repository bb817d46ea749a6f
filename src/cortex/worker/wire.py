"""Messages through a SEQPACKET socket, with file descriptors if there are any. A message that is
too long for the socket is sent as a memory file. Used between engine, supervising process and job
process.
"""

from __future__ import annotations

import os

from cortex.worker import syscalls
from cortex.worker.messages import MAX_MESSAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

READY = b"ready"  # not JSON, unlike all other messages
GO = b"go"
_LONG = b"long"


def send(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> None:
    """Send a message.

    Raises:
        OSError: the other end is closed.
    """
    if len(data) <= MAX_MESSAGE:
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


def receive(sock: socket.socket, max_fds: int = 0) -> tuple[bytes, list[int]]:
    """The next message and its descriptors; an empty message if the other end is closed."""
    data, fds = syscalls.receive_fds(sock, MAX_MESSAGE, max_fds + 1)
    if data == _LONG and fds:
        with open(fds.pop(0), "rb") as file:
            file.seek(0)
            data = file.read()
    return data, fds
