"""Races between parts of the operator: a log and its job's end, reads of the catalogue, submits and
long polls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse

from cortex.engines.base import CapacityFreed
from cortex.errors import NoLeader
from cortex.joblog.folders import JobFolders
from cortex.joblog.reader import Log
from cortex.joblog.watch import FileWatch
from cortex.objects import ObjectStore
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.deployer import Deployer
from cortex.operator.dispatch import dispatcher, starter
from cortex.operator.dispatch.dispatcher import Dispatcher
from cortex.operator.dispatch.jobs import Jobs
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.operator.http.context import Context
from cortex.operator.http.routes import logs
from cortex.operator.http.views import Renderer
from cortex.operator.logs import follow
from cortex.operator.logs.archive import Archive
from cortex.spec.api import ApiSpec, Compute, Limits, Networking
from cortex.spec.audit import UNKNOWN
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import Event
from cortex.spec.times import now_ns
from cortex.store import Store
from cortex.store.events import End, Stop
from store.store_harness import draft, spec
from unit.scripted_engine import ScriptedEngine, World
from unit.test_machine import ScriptedVersions

LIMIT = 10**6
T = TypeVar("T")


async def with_timeout(work: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wait_for(work, 60)


def test_the_end_of_a_followed_log_is_not_missed_while_the_log_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.write_text("all of it")
    monkeypatch.setattr(follow, "_KEEP_ALIVE_S", 3600)

    async def work() -> list[tuple[int, str] | None]:
        none: Any = None
        live_jobs = {"a": LiveJob(none, lambda _: None)}
        watcher = FileWatch("log watch")
        watcher.open()
        found: list[tuple[int, str] | None] = []
        try:
            async for piece in follow.follow(
                Log(log, LIMIT), 0, lambda: live_jobs.get("a"), watcher
            ):
                found.append(piece)
                if live_jobs:  # the job ends while the piece is sent
                    live_jobs.pop("a").notify()
        finally:
            await watcher.close()
        return found

    assert asyncio.run(with_timeout(work())) == [(9, "all of it")]


class SlowStore:
    """A store whose first read of the deployments answers late."""

    def __init__(self) -> None:
        self.now: list[Any] = []
        self.release = asyncio.Event()
        self.reads = 0

    async def deployments(self) -> list[Any]:
        self.reads += 1
        found = list(self.now)
        if self.reads == 1:
            await self.release.wait()
        return found


class Deployment:
    def __init__(self, of: Any) -> None:
        self.spec = of


def test_a_late_read_does_not_undo_a_later_one() -> None:
    async def work() -> Any:
        store = SlowStore()
        first = spec()
        second = first.model_copy(update={"api_id": "second", "limits": Limits(max_running=1)})
        catalogue = Catalogue(store, others_deploy=True)  # type: ignore[arg-type]
        store.now = [Deployment(first)]
        route = asyncio.ensure_future(catalogue.refresh_if_others_deploy())  # GET /unknown
        await asyncio.sleep(0)
        store.now = [Deployment(second)]  # another operator deploys, and notifies
        notified = asyncio.ensure_future(catalogue.refresh())
        await asyncio.sleep(0.1)
        store.release.set()
        await asyncio.gather(route, notified)
        return catalogue.find("a")

    assert asyncio.run(work()).api_id == "second"


def test_a_deploy_takes_an_endpoint_from_an_api_that_was_deleted_elsewhere() -> None:
    store: Any = None
    catalogue = Catalogue(store, others_deploy=True)
    b = spec().model_copy(
        update={"name": "b", "api_id": "b1", "networking": Networking(endpoint="b")}
    )
    a = spec().model_copy(
        update={"name": "a", "api_id": "a1", "networking": Networking(endpoint="x")}
    )
    catalogue.change([b, a])
    # Another operator deletes `a`; before this one has read that, it deploys `b` at /x.
    catalogue.change(
        [b.model_copy(update={"api_id": "b2", "networking": Networking(endpoint="x")})]
    )
    assert catalogue.name_at("x") == "b"


def test_a_long_poll_that_begins_before_the_submit_returns_is_woken(tmp_path: Path) -> None:
    async def work() -> JobRecord | None:
        leader = Leader(tmp_path)
        async with leader.opened(spec()):
            submit, committed, may_return = leader.store.submit, asyncio.Event(), asyncio.Event()

            async def late(*arguments: Any) -> Any:
                stored = await submit(*arguments)
                committed.set()
                await may_return.wait()
                return stored

            leader.store.submit = late  # type: ignore[method-assign,assignment]
            job = draft()
            submitted = asyncio.ensure_future(leader.jobs.submit(job, None))
            await committed.wait()
            poll = asyncio.ensure_future(leader.jobs.next_record(job.job_id, 3600))
            while job.job_id not in leader.jobs._waiting:  # noqa: ASYNC110  # no event reports it
                await asyncio.sleep(0.01)
            may_return.set()
            await submitted
            return await asyncio.wait_for(poll, 60)

    record = asyncio.run(work())
    assert record is not None


class ProxyWithoutLeader:
    """A proxy that finds no other leader, because this operator has become the leader meanwhile."""

    def __init__(self, becomes_leader: Any) -> None:
        self._becomes_leader = becomes_leader

    async def forward(self, request: Any, or_status: int | None = None) -> None:
        self._becomes_leader()


def test_an_operator_that_becomes_the_leader_while_it_forwards_answers_itself() -> None:
    none: Any = None
    jobs = Jobs(none, lambda: None, lambda: None)
    dispatcher: Any = object()
    leader: Any = ProxyWithoutLeader(lambda: jobs.dispatch_with(dispatcher))
    ctx = Context(none, none, jobs, none, none, none, none, leader)
    assert asyncio.run(ctx.forwarded_or_fail(none)) is None


class Leader:
    """A leader on a scripted engine; `claims` has the jobs for which the engine made a handle, and
    `finished` those whose logs are complete here."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(f"sqlite:///{folder / 'operator.db'}")
        self.claims: list[str] = []
        self.finished: list[str] = []
        self.catalogue = Catalogue(self.store, others_deploy=True)
        self.jobs = Jobs(self.store, lambda: None, lambda: None)
        self.folder = folder

    @asynccontextmanager
    async def opened(self, api: ApiSpec) -> AsyncIterator[Dispatcher]:
        engine = ScriptedEngine(World(), 1000)
        claim = engine.claim

        def counted(job_id: str, attempt: int) -> str:
            self.claims.append(job_id)
            return claim(job_id, attempt)

        engine.claim = counted  # type: ignore[method-assign]
        versions = ScriptedVersions(self.store, {api.name: "ready"})
        await self.store.deploy([api])
        await versions.spec(api.api_id)
        await self.catalogue.refresh()
        folders = JobFolders(self.folder)
        dispatcher = Dispatcher(
            self.store,
            engine,
            versions,
            self.catalogue,
            folders,
            on_finished=lambda job: self.finished.append(job.spec.job_id),
        )
        self.jobs.begin_term(dispatcher)
        await engine.open(dispatcher.observe)
        await dispatcher.open()
        self.jobs.dispatch_with(dispatcher)
        try:
            yield dispatcher
        finally:
            await dispatcher.close()
            self.store.close()


