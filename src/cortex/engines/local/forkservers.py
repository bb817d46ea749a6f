"""The operator's side of fork servers: one warm interpreter per deployed version, started when a job
needs it. Called by the local engine alone; everything here runs on its event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine
from pathlib import Path
from typing import Protocol

from cortex.engines.base import Version
from cortex.engines.local.forkserver import ForkServer
from cortex.worker.messages import Order, Reply

MOST_IDLE = 8


class Listener(Protocol):
    """Who gives the orders."""

    def forked(self, reply: Reply, pidfd: int) -> None:
        """A supervisor was forked; the pidfd is the listener's to close."""

    def recorded(self, reply: Reply) -> None:
        """A supervisor has made its start record: the job has started."""

    def not_forked(self, job_id: str, reason: str) -> None:
        """The order could not be carried out, and never will be."""

    def unanswered(self, job_id: str) -> None:
        """The fork server died with the order: it may have been carried out, or not."""


class ForkServers:
    """All fork servers of an engine, the most recently used ones last."""

    def __init__(self, listener: Listener, import_dir: Path) -> None:
        self._listener = listener
        self._import_dir = import_dir
        self._servers: OrderedDict[str, ForkServer] = OrderedDict()
        self._plain: set[str] = set()  # versions that cannot be preloaded
        self._all: set[ForkServer] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def order(self, version: Version, order: Order) -> None:
        self._of(version).order(order)
        self._trim()

    def warm(self, version: Version) -> None:
        self._of(version)
        self._trim()

    def withdraw(self, version: Version, job_id: str) -> bool:
        """Take back an order that no fork server has read; False if one may have."""
        server = self._servers.get(version.api.api_id)
        return server is not None and server.withdraw(job_id)

    def forget(self, api_id: str) -> None:
        server = self._servers.get(api_id)
        if server is not None:
            self._retire(server)

    async def close(self) -> None:
        self._servers.clear()
        for server in list(self._all):
            self._end(server)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _of(self, version: Version) -> ForkServer:
        api_id = version.api.api_id
        server = self._servers.get(api_id)
        if server is not None and server.version != version:
            self._retire(server)
            server = None
        if server is None:
            server = self._spawn(version, preload=api_id not in self._plain)
        self._servers.move_to_end(api_id)
        return server

    def _spawn(self, version: Version, *, preload: bool) -> ForkServer:
        server = ForkServer(version, preload=preload, said=self._said, died=self._died)
        self._servers[version.api.api_id] = server
        self._all.add(server)
        self._run(server.spawn(self._import_dir))
        return server

    def _said(self, server: ForkServer, reply: Reply, pidfd: int) -> None:
        if reply.job_id is None:
            return
        if reply.recorded:
            self._listener.recorded(reply)
            return
        if reply.error is None:
            self._listener.forked(reply, pidfd)
        else:
            self._listener.not_forked(reply.job_id, reply.error)
        if server.retired and not server.orders:
            self._end(server)
        self._trim()

    def _died(self, server: ForkServer) -> None:
        api_id = server.version.api.api_id
        if self._servers.get(api_id) is server:
            del self._servers[api_id]
        orders = list(server.orders.values())
        self._end(server)
        if server.ready or server.was_killed:
            for order in orders:
                self._listener.unanswered(order.job_id)
        elif server.preload:
            # It reads no order before it is ready: none of these has been carried out.
            self._plain.add(api_id)
            for order in orders:
                self.order(server.version, order)
        else:
            reason = f"the environment's Python could not start: {server.last_words()}"
            for order in orders:
                self._listener.not_forked(order.job_id, reason)

    def _trim(self) -> None:
        idle = [server for server in self._servers.values() if not server.orders]
        for server in idle[: max(0, len(idle) - MOST_IDLE)]:
            self._retire(server)

    def _retire(self, server: ForkServer) -> None:
        """It gets no more orders, and ends when those it has are answered."""
        self._servers.pop(server.version.api.api_id, None)
        server.retired = True
        if not server.orders:
            self._end(server)

    def _end(self, server: ForkServer) -> None:
        self._all.discard(server)
        self._run(server.close())

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
