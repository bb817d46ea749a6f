"""The URL of an operator, and the CortexError for each failure of a request to it. It does no I/O.

Every transport uses it. Standard library alone: a task's client uses it in the user's environment.
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

CONNECT_TIMEOUT_S = 5.0
_GATEWAY_STATUSES = frozenset({502, 503, 504})


@dataclass(frozen=True)
class ResponseHead:
    """A response without its body: the URL of the request, the status line and the content type."""

    url: str
    status: int
    reason: str
    content_type: str

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300


@dataclass(frozen=True)
class Endpoint:
    """An operator's URL, its environment's name, the token to send, and the proxy to use."""

    url: str
    name: str = ""
    token: str | None = field(default=None, repr=False)
    proxy: Proxy | None = None
    _was_reached: Event = field(default_factory=Event, init=False, repr=False, compare=False)

    @classmethod
    def checked(cls, url: str, name: str, token: str | None) -> Endpoint:
        """An endpoint whose URL and token are valid, with the proxy that the environment names.

        Raises:
            CortexError: the URL, the token or the environment's proxy is invalid.
        """
        url = _with_resolvable_host(checked_endpoint(url))
        return cls(url, name, None if token is None else checked_token(token), proxy_of(url))

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every request has."""
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return {"Accept": "application/json", **authorization}

    def parse_json(self, head: ResponseHead, body: bytes) -> JsonValue:
        """The JSON of a response.

        Raises:
            CortexError: the operator's error, or the server is not an operator.
        """
        if not head.is_success:
            raise self.error_of(head, body)
        try:
            content: JsonValue = json.loads(body)
        except ValueError:
            raise self._not_an_operator(head) from None
        return content

    def check_content_type(self, head: ResponseHead, media_type: str) -> None:
        """Refuse a response of another content type.

        Raises:
            CortexError: the content type differs, as a server that is not an operator sends it.
        """
        if not head.content_type.startswith(media_type):
            raise self._not_an_operator(head)

    def error_of(self, head: ResponseHead, body: bytes) -> CortexError:
        """The error that an unsuccessful response describes."""
        try:
            content = json.loads(body)
            return from_response(head.status, str(content["kind"]), str(content["message"]))
        except (ValueError, TypeError, KeyError):
            return self._not_an_operator(head)

    def mark_reached(self) -> None:
        """Record that a connection was established."""
        self._was_reached.set()

    def not_connected(self, why: str) -> OperatorUnreachable:
        """The error for a connection that was not established."""
        error = OperatorUnreachable(
            f"no operator answers at {self._description()} ({why or 'connection timed out'}). "
            f"{self._advice()}"
        )
        error.was_ever_reached = self._was_reached.is_set()
        return error

    def timed_out(self, timeout_s: float) -> OperatorUnreachable:
        """The error for a request that was sent and has no response in time."""
        return self._response_lost(
            f"the operator at {self._description()} received the request, but did not answer "
            f"within {timeout_s:g} seconds"
        )

    def disconnected(self, why: str) -> OperatorUnreachable:
        """The error for a connection that broke after the request was sent."""
        return self._response_lost(
            f"the connection to the operator at {self._description()} broke ({why}); the operator "
            "may have carried out the request"
        )

    def _response_lost(self, message: str) -> OperatorUnreachable:
        self.mark_reached()
        error = OperatorUnreachable(message)
        error.is_unanswered = True
        return error

    def _not_an_operator(self, head: ResponseHead) -> CortexError:
        proxy = f" (through the proxy {self.proxy.url})" if self.proxy else ""
        answer = f"{head.url}{proxy} answered {head.status} {head.reason}"
        if head.status in _GATEWAY_STATUSES:
            return OperatorUnreachable(
                f"{answer}: the operator behind it does not answer. {self._advice()}"
            )
        return CortexError(
            f"{answer}, not as a Cortex operator does. {self._advice()}",
            kind="client.not_an_operator",
        )

    def _description(self) -> str:
        name = f" (environment {self.name!r})" if self.name else ""
        proxy = f" through the proxy {self.proxy.url}" if self.proxy else ""
        return f"{self.url}{name}{proxy}"

    def _advice(self) -> str:
        proxy = "List the operator's host in NO_PROXY if it needs no proxy. " if self.proxy else ""
        return (
            f"{proxy}Start one with `cortex serve`, or configure its URL with "
            f"`cortex env configure {self.name or 'NAME'} --operator-endpoint URL`"
        )


class EndpointHolder:
    """The endpoint of a client: the base of `Client` and `AsyncClient`."""

    def __init__(self, operator_endpoint: str, *, name: str = "", token: str | None = None) -> None:
        """Make a client of an operator; `cortex.client()` makes one from a configured environment.

        Args:
            operator_endpoint: the operator's URL.
            name: the environment's name, for messages.
            token: sent with each request.

        Raises:
            CortexError: the URL, the token, or the environment's proxy or certificates are invalid.
        """
        self._endpoint = Endpoint.checked(operator_endpoint, name, token)

    @property
    def name(self) -> str:
        """The environment's name; empty for a client that was made without one."""
        return self._endpoint.name

    @property
    def operator_endpoint(self) -> str:
        """The operator's URL."""
        return self._endpoint.url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.operator_endpoint!r}, name={self.name!r})"


def _with_resolvable_host(url: str) -> str:
    """The URL, with 127.0.0.1 for `localhost` where the resolver does not know that name.

    That is the case in an image without /etc/hosts, where `cortex serve` listens on 127.0.0.1.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname != "localhost":
        return url
    try:
        socket.getaddrinfo("localhost", None)
    except socket.gaierror:
        port = "" if parts.port is None else f":{parts.port}"
        return parts._replace(netloc=f"127.0.0.1{port}").geturl()
    return url
