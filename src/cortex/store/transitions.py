"""The guarded transitions: one UPDATE per event, compare-and-set on the observed state.

The UPDATE returns the row as it is afterwards. If it returns no row, the event came too late and
changed nothing. The statements are made from the tables of `cortex.spec.lifecycle`, once, at
import.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import NoReturn

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Connection, Update, bindparam, case, func, or_, select, update

from cortex.spec.job import JobRecord, JobSpec, encode, with_texts
from cortex.spec.lifecycle import TRANSITIONS, Event, State, Wanted, sources
from cortex.store import long_texts
from cortex.store.events import Claim, JobEvent
from cortex.store.prepared import Prepared, Row, Statement
from cortex.store.schema import IS_IN_PROGRESS, jobs
from cortex.worker.checks import NOT_KEPT, why_no_result

_is_not_stopped = jobs.c.wanted == Wanted.RUN
_started_or_created = func.coalesce(jobs.c.start_ns, jobs.c.created_ns)


def _later(a: ColumnElement[int], b: ColumnElement[int]) -> ColumnElement[int]:
    """The later of two times: SQLite calls the function for it `max`, PostgreSQL `greatest`."""
    return case((a > b, a), else_=b)


def _unless_stopped(
    column: ColumnElement[int], value: ColumnElement[int]
) -> ColumnElement[int | None]:
    """The new value, or the old one of a stopped job: an acknowledged stop is final."""
    return case((_is_not_stopped, value), else_=column)


def _ending(event: Event) -> Update:
    start = _later(
        func.coalesce(bindparam("start_ns"), jobs.c.start_ns, jobs.c.created_ns), jobs.c.created_ns
    )
    return _guarded(event).values(
        start_ns=_unless_stopped(jobs.c.start_ns, start),
        end_ns=_unless_stopped(jobs.c.end_ns, _later(bindparam("end_ns"), start)),
        message=_unless_stopped(jobs.c.message, bindparam("message")),
        exit_code=bindparam("exit_code"),
        result=_unless_stopped(jobs.c.result, bindparam("result")),
        handle=None,
    )


def _guarded(event: Event, which: ColumnElement[bool] | None = None) -> Update:
    targets = {state: to for (state, taken), to in TRANSITIONS.items() if taken is event}
    return (
        update(jobs)
        .where(
            jobs.c.job_id == bindparam("id") if which is None else which,
            or_(*(jobs.c.state == state for state in sorted(sources(event)))),
        )
        .values(state=case(targets, value=jobs.c.state))
        .returning(*jobs.c)
    )


def _of_attempt(statement: Update) -> Update:
    return statement.where(jobs.c.attempt == bindparam("of_attempt"))


_ENDINGS = (Event.SUCCEED, Event.FAIL, Event.OUT_OF_MEMORY, Event.TIME_OUT, Event.LOSE)


def _stop(guarded: Update) -> Update:
    return guarded.where(_is_not_stopped).values(
        wanted=Wanted.STOP,
        end_ns=_later(bindparam("end_ns"), _started_or_created),
        message=bindparam("message"),
    )


STOP = _stop(_guarded(Event.STOP))
STOP_ALL = _stop(_guarded(Event.STOP, jobs.c.api_name == bindparam("of_api")).where(IS_IN_PROGRESS))
"""Stops all jobs of an API at once, which may be very many; returns their rows in no order."""

_UPDATES: dict[Event, Update] = {
    Event.CLAIM: _of_attempt(_guarded(Event.CLAIM)).values(
        attempt=jobs.c.attempt + 1, handle=bindparam("handle")
    ),
    Event.UNCLAIM: _of_attempt(_guarded(Event.UNCLAIM)).where(_is_not_stopped).values(handle=None),
    Event.RETRY: _of_attempt(_guarded(Event.RETRY))
    .where(_is_not_stopped)
    .values(handle=None, start_ns=None, losses=jobs.c.losses + 1, message=bindparam("message")),
    Event.START: _of_attempt(_guarded(Event.START)).values(
        start_ns=_unless_stopped(jobs.c.start_ns, _later(bindparam("start_ns"), jobs.c.created_ns)),
    ),
    Event.STOP: STOP,
    **{event: _of_attempt(_ending(event)) for event in _ENDINGS},
}

_STATEMENTS = {event: Prepared(statement) for event, statement in _UPDATES.items()}

_STORED_AS_LONG_TEXT = " null"
"""The result column of a job whose result is among the long texts.

