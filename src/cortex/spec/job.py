"""A job: what is submitted, what is stored, what a worker reads, and what is shown."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt

from cortex.spec.api import ApiSpec
from cortex.spec.lifecycle import State, Wanted

Json = dict[str, JsonValue]


class Submission(BaseModel):
    """The body of a submit; every field is optional."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    timeout: StrictInt | None = Field(
        None, gt=0, description="Seconds since submission after which the job is terminated."
    )
    config: Json | None = Field(
        None, description="Overrides the API's own `definition.config`, recursively."
    )
    workers: StrictInt | None = Field(1, ge=1, le=1, description="Accepted only as 1.")


class JobSpec(BaseModel):
    """What was submitted, complete: `job.json` beside the worker holds it and `config` merged."""

    model_config = ConfigDict(frozen=True)

    job_id: str
    api_name: str
    kind: Literal["TaskAPI"] = "TaskAPI"
    workers: Literal[1] = 1
    config: Json = Field(description="As submitted.")
    api_id: str
    timeout: int | None = None
    created_ns: int

    @property
    def deadline_ns(self) -> int | None:
        """When the job is terminated, in nanoseconds since the epoch; None is never."""
        return None if self.timeout is None else self.created_ns + self.timeout * 1_000_000_000


class JobRecord(BaseModel):
    """A job as the store holds it: its spec, what was observed of it, what is wanted of it."""

    model_config = ConfigDict(frozen=True)

    seq: int = Field(description="Grows with submission: the order in which jobs wait.")
    spec: JobSpec
    state: State
    wanted: Wanted
    attempt: int = Field(description="Counts claims; 0 before the first.")
    handle: str | None = Field(description="The engine's own, opaque: what recovers this attempt.")
    start_ns: int | None
    end_ns: int | None
    exit_code: int | None = Field(description="Negative: the signal that ended it.")
    message: str | None
    result: JsonValue = None
    has_result: bool = False


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
        **spec.model_dump(mode="json"),
        "submitted_config": spec.config,
        "config": merge_config(api.definition.config, spec.config),
    }
