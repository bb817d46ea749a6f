"""The life cycle as a state machine: the real store and the real dispatcher on a scripted engine.
The operator crashes between any two steps, and in the middle of a commit. A model beside them knows
each answer that a client got.

`make chaos` runs it longer: CORTEX_MACHINE_EXAMPLES is the number of runs.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cortex.engines.base import Ended, Ending, Version
from cortex.errors import StorageUnavailable
from cortex.joblog.folders import JobFolders
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.versions import Versions, VersionUnusable
from cortex.operator.dispatch.dispatcher import Dispatcher
from cortex.operator.dispatch.jobs import Jobs
from cortex.projects.repository import Projects
from cortex.spec.api import ApiSpec, Compute, Definition, Limits, Networking
from cortex.spec.audit import UNKNOWN
from cortex.spec.job import JobRecord, JobSpec, shown_status
from cortex.spec.lifecycle import FINAL, State, Status
from cortex.spec.times import new_id, now_ns
from cortex.store import Replay, Store
from cortex.store import writer as store_writer
from unit.scripted_engine import Key, ScriptedEngine, World

MAX_ATTEMPTS = 3
FOLDERS = JobFolders(Path("/nonexistent"))
MAX_RUNNING = 2
RETRIES = {"free": 0, "tight": 2}
TIMEOUT_S = 300  # seconds of the stepped clock; no run takes as long in real time
CODES = {
    Ending.EXITED: [0, 1],
    Ending.OUT_OF_MEMORY: [-9],
    Ending.TIMED_OUT: [-15],
    Ending.STOPPED: [-15],
}


class ScriptedVersions(Versions):
    """Versions whose environments are ready, building or broken, as the test decides."""

    def __init__(self, store: Store, builds: dict[str, str]) -> None:
        nowhere = Path("/nonexistent")
        super().__init__(store, Projects(nowhere, nowhere), None)
        self.builds = builds  # by API: ready, building or broken
        self.build_changed = asyncio.Event()

    def _version(self, spec: ApiSpec) -> Version:
        return Version(spec, Path("/nonexistent"), Path("/nonexistent"), {})

    def ready(self, api_id: str) -> Version | None:
        spec = self._specs.get(api_id)
        if spec is None or self.builds[spec.name] != "ready":
            return None
        return self._version(spec)

    async def make_ready(self, api_id: str) -> Version:
        spec = await self.spec(api_id)
        while self.builds[spec.name] == "building":
            await self.build_changed.wait()
        if self.builds[spec.name] == "broken":
            raise VersionUnusable("the environment is broken", "it is broken\n")
        return self._version(spec)


class SteppedLoop(asyncio.SelectorEventLoop):
    """The test alone advances the clock of this loop, which makes a run repeatable."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s


@dataclass
class ClientView:
    """What a client knows of its job."""

    name: str
    timeout: int | None
    stopped: bool = False
    final: tuple[object, ...] | None = None


