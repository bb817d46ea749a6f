"""What the Ray engine and the agents of nodes promise each other, whatever comes late, fails or is lost in
between: on a node without Ray (`ray`)."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import RayError

from cortex.engines.base import Ended, Ending, Engine, Lost, NeverStarted, Reachable, Waits
from cortex.engines.ray import RayEngine
from cortex.engines.ray.log_copies import LogCopies
from cortex.engines.ray.messages import Builds, NodeOrder, Reservation
from cortex.engines.ray.tracked import TrackedAttempt
from cortex.joblog import watch
from cortex.joblog.folders import JobFolders
from cortex.ray_node import guard, reservations
from cortex.worker import processes
from engines.engine_harness import LIMIT_S, until
from engines.in_process_ray import NAMESPACE, InProcessHarness, in_process_harness, ready

FULL = OSError(errno.ENOSPC, "No space left on device")
TALKS = """
    import os, time
    def task(config):
        while not os.path.exists(config["file"] + ".go"):
            print("line", flush=True)
            time.sleep(0.01)
"""

SAYS_WHICH = """
    import glob, os
    def task(config):
        print("attempt", len(glob.glob(os.environ["CORTEX_JOB_DIR"] + "/../start.*")), flush=True)
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    with in_process_harness(tmp_path, monkeypatch) as made:
        yield made


