"""An API spec: the content of one `cortex.yaml` entry, and a deployed version of it.

`spec.cortex_yaml` reads the YAML; this module has the fields and their meaning.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

RESERVED_ENDPOINTS = frozenset({"healthz", "readyz", "metrics"})
MILLI = 1000
MASK = "********"
"""Shown instead of the value of an environment variable."""


class _Strict(BaseModel):
    # The input may have secrets, and errors are logged.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Dependencies(_Strict):
    """Files of the project that list what to install; None: the default file, which is optional."""

    pip: str | None = Field(None, description="Instead of requirements.txt.")
    conda: str | None = Field(None, description="Instead of conda-packages.txt.")
    shell: str | None = Field(None, description="Instead of dependencies.sh; no job runs it.")


DEFAULT_DEPENDENCIES = Dependencies()


class Definition(_Strict):
    """What runs: a Python file with a Task, or a command."""

    path: str | None = Field(None, description="Python file, relative to the project.")
    command: list[str] | None = Field(None, description="Program and arguments; no shell.")
    config: dict[str, JsonValue] = Field(default_factory=dict)
    python_path: str | None = Field(None, description="Folder put on sys.path.")
    env: dict[str, str] = Field(default_factory=dict)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    preload: tuple[str, ...] = Field(
        (), description="Modules that the fork server imports once, before any job."
    )
    dependencies: Dependencies = DEFAULT_DEPENDENCIES


class Networking(_Strict):
    """The URL path of the API."""

    endpoint: str


class Compute(_Strict):
    """The resources of one job."""

    cpu_m: int = Field(200, description="Thousandths of a core.")
    mem: int | None = Field(None, description="Bytes; None is no limit and reserves none.")
    gpu: int = 0
    node_labels: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Labels that a node must have, with the allowed values.",
    )


class Limits(_Strict):
    """The limits of one API."""

    max_running: int | None = Field(None, description="Jobs that may run at once; the others wait.")
    max_waiting: int | None = Field(None, description="Jobs that may wait; more are refused.")
    log: int = Field(64 << 20, description="Bytes kept of one job's log; the middle goes first.")


class Api(_Strict):
    """One entry of a `cortex.yaml`, checked, with defaults filled in."""

    name: str
    kind: Literal["TaskAPI"] = "TaskAPI"
    definition: Definition
    networking: Networking
    compute: Compute = Compute()
    limits: Limits = Limits()
    retries: int = Field(0, description="How many lost attempts of a job are followed by another.")


class ApiSpec(Api):
    """A deployed version of an API, as `api_spec` shows it."""

    api_id: str
    project_id: str = Field(description="SHA-256 over the project's files.")
    last_updated: str = Field(description="When this version was deployed, RFC 3339.")
    submitted_api_spec: dict[str, JsonValue] | None = Field(
        None,
        description="The entry as written in its `cortex.yaml`, with the values of `env` masked; "
        "None for versions from before it was stored.",
    )
