"""The life cycle, checked by machine: the real store and the real dispatcher on a scripted engine, with a
crash of the operator between any two steps, and in the middle of a commit. A model beside them knows
what each client was told.

`make chaos` runs it long: CORTEX_MACHINE_EXAMPLES says how many runs.
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

ROOM = 3
FOLDERS = JobFolders(Path("/nonexistent"))
MOST_RUNNING = 2
RETRIES = {"free": 0, "tight": 2}
TIMEOUT = 300  # by the machine's clock; no run takes as long by the wall's
CODES = {
    Ending.EXITED: [0, 1],
    Ending.OUT_OF_MEMORY: [-9],
    Ending.TIMED_OUT: [-15],
    Ending.STOPPED: [-15],
}


class Environments(Versions):
    """Versions whose environments are ready when the test says so."""

    def __init__(self, store: Store, builds: dict[str, str]) -> None:
        nowhere = Path("/nonexistent")
        super().__init__(store, Projects(nowhere, nowhere), None)
        self.builds = builds  # of each API: ready, building or broken
        self.moved = asyncio.Event()

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
            await self.moved.wait()
        if self.builds[spec.name] == "broken":
            raise VersionUnusable("the environment is broken", "it is broken\n")
        return self._version(spec)


class SteppedLoop(asyncio.SelectorEventLoop):
    """Its clock goes on when it is told to, and not otherwise: a run can be repeated."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s


@dataclass
class Told:
    """What a client knows of its job."""

    name: str
    timeout: int | None
    stopped: bool = False
    final: tuple[object, ...] | None = None


