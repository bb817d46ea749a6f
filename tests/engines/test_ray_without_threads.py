"""The Ray engine on a machine that has no room for another thread: a shortage that may pass."""

from __future__ import annotations

import asyncio
import errno
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from cortex.engines.ray.calls import AgentCalls
from cortex.engines.ray.link import Link, LinkError
from cortex.engines.ray.messages import DEFAULT_BUILDS


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python raises a RuntimeError where the system refuses to start a thread."""

    async def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio, "to_thread", refuse)


def test_a_driver_that_cannot_be_started_is_a_failure_of_the_link_and_is_retried() -> None:
    async def main() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(LinkError, match="can't start new thread"):
                await Link(f"127.0.0.1:{port}", "namespace", None).open(10)

    asyncio.run(main())


def test_a_host_that_cannot_be_looked_up_is_a_failure_of_the_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop looks up a host's name in a thread."""

    async def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", refuse)
    with pytest.raises(LinkError, match="cannot look up its host: can't start new thread"):
        asyncio.run(Link("head:1", "namespace", None).open(10))


def test_lock_files_that_cannot_be_read_are_a_shortage() -> None:
    locks: Any = SimpleNamespace(locks=lambda _: {}, known_locks=lambda _: None)
    tracked: Any = SimpleNamespace(
        attempt=SimpleNamespace(version=SimpleNamespace(api=SimpleNamespace(project_id="p")))
    )
    cluster: Any = None
    calls = AgentCalls(cluster, 10, locks, DEFAULT_BUILDS)
    with pytest.raises(OSError) as caught:
        asyncio.run(calls.lock_files(tracked))
    assert caught.value.errno == errno.EAGAIN
