"""The calls of `Client` and `AsyncClient`, each as an exchange or a request without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, cast

from cortex.errors import CortexError, NotFound
from cortex.sdk import exchange
from cortex.sdk.exchange import RESPONSE_TIMEOUT_S, Request, path_segment, retry_until

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.sdk.deploys import Upload
    from cortex.sdk.exchange import Exchange
    from cortex.sdk.types import (
        ApiView,
        AuditPage,
        DeployResult,
        JobPage,
        JobView,
        ListedJob,
        Message,
        SubmittedJob,
    )

EVENTS = "text/event-stream"
TEXT = "text/plain"

_STREAM_TIMEOUT_S = 60.0
_MAX_WAIT_PER_REQUEST_S = 20.0


def get_object(path: str) -> Exchange[dict[str, JsonValue]]:
    """The JSON object that a GET of `path` returns."""
    return cast("dict[str, JsonValue]", (yield Request("GET", path)))


def audit(limit: int | None, cursor: int | None) -> Exchange[AuditPage]:
    """A page of the audit log."""
    params = _without_none({"limit": limit, "cursor": cursor})
    return cast("AuditPage", (yield Request("GET", "/-/audit", params=params)))


def deploy(upload: Upload) -> Exchange[list[DeployResult]]:
    """Send an upload.

    Returns:
        The result of each API. The first one has the warning about what the upload left out.
    """
    results = cast("list[DeployResult]", (yield upload.request))
    if upload.left_out is not None and results:
        first = results[0]
        first["message"] += f"\nwarning: {upload.left_out}"
        first["warnings"] = [*first.get("warnings", ()), upload.left_out]
    return results


def create_api(upload: Upload) -> Exchange[list[DeployResult]]:
    """Send an upload all of whose APIs must be deployed.

    Raises:
        CortexError: one of the APIs was not deployed.
    """
    results = yield from deploy(upload)
    errors = [result["error"] for result in results if result["error"]]
    if errors:
        raise CortexError("\n".join(errors), kind="deploy.failed")
    return results


def list_apis() -> Exchange[list[ApiView]]:
    """Every deployed API."""
    return cast("list[ApiView]", (yield Request("GET", "/-/apis")))


def get_api(api_name: str) -> Exchange[ApiView]:
    """One deployed API."""
    return cast("list[ApiView]", (yield Request("GET", _api_path(api_name))))[0]


def delete_api(api_name: str) -> Exchange[Message]:
    """Delete an API."""
    return cast("Message", (yield Request("DELETE", _api_path(api_name))))


def submit_job(
    api_name: str,
    config: Mapping[str, JsonValue] | None,
    timeout: int | None,
    idempotency_key: str | None,
) -> Exchange[SubmittedJob]:
    """Submit a job; repeat the submit while its response is lost."""
    content = exchange.submit_body(config, timeout)
    response = yield from exchange.submit(_jobs_path(api_name), content, idempotency_key)
    return cast("SubmittedJob", response)


def get_job(api_name: str, job_id: str, wait: float | None) -> Exchange[JobView]:
    """A job; with `wait`, as soon as it has ended, or after that many seconds."""
    deadline = monotonic() + (wait or 0.0)
    path = _job_path(api_name, job_id)

    def new_request() -> Request:
        wait_s = min(_MAX_WAIT_PER_REQUEST_S, max(0.0, deadline - monotonic()))
        params = {"wait": round(wait_s, 3)} if wait_s else None
        timeout_s = RESPONSE_TIMEOUT_S + wait_s
        return Request("GET", path, params=params, response_timeout_s=timeout_s)

    while True:
        job = cast("JobView", (yield from retry_until(deadline, new_request)))
        if "end_time" in job["job_status"] or monotonic() >= deadline:
            return job


def list_jobs(
    api_name: str, status: str | None, limit: int | None, cursor: int | None
) -> Exchange[JobPage]:
    """A page of the API's jobs."""
    params = _without_none({"status": status, "limit": limit, "cursor": cursor})
    return cast("JobPage", (yield Request("GET", _jobs_path(api_name), params=params)))


def newest_job(api_name: str) -> Exchange[ListedJob]:
    """The newest job of an API.

    Raises:
        NotFound: the API has no jobs.
    """
    page = yield from list_jobs(api_name, None, 1, None)
    if not page["job_statuses"]:
        raise NotFound(f"{api_name} has no jobs yet; `cortex submit {api_name}` submits one")
    return page["job_statuses"][0]


def stop_job(api_name: str, job_id: str) -> Exchange[Message]:
    """Stop a job."""
    return cast("Message", (yield Request("DELETE", _job_path(api_name, job_id))))


def read_log(api_name: str, job_id: str) -> Request:
    """The request for the `TEXT` of a job's log as written up to now."""
    return _log_request(api_name, job_id, {"Accept": TEXT})


def follow_log(api_name: str, job_id: str, last_event_id: str | None) -> Request:
    """The request for the `EVENTS` of a job's log after an event; None is from the beginning."""
    headers = {"Accept": EVENTS, "Accept-Encoding": "identity"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    return _log_request(api_name, job_id, headers)


def _log_request(api_name: str, job_id: str, headers: Mapping[str, str]) -> Request:
    path = f"{_job_path(api_name, job_id)}/logs"
    return Request("GET", path, headers=headers, response_timeout_s=_STREAM_TIMEOUT_S)


def _without_none(params: Mapping[str, str | int | None]) -> dict[str, str | float]:
    return {name: value for name, value in params.items() if value is not None}


def _api_path(api_name: str) -> str:
    return f"/-/apis/{path_segment(api_name)}"


def _jobs_path(api_name: str) -> str:
    return f"{_api_path(api_name)}/jobs"


def _job_path(api_name: str, job_id: str) -> str:
    return f"{_jobs_path(api_name)}/{path_segment(job_id)}"
