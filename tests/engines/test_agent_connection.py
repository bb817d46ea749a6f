"""The TCP connection between the operator and the agent of a node: real sockets, without Ray."""

from __future__ import annotations

import asyncio
import pickle
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop

from cortex.engines.base import Ended, Ending, Lost, NeverStarted, Started, Waits
from cortex.engines.ray import frames
from cortex.engines.ray.connection import AgentConnection
from cortex.engines.ray.encoding import decode_answer, encode_answer
from cortex.engines.ray.frames import HEAD, KEY_BYTES, NONCE_BYTES, PROOF_BYTES, Framed
from cortex.engines.ray.link import Answer, LinkError, Refused
from cortex.engines.ray.messages import Lock, LogPiece, NodeState, Poll, Refusal
from cortex.ray_node import server
from cortex.ray_node.server import AgentServer, ports_of

HOST = "127.0.0.1"
LIMIT_S = 60.0
LOADED: list[str] = []


class Agent:
    """An agent with a few methods."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.cancelled: list[str] = []
        self.go_on = asyncio.Event()

    async def echo(self, value: object) -> object:
        self.called.append("echo")
        await asyncio.sleep(0)
        return value

    async def poll(self) -> None:
        await self._wait("poll")

    async def start(self) -> None:
        await self._wait("start")

    async def refuse(self) -> None:
        raise Refusal("it has another folder")

    async def fail(self) -> None:
        raise OSError(28, "No space left on device")

    async def report_node(self) -> NodeState:
        return NodeState("a", "a", True, None, None)  # type: ignore[arg-type]  # only its class counts

    async def report_much(self) -> bytes:
        return bytes(frames.MAX_FRAME_BYTES)

    async def _wait(self, method: str) -> None:
        self.called.append(method)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.append(method)
            raise
        self.called.append(f"{method} ended")


class Loaded:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return LOADED.append, ("loaded",)


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Agent, AgentServer]]:
    agent = Agent()
    made = AgentServer(agent)
    await made.open(HOST)
    try:
        yield agent, made
    finally:
        agent.go_on.set()
        await made.close()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Agent, AgentServer, AgentConnection]]:
    async with serving() as (agent, made):
        connection = await connect(made.port, made.key)
        try:
            yield agent, made, connection
        finally:
            connection.close("the test has ended")
            await connection.closed.wait()


async def connect(port: int, key: bytes) -> AgentConnection:
    return await AgentConnection.open("n1", HOST, port, key, LIMIT_S)


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


Scenario = Callable[[], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario on an event loop: operators have uvloop's, agents that of Ray."""
    LOADED.clear()

    def run(scenario: Scenario) -> None:
        async def main() -> None:
            async with asyncio.timeout(2 * LIMIT_S):
                await scenario()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())

    return run


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats, and the limits of silence, in a small part of their time."""
    monkeypatch.setattr(frames, "HEARTBEAT_INTERVAL_S", 0.02)
    monkeypatch.setattr(frames, "SILENCE_TIMEOUT_S", 0.4)
    monkeypatch.setattr(frames, "AUTHENTICATION_TIMEOUT_S", 0.2)


def test_many_calls_at_once_get_their_own_answers(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (_, _, connection):
            values: list[object] = [*range(2000), bytes(3 << 20), None, "text"]
            calls = (connection.call("echo", value, timeout_s=LIMIT_S) for value in values)
            assert await asyncio.gather(*calls) == values

    run(scenario)


def test_the_frames_of_one_turn_of_the_loop_leave_together(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    flush = Framed._flush

    def count(self: Framed) -> None:
        sent.append(len(self._outgoing) // 2)
        flush(self)

    monkeypatch.setattr(Framed, "_flush", count)

    async def scenario() -> None:
        async with connected() as (_, _, connection):
            calls = (connection.call("echo", n, timeout_s=LIMIT_S) for n in range(50))
            await asyncio.gather(*calls)
            assert sent[0] == 50
            assert sum(sent) >= 100

    run(scenario)


def test_refusals_and_failures_of_the_agent_are_distinguished(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (_, _, connection):
            with pytest.raises(Refused, match="it has another folder"):
                await connection.call("refuse", timeout_s=LIMIT_S)
            with pytest.raises(LinkError, match=r"fail failed: .*No space left"):
                await connection.call("fail", timeout_s=LIMIT_S)
            for method in ("absent", "_wait", "__init__"):
                with pytest.raises(Refused, match="no method"):
                    await connection.call(method, timeout_s=LIMIT_S)
            assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1

    run(scenario)


def test_an_answer_that_cannot_be_sent_is_a_failure_of_its_call_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_FRAME_BYTES", 1 << 16)
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1 << 16)

    async def scenario() -> None:
        async with connected() as (_, _, connection):
            with pytest.raises(LinkError, match="its answer takes"):
                await connection.call("report_much", timeout_s=LIMIT_S)
            with pytest.raises(LinkError, match="NodeState"):
                await connection.call("report_node", timeout_s=LIMIT_S)
            assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1

    run(scenario)


def test_a_request_that_is_too_large_is_not_sent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex.engines.ray.connection.MAX_FRAME_BYTES", 1 << 16)

    async def scenario() -> None:
        async with connected() as (agent, _, connection):
            with pytest.raises(Refused, match=r"the request to n1 takes \d+ bytes"):
                await connection.call("echo", bytes(1 << 16), timeout_s=LIMIT_S)
            assert agent.called == []

    run(scenario)


def test_a_call_without_an_answer_times_out(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (_, _, connection):
            with pytest.raises(LinkError, match=r"the agent of n1 did not answer within 0.05 s"):
                await connection.call("start", timeout_s=0.05)
            assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1

    run(scenario)


@pytest.mark.parametrize("wrong", [bytes(KEY_BYTES), b""], ids=["other key", "no key"])
def test_an_operator_without_the_key_calls_nothing(run: Run, wrong: bytes) -> None:
    async def scenario() -> None:
        async with serving() as (agent, made):
            with pytest.raises(LinkError, match=f"cannot reach the agent of n1 at {HOST}:"):
                await connect(made.port, wrong)
            assert agent.called == []
            assert made._connections == {}

    run(scenario)


def test_a_program_without_the_key_is_not_taken_for_the_agent(run: Run) -> None:
    async def scenario() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(secrets.token_bytes(NONCE_BYTES))
            proof = (await reader.readexactly(NONCE_BYTES + PROOF_BYTES))[NONCE_BYTES:]
            writer.write(proof)  # a reflection
            with suppress(ConnectionError):
                assert await reader.read() == b"", "a request was sent to a stranger"
            writer.close()

        async with await asyncio.start_server(answer, HOST, 0) as stranger:
            port = stranger.sockets[0].getsockname()[1]
            with pytest.raises(LinkError, match="does not have the agent's key"):
                await connect(port, secrets.token_bytes(KEY_BYTES))

    run(scenario)


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n" * 10,
    b"\x16\x03\x01" + bytes(400),
    HEAD.pack(1 << 31, 1) + bytes(1000),
    pickle.dumps(Loaded()) * 20,
    bytes(1 << 20),
]


@pytest.mark.parametrize("data", GARBAGE, ids=["http", "tls", "frame", "pickle", "zeros"])
def test_garbage_is_cut_off_and_never_decoded(run: Run, data: bytes) -> None:
    async def scenario() -> None:
        async with connected() as (agent, made, connection):
            reader, writer = await asyncio.open_connection(HOST, made.port)
            writer.write(data)
            with suppress(ConnectionError):
                assert len(await reader.read()) <= NONCE_BYTES
            writer.close()
            assert LOADED == agent.called == []
            assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1

    run(scenario)


def test_a_request_that_precedes_the_agents_proof_is_refused(run: Run) -> None:
    async def scenario() -> None:
        async with serving() as (agent, made):
            reader, writer = await asyncio.open_connection(HOST, made.port)
            nonce_of_agent, own = await reader.readexactly(NONCE_BYTES), bytes(NONCE_BYTES)
            proof = Operator(made.key).proof(b"operator", own, nonce_of_agent)
            request = pickle.dumps(("echo", (Loaded(),)))
            writer.write(own + proof + HEAD.pack(len(request), 1) + request)
            with suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            assert LOADED == agent.called == []

    run(scenario)


class Operator(Framed):
    """Only for its proofs."""


@pytest.mark.usefixtures("fast")
def test_a_silent_stranger_is_cut_off(run: Run) -> None:
    async def scenario() -> None:
        async with serving() as (_, made):
            reader, writer = await asyncio.open_connection(HOST, made.port)
            with suppress(ConnectionError):
                await reader.read()
            writer.close()
            await until(lambda: not made._connections)

    run(scenario)


def test_strangers_do_not_keep_the_operator_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNAUTHENTICATED", 4)

    async def scenario() -> None:
        async with serving() as (_, made):
            strangers = [await asyncio.open_connection(HOST, made.port) for _ in range(20)]
            await until(lambda: len(made._connections) == 4)
            connection = await connect(made.port, made.key)
            more = [await asyncio.open_connection(HOST, made.port) for _ in range(20)]
            assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1
            for _, writer in (*strangers, *more):
                writer.close()
            connection.close("the test has ended")
            await connection.closed.wait()

    run(scenario)


def test_a_port_where_nothing_listens_is_named_with_its_address(run: Run) -> None:
    async def scenario() -> None:
        with socket.create_server((HOST, 0)) as closed:
            port = closed.getsockname()[1]
        with pytest.raises(LinkError) as caught:
            await connect(port, b"")
        assert str(caught.value).startswith(
            f"the operator at {HOST} cannot reach the agent of n1 at {HOST}:{port}: "
        )

    run(scenario)


def test_a_port_that_accepts_and_says_nothing_is_given_up(run: Run) -> None:
    async def scenario() -> None:
        with socket.create_server((HOST, 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(LinkError, match=r"no answer within 0.1 s"):
                await AgentConnection.open("n1", HOST, port, b"", 0.1)

    run(scenario)


def test_a_connection_whose_opening_is_cancelled_is_closed(run: Run) -> None:
    async def scenario() -> None:
        closed = asyncio.Event()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            opened.set()
            with suppress(ConnectionError):
                await reader.read()
            writer.close()
            closed.set()

        opened = asyncio.Event()
        async with await asyncio.start_server(accept, HOST, 0) as silent:
            opening = asyncio.create_task(connect(silent.sockets[0].getsockname()[1], b""))
            await opened.wait()
            await asyncio.sleep(0.05)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            await closed.wait()

    run(scenario)


def test_a_host_that_no_thread_can_look_up_is_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", refuse)

    async def scenario() -> None:
        with pytest.raises(LinkError, match="can't start new thread"):
            await AgentConnection.open("n1", "node.invalid", 1, b"", LIMIT_S)

    asyncio.run(scenario())


def test_a_broken_connection_fails_all_calls_and_those_that_follow(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (agent, made, connection):
            calls = [
                asyncio.create_task(connection.call("start", timeout_s=LIMIT_S)) for _ in range(9)
            ]
            await until(lambda: agent.called.count("start") == 9)
            for each in list(made._connections):
                each.close("the agent was killed")
            for call in calls:
                with pytest.raises(LinkError, match="connection to the agent of n1 broke"):
                    await call
            with pytest.raises(LinkError, match="connection to the agent of n1 broke"):
                await connection.call("echo", 1, timeout_s=LIMIT_S)

    run(scenario)


def test_the_reason_of_a_reset_connection_has_no_number(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (_, made, connection):
            for each in list(made._connections):
                sock = each._transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.close("the node was lost")
            with pytest.raises(LinkError, match="n1 broke: connection reset by peer"):
                await connection.call("echo", 1, timeout_s=LIMIT_S)

    run(scenario)


def test_after_the_operators_end_polls_end_and_other_requests_continue(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (agent, _, connection):
            calls = [
                asyncio.create_task(connection.call(method, timeout_s=LIMIT_S))
                for method in ("poll", "start")
            ]
            await until(lambda: sorted(agent.called) == ["poll", "start"])
            connection.close("the operator was killed")
            await asyncio.gather(*calls, return_exceptions=True)
            await until(lambda: agent.cancelled == ["poll"])
            agent.go_on.set()
            await until(lambda: "start ended" in agent.called)

    run(scenario)


class SilentAgent(server.OperatorConnection):
    """An agent that hangs once it has authenticated: its connection stays open."""

    def on_frame(self, number: int, content: bytes) -> None:
        pass

    def _tick(self) -> None:
        pass


@pytest.mark.usefixtures("fast")
def test_an_agent_that_falls_silent_fails_all_calls(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "OperatorConnection", SilentAgent)

    async def scenario() -> None:
        async with connected() as (_, _, connection):
            call = asyncio.create_task(connection.call("echo", 1, timeout_s=LIMIT_S))
            await until(lambda: connection.silent_s > 0.1)
            with pytest.raises(LinkError, match=r"the other end was silent for 0.4 s"):
                await call

    run(scenario)


@pytest.mark.usefixtures("fast")
def test_an_operator_that_falls_silent_is_cut_off(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with connected() as (agent, made, connection):
            call = asyncio.create_task(connection.call("poll", timeout_s=LIMIT_S))
            await until(lambda: agent.called)
            monkeypatch.setattr(connection, "_tick", lambda: None)
            assert connection._timer is not None
            connection._timer.cancel()
            with pytest.raises(LinkError):
                await call
            await until(lambda: agent.cancelled == ["poll"] and not made._connections)

    run(scenario)


@pytest.mark.usefixtures("fast")
def test_heartbeats_keep_an_idle_connection(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (_, made, connection):
            await asyncio.sleep(3 * frames.SILENCE_TIMEOUT_S)
            assert connection.silent_s < frames.SILENCE_TIMEOUT_S
            assert len(made._connections) == 1
            assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1

    run(scenario)


@pytest.mark.usefixtures("fast")
def test_a_pause_of_the_own_process_is_not_the_silence_of_the_other(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (_, _, connection):
            for _ in range(3):
                time.sleep(2 * frames.SILENCE_TIMEOUT_S)  # noqa: ASYNC251  # stops the whole loop
                connection._tick()  # before anything is read, as other loops than asyncio's do
                assert connection.problem is None
                assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1

    run(scenario)


ANSWERS: list[object] = [
    None,
    "project",
    True,
    LogPiece(0, b"bytes", 5, None),
    Poll(
        "session",
        9,
        (
            Started("job", 1, 2),
            Waits("job", 1, "it waits"),
            Lost("job", 1, "gone", is_final=True),
            NeverStarted("job", 1),
            Lock("project", "x.lock", "a==1\n"),
        ),
        {"job": LogPiece(3, b"x", 4, b"{}")},
        {"other": LogPiece(0, b"", 0, None)},
    ),
    (0, 1),
    {"a": (1, 2)},
]


@pytest.mark.parametrize("value", ANSWERS, ids=[type(each).__name__ for each in ANSWERS])
def test_an_answer_arrives_as_it_was_sent(value: object) -> None:
    assert decode_answer(encode_answer(Answer(value))) == Answer(value)


def test_a_result_that_looks_like_an_encoded_message_stays_a_result() -> None:
    result: object = [{"": "Poll"}, [0, "Started", "job", 1, 2], {"a": [3, None]}]
    end = Ended("job", 1, Ending.EXITED, 1, 2, 0, None, result, True, ((1, "a"),), ("hint",))  # type: ignore[arg-type]  # JSON
    decoded = decode_answer(encode_answer(Answer(Poll("session", 1, (end,)))))
    assert isinstance(decoded.value, Poll)
    assert decoded.value.seen == (end,)


FORGED = {
    "function": pickle.dumps(Loaded()),
    "message": pickle.dumps(Answer("forged")),
    # It would set an attribute of the class, which a list of allowed classes permits.
    "class": b"\x80\x05ccortex.engines.base\nLost\nN}\x8c\x03newK\x01s\x86b.",
    "garbage": b"\x00\x01",
    "nothing": b"",
    "not encoded": pickle.dumps("text"),
    "no answer": pickle.dumps((3, "text")),
    "unknown": pickle.dumps((0, "Hello", 1)),
    "too few fields": pickle.dumps((0, "Answer", (3, 1))),
    "kind": pickle.dumps((9, 1)),
}


@pytest.mark.parametrize("content", FORGED.values(), ids=list(FORGED))
def test_a_forged_answer_breaks_its_connection_and_does_nothing_else(
    run: Run, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forger(server.OperatorConnection):
        def on_frame(self, number: int, _: bytes) -> None:
            self.send(number, content)

    monkeypatch.setattr(server, "OperatorConnection", Forger)

    async def scenario() -> None:
        async with connected() as (_, _, connection):
            with pytest.raises(LinkError, match="the other end sent an invalid message"):
                await connection.call("echo", 1, timeout_s=LIMIT_S)
        assert LOADED == []
        assert not hasattr(Lost, "new")

    run(scenario)


@pytest.mark.parametrize("sender", ["operator", "agent"])
def test_a_frame_that_is_too_long_is_not_received(
    run: Run, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with connected() as (agent, made, connection):
            call = asyncio.create_task(connection.call("start", timeout_s=LIMIT_S))
            await until(lambda: agent.called)
            (of_agent,) = made._connections
            end: Framed = connection if sender == "operator" else of_agent
            end.write(HEAD.pack(frames.MAX_FRAME_BYTES + 1, 7))
            with pytest.raises(LinkError):
                await call
            await until(lambda: not made._connections)
            other: Framed = of_agent if sender == "operator" else connection
            assert "a frame of 268435457 bytes" in str(other.problem)

    run(scenario)


def test_a_request_that_cannot_be_read_breaks_its_connection_alone(run: Run) -> None:
    async def scenario() -> None:
        async with connected() as (_, made, connection):
            other = await connect(made.port, made.key)
            other.send(1, b"no pickle")
            await other.closed.wait()
            assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1

    run(scenario)


def test_each_process_of_an_agent_has_its_own_key(run: Run) -> None:
    async def scenario() -> None:
        async with serving() as (_, first), serving() as (_, second):
            assert first.key != second.key
            assert len(first.key) == KEY_BYTES

    run(scenario)


def test_the_ports_of_the_node_are_used_in_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        with socket.create_server((HOST, 0)) as taken:
            first = taken.getsockname()[1]
            monkeypatch.setenv("CORTEX_AGENT_PORTS", f"{first}-{min(first + 200, 65535)}")
            made = AgentServer(Agent())
            await made.open(HOST)
            await made.open(HOST)  # a second call changes nothing
            assert first < made.port <= first + 200
            await made.close()
            monkeypatch.setenv("CORTEX_AGENT_PORTS", str(first))
            with pytest.raises(Refusal, match=r"all ports of \$CORTEX_AGENT_PORTS are taken"):
                await AgentServer(Agent()).open(HOST)

    run(scenario)


@pytest.mark.parametrize("text", ["x", "0", "1-", "-5", "9-8", "1-70000", "1-2-3", "80,81"])
def test_ports_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(Refusal, match=r"set the first and the last port, as in 20000-20099"):
        ports_of(text)


def test_the_system_chooses_the_port_where_none_is_set() -> None:
    assert list(ports_of(" ")) == [0]
    assert list(ports_of("7000")) == [7000]
    assert list(ports_of("7000-7002")) == [7000, 7001, 7002]


def test_an_agent_whose_node_has_a_translated_address_listens_on_all(run: Run) -> None:
    async def scenario() -> None:
        made = AgentServer(Agent())
        await made.open("192.0.2.1")  # of no machine (RFC 5737)
        connection = await connect(made.port, made.key)
        assert await connection.call("echo", 1, timeout_s=LIMIT_S) == 1
        connection.close("the test has ended")
        await made.close()

    run(scenario)


def test_an_address_that_cannot_be_used_is_refused(run: Run) -> None:
    async def scenario() -> None:
        with pytest.raises(Refusal, match="its agent cannot listen on not an address"):
            await AgentServer(Agent()).open("not an address")

    run(scenario)
