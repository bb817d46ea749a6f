"""Runs exchanges and opens streams over HTTP with httpx and asyncio. `transport` is its twin.

`aio` alone imports it: a program with a blocking client does not load asyncio. Every failure is
raised as a CortexError.
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
from cortex.sdk.exchange import RESPONSE_TIMEOUT_S, Pause, Request, RunningExchange, T

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.sdk.exchange import Exchange

# httpx's pool iterates over all requests whenever one begins or ends: with 2,000 concurrent
# requests that took a minute. Requests that wait for a job have a limit of their own: they must not
# delay the other requests, and they must leave the process some file descriptors.
_MAX_REQUESTS = 100
_MAX_WAITING_REQUESTS = 500


class AsyncTransport:
    """A pool of connections to one operator, which the tasks of one event loop may share."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pool = httpx.AsyncClient(**pool.settings(endpoint))
        self._request_limit = asyncio.Semaphore(_MAX_REQUESTS)
        self._waiting_request_limit = asyncio.Semaphore(_MAX_WAITING_REQUESTS)
        self.aclose = self._pool.aclose

    async def run(self, exchange: Exchange[T]) -> T:
        """Run an exchange.

        Returns:
            The exchange's result.

        Raises:
            CortexError: the exchange has failed.
        """
        running = RunningExchange(exchange)
        while running.step is not None:
            running.resume(await self._outcome_of(running.step))
        return running.result

    @asynccontextmanager
    async def stream(self, request: Request, media_type: str) -> AsyncIterator[httpx.Response]:
        """Send a request, and leave the body of its response to the caller.

        Raises:
            CortexError: the request failed, or the response has another content type.
        """
        with pool.translated_errors(self._endpoint, request.response_timeout_s):
            async with aclosing(
                await self._pool.send(pool.build(request, self._pool), stream=True)
            ) as response:
                if not response.is_success:
                    await response.aread()
                    raise self._endpoint.error_of(pool.head_of(response), response.content)
                self._endpoint.check_content_type(pool.head_of(response), media_type)
                yield response

    async def _outcome_of(self, step: Request | Pause) -> JsonValue | CortexError:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            return None
        waits = step.response_timeout_s > RESPONSE_TIMEOUT_S
        limit = self._waiting_request_limit if waits else self._request_limit
        try:
            async with limit:
                with pool.translated_errors(self._endpoint, step.response_timeout_s):
                    response = await self._pool.send(pool.build(step, self._pool))
            return self._endpoint.parse_json(pool.head_of(response), response.content)
        except CortexError as error:
            return error
