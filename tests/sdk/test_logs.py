"""Logs as the clients read them: events, reconnects and errors."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_variants import Connect
from cortex.errors import CortexError, NotFound, OperatorUnreachable
from cortex.sdk.logs import RECONNECT_DELAYS_S, Event, Parser, follow, follow_async
from operator_stub import OperatorStub, answer, events

END = b'event: end\ndata: {"status": "status_succeeded"}\n\n'


def log(offset: int, text: str) -> bytes:
    return f"event: log\nid: {offset}\ndata: {json.dumps(text, ensure_ascii=False)}\n\n".encode()


def parse(chunks: Iterable[bytes]) -> Iterator[Event]:
    parser = Parser()
    for chunk in chunks:
        yield from parser.events(chunk)


def test_events_are_parsed_with_comments_and_both_line_ends() -> None:
    stream = (
        b": hello\nevent: log\r\nid: 7\r\ndata: a\r\ndata:b\r\n\r\n\n\ndata: c\n\ndata: cut off"
    )
    assert list(parse([stream])) == [
        Event(":", "", "hello"),
        Event("log", "7", "a\nb"),
        Event("message", "7", "c"),
    ]


# A busy machine can pause for longer than any deadline.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(), st.lists(st.integers(0, 200), max_size=8))
def test_events_are_the_same_wherever_the_network_cuts_the_stream(
    text: str, cuts: list[int]
) -> None:
    stream = log(1, text) + END
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(edges)]
    first, second = parse(chunks)
    assert json.loads(first.data) == text
    assert second.name == "end"


def test_a_log_breaks_no_line_at_unicode_separators() -> None:
    text = "one\u2028two\x85three\x0bfour\r\nfive"
    assert json.loads(next(parse([log(1, text)])).data) == text


class ScriptedConnections:
    """Connections that follow a script, one step each."""

    def __init__(self, *script: Iterable[bytes] | Exception) -> None:
        self.script = iter(script)
        self.last_ids: list[str | None] = []

    @contextmanager
    def __call__(self, last_id: str | None) -> Iterator[Iterable[bytes]]:
        self.last_ids.append(last_id)
        step = next(self.script)
        if isinstance(step, Exception):
            raise step
        yield step


def followed_async(connect: ScriptedConnections, *, pause: Callable[[float], object]) -> list[str]:
    """The pieces that `follow_async` yields for the script."""

    @asynccontextmanager
    async def opened(last_id: str | None) -> AsyncIterator[AsyncIterator[bytes]]:
        async def each() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        with connect(last_id) as chunks:
            yield each()

    async def paused(seconds: float) -> None:
        pause(seconds)

    async def collect() -> list[str]:
        return [text async for text in follow_async(opened, pause=paused)]

    return asyncio.run(collect())


sync_and_async = pytest.mark.parametrize("follow", [follow, followed_async], ids=["sync", "async"])
Follow = Callable[..., Iterable[str]]


def breaks_off(*chunks: bytes) -> Iterator[bytes]:
    yield from chunks
    raise OperatorUnreachable("the connection broke")


@sync_and_async
def test_a_log_continues_after_the_last_received_event(follow: Follow) -> None:
    connect = ScriptedConnections(
        breaks_off(log(3, "one"), log(9, "two")[:-1]),
        OperatorUnreachable("restarting"),
        [log(9, "two")],
        [b": keep-alive\n\n", log(14, "three"), END],
    )
    paused: list[float] = []
    assert "".join(follow(connect, pause=paused.append)) == "onetwothree"
    assert connect.last_ids == [None, "3", "3", "9"]
    assert paused == [RECONNECT_DELAYS_S[0], RECONNECT_DELAYS_S[1], RECONNECT_DELAYS_S[0]]


@sync_and_async
def test_an_operator_that_never_answered_is_not_retried(follow: Follow) -> None:
    with pytest.raises(OperatorUnreachable):
        list(follow(ScriptedConnections(OperatorUnreachable("none")), pause=pytest.fail))


@sync_and_async
def test_following_ends_when_the_operator_stays_unreachable(follow: Follow) -> None:
    away = [OperatorUnreachable("away")] * (len(RECONNECT_DELAYS_S) + 1)
    connect = ScriptedConnections([log(1, "x")], *away)
    with pytest.raises(OperatorUnreachable):
        list(follow(connect, pause=lambda _: None))
    assert len(connect.last_ids) == 1 + len(RECONNECT_DELAYS_S)


@sync_and_async
def test_a_permanent_error_ends_following(follow: Follow) -> None:
    connect = ScriptedConnections([log(1, "x")], NotFound("deleted"))
    with pytest.raises(NotFound):
        list(follow(connect, pause=lambda _: None))


def test_a_log_is_followed_over_http_across_connections(connect: Connect) -> None:
    path = "GET /-/apis/iris/jobs/j1/logs"
    with (
        OperatorStub({path: [events(log(4, "grün\n")), events(log(8, "done"), END)]}) as stub,
        connect(stub.url) as client,
    ):
        assert "".join(client.stream_job_logs("iris", "j1")) == "grün\ndone"
    assert [r.headers.get("last-event-id") for r in stub.requests] == [None, "4"]
    assert {r.headers["accept"] for r in stub.requests} == {"text/event-stream"}


def test_the_log_of_an_unknown_job_is_an_error(connect: Connect) -> None:
    not_found = answer({"kind": "not_found", "message": "there is no job j1"}, 404)
    with (
        OperatorStub({"GET /-/apis/iris/jobs/j1/logs": not_found}) as stub,
        connect(stub.url) as client,
        pytest.raises(NotFound, match="no job j1"),
    ):
        next(client.stream_job_logs("iris", "j1"))


def test_a_log_that_breaks_off_while_it_is_read_is_an_error(connect: Connect) -> None:
    part = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n4\r\npart\r\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_in_part() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(part)

        with (
            ThreadPoolExecutor(1) as pool,
            connect(f"http://127.0.0.1:{listener.getsockname()[1]}") as client,
        ):
            done = pool.submit(answer_in_part)
            log = client.read_job_logs("iris", "j1")
            assert next(log) == "part"
            with pytest.raises(OperatorUnreachable, match="broke"):
                next(log)
            done.result()


def test_an_answer_that_is_no_log_is_an_error(connect: Connect) -> None:
    with (
        OperatorStub({"GET /-/apis/iris/jobs/j1/logs": answer({})}) as stub,
        connect(stub.url) as client,
    ):
        for read in (client.read_job_logs, client.stream_job_logs):
            with pytest.raises(CortexError, match="not as a Cortex operator does"):
                "".join(read("iris", "j1"))
