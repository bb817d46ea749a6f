"""What only the operator that drives can tell, asked of it by the others: why a job waits, whether it can
be asked after, its log as it grows, the cluster. A request goes there as it came, with its caller's token.
Made by the app for a store that can be shared; called by the routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlencode

import httpx
import structlog
from starlette.requests import Request
from starlette.responses import Response

from cortex.errors import NoLeader, StorageUnavailable
from cortex.operator.http.answers import Receive, Scope, Send
from cortex.operator.http.views import ASKED_AT
from cortex.store import Store

log = structlog.get_logger()

_MARK = "cortex-relayed"
_PASSED_ON = ("accept", "authorization", "last-event-id", "range")
_PASSED_BACK = ("accept-ranges", "cache-control", "content-range", "content-length", "content-type")
_PATIENCE_S = 3.0  # until an answer begins
_SILENCE_S = 60.0  # whoever drives says sooner that a followed log is still there
_AGAIN_S = 1.0
_TRIES = 2  # the second where another one drives since
_ANSWERS = {
    httpx.codes.OK,
    httpx.codes.PARTIAL_CONTENT,
    httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE,
}
_NOT_ASKED = {"wait"}  # this operator has waited itself
_MOST = httpx.Limits(max_connections=None, max_keepalive_connections=20)


@dataclass
class _Driver:
    """Who drives, and whether that is over."""

    address: str | None
    is_over: asyncio.Event


class LeaderProxy:
    """One per operator, all on the event loop."""

    def __init__(self, store: Store, drives: Callable[[], bool]) -> None:
        """
        Args:
            drives: whether this operator drives, so that nobody else need be asked.
        """
        self._store = store
        self._drives = drives
        self._driver: _Driver | None = None
        self._is_old = False
        self._looking: asyncio.Task[None] | None = None
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(_PATIENCE_S, read=_SILENCE_S), limits=_MOST, trust_env=False
        )

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._http.aclose()

    def driver_changed(self) -> None:
        """Another one may drive: who waits for the answer of that before waits in vain."""
        if self._driver is None:
            return
        self._is_old = True
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_again())
            self._looking.add_done_callback(self._looked)

    async def ask(self, request: Request, or_error: int | None = None) -> Response | None:
        """The driver's answer, if it has one; None where this operator drives, or nobody can be asked.

        Args:
            or_error: a status that is an answer, too.

        Raises:
            NoDriver: another operator took this one for the driver.
        """
        if self._drives():
            return None
        if _MARK in request.headers:
            raise NoLeader("this operator does not drive the jobs any more. Try again.")
        asked: str | None = None
        for _ in range(_TRIES):
            driver = await self._who()
            if driver is None or driver.address in (None, asked):
                return None
            asked = driver.address
            answer = await self._ask(driver, request, or_error)
            if answer is not None:
                return answer
            await self._look()
        return None

    async def demand(self, request: Request) -> Response | None:
        """The driver's answer; None where this operator drives.

        Raises:
            NoDriver: nobody can be asked now.
        """
        answer = await self.ask(request)
        if answer is None and not self._drives():
            raise NoLeader(
                "no operator drives the jobs at this moment, and only that one could answer. Try again."
            )
        return answer

    async def _ask(
        self, driver: _Driver, request: Request, or_error: int | None
    ) -> Response | None:
        sending = asyncio.ensure_future(
            self._http.send(self._as_it_came(driver, request), stream=True)
        )
        over = asyncio.ensure_future(driver.is_over.wait())
        try:
            await asyncio.wait(
                {sending, over}, timeout=_PATIENCE_S, return_when=asyncio.FIRST_COMPLETED
            )
            if not sending.done():
                return None
            answer = sending.result()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            log.warning(
                "the operator that drives cannot be asked", at=driver.address, error=str(error)
            )
            return None
        finally:
            over.cancel()
            sending.cancel()
        if answer.status_code in _ANSWERS or answer.status_code == or_error:
            return ForwardedAnswer(answer, driver.is_over)
        await answer.aclose()
        return None

    def _as_it_came(self, driver: _Driver, request: Request) -> httpx.Request:
        query = [(n, v) for n, v in request.query_params.multi_items() if n not in _NOT_ASKED]
        path = request.scope.get("raw_path") or request.url.path.encode()
        url = f"{driver.address}{path.decode('latin-1').partition('?')[0]}"
        headers = {n: request.headers[n] for n in _PASSED_ON if n in request.headers}
        # As `Host` it has a name of its own, which it may be strict about.
        headers |= {_MARK: "1", ASKED_AT: request.headers.get("host", "")}
        return self._http.build_request(
            "GET", f"{url}?{urlencode(query)}" if query else url, headers=headers
        )

    async def _who(self) -> _Driver | None:
        if self._driver is None:
            await self._look()
        return self._driver

    async def _look_again(self) -> None:
        while self._is_old:
            self._is_old = False  # it changes once more, it may be, while that is read
            if not await self._look():
                self._is_old = True
                await asyncio.sleep(_AGAIN_S)

    async def _look(self) -> bool:
        """Find out who drives; False where that cannot be told now."""
        try:
            address = await self._store.operators.driver()
        except StorageUnavailable:
            return False
        if self._driver is not None and self._driver.address == address:
            return True
        if self._driver is not None:
            self._driver.is_over.set()
        self._driver = _Driver(address, asyncio.Event())
        return True

    def _looked(self, _: asyncio.Task[None]) -> None:
        self._looking = None


class ForwardedAnswer(Response):
    """Another operator's answer, as it comes. One that breaks off breaks off here, too."""

    def __init__(self, answer: httpx.Response, is_over: asyncio.Event) -> None:
        """
        Args:
            is_over: whether nothing is to be had from there any more.
        """
        kept = {n: answer.headers[n] for n in _PASSED_BACK if n in answer.headers}
        super().__init__(None, answer.status_code, kept)
        self._answer = answer
        self._is_over = is_over

    def init_headers(self, headers: object = None) -> None:
        """Just those: this one has no body of its own to tell the length of."""
        given = headers if isinstance(headers, dict) else {}
        self.raw_headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in given.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.create_task(work)
            for work in (self._pass_on(send), _left(receive), _over(self._is_over))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(httpx.HTTPError):
                await self._answer.aclose()

    async def _pass_on(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        try:
            async for piece in self._answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.HTTPError as error:  # what was sent must not look complete
            log.warning("the operator that drives broke off", error=str(error))
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _over(event: asyncio.Event) -> None:
    await event.wait()
