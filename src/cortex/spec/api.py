"""An API spec: what a `cortex.yaml` describes and a deploy fixes. The YAML itself is read in
`spec.yaml`; here is the shape, and the words for what is allowed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

RESERVED_ENDPOINTS = frozenset({"healthz", "readyz", "metrics"})
MILLI = 1000
MASK = "********"
"""Stands for the value of an environment variable, wherever one would be shown."""


class _Strict(BaseModel):
    # Secrets are in it, and an error ends in a log.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Dependencies(_Strict):
    """The project's files that say what is installed; None is the default name, of a file that may be missing."""

    pip: str | None = Field(None, description="Instead of requirements.txt.")
    conda: str | None = Field(None, description="Instead of conda-packages.txt.")
    shell: str | None = Field(None, description="Instead of dependencies.sh; no job runs it.")


DEFAULT_DEPENDENCIES = Dependencies()


class Definition(_Strict):
    """What runs: a Python file with a Task, or a command."""

    path: str | None = Field(None, description="Python file, relative to the project.")
    command: list[str] | None = Field(None, description="Program and arguments, run as they are.")
    config: dict[str, JsonValue] = Field(default_factory=dict)
    python_path: str | None = Field(None, description="Folder put on sys.path.")
    env: dict[str, str] = Field(default_factory=dict)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    preload: tuple[str, ...] = Field(
        (), description="Modules that the fork server imports once, ahead of all jobs."
    )
    dependencies: Dependencies = DEFAULT_DEPENDENCIES


class Networking(_Strict):
    """Where it is reached."""

    endpoint: str


class Compute(_Strict):
    """What one job takes of the machine."""

    cpu_m: int = Field(200, description="Thousandths of a core.")
    mem: int | None = Field(None, description="Bytes; None is no limit and takes none.")
    gpu: int = 0
    node_labels: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Labels of the nodes it may run on: one of each's values."
    )


class Limits(_Strict):
    """What one API may take at most, whatever is submitted to it."""

    max_running: int | None = Field(None, description="Jobs that run at once; the others wait.")
    max_waiting: int | None = Field(None, description="Jobs that wait; a submit beyond is refused.")
    log: int = Field(64 << 20, description="Bytes kept of one job's log; its middle goes first.")


class Api(_Strict):
    """One entry of a `cortex.yaml`, checked and with its defaults filled in."""

    name: str
    kind: Literal["TaskAPI"] = "TaskAPI"
    definition: Definition
    networking: Networking
    compute: Compute = Compute()
    limits: Limits = Limits()
    retries: int = Field(0, description="New attempts that a job gets when one was lost.")


class ApiSpec(Api):
    """A deployed version of an API: what `api_spec` shows."""

    api_id: str
    project_id: str = Field(description="SHA-256 over the project's files.")
    last_updated: str = Field(description="When this version was deployed, RFC 3339.")
    submitted_api_spec: dict[str, JsonValue] | None = Field(
        None,
        description="The entry as its `cortex.yaml` has it, the values of `env` masked; None for versions "
        "of before it was kept.",
    )
