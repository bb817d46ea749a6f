"""A submit in the database: one commit decides the job, its Idempotency-Key and the limits.

Called by `Store`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import Connection, bindparam, func, insert, select, text

from cortex.errors import Conflict, NotFound, OverLimit
from cortex.spec.api import ApiSpec, Limits
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import State, Wanted
from cortex.store import long_texts
from cortex.store.lock_keys import WAITING_JOBS_LOCK
from cortex.store.prepared import Prepared, Row, Statement, Value
from cortex.store.schema import IS_WAITING, apis, jobs, versions
from cortex.store.transitions import spec_text, whole_record
from cortex.store.waiting_bytes import WaitingBytes


@dataclass(frozen=True)
class InitialClaim:
    """A claim in the same commit as the submit, made if the job gets this version of its API."""

    api_id: str
    handle: str


@dataclass(frozen=True)
class Replay:
    """How a repeated submit is recognized: its Idempotency-Key and the hash of its body."""

    key: str
    body_hash: str


_HASH_COLUMN = list(jobs.c.keys()).index("idempotency_hash")
# On PostgreSQL, a deletion of the API waits for this lock on the row, and then finds the job.
_CURRENT = Prepared(
    select(apis.c.api_id).where(apis.c.name == bindparam("name")).with_for_update(read=True)
)
_BY_KEY = Prepared(
    select(jobs).where(
        jobs.c.api_name == bindparam("name"), jobs.c.idempotency_key == bindparam("key")
    )
)
_COLUMNS = (
    "job_id",
    "api_name",
    "api_id",
    "spec",
    "created_ns",
    "state",
    "wanted",
    "attempt",
    "handle",
    "idempotency_key",
    "idempotency_hash",
    "config_bytes",
)
_values = [bindparam(name, type_=jobs.c[name].type) for name in _COLUMNS]
# Inserts nothing if another version has become the current one. The lock is as for `_CURRENT`.
_INSERT = Prepared(
    insert(jobs)
    .from_select(
        _COLUMNS,
        select(*_values)
        .select_from(apis)
        .where(apis.c.name == bindparam("api_name"), apis.c.api_id == bindparam("api_id"))
        .with_for_update(read=True),
    )
    .returning(jobs.c.seq)
)
# The inner limit bounds the work, however many jobs wait.
_COUNT_WAITING = Prepared(
    select(func.count()).select_from(
        select(jobs.c.seq)
        .where(jobs.c.api_name == bindparam("name"), IS_WAITING)
        .limit(bindparam("limit"))
        .subquery()
    )
)
_LOCK = text("SELECT pg_advisory_xact_lock(:key, hashtext(:name))")


Submission = Callable[[Connection], tuple[JobRecord, bool]]


class Submissions:
    """Used by the thread that writes alone."""

    def __init__(self, max_waiting_bytes: int | None = None) -> None:
        self.waiting_bytes = WaitingBytes(max_waiting_bytes)
        self._limits: dict[str, Limits] = {}  # by version, which never changes
        self._current: dict[str, str] = {}
        """The version of each API at its last submit; it may have another by now."""

    def plan(
        self, draft: JobSpec, replay: Replay | None, claim: InitialClaim | None, *, is_shared: bool
    ) -> Submission | Statement[tuple[JobRecord, bool]]:
        """A submit as a function of the connection, or as one statement where nothing has to be
        read before: the version is most likely known, and no limit has to be counted."""

        def submit(connection: Connection) -> tuple[JobRecord, bool]:
            return self.submit(connection, draft, replay, claim)

        api_id = self._current.get(draft.api_name) if claim is None else claim.api_id
        if replay is not None or api_id is None:
            return submit
        if claim is None:
            limits = self._limits.get(api_id)
            if limits is None or limits.max_waiting is not None:
                return submit
            size = len(draft.config or "")
            if not self.waiting_bytes.add_within_budget(size, is_shared=is_shared):
                return submit
        insertion = _insertion(replace(draft, api_id=api_id), None, claim)

        def finish(connection: Connection, row: Row | None) -> tuple[JobRecord, bool]:
            job = insertion.finish(connection, row)
            return submit(connection) if job is None else (job, True)

        return Statement(insertion.prepared, insertion.values, finish)

    def submit(
        self,
        connection: Connection,
        draft: JobSpec,
        replay: Replay | None,
        claim: InitialClaim | None,
    ) -> tuple[JobRecord, bool]:
        """See `Store.submit`."""
        current = _CURRENT.first(connection, {"name": draft.api_name})
        if current is None:
            raise NotFound(f"there is no API {draft.api_name!r}; see `cortex get`")
        (api_id,) = current
        self._current[draft.api_name] = api_id
        if replay is not None and (earlier := earlier_job(connection, draft, replay)):
            return earlier, False
        is_claimed = claim is not None and claim.api_id == api_id
        if not is_claimed:
            self._refuse_over_limit(connection, draft.api_name, api_id)
            self.waiting_bytes.add(connection, len(draft.config or ""))
        spec = replace(draft, api_id=api_id)
        job = _insertion(spec, replay, claim if is_claimed else None).run(connection)
        assert job is not None  # the row of the API is locked
        return job, True

    def _refuse_over_limit(self, connection: Connection, name: str, api_id: str) -> None:
        if api_id not in self._limits:
            query = select(versions.c.spec).where(versions.c.api_id == api_id)
            spec = ApiSpec.model_validate_json(connection.execute(query).scalar_one())
            self._limits[api_id] = spec.limits
        limit = self._limits[api_id].max_waiting
        if limit is None:
            return
        if connection.dialect.name != "sqlite":  # other operators may count at the same time
            connection.execute(_LOCK, {"key": WAITING_JOBS_LOCK, "name": name})
        waiting = _COUNT_WAITING.first(connection, {"name": name, "limit": limit})
        if waiting is not None and waiting[0] >= limit:
            raise OverLimit(
                f"{name!r} already has {limit} waiting jobs (limits.max_waiting); retry after some "
                "of them have started"
            )


def earlier_job(connection: Connection, draft: JobSpec, replay: Replay) -> JobRecord | None:
    """See `Store.submitted_before`."""
    row = _BY_KEY.first(connection, {"name": draft.api_name, "key": replay.key})
    if row is None:
        return None
    earlier = long_texts.with_config(connection, whole_record(row))
    if row[_HASH_COLUMN] != replay.body_hash:
        raise Conflict(
            f"job {earlier.spec.job_id} was submitted with the Idempotency-Key {replay.key!r} and "
            "another body; use a new key for a new job"
        )
    return earlier


def _insertion(
    spec: JobSpec, replay: Replay | None, claim: InitialClaim | None
) -> Statement[JobRecord | None]:
    """Inserts a job; None if its version is not its API's current one."""
    state = State.WAITING if claim is None else State.STARTING
    config = spec.config or "{}"
    values: dict[str, Value] = {
        "job_id": spec.job_id,
        "api_name": spec.api_name,
        "api_id": spec.api_id,
        "spec": spec_text(spec),
        "config_bytes": len(config),
        "created_ns": spec.created_ns,
        "state": state.value,
        "wanted": Wanted.RUN.value,
        "attempt": 0 if claim is None else 1,
        "handle": None if claim is None else claim.handle,
        "idempotency_key": None if replay is None else replay.key,
        "idempotency_hash": None if replay is None else replay.body_hash,
    }

    def job(connection: Connection, row: Row | None) -> JobRecord | None:
        if row is None:
            return None
        if long_texts.is_long(config):
            long_texts.write(connection, row[0], long_texts.Name.CONFIG, config)
        return JobRecord(
            seq=row[0],
            spec=spec,
            state=state,
            wanted=Wanted.RUN,
            attempt=0 if claim is None else 1,
            handle=None if claim is None else claim.handle,
        )

    return Statement(_INSERT, values, job)
