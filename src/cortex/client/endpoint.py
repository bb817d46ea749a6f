"""Where an operator answers, how requests to it are made, and every failure as a CortexError: all that does
not wait, for the transport of either client."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from threading import Event
from typing import TYPE_CHECKING, TypedDict
from urllib.request import getproxies

import httpx

from cortex.client.environments import checked_endpoint, checked_token
from cortex.client.exchange import Request
from cortex.errors import CortexError, OperatorUnreachable, from_response

if TYPE_CHECKING:
    from pydantic import JsonValue

_CONNECT_S = 5.0
_GATEWAY = frozenset({502, 503, 504})


class Settings(TypedDict):
    """Those of a pool of connections, which `httpx.Client` and `httpx.AsyncClient` take."""

    base_url: str
    headers: dict[str, str]
    trust_env: bool
    verify: ssl.SSLContext | bool
    limits: httpx.Limits


@dataclass(frozen=True)
class Endpoint:
    """An operator's URL, the name of its environment if it has one, and the token that it wants."""

    url: str
    name: str = ""
    token: str | None = field(default=None, repr=False)
    _was_there: Event = field(default_factory=Event, init=False, repr=False, compare=False)

    @classmethod
    def checked(cls, url: str, name: str, token: str | None) -> Endpoint:
        """One that can be asked.

        Raises:
            InvalidRequest: the URL is none, or the token cannot be sent.
        """
        return cls(checked_endpoint(url), name, None if token is None else checked_token(token))

    def settings(self) -> Settings:
        """How connections to it are made."""
        authorization = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        # A proxy of the environment's is never meant for this machine.
        is_proxied = not _is_this_machine(httpx.URL(self.url).host)
        return {
            "base_url": self.url,
            "headers": {"Accept": "application/json", **authorization},
            "trust_env": is_proxied,
            "verify": _verifier([self.url, *(getproxies().values() if is_proxied else ())]),
            # Kept shorter than a server's own (uvicorn: 5 s), else a request can meet a closing connection.
            # As many as are asked for: who waits for one here may wait behind those that wait for jobs.
            "limits": httpx.Limits(
                max_connections=None, max_keepalive_connections=20, keepalive_expiry=2.0
            ),
        }

    def json(self, response: httpx.Response) -> JsonValue:
        """What the operator answered.

        Raises:
            CortexError: its error, as it was raised there, or it is no operator.
        """
        if not response.is_success:
            raise self.error(response)
        try:
            answer: JsonValue = response.json()
        except ValueError:
            raise self._stranger(response) from None
        return answer

    def check_type(self, response: httpx.Response, media_type: str) -> None:
        """Refuse a stream that is none of this type.

        Raises:
            CortexError: it is not.
        """
        if not response.headers.get("content-type", "").startswith(media_type):
            raise self._stranger(response)

    def error(self, response: httpx.Response) -> CortexError:
        """The error that an answer stands for; its body has been read."""
        try:
            body = response.json()
            return from_response(response.status_code, str(body["kind"]), str(body["message"]))
        except (ValueError, TypeError, KeyError):
            return self._stranger(response)

    @contextmanager
    def reporting(self, answer_s: float) -> Iterator[None]:
        """Raise what a connection says as an error of this tree."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            unreachable = OperatorUnreachable(
                f"no operator answers at {self.url}{self._called()} "
                f"({str(error) or 'no connection in time'}). {self._advice()}"
            )
            unreachable.was_there = self._was_there.is_set()
            raise unreachable from error
        except httpx.TimeoutException as error:
            self._was_there.set()
            raise _unanswered(
                f"the operator at {self.url}{self._called()} took the request, but did not "
                f"answer within {answer_s:g} seconds"
            ) from error
        except httpx.TransportError as error:
            self._was_there.set()
            raise _unanswered(
                f"the connection to the operator at {self.url}{self._called()} broke "
                f"({str(error) or type(error).__name__}); what was asked for may have been done"
            ) from error
        else:
            self._was_there.set()

    def _stranger(self, response: httpx.Response) -> CortexError:
        what = f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
        if response.status_code in _GATEWAY:
            return OperatorUnreachable(
                f"{what}: the operator behind it does not answer. {self._advice()}"
            )
        return CortexError(
            f"{what}, not as a Cortex operator does. {self._advice()}",
            kind="client.not_an_operator",
        )

    def _called(self) -> str:
        return f" (environment {self.name!r})" if self.name else ""

    def _advice(self) -> str:
        return (
            "Start one with `cortex serve`, or tell where it is with "
            f"`cortex env configure {self.name or 'NAME'} --operator-endpoint URL`"
        )


def built(request: Request, pool: httpx.Client | httpx.AsyncClient) -> httpx.Request:
    """A request as it is sent over a pool of connections."""
    return pool.build_request(
        request.method,
        request.path,
        params=request.params,
        headers=request.headers,
        content=request.content,
        data=request.data,
        files=request.files,
        timeout=httpx.Timeout(request.answer_s, connect=_CONNECT_S),
    )


def _unanswered(message: str) -> OperatorUnreachable:
    error = OperatorUnreachable(message)
    error.is_unanswered = True
    return error


def _verifier(urls: Iterable[str]) -> ssl.SSLContext | bool:
    """Who tells whether certificates are to be trusted. Where nothing is encrypted that is nobody: to load all
    authorities takes longer than many a request."""
    if any(url.lower().startswith("https:") for url in urls):
        return True
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
