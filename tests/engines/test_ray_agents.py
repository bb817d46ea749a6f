"""The promises that the Ray engine and the agents of nodes make each other, whatever arrives
late, fails or is lost between them: on a node without Ray (`ray`)."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import RayError

from cortex.engines.base import (
    Attempt,
    Capacity,
    Ended,
    Ending,
    Engine,
    Lost,
    NeverStarted,
    Reachable,
    Unreachable,
    Waits,
)
from cortex.engines.ray import RayEngine
from cortex.engines.ray import cluster as ray_cluster
from cortex.engines.ray.log_copies import LogCopies
from cortex.engines.ray.messages import Builds, NodeOrder, Wanted
from cortex.engines.ray.tracked import TrackedAttempt
from cortex.joblog import watch
from cortex.joblog.folders import JobFolders
from cortex.projects.pack import pack_stored
from cortex.ray_node import agent, guard
from cortex.spec.api import Compute
from cortex.worker import processes
from engines.engine_harness import LIMIT_S, until
from engines.in_process_ray import STATE, InProcessHarness, in_process_harness, ready

FULL = OSError(errno.ENOSPC, "No space left on device")
PRINTS_LINES = """
    import os, time
    def task(config):
        while not os.path.exists(config["file"] + ".go"):
            print("line", flush=True)
            time.sleep(0.01)
"""

PRINTS_ATTEMPT = """
    import glob, os
    def task(config):
        print("attempt", len(glob.glob(os.environ["CORTEX_JOB_DIR"] + "/../start.*")), flush=True)
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcessHarness]:
    with in_process_harness(tmp_path, monkeypatch) as made:
        yield made


def test_a_node_without_cpu_gets_no_agent_and_no_job(harness: InProcessHarness) -> None:
    """A head or an operator's machine with `--num-cpus=0`, which may have memory and GPUs."""
    bare = replace(STATE, node_id="node-b", name="b", total=Capacity(0, 64 << 30, 4))
    harness.ray.states = [bare, STATE]

    async def scenario(engine: Engine) -> None:
        await harness.outcome(engine, harness.attempt("def task(config): pass"))
        polls = harness.ray.calls.count("poll")
        await until(lambda: harness.ray.calls.count("poll") > polls)
        assert set(harness.ray.called_nodes) == {STATE.node_id}
        assert [node.name for node in engine.ledger.nodes()] == [STATE.name]
        assert engine.capabilities.total == STATE.total
        assert engine.ledger.refusal(Compute(gpu=1)) == "needs 1 GPU, the largest node has 0"
        # A node in use is lost when Ray says so, whatever its figures.
        harness.ray.states = [bare, replace(STATE, total=Capacity(0, 0, 0))]
        await until(lambda: engine.ledger.nodes()[0].total.cpu_m == 0)

    harness.run(scenario)


