"""The store: APIs, their versions, and jobs. The operator's one way to the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, Select, and_, or_, select, text

from cortex.errors import StartupError
from cortex.spec.api import ApiSpec
from cortex.spec.audit import UNKNOWN, Action, Actor, AuditEntry
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import SHOWN, Event, Status
from cortex.spec.times import new_id, now_ns
from cortex.spec.tokens import Scope, Token
from cortex.store import apis, audit, long_texts, retention, sqlite, tokens
from cortex.store.apis import Deployment
from cortex.store.audit import AuditPage
from cortex.store.database import connect, migrate, read, reader
from cortex.store.group import locks
from cortex.store.group.group import OperatorGroup
from cortex.store.group.locks import DatabaseLock
from cortex.store.group.member import session_name
from cortex.store.group.sole import SoleOperator
from cortex.store.schema import IS_IN_PROGRESS, jobs
from cortex.store.submissions import InitialClaim, Replay, Submissions
from cortex.store.transitions import BY_ID, Facts, Outcome, apply, record, whole_record
from cortex.store.writer import Writer

T = TypeVar("T")


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and where the next page begins (None: there is none)."""

    jobs: list[JobRecord]
    next_cursor: int | None


class Store:
    """The database behind one operator. Methods are called on the event loop and do not block it.

    Every method that writes raises StorageUnavailable when the database takes nothing, and then
    nothing was stored.
    """

    def __init__(self, url: str, max_waiting_bytes: int | None = None) -> None:
        """
        Args:
            url: a PostgreSQL database as users write it, or `sqlite:///PATH`.
            max_waiting_bytes: of the configs of jobs that wait, together.

        Raises:
            StartupError: the database cannot be used, and why.
        """
        operator_id = new_id()
        name = session_name(operator_id)
        self._engine = connect(url, name)
        try:
            migrate(self._engine)
            self._file = None if self.is_shared else sqlite.DatabaseFile(self._engine)
        except StartupError:
            self._engine.dispose()
            raise
        self._reader = reader(self._engine)
        self._writer = Writer(self._engine, None if self._file is None else self._file.lost)
        self._submits = Submissions(max_waiting_bytes)
        self.operators: OperatorGroup | SoleOperator = (
            OperatorGroup(self._engine, self._writer, operator_id, name)
            if self.is_shared
            else SoleOperator(self._writer)
        )

    @property
    def is_shared(self) -> bool:
        """Whether several operators can have it; a file is one's own as long as its folder is locked."""
        return self._engine.dialect.name != "sqlite"

    @property
    def failed_write_stores_nothing(self) -> bool:
        """Whether it is certain after StorageUnavailable that nothing was stored. A database in a file may hold
        the write after a crash of a machine whose disk fails."""
        return self.is_shared

    def close(self) -> None:
        """Finish the writes that wait, and let go of the database."""
        self._writer.close()
        self._engine.dispose()
        if self._file is not None:
            self._file.close()

    def in_turn(self) -> DatabaseLock:
        """Held by whoever changes which versions there are, of all operators."""
        return DatabaseLock(self._engine if self.is_shared else None)

    def joining(self) -> DatabaseLock:
        """Held by whoever finds out where it belongs, and joins."""
        return DatabaseLock(self._engine if self.is_shared else None, locks.JOIN)

    # Jobs

    async def submit(
        self, draft: JobSpec, replay: Replay | None = None, claim: InitialClaim | None = None
    ) -> tuple[JobRecord, bool]:
        """Store a job of the API's current version (`draft.api_id` is filled in here), waiting, or
        claimed at once: submit and claim are then one commit.

        Returns:
            The job, and whether it is new: with a replay key that was used before, the job of then.

        Raises:
            NotFound: the API is not deployed.
            Conflict: the key was used before, for another body.
            OverLimit: as many of its jobs wait as may, or as much config.
            Superseded: with a claim, where another operator drives.
        """

        def write(connection: Connection) -> tuple[JobRecord, bool]:
            return self._submits.submit(connection, draft, replay, claim)

        return await (self._writer.run(write) if claim is None else self.operators.as_driver(write))

    async def apply(
        self,
        job_id: str,
        event: Event,
        facts: Facts,
        spec: JobSpec | None = None,
        actor: Actor = UNKNOWN,
    ) -> Outcome:
        """Take one event of a job; see `transitions.apply`. All but a stop are the driver's alone.

        Args:
            actor: who stops the job, for the audit.

        Raises:
            Superseded: another operator drives.
        """

        def write(connection: Connection) -> Outcome:
            if event in (Event.UNCLAIM, Event.RETRY):
                self._submits.room.look_again()
            return apply(connection, job_id, event, facts, spec)

        def stop(connection: Connection) -> Outcome:
            outcome = write(connection)
            if outcome.taken and outcome.job is not None:
                name = outcome.job.spec.api_name
                entry = AuditEntry(Action.STOP, actor, now_ns(), api_name=name, job_id=job_id)
                audit.add(connection, [entry])
            return outcome

        return await (
            self._writer.run(stop) if event is Event.STOP else self.operators.as_driver(write)
        )

    async def job(self, job_id: str) -> JobRecord | None:
        """One job, or None. A config or a result that is long is left out, as in all that follow."""

        def read(connection: Connection) -> JobRecord | None:
            row = BY_ID.first(connection, {"job_id": job_id})
            return None if row is None else record(row)

        return await self._read(read)

    async def whole_job(self, job_id: str) -> JobRecord | None:
        """One job with its config and its result, or None."""

        def read(connection: Connection) -> JobRecord | None:
            row = BY_ID.first(connection, {"job_id": job_id})
            return None if row is None else long_texts.complete(connection, whole_record(row))

        return await self._read(read)

    async def jobs(self, job_ids: Iterable[str]) -> list[JobRecord]:
        """Those of these jobs that there are, in the order of their submission."""
        query = select(jobs).where(jobs.c.job_id.in_(list(job_ids))).order_by(jobs.c.seq)
        return await self._read(_records(query))

    async def jobs_in_progress(self) -> list[JobRecord]:
        """All jobs that no engine has seen the end of, in the order of their submission."""
        return await self._read(_records(select(jobs).where(IS_IN_PROGRESS).order_by(jobs.c.seq)))

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

    async def deploy(self, specs: Iterable[ApiSpec], actor: Actor = UNKNOWN) -> None:
        """Make these the current versions of their APIs, all or none.

        Raises:
            Conflict: an endpoint belongs to another API.
        """
        wanted = list(specs)
        await self._writer.run(lambda c: apis.deploy(c, wanted, actor))

    async def undeploy(self, name: str, message: str, actor: Actor = UNKNOWN) -> list[JobRecord]:
        """Delete an API and stop its jobs, in one commit; the jobs that this stopped.

        Raises:
            NotFound: it is not deployed.
        """
        return await self._writer.run(lambda c: apis.undeploy(c, name, message, actor))

    async def deployments(self) -> list[Deployment]:
        """All deployed APIs, by name."""
        return await self._read(apis.deployed)

    async def version(self, api_id: str) -> ApiSpec | None:
        """A version that was ever deployed, or None."""
        return await self._read(lambda c: apis.version(c, api_id))

    async def versions(self, name: str) -> list[ApiSpec]:
        """All versions of an API, newest first."""
        return await self._read(lambda c: apis.versions_of(c, name))

    async def all_versions(self) -> list[ApiSpec]:
        """Every version of every API."""
        return await self._read(apis.all_versions)

    # Tokens

    async def create_token(
        self, name: str, scope: Scope, digest: str, actor: Actor = UNKNOWN
    ) -> None:
        """Add a token.

        Raises:
            Conflict: there is one of that name.
        """
        await self._writer.run(lambda c: tokens.create(c, name, scope, digest, actor))

    async def revoke_token(self, name: str, actor: Actor = UNKNOWN) -> None:
        """Remove a token.

        Raises:
            NotFound: there is none of that name.
        """
        await self._writer.run(lambda c: tokens.revoke(c, name, actor))

    async def tokens(self) -> list[Token]:
        """All tokens, by name."""
        return await self._read(tokens.listed)

    async def token(self, digest: str) -> Token | None:
        """The token of a digest, or None."""
        return await self._read(lambda c: tokens.of_digest(c, digest))

    async def known_tokens(self, digests: Collection[str]) -> set[str]:
        """Those of these digests that are digests of tokens."""
        return await self._read(lambda c: tokens.known(c, digests))

    # The audit

    async def add_to_audit(self, entries: Collection[AuditEntry]) -> None:
        """Add entries that are about no change of the store."""
        await self._writer.run(lambda c: audit.add(c, entries))

    async def audit(self, limit: int, cursor: int | None = None) -> AuditPage:
        """The audit, newest first, from a cursor on."""
        return await self._read(lambda c: audit.page(c, limit, cursor))

    async def trim_audit(self, before_ns: int | None) -> int:
        """Remove what need not be kept of the audit; see `audit.remove`."""
        return await self._writer.run(lambda c: audit.remove(c, before_ns))

    # Retention

    async def jobs_with_folder(self, before_ns: int, most: int) -> list[str]:
        """The ids of jobs that ended before, and whose folder may be there still."""
        return await self._read(lambda c: retention.with_folder(c, before_ns, most))

    async def jobs_ended(self, before_ns: int, most: int) -> list[str]:
        """The ids of jobs that ended before."""
        return await self._read(lambda c: retention.ended(c, before_ns, most))

    async def jobs_beyond(self, kept: int, most: int) -> list[str]:
        """The ids of finished jobs that are not among the newest `kept` of their API."""
        return await self._read(lambda c: retention.beyond(c, kept, most))

    async def folders_gone(self, job_ids: Iterable[str]) -> None:
        """Note that these jobs have no folder any more."""
        await self._writer.run(lambda c: retention.folders_gone(c, job_ids))

    async def remove_jobs(self, job_ids: Iterable[str]) -> None:
        """Remove finished jobs; their idempotency keys may be used again."""
        await self._writer.run(lambda c: retention.remove(c, job_ids))

    async def remove_versions(self, before_ns: int) -> list[str]:
        """Remove versions that were deployed before and that nothing refers to; their ids."""
        return await self._writer.run(lambda c: retention.remove_versions(c, before_ns))

    async def ping(self) -> None:
        """Write to the database, and change nothing.

        Raises:
            StorageUnavailable: it takes no writes.
        """
        # Alembic's table has one row, whatever else is stored. An operator's own row is written anyway.
        same = text("UPDATE alembic_version SET version_num = version_num")
        is_joined = self.operators.is_joined
        await self._writer.run(lambda c: None if is_joined else c.execute(same).rowcount)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.to_thread(read, self._reader, work)


def _records(query: Select[tuple[object, ...]]) -> Callable[[Connection], list[JobRecord]]:
    return lambda connection: [record(row) for row in connection.execute(query)]


def _shown_as(status: Status) -> ColumnElement[bool]:
    cases = [key for key, shown in SHOWN.items() if shown is status]
    return or_(*(and_(jobs.c.state == state, jobs.c.wanted == wanted) for state, wanted in cases))
