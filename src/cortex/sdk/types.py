"""The types of the client's results: the operator's JSON, unchanged, with typed fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from typing import NotRequired

    from pydantic import JsonValue

    from cortex.spec.job import Json


class SubmittedJob(TypedDict):
    """A job, as the response to its submit."""

    job_id: str
    api_name: str
    kind: Literal["TaskAPI"]
    workers: int
    config: Json
    api_id: str
    timeout: int | None
    created_time: str


class JobOutline(TypedDict):
    """A job's state, without its config."""

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
    """A job's state and its config."""

    config: Json


class ListedJob(JobOutline):
    """A job in a list. A long `config` or `result` is None, and `truncated` names the field.

    `get_job` returns them complete.
    """

    config: Json | None
    truncated: NotRequired[list[Literal["config", "result"]]]


class JobView(TypedDict):
    """A job, its URL, and the spec of its API's version."""

    job_status: JobStatus
    endpoint: str
    api_spec: Json


class JobPage(TypedDict):
    """A page of an API's jobs, newest first. `next_cursor` is None on the last page."""

    job_statuses: list[ListedJob]
    next_cursor: int | None


class ApiVersion(TypedDict):
    """One deployed version of an API."""

    api_id: str
    last_updated: str


class ApiView(TypedDict):
    """A deployed API. `task_job_statuses` has the jobs in progress, then the newest ended jobs."""

    spec: Json
    endpoint: str
    task_job_statuses: list[ListedJob]
    api_versions: list[ApiVersion]
    hints: NotRequired[list[str]]
    truncated: NotRequired[list[Literal["task_job_statuses"]]]


class DeployResult(TypedDict):
    """The result of a deploy for one API.

    `error` is empty on success. `message` has each warning on a line of its own.
    """

    api: ApiView | None
    message: str
    warnings: NotRequired[list[str]]
    error: str


class AuditEntry(TypedDict):
    """An action or a refused request.

    `by` is the name of a token; for a command that works on the store, it is the system user. Equal
    refusals make one entry, and `count` is their number.
    """

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
    """A page of the audit log, newest first. `next_cursor` is None on the last page."""

    entries: list[AuditEntry]
    next_cursor: int | None


class Message(TypedDict):
    """A message about what the operator did."""

    message: str


class EnvironmentEntry(TypedDict):
    """One configured environment."""

    name: str
    operator_endpoint: str


class EnvironmentList(TypedDict):
    """The configured environments."""

    default_environment: str | None
    environments: list[EnvironmentEntry]