class Machine(RuleBasedStateMachine):
    """Each rule is something that a client, an engine, the clock or fate does."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SteppedLoop()
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"sqlite:///{self.folder.name}/operator.db"
        self.world = World()
        self.builds = {"free": "ready", "tight": "ready"}
        self.jobs: dict[str, Told] = {}
        self.deleted: set[str] = set()
        self.keys: dict[str, str] = {}
        self.waited = False  # time has passed: what waits with a timeout may be over
        self.is_up = False
        self.up()
        self.do(self.store.deploy([self.spec("free", None), self.spec("tight", MOST_RUNNING)]))
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

    def up(self) -> None:
        async def main() -> None:
            self.store = Store(self.url)
            self.engine = ScriptedEngine(self.world, ROOM)
            self.versions = Environments(self.store, self.builds)
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

        self.do(main())
        self.is_up = True

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run the operator until this is done, and what follows from it has settled."""
        result = self.loop.run_until_complete(work)
        self.loop.run_until_complete(self.settled())
        return result

    async def settled(self) -> None:
        """Until nothing moves any more: each round carries every chain of writes on by one."""
        seen: list[object] = []
        while len(seen) < 4 or any(each != seen[-1] for each in seen[-4:]):
            for _ in range(5):
                await asyncio.sleep(0)
            await self.store.ping()  # a write is done when one that comes after it is
            world = (sorted(self.world.ordered), sorted(self.world.running))
            seen.append((world, sorted(self.engine.ledger.taken), len(self.dispatcher.background)))
            assert len(seen) < 1000, "it comes to no rest"

    def crash(self, work: Coroutine[Any, Any, Any] | None, *, stored: bool = True) -> None:
        """The operator dies; in the middle of some work, whose last write is stored, or is not."""
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
        finally:  # also where the test is broken off: nobody else holds a task that waits for ever
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(_some_steps())
        self.loop.run_until_complete(self.dispatcher.close())
        self.loop.run_until_complete(self.engine.close())
        self.store._engine.dispose()
        self.up()
        # A submit that was not answered may have been stored all the same.
        for name in ("free", "tight"):
            page = self.do(self.store.list_jobs(name, limit=1000))
            for record in page.jobs:
                self.jobs.setdefault(record.spec.job_id, Told(name, record.spec.timeout))

    # Clients

    def draft(self, name: str, timeout: int | None) -> JobSpec:
        return JobSpec(
            job_id=new_id(), api_name=name, api_id="", config="{}", timeout=timeout,
            created_ns=now_ns(),
        )  # fmt: skip

    @rule(
        name=st.sampled_from(["free", "tight"]),
        timeout=st.sampled_from([None, None, TIMEOUT]),
        key=st.sampled_from([None, None, "a", "b"]),
    )
    def submit(self, name: str, timeout: int | None, key: str | None) -> None:
        if name in self.deleted:
            return
        replay = None if key is None else Replay(key, "same")
        record = self.do(self.clients.submit(self.draft(name, timeout), replay))
        job_id = record.spec.job_id
        known = self.keys.setdefault(f"{name} {key}", job_id) if key else job_id
        assert job_id == known, "the same key is the same job"
        self.jobs.setdefault(job_id, Told(name, record.spec.timeout))

    @rule(stored=st.booleans(), name=st.sampled_from(["free", "tight"]))
    def crash_in_a_submit(self, stored: bool, name: str) -> None:
        if name not in self.deleted:
            self.crash(self.clients.submit(self.draft(name, None), None), stored=stored)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        outcome = self.do(self.clients.stop(job_id, UNKNOWN))
        told = self.jobs[job_id]
        if outcome.taken:
            assert told.final is None or told.stopped
            told.stopped = True
        else:
            assert told.stopped or shown_status(outcome.job) is not Status.RUNNING

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), stored=st.booleans())
    def crash_in_a_stop(self, data: st.DataObject, stored: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.crash(self.clients.stop(job_id, UNKNOWN), stored=stored)
        # The client was told nothing: it looks, and what it sees then holds.
        if shown_status(self.record(job_id)) is Status.STOPPED:
            self.jobs[job_id].stopped = True

    @precondition(lambda self: len(self.deleted) < 1)
    @rule(name=st.sampled_from(["free", "tight"]), rare=st.integers(0, 7))
    def delete(self, name: str, rare: int) -> None:
        if rare:
            return
        for record in self.do(self.store.undeploy(name, "deleted")):
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
    def come_to_nothing(self, data: st.DataObject) -> None:
        self.act(self.engine.never, self.pick(data, self.world.ordered))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), rare=st.integers(0, 3))
    def end(self, data: st.DataObject, rare: int) -> None:
        key = self.pick(data, self.world.running)
        assert key is not None
        endings = [Ending.EXITED, Ending.OUT_OF_MEMORY]
        if self.jobs[key[0]].timeout is not None:
            endings.append(Ending.TIMED_OUT)
        if key[0] in self.world.told_to_stop or rare == 0:  # by whomever
            endings.append(Ending.STOPPED)
        ending = data.draw(st.sampled_from(endings))
        self.act(self.engine.end, key, ending, data.draw(st.sampled_from(CODES[ending])))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.act(self.engine.lose, self.pick(data, self.world.running))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def be_away(self, data: st.DataObject) -> None:
        self.act(self.engine.away, self.pick(data, self.world.running))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def be_back(self, data: st.DataObject) -> None:
        self.act(self.engine.back, self.pick(data, self.world.running))

    @rule(index=st.integers(0, 1000))
    def say_again(self, index: int) -> None:
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

        self.do(main())

    # The clock, environments, the disk, fate

    @rule()
    def let_time_pass(self) -> None:
        self.waited = True
        self.loop.now_s += 2 * TIMEOUT  # more than the timeout, and than any pause between attempts
        self.do(asyncio.sleep(0))

    @rule(
        name=st.sampled_from(["free", "tight"]),
        build=st.sampled_from(["ready", "ready", "building", "broken"]),
    )
    def build(self, name: str, build: str) -> None:
        self.builds[name] = build

        async def main() -> None:
            self.versions.moved.set()
            self.versions.moved = asyncio.Event()

        self.do(main())

    @rule()
    def die(self) -> None:
        self.crash(None)

    # What holds

    def record(self, job_id: str) -> JobRecord:
        record = self.loop.run_until_complete(self.store.job(job_id))
        assert record is not None, "an acknowledged job exists"
        return record

    @invariant()
    def nobody_was_told_wrong(self) -> None:
        if not self.is_up:
            return
        for job_id, told in self.jobs.items():
            record = self.record(job_id)
            status = shown_status(record)
            if told.stopped:
                assert status is Status.STOPPED, "an acknowledged stop is final"
            if status is Status.RUNNING:
                assert told.final is None, "a final status never changes"
                continue
            seen = (status, record.start_ns, record.end_ns, record.message)
            assert told.final in (None, seen), "a final status never changes"
            told.final = seen
            assert status in self.causes(job_id, told), (status, self.causes(job_id, told))
            start = record.start_ns or record.spec.created_ns
            assert record.end_ns is not None
            assert record.spec.created_ns <= start <= record.end_ns

    def causes(self, job_id: str, told: Told) -> set[Status]:
        if told.stopped:
            return {Status.STOPPED}
        ends = [self.world.over[key] for key in sorted(self.world.over) if key[0] == job_id]
        losses = len(self.losses(job_id))
        if losses == len(ends) <= RETRIES[told.name]:  # it waits for its first attempt, or another
            causes = {Status.UNEXPECTED_ERROR}  # its environment is broken
            if told.timeout is not None and self.waited:
                causes.add(Status.TIMED_OUT)
            return causes
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
            for key, last in self.world.over.items()
            if key[0] == job_id and (not isinstance(last, Ended) or last.ending is Ending.STOPPED)
        ]

    @invariant()
    def no_code_is_started_twice_in_one_attempt(self) -> None:
        assert all(count == 1 for count in self.world.begun.values())

    @invariant()
    def no_code_is_started_again_but_after_a_loss_and_as_often_as_its_api_allows(self) -> None:
        begun = Counter(job_id for job_id, _ in self.world.begun)
        for job_id, count in begun.items():
            assert count <= 1 + len(self.losses(job_id))
            assert count <= 1 + RETRIES[self.jobs[job_id].name]

    @invariant()
    def each_attempt_knows_how_many_were_lost_before(self) -> None:
        for (job_id, number), attempt in self.world.ordered.items():
            earlier = [key for key in self.losses(job_id) if key[1] < number]
            assert attempt.losses == len(earlier)
            assert (attempt.lost is None) == (not earlier)

    @invariant()
    def no_more_run_than_may(self) -> None:
        attempts = [*self.world.ordered, *self.world.running]
        in_flight = {key[0] for key in attempts}
        assert len(attempts) == len(in_flight), "one attempt of a job at a time"
        assert len(in_flight) <= ROOM
        assert self.engine.ledger.taken == in_flight, "capacity is held for these and nobody else"
        tight = [job for job in in_flight if self.jobs[job].name == "tight"]
        assert len(tight) <= MOST_RUNNING
        stopped = {job for job in in_flight if self.jobs[job].stopped}
        assert stopped <= self.engine.told_to_stop, "a stop is carried out, also after a crash"

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.store.close()
            self.loop.run_until_complete(self.dispatcher.close())
            self.loop.close()
            self.folder.cleanup()

    def finish(self) -> None:
        """Let everything end: each job reaches one final status, and nothing is held."""
        for name in self.builds:
            self.build(name, "ready")
        for _ in range(20 + 4 * len(self.jobs)):
            for key in list(self.world.ordered):
                self.act(self.engine.begin, key)
            for key in list(self.world.running):
                self.act(self.engine.end, key, Ending.EXITED, 0)
            self.let_time_pass()
            if all(self.record(job).state in FINAL for job in self.jobs):
                break
        self.nobody_was_told_wrong()
        for job_id, told in self.jobs.items():
            assert told.final is not None, (told, self.record(job_id))
            assert self.record(job_id).state in FINAL
            assert self.clients.find(job_id) is None
        assert self.engine.ledger.taken == set(), "all capacity is given back"