def test_attempts_that_were_held_up_are_no_failed_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "_MAX_FAILED_STARTS", 3)
    monkeypatch.setattr(starter, "STORAGE_RETRY_S", 0)

    async def work() -> list[str | None]:
        leader = Leader(tmp_path)
        async with leader.opened(spec()) as leading:
            engine = leading.engine
            assert isinstance(engine, ScriptedEngine)
            job = draft()
            await leading.submit(job, None)
            messages: list[str | None] = []
            for number, reason in enumerate(("its node is away",) * 6 + (None,) * 3, 1):
                while (job.job_id, number) not in engine.world.ordered:  # noqa: ASYNC110  # no event reports it
                    await asyncio.sleep(0.01)
                engine.report_wait((job.job_id, number), f"phase of {number}")
                live = leading.live_jobs.find(job.job_id)
                assert live is not None
                messages.append(live.why_waiting)
                engine.never_start((job.job_id, number), reason)
            await leading.background.finish()
            assert leading.live_jobs.find(job.job_id) is None
            ended = await leader.store.job(job.job_id)
            assert ended is not None
            return [*messages, ended.message]

    *phases, message = asyncio.run(with_timeout(work()))
    assert phases == [f"phase of {number}" for number in range(1, 10)]
    assert message == "3 attempts to start it failed"


