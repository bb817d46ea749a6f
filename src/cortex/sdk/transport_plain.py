"""Runs exchanges and opens streams over HTTP with the standard library alone.

A client in a task uses it: a task runs in the user's environment, which may lack httpx. Each
request has a connection of its own. Every failure is raised as a CortexError.
"""

from __future__ import annotations

import base64
import codecs
import http.client
import io
import socket
import ssl
import uuid
from contextlib import closing, contextmanager
from time import sleep
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from cortex.errors import CortexError
from cortex.sdk.certificates import environment_context
from cortex.sdk.endpoint import CONNECT_TIMEOUT_S, Endpoint, ResponseHead
from cortex.sdk.exchange import Pause, Request, RunningExchange, T

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pydantic import JsonValue

    from cortex.sdk.exchange import Exchange

_CHUNK_BYTES = 64 << 10


class PlainTransport:
    """Requests to one operator, which threads may share."""

    def __init__(self, endpoint: Endpoint) -> None:
        if endpoint.proxy is not None and endpoint.proxy.scheme != "http":
            raise CortexError(
                f"the proxy {endpoint.proxy.url} cannot be used in a task; use an http:// proxy, "
                "or list the operator's host in NO_PROXY",
                kind="client.proxy",
            )
        self._endpoint = endpoint
        self._url = urlsplit(endpoint.url)
        self._context = (
            (environment_context() or ssl.create_default_context())
            if self._url.scheme == "https"
            else None
        )

    def close(self) -> None:
        """Do nothing: no connection stays open between requests."""

    def run(self, exchange: Exchange[T]) -> T:
        """Run an exchange.

        Returns:
            The exchange's result.

        Raises:
            CortexError: the exchange has failed.
        """
        running = RunningExchange(exchange)
        while running.step is not None:
            running.resume(self._outcome_of(running.step))
        return running.result

    @contextmanager
    def stream(self, request: Request, media_type: str) -> Iterator[PlainStream]:
        """Send a request, and leave the body of its response to the caller.

        Raises:
            CortexError: the request failed, or the response has another content type.
        """
        timeout_s = request.response_timeout_s
        with closing(self._connect()) as connection, self._translated_errors(timeout_s):
            head, response = self._send(connection, request)
            with closing(response):
                if not head.is_success:
                    raise self._endpoint.error_of(head, response.read())
                self._endpoint.check_content_type(head, media_type)
                yield PlainStream(response)

    def _outcome_of(self, step: Request | Pause) -> JsonValue | CortexError:
        if isinstance(step, Pause):
            sleep(step.seconds)
            return None
        try:
            with closing(self._connect()) as connection:
                with self._translated_errors(step.response_timeout_s):
                    head, response = self._send(connection, step)
                    # Closing the connection does not close a response that ends with it.
                    with closing(response):
                        body = response.read()
                return self._endpoint.parse_json(head, body)
        except CortexError as error:
            return error

    def _connect(self) -> http.client.HTTPConnection:
        """Connect to the operator, or to its proxy.

        Raises:
            CortexError: the connection was not established.
        """
        proxy, host, port = self._endpoint.proxy, self._url.hostname or "", self._url.port
        address = (host, port) if proxy is None else (proxy.host, proxy.port)
        tunnel_responses: list[http.client.HTTPResponse] = []
        connection: http.client.HTTPConnection
        if self._context is None:
            connection = http.client.HTTPConnection(*address, timeout=CONNECT_TIMEOUT_S)
        else:
            connection = http.client.HTTPSConnection(
                *address, timeout=CONNECT_TIMEOUT_S, context=self._context
            )
            if proxy is not None:
                connection.set_tunnel(host, port, headers=self._proxy_headers())
                recorded = _recorded_responses(tunnel_responses)
                connection.response_class = recorded  # type: ignore[assignment]  # a factory
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            # Before Python 3.12, http.client does not close the response of a proxy that refuses
            # a tunnel, and the response keeps the socket open.
            for response in tunnel_responses:
                response.close()
            raise self._endpoint.not_connected(str(error)) from error
        return connection

    def _send(
        self, connection: http.client.HTTPConnection, request: Request
    ) -> tuple[ResponseHead, http.client.HTTPResponse]:
        path = f"{self._url.path}{request.path}"
        if request.params:
            path += f"?{urlencode(request.params)}"
        url = f"{self._url.scheme}://{self._url.netloc}{path}"
        headers = {**self._endpoint.headers, **(request.headers or {})}
        target = path
        if self._endpoint.proxy is not None and self._context is None:
            target = url
            headers.update(self._proxy_headers())
        body, body_headers = _encode_body(request)
        headers.update(body_headers)
        connection.sock.settimeout(request.response_timeout_s)
        connection.request(request.method, target, body=body, headers=headers)
        response = connection.getresponse()
        media_type = response.headers.get("content-type", "")
        return ResponseHead(url, response.status, response.reason, media_type), response

    def _proxy_headers(self) -> dict[str, str]:
        proxy = self._endpoint.proxy
        if proxy is None or proxy.username is None:
            return {}
        credentials = f"{proxy.username}:{proxy.password or ''}"
        return {"Proxy-Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"}

    @contextmanager
    def _translated_errors(self, timeout_s: float) -> Iterator[None]:
        """Raise the errors of a connection as a CortexError."""
        try:
            yield
        except socket.timeout as error:  # noqa: UP041  # not a TimeoutError before Python 3.10
            raise self._endpoint.timed_out(timeout_s) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._endpoint.disconnected(str(error) or type(error).__name__) from error
        else:
            self._endpoint.mark_reached()


