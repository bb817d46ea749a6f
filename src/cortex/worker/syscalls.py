"""`signal` and `socket` as the interpreter has them built in, without the modules that wrap them for people.

Those make enums of all numbers, and bring `selectors`, `enum` and `math` with them. Everything that a
process has loaded is what each fork of it copies; what the wrappers do in it is time before a job's first
line. A job that imports them itself gets them as ever.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
else:
    import _signal as signal
    import _socket as socket

__all__ = ["receive_fds", "send_fds", "signal", "signal_name", "socket", "socketpair"]

_FD = 4  # bytes of a C int, in which file descriptors travel


def socketpair() -> tuple[socket.socket, socket.socket]:
    """Two ends that keep messages apart, and are not inherited."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_fds(sock: socket.socket, data: bytes, fds: tuple[int, ...]) -> None:
    """Send a message with open files."""
    packed = b"".join(fd.to_bytes(_FD, sys.byteorder) for fd in fds)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)])


def receive_fds(sock: socket.socket, most_bytes: int, most_fds: int) -> tuple[bytes, list[int]]:
    """Receive a message and the open files that came with it, which are not inherited."""
    data, ancillary, _, _ = sock.recvmsg(
        most_bytes, socket.CMSG_SPACE(most_fds * _FD), socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, packed in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(packed) - len(packed) % _FD
            fds += [
                int.from_bytes(packed[at : at + _FD], sys.byteorder) for at in range(0, whole, _FD)
            ]
    return data, fds


def signal_name(number: int) -> str:
    """As in `SIGKILL`."""
    for name in sorted(dir(signal)):  # of two names for one the older comes first: SIGCHLD, SIGCLD
        if name.startswith("SIG") and name[3] != "_" and getattr(signal, name) == number:
            return name
    return f"signal {number}"