No other result begins with a space, and an operator of an older version on the same database reads
it as null.
"""

BY_ID = Prepared(select(jobs).where(jobs.c.job_id == bindparam("job_id")))


@dataclass(frozen=True)
class Outcome:
    """Whether an event was taken, and the job as it is now (None: no such job)."""

    taken: bool
    job: JobRecord | None


def take(job_id: str, event: JobEvent, spec: JobSpec | None = None) -> Statement[Outcome]:
    """Take one event, if the job is in a state that accepts it.

    Args:
        spec: of the job, if the caller has it, to save decoding it from the row.

    Returns:
        The write. Its outcome is whether the event was taken, and the job; after a claim with its
        config, however long.
    """
    values = event.values()
    result = values.get("result")
    is_long = isinstance(result, str) and long_texts.is_long(result)
    if is_long:
        values = {**values, "result": _STORED_AS_LONG_TEXT}

    def outcome(connection: Connection, row: Row | None) -> Outcome:
        if row is None:
            row = BY_ID.first(connection, {"job_id": job_id})
            return Outcome(False, None if row is None else record(row, spec))
        if isinstance(event, Claim):
            return Outcome(True, long_texts.with_config(connection, whole_record(row, spec)))
        job = record(row, spec)
        if is_long and job.has_result:  # a stopped job has none
            long_texts.write(connection, job.seq, long_texts.Name.RESULT, str(result))
        return Outcome(True, job)

    return Statement(_STATEMENTS[event.event], {"id": job_id, **values}, outcome)


def record(row: Row, spec: JobSpec | None = None) -> JobRecord:
    """The job of a row of all columns, without a config or a result that is long."""
    job = _job(row, spec, is_whole=False)
    if long_texts.is_long(job.spec.config):
        job = replace(job, spec=replace(job.spec, config=None))
    return job


def whole_record(row: Row, spec: JobSpec | None = None) -> JobRecord:
    """The job of a row of all columns, with long texts that an older version stored in the row."""
    return _job(row, spec, is_whole=True)


def _job(row: Row, spec: JobSpec | None, *, is_whole: bool) -> JobRecord:
    """Decode a row, and leave out of it what cannot be shown.

    An older version stored values unchecked from a record that the job itself had written. One such
    row must not make every list of jobs fail.
    """
    (
        seq, _, _, _, spec_text, _, state, wanted, attempt, handle, start_ns, end_ns, exit_code,
        message, result, _, _, has_folder, losses, _,
    ) = row  # fmt: skip
    if spec is None or spec.config is None:
        spec = _spec(spec_text)
    has_result, problem = result is not None, None
    if result == _STORED_AS_LONG_TEXT or (not is_whole and long_texts.is_long(result)):
        result = None
    elif result is not None and (problem := _result_problem(result)) is not None:
        result, has_result = None, False
    return JobRecord(
        seq=seq,
        spec=spec,
        state=State(state),
        wanted=Wanted(wanted),
        attempt=attempt,
        handle=handle,
        start_ns=_integer(start_ns),
        end_ns=_integer(end_ns),
        exit_code=_integer(exit_code),
        message=message if problem is None else message or f"{NOT_KEPT}: {problem}",
        result=result,
        has_result=has_result,
        has_folder=bool(has_folder),
        losses=losses,
    )


def spec_text(spec: JobSpec) -> str:
    """The job's spec as the row stores it; a long config is null there."""
    config = "null" if long_texts.is_long(spec.config) else spec.config
    return "".join(with_texts(spec.facts(), config=config))


def _spec(text: str) -> JobSpec:
    stored = json.loads(text)
    config = stored.pop("config")
    return JobSpec(**stored, config=None if config is None else encode(config))


def _result_problem(text: str) -> str | None:
    """Why a stored result cannot be shown, or None."""
    try:
        value: JsonValue = _decode(text)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    return why_no_result(text.encode(), value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _integer(value: object) -> int | None:
    """The value if it is an integer: a column of SQLite accepts text as well."""
    return value if isinstance(value, int) else None
