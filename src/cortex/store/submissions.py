"""A submit in the database: the job, its Idempotency-Key and the API's limit are decided in one commit.
Called by `Store`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sqlalchemy import Connection, bindparam, func, insert, select, text

from cortex.errors import Conflict, NotFound, OverLimit
from cortex.spec.api import ApiSpec, Limits
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import State, Wanted
from cortex.store import long_texts
from cortex.store.prepared import Prepared
from cortex.store.schema import IS_WAITING, apis, jobs, versions
from cortex.store.transitions import Facts, spec_text, whole_record
from cortex.store.waiting_bytes import WaitingBytes


@dataclass(frozen=True)
class InitialClaim:
    """A claim that is made in the commit of the submit, if the job is then of this version."""

    api_id: str
    handle: str


@dataclass(frozen=True)
class Replay:
    """What makes a repeated submit the same one."""

    key: str
    body_hash: str


_HASH = list(jobs.c.keys()).index("idempotency_hash")
# Where others write at the same time: whoever deletes the API waits for this, and finds the job.
_CURRENT = Prepared(
    select(apis.c.api_id).where(apis.c.name == bindparam("name")).with_for_update(read=True)
)
_REPLAYED = Prepared(
    select(jobs).where(
        jobs.c.api_name == bindparam("name"), jobs.c.idempotency_key == bindparam("key")
    )
)
_INSERT = Prepared(
    insert(jobs)
    .values(
        {
            name: bindparam(name)
            for name in (
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
        }
    )
    .returning(jobs.c.seq)
)
# The inner limit bounds what is counted, however many wait.
_WAITING = Prepared(
    select(func.count()).select_from(
        select(jobs.c.seq)
        .where(jobs.c.api_name == bindparam("name"), IS_WAITING)
        .limit(bindparam("most"))
        .subquery()
    )
)
_COUNTING = 0x636F_7274  # any number that nobody else takes
_IN_TURN = text("SELECT pg_advisory_xact_lock(:key, hashtext(:name))")


class Submissions:
    """Called by the thread that writes alone."""

    def __init__(self, max_waiting_bytes: int | None = None) -> None:
        self.room = WaitingBytes(max_waiting_bytes)
        self._limits: dict[str, Limits] = {}  # of versions, which never change

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
        if replay is not None and (earlier := _earlier(connection, draft, replay)):
            return earlier, False
        is_claimed = claim is not None and claim.api_id == api_id
        if not is_claimed:
            self._refuse_over_limit(connection, draft.api_name, api_id)
            self.room.take(connection, len(draft.config or ""))
        return _insert(
            connection, replace(draft, api_id=api_id), replay, claim if is_claimed else None
        ), True

    def _refuse_over_limit(self, connection: Connection, name: str, api_id: str) -> None:
        if api_id not in self._limits:
            query = select(versions.c.spec).where(versions.c.api_id == api_id)
            spec = ApiSpec.model_validate_json(connection.execute(query).scalar_one())
            self._limits[api_id] = spec.limits
        most = self._limits[api_id].max_waiting
        if most is None:
            return
        if connection.dialect.name != "sqlite":  # others count at the same time
            connection.execute(_IN_TURN, {"key": _COUNTING, "name": name})
        waiting = _WAITING.first(connection, {"name": name, "most": most})
        if waiting is not None and waiting[0] >= most:
            raise OverLimit(
                f"as many jobs of {name!r} wait as its limits.max_waiting allows, {most}; "
                "submit again when some of them have started"
            )


def _earlier(connection: Connection, draft: JobSpec, replay: Replay) -> JobRecord | None:
    row = _REPLAYED.first(connection, {"name": draft.api_name, "key": replay.key})
    if row is None:
        return None
    earlier = long_texts.with_config(connection, whole_record(row))
    if row[_HASH] != replay.body_hash:
        raise Conflict(
            f"the Idempotency-Key {replay.key!r} was used for another body, by job "
            f"{earlier.spec.job_id}; use a new key for a new job"
        )
    return earlier


def _insert(
    connection: Connection, spec: JobSpec, replay: Replay | None, claim: InitialClaim | None
) -> JobRecord:
    state = State.WAITING if claim is None else State.STARTING
    config = spec.config or "{}"
    values: Facts = {
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
    row = _INSERT.first(connection, values)
    assert row is not None
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
