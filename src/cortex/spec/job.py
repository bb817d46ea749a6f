"""A job: what is submitted, what is stored, what a worker reads, and what is shown."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt

from cortex.spec.api import ApiSpec
from cortex.spec.lifecycle import State, Wanted

Json = dict[str, JsonValue]

KIND = "TaskAPI"

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
    config: Json
    """As submitted."""
    created_ns: int
    timeout: int | None = None
    kind: str = KIND
    workers: int = 1

    def as_json(self) -> Json:
        """What is stored of it, and what `JobSpec(**…)` makes it of again."""
        return {name: getattr(self, name) for name in self.__slots__}

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
    result: JsonValue = None
    has_result: bool = False
    has_folder: bool = True
    """Whether its log and files have not been removed."""
    losses: int = 0
    """Attempts that were lost and followed by another, of which `message` tells the last."""


def merge_config(base: Json, override: Json) -> Json:
    """`override` laid over `base`: an object merges into an object, anything else replaces."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge_config(below, value) if both else value  # type: ignore[arg-type]  # both are dicts
    return merged


def worker_job(spec: JobSpec, api: ApiSpec) -> Json:
    """The content of `job.json`: the job spec with the merged config that the task is called with."""
    return {
        **spec.as_json(),
        "submitted_config": spec.config,
        "config": merge_config(api.definition.config, spec.config),
    }
