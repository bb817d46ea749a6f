"""The agent's end of the TCP connections from operators: it listens, authenticates each operator,
and carries out requests, each of which names a public method of the agent. The agent opens it.

Ports: any free one, or one of `$CORTEX_AGENT_PORTS` of the node, which its raylet has inherited.
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable

from cortex.engines.ray.encoding import decode_request, encode_answer
from cortex.engines.ray.frames import (
    KEY_BYTES,
    MAX_FRAME_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    Framed,
)
from cortex.engines.ray.link import Answer
from cortex.engines.ray.messages import Refusal
from cortex.engines.ray.ray_errors import explain
from cortex.errors import InvalidProject

PORTS_VARIABLE = "CORTEX_AGENT_PORTS"
MAX_UNAUTHENTICATED = 64
_EVERYWHERE = {False: "0.0.0.0", True: "::"}
_MAX_PORT = 65535


class AgentServer:
    """The server of one agent, on its event loop."""

    def __init__(self, agent: object) -> None:
        """
        Args:
            agent: its public methods are coroutines.
        """
        self.key = secrets.token_bytes(KEY_BYTES)
        """What operators authenticate with; they get it through Ray."""
        self.port = 0
        self._agent = agent
        self._server: asyncio.Server | None = None
        self._connections: dict[OperatorConnection, None] = {}

    async def open(self, host: str) -> None:
        """Listen on an address of this machine, unless it does already.

        Args:
            host: the node's address. If it is not an address of this machine, as behind a
                translation of addresses, the server listens on all.

        Raises:
            Refusal: it cannot listen; the message says why.
        """
        if self._server is not None:
            return
        ports = ports_of(os.environ.get(PORTS_VARIABLE, ""))
        try:
            try:
                self._server = await self._listen(host, ports)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                self._server = await self._listen(_EVERYWHERE[":" in host], ports)
        except OSError as error:
            raise Refusal(f"its agent cannot listen on {host}: {error}") from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Close all connections, and listen no more."""
        if self._server is not None:
            self._server.close()
        connections = list(self._connections)
        for each in connections:
            each.close("the agent has closed")
        for each in connections:
            await each.closed.wait()

    async def carry_out(self, method: str, arguments: tuple[object, ...]) -> Answer:
        """Carry out a request; the answer, with the reason of a failure."""
        if method.startswith("_") or not hasattr(self._agent, method):
            return Answer(refused=f"agents have no method {method!r}")
        work: Callable[..., Awaitable[object]] = getattr(self._agent, method)
        try:
            return Answer(await work(*arguments))
        except (Refusal, InvalidProject) as error:
            return Answer(refused=str(error))
        except Exception as error:  # after any other exception, the outcome is unknown
            return _failed(method, error)

    def add(self, connection: OperatorConnection) -> None:
        """Count a new connection. Those that do not authenticate must not fill the process: the
        oldest of too many gives way."""
        self._connections[connection] = None
        strangers = [each for each in self._connections if not each.is_authenticated]
        for each in strangers[: max(0, len(strangers) - MAX_UNAUTHENTICATED)]:
            each.close("too many connections did not authenticate")

    def remove(self, connection: OperatorConnection) -> None:
        """Count a closed connection no more."""
        self._connections.pop(connection, None)

    async def _listen(self, host: str, ports: Iterable[int]) -> asyncio.Server:
        """Listen on the first free port."""
        loop = asyncio.get_running_loop()
        for port in ports:
            try:
                return await loop.create_server(lambda: OperatorConnection(self), host, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, f"all ports of ${PORTS_VARIABLE} are taken")


class OperatorConnection(Framed):
    """The connection of one operator."""

    def __init__(self, server: AgentServer) -> None:
        super().__init__(server.key)
        self._server = server
        self._tasks: dict[asyncio.Task[None], str] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.add(self)
        self.write(self.nonce)

    def authenticate(self) -> None:
        expected_bytes = NONCE_BYTES + PROOF_BYTES
        if len(self.received) < expected_bytes:
            return
        # An operator waits for the agent's proof before it sends a request.
        has_more = len(self.received) > expected_bytes
        nonce, proof = self.take(NONCE_BYTES), self.take(PROOF_BYTES)
        expected = self.proof(b"operator", nonce, self.nonce)
        if not hmac.compare_digest(proof, expected) or has_more:
            self.close("it did not authenticate")
            return
        self.is_authenticated = True
        self.write(self.proof(b"agent", nonce, self.nonce))

    def on_frame(self, number: int, content: bytes) -> None:
        method, arguments = decode_request(content)
        task = self._loop.create_task(self._respond(number, method, arguments))
        self._tasks[task] = method
        task.add_done_callback(self._tasks.pop)

    def on_closed(self) -> None:
        self._server.remove(self)
        # All other requests are carried out to their ends: the operator will ask for the outcome.
        for task, method in self._tasks.items():
            if method == "poll":
                task.cancel()

    async def _respond(self, number: int, method: str, arguments: tuple[object, ...]) -> None:
        answer = await self._server.carry_out(method, arguments)
        try:
            content = encode_answer(answer)
            if len(content) > MAX_FRAME_BYTES:
                raise ValueError(f"its answer takes {len(content)} bytes")
        except Exception as error:
            content = encode_answer(_failed(method, error))
        if not self.closed.is_set():
            self.send(number, content)


def ports_of(text: str) -> range:
    """The ports of `$CORTEX_AGENT_PORTS`: one, or the first and the last, as in 20000-20099.

    Returns:
        The ports; for an empty text the port 0, which lets the system choose.

    Raises:
        Refusal: the text has another form.
    """
    first, dash, last = text.strip().partition("-")
    if not text.strip():
        return range(1)
    try:
        ports = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        ports = range(0)
    if not ports or not 0 < ports[0] <= ports[-1] <= _MAX_PORT:
        raise Refusal(
            f"${PORTS_VARIABLE} of its raylet is {text!r}; set the first and the last port, as in "
            "20000-20099"
        )
    return ports


def _failed(method: str, error: Exception) -> Answer:
    return Answer(unreachable=f"{method} failed: {explain(error)}")