def test_where_no_node_has_cpu_jobs_wait_for_one(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.lose_node()
        harness.ray.states.append(replace(STATE, node_id="b", total=Capacity(0, 64 << 30, 4)))
        await until(lambda: not engine.ledger.nodes())
        assert engine.ledger.refusal(Compute()) is None
        assert engine.ledger.reserve("job", Compute()) == (
            "waits for a node: the cluster has none now"
        )

    harness.run(scenario)


def test_a_refusal_is_certain_only_where_the_cluster_is_known_and_cannot_grow(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        def may_grow() -> bool:
            return engine.capabilities.may_grow

        huge = Compute(gpu=9)
        assert engine.ledger.refusal(huge) is not None
        assert not may_grow()
        harness.ray.is_cut_off = True
        await until(may_grow)
        harness.ray.is_cut_off = False
        await until(lambda: not may_grow())

    harness.run(scenario)


def test_a_cluster_with_an_autoscaler_refuses_nothing(harness: InProcessHarness) -> None:
    harness.has_autoscaler = True

    async def scenario(engine: Engine) -> None:
        assert engine.ledger.refusal(Compute(gpu=9)) is None

    harness.run(scenario)


def test_no_refusal_is_certain_without_a_node(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.lose_node()
        await until(lambda: not engine.ledger.nodes())
        assert engine.ledger.refusal(Compute(gpu=9)) == "needs 9 GPUs, the largest node has 0"
        assert engine.capabilities.may_grow

    harness.run(scenario)


def test_a_log_belongs_to_its_own_attempt_while_the_next_is_about_to_begin(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        printer = harness.attempt(
            PRINTS_LINES, config={"file": str(harness.marker)}, path="printer.py"
        )
        attempt = harness.attempt(PRINTS_ATTEMPT)
        await harness.outcome(engine, attempt)
        await harness.start(engine, printer)
        await harness.printed(printer, "line")

        async def wait_for_polls() -> None:
            polls = harness.ray.calls.count("poll")
            await until(lambda: harness.ray.calls.count("poll") > polls + 2)

        harness.ray.before_call["start"] = wait_for_polls
        second = await harness.start_attempt(engine, attempt, 2)
        await harness.ended(second)
        assert harness.log(attempt) == "attempt 1\nattempt 2\n"
        harness.finish_sleeper()
        await harness.ended(printer)

    harness.run(scenario)


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EMFILE])
def test_an_attempt_that_never_starts_adds_nothing_to_the_log(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch, error_number: int
) -> None:
    async def build(*_: object) -> Path:
        raise OSError(error_number, os.strerror(error_number))

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): print('hello')")
        await harness.outcome(engine, attempt)
        assert harness.ray.agent is not None
        with monkeypatch.context() as patched:
            patched.setattr(harness.ray.agent._provisions, "build", build)
            second = await harness.start_attempt(engine, attempt, 2)
            assert isinstance(await harness.final(second), NeverStarted)
        assert harness.log(attempt) == "hello\n"
        await harness.ended(await harness.start_attempt(engine, attempt, 3))
        assert harness.log(attempt) == "hello\nhello\n"

    harness.run(scenario)


def test_the_resolvers_output_follows_the_log_of_an_earlier_attempt(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): print('hello')")
        await harness.outcome(engine, attempt)
        shutil.rmtree(harness.agent_folder / "environments")
        project = harness.agent_folder / "projects" / attempt.version.api.project_id
        (project / "requirements.txt").write_text("./missing.whl\n")
        second = await harness.start_attempt(engine, attempt, 2)
        assert isinstance(await harness.final(second), Lost)
        log = harness.log(attempt)
        assert log.count("hello") == 1
        assert "missing.whl" in log

    harness.run(scenario)


def test_a_node_builds_by_the_rules_of_the_operator(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAMED", "yes")

    async def scenario(engine: Engine) -> None:
        assert isinstance(engine, RayEngine)
        engine._attempts._calls._builds = Builds(0.001, frozenset({"NAMED"}))
        attempt = harness.attempt("def task(config): pass")
        lost = await harness.final(await harness.start_attempt(engine, attempt))
        assert isinstance(lost, Lost)
        assert lost.is_final
        assert "not built within 0.001 s" in lost.reason
        assert harness.ray.agent is not None
        rules = harness.ray.agent._provisions._environments.rules
        inherited = rules.inherited(os.environ, is_own_user=True)
        assert inherited["NAMED"] == "yes"

    harness.run(scenario)


def test_a_log_copy_that_a_full_disk_prevented_is_complete_once_there_is_room(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        first = harness.sleeper()
        JobFolders(harness.root).append_to_log(first.spec.job_id, "of an earlier attempt")
        attempt = await harness.start_attempt(engine, first)
        await harness.number_in_log(first, "pid")
        await engine.close()
        size = len(harness.log(first))
        shutil.rmtree(harness.root)

        def resume(*_: object) -> None:
            raise FULL

        other = harness.new_engine()
        await other.open(harness.report)
        await ready(other)
        with monkeypatch.context() as patched:
            patched.setattr(LogCopies, "resume", resume)
            await other.recover(attempt)
        harness.finish_sleeper()
        await harness.ended(attempt)
        assert [node.problem for node in other.ledger.nodes()] == [None]
        log = harness.log(first)
        assert len(log) == size
        assert log.startswith("[cortex: ")
        assert "pid" in log
        await other.close()

    harness.run(scenario)


def test_a_job_waits_while_its_lock_files_cannot_be_read(harness: InProcessHarness) -> None:
    class Locks:
        def locks(self, _: str) -> dict[str, str]:
            raise FULL

        def known_locks(self, _: str) -> None:
            """None: `locks` has to be called."""

        def save_lockfile_if_absent(self, *_: str) -> None:
            """Save no lock file."""

    harness.locks = Locks()

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): pass")
        await harness.start(engine, attempt)
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert "No space left" in str(final.held_up_by)

    harness.run(scenario)


def test_a_recovery_for_which_no_thread_can_be_started_is_retried(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RuntimeError("can't start new thread")] * 2
    end = agent._ended

    def fail_twice(folder: Path, number: int) -> bool:
        if failures:
            raise failures.pop()
        return end(folder, number)

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        monkeypatch.setattr(agent, "_ended", fail_twice)
        shutil.rmtree(harness.agent_folder / "jobs" / attempt.spec.job_id)
        await harness.ray.kill_agent()
        assert isinstance(await harness.final(attempt), Lost)
        assert failures == []

    harness.run(scenario)


def test_a_superseded_operator_takes_no_observation_from_the_leader(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        harness.observations.clear()
        other = harness.new_engine()
        observations: list[object] = []
        await other.open(observations.append)
        await ready(other)
        await other.recover(attempt)
        await until(lambda: observations)
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: any(isinstance(each, Ended) for each in observations))
        await other.close()

    for _ in range(5):
        harness.run(scenario)
        Path(f"{harness.marker}.go").unlink()


def test_logs_are_copied_also_without_inotify(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inotify() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(watch, "Inotify", inotify)

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.printed(attempt, "pid")
        harness.finish_sleeper()
        await harness.ended(attempt)

    harness.run(scenario)


def test_a_node_lost_during_the_transfer_of_a_project_loses_no_job(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()

        async def lose_node() -> None:
            harness.lose_node()
            await harness.final(attempt)

        harness.ray.before_call["receive_project"] = lose_node
        await harness.start(engine, attempt)
        assert isinstance(await harness.final(attempt), NeverStarted)

    harness.run(scenario)
    assert not harness.marker.exists()


def test_a_stop_during_the_transfer_of_a_project_starts_nothing(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()

        async def stop() -> None:
            engine.stop(attempt.spec.job_id)

        harness.ray.before_call["receive_project"] = stop
        await harness.start(engine, attempt)
        assert isinstance(await harness.final(attempt), NeverStarted)
        assert harness.ray.calls.count("start") == 1

    harness.run(scenario)


def test_an_order_abandoned_during_its_build_blocks_no_later_order(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt, may_finish = harness.sleeper(), asyncio.Event()
        job_id, api = attempt.spec.job_id, attempt.version.api
        assert engine.ledger.reserve(job_id, api.compute) is None
        attempt = replace(attempt, handle=engine.claim(job_id, 1))
        orders = [
            TrackedAttempt.of(replace(attempt, number=number)).node_order(5) for number in (1, 2, 3)
        ]
        agent = harness.ray.agent
        assert agent is not None
        archive = io.BytesIO()
        pack_stored(harness.project, archive)
        archive.seek(0)
        agent._provisions.store_project(api.project_id, archive)
        build = agent._provisions.build

        async def slow(order: NodeOrder, report_phase: Callable[[str], None]) -> Path:
            python = await build(order, report_phase)
            if order.number == 1:
                await may_finish.wait()
            return python

        monkeypatch.setattr(agent._provisions, "build", slow)
        hello = await agent.hello()
        await agent.start(orders[0])
        late = agent._building[job_id]
        await agent.recover(orders[1])  # no report of the first order has reached the operator
        await agent.start(orders[2])
        log = harness.folder(attempt) / "log"
        await until(lambda: log.exists() and "pid" in log.read_text())
        may_finish.set()
        await asyncio.gather(late, return_exceptions=True)
        assert "pid" in log.read_text()
        harness.finish_sleeper()
        observations: list[object] = []
        seq = hello.seq
        while not any(isinstance(each, Ended) and each.attempt == 3 for each in observations):
            polled = agent.poll(hello.incarnation, seq, {}, LIMIT_S)
            poll = await asyncio.wait_for(polled, 2 * LIMIT_S)
            assert poll.seq > seq, observations
            observations, seq = [*observations, *poll.seen], poll.seq
        engine.ledger.release(job_id)

    harness.run(scenario)
    assert harness.marker.read_text() == "ran\n"


def test_the_next_agent_removes_a_partial_upload(
    harness: InProcessHarness,
) -> None:
    part = harness.agent_folder / "projects" / ".incoming-cut-off"
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
    guard.end_all(harness.agent_folder / "jobs")
    assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)


def test_a_killed_agent_is_replaced(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        await harness.ray.kill_agent()
        await harness.observed(attempt, Reachable)
        harness.finish_sleeper()
        await harness.ended(attempt)

    harness.run(scenario)


def test_a_job_whose_folder_was_removed_with_its_records_is_lost_and_ended(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        await harness.ray.kill_agent()
        shutil.rmtree(harness.folder(attempt))
        final = await harness.final(attempt)
        assert isinstance(final, Lost)
        assert "records in it, is gone" in final.reason
        assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)

    harness.run(scenario)


INVALID: list[dict[str, object]] = [
    {"end_ns": "x"}, {"exit_code": 1 << 40}, {"ending": "over"}, {"message": 1}, {"start_ns": -1},
    {"hints": "words"}, {"measures": None}, {"has_result": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("changed", INVALID, ids=[next(iter(each)) for each in INVALID])
def test_an_impossible_report_of_a_node_is_a_lost_attempt(
    harness: InProcessHarness, changed: dict[str, object]
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()
        job_id = await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        assert harness.ray.agent is not None
        end = Ended(job_id, 1, Ending.EXITED, 1, 2, 0, None, None, False)
        harness.ray.agent._add_to_outbox(replace(end, **changed))  # type: ignore[arg-type]  # the test forges it
        final = await harness.final(attempt)
        assert isinstance(final, Lost)
        assert final.reason.startswith("its node sent an invalid observation: ")
        harness.ray.agent._engine.stop(job_id)
        await until(lambda: job_id not in harness.ray.agent._orders)  # type: ignore[union-attr]  # the agent exists

    harness.run(scenario)


def test_an_invalid_result_that_a_node_reports_is_dropped(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()
        job_id = await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        assert harness.ray.agent is not None
        now = time.time_ns()
        forged = Ended(job_id, 1, Ending.EXITED, now, now, 0, None, float("nan"), True)
        harness.ray.agent._add_to_outbox(Waits(job_id, 1, "\ud800" * 999))
        harness.ray.agent._add_to_outbox(forged)
        last = await harness.ended(attempt)
        assert (last.has_result, last.result) == (False, None)
        assert "not JSON" in (last.message or "")
        assert all(len(reason) <= 500 and reason.encode() for reason in harness.wait_reasons)
        harness.finish_sleeper()
        await until(lambda: job_id not in harness.ray.agent._orders)  # type: ignore[union-attr]  # the agent exists

    harness.run(scenario)


IGNORES_SIGTERM = """
    import os, signal, time
    def task(config):
        signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
        print("asleep", os.getpid(), flush=True)
        while not os.path.exists(config["file"] + ".go"):
            time.sleep(0.01)
        print("rested", flush=True)
"""


@pytest.mark.parametrize("left_s", [0, 5, 8])
def test_a_drain_stops_its_jobs_in_time_and_the_platform_failed_them(
    harness: InProcessHarness, left_s: float
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        harness.drain_node(left_s)
        final = await harness.final(attempt)
        assert final == Lost(attempt.spec.job_id, 1, "the node a is being drained")
        assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)

    harness.run(scenario)


def test_a_job_that_is_killed_before_its_supervisor_knows_of_the_drain_is_lost(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        assert harness.ray.agent is not None
        # The kill comes first.
        monkeypatch.setattr(harness.ray.agent._engine, "stop", lambda _: None)
        harness.drain_node(0)
        final = await harness.final(attempt)
        assert final == Lost(attempt.spec.job_id, 1, "the node a is being drained")

    harness.run(scenario)


def test_a_job_that_ignores_the_sigterm_of_a_drain_is_killed_before_the_node_ends(
    harness: InProcessHarness,
) -> None:
    harness.grace_s = 600

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(IGNORES_SIGTERM, config={"file": str(harness.marker)})
        attempt = await harness.start_attempt(engine, attempt)
        await harness.printed(attempt, "asleep")
        harness.drain_node(7)
        assert isinstance(await harness.final(attempt), Lost)
        assert "told" in harness.log(attempt)
        assert not processes.with_variable("CORTEX_JOB_ID", attempt.spec.job_id)

    harness.run(scenario)


@pytest.mark.parametrize("left_s", [None, 3600])
def test_a_job_may_end_by_itself_while_the_drain_of_its_node_leaves_time(
    harness: InProcessHarness, left_s: float | None
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(IGNORES_SIGTERM, config={"file": str(harness.marker)})
        attempt = await harness.start_attempt(engine, attempt)
        await harness.printed(attempt, "asleep")
        harness.drain_node(left_s)
        await until(lambda: not engine.ledger.nodes()[0].is_ready)
        assert str(engine.ledger.nodes()[0].problem).startswith("it is being drained")
        wanted = attempt.version.api.compute
        assert "being drained" in str(engine.ledger.reserve("another", wanted))
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).ending is Ending.EXITED
        assert "told" not in harness.log(attempt)

    harness.run(scenario)


def test_a_job_that_a_user_stops_during_a_drain_is_stopped(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        harness.drain_node(None)
        await until(lambda: not engine.ledger.nodes()[0].is_ready)
        engine.stop(attempt.spec.job_id)
        assert (await harness.ended(attempt)).ending is Ending.STOPPED

    harness.run(scenario)


def test_a_drain_is_carried_out_by_the_next_operator(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        await engine.close()
        harness.drain_node(harness.grace_s)
        other = harness.new_engine()
        await other.open(harness.report)
        await other.recover(attempt)
        final = await harness.final(attempt)
        assert final == Lost(attempt.spec.job_id, 1, "the node a is being drained")
        await other.close()

    harness.run(scenario)


def test_a_drain_between_placement_and_start_starts_nothing(harness: InProcessHarness) -> None:
    class Locks:
        def locks(self, identity: str) -> dict[str, str]:
            harness.drain_node(None)
            assert is_drained.wait(LIMIT_S)  # the drain comes in between
            return {}

        def known_locks(self, _: str) -> None:
            """None: `locks` has to be called."""

    harness.locks, is_drained = Locks(), threading.Event()

    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await until(lambda: not engine.ledger.nodes()[0].is_ready)
        is_drained.set()
        final = await harness.final(attempt)
        assert isinstance(final, NeverStarted)
        assert final.held_up_by == "its node a is being drained"
        assert "start" not in harness.ray.calls

    harness.run(scenario)


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        ("received SIGTERM", "the node a was ended: received SIGTERM"),
        ("", "the node a was lost while it was being drained"),
    ],
)
def test_the_reason_of_a_loss_says_why_the_node_has_left(
    harness: InProcessHarness, death: str, reason: str
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        harness.drain_node(None)
        await until(lambda: not engine.ledger.nodes()[0].is_ready)
        harness.lose_node(death)
        assert await harness.final(attempt) == Lost(attempt.spec.job_id, 1, reason)
        harness.finish_sleeper()

    harness.run(scenario)


@pytest.fixture
def short_idle_times(harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with an autoscaler, where the agent of an idle node ends at once."""
    harness.has_autoscaler = True
    monkeypatch.setattr(ray_cluster, "AGENT_IDLE_S", 0.0)
    monkeypatch.setattr(ray_cluster, "POLL_TIMEOUT_S", 0.2)


@pytest.mark.usefixtures("short_idle_times")
def test_an_idle_node_has_no_agent_until_its_next_job(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        for number in range(3):
            await until(lambda: harness.ray.agent is None)
            (node,) = engine.ledger.nodes()
            assert (node.is_ready, node.problem) == (True, None)
            attempt = harness.attempt(f"def task(config): return {number}", path=f"{number}.py")
            assert (await harness.outcome(engine, attempt)).result == number
        assert not [each for each in harness.observations if isinstance(each, Unreachable)]

    harness.run(scenario)


@pytest.mark.parametrize("is_drained", [False, True])
def test_an_agent_releases_its_reservations_before_it_ends(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch, is_drained: bool
) -> None:
    harness.has_autoscaler = not is_drained
    monkeypatch.setattr(ray_cluster, "AGENT_IDLE_S", 0.0)
    monkeypatch.setattr(ray_cluster, "POLL_TIMEOUT_S", 0.2)
    left: list[int] = []
    end_agent = harness.ray.end_agent

    async def end_and_look(node_id: str) -> None:
        left.append(len(harness.ray.reservations))
        await end_agent(node_id)

    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await until(lambda: harness.ray.reservations)
        if is_drained:
            harness.drain_node(None)
            await until(lambda: not engine.ledger.nodes()[0].is_ready)
        monkeypatch.setattr(harness.ray, "end_agent", end_and_look)
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: left)
        assert left == [0]

    harness.run(scenario)


@pytest.mark.usefixtures("short_idle_times")
def test_an_attempt_that_is_recovered_wakes_its_node(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()
        job_id = attempt.spec.job_id
        assert engine.ledger.reserve(job_id, attempt.version.api.compute) is None
        attempt = replace(attempt, handle=engine.claim(job_id, attempt.number))
        await until(lambda: harness.ray.agent is None)
        await engine.recover(attempt)
        assert await harness.final(attempt) == NeverStarted(job_id, 1)

    harness.run(scenario)


@pytest.mark.usefixtures("short_idle_times")
def test_the_agent_of_a_suspect_node_stays_to_say_when_it_takes_jobs_again(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        assert isinstance(engine, RayEngine)
        engine._cluster.suspect("node-a", "its agent does not take orders")
        harness.finish_sleeper()
        await harness.ended(attempt)
        await until(lambda: not harness.ray.reservations)
        polls = harness.ray.calls.count("poll")
        await until(lambda: harness.ray.calls.count("poll") > polls + 5)
        assert harness.ray.agent is not None

    harness.run(scenario)


@pytest.mark.usefixtures("short_idle_times")
def test_the_agent_of_a_node_with_a_job_stays(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.started(attempt)
        polls = harness.ray.calls.count("poll")
        await until(lambda: harness.ray.calls.count("poll") > polls + 5)
        assert harness.ray.agent is not None
        harness.finish_sleeper()
        await harness.ended(attempt)

    harness.run(scenario)


@pytest.mark.usefixtures("short_idle_times")
def test_a_node_without_an_agent_removes_forgotten_jobs_with_its_next_job(
    harness: InProcessHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        first = harness.attempt("def task(config): return 1")
        await harness.outcome(engine, first)
        await until(lambda: harness.ray.agent is None)
        engine.forget(jobs=[first.spec.job_id])
        await asyncio.sleep(0.3)
        assert harness.ray.agent is None
        assert harness.folder(first).exists()
        await harness.outcome(engine, harness.attempt("def task(config): return 1"))
        await until(lambda: not harness.folder(first).exists())

    harness.run(scenario)


@pytest.mark.usefixtures("short_idle_times")
def test_a_start_while_the_agent_is_being_ended_waits_for_the_next_one(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_agent = harness.ray.end_agent
    attempts: list[Attempt] = []

    async def scenario(engine: Engine) -> None:
        async def start_meanwhile(node_id: str) -> None:
            if not attempts:
                attempts.append(harness.attempt("def task(config): return 1"))
                await harness.start(engine, attempts[0])
                await asyncio.sleep(0.2)  # it waits by then
            await end_agent(node_id)

        monkeypatch.setattr(harness.ray, "end_agent", start_meanwhile)
        await until(lambda: attempts)
        assert (await harness.ended(attempts[0])).result == 1
        assert len([each for each in harness.observations if isinstance(each, NeverStarted)]) == 0

    harness.run(scenario)


def test_a_drained_node_without_jobs_has_no_agent(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.drain_node(None)
        await until(lambda: harness.ray.agent is None)

    harness.run(scenario)


def test_a_loss_of_the_link_wakes_a_node(harness: InProcessHarness, short_idle_times: None) -> None:
    async def scenario(engine: Engine) -> None:
        await until(lambda: harness.ray.agent is None)
        harness.ray.is_cut_off = True
        await until(lambda: not engine.ledger.nodes()[0].is_ready)
        harness.ray.is_cut_off = False
        await ready(engine)
        attempt = harness.attempt("def task(config): return 1")
        assert (await harness.outcome(engine, attempt)).result == 1

    harness.run(scenario)


def test_the_autoscaler_knows_what_waits_until_it_waits_no_longer(
    harness: InProcessHarness,
) -> None:
    harness.has_autoscaler = True
    demands, failures = harness.ray.demands, harness.ray.demand_failures
    fits = Compute(cpu_m=4000)
    waits = Compute(cpu_m=500, mem=1 << 30, gpu=1, node_labels={"zone": ("b", "c")})
    wanted = (Wanted(Capacity(500, 1 << 30, 1), (("zone", ("b", "c")),)),)

    async def scenario(engine: Engine) -> None:
        failures.append(RayError("the cluster does not answer now"))
        engine.demand([fits, waits])
        await until(lambda: demands == [wanted])  # again, after the failure
        assert failures == []
        harness.ray.is_cut_off = True
        await until(lambda: not engine.ledger.nodes()[0].is_ready)
        harness.ray.is_cut_off = False
        await until(lambda: demands == [wanted, wanted])  # by the next driver
        other = replace(STATE, node_id="node-b", name="b")
        harness.ray.states = [STATE, other]
        await until(lambda: demands == [wanted] * 3)  # it names all nodes
        failures.append(RayError("the cluster does not answer now"))
        engine.demand([])
        await until(lambda: demands == [wanted, wanted, wanted, ()])  # again, as before
        assert failures == []
        harness.ray.states = [STATE]
        await until(lambda: len(engine.ledger.nodes()) == 1)
        await asyncio.sleep(1.5)
        assert len(demands) == 4

    harness.run(scenario)


def test_the_demand_of_a_large_cluster_is_short(
    harness: InProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.has_autoscaler = True
    monkeypatch.setattr(ray_cluster, "MAX_DEMAND", 3)

    async def scenario(engine: Engine) -> None:
        engine.demand([Compute(gpu=1)] * 5)
        await until(lambda: harness.ray.demands)
        assert harness.ray.demands == [(Wanted(Capacity(200, 0, 1)),) * 3]

    harness.run(scenario)


def test_without_an_autoscaler_there_is_no_demand(harness: InProcessHarness) -> None:
    async def scenario(engine: Engine) -> None:
        engine.demand([Compute(gpu=1)])
        await harness.outcome(engine, harness.attempt("def task(config): pass"))
        assert harness.ray.demands == []

    harness.run(scenario)
