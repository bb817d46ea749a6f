"""What an operator and an agent say to each other over their connection, how often, and what follows
when the connection fails: on a node without Ray."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Ended, Engine, Lost, Reachable
from cortex.engines.ray import RayEngine, frames
from cortex.engines.ray.connection import AgentConnection
from cortex.engines.ray.log_copies import LogCopies
from cortex.engines.ray.messages import Hello, LogPiece
from cortex.ray_node import agent as agent_module
from cortex.ray_node import outbox
from cortex.ray_node.agent import Agent
from cortex.ray_node.outbox import Entry
from engines.engine_harness import SLEEP, until
from engines.in_process_ray import STATE, InProcessHarness, in_process_harness

KIB = 1 << 10
PRINTS = """
    def task(config):
        print("x" * config["bytes"], end="")
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    with in_process_harness(tmp_path, monkeypatch) as made:
        yield made


def connection_of(engine: Engine) -> AgentConnection | None:
    assert isinstance(engine, RayEngine)
    return engine._cluster.connections.get(STATE.node_id)


def problem_of(engine: Engine) -> str:
    (node,) = engine.ledger.nodes()
    return node.problem or ""


@pytest.mark.parametrize("size", [0, 1, 64 * KIB])
def test_the_end_of_a_job_brings_the_rest_of_its_log(harness: InProcessHarness, size: int) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(PRINTS, config={"bytes": size})
        await harness.outcome(engine, attempt)
        assert harness.log(attempt) == "x" * size
        assert "read" not in harness.ray.calls

    harness.run(scenario)


