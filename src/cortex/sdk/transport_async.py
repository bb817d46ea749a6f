"""Exchanges with one operator over HTTP, and streams from it, as asyncio does it.

Used by `asynchronous` alone, so that nobody else loads asyncio. All that is raised is a CortexError.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import httpx

from cortex.errors import CortexError
from cortex.sdk import pool
from cortex.sdk.endpoint import Endpoint
from cortex.sdk.exchange import ANSWER_S, Course, Pause, Request, T

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.sdk.exchange import Exchange

# httpx's pool looks at every request for each that begins or ends: 2,000 at once took it a minute. Those that
# wait for jobs do not hold up the others, and leave a process some of its descriptors.
_MOST_AT_ONCE = 100
_MOST_THAT_WAIT = 500


class AsyncTransport:
    """A pool of connections to one operator, which the tasks of one event loop may share."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pool = httpx.AsyncClient(**pool.settings(endpoint))
        self._turns = asyncio.Semaphore(_MOST_AT_ONCE)
        self._turns_to_wait = asyncio.Semaphore(_MOST_THAT_WAIT)
        self.aclose = self._pool.aclose

    async def run(self, exchange: Exchange[T]) -> T:
        """Carry out an exchange; its result."""
        course = Course(exchange)
        while course.asked is not None:
            course.go_on(await self._done(course.asked))
        return course.result

    @asynccontextmanager
    async def stream(self, request: Request, media_type: str) -> AsyncIterator[httpx.Response]:
        """An answer of this type whose body is still to be read."""
        with pool.reporting(self._endpoint, request.answer_s):
            async with aclosing(
                await self._pool.send(pool.built(request, self._pool), stream=True)
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise self._endpoint.error(pool.answer(response), response.content)
                self._endpoint.check_type(pool.answer(response), media_type)
                yield response

    async def _done(self, asked: Request | Pause) -> JsonValue | CortexError:
        if isinstance(asked, Pause):
            await asyncio.sleep(asked.seconds)
            return None
        turns = self._turns_to_wait if asked.answer_s > ANSWER_S else self._turns
        try:
            async with turns:
                with pool.reporting(self._endpoint, asked.answer_s):
                    response = await self._pool.send(pool.built(asked, self._pool))
            return self._endpoint.json(pool.answer(response), response.content)
        except CortexError as error:
            return error