class OperatorMachine(RuleBasedStateMachine):
    """Each rule is an action of a client, of the engine, of the clock, or a crash."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SteppedLoop()
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"sqlite:///{self.folder.name}/operator.db"
        self.world = World()
        self.builds = {"free": "ready", "tight": "ready"}
        self.jobs: dict[str, ClientView] = {}
        self.deleted: set[str] = set()
        self.keys: dict[str, str] = {}
        self.time_has_passed = False  # then a waiting job may have timed out
        self.is_operator_up = False
        self.start_operator()
        self.run(self.store.deploy([self.spec("free", None), self.spec("tight", MAX_RUNNING)]))
        self.crash(None)

    # The operator

    def spec(self, name: str, most: int | None) -> ApiSpec:
        return ApiSpec(
            name=name,
            definition=Definition(path="task.py"),
            networking=Networking(endpoint=name),
            compute=Compute(),
            limits=Limits(max_running=most),
            retries=RETRIES[name],
            api_id=f"{name}-1",
            project_id="p",
            last_updated="2020-07-16T14:56:10.276007415Z",
        )

    def start_operator(self) -> None:
        async def main() -> None:
            self.store = Store(self.url)
            self.engine = ScriptedEngine(self.world, MAX_ATTEMPTS)
            self.versions = ScriptedVersions(self.store, self.builds)
            catalogue = Catalogue(self.store, others_deploy=False)
            await catalogue.refresh()
            self.dispatcher = Dispatcher(self.store, self.engine, self.versions, catalogue, FOLDERS)
            self.clients = Jobs(self.store, lambda: None, lambda: None)
            self.clients.begin_term(self.dispatcher)
            await self.engine.open(self.dispatcher.observe)
            for deployment in await self.store.deployments():
                await self.versions.spec(deployment.spec.api_id)
            await self.dispatcher.open()
            self.clients.dispatch_with(self.dispatcher)

        self.run(main())
        self.is_operator_up = True

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run the operator until the work is done, and then until the operator is idle."""
        result = self.loop.run_until_complete(work)
        self.loop.run_until_complete(self.until_idle())
        return result

    async def until_idle(self) -> None:
        """Wait until nothing changes any more. Each round advances every chain of writes by one."""
        states: list[object] = []
        while len(states) < 4 or any(each != states[-1] for each in states[-4:]):
            for _ in range(5):
                await asyncio.sleep(0)
            await self.store.ping()  # the store answers in order: earlier writes are done
            world = (sorted(self.world.ordered), sorted(self.world.running))
            states.append(
                (world, sorted(self.engine.ledger.taken), len(self.dispatcher.background))
            )
            assert len(states) < 1000, "the operator does not become idle"

    def crash(self, work: Coroutine[Any, Any, Any] | None, *, stored: bool = True) -> None:
        """The operator dies: in the middle of `work`, where that is given.

        Args:
            stored: whether the last write of `work` is stored.
        """
        writer = self.store._writer
        try:
            with pytest.MonkeyPatch.context() as patch:
                if work is not None:
                    patch.setattr(store_writer, "_deliver", lambda *_: None)
                    if not stored:
                        patch.setattr(writer, "_commit", lambda _: None)
                    task = self.loop.create_task(work)
                    task.add_done_callback(lambda t: t.cancelled() or t.exception())
                    self.loop.run_until_complete(_some_steps())
                writer.close()
        finally:  # also where the test is interrupted: nothing else ends a task that waits for ever
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(_some_steps())
        self.loop.run_until_complete(self.dispatcher.close())
        self.loop.run_until_complete(self.engine.close())
        self.store._engine.dispose()
        self.start_operator()
        # A submit without an answer may still have been stored.
        for name in ("free", "tight"):
            page = self.run(self.store.list_jobs(name, limit=1000))
            for record in page.jobs:
                self.jobs.setdefault(record.spec.job_id, ClientView(name, record.spec.timeout))

    # Clients

    def draft(self, name: str, timeout: int | None) -> JobSpec:
        return JobSpec(
            job_id=new_id(), api_name=name, api_id="", config="{}", timeout=timeout,
            created_ns=now_ns(),
        )  # fmt: skip

    @rule(
        name=st.sampled_from(["free", "tight"]),
        timeout=st.sampled_from([None, None, TIMEOUT_S]),
        key=st.sampled_from([None, None, "a", "b"]),
    )
    def submit(self, name: str, timeout: int | None, key: str | None) -> None:
        if name in self.deleted:
            return
        replay = None if key is None else Replay(key, "same")
        record = self.run(self.clients.submit(self.draft(name, timeout), replay))
        job_id = record.spec.job_id
        first_id = self.keys.setdefault(f"{name} {key}", job_id) if key else job_id
        assert job_id == first_id, "one key is one job"
        self.jobs.setdefault(job_id, ClientView(name, record.spec.timeout))

    @rule(stored=st.booleans(), name=st.sampled_from(["free", "tight"]))
    def crash_in_a_submit(self, stored: bool, name: str) -> None:
        if name not in self.deleted:
            self.crash(self.clients.submit(self.draft(name, None), None), stored=stored)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        outcome = self.run(self.clients.stop(job_id, UNKNOWN))
        view = self.jobs[job_id]
        if outcome.taken:
            assert view.final is None or view.stopped
            view.stopped = True
        else:
            assert view.stopped or shown_status(outcome.job) is not Status.RUNNING

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), stored=st.booleans())
    def crash_in_a_stop(self, data: st.DataObject, stored: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.crash(self.clients.stop(job_id, UNKNOWN), stored=stored)
        # The client got no answer and reads the job. The status that it reads then is final.
        if shown_status(self.record(job_id)) is Status.STOPPED:
            self.jobs[job_id].stopped = True

    @precondition(lambda self: len(self.deleted) < 1)
    @rule(name=st.sampled_from(["free", "tight"]), rare=st.integers(0, 7))
    def delete(self, name: str, rare: int) -> None:
        if rare:
            return
        for record in self.run(self.store.undeploy(name, "deleted")):
            self.clients.stop_stored(record)
            self.jobs[record.spec.job_id].stopped = True
        self.deleted.add(name)

    # The engine

    def pick(self, data: st.DataObject, among: dict[Key, Any]) -> Key | None:
        return data.draw(st.sampled_from(sorted(among))) if among else None

    @precondition(lambda self: self.world.ordered)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.act(self.engine.begin, self.pick(data, self.world.ordered))

    @precondition(lambda self: self.world.ordered)
    @rule(data=st.data())
    def never_start(self, data: st.DataObject) -> None:
        self.act(self.engine.never_start, self.pick(data, self.world.ordered))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), rare=st.integers(0, 3))
    def end(self, data: st.DataObject, rare: int) -> None:
        key = self.pick(data, self.world.running)
        assert key is not None
        endings = [Ending.EXITED, Ending.OUT_OF_MEMORY]
        if self.jobs[key[0]].timeout is not None:
            endings.append(Ending.TIMED_OUT)
        if key[0] in self.world.stop_requested or rare == 0:  # or by another process
            endings.append(Ending.STOPPED)
        ending = data.draw(st.sampled_from(endings))
        self.act(self.engine.end, key, ending, data.draw(st.sampled_from(CODES[ending])))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.act(self.engine.lose, self.pick(data, self.world.running))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def become_unreachable(self, data: st.DataObject) -> None:
        self.act(self.engine.make_unreachable, self.pick(data, self.world.running))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def become_reachable(self, data: st.DataObject) -> None:
        self.act(self.engine.make_reachable, self.pick(data, self.world.running))

    @rule(index=st.integers(0, 1000))
    def repeat_an_observation(self, index: int) -> None:
        self.act(self.engine.repeat, index)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), stored=st.booleans())
    def crash_in_a_report(self, data: st.DataObject, stored: bool) -> None:
        key = self.pick(data, self.world.running)

        async def report() -> None:
            assert key is not None
            self.engine.end(key, Ending.EXITED, 0)
            await asyncio.Event().wait()

        self.crash(report(), stored=stored)

    def act(self, action: Any, *arguments: Any) -> None:
        async def main() -> None:
            action(*arguments)

        self.run(main())

    # The clock, environments, crashes

    @rule()
    def advance_clock(self) -> None:
        self.time_has_passed = True
        # More than the timeout, and more than any pause between attempts.
        self.loop.now_s += 2 * TIMEOUT_S
        self.run(asyncio.sleep(0))

    @rule(
        name=st.sampled_from(["free", "tight"]),
        build=st.sampled_from(["ready", "ready", "building", "broken"]),
    )
    def build(self, name: str, build: str) -> None:
        self.builds[name] = build

        async def main() -> None:
            self.versions.build_changed.set()
            self.versions.build_changed = asyncio.Event()

        self.run(main())

    @rule()
    def crash_between_steps(self) -> None:
        self.crash(None)

    # Invariants

    def record(self, job_id: str) -> JobRecord:
        record = self.loop.run_until_complete(self.store.job(job_id))
        assert record is not None, "an acknowledged job exists"
        return record

    @invariant()
    def every_answer_holds(self) -> None:
        if not self.is_operator_up:
            return
        for job_id, view in self.jobs.items():
            record = self.record(job_id)
            status = shown_status(record)
            if view.stopped:
                assert status is Status.STOPPED, "an acknowledged stop is final"
            if status is Status.RUNNING:
                assert view.final is None, "a final status never changes"
                continue
            answer = (status, record.start_ns, record.end_ns, record.message)
            assert view.final in (None, answer), "a final status never changes"
            view.final = answer
            assert status in self.possible_statuses(job_id, view), (
                status,
                self.possible_statuses(job_id, view),
            )
            start = record.start_ns or record.spec.created_ns
            assert record.end_ns is not None
            assert record.spec.created_ns <= start <= record.end_ns

    def possible_statuses(self, job_id: str, view: ClientView) -> set[Status]:
        if view.stopped:
            return {Status.STOPPED}
        ends = [self.world.ended[key] for key in sorted(self.world.ended) if key[0] == job_id]
        losses = len(self.losses(job_id))
        if losses == len(ends) <= RETRIES[view.name]:  # it waits for its first attempt, or another
            statuses = {Status.UNEXPECTED_ERROR}  # its environment is broken
            if view.timeout is not None and self.time_has_passed:
                statuses.add(Status.TIMED_OUT)
            return statuses
        last = ends[-1]
        if not isinstance(last, Ended):
            return {Status.UNEXPECTED_ERROR}
        return {
            Ending.EXITED: {Status.SUCCEEDED if last.exit_code == 0 else Status.WORKER_ERROR},
            Ending.OUT_OF_MEMORY: {Status.WORKER_OOM},
            Ending.TIMED_OUT: {Status.TIMED_OUT},
            Ending.STOPPED: {Status.STOPPED, Status.UNEXPECTED_ERROR},
        }[last.ending]

    def losses(self, job_id: str) -> list[Key]:
        """The attempts that the platform failed."""
        return [
            key
            for key, last in self.world.ended.items()
            if key[0] == job_id and (not isinstance(last, Ended) or last.ending is Ending.STOPPED)
        ]

    @invariant()
    def code_starts_once_in_an_attempt(self) -> None:
        assert all(count == 1 for count in self.world.start_counts.values())

    @invariant()
    def code_starts_again_only_after_a_loss_and_within_the_retries(self) -> None:
        starts = Counter(job_id for job_id, _ in self.world.start_counts)
        for job_id, count in starts.items():
            assert count <= 1 + len(self.losses(job_id))
            assert count <= 1 + RETRIES[self.jobs[job_id].name]

    @invariant()
    def each_attempt_knows_how_many_were_lost_before(self) -> None:
        for (job_id, number), attempt in self.world.ordered.items():
            earlier = [key for key in self.losses(job_id) if key[1] < number]
            assert attempt.losses == len(earlier)
            assert (attempt.lost is None) == (not earlier)

    @invariant()
    def no_more_jobs_run_than_allowed(self) -> None:
        attempts = [*self.world.ordered, *self.world.running]
        in_flight = {key[0] for key in attempts}
        assert len(attempts) == len(in_flight), "one attempt of a job at a time"
        assert len(in_flight) <= MAX_ATTEMPTS
        assert self.engine.ledger.taken == in_flight, "capacity is reserved for these jobs alone"
        tight = [job for job in in_flight if self.jobs[job].name == "tight"]
        assert len(tight) <= MAX_RUNNING
        stopped = {job for job in in_flight if self.jobs[job].stopped}
        assert stopped <= self.engine.stop_requested, "a stop is carried out, also after a crash"

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.store.close()
            self.loop.run_until_complete(self.dispatcher.close())
            self.loop.close()
            self.folder.cleanup()

    def finish(self) -> None:
        """End every attempt: each job reaches one final status, and all capacity is free."""
        for name in self.builds:
            self.build(name, "ready")
        for _ in range(20 + 4 * len(self.jobs)):
            for key in list(self.world.ordered):
                self.act(self.engine.begin, key)
            for key in list(self.world.running):
                self.act(self.engine.end, key, Ending.EXITED, 0)
            self.advance_clock()
            if all(self.record(job).state in FINAL for job in self.jobs):
                break
        self.every_answer_holds()
        for job_id, view in self.jobs.items():
            assert view.final is not None, (view, self.record(job_id))
            assert self.record(job_id).state in FINAL
            assert self.clients.find(job_id) is None
        assert self.engine.ledger.taken == set(), "all capacity is given back"