def test_a_log_is_its_own_attempts_while_another_one_is_about_to_begin(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        talker = harness.attempt(TALKS, config={"file": str(harness.marker)}, path="talks.py")
        attempt = harness.attempt(SAYS_WHICH)
        await harness.outcome(engine, attempt)
        await harness.start(engine, talker)
        await harness.printed(talker, "line")

        async def polled() -> None:
            asked = harness.ray.asked.count("poll")
            await until(lambda: harness.ray.asked.count("poll") > asked + 2)

        harness.ray.before["start"] = polled
        second = await harness.begin(engine, attempt, 2)
        await harness.ended(second)
        assert harness.log(attempt) == "attempt 1\nattempt 2\n"
        harness.go()
        await harness.ended(talker)

    harness.run(scenario)


@pytest.mark.parametrize("lacks", [errno.ENOSPC, errno.EMFILE])
def test_an_attempt_that_never_starts_adds_nothing_to_the_log(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    async def build(*_: object) -> Path:
        raise OSError(lacks, os.strerror(lacks))

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): print('hello')")
        await harness.outcome(engine, attempt)
        assert harness.ray.agent is not None
        with monkeypatch.context() as patched:
            patched.setattr(harness.ray.agent._provisions._environments, "build", build)
            second = await harness.begin(engine, attempt, 2)
            assert isinstance(await harness.last(second), NeverStarted)
        assert harness.log(attempt) == "hello\n"
        await harness.ended(await harness.begin(engine, attempt, 3))
        assert harness.log(attempt) == "hello\nhello\n"

    harness.run(scenario)


def test_the_resolvers_words_follow_the_log_of_an_earlier_attempt(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): print('hello')")
        await harness.outcome(engine, attempt)
        shutil.rmtree(harness.slot / "environments")
        project = harness.slot / "projects" / attempt.version.api.project_id
        (project / "requirements.txt").write_text("./missing.whl\n")
        second = await harness.begin(engine, attempt, 2)
        assert isinstance(await harness.last(second), Lost)
        log = harness.log(attempt)
        assert log.count("hello") == 1
        assert "missing.whl" in log

    harness.run(scenario)


def test_a_node_keeps_to_the_operators_rules_for_builds(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAMED", "yes")

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        engine._attempts._calls._builds = Builds(0.001, frozenset({"NAMED"}))
        attempt = harness.attempt("def task(config): pass")
        lost = await harness.last(await harness.begin(engine, attempt))
        assert isinstance(lost, Lost)
        assert lost.is_final
        assert "not built within 0.001 s" in lost.reason
        assert harness.ray.agent is not None
        rules = harness.ray.agent._provisions._environments.rules
        found = rules.inherited(os.environ, is_own_user=True)
        assert found["NAMED"] == "yes"

    harness.run(scenario)


def test_a_copy_that_could_not_be_begun_for_a_full_disk_is_complete_once_it_is_not(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        first = harness.sleeper()
        JobFolders(harness.root).append_to_log(first.spec.job_id, "of an earlier attempt")
        attempt = await harness.begin(engine, first)
        await harness.number_after(first, "pid")
        await engine.close()
        size = len(harness.log(first))
        shutil.rmtree(harness.root)

        def resume(*_: object) -> None:
            raise FULL

        other = harness.made()
        await other.open(harness._saw)
        await ready(other)
        with monkeypatch.context() as patched:
            patched.setattr(LogCopies, "resume", resume)
            await other.recover(attempt)
        harness.go()
        await harness.ended(attempt)
        assert [node.problem for node in other.ledger.nodes()] == [None]
        log = harness.log(first)
        assert len(log) == size
        assert log.startswith("[cortex: ")
        assert "pid" in log
        await other.close()

    harness.run(scenario)


def test_lock_files_that_cannot_be_read_hold_a_job_up(harness: InProcessHarness) -> None:
    class Locks:
        def locks(self, _: str) -> dict[str, str]:
            raise FULL

        def save_lockfile_if_absent(self, *_: str) -> None:
            """It keeps none."""

    harness.locks = Locks()

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): pass")
        await harness.start(engine, attempt)
        last = await harness.last(attempt)
        assert isinstance(last, NeverStarted)
        assert "No space left" in str(last.blocked_by)
        await until(lambda: not harness.ray.seats)

    harness.run(scenario)


def test_a_seat_on_a_node_that_is_gone_is_given_up_by_the_next_operator(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.begin(engine, harness.sleeper())
        await harness.started(attempt)
        assert harness.ray.seats
        await engine.close()
        harness.lost()
        other = harness.made()
        await other.open(harness._saw)
        await other.recover(attempt)
        assert isinstance(await harness.last(attempt), Lost)
        await until(lambda: not harness.ray.seats)
        await other.close()
        harness.go()

    harness.run(scenario)


def test_a_seat_of_which_the_node_has_lost_the_records_is_given_up(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.begin(engine, harness.sleeper())
        await harness.started(attempt)
        await harness.ray.kill_agent()
        (harness.slot / "owner").unlink()
        assert "records in it, is gone" in str(await harness.last(attempt))
        await until(lambda: not harness.ray.seats)

    harness.run(scenario)


def test_an_operator_that_was_superseded_takes_no_news_from_the_one_that_drives(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.begin(engine, harness.sleeper())
        await harness.started(attempt)
        harness.seen.clear()
        other = harness.made()
        seen: list[object] = []
        await other.open(seen.append)
        await ready(other)
        await other.recover(attempt)
        await until(lambda: seen)
        harness.go()
        await harness.ended(attempt)
        await until(lambda: any(isinstance(each, Ended) for each in seen))
        await other.close()

    for _ in range(5):
        harness.run(scenario)
        Path(f"{harness.marker}.go").unlink()


def test_without_inotify_logs_are_copied_all_the_same(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inotify() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(watch, "Inotify", inotify)

    async def scenario(engine: Engine) -> None:
        attempt = await harness.begin(engine, harness.sleeper())
        await harness.printed(attempt, "pid")
        harness.go()
        await harness.ended(attempt)

    harness.run(scenario)


def test_a_node_that_is_lost_while_a_project_travels_there_loses_no_job(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()

        async def lost() -> None:
            harness.lost()
            await harness.last(attempt)

        harness.ray.before["unpack"] = lost
        await harness.start(engine, attempt)
        assert isinstance(await harness.last(attempt), NeverStarted)
        await until(lambda: not harness.ray.seats)

    harness.run(scenario)
    assert not harness.marker.exists()


def test_a_stop_while_a_project_travels_starts_nothing(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()

        async def stop() -> None:
            engine.stop(attempt.spec.job_id)

        harness.ray.before["unpack"] = stop
        await harness.start(engine, attempt)
        assert isinstance(await harness.last(attempt), NeverStarted)
        assert harness.ray.asked.count("start") == 1

    harness.run(scenario)


def test_an_order_that_was_given_up_while_it_was_built_is_in_no_later_ones_way(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt, go_on = harness.sleeper(), asyncio.Event()
        job_id, api = attempt.spec.job_id, attempt.version.api
        assert engine.ledger.reserve(job_id, api.compute) is None
        attempt = replace(attempt, handle=engine.claim(job_id, 1))
        orders = [
            TrackedAttempt.of(replace(attempt, number=number)).node_order(NAMESPACE, 5)
            for number in (1, 2, 3)
        ]
        await harness.ray.send_project("node-a", api.project_id, str(harness.project))
        agent = harness.ray.agent
        assert agent is not None
        build = agent._provisions.build

        async def slow(order: NodeOrder) -> Path:
            python = await build(order)
            if order.number == 1:
                await go_on.wait()
            return python

        monkeypatch.setattr(agent._provisions, "build", slow)
        hello = await agent.hello()
        await agent.start(orders[0])
        late = agent._building[job_id]
        await agent.recover(orders[1])  # the operator has heard nothing of the first
        await agent.start(orders[2])
        log = harness.folder(attempt) / "log"
        await until(lambda: log.exists() and "pid" in log.read_text())
        go_on.set()
        await asyncio.gather(late, return_exceptions=True)
        assert "pid" in log.read_text()
        harness.go()
        seen: list[object] = []
        seq = hello.seq
        while not any(isinstance(each, Ended) and each.attempt == 3 for each in seen):
            polled = agent.poll(hello.incarnation, seq, {}, LIMIT_S)
            poll = await asyncio.wait_for(polled, 2 * LIMIT_S)
            assert poll.seq > seq, seen
            seen, seq = [*seen, *poll.seen], poll.seq
        engine.ledger.release(job_id)

    harness.run(scenario)
    assert harness.marker.read_text() == "ran\n"


def test_what_an_agent_that_was_killed_had_taken_in_by_half_is_removed(
    harness: InProcessHarness,
) -> None:
    part = harness.slot / "projects" / ".incoming-cut-off"
    part.mkdir(parents=True)
    (part / "half").touch()

    async def scenario(engine: Engine) -> None:
        assert not part.exists()

    harness.run(scenario)


def test_a_job_that_has_spoilt_its_start_record_ends_with_its_node(
    harness: InProcessHarness,
) -> None:
    attempt = harness.sleeper()

    async def scenario(engine: Engine) -> None:
        await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        harness.start_record(attempt).write_bytes(b"")

    harness.run(scenario)
    guard.end_all(harness.slot / "jobs")
    assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)


def test_a_killed_agent_is_replaced(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.begin(engine, harness.sleeper())
        await harness.started(attempt)
        await harness.ray.kill_agent()
        await harness.seen_of(attempt, Reachable)
        harness.go()
        await harness.ended(attempt)

    harness.run(scenario)


def test_a_job_whose_folder_is_gone_with_its_records_is_lost_and_runs_no_more(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.begin(engine, harness.sleeper())
        await harness.started(attempt)
        await harness.ray.kill_agent()
        shutil.rmtree(harness.folder(attempt))
        last = await harness.last(attempt)
        assert isinstance(last, Lost)
        assert "records in it, is gone" in last.reason
        assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)

    harness.run(scenario)


@pytest.mark.parametrize("is_lost", [True, False], ids=["node", "agent"])
def test_a_seat_that_an_agent_was_killed_before_it_gave_up_is_given_up(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch, *, is_lost: bool
) -> None:
    def let_go(_: str) -> None:
        raise RayError("the cluster cannot be asked now")

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(reservations, "release", let_go)
            await harness.outcome(engine, harness.attempt("def task(config): pass"))
            await harness.ray.kill_agent()
        if is_lost:
            harness.lost()
        await until(lambda: not harness.ray.seats)

    harness.run(scenario)


def test_a_seat_of_which_nothing_is_known_is_given_up_by_whoever_drives_next(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(seat: Reservation, _: float) -> tuple[int, ...]:
        harness.ray.seats.add(seat.name)
        harness.ray.is_cut_off = True
        raise RayError("the link broke")

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(harness.ray, "reserve", cut_off)
            attempt = await harness.begin(engine, harness.sleeper())
            await until(lambda: harness.ray.is_cut_off)
            await asyncio.sleep(0.1)
            await engine.close()
        harness.ray.is_cut_off = False
        other = harness.made()
        await other.open(harness._saw)
        if not any(
            isinstance(each, NeverStarted) for each in harness.seen
        ):  # else it is not asked after
            await other.recover(attempt)
        assert isinstance(await harness.last(attempt), NeverStarted)
        await until(lambda: not harness.ray.seats)
        await other.close()

    harness.run(scenario)


def test_the_time_of_a_job_ends_though_its_seat_cannot_be_given_up(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(*_: object) -> tuple[int, ...]:
        harness.ray.is_cut_off = True
        raise RayError("the link broke")

    async def scenario(engine: Engine) -> None:
        monkeypatch.setattr(harness.ray, "reserve", cut_off)
        attempt = harness.attempt("def task(config): pass", timeout=1)
        await harness.start(engine, attempt)
        assert isinstance(await harness.last(attempt), NeverStarted)
        assert harness.ray.is_cut_off

    harness.run(scenario)


ODD: list[dict[str, object]] = [
    {"end_ns": "x"}, {"exit_code": 1 << 40}, {"ending": "over"}, {"message": 1}, {"start_ns": -1},
    {"hints": "words"}, {"measures": None}, {"has_result": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("changed", ODD, ids=[next(iter(each)) for each in ODD])
def test_what_a_node_tells_and_what_cannot_be_is_a_lost_attempt(
    harness: InProcessHarness, changed: dict[str, object]
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()
        job_id = await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        assert harness.ray.agent is not None
        end = Ended(job_id, 1, Ending.EXITED, 1, 2, 0, None, None, False)
        harness.ray.agent._add_to_outbox(replace(end, **changed))  # type: ignore[arg-type]  # that is what is tried
        last = await harness.last(attempt)
        assert isinstance(last, Lost)
        assert last.reason.startswith("its node sent an invalid observation: ")
        harness.ray.agent._engine.stop(job_id)
        await until(lambda: job_id not in harness.ray.agent._orders)  # type: ignore[union-attr]  # it is there

    harness.run(scenario)


def test_a_result_that_a_node_tells_and_that_is_none_is_left_out(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()
        job_id = await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        assert harness.ray.agent is not None
        now = time.time_ns()
        lie = Ended(job_id, 1, Ending.EXITED, now, now, 0, None, float("nan"), True)
        harness.ray.agent._add_to_outbox(Waits(job_id, 1, "\ud800" * 999))
        harness.ray.agent._add_to_outbox(lie)
        last = await harness.ended(attempt)
        assert (last.has_result, last.result) == (False, None)
        assert "not JSON" in (last.message or "")
        assert all(len(words) <= 500 and words.encode() for words in harness.waits)
        harness.go()
        await until(lambda: job_id not in harness.ray.agent._orders)  # type: ignore[union-attr]  # it is there

    harness.run(scenario)