class PlainStream:
    """The body of a response, read as it arrives."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def iter_bytes(self) -> Iterator[bytes]:
        """The body's bytes, in chunks."""
        while True:
            chunk = self._response.read1(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    def iter_text(self) -> Iterator[str]:
        """The body's text, decoded as UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for chunk in self.iter_bytes():
            yield decoder.decode(chunk)
        yield decoder.decode(b"", True)


def _recorded_responses(
    responses: list[http.client.HTTPResponse],
) -> Callable[..., http.client.HTTPResponse]:
    """A factory of responses that appends each of them to the list."""

    def new_response(*arguments: Any, **named: Any) -> http.client.HTTPResponse:
        responses.append(http.client.HTTPResponse(*arguments, **named))
        return responses[-1]

    return new_response


def _encode_body(request: Request) -> tuple[bytes | Iterable[bytes] | None, dict[str, str]]:
    """The body of a request, and the headers that describe it."""
    if request.files is None:
        return request.content, {}
    boundary = uuid.uuid4().hex
    pieces: list[bytes | IO[bytes]] = [
        _part_head(boundary, f'name="{name}"') + b"\r\n" + value.encode() + b"\r\n"
        for name, value in (request.data or {}).items()
    ]
    for name, (filename, content, media_type) in request.files.items():
        # The HTML standard's encoding of a file name in multipart/form-data.
        quoted = filename.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        head = _part_head(boundary, f'name="{name}"; filename="{quoted}"')
        pieces += [head + f"Content-Type: {media_type}\r\n\r\n".encode(), content, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    headers = {
        "Content-Type": f"multipart/form-data; boundary={boundary}",
        "Content-Length": str(sum(map(_length, pieces))),
    }
    return _chunks(pieces), headers


def _part_head(boundary: str, disposition: str) -> bytes:
    lines = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n"
    return lines.encode("utf-8", "surrogateescape")


def _length(piece: bytes | IO[bytes]) -> int:
    if isinstance(piece, bytes):
        return len(piece)
    begin, end = piece.tell(), piece.seek(0, io.SEEK_END)
    piece.seek(begin)
    return end - begin


def _chunks(pieces: list[bytes | IO[bytes]]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
        else:
            yield from iter(lambda file=piece: file.read(_CHUNK_BYTES), b"")  # type: ignore[misc]