def test_a_longer_rest_is_read_in_pieces(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        attempt = harness.attempt(PRINTS, config={"bytes": 700 * KIB})
        monkeypatch.setattr(engine._attempts, "log_cursors", lambda _: {})  # nothing before the end
        await harness.outcome(engine, attempt)
        assert harness.log(attempt) == "x" * 700 * KIB
        assert harness.ray.calls.count("read") > 2

    harness.run(scenario)


def test_a_log_with_a_gap_is_complete_around_it(harness: InProcessHarness) -> None:
    code = """
        def task(config):
            print("first")
            for number in range(6000):
                print(number, "x" * 100)
            print("last")
    """

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(code, log_limit=64 * KIB)
        await harness.outcome(engine, attempt)
        copy = harness.root / attempt.spec.job_id
        on_node = harness.folder(attempt)
        assert (copy / "log.cut").read_bytes() == (on_node / "log.cut").read_bytes()
        assert (copy / "log").read_bytes() == (on_node / "log").read_bytes()

    harness.run(scenario)


def test_a_gap_that_appears_after_all_was_copied_is_in_the_copy(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(
            engine, harness.attempt(SLEEP, config={"file": str(harness.marker)}, log_limit=64 * KIB)
        )
        await harness.printed(attempt, "pid")
        copy = harness.root / attempt.spec.job_id
        on_node = harness.folder(attempt)
        await asyncio.sleep(1)  # the less a log grows, the rarer its supervisor cuts it
        with (on_node / "log").open("a") as log:
            log.write("more\n" * (20 * KIB))
        size = (on_node / "log").stat().st_size
        await until(lambda: (copy / "log").stat().st_size == size)
        harness.finish_sleeper()
        await harness.ended(attempt)
        assert (copy / "log.cut").read_bytes() == (on_node / "log.cut").read_bytes()
        assert (copy / "log").read_bytes() == (on_node / "log").read_bytes()

    harness.run(scenario)


def test_the_rest_follows_the_part_that_was_copied_while_the_job_ran(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.printed(attempt, "pid")
        size = len(harness.log(attempt))
        with (harness.folder(attempt) / "log").open("a") as log:
            log.write("more\n")
        harness.finish_sleeper()
        await harness.ended(attempt)
        assert harness.log(attempt)[size:] == "more\n"
        assert "read" not in harness.ray.calls

    harness.run(scenario)


def test_a_rest_that_does_not_follow_the_copy_is_not_written(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The piece before it could not be written, for example."""
    rests = Agent._rests

    async def later(self: Agent, *arguments: object) -> dict[str, LogPiece]:
        found = await rests(self, *arguments)  # type: ignore[arg-type]  # as they came
        return {
            job_id: replace(piece, offset=piece.offset + 3, data=piece.data[3:])
            for job_id, piece in found.items()
        }

    monkeypatch.setattr(Agent, "_rests", later)

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        monkeypatch.setattr(engine._attempts, "log_cursors", lambda _: {})  # nothing before the end
        attempt = harness.attempt("def task(config): print('hello')")
        await harness.outcome(engine, attempt)
        assert harness.log(attempt) == "hello\n"
        assert "read" in harness.ray.calls

    harness.run(scenario)


def test_the_late_end_of_an_earlier_attempt_adds_nothing_to_the_log(
    harness: InProcessHarness,
) -> None:
    code = """
        import glob, os
        def task(config):
            print("attempt", len(glob.glob(os.environ["CORTEX_JOB_DIR"] + "/../start.*")))
    """

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(code)
        end = await harness.outcome(engine, attempt)

        async def repeat_the_end() -> None:
            polls = harness.ray.calls.count("poll")
            assert harness.ray.agent is not None
            harness.ray.agent._add_to_outbox(end, 64 * KIB)
            await until(lambda: harness.ray.calls.count("poll") > polls)

        harness.ray.before_call["start"] = repeat_the_end
        await harness.ended(await harness.start_attempt(engine, attempt, 2))
        assert harness.log(attempt) == "attempt 1\nattempt 2\n"

    harness.run(scenario)


def test_a_rest_that_the_disk_did_not_accept_is_read_again(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] * 2
    write = LogCopies.write

    def fail_twice(self: LogCopies, job_id: str, base: int, piece: LogPiece) -> None:
        if failures:
            raise failures.pop()
        write(self, job_id, base, piece)

    monkeypatch.setattr(LogCopies, "write", fail_twice)

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): print('hello')")
        await harness.outcome(engine, attempt)
        assert harness.log(attempt) == "hello\n"
        assert failures == []

    harness.run(scenario)


@pytest.mark.parametrize(
    "rest", [None, "text", LogPiece(0, b"xy", 1, None), LogPiece(5, b"", 1, None)]
)
def test_an_invalid_rest_of_a_log_ends_its_copy_and_no_more(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch, rest: object
) -> None:
    async def forge(self: Agent, entries: list[Entry], _: object) -> object:
        ends = [entry.content for entry in entries if isinstance(entry.content, Ended)]
        return {end.job_id: rest for end in ends}

    monkeypatch.setattr(Agent, "_rests", forge)

    async def scenario(engine: Engine) -> None:
        assert (
            await harness.outcome(engine, harness.attempt("def task(config): return 1"))
        ).result == 1
        assert problem_of(engine) == ""

    harness.run(scenario)


def test_answers_that_are_filled_lose_and_repeat_nothing(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_POLL_BYTES", 1)

    async def scenario(engine: Engine) -> None:
        attempts = [harness.attempt(PRINTS, config={"bytes": 9}) for _ in range(12)]
        for attempt in attempts:
            await harness.start(engine, attempt)
        for attempt in attempts:
            await harness.ended(attempt)
            assert harness.log(attempt) == "x" * 9
        ends = [each.job_id for each in harness.observations if isinstance(each, Ended)]
        assert sorted(ends) == sorted(attempt.spec.job_id for attempt in attempts)

    harness.run(scenario)


def test_a_version_is_built_once_until_its_environment_is_gone_or_it_is_forgotten(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): pass")
        number = 1
        await harness.outcome(engine, attempt)
        assert harness.ray.agent is not None
        environments = harness.ray.agent._provisions._environments
        build, builds = environments.build, []

        async def count(*arguments: object) -> Path:
            builds.append(number)
            return await build(*arguments)  # type: ignore[arg-type]  # as they came

        environments.build = count  # type: ignore[method-assign,assignment]  # the test counts

        async def run_again() -> None:
            nonlocal number
            number += 1
            await harness.ended(await harness.start_attempt(engine, attempt, number))

        await run_again()
        assert builds == []
        shutil.rmtree(harness.agent_folder / "environments")
        (harness.agent_folder / "environments").mkdir()
        await run_again()
        assert builds == [3]
        await run_again()
        assert builds == [3]
        engine.forget(versions=[attempt.version.api.api_id])
        await until(lambda: not harness.ray.agent._provisions._built)  # type: ignore[union-attr]  # the agent exists
        await run_again()
        assert builds == [3, 5]

    harness.run(scenario)


def test_another_lock_file_is_another_build(harness: InProcessHarness) -> None:
    class Locks:
        files: dict[str, str]

        def locks(self, _: str) -> dict[str, str]:
            return self.files

        def known_locks(self, _: str) -> None:
            """None: `locks` has to be called."""

        def save_lockfile_if_absent(self, *_: str) -> None:
            """Save no lock file."""

    harness.locks = locks = Locks()

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): pass")
        for number, text in enumerate(["a==1\n", "a==1\n", "a==2\n"], 1):
            locks.files = {"other.lock": text}
            await harness.ended(await harness.start_attempt(engine, attempt, number))
            assert harness.ray.agent is not None
            on_node = harness.agent_folder / "locks" / attempt.version.api.project_id / "other.lock"
            assert on_node.read_text() == text

    harness.run(scenario)


def test_a_broken_connection_is_replaced_and_loses_no_job(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        first = connection_of(engine)
        assert first is not None
        assert harness.ray.agent is not None
        for each in list(harness.ray.agent._server._connections):
            each.close("a firewall has cut it")
        unreachable = await harness.unreachable(attempt)
        assert unreachable.reason.startswith("the connection to the agent of a broke: ")
        await harness.observed(attempt, Reachable)
        assert connection_of(engine) is not first
        harness.finish_sleeper()
        await harness.ended(attempt)

    harness.run(scenario)


def test_an_agent_that_hangs_is_unreachable_until_it_continues(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "HEARTBEAT_INTERVAL_S", 0.05)
    monkeypatch.setattr(frames, "SILENCE_TIMEOUT_S", 2.0)

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        assert harness.ray.agent is not None
        (hanging,) = harness.ray.agent._server._connections
        monkeypatch.setattr(hanging, "send", lambda *_: None)
        connection = connection_of(engine)
        assert connection is not None
        await until(lambda: connection.silent_s > 0.5)
        unreachable = await harness.unreachable(attempt)
        assert "the other end was silent for 2 s" in unreachable.reason
        await harness.observed(attempt, Reachable)
        harness.finish_sleeper()
        await harness.ended(attempt)

    harness.run(scenario)


def test_an_agent_whose_port_cannot_be_reached_makes_its_node_not_ready(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = Agent.hello
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    async def elsewhere(self: Agent) -> Hello:
        return replace(await hello(self), host="127.0.0.1", port=port)

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Agent, "hello", elsewhere)
            await harness.ray.kill_agent()
            expected = (
                f"the operator at 127.0.0.1 cannot reach the agent of a at 127.0.0.1:{port}: "
            )
            await until(lambda: problem_of(engine).startswith(expected))
            attempt = harness.attempt("def task(config): pass")
            waits = engine.ledger.reserve(attempt.spec.job_id, attempt.version.api.compute)
            assert expected in str(waits)
        await until(lambda: problem_of(engine) == "")
        await harness.outcome(engine, attempt)

    harness.run(scenario)


def test_ports_that_the_node_cannot_use_are_its_problem(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setenv("CORTEX_AGENT_PORTS", "many")
            await harness.ray.kill_agent()
            await until(lambda: "$CORTEX_AGENT_PORTS of its raylet is 'many'" in problem_of(engine))
        await until(lambda: problem_of(engine) == "")

    harness.run(scenario)


def test_the_key_is_in_no_text(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        hello = engine._cluster.hellos[STATE.node_id]
        assert len(hello.key) == frames.KEY_BYTES
        assert repr(hello.key) not in repr(hello)

    harness.run(scenario)


def test_a_closed_engine_leaves_no_connection(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        other = harness.new_engine()
        await other.open(harness.report)
        server = harness.ray.agent._server  # type: ignore[union-attr]  # the agent exists
        await until(lambda: len(server._connections) == 2)
        await other.close()
        await until(lambda: len(server._connections) == 1)

    harness.run(scenario)


def test_sessions_that_have_ended_leave_nothing_in_the_agent(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_SUBSCRIBER_TIMEOUT_S", 0.5)

    async def scenario(engine: Engine) -> None:
        agent = harness.ray.agent
        assert agent is not None
        for _ in range(3):
            before = connection_of(engine)
            assert before is not None
            await until(lambda: harness.ray.calls[-1] == "poll")
            before.close("the test breaks it")
            await until(lambda before=before: connection_of(engine) not in (None, before))
        assert len(agent._reported) <= 2
        await harness.outcome(engine, harness.attempt("def task(config): pass"))

    harness.run(scenario)


def test_a_piece_that_is_written_while_its_node_is_lost_belongs_to_its_attempt(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_writing, may_write = threading.Event(), threading.Event()
    write = LogCopies.write

    def wait(self: LogCopies, job_id: str, base: int, piece: LogPiece) -> None:
        is_writing.set()
        may_write.wait(60)
        write(self, job_id, base, piece)

    monkeypatch.setattr(LogCopies, "write", wait)

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(is_writing.is_set)
        harness.lose_node()
        await asyncio.sleep(2.5)  # the loss is seen within a second
        if not any(isinstance(each, Lost) for each in harness.observations):
            may_write.set()
        await harness.final(attempt)
        size = json.loads(engine.claim(attempt.spec.job_id, 2))["log"]
        may_write.set()
        await asyncio.sleep(0.5)
        assert len(harness.log(attempt)) == size
        harness.finish_sleeper()

    harness.run(scenario)
