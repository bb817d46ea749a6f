"""An API spec: the content of one `cortex.yaml` entry, and a deployed version of it.

A field has one declaration here: its type, default and meaning, and in `Written` its check and its
name in the file. `spec.cortex_yaml` reads the YAML with those checks. The models check only types:
specs of older versions, in the store, stay readable when a check becomes stricter.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from cortex.spec import yaml_fields
from cortex.spec.yaml_fields import Written

MASK = "********"
"""Shown instead of the value of an environment variable."""

Kind = Literal["TaskAPI"]
LogLevel = Literal["debug", "info", "warning", "error"]

_MAX_GPUS = 1000
_MAX_JOBS = 1_000_000_000


class _Strict(BaseModel):
    # The input may have secrets, and errors are logged.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Dependencies(_Strict):
    """Files of the project that list what to install; None: the default file, which is optional."""

    pip: Annotated[
        str | None, Written(yaml_fields.project_path("a file like requirements.txt"))
    ] = Field(None, description="Instead of requirements.txt.")
    conda: Annotated[
        str | None, Written(yaml_fields.project_path("a file like conda-packages.txt"))
    ] = Field(None, description="Instead of conda-packages.txt.")
    shell: Annotated[str | None, Written(yaml_fields.project_path("a shell script"))] = Field(
        None, description="Instead of dependencies.sh; no job runs it."
    )


DEFAULT_DEPENDENCIES = Dependencies()


class Definition(_Strict):
    """What runs: a Python file with a Task, or a command."""

    path: Annotated[str | None, Written(yaml_fields.project_path("a Python file"))] = Field(
        None, description="Python file, relative to the project."
    )
    command: Annotated[list[str] | None, Written(yaml_fields.command)] = Field(
        None, description="Program and arguments; no shell."
    )
    config: Annotated[dict[str, JsonValue], Written(yaml_fields.config)] = Field(
        default_factory=dict
    )
    python_path: Annotated[str | None, Written(yaml_fields.project_path("a folder"))] = Field(
        None, description="Folder put on sys.path."
    )
    env: Annotated[dict[str, str], Written(yaml_fields.env)] = Field(default_factory=dict)
    log_level: Annotated[LogLevel, Written(yaml_fields.one_word(get_args(LogLevel)))] = "info"
    preload: Annotated[tuple[str, ...], Written(yaml_fields.modules)] = Field(
        (), description="Modules that the fork server imports once, before any job."
    )
    dependencies: Dependencies = DEFAULT_DEPENDENCIES


class Networking(_Strict):
    """The URL path of the API."""

    endpoint: Annotated[str, Written(yaml_fields.endpoint)]


class Compute(_Strict):
    """The resources of one job."""

    cpu_m: Annotated[int, Written(yaml_fields.cpu, name="cpu")] = Field(
        200, description="Thousandths of a core."
    )
    mem: Annotated[
        int | None,
        Written(yaml_fields.size(16 << 20, "at least 16Mi, without which no interpreter starts")),
    ] = Field(None, description="Bytes; None is no limit and reserves none.")
    gpu: Annotated[int, Written(yaml_fields.count(0, _MAX_GPUS))] = 0
    node_labels: Annotated[dict[str, tuple[str, ...]], Written(yaml_fields.labels)] = Field(
        default_factory=dict,
        description="Labels that a node must have, with the allowed values.",
    )


class Limits(_Strict):
    """The limits of one API."""

    max_running: Annotated[int | None, Written(yaml_fields.count(1, _MAX_JOBS))] = Field(
        None, description="Jobs that may run at once; the others wait."
    )
    max_waiting: Annotated[int | None, Written(yaml_fields.count(1, _MAX_JOBS))] = Field(
        None, description="Jobs that may wait; more are refused."
    )
    log: Annotated[int, Written(yaml_fields.size(64 << 10, "at least 64Ki"))] = Field(
        64 << 20, description="Bytes kept of one job's log; the middle goes first."
    )
    checkpoint: Annotated[int, Written(yaml_fields.size(1, "at least 1"))] = Field(
        1 << 30,
        description="Bytes of a job's files in $CORTEX_JOB_DIR/checkpoint that follow it to "
        "another node of a cluster; a larger checkpoint is not copied.",
    )


class Api(_Strict):
    """One entry of a `cortex.yaml`, checked, with defaults filled in."""

    name: Annotated[str, Written(yaml_fields.name, is_required=True)]
    kind: Annotated[
        Kind,
        Written(
            yaml_fields.one_word(get_args(Kind), " (no other kind is supported)"), is_required=True
        ),
    ] = "TaskAPI"
    definition: Annotated[Definition, Written(is_required=True)]
    networking: Networking
    compute: Compute = Compute()
    limits: Limits = Limits()
    retries: Annotated[int, Written(yaml_fields.count(0, _MAX_JOBS))] = Field(
        0, description="How many lost attempts of a job are followed by another."
    )


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
