"""Exchanges with one operator over HTTP, and streams from it, by the standard library alone: for clients in
tasks, which run in the user's environment, where httpx need not be. All that is raised is a CortexError.

Each request has a connection of its own.
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
from cortex.sdk.certificates import trusted
from cortex.sdk.endpoint import CONNECT_S, Answer, Endpoint
from cortex.sdk.exchange import Course, Pause, Request, T

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
                f"the proxy {endpoint.proxy.url} cannot be used in a task: http:// proxies can. List the "
                "operator's host in NO_PROXY, or name another proxy",
                kind="client.proxy",
            )
        self._endpoint = endpoint
        self._url = urlsplit(endpoint.url)
        self._context = (
            (trusted() or ssl.create_default_context()) if self._url.scheme == "https" else None
        )

    def close(self) -> None:
        """Nothing is kept open."""

    def run(self, exchange: Exchange[T]) -> T:
        """Carry out an exchange; its result."""
        course = Course(exchange)
        while course.asked is not None:
            course.go_on(self._done(course.asked))
        return course.result

    @contextmanager
    def stream(self, request: Request, media_type: str) -> Iterator[PlainStream]:
        """An answer of this type whose body is still to be read."""
        with closing(self._connection()) as connection, self._reporting(request.answer_s):
            answer, response = self._sent(connection, request)
            with closing(response):
                if not answer.is_success:
                    raise self._endpoint.error(answer, response.read())
                self._endpoint.check_type(answer, media_type)
                yield PlainStream(response)

    def _done(self, asked: Request | Pause) -> JsonValue | CortexError:
        if isinstance(asked, Pause):
            sleep(asked.seconds)
            return None
        try:
            with closing(self._connection()) as connection:
                with self._reporting(asked.answer_s):
                    answer, response = self._sent(connection, asked)
                    with closing(response):  # a connection that ends with its answer does not do so
                        body = response.read()
                return self._endpoint.json(answer, body)
        except CortexError as error:
            return error

    def _connection(self) -> http.client.HTTPConnection:
        """A connection to the operator, or to the proxy on the way there.

        Raises:
            CortexError: nothing answers there.
        """
        proxy, host, port = self._endpoint.proxy, self._url.hostname or "", self._url.port
        to = (host, port) if proxy is None else (proxy.host, proxy.port)
        connection: http.client.HTTPConnection
        if self._context is None:
            connection = http.client.HTTPConnection(*to, timeout=CONNECT_S)
        else:
            connection = http.client.HTTPSConnection(*to, timeout=CONNECT_S, context=self._context)
            if proxy is not None:
                connection.set_tunnel(host, port, headers=self._proxy_headers())
        refusals: list[http.client.HTTPResponse] = []
        if proxy is not None:
            connection.response_class = _collected(refusals)  # type: ignore[assignment]  # it makes one
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            for (
                refusal
            ) in refusals:  # before 3.12 the answer of a proxy that refuses a tunnel stays open
                refusal.close()
            raise self._endpoint.unreachable(str(error)) from error
        return connection

    def _sent(
        self, connection: http.client.HTTPConnection, request: Request
    ) -> tuple[Answer, http.client.HTTPResponse]:
        path = f"{self._url.path}{request.path}"
        if request.params:
            path += f"?{urlencode(request.params)}"
        url = f"{self._url.scheme}://{self._url.netloc}{path}"
        headers = {**self._endpoint.headers, **(request.headers or {})}
        target = path
        if self._endpoint.proxy is not None and self._context is None:
            target = url
            headers.update(self._proxy_headers())
        body, more = _body(request)
        connection.sock.settimeout(request.answer_s)
        connection.request(request.method, target, body=body, headers={**headers, **more})
        response = connection.getresponse()
        media_type = response.headers.get("content-type", "")
        return Answer(url, response.status, response.reason, media_type), response

    def _proxy_headers(self) -> dict[str, str]:
        proxy = self._endpoint.proxy
        if proxy is None or proxy.username is None:
            return {}
        user = base64.b64encode(f"{proxy.username}:{proxy.password or ''}".encode()).decode()
        return {"Proxy-Authorization": f"Basic {user}"}

    @contextmanager
    def _reporting(self, answer_s: float) -> Iterator[None]:
        try:
            yield
        except socket.timeout as error:  # noqa: UP041  # which was no TimeoutError before Python 3.10
            raise self._endpoint.unanswered(answer_s) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._endpoint.broken(str(error) or type(error).__name__) from error
        else:
            self._endpoint.answered()


class PlainStream:
    """The body of an answer, as it arrives."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def iter_bytes(self) -> Iterator[bytes]:
        """Its bytes."""
        while True:
            chunk = self._response.read1(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    def iter_text(self) -> Iterator[str]:
        """Its text, in UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for chunk in self.iter_bytes():
            yield decoder.decode(chunk)
        yield decoder.decode(b"", True)


def _collected(
    made: list[http.client.HTTPResponse],
) -> Callable[..., http.client.HTTPResponse]:
    """What makes answers, and keeps them in this list."""

    def response(*arguments: Any, **named: Any) -> http.client.HTTPResponse:
        made.append(http.client.HTTPResponse(*arguments, **named))
        return made[-1]

    return response


def _body(request: Request) -> tuple[bytes | Iterable[bytes] | None, dict[str, str]]:
    """A request's body, and the headers that describe it."""
    if request.files is None:
        return request.content, {}
    boundary = uuid.uuid4().hex
    pieces: list[bytes | IO[bytes]] = [
        _head(boundary, f'name="{name}"') + b"\r\n" + value.encode() + b"\r\n"
        for name, value in (request.data or {}).items()
    ]
    for name, (filename, content, media_type) in request.files.items():
        # As browsers write the name of a file.
        shown = filename.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        head = _head(boundary, f'name="{name}"; filename="{shown}"')
        pieces += [head + f"Content-Type: {media_type}\r\n\r\n".encode(), content, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    headers = {
        "Content-Type": f"multipart/form-data; boundary={boundary}",
        "Content-Length": str(sum(map(_length, pieces))),
    }
    return _flow(pieces), headers


def _head(boundary: str, disposition: str) -> bytes:
    lines = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n"
    return lines.encode("utf-8", "surrogateescape")


def _length(piece: bytes | IO[bytes]) -> int:
    if isinstance(piece, bytes):
        return len(piece)
    begin, end = piece.tell(), piece.seek(0, io.SEEK_END)
    piece.seek(begin)
    return end - begin


def _flow(pieces: list[bytes | IO[bytes]]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
        else:
            yield from iter(lambda file=piece: file.read(_CHUNK_BYTES), b"")  # type: ignore[misc]
