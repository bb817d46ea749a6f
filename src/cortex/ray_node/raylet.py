"""Whether the raylet of this node answers. The agent asks, and reports it to the operator.

Ray's head declares a node dead whose raylet does not answer: by default after about a minute. Until
then, jobs must go to other nodes.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable

_INTERVAL_S = 1.0
_TIMEOUT_S = 3.0
# Every gRPC server answers a connection's first bytes with its settings (RFC 9113, section 3.4).
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


class RayletHealth:
    """On the agent's event loop."""

    def __init__(self, address: tuple[str, int], on_change: Callable[[], None]) -> None:
        """
        Args:
            address: the host and the port of the raylet.
            on_change: called when `problem` has changed.
        """
        self._address = address
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self.problem: str | None = None
        """Why the node can take no new job; None while the raylet answers."""

    def open(self) -> None:
        """Ask from now on."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="raylet health")

    async def close(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            begun = time.monotonic()
            problem = await self._ask()
            if problem != self.problem:
                self.problem = problem
                self._on_change()
            await asyncio.sleep(max(0, begun + _INTERVAL_S - time.monotonic()))

    async def _ask(self) -> str | None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await _answered(*self._address)
        except TimeoutError:
            return "its raylet does not answer"
        except OSError:
            # The raylet has ended, and this process is about to, or no descriptor is free here.
            return self.problem
        return None


async def _answered(host: str, port: int) -> None:
    """Return once a gRPC server has answered.

    Raises:
        OSError: nothing accepts connections there, or this process cannot make one.
    """
    uses_tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=_tls() if uses_tls else None)
    except ssl.SSLError:
        return  # an answer: it rejects this client, which has no certificate
    try:
        writer.write(_HTTP2_PREFACE)
        await reader.read(1)
    finally:
        writer.transport.abort()


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # no data is exchanged
    return context
