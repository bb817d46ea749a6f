"""Everything that can be asked of an operator, each as an exchange: what `Client` and `AsyncClient` have as
methods is these."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING, cast

from cortex.errors import CortexError, NotFound
from cortex.sdk import submission
from cortex.sdk.again import until_answered
from cortex.sdk.exchange import ANSWER_S, Request, segment

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

_STREAM_SILENCE_S = 60.0
_WAIT_SLICE_S = 20.0


def told(path: str) -> Exchange[dict[str, JsonValue]]:
    """What the operator tells of itself there."""
    return cast("dict[str, JsonValue]", (yield Request("GET", path)))


def audit(limit: int | None, cursor: int | None) -> Exchange[AuditPage]:
    """A page of the audit."""
    asked = {"limit": limit, "cursor": cursor}
    params = {name: value for name, value in asked.items() if value is not None}
    return cast("AuditPage", (yield Request("GET", "/-/audit", params=params)))


def deploy(upload: Upload) -> Exchange[list[DeployResult]]:
    """What became of each API of an upload. The first one has the warning of what was left out of it."""
    results = cast("list[DeployResult]", (yield upload.request))
    if upload.left_out is not None and results:
        first = results[0]
        first["message"] += f"\nwarning: {upload.left_out}"
        first["warnings"] = [*first.get("warnings", ()), upload.left_out]
    return results


def create_api(upload: Upload) -> Exchange[list[DeployResult]]:
    """The same.

    Raises:
        CortexError: an API of it was not deployed.
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
    """Submit a job, again where the answer was lost."""
    content = submission.body(config, timeout)
    answer = yield from submission.submitted(_jobs_path(api_name), content, idempotency_key)
    return cast("SubmittedJob", answer)


def get_job(api_name: str, job_id: str, wait: float | None) -> Exchange[JobView]:
    """A job's status; with `wait`, as soon as it has ended, or after that many seconds."""
    deadline = monotonic() + (wait or 0.0)
    path = _job_path(api_name, job_id)

    def ask() -> Request:
        left_s = min(_WAIT_SLICE_S, max(0.0, deadline - monotonic()))
        params = {"wait": round(left_s, 3)} if left_s else None
        return Request("GET", path, params=params, answer_s=ANSWER_S + left_s)

    while True:
        job = cast("JobView", (yield from until_answered(ask, deadline)))
        if "end_time" in job["job_status"] or monotonic() >= deadline:
            return job


def list_jobs(
    api_name: str, status: str | None, limit: int | None, cursor: int | None
) -> Exchange[JobPage]:
    """A page of the API's jobs."""
    asked = {"status": status, "limit": limit, "cursor": cursor}
    params = {name: value for name, value in asked.items() if value is not None}
    return cast("JobPage", (yield Request("GET", _jobs_path(api_name), params=params)))


def newest_job(api_name: str) -> Exchange[ListedJob]:
    """The newest job of an API.

    Raises:
        NotFound: it has none.
    """
    page = yield from list_jobs(api_name, None, 1, None)
    if not page["job_statuses"]:
        raise NotFound(f"{api_name} has no jobs yet; `cortex submit {api_name}` submits one")
    return page["job_statuses"][0]


def stop_job(api_name: str, job_id: str) -> Exchange[Message]:
    """Stop a job."""
    return cast("Message", (yield Request("DELETE", _job_path(api_name, job_id))))


def log(api_name: str, job_id: str) -> Request:
    """The stream of a job's log as far as it is written, which is `TEXT`."""
    return _log(api_name, job_id, {"Accept": TEXT})


def followed_log(api_name: str, job_id: str, last_event_id: str | None) -> Request:
    """The stream of a job's log after an event, or from its beginning, which is `EVENTS`."""
    headers = {"Accept": EVENTS, "Accept-Encoding": "identity"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    return _log(api_name, job_id, headers)


def _log(api_name: str, job_id: str, headers: Mapping[str, str]) -> Request:
    path = f"{_job_path(api_name, job_id)}/logs"
    return Request("GET", path, headers=headers, answer_s=_STREAM_SILENCE_S)


def _api_path(api_name: str) -> str:
    return f"/-/apis/{segment(api_name)}"


def _jobs_path(api_name: str) -> str:
    return f"{_api_path(api_name)}/jobs"


def _job_path(api_name: str, job_id: str) -> str:
    return f"{_jobs_path(api_name)}/{segment(job_id)}"
