"""Exchanges with one operator over HTTP, and streams from it, the blocking way. `transport_async` is asyncio's.

Used by `sync` alone. All that is raised is a CortexError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from time import sleep
from typing import TYPE_CHECKING

import httpx

from cortex.errors import CortexError
from cortex.sdk import pool
from cortex.sdk.endpoint import Endpoint
from cortex.sdk.exchange import Course, Pause, Request, T

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.sdk.exchange import Exchange


class Transport:
    """A pool of connections to one operator, which threads may share."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pool = httpx.Client(**pool.settings(endpoint))
        self.close = self._pool.close

    def run(self, exchange: Exchange[T]) -> T:
        """Carry out an exchange; its result."""
        course = Course(exchange)
        while course.asked is not None:
            course.go_on(self._done(course.asked))
        return course.result

    @contextmanager
    def stream(self, request: Request, media_type: str) -> Iterator[httpx.Response]:
        """An answer of this type whose body is still to be read."""
        with (
            pool.reporting(self._endpoint, request.answer_s),
            closing(self._pool.send(pool.built(request, self._pool), stream=True)) as response,
        ):
            if not response.is_success:
                response.read()
                raise self._endpoint.error(pool.answer(response), response.content)
            self._endpoint.check_type(pool.answer(response), media_type)
            yield response

    def _done(self, asked: Request | Pause) -> JsonValue | CortexError:
        if isinstance(asked, Pause):
            sleep(asked.seconds)
            return None
        try:
            with pool.reporting(self._endpoint, asked.answer_s):
                response = self._pool.send(pool.built(asked, self._pool))
            return self._endpoint.json(pool.answer(response), response.content)
        except CortexError as error:
            return error
