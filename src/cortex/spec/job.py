"""A job: the body of its submit, its spec, and its record in the store."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt

from cortex.spec.lifecycle import SHOWN, State, Status, Wanted

Json = dict[str, JsonValue]

KIND = "TaskAPI"
MAX_INLINE_BYTES = 2048
"""A longer config or result is not in a job's row, in the operator's memory, or in job lists."""

encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""Encode JSON as ASCII: a lone surrogate from a client goes back as the escape that it was."""

# The year 2262. A timeout may have more digits than integers of other programs, or JSON readers,
# accept.
_END_OF_TIME_NS = 2**63 - 1


class Submission(BaseModel):
    """The body of a submit; every field is optional."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    timeout: StrictInt | None = Field(
        None, gt=0, description="Seconds since submission after which the job is terminated."
    )
    config: Json | None = Field(
        None, description="Overrides the API's own `definition.config`, recursively."
    )
    workers: StrictInt = Field(1, ge=1, le=1, description="Accepted only as 1.")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A submitted job. `job.json` in its folder has these fields, with the merged `config`."""

    job_id: str
    api_name: str
    api_id: str
    config: str | None
    """As submitted, as JSON text, which the operator does not decode. None if it is long: then only
    the store has it."""
    created_ns: int
    timeout: int | None = None
    kind: str = KIND
    workers: int = 1

    def facts(self) -> Json:
        """All fields but the config."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "config"}

    @property
    def deadline_ns(self) -> int | None:
        """When the job is terminated, in nanoseconds since the epoch; None: never."""
        if self.timeout is None:
            return None
        return min(self.created_ns + self.timeout * 1_000_000_000, _END_OF_TIME_NS)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job in the store: its spec, its observed state, and its wanted state."""

    seq: int
    """Ascending in the order of submission, in which jobs wait."""
    spec: JobSpec
    state: State
    wanted: Wanted
    attempt: int
    """The number of claims so far; 0 before the first."""
    handle: str | None
    """Opaque text of the engine, from which it recovers this attempt."""
    start_ns: int | None = None
    end_ns: int | None = None
    exit_code: int | None = None
    """Negative: the signal that ended the job."""
    message: str | None = None
    result: str | None = None
    """As JSON text; None also if it is long: then only the store has it."""
    has_result: bool = False
    has_folder: bool = True
    """Whether its log and files still exist."""
    losses: int = 0
    """Lost attempts that were followed by another; `message` says why the last one was lost."""

    def without_long_config(self) -> JobRecord:
        """The record as the operator keeps it in memory."""
        if len(self.spec.config or "") <= MAX_INLINE_BYTES:
            return self
        return replace(self, spec=replace(self.spec, config=None))


def with_texts(content: Json, **texts: str | list[str] | None) -> list[str]:
    """A JSON object as pieces of its text, without decoding or copying its long fields.

    Args:
        content: the fields to encode.
        texts: further fields that are JSON text already, or pieces of it.
    """
    pieces = [encode(content)[:-1]]
    for name, text in texts.items():
        if text is not None:
            pieces.append(f',"{name}":')
            pieces.extend([text] if isinstance(text, str) else text)
    pieces.append("}")
    return pieces


def shown_status(record: JobRecord, unreachable: str | None = None) -> Status:
    """The status of a job, as clients receive it.

    Args:
        unreachable: why the engine cannot report the state of the job right now; None if it can.
    """
    status = SHOWN[record.state, record.wanted]
    if status is Status.RUNNING and unreachable is not None:
        return Status.UNKNOWN
    return status
