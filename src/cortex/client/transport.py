"""One operator over HTTP: a pool of connections, timeouts, and every failure as a CortexError.

Used by the client alone. Paths are relative to the operator's endpoint, which may itself have a path
(an operator behind a proxy).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

import httpx

from cortex.errors import CortexError, NotFound, OperatorUnreachable, from_response

if TYPE_CHECKING:
    from pydantic import JsonValue

Files = Mapping[str, tuple[str, IO[bytes] | bytes, str]]

CONNECT_S = 5.0
ANSWER_S = 30.0
STREAM_SILENCE_S = 60.0
_GATEWAY = frozenset({502, 503, 504})


def segment(text: str) -> str:
    """A name as one segment of a path. Dots would lead to another path than the one meant."""
    if text in ("", ".", ".."):
        raise NotFound(f"nothing is called {text!r}")
    return quote(text, safe="")


class Transport:
    """Requests to one operator."""

    def __init__(self, endpoint: str, name: str, token: str | None = None) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.name = name
        self._http = httpx.Client(
            base_url=self.endpoint,
            headers={
                "Accept": "application/json",
                **({"Authorization": f"Bearer {token}"} if token else {}),
            },
            # A proxy of the environment's is never meant for this machine.
            trust_env=not _is_this_machine(httpx.URL(self.endpoint).host),
            # Shorter than a server's own (uvicorn: 5 s), else a request can meet a closing connection.
            limits=httpx.Limits(keepalive_expiry=2.0),
        )
        self.close = self._http.close

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | float] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        data: Mapping[str, str] | None = None,
        files: Files | None = None,
        answer_s: float = ANSWER_S,
    ) -> JsonValue:
        """The JSON of the operator's answer; its errors are raised as they were raised there."""
        with self._reporting(answer_s):
            response = self._http.request(
                method,
                path,
                params=params,
                headers=headers,
                content=content,
                data=data,
                files=files,
                timeout=_timeout(answer_s),
            )
        if not response.is_success:
            raise self._error(response)
        try:
            answer: JsonValue = response.json()
        except ValueError:
            raise self._stranger(response) from None
        return answer

    @contextmanager
    def events(self, path: str, last_event_id: str | None) -> Iterator[Iterator[bytes]]:
        """The chunks of a stream of Server-Sent Events, after the event `last_event_id`."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        timeout = _timeout(STREAM_SILENCE_S)
        with (
            self._reporting(STREAM_SILENCE_S),
            self._http.stream("GET", path, headers=headers, timeout=timeout) as response,
        ):
            if not response.is_success:
                response.read()
                raise self._error(response)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise self._stranger(response)
            yield response.iter_bytes()

    def _error(self, response: httpx.Response) -> CortexError:
        try:
            body = response.json()
            return from_response(response.status_code, str(body["kind"]), str(body["message"]))
        except (ValueError, TypeError, KeyError):
            return self._stranger(response)

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

    @contextmanager
    def _reporting(self, answer_s: float) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise OperatorUnreachable(
                f"no operator answers at {self.endpoint}{self._called()} "
                f"({str(error) or 'no connection in time'}). {self._advice()}"
            ) from error
        except httpx.TimeoutException as error:
            raise _unanswered(
                f"the operator at {self.endpoint}{self._called()} took the request, but did not "
                f"answer within {answer_s:g} seconds"
            ) from error
        except httpx.TransportError as error:
            raise _unanswered(
                f"the connection to the operator at {self.endpoint}{self._called()} broke "
                f"({str(error) or type(error).__name__}); what was asked for may have been done"
            ) from error

    def _called(self) -> str:
        return f" (environment {self.name!r})" if self.name else ""

    def _advice(self) -> str:
        return (
            "Start one with `cortex serve`, or tell where it is with "
            f"`cortex env configure {self.name or 'NAME'} --operator-endpoint URL`"
        )


def _unanswered(message: str) -> OperatorUnreachable:
    error = OperatorUnreachable(message)
    error.is_unanswered = True
    return error


def _timeout(answer_s: float) -> httpx.Timeout:
    return httpx.Timeout(answer_s, connect=CONNECT_S)


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
