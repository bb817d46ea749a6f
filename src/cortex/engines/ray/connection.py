"""The operator's end of the TCP connection to the agent of a node. `cluster` opens it with what the
agent's Hello says, and closes it; `frames` says how both ends authenticate.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import socket
from itertools import count

from cortex.engines.ray.encoding import decode_answer, encode_request
from cortex.engines.ray.frames import (
    MAX_FRAME_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    Framed,
)
from cortex.engines.ray.link import Answer, LinkError, NotSent, Refused


class AgentConnection(Framed):
    """The connection to one process of an agent, from its opening to its end.

    It is closed when the agent has been silent for `frames.SILENCE_TIMEOUT_S`.
    """

    def __init__(self, key: bytes, name: str) -> None:
        super().__init__(key)
        self._name = name
        self._nonce_of_agent = b""
        self._authenticated: asyncio.Future[None] = self._loop.create_future()
        self._numbers = count(1)
        self._pending: dict[int, asyncio.Future[Answer]] = {}

    @classmethod
    async def open(
        cls, name: str, host: str, port: int, key: bytes, timeout_s: float
    ) -> AgentConnection:
        """Connect to an agent, and authenticate both ends.

        Args:
            name: of the node, for messages.

        Raises:
            LinkError: the agent cannot be reached there; the message says why.
        """
        loop, made = asyncio.get_running_loop(), None
        try:
            async with asyncio.timeout(timeout_s):
                _, made = await loop.create_connection(lambda: cls(key, name), host, port)
                await made._authenticated
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"no answer within {timeout_s:g} s"
        except RuntimeError as error:  # no thread can be started now, to look up the host's name
            reason = str(error)
        except BaseException:
            if made is not None:
                made.close("it is not needed any more")
            raise
        else:
            return made
        if made is not None:
            made.close(reason)
        raise LinkError(
            f"the operator at {_own_address(host)} cannot reach the agent of {name} at "
            f"{_address(host, port)}: {reason}"
        )

    async def call(self, method: str, *arguments: object, timeout_s: float) -> object:
        """Call a method of the agent.

        Raises:
            LinkError: the outcome is unknown, unless it is a NotSent.
            Refused: the request was not carried out.
        """
        if self.closed.is_set() or self.problem is not None:
            raise NotSent(self._broken())
        request = encode_request(method, arguments)
        if len(request) > MAX_FRAME_BYTES:
            raise Refused(
                f"the request to {self._name} takes {len(request)} bytes; at most "
                f"{MAX_FRAME_BYTES} are sent"
            )
        number = next(self._numbers)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._pending[number] = future
        try:
            self.send(number, request)
            async with asyncio.timeout(timeout_s):
                answer = await future
        except TimeoutError:
            raise LinkError(
                f"the agent of {self._name} did not answer within {timeout_s:g} s"
            ) from None
        finally:
            self._pending.pop(number, None)
        if answer.unreachable is not None:
            raise LinkError(answer.unreachable)
        if answer.refused is not None:
            raise Refused(answer.refused)
        return answer.value

    def authenticate(self) -> None:
        if not self._nonce_of_agent:
            if len(self.received) < NONCE_BYTES:
                return
            self._nonce_of_agent = self.take(NONCE_BYTES)
            self.write(self.nonce + self.proof(b"operator", self.nonce, self._nonce_of_agent))
        if len(self.received) < PROOF_BYTES:
            return
        expected = self.proof(b"agent", self.nonce, self._nonce_of_agent)
        if not hmac.compare_digest(self.take(PROOF_BYTES), expected):
            self.close("another program answers there, which does not have the agent's key")
            return
        self.is_authenticated = True
        if not self._authenticated.done():
            self._authenticated.set_result(None)

    def on_frame(self, number: int, content: bytes) -> None:
        future = self._pending.get(number)
        if future is not None and not future.done():
            future.set_result(decode_answer(content))

    def on_closed(self) -> None:
        if not self._authenticated.done():
            self._authenticated.set_exception(ConnectionError(self.problem))
            self._authenticated.exception()  # retrieved, even if `open` was cancelled
        for future in self._pending.values():
            if not future.done():
                future.set_result(Answer(unreachable=self._broken()))

    def _broken(self) -> str:
        return f"the connection to the agent of {self._name} broke: {self.problem}"


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_address(host: str) -> str:
    """The address of this machine from which it would reach another one, or its name."""
    with contextlib.suppress(ValueError, OSError):
        version = ipaddress.ip_address(host).version  # to look up a name would block
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))  # sends nothing: it only chooses a route
            return str(sock.getsockname()[0])
    return socket.gethostname()
