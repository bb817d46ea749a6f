"""What the client returns: the operator's JSON as it came, with its fields named for type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from typing import NotRequired

    from pydantic import JsonValue

    from cortex.spec.job import Json


class SubmittedJob(TypedDict):
    """A job as its submission answers."""

    job_id: str
    api_name: str
    kind: Literal["TaskAPI"]
    workers: int
    config: Json
    api_id: str
    timeout: int | None
    created_time: str


class JobOutline(TypedDict):
    """What became of a job so far; all but its config."""

    job_id: str
    api_name: str
    kind: Literal["TaskAPI"]
    workers: int
    api_id: str
    timeout: int | None
    created_time: str
    status: str
    start_time: str
    end_time: NotRequired[str]
    worker_counts: NotRequired[dict[str, int]]
    message: NotRequired[str | None]
    exit_code: NotRequired[int | None]
    result: NotRequired[JsonValue]


class JobStatus(JobOutline):
    """A job and what became of it so far."""

    config: Json


class ListedJob(JobOutline):
    """A job in a list: a long `config` or `result` is None, and `truncated` names it. `get_job` has all."""

    config: Json | None
    truncated: NotRequired[list[Literal["config", "result"]]]


class JobView(TypedDict):
    """A job, where it is reached, and the version of the API that it runs."""

    job_status: JobStatus
    endpoint: str
    api_spec: Json


class JobPage(TypedDict):
    """Jobs of an API, newest first; `next_cursor` leads to the next page, and is None on the last."""

    job_statuses: list[ListedJob]
    next_cursor: int | None


class ApiVersion(TypedDict):
    """One deployed version of an API."""

    api_id: str
    last_updated: str


class ApiView(TypedDict):
    """A deployed API: jobs in progress come first in `task_job_statuses`, then the most recent."""

    spec: Json
    endpoint: str
    task_job_statuses: list[ListedJob]
    api_versions: list[ApiVersion]
    hints: NotRequired[list[str]]
    truncated: NotRequired[list[Literal["task_job_statuses"]]]


class DeployResult(TypedDict):
    """What a deploy did with one API of its file; `error` is empty when it worked. `message` holds the
    warnings, each in a line of its own."""

    api: ApiView | None
    message: str
    warnings: NotRequired[list[str]]
    error: str


class AuditEntry(TypedDict):
    """What was done or refused: `by` is a token's name, and of a command on the store the system user;
    `count` equal refusals are one entry."""

    time: str
    action: str
    by: str | None
    address: str | None
    api_name: str | None
    job_id: str | None
    token: str | None
    message: str | None
    count: int


class AuditPage(TypedDict):
    """Entries of the audit, newest first; `next_cursor` leads to the next page, and is None on the last."""

    entries: list[AuditEntry]
    next_cursor: int | None


class Message(TypedDict):
    """What was done, in words."""

    message: str


class EnvironmentEntry(TypedDict):
    """One configured environment."""

    name: str
    operator_endpoint: str


class EnvironmentList(TypedDict):
    """The configured environments."""

    default_environment: str | None
    environments: list[EnvironmentEntry]
