"""The store: APIs, their versions, and jobs. The operator's one way to the database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    delete,
    insert,
    or_,
    select,
)
from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import DBAPIError

from cortex.errors import Conflict, NotFound
from cortex.spec.api import ApiSpec
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import IN_PROGRESS, SHOWN, Event, State, Status, Wanted
from cortex.spec.times import now_ns
from cortex.store.database import Writer, connect, migrate, storage_error
from cortex.store.schema import apis, jobs, versions
from cortex.store.transitions import BY_ID, Facts, Outcome, apply, record

T = TypeVar("T")


@dataclass(frozen=True)
class Deployment:
    """An API as it is deployed: its current version."""

    name: str
    endpoint: str
    spec: ApiSpec


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and where the next page begins (None: there is none)."""

    jobs: list[JobRecord]
    next_cursor: int | None


@dataclass(frozen=True)
class Replay:
    """What makes a repeated submit the same one."""

    key: str
    body_hash: str


_CURRENT = select(apis.c.api_id).where(apis.c.name == bindparam("name"))
_REPLAYED = select(jobs).where(
    jobs.c.api_name == bindparam("name"), jobs.c.idempotency_key == bindparam("key")
)
_INSERT = insert(jobs).returning(*jobs.c)


class Store:
    """The database behind one operator. Methods are called on the event loop and do not block it.

    Every method that writes raises StorageUnavailable when the database takes nothing, and then
    nothing was stored.
    """

    def __init__(self, url: str) -> None:
        self._engine = connect(url)
        migrate(self._engine)
        self._writer = Writer(self._engine)

    def close(self) -> None:
        """Finish the writes that wait, and let go of the database."""
        self._writer.close()
        self._engine.dispose()

    # Jobs

    async def submit(self, draft: JobSpec, replay: Replay | None = None) -> tuple[JobRecord, bool]:
        """Store a job of the API's current version (`draft.api_id` is filled in here).

        Returns:
            The job, and whether it is new: with a replay key that was used before, the job of then.

        Raises:
            NotFound: the API is not deployed.
            Conflict: the key was used before, for another body.
        """

        def write(connection: Connection) -> tuple[JobRecord, bool]:
            api_id = connection.execute(_CURRENT, {"name": draft.api_name}).scalar()
            if api_id is None:
                raise NotFound(f"there is no API {draft.api_name!r}; see `cortex get`")
            if replay is not None and (earlier := _earlier(connection, draft, replay)):
                return earlier, False
            spec = draft.model_copy(update={"api_id": api_id})
            row = connection.execute(
                _INSERT,
                {
                    "job_id": spec.job_id,
                    "api_name": spec.api_name,
                    "api_id": api_id,
                    "spec": json.dumps(spec.model_dump(mode="json")),
                    "created_ns": spec.created_ns,
                    "state": State.WAITING,
                    "wanted": Wanted.RUN,
                    "attempt": 0,
                    "idempotency_key": replay and replay.key,
                    "idempotency_hash": replay and replay.body_hash,
                },
            )
            return record(row.mappings().one()), True

        return await self._writer.run(write)

    async def apply(self, job_id: str, event: Event, facts: Facts) -> Outcome:
        """Take one event of a job; see `transitions.apply`."""
        return await self._writer.run(lambda connection: apply(connection, job_id, event, facts))

    async def job(self, job_id: str) -> JobRecord | None:
        """One job, or None."""

        def read(connection: Connection) -> JobRecord | None:
            row = connection.execute(BY_ID, {"job_id": job_id}).mappings().first()
            return None if row is None else record(row)

        return await self._read(read)

    async def jobs_in_progress(self) -> list[JobRecord]:
        """All jobs that no engine has seen the end of, in the order of their submission."""
        # Spelled as in the partial index, so that the planner can prove it applies.
        unfinished = jobs.c.state.in_(sorted(IN_PROGRESS))
        return await self._read(_records(select(jobs).where(unfinished).order_by(jobs.c.seq)))

    async def list_jobs(
        self, api_name: str, *, limit: int, status: Status | None = None, cursor: int | None = None
    ) -> JobPage:
        """Jobs of an API, newest first, with one shown status if given, from a cursor on."""
        query = select(jobs).where(jobs.c.api_name == api_name)
        if status is not None:
            query = query.where(_shown_as(status))
        if cursor is not None:
            query = query.where(jobs.c.seq < cursor)
        found = await self._read(_records(query.order_by(jobs.c.seq.desc()).limit(limit + 1)))
        page = found[:limit]
        return JobPage(page, page[-1].seq if len(found) > limit else None)

    # APIs

    async def deploy(self, specs: Iterable[ApiSpec]) -> None:
        """Make these the current versions of their APIs, all or none.

        Raises:
            Conflict: an endpoint belongs to another API.
        """
        specs = list(specs)

        def write(connection: Connection) -> None:
            for spec in specs:
                taken_by = connection.execute(
                    select(apis.c.name).where(apis.c.endpoint == spec.networking.endpoint)
                ).scalar()
                if taken_by not in (None, spec.name):
                    raise Conflict(
                        f"the endpoint {spec.networking.endpoint!r} belongs to the API "
                        f"{taken_by!r}; choose another networking.endpoint for {spec.name!r}"
                    )
                connection.execute(
                    insert(versions).values(
                        api_id=spec.api_id,
                        api_name=spec.name,
                        spec=spec.model_dump_json(),
                        created_ns=now_ns(),
                    )
                )
                connection.execute(delete(apis).where(apis.c.name == spec.name))
                connection.execute(
                    insert(apis).values(
                        name=spec.name, endpoint=spec.networking.endpoint, api_id=spec.api_id
                    )
                )

        await self._writer.run(write)

    async def undeploy(self, name: str, message: str) -> list[JobRecord]:
        """Delete an API and stop its jobs, in one commit; the jobs that this stopped.

        Raises:
            NotFound: it is not deployed.
        """

        def write(connection: Connection) -> list[JobRecord]:
            gone = connection.execute(delete(apis).where(apis.c.name == name))
            if gone.rowcount == 0:
                raise NotFound(f"there is no API {name!r}; see `cortex get`")
            unfinished = connection.execute(
                select(jobs.c.job_id).where(
                    jobs.c.state.in_(sorted(IN_PROGRESS)), jobs.c.api_name == name
                )
            ).scalars()
            facts: Facts = {"end_ns": now_ns(), "message": message}
            stopped = (apply(connection, job_id, Event.STOP, facts) for job_id in list(unfinished))
            return [outcome.job for outcome in stopped if outcome.taken and outcome.job is not None]

        return await self._writer.run(write)

    async def deployments(self) -> list[Deployment]:
        """All deployed APIs, by name."""
        query = select(apis, versions.c.spec).join(versions, versions.c.api_id == apis.c.api_id)

        def read(connection: Connection) -> list[Deployment]:
            rows = connection.execute(query.order_by(apis.c.name)).mappings()
            return [_deployment(row) for row in rows]

        return await self._read(read)

    async def version(self, api_id: str) -> ApiSpec | None:
        """A version that was ever deployed, or None."""
        query = select(versions.c.spec).where(versions.c.api_id == api_id)
        text = await self._read(lambda connection: connection.execute(query).scalar())
        return None if text is None else ApiSpec.model_validate_json(text)

    async def versions(self, name: str) -> list[ApiSpec]:
        """All versions of an API, newest first."""
        query = select(versions.c.spec).where(versions.c.api_name == name)
        query = query.order_by(versions.c.created_ns.desc())

        def read(connection: Connection) -> list[ApiSpec]:
            return [
                ApiSpec.model_validate_json(text) for text in connection.execute(query).scalars()
            ]

        return await self._read(read)

    async def ping(self) -> None:
        """Ask the database anything.

        Raises:
            StorageUnavailable: it does not answer.
        """
        await self._writer.run(lambda connection: connection.execute(select(1)).scalar())

    async def _read(self, read: Callable[[Connection], T]) -> T:
        def work() -> T:
            with self._engine.connect() as connection:
                return read(connection)

        try:
            return await asyncio.to_thread(work)
        except DBAPIError as error:
            raise storage_error(error) from error


def _earlier(connection: Connection, draft: JobSpec, replay: Replay) -> JobRecord | None:
    found = connection.execute(_REPLAYED, {"name": draft.api_name, "key": replay.key})
    row = found.mappings().first()
    if row is None:
        return None
    if row["idempotency_hash"] != replay.body_hash:
        raise Conflict(
            f"the Idempotency-Key {replay.key!r} was used for another body, by job "
            f"{row['job_id']}; use a new key for a new job"
        )
    return record(row)


def _records(query: Select[tuple[object, ...]]) -> Callable[[Connection], list[JobRecord]]:
    return lambda connection: [record(row) for row in connection.execute(query).mappings()]


def _shown_as(status: Status) -> ColumnElement[bool]:
    cases = [key for key, shown in SHOWN.items() if shown is status]
    return or_(*(and_(jobs.c.state == state, jobs.c.wanted == wanted) for state, wanted in cases))


def _deployment(row: RowMapping) -> Deployment:
    return Deployment(row["name"], row["endpoint"], ApiSpec.model_validate_json(row["spec"]))
