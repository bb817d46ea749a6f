"""The server of an operator's application: uvicorn's, which takes connections itself. An event loop takes all
that wait in one go, as many as there are descriptors, before anything can be closed for them.
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

from cortex.operator.http.answers import App
from cortex.operator.http.connections import Connections
from cortex.operator.http.wire import Protocol
from cortex.system.oserrors import is_shortage

log = structlog.get_logger()

# Long polls and followed logs are cut off after this; clients ask again.
_SHUTDOWN_S = 2
_AT_ONCE = 32
_AGAIN_S = 0.1
# A client whose machine has gone says nothing more; it is asked, also where nothing is to be sent.
_ASKED_AFTER_S, _ASKED_EVERY_S, _ASKED_TIMES = 60, 15, 4


def prepare(listener: socket.socket) -> None:
    """Set what connections have from their listener."""
    # asyncio sets it only on sockets that name their protocol; Nagle's algorithm would hold an answer's
    # body back until the client's delayed acknowledgement of its head: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _ASKED_AFTER_S)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASKED_EVERY_S)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _ASKED_TIMES)


class Server(uvicorn.Server):
    """One process has one."""

    def __init__(
        self, app: App, listener: socket.socket, most: int, ready: Callable[[], None]
    ) -> None:
        """
        Args:
            most: how many connections may be open.
            ready: called once it answers.
        """
        config = uvicorn.Config(
            app,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
        super().__init__(config)
        self._listener = listener
        self._connections = Connections(most)
        self._taken: set[asyncio.Task[object]] = set()
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, which is given no socket of its own."""
        await super().startup(sockets or [])
        self._listener.setblocking(False)
        self._listen()
        self._ready()  # not before a signal is heard

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        await asyncio.gather(*self._taken, return_exceptions=True)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again when it has shut down, before our parts are closed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def _listen(self) -> None:
        if self._listener.fileno() != -1:
            asyncio.get_running_loop().add_reader(self._listener, self._take)

    def _take(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_AT_ONCE):
            if not self._connections.can_take():
                return  # it stays readable
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if is_shortage(error) or error.errno == errno.ENOBUFS:
                    log.warning("no connection can be taken now", error=str(error))
                    self._connections.make_room()
                    # Without a pause nothing else would be done.
                    loop.remove_reader(self._listener)
                    loop.call_later(_AGAIN_S, self._listen)
                    return
                continue  # it has gone already
            self._connections.taken()
            begun = loop.connect_accepted_socket(self._protocol, connection)
            task = loop.create_task(begun)
            self._taken.add(task)
            task.add_done_callback(self._begun)

    def _begun(self, task: asyncio.Task[object]) -> None:
        self._taken.discard(task)
        if task.cancelled() or task.exception() is not None:
            self._connections.failed()

    def _protocol(self) -> Protocol:
        loop = asyncio.get_running_loop()
        return Protocol(self.config, self.server_state, loop, self._connections)
