"""Gives every client the methods of `Client`, for tests that run with each client."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from threading import Thread
from typing import Any, Self

import pytest

from cortex.sdk import Client
from cortex.sdk.aio import AsyncClient

Connect = Callable[..., Client]


def client_in_a_task(*arguments: Any, **named: Any) -> Client:
    """The client that a task gets: it uses the standard library alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORTEX_JOB_ID", "01jobjobjobjobjob1")
        return Client(*arguments, **named)


class AwaitedClient:
    """An `AsyncClient` with blocking methods. A thread runs its event loop."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._begin(AsyncClient(*arguments, **named))

    @classmethod
    def of_environment(cls, env: str | None = None) -> Self:
        made = cls.__new__(cls)
        made._begin(AsyncClient.of_environment(env))
        return made

    def _begin(self, client: AsyncClient) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._wait(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not inspect.ismethod(found):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            made = found(*arguments, **named)
            is_stream = inspect.isasyncgen(made)
            return self._each(made) if is_stream else self._wait(made)

        return call

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _each(self, texts: AsyncGenerator[str, None]) -> Iterator[str]:
        async def following() -> str | None:
            return await anext(texts, None)

        try:
            while (text := self._wait(following())) is not None:
                yield text
        finally:
            self._wait(texts.aclose())
