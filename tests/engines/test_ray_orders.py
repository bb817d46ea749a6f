"""What the Ray engine and the agents of nodes promise each other, whatever comes late, fails or is lost in
between: on a node without Ray (`near`)."""

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
from engines.bench import LIMIT_S, until
from engines.near import NAMESPACE, NearBench, near_bench, ready

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
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NearBench]:
    with near_bench(tmp_path, monkeypatch) as made:
        yield made


def test_a_log_is_its_own_attempts_while_another_one_is_about_to_begin(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        talker = bench.attempt(TALKS, config={"file": str(bench.marker)}, path="talks.py")
        attempt = bench.attempt(SAYS_WHICH)
        await bench.outcome(engine, attempt)
        await bench.start(engine, talker)
        await bench.printed(talker, "line")

        async def polled() -> None:
            asked = bench.near.asked.count("poll")
            await until(lambda: bench.near.asked.count("poll") > asked + 2)

        bench.near.before["start"] = polled
        second = await bench.begin(engine, attempt, 2)
        await bench.ended(second)
        assert bench.log(attempt) == "attempt 1\nattempt 2\n"
        bench.go()
        await bench.ended(talker)

    bench.run(scenario)


@pytest.mark.parametrize("lacks", [errno.ENOSPC, errno.EMFILE])
def test_an_attempt_that_never_starts_adds_nothing_to_the_log(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    async def build(*_: object) -> Path:
        raise OSError(lacks, os.strerror(lacks))

    async def scenario(engine: Engine) -> None:
        attempt = bench.attempt("def task(config): print('hello')")
        await bench.outcome(engine, attempt)
        assert bench.near.agent is not None
        with monkeypatch.context() as patched:
            patched.setattr(bench.near.agent._stock._environments, "build", build)
            second = await bench.begin(engine, attempt, 2)
            assert isinstance(await bench.last(second), NeverStarted)
        assert bench.log(attempt) == "hello\n"
        await bench.ended(await bench.begin(engine, attempt, 3))
        assert bench.log(attempt) == "hello\nhello\n"

    bench.run(scenario)


def test_the_resolvers_words_follow_the_log_of_an_earlier_attempt(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = bench.attempt("def task(config): print('hello')")
        await bench.outcome(engine, attempt)
        shutil.rmtree(bench.slot / "environments")
        project = bench.slot / "projects" / attempt.version.api.project_id
        (project / "requirements.txt").write_text("./missing.whl\n")
        second = await bench.begin(engine, attempt, 2)
        assert isinstance(await bench.last(second), Lost)
        log = bench.log(attempt)
        assert log.count("hello") == 1
        assert "missing.whl" in log

    bench.run(scenario)


def test_a_node_keeps_to_the_operators_rules_for_builds(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAMED", "yes")

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        engine._attempts._calls._builds = Builds(0.001, frozenset({"NAMED"}))
        attempt = bench.attempt("def task(config): pass")
        lost = await bench.last(await bench.begin(engine, attempt))
        assert isinstance(lost, Lost)
        assert lost.is_final
        assert "not built within 0.001 s" in lost.reason
        assert bench.near.agent is not None
        rules = bench.near.agent._stock._environments.rules
        found = rules.inherited(os.environ, is_own_user=True)
        assert found["NAMED"] == "yes"

    bench.run(scenario)


def test_a_copy_that_could_not_be_begun_for_a_full_disk_is_complete_once_it_is_not(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        first = bench.sleeper()
        JobFolders(bench.root).append_to_log(first.spec.job_id, "of an earlier attempt")
        attempt = await bench.begin(engine, first)
        await bench.number_after(first, "pid")
        await engine.close()
        size = len(bench.log(first))
        shutil.rmtree(bench.root)

        def take_up(*_: object) -> None:
            raise FULL

        other = bench.made()
        await other.open(bench._saw)
        await ready(other)
        with monkeypatch.context() as patched:
            patched.setattr(LogCopies, "take_up", take_up)
            await other.recover(attempt)
        bench.go()
        await bench.ended(attempt)
        assert [node.problem for node in other.ledger.nodes()] == [None]
        log = bench.log(first)
        assert len(log) == size
        assert log.startswith("[cortex: ")
        assert "pid" in log
        await other.close()

    bench.run(scenario)


def test_lock_files_that_cannot_be_read_hold_a_job_up(bench: NearBench) -> None:
    class Locks:
        def locks(self, _: str) -> dict[str, str]:
            raise FULL

        def save_lockfile_if_absent(self, *_: str) -> None:
            """It keeps none."""

    bench.locks = Locks()

    async def scenario(engine: Engine) -> None:
        attempt = bench.attempt("def task(config): pass")
        await bench.start(engine, attempt)
        last = await bench.last(attempt)
        assert isinstance(last, NeverStarted)
        assert "No space left" in str(last.held_up_by)
        await until(lambda: not bench.near.seats)

    bench.run(scenario)


def test_a_seat_on_a_node_that_is_gone_is_given_up_by_the_next_operator(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await bench.begin(engine, bench.sleeper())
        await bench.started(attempt)
        assert bench.near.seats
        await engine.close()
        bench.lost()
        other = bench.made()
        await other.open(bench._saw)
        await other.recover(attempt)
        assert isinstance(await bench.last(attempt), Lost)
        await until(lambda: not bench.near.seats)
        await other.close()
        bench.go()

    bench.run(scenario)


def test_a_seat_of_which_the_node_has_lost_the_records_is_given_up(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await bench.begin(engine, bench.sleeper())
        await bench.started(attempt)
        await bench.near.kill_agent()
        (bench.slot / "owner").unlink()
        assert "records in it, is gone" in str(await bench.last(attempt))
        await until(lambda: not bench.near.seats)

    bench.run(scenario)


def test_an_operator_that_was_superseded_takes_no_news_from_the_one_that_drives(
    bench: NearBench,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await bench.begin(engine, bench.sleeper())
        await bench.started(attempt)
        bench.seen.clear()
        other = bench.made()
        seen: list[object] = []
        await other.open(seen.append)
        await ready(other)
        await other.recover(attempt)
        await until(lambda: seen)
        bench.go()
        await bench.ended(attempt)
        await until(lambda: any(isinstance(each, Ended) for each in seen))
        await other.close()

    for _ in range(5):
        bench.run(scenario)
        Path(f"{bench.marker}.go").unlink()


def test_without_inotify_logs_are_copied_all_the_same(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inotify() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(watch, "Inotify", inotify)

    async def scenario(engine: Engine) -> None:
        attempt = await bench.begin(engine, bench.sleeper())
        await bench.printed(attempt, "pid")
        bench.go()
        await bench.ended(attempt)

    bench.run(scenario)


def test_a_node_that_is_lost_while_a_project_travels_there_loses_no_job(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = bench.sleeper()

        async def lost() -> None:
            bench.lost()
            await bench.last(attempt)

        bench.near.before["unpack"] = lost
        await bench.start(engine, attempt)
        assert isinstance(await bench.last(attempt), NeverStarted)
        await until(lambda: not bench.near.seats)

    bench.run(scenario)
    assert not bench.marker.exists()


def test_a_stop_while_a_project_travels_starts_nothing(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = bench.sleeper()

        async def stop() -> None:
            engine.stop(attempt.spec.job_id)

        bench.near.before["unpack"] = stop
        await bench.start(engine, attempt)
        assert isinstance(await bench.last(attempt), NeverStarted)
        assert bench.near.asked.count("start") == 1

    bench.run(scenario)


def test_an_order_that_was_given_up_while_it_was_built_is_in_no_later_ones_way(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt, go_on = bench.sleeper(), asyncio.Event()
        job_id, api = attempt.spec.job_id, attempt.version.api
        assert engine.ledger.reserve(job_id, api.compute) is None
        attempt = replace(attempt, handle=engine.claim(job_id, 1))
        orders = [
            TrackedAttempt.of(replace(attempt, number=number)).node_order(NAMESPACE, 5)
            for number in (1, 2, 3)
        ]
        await bench.near.send_project("node-a", api.project_id, str(bench.project))
        agent = bench.near.agent
        assert agent is not None
        build = agent._stock.build

        async def slow(order: NodeOrder) -> Path:
            python = await build(order)
            if order.number == 1:
                await go_on.wait()
            return python

        monkeypatch.setattr(agent._stock, "build", slow)
        hello = await agent.hello()
        await agent.start(orders[0])
        late = agent._building[job_id]
        await agent.recover(orders[1])  # the operator has heard nothing of the first
        await agent.start(orders[2])
        log = bench.folder(attempt) / "log"
        await until(lambda: log.exists() and "pid" in log.read_text())
        go_on.set()
        await asyncio.gather(late, return_exceptions=True)
        assert "pid" in log.read_text()
        bench.go()
        seen: list[object] = []
        seq = hello.seq
        while not any(isinstance(each, Ended) and each.attempt == 3 for each in seen):
            polled = agent.poll(hello.incarnation, seq, {}, LIMIT_S)
            poll = await asyncio.wait_for(polled, 2 * LIMIT_S)
            assert poll.seq > seq, seen
            seen, seq = [*seen, *poll.seen], poll.seq
        engine.ledger.release(job_id)

    bench.run(scenario)
    assert bench.marker.read_text() == "ran\n"


def test_what_an_agent_that_was_killed_had_taken_in_by_half_is_removed(bench: NearBench) -> None:
    part = bench.slot / "projects" / ".incoming-cut-off"
    part.mkdir(parents=True)
    (part / "half").touch()

    async def scenario(engine: Engine) -> None:
        assert not part.exists()

    bench.run(scenario)


def test_a_job_that_has_spoilt_its_start_record_ends_with_its_node(bench: NearBench) -> None:
    attempt = bench.sleeper()

    async def scenario(engine: Engine) -> None:
        await bench.start(engine, attempt)
        await bench.printed(attempt, "pid")
        bench.start_record(attempt).write_bytes(b"")

    bench.run(scenario)
    guard.end_all(bench.slot / "jobs")
    assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)


def test_a_killed_agent_is_replaced(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await bench.begin(engine, bench.sleeper())
        await bench.started(attempt)
        await bench.near.kill_agent()
        await bench.seen_of(attempt, Reachable)
        bench.go()
        await bench.ended(attempt)

    bench.run(scenario)


def test_a_job_whose_folder_is_gone_with_its_records_is_lost_and_runs_no_more(
    bench: NearBench,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await bench.begin(engine, bench.sleeper())
        await bench.started(attempt)
        await bench.near.kill_agent()
        shutil.rmtree(bench.folder(attempt))
        last = await bench.last(attempt)
        assert isinstance(last, Lost)
        assert "records in it, is gone" in last.reason
        assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)

    bench.run(scenario)


@pytest.mark.parametrize("is_lost", [True, False], ids=["node", "agent"])
def test_a_seat_that_an_agent_was_killed_before_it_gave_up_is_given_up(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch, *, is_lost: bool
) -> None:
    def let_go(_: str) -> None:
        raise RayError("the cluster cannot be asked now")

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(reservations, "let_go", let_go)
            await bench.outcome(engine, bench.attempt("def task(config): pass"))
            await bench.near.kill_agent()
        if is_lost:
            bench.lost()
        await until(lambda: not bench.near.seats)

    bench.run(scenario)


def test_a_seat_of_which_nothing_is_known_is_given_up_by_whoever_drives_next(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(seat: Reservation, _: float) -> tuple[int, ...]:
        bench.near.seats.add(seat.name)
        bench.near.is_cut_off = True
        raise RayError("the link broke")

    async def scenario(engine: Engine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(bench.near, "take_seat", cut_off)
            attempt = await bench.begin(engine, bench.sleeper())
            await until(lambda: bench.near.is_cut_off)
            await asyncio.sleep(0.1)
            await engine.close()
        bench.near.is_cut_off = False
        other = bench.made()
        await other.open(bench._saw)
        if not any(
            isinstance(each, NeverStarted) for each in bench.seen
        ):  # else it is not asked after
            await other.recover(attempt)
        assert isinstance(await bench.last(attempt), NeverStarted)
        await until(lambda: not bench.near.seats)
        await other.close()

    bench.run(scenario)


def test_the_time_of_a_job_ends_though_its_seat_cannot_be_given_up(
    bench: NearBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(*_: object) -> tuple[int, ...]:
        bench.near.is_cut_off = True
        raise RayError("the link broke")

    async def scenario(engine: Engine) -> None:
        monkeypatch.setattr(bench.near, "take_seat", cut_off)
        attempt = bench.attempt("def task(config): pass", timeout=1)
        await bench.start(engine, attempt)
        assert isinstance(await bench.last(attempt), NeverStarted)
        assert bench.near.is_cut_off

    bench.run(scenario)


ODD: list[dict[str, object]] = [
    {"end_ns": "x"}, {"exit_code": 1 << 40}, {"ending": "over"}, {"message": 1}, {"start_ns": -1},
    {"hints": "words"}, {"measures": None}, {"has_result": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("changed", ODD, ids=[next(iter(each)) for each in ODD])
def test_what_a_node_tells_and_what_cannot_be_is_a_lost_attempt(
    bench: NearBench, changed: dict[str, object]
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = bench.sleeper()
        job_id = await bench.start(engine, attempt)
        await bench.printed(attempt, "pid")
        assert bench.near.agent is not None
        end = Ended(job_id, 1, Ending.EXITED, 1, 2, 0, None, None, False)
        bench.near.agent._keep(replace(end, **changed))  # type: ignore[arg-type]  # that is what is tried
        last = await bench.last(attempt)
        assert isinstance(last, Lost)
        assert last.reason.startswith("its node sent an invalid observation: ")
        bench.near.agent._engine.stop(job_id)
        await until(lambda: job_id not in bench.near.agent._live)  # type: ignore[union-attr]  # it is there

    bench.run(scenario)


def test_a_result_that_a_node_tells_and_that_is_none_is_left_out(bench: NearBench) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = bench.sleeper()
        job_id = await bench.start(engine, attempt)
        await bench.printed(attempt, "pid")
        assert bench.near.agent is not None
        now = time.time_ns()
        lie = Ended(job_id, 1, Ending.EXITED, now, now, 0, None, float("nan"), True)
        bench.near.agent._keep(Waits(job_id, 1, "\ud800" * 999))
        bench.near.agent._keep(lie)
        last = await bench.ended(attempt)
        assert (last.has_result, last.result) == (False, None)
        assert "not JSON" in (last.message or "")
        assert all(len(words) <= 500 and words.encode() for words in bench.waits)
        bench.go()
        await until(lambda: job_id not in bench.near.agent._live)  # type: ignore[union-attr]  # it is there

    bench.run(scenario)
