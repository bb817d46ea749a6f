"""The built-in modules behind `signal` and `socket`, without their Python wrappers.

The wrappers make enums of all constants, and import `selectors`, `enum` and `math`. Each fork
copies pages of all that the process has loaded, and the work of the wrappers delays a job's first
line. A job that imports `signal` or `socket` gets the usual modules.
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

_FD = 4  # bytes of a C int: the format of file descriptors in a message


def socketpair() -> tuple[socket.socket, socket.socket]:
    """A pair of sockets that preserve message boundaries and are not inherited by exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_fds(sock: socket.socket, data: bytes, fds: tuple[int, ...]) -> None:
    """Send a message with file descriptors."""
    packed = b"".join(fd.to_bytes(_FD, sys.byteorder) for fd in fds)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)])


def receive_fds(sock: socket.socket, max_bytes: int, max_fds: int) -> tuple[bytes, list[int]]:
    """Receive a message and its file descriptors, which are not inherited by exec."""
    data, ancillary, _, _ = sock.recvmsg(
        max_bytes, socket.CMSG_SPACE(max_fds * _FD), socket.MSG_CMSG_CLOEXEC
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
    """The name of a signal, such as `SIGKILL`."""
    for name in sorted(dir(signal)):  # the first of two names: SIGCHLD before SIGCLD
        if name.startswith("SIG") and name[3] != "_" and getattr(signal, name) == number:
            return name
    return f"signal {number}"
