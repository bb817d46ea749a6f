"""A job: what is submitted, what is stored, what a worker reads, and what is shown."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt

from cortex.spec.lifecycle import State, Wanted

Json = dict[str, JsonValue]

KIND = "TaskAPI"
MAX_INLINE_BYTES = 2048
"""A longer config or result is not in a job's row of the store, in the operator's memory, or in a list of jobs."""

encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""JSON text in ASCII: a lone surrogate that a client sent goes back as it came, as an escape."""

# The year 2262. A timeout may have more digits than arithmetic, or JSON elsewhere, takes.
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
    """What was submitted, complete: `job.json` beside the worker holds it and `config` merged."""

    job_id: str
    api_name: str
    api_id: str
    config: str | None
    """As submitted, as JSON text: nothing in the operator looks into it. None where it is long, and the store
    alone has it."""
    created_ns: int
    timeout: int | None = None
    kind: str = KIND
    workers: int = 1

    def facts(self) -> Json:
        """All but the config."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "config"}

    @property
    def deadline_ns(self) -> int | None:
        """When the job is terminated, in nanoseconds since the epoch; None is never."""
        if self.timeout is None:
            return None
        return min(self.created_ns + self.timeout * 1_000_000_000, _END_OF_TIME_NS)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as the store holds it: its spec, what was observed of it, what is wanted of it."""

    seq: int
    """Grows with submission: the order in which jobs wait."""
    spec: JobSpec
    state: State
    wanted: Wanted
    attempt: int
    """Counts claims; 0 before the first."""
    handle: str | None
    """The engine's own, opaque: what recovers this attempt."""
    start_ns: int | None = None
    end_ns: int | None = None
    exit_code: int | None = None
    """Negative: the signal that ended it."""
    message: str | None = None
    result: str | None = None
    """As JSON text; None also where it is long, and the store alone has it."""
    has_result: bool = False
    has_folder: bool = True
    """Whether its log and files have not been removed."""
    losses: int = 0
    """Attempts that were lost and followed by another, of which `message` tells the last."""

    def without_long_config(self) -> JobRecord:
        """What is kept in memory of a job that the store has."""
        if len(self.spec.config or "") <= MAX_INLINE_BYTES:
            return self
        return replace(self, spec=replace(self.spec, config=None))


def with_texts(content: Json, **texts: str | list[str] | None) -> list[str]:
    """A JSON object, in pieces of its text, with fields that are texts already, or pieces of one: they may be
    long, and are neither read nor copied."""
    pieces = [encode(content)[:-1]]
    for name, text in texts.items():
        if text is not None:
            pieces.append(f',"{name}":')
            pieces.extend([text] if isinstance(text, str) else text)
    pieces.append("}")
    return pieces
