"""Runs exchanges and opens streams over HTTP with httpx, blocking. `transport_async` is its twin.

`sync` uses it. Every failure is raised as a CortexError.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from time import sleep
from typing import TYPE_CHECKING

import httpx

from cortex.errors import CortexError
from cortex.sdk import pool
from cortex.sdk.endpoint import Endpoint
from cortex.sdk.exchange import Pause, Request, RunningExchange, T

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.sdk.exchange import Exchange


class Transport:
    """A pool of connections to one operator, which threads may share."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._pool = httpx.Client(**pool.settings(endpoint))
        _make_lock_reentrant(self._pool)
        self.close = self._pool.close

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
    def stream(self, request: Request, media_type: str) -> Iterator[httpx.Response]:
        """Send a request, and leave the body of its response to the caller.

        Raises:
            CortexError: the request failed, or the response has another content type.
        """
        with (
            pool.translated_errors(self._endpoint, request.response_timeout_s),
            closing(self._pool.send(pool.build(request, self._pool), stream=True)) as response,
        ):
            if not response.is_success:
                response.read()
                raise self._endpoint.error_of(pool.head_of(response), response.content)
            self._endpoint.check_content_type(pool.head_of(response), media_type)
            yield response

    def _outcome_of(self, step: Request | Pause) -> JsonValue | CortexError:
        if isinstance(step, Pause):
            sleep(step.seconds)
            return None
        try:
            with pool.translated_errors(self._endpoint, step.response_timeout_s):
                response = self._pool.send(pool.build(step, self._pool))
            return self._endpoint.parse_json(pool.head_of(response), response.content)
        except CortexError as error:
            return error


def _make_lock_reentrant(client: httpx.Client) -> None:
    """Let a thread take the lock of its pool of connections again.

    Ctrl-C raises KeyboardInterrupt anywhere, also between the acquisition of that lock and the
    block that releases it (httpcore 1.0, `ThreadLock`). With httpcore's own lock, the clean-up that
    follows would wait for it forever. A version without such a lock is left as it is.
    """
    for transport in (client._transport, *client._mounts.values()):
        lock = getattr(getattr(transport, "_pool", None), "_optional_thread_lock", None)
        if lock is not None:
            lock._lock = threading.RLock()