def test_the_phase_of_an_earlier_attempt_is_not_shown(tmp_path: Path) -> None:
    async def work() -> list[str | None]:
        leader = Leader(tmp_path)
        async with leader.opened(spec()) as leading:
            engine = leading.engine
            assert isinstance(engine, ScriptedEngine)
            job, messages = draft(), []
            await leading.submit(job, None)
            for number in (1, 2):
                while (job.job_id, number) not in engine.world.ordered:  # noqa: ASYNC110  # no event reports it
                    await asyncio.sleep(0.01)
                live = leading.live_jobs.find(job.job_id)
                assert live is not None
                messages.append(live.why_waiting)
                engine.report_wait((job.job_id, number), "its project is being sent")
                engine.never_start((job.job_id, number))
            return messages

    assert asyncio.run(with_timeout(work())) == [None, None]


ONE_AT_A_TIME = spec().model_copy(update={"limits": Limits(max_running=1)})


def test_the_jobs_of_an_api_that_another_operator_deleted_are_not_claimed(tmp_path: Path) -> None:
    async def work() -> list[str]:
        leader = Leader(tmp_path)
        async with leader.opened(ONE_AT_A_TIME) as dispatcher:
            for _ in range(50):
                await dispatcher.submit(draft(), None)
            stopped = await leader.store.undeploy("a", "deleted")
            await leader.catalogue.refresh()  # before the jobs' stops are read
            for job in stopped:
                dispatcher.on_job_changed(job.spec.job_id)
            while dispatcher.live_jobs.all()[1:]:  # noqa: ASYNC110  # the first has been claimed
                await asyncio.sleep(0.01)
            return leader.claims

    assert len(asyncio.run(work())) == 1


def test_a_leader_claims_no_job_of_an_api_that_it_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Jobs, "_is_current", False)  # as where other operators store stops as well

    async def work() -> list[str]:
        leader = Leader(tmp_path)
        none: Any = None
        async with leader.opened(ONE_AT_A_TIME) as dispatcher:
            for _ in range(50):
                await leader.jobs.submit(draft(), None)
            await Deployer(
                leader.store,
                none,
                leader.catalogue,
                leader.jobs.stop_stored,
                leader.jobs.lasting_refusal,
            ).undeploy("a", UNKNOWN)
            while dispatcher.live_jobs.all()[1:]:  # noqa: ASYNC110  # the first has been claimed
                await asyncio.sleep(0.01)
            return leader.claims

    assert len(asyncio.run(work())) == 1


async def claimed(leader: Leader, leading: Dispatcher) -> LiveJob:
    """A job that a machine runs, for all that this operator knows."""
    job = draft()
    await leading.submit(job, None)
    live = leading.live_jobs.find(job.job_id)
    assert live is not None
    assert isinstance(leading.engine, ScriptedEngine)
    while (job.job_id, 1) not in leading.engine.world.ordered:  # noqa: ASYNC110  # no event reports it
        await asyncio.sleep(0.01)
    return live


async def end_elsewhere(leader: Leader, live: LiveJob) -> JobRecord:
    """Another operator leads by now, and stores the end of a job."""
    ended = await leader.store.apply(live.job_id, End(Event.SUCCEED, 1, now_ns(), None))
    assert ended.taken
    assert ended.job is not None
    return ended.job


def test_a_log_is_not_complete_here_if_another_operator_has_ended_the_job(tmp_path: Path) -> None:
    async def work() -> list[str]:
        leader = Leader(tmp_path)
        async with leader.opened(ONE_AT_A_TIME) as leading:
            live = await claimed(leader, leading)
            leading.refresh(await end_elsewhere(leader, live))
            waiting = draft()
            await leading.submit(waiting, None)
            stopped = await leader.store.apply(waiting.job_id, Stop(now_ns(), "stopped"))
            assert stopped.job is not None
            leading.refresh(stopped.job)
            assert leading.live_jobs.all() == [live]
            assert leader.finished == [waiting.job_id]
            return leader.finished

    asyncio.run(with_timeout(work()))


