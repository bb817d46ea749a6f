"""The HTTP server of an operator: uvicorn's, except that it accepts connections itself.

An event loop accepts all waiting connections at once, as many as there are descriptors. This server
accepts them in small batches and, at the limit, closes an idle connection for each new one.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
import uvicorn
from starlette.types import ASGIApp

from cortex.operator.http.connections import Connections
from cortex.operator.http.wire import HttpProtocol
from cortex.system.oserrors import is_shortage

log = structlog.get_logger()

# A shutdown cuts long polls and followed logs off after this time; clients retry.
_SHUTDOWN_TIMEOUT_S = 2
_MAX_ACCEPTS = 32  # in one go
_ACCEPT_RETRY_DELAY_S = 0.1
# TCP keep-alive detects a client whose machine has vanished, also where there is nothing to send.
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 60, 15, 4


def configure_listener(listener: socket.socket) -> None:
    """Set the options that connections inherit from their listener."""
    # asyncio sets TCP_NODELAY only on sockets that name their protocol. With Nagle's algorithm, an
    # answer's body would wait for the client's delayed acknowledgement of its header: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


class Server(uvicorn.Server):
    """The server of a process, which has only one."""

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        max_connections: int,
        on_ready: Callable[[], None],
    ) -> None:
        """
        Args:
            max_connections: how many connections may be open.
            on_ready: called once the server answers.
        """
        config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_TIMEOUT_S,
        )
        super().__init__(config)
        self._listener = listener
        self._connections = Connections(max_connections)
        self._opening: set[asyncio.Task[object]] = set()
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, which gets no sockets of its own."""
        await super().startup(sockets or [])
        self._listener.setblocking(False)
        self._listen()
        self._on_ready()  # uvicorn handles signals by now

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        await asyncio.gather(*self._opening, return_exceptions=True)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals. uvicorn's own version raises the signal again after its shutdown, when
        the operator's parts are not closed yet."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def _listen(self) -> None:
        if self._listener.fileno() != -1:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_MAX_ACCEPTS):
            if not self._connections.can_accept():
                return  # the listener stays readable: the loop calls again
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if is_shortage(error) or error.errno == errno.ENOBUFS:
                    log.warning("cannot accept connections right now", error=str(error))
                    self._connections.make_room()
                    # Without a pause, the loop would do nothing else.
                    loop.remove_reader(self._listener)
                    loop.call_later(_ACCEPT_RETRY_DELAY_S, self._listen)
                    return
                continue  # the client has disconnected already
            self._connections.accepted()
            opening = loop.connect_accepted_socket(self._new_protocol, connection)
            task = loop.create_task(opening)
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[object]) -> None:
        self._opening.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._connections.failed()

    def _new_protocol(self) -> HttpProtocol:
        loop = asyncio.get_running_loop()
        return HttpProtocol(self.config, self.server_state, loop, self._connections)
