"""Where an operator answers, and every failure of a request to it as a CortexError: all that does not wait,
for every transport. Standard library alone: a task's client uses it in the user's environment.
"""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cortex.errors import CortexError, OperatorUnreachable, from_response
from cortex.sdk.environments import checked_endpoint, checked_token
from cortex.sdk.proxies import Proxy, proxy_of

if TYPE_CHECKING:
    from pydantic import JsonValue

CONNECT_S = 5.0
_GATEWAY = frozenset({502, 503, 504})


@dataclass(frozen=True)
class Answer:
    """What a server answered: of which URL, and with which status line and type."""

    url: str
    status: int
    reason: str
    content_type: str

    @property
    def is_success(self) -> bool:
        """Whether what was asked for was done."""
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Endpoint:
    """An operator's URL, the name of its environment if it has one, the token that it wants, and the proxy
    on the way."""

    url: str
    name: str = ""
    token: str | None = field(default=None, repr=False)
    proxy: Proxy | None = None
    _was_there: Event = field(default_factory=Event, init=False, repr=False, compare=False)

    @classmethod
    def checked(cls, url: str, name: str, token: str | None) -> Endpoint:
        """One that can be asked.

        Raises:
            CortexError: the URL is none, the token cannot be sent, or the environment's proxy is none.
        """
        url = _known(checked_endpoint(url))
        return cls(url, name, None if token is None else checked_token(token), proxy_of(url))

    @property
    def headers(self) -> dict[str, str]:
        """Those of every request."""
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {"Accept": "application/json", **authorization}

    def json(self, answer: Answer, body: bytes) -> JsonValue:
        """What the operator answered.

        Raises:
            CortexError: its error, as it was raised there, or it is no operator.
        """
        if not answer.is_success:
            raise self.error(answer, body)
        try:
            found: JsonValue = json.loads(body)
        except ValueError:
            raise self._stranger(answer) from None
        return found

    def check_type(self, answer: Answer, media_type: str) -> None:
        """Refuse a stream that is none of this type.

        Raises:
            CortexError: it is not.
        """
        if not answer.content_type.startswith(media_type):
            raise self._stranger(answer)

    def error(self, answer: Answer, body: bytes) -> CortexError:
        """The error that an answer stands for."""
        try:
            found = json.loads(body)
            return from_response(answer.status, str(found["kind"]), str(found["message"]))
        except (ValueError, TypeError, KeyError):
            return self._stranger(answer)

    def answered(self) -> None:
        """A connection to it was made."""
        self._was_there.set()

    def unreachable(self, why: str) -> OperatorUnreachable:
        """The error that no connection was made."""
        error = OperatorUnreachable(
            f"no operator answers at {self._called()} ({why or 'no connection in time'}). {self._advice()}"
        )
        error.was_there = self._was_there.is_set()
        return error

    def unanswered(self, answer_s: float) -> OperatorUnreachable:
        """The error that the operator took a request, and did not answer in time."""
        return self._lost(
            f"the operator at {self._called()} took the request, but did not answer within {answer_s:g} "
            "seconds"
        )

    def broken(self, why: str) -> OperatorUnreachable:
        """The error that a connection broke after a request was sent."""
        return self._lost(
            f"the connection to the operator at {self._called()} broke ({why}); what was asked for may "
            "have been done"
        )

    def _lost(self, message: str) -> OperatorUnreachable:
        self.answered()
        error = OperatorUnreachable(message)
        error.is_unanswered = True
        return error

    def _stranger(self, answer: Answer) -> CortexError:
        way = f" (through the proxy {self.proxy.url})" if self.proxy else ""
        what = f"{answer.url}{way} answered {answer.status} {answer.reason}"
        if answer.status in _GATEWAY:
            return OperatorUnreachable(
                f"{what}: the operator behind it does not answer. {self._advice()}"
            )
        return CortexError(
            f"{what}, not as a Cortex operator does. {self._advice()}",
            kind="client.not_an_operator",
        )

    def _called(self) -> str:
        name = f" (environment {self.name!r})" if self.name else ""
        return f"{self.url}{name}{f' through the proxy {self.proxy.url}' if self.proxy else ''}"

    def _advice(self) -> str:
        proxied = "List its host in NO_PROXY if no proxy is meant for it. " if self.proxy else ""
        return (
            f"{proxied}Start one with `cortex serve`, or tell where it is with "
            f"`cortex env configure {self.name or 'NAME'} --operator-endpoint URL`"
        )


def _known(url: str) -> str:
    """The URL; with the address of this machine for `localhost`, where the resolver does not know that name, as
    in an image without /etc/hosts. `cortex serve` listens there then."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname != "localhost":
        return url
    try:
        socket.getaddrinfo("localhost", None)
    except socket.gaierror:
        port = "" if parts.port is None else f":{parts.port}"
        return parts._replace(netloc=f"127.0.0.1{port}").geturl()
    return url