async def _some_steps() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_every_answer_to_a_client_holds_in_any_order_of_events() -> None:
    examples = int(os.environ.get("CORTEX_MACHINE_EXAMPLES", "15"))
    run_state_machine_as_test(
        OperatorMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            # Each step is a real commit: slow, and worth it.
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


@pytest.fixture
def machine() -> Iterator[OperatorMachine]:
    """The same machine, whose steps a test chooses; at the teardown every job has ended."""
    made = OperatorMachine()
    try:
        yield made
    finally:
        made.teardown()


def test_an_end_is_stored_when_the_store_takes_writes_again(
    machine: OperatorMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.submit("free", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    real = machine.store.apply
    refusals = 3

    async def refuse(*arguments: Any) -> Any:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StorageUnavailable("the store accepts no writes now")
        return await real(*arguments)

    monkeypatch.setattr(machine.store, "apply", refuse)
    machine.act(machine.engine.end, key, Ending.EXITED, 0)
    assert shown_status(machine.record(key[0])) is Status.RUNNING
    for _ in range(6):
        machine.advance_clock()
    assert shown_status(machine.record(key[0])) is Status.SUCCEEDED


def test_a_lost_attempt_is_reported_only_while_the_next_one_runs(machine: OperatorMachine) -> None:
    machine.submit("tight", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    machine.advance_clock()
    machine.act(machine.engine.lose, key)
    (second,) = machine.world.ordered
    assert second == (key[0], 2)
    machine.act(machine.engine.begin, second)
    machine.advance_clock()
    record = machine.record(key[0])
    assert (record.state, record.message) == (State.RUNNING, "attempt 1 was lost: lost")
    assert record.start_ns == machine.world.running[second].start_ns
    machine.act(machine.engine.end, second, Ending.EXITED, 0)
    record = machine.record(key[0])
    assert (shown_status(record), record.message, record.losses) == (Status.SUCCEEDED, None, 1)


def test_a_late_observation_of_an_earlier_attempt_changes_nothing(machine: OperatorMachine) -> None:
    machine.submit("tight", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    machine.build("tight", "building")
    machine.act(machine.engine.lose, key)
    assert machine.record(key[0]).state is State.WAITING
    for index in range(len(machine.engine.observations)):
        machine.repeat_an_observation(index)
    assert machine.record(key[0]).state is State.WAITING
    machine.build("tight", "ready")
    assert list(machine.world.ordered) == [(key[0], 2)]


def test_a_start_is_stored_although_the_attempt_becomes_unreachable(
    machine: OperatorMachine,
) -> None:
    machine.submit("free", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    machine.act(machine.engine.make_unreachable, key)
    machine.act(machine.engine.make_reachable, key)
    machine.advance_clock()
    assert machine.record(key[0]).state is State.RUNNING