@asynccontextmanager
async def serving(leader: Leader, leading: Dispatcher) -> AsyncIterator[Context]:
    """What the routes use, with an object store, where operators have folders of their own."""
    folders = JobFolders(leader.folder / "jobs")
    for name in ("files", "jobs", "archived"):
        (leader.folder / name).mkdir()
    files = ObjectStore(f"file://{leader.folder / 'files'}")
    archive = Archive(files, folders, leader.store, leader.folder / "archived", is_apart=True)
    await archive.open(leading)
    settings: Any = SimpleNamespace(job_folders=folders)
    watcher = FileWatch("log watch")
    versions = ScriptedVersions(leader.store, {"a": "ready"})
    proxy: Any = ProxyWithoutLeader(lambda: None)
    renderer = Renderer(leader.store, leader.jobs)
    try:
        yield Context(
            settings, leader.store, leader.jobs, leader.catalogue, versions, renderer, watcher,
            proxy, archive,
        )  # fmt: skip
    finally:
        await watcher.close()
        await archive.close()
        archive.end()


async def log_answer(ctx: Context, live: LiveJob, accept: str = "*/*") -> str:
    """The log of a job, as a client gets it, with the error that breaks it off."""
    app = SimpleNamespace(state=SimpleNamespace(context=ctx))
    headers = [(b"accept", accept.encode())]
    request = Request({"type": "http", "app": app, "headers": headers, "query_string": b""})
    answer = await logs.logs_by_name(request, "a", live.job_id)
    assert isinstance(answer, StreamingResponse)
    return "".join([str(piece) async for piece in answer.body_iterator])


def test_a_superseded_leader_serves_no_partial_log_as_the_log_of_an_ended_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Jobs, "_is_current", False)  # as with a database that operators share
    monkeypatch.setattr(logs, "_END_TIMEOUT_S", 0.2)

    async def work() -> None:
        leader = Leader(tmp_path)
        async with leader.opened(spec()) as leading, serving(leader, leading) as ctx:
            live = await claimed(leader, leading)
            folders = ctx.settings.job_folders
            folders.folder(live.job_id).mkdir()
            folders.append_to_log(live.job_id, "the beginning")
            followed = asyncio.ensure_future(log_answer(ctx, live, "text/event-stream"))
            await asyncio.sleep(0.1)
            await end_elsewhere(leader, live)
            with pytest.raises(NoLeader):
                await log_answer(ctx, live)
            leader.jobs.end_term()
            live.notify()
            with pytest.raises(NoLeader):  # without the event of the end
                await followed
            assert ctx.archive is not None
            ctx.archive.end_term()
            with pytest.raises(NoLeader, match="not in the object store yet"):
                await log_answer(ctx, live)

    asyncio.run(with_timeout(work()))


def test_a_log_is_served_while_the_leader_stores_the_end_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Jobs, "_is_current", False)

    async def work() -> None:
        leader = Leader(tmp_path)
        async with leader.opened(spec()) as leading, serving(leader, leading) as ctx:
            live = await claimed(leader, leading)
            folders = ctx.settings.job_folders
            folders.folder(live.job_id).mkdir()
            folders.append_to_log(live.job_id, "all of it")
            record = await end_elsewhere(leader, live)
            read = asyncio.ensure_future(log_answer(ctx, live))
            await asyncio.sleep(0.1)
            leading.live_jobs.update(live, record)  # what stored the end has returned
            assert await read == "b'all of it\\n'"

    asyncio.run(with_timeout(work()))


def test_the_engine_knows_what_waiting_jobs_need_until_they_wait_no_longer(
    tmp_path: Path,
) -> None:
    async def work() -> list[list[Compute]]:
        leader = Leader(tmp_path)
        api = spec()
        async with leader.opened(api) as dispatcher:
            engine = dispatcher.engine
            assert isinstance(engine, ScriptedEngine)
            engine.ledger.max_jobs = 1
            for _ in range(3):
                await dispatcher.submit(draft(), None)
            while not engine.demands:  # noqa: ASYNC110  # the report comes after a while
                await asyncio.sleep(0.01)
            engine.ledger.max_jobs = 3
            dispatcher.observe(CapacityFreed())
            while len(engine.demands) < 2:  # noqa: ASYNC110  # the same
                await asyncio.sleep(0.01)
            return engine.demands

    assert asyncio.run(work()) == [[spec().compute] * 2, []]
