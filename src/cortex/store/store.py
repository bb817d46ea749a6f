"""The store: APIs, versions, jobs, tokens and the audit.

It is the operator's only access to the database.
"""

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
from cortex.spec.lifecycle import SHOWN, Status
from cortex.spec.times import new_id, now_ns
from cortex.spec.tokens import Scope, Token
from cortex.store import apis, audit, long_texts, retention, sqlite, tokens
from cortex.store.apis import Deployment
from cortex.store.audit import AuditPage
from cortex.store.database import connect, migrate, read, reader
from cortex.store.events import JobEvent, Retry, Stop, Unclaim
from cortex.store.group.group import OperatorGroup
from cortex.store.group.locks import DatabaseLock
from cortex.store.group.member import session_name
from cortex.store.group.sole import SoleOperator
from cortex.store.lock_keys import DEPLOY_LOCK, JOIN_LOCK
from cortex.store.prepared import Statement
from cortex.store.schema import IS_IN_PROGRESS, jobs
from cortex.store.submissions import InitialClaim, Replay, Submissions, earlier_job
from cortex.store.transitions import BY_ID, Outcome, record, take, whole_record
from cortex.store.writer import Planned, Write, Writer

T = TypeVar("T")


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and the cursor of the next page (None: this is the last page)."""

    jobs: list[JobRecord]
    next_cursor: int | None


class Store:
    """The database behind one operator. Methods are called on the event loop and do not block it.

    Every method that writes raises StorageUnavailable when the database accepts no writes; then
    nothing was stored.
    """

    def __init__(self, url: str, max_waiting_bytes: int | None = None) -> None:
        """
        Args:
            url: a PostgreSQL database as users write it, or `sqlite:///PATH`.
            max_waiting_bytes: the limit for the configs of all waiting jobs together.

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
        self._writer = Writer(self._engine, None if self._file is None else self._file.problem)
        self._submissions = Submissions(max_waiting_bytes)
        self.operators: OperatorGroup | SoleOperator = (
            OperatorGroup(self._engine, self._writer, operator_id, name)
            if self.is_shared
            else SoleOperator(self._writer)
        )
        shared = self._engine if self.is_shared else None
        self.deploy_lock = DatabaseLock(shared, DEPLOY_LOCK)
        """Only its holder, of all operators, changes which versions exist."""
        self.join_lock = DatabaseLock(shared, JOIN_LOCK)
        """Only its holder, of all operators, determines its data folder's id and joins."""

    @property
    def is_shared(self) -> bool:
        """Whether several operators can use the database. SQLite has one, which locks a folder."""
        return self._engine.dialect.name != "sqlite"

    @property
    def failed_write_stores_nothing(self) -> bool:
        """Whether it is certain after StorageUnavailable that nothing was stored. A database in a
        file may hold the write after a crash of a machine whose disk fails."""
        return self.is_shared

    def close(self) -> None:
        """Finish the queued writes, and close the database."""
        self._writer.close()
        self._engine.dispose()
        if self._file is not None:
            self._file.close()

    async def submit(
        self, draft: JobSpec, replay: Replay | None = None, claim: InitialClaim | None = None
    ) -> tuple[JobRecord, bool]:
        """Store a job of the API's current version; `draft.api_id` is filled in here.

        Args:
            replay: the Idempotency-Key of the submit, if it has one.
            claim: for claiming the job in the same commit; else the job waits.

        Returns:
            The job, and whether it is new. It is the earlier job if the key was used before.

        Raises:
            NotFound: the API is not deployed.
            Conflict: the key was used before, with another body.
            OverLimit: the API has too many waiting jobs, or all waiting jobs too much config.
            Superseded: there is a claim, and another operator is the leader.
        """

        def plan() -> Write[tuple[JobRecord, bool]] | Statement[tuple[JobRecord, bool]]:
            return self._submissions.plan(draft, replay, claim, is_shared=self.is_shared)

        return await (
            self._writer.run(Planned(plan))
            if claim is None
            else self.operators.write_as_leader(Planned(plan))
        )

    async def submitted_before(self, draft: JobSpec, replay: Replay) -> JobRecord | None:
        """The job that an earlier submit with this Idempotency-Key has stored, or None.

        Raises:
            Conflict: the earlier submit had another body.
            StorageUnavailable: the store cannot be read now.
        """
        return await self._read(lambda connection: earlier_job(connection, draft, replay))

    async def apply(
        self,
        job_id: str,
        event: JobEvent,
        spec: JobSpec | None = None,
        actor: Actor = UNKNOWN,
    ) -> Outcome:
        """Take one event of a job (`transitions.take`). All but `Stop` are the leader's alone.

        Args:
            actor: of a `Stop`, for the audit.

        Raises:
            Superseded: another operator is the leader.
        """

        def plan() -> Statement[Outcome]:
            if isinstance(event, Unclaim | Retry):
                self._submissions.waiting_bytes.on_waiting_again()
            return take(job_id, event, spec)

        def stop(connection: Connection) -> Outcome:
            outcome = plan().run(connection)
            if outcome.taken and outcome.job is not None:
                name = outcome.job.spec.api_name
                entry = AuditEntry(Action.STOP, actor, now_ns(), api_name=name, job_id=job_id)
                audit.add(connection, [entry])
            return outcome

        return await (
            self._writer.run(stop)
            if isinstance(event, Stop)
            else self.operators.write_as_leader(Planned(plan))
        )

    async def job(self, job_id: str) -> JobRecord | None:
        """One job, or None.

        This method and the methods below leave out a config or a result that is long.
        """

        def find(connection: Connection) -> JobRecord | None:
            row = BY_ID.first(connection, {"job_id": job_id})
            return None if row is None else record(row)

        return await self._read(find)

    async def whole_job(self, job_id: str) -> JobRecord | None:
        """One job with its config and its result, or None."""

        def find(connection: Connection) -> JobRecord | None:
            row = BY_ID.first(connection, {"job_id": job_id})
            return None if row is None else long_texts.complete(connection, whole_record(row))

        return await self._read(find)

    async def jobs(self, job_ids: Iterable[str]) -> list[JobRecord]:
        """The existing jobs among these ids, in the order of their submission."""
        query = select(jobs).where(jobs.c.job_id.in_(list(job_ids))).order_by(jobs.c.seq)
        return await self._read(_records(query))

    async def jobs_in_progress(self) -> list[JobRecord]:
        """All jobs whose end no engine has observed, in the order of their submission."""
        return await self._read(_records(select(jobs).where(IS_IN_PROGRESS).order_by(jobs.c.seq)))

    async def list_jobs(
        self, api_name: str, *, limit: int, status: Status | None = None, cursor: int | None = None
    ) -> JobPage:
        """Jobs of an API before a cursor, newest first; with a status, only those that show it."""
        query = select(jobs).where(jobs.c.api_name == api_name)
        if status is not None:
            query = query.where(_shown_as(status))
        if cursor is not None:
            query = query.where(jobs.c.seq < cursor)
        found = await self._read(_records(query.order_by(jobs.c.seq.desc()).limit(limit + 1)))
        page = found[:limit]
        return JobPage(page, page[-1].seq if len(found) > limit else None)

    async def deploy(self, specs: Iterable[ApiSpec], actor: Actor = UNKNOWN) -> None:
        """Make these the current versions of their APIs, all in one commit.

        Raises:
            Conflict: another API has an endpoint.
        """
        all_specs = list(specs)  # the writer may run a write twice
        await self._writer.run(lambda c: apis.deploy(c, all_specs, actor))

    async def undeploy(self, name: str, message: str, actor: Actor = UNKNOWN) -> list[JobRecord]:
        """Delete an API and stop its jobs, in one commit; the stopped jobs.

        Raises:
            NotFound: the API is not deployed.
        """
        return await self._writer.run(lambda c: apis.undeploy(c, name, message, actor))

    async def deployments(self) -> list[Deployment]:
        """All deployed APIs, by name."""
        return await self._read(apis.deployed)

    async def version(self, api_id: str) -> ApiSpec | None:
        """A version, current or not, or None."""
        return await self._read(lambda c: apis.version(c, api_id))

    async def versions(self, name: str) -> list[ApiSpec]:
        """All versions of an API, newest first."""
        return await self._read(lambda c: apis.versions_of(c, name))

    async def all_versions(self) -> list[ApiSpec]:
        """Every version of every API."""
        return await self._read(apis.all_versions)

    async def create_token(
        self, name: str, scope: Scope, digest: str, actor: Actor = UNKNOWN
    ) -> None:
        """Add a token.

        Raises:
            Conflict: a token of that name exists.
        """
        await self._writer.run(lambda c: tokens.create(c, name, scope, digest, actor))

    async def revoke_token(self, name: str, actor: Actor = UNKNOWN) -> None:
        """Remove a token.

        Raises:
            NotFound: there is no token of that name.
        """
        await self._writer.run(lambda c: tokens.revoke(c, name, actor))

    async def tokens(self) -> list[Token]:
        """All tokens, by name."""
        return await self._read(tokens.listed)

    async def token(self, digest: str) -> Token | None:
        """The token with this digest, or None."""
        return await self._read(lambda c: tokens.of_digest(c, digest))

    async def known_tokens(self, digests: Collection[str]) -> set[str]:
        """The digests among these that belong to tokens."""
        return await self._read(lambda c: tokens.known(c, digests))

    async def add_to_audit(self, entries: Collection[AuditEntry]) -> None:
        """Add entries that belong to no other change of the store."""
        await self._writer.run(lambda c: audit.add(c, entries))

    async def audit(self, limit: int, cursor: int | None = None) -> AuditPage:
        """The entries of the audit before a cursor, newest first."""
        return await self._read(lambda c: audit.page(c, limit, cursor))

    async def trim_audit(self, before_ns: int | None) -> int:
        """Remove old entries of the audit, and too many refusals; see `audit.remove`."""
        return await self._writer.run(lambda c: audit.remove(c, before_ns))

    async def jobs_with_folder(self, before_ns: int, limit: int) -> list[str]:
        """The ids of jobs that ended before a time and whose folder may still exist."""
        return await self._read(lambda c: retention.with_folder(c, before_ns, limit))

    async def jobs_ended(self, before_ns: int, limit: int) -> list[str]:
        """The ids of jobs that ended before a time."""
        return await self._read(lambda c: retention.ended(c, before_ns, limit))

    async def jobs_beyond(self, kept: int, limit: int) -> list[str]:
        """The ids of finished jobs that are not among the newest `kept` of their API."""
        return await self._read(lambda c: retention.beyond(c, kept, limit))

    async def note_removed_folders(self, job_ids: Iterable[str]) -> None:
        """Note that the folders of these jobs were removed."""
        await self._writer.run(lambda c: retention.note_removed_folders(c, job_ids))

    async def remove_jobs(self, job_ids: Iterable[str]) -> None:
        """Remove finished jobs; their idempotency keys become free."""
        await self._writer.run(lambda c: retention.remove(c, job_ids))

    async def remove_versions(self, before_ns: int) -> list[str]:
        """Remove versions deployed before a time that no API and no job uses; their ids."""
        return await self._writer.run(lambda c: retention.remove_versions(c, before_ns))

    async def ping(self) -> None:
        """Check that the database accepts writes, with a write that changes nothing.

        Raises:
            StorageUnavailable: it does not.
        """
        # Alembic's table always has one row. An operator that joined updates its own row anyway.
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
