"""Forwards to the leader what only the leader can answer: why a job waits, whether its engine can
be reached, its log while it grows, and the cluster. A request is forwarded as it came, with its
caller's token.
"""

from __future__ import annotations

import asyncio
import importlib
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cortex.errors import NoLeader, StorageUnavailable
from cortex.store import Store
from cortex.system.background import in_thread

if TYPE_CHECKING:
    import httpx

log = structlog.get_logger()

ORIGINAL_HOST = "cortex-asked-at"
"""The header with the `Host` of a forwarded request."""

_FORWARDED = "cortex-relayed"
_REQUEST_HEADERS = ("accept", "authorization", "last-event-id", "range")
_RESPONSE_HEADERS = (
    "accept-ranges",
    "cache-control",
    "content-range",
    "content-length",
    "content-type",
)
_RESPONSE_TIMEOUT_S = 3.0  # until a response begins
_SILENCE_TIMEOUT_S = 60.0  # the leader sends a followed log's keep-alive more often
_RETRY_DELAY_S = 1.0
_MAX_TRIES = 2  # the second where the leader has changed
_ANSWERS = {
    HTTPStatus.OK,
    HTTPStatus.PARTIAL_CONTENT,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
}
_OWN_PARAMETERS = {"wait"}  # this operator has waited already
_MAX_IDLE_CONNECTIONS = 20


@dataclass
class _Leader:
    """A leader's address (None for this operator, or none), and whether its term has ended."""

    address: str | None
    has_ended: asyncio.Event


class LeaderProxy:
    """One for each operator. All methods are called on the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._leader: _Leader | None = None
        self._is_outdated = False
        self._refreshing: asyncio.Task[None] | None = None
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        if self._http is not None:
            await self._http.aclose()

    def leader_changed(self) -> None:
        """Another operator may be the leader. Give up requests that wait for the earlier one."""
        if self._leader is None:
            return
        self._is_outdated = True
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh_until_current())
            self._refreshing.add_done_callback(self._refreshed)

    async def forward(self, request: Request, or_status: int | None = None) -> Response | None:
        """The leader's response. None where it has none, or this operator reaches no other operator
        as the leader.

        The caller has checked that this operator is not the leader.

        Args:
            or_status: an error status whose response is wanted as well.

        Raises:
            NoLeader: another operator has forwarded the request to this one.
        """
        if _FORWARDED in request.headers:
            raise NoLeader("this operator is not the leader any longer; retry")
        previous_address: str | None = None
        for _ in range(_MAX_TRIES):
            leader = await self._find()
            if leader is None or leader.address in (None, previous_address):
                return None
            previous_address = leader.address
            response = await self._send(leader, request, or_status)
            if response is not None:
                return response
            await self._refresh()
        return None

    async def _send(
        self, leader: _Leader, request: Request, or_status: int | None
    ) -> Response | None:
        try:
            client = await self._client()
        except OSError as error:  # no thread is left
            log.warning("cannot reach the leader", at=leader.address, error=str(error))
            return None
        import httpx

        sending = asyncio.ensure_future(
            client.send(_forwarded(client, leader, request), stream=True)
        )
        ended = asyncio.ensure_future(leader.has_ended.wait())
        try:
            await asyncio.wait(
                {sending, ended}, timeout=_RESPONSE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not sending.done():
                return None
            response = sending.result()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            log.warning("cannot reach the leader", at=leader.address, error=str(error))
            return None
        finally:
            ended.cancel()
            sending.cancel()
        if response.status_code in _ANSWERS or response.status_code == or_status:
            return ForwardedAnswer(response, leader.has_ended)
        await response.aclose()
        return None

    async def _client(self) -> httpx.AsyncClient:
        """Made for the first request: an operator that is alone on its store needs none, and httpx
        takes long to import."""
        if self._http is None:
            await in_thread(importlib.import_module, "httpx")
            import httpx

        if self._http is None:  # another request may have made it during the import
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(_RESPONSE_TIMEOUT_S, read=_SILENCE_TIMEOUT_S),
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=_MAX_IDLE_CONNECTIONS
                ),
                trust_env=False,
            )
        return self._http

    async def _find(self) -> _Leader | None:
        if self._leader is None:
            await self._refresh()
        return self._leader

    async def _refresh_until_current(self) -> None:
        while self._is_outdated:
            self._is_outdated = False  # set again if the leader changes during the read
            if not await self._refresh():
                self._is_outdated = True
                await asyncio.sleep(_RETRY_DELAY_S)

    async def _refresh(self) -> bool:
        """Read which operator is the leader; False where the store cannot be read now."""
        try:
            address = await self._store.operators.leader()
        except StorageUnavailable:
            return False
        if self._leader is not None and self._leader.address == address:
            return True
        if self._leader is not None:
            self._leader.has_ended.set()
        self._leader = _Leader(address, asyncio.Event())
        return True

    def _refreshed(self, _: asyncio.Task[None]) -> None:
        self._refreshing = None


class ForwardedAnswer(Response):
    """The leader's response, passed on as it arrives. It breaks off where the leader's does."""

    def __init__(self, response: httpx.Response, has_ended: asyncio.Event) -> None:
        """
        Args:
            has_ended: set when the leader's term ends: nothing more is to be expected from it.
        """
        headers = {n: response.headers[n] for n in _RESPONSE_HEADERS if n in response.headers}
        super().__init__(None, response.status_code, headers)
        self._response = response
        self._has_ended = has_ended

    def init_headers(self, headers: object = None) -> None:
        """These headers alone: this object has no body whose length it could give."""
        given = headers if isinstance(headers, dict) else {}
        self.raw_headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in given.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.create_task(work)
            for work in (self._pass_on(send), _disconnected(receive), _set(self._has_ended))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close()

    async def _close(self) -> None:
        import httpx

        with suppress(httpx.HTTPError):
            await self._response.aclose()

    async def _pass_on(self, send: Send) -> None:
        import httpx

        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        try:
            async for piece in self._response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.HTTPError as error:  # what was sent must not look complete
            log.warning("the leader's response broke off", error=str(error))
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _forwarded(client: httpx.AsyncClient, leader: _Leader, request: Request) -> httpx.Request:
    query = [(n, v) for n, v in request.query_params.multi_items() if n not in _OWN_PARAMETERS]
    path = request.scope.get("raw_path") or request.url.path.encode()
    url = f"{leader.address}{path.decode('latin-1').partition('?')[0]}"
    headers = {n: request.headers[n] for n in _REQUEST_HEADERS if n in request.headers}
    # The client's `Host` travels in a header of its own: the leader may check `Host`.
    headers |= {_FORWARDED: "1", ORIGINAL_HOST: request.headers.get("host", "")}
    return client.build_request(
        "GET", f"{url}?{urlencode(query)}" if query else url, headers=headers
    )


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _set(event: asyncio.Event) -> None:
    await event.wait()