async def _some_steps() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_whatever_happens_in_whichever_order_nobody_is_told_wrong() -> None:
    examples = int(os.environ.get("CORTEX_MACHINE_EXAMPLES", "15"))
    run_state_machine_as_test(
        Machine,
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
def machine() -> Iterator[Machine]:
    """The same machine by hand; in the end every job has ended."""
    made = Machine()
    try:
        yield made
    finally:
        made.teardown()


def test_a_store_that_takes_no_writes_is_waited_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end that cannot be stored is stored when it can be."""
    machine.submit("free", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    real = machine.store.apply
    refusals = 3

    async def refuse(*arguments: Any) -> Any:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StorageUnavailable("the store takes no writes now")
        return await real(*arguments)

    monkeypatch.setattr(machine.store, "apply", refuse)
    machine.act(machine.engine.end, key, Ending.EXITED, 0)
    assert shown_status(machine.record(key[0])) is Status.RUNNING
    for _ in range(6):
        machine.let_time_pass()
    assert shown_status(machine.record(key[0])) is Status.SUCCEEDED


def test_a_lost_attempt_is_told_while_the_next_one_runs_and_not_after_it(machine: Machine) -> None:
    machine.submit("tight", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    machine.let_time_pass()
    machine.act(machine.engine.lose, key)
    (again,) = machine.world.ordered
    assert again == (key[0], 2)
    machine.act(machine.engine.begin, again)
    machine.let_time_pass()
    record = machine.record(key[0])
    assert (record.state, record.message) == (State.RUNNING, "attempt 1 was lost: lost")
    assert record.start_ns == machine.world.running[again].start_ns
    machine.act(machine.engine.end, again, Ending.EXITED, 0)
    record = machine.record(key[0])
    assert (shown_status(record), record.message, record.losses) == (Status.SUCCEEDED, None, 1)


def test_what_was_said_before_a_new_attempt_is_not_taken_to_be_about_it(machine: Machine) -> None:
    machine.submit("tight", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    machine.build("tight", "building")
    machine.act(machine.engine.lose, key)
    assert machine.record(key[0]).state is State.WAITING
    for index in range(len(machine.engine.said)):
        machine.say_again(index)
    assert machine.record(key[0]).state is State.WAITING
    machine.build("tight", "ready")
    assert list(machine.world.ordered) == [(key[0], 2)]


def test_a_start_is_stored_whatever_else_is_seen_before(machine: Machine) -> None:
    machine.submit("free", None, None)
    (key,) = machine.world.ordered
    machine.act(machine.engine.begin, key)
    machine.act(machine.engine.away, key)
    machine.act(machine.engine.back, key)
    machine.let_time_pass()
    assert machine.record(key[0]).state is State.RUNNING
