"""The job routes: submit, status, stop, list.

The same handlers answer at an API's endpoint, at the operator's own `/-/apis/{name}/jobs`, and at
`/tasks/{name}`, where the original Cortex served them inside its cluster.

A path `/tasks/…` can also name a job of the API whose endpoint is `tasks`. The two differ in their
first character: ids begin with a digit, names with a letter.
"""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from pydantic import AfterValidator
from starlette.responses import Response

from cortex.errors import Conflict, InvalidRequest, NotFound
from cortex.operator.http.answers import Answer, json_answer, read_submission
from cortex.operator.http.context import Context, actor, context
from cortex.operator.http.views import is_partial, json_array, submit_answer
from cortex.spec.job import JobRecord, JobSpec, Submission, shown_status, with_texts
from cortex.spec.lifecycle import Status, Wanted
from cortex.spec.times import new_id, now_ns
from cortex.store import Replay

router = APIRouter(default_response_class=Answer)

_MAX_WAIT_S = 3600.0
_PAGE_SIZE = 20
_MAX_PAGE_SIZE = 1000

_SUBMIT_DOC = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": Submission.model_json_schema()}},
    }
}


def _checked_key(value: str | None) -> str | None:
    if value is not None and not 0 < len(value) <= 255:
        raise ValueError("an Idempotency-Key has 1 to 255 characters")
    return value


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Submits with the same key and body make one job: "
        "repeats get the first answer.",
    ),
    AfterValidator(_checked_key),
]
JobId = Annotated[str | None, Query(alias="jobID", description="The job's id.")]
Wait = Annotated[
    float, Query(ge=0, le=_MAX_WAIT_S, description="Seconds to wait for the job to complete.")
]
Limit = Annotated[int, Query(ge=1, le=_MAX_PAGE_SIZE, description="Entries per page.")]
Cursor = Annotated[
    int | None, Query(ge=1, lt=2**63, description="The `next_cursor` of the previous page.")
]


@router.post("/{endpoint:endpoint}", openapi_extra=_SUBMIT_DOC, tags=["jobs"])
async def submit(
    request: Request, endpoint: str, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit a job."""
    return await submit_to(context(request), request, endpoint, idempotency_key)


@router.post("/-/apis/{name}/jobs", openapi_extra=_SUBMIT_DOC, tags=["operator"])
@router.post("/tasks/{name:api_name}", openapi_extra=_SUBMIT_DOC, tags=["cortex"])
async def submit_by_name(
    request: Request, name: str, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit a job."""
    return await _submit(context(request), request, name, idempotency_key)


@router.get("/{endpoint:endpoint}", tags=["jobs"])
async def get(
    request: Request,
    endpoint: str,
    *,
    job_id: JobId = None,
    wait: Wait = 0,
    status: Status | None = None,
    limit: Limit = _PAGE_SIZE,
    cursor: Cursor = None,
) -> Response:
    """Get the status of one job (`jobID`), or list the API's jobs, newest first."""
    ctx = context(request)
    if job_id is not None:
        return await status_at(ctx, request, endpoint, job_id, wait)
    name = await ctx.api_at(endpoint)
    return await _list(ctx, request, name, limit=limit, status=status, cursor=cursor)


@router.get("/-/apis/{name}/jobs", tags=["operator"])
@router.get("/tasks/{name:api_name}", tags=["cortex"])
async def get_by_name(
    request: Request,
    name: str,
    *,
    job_id: JobId = None,
    wait: Wait = 0,
    status: Status | None = None,
    limit: Limit = _PAGE_SIZE,
    cursor: Cursor = None,
) -> Response:
    """Get the status of one job (`jobID`), or list the API's jobs, newest first."""
    ctx = context(request)
    if job_id is not None:
        return await _status(ctx, request, await ctx.job_of(name, job_id), wait)
    await ctx.check_api(name)
    return await _list(ctx, request, name, limit=limit, status=status, cursor=cursor)


@router.get("/-/apis/{name}/jobs/{job_id}", tags=["operator"])
@router.get("/tasks/{name:api_name}/{job_id}", tags=["cortex"])
async def status_by_name(request: Request, name: str, job_id: str, wait: Wait = 0) -> Response:
    """Get the status of one job."""
    ctx = context(request)
    return await _status(ctx, request, await ctx.job_of(name, job_id), wait)


@router.get("/{endpoint:endpoint}/{job_id}", tags=["jobs"])
async def status_at_endpoint(
    request: Request, endpoint: str, job_id: str, wait: Wait = 0
) -> Response:
    """Get the status of one job."""
    return await status_at(context(request), request, endpoint, job_id, wait)


@router.delete("/{endpoint:endpoint}", tags=["jobs"])
async def stop_by_query(request: Request, endpoint: str, job_id: JobId = None) -> Answer:
    """Stop one job (`jobID`)."""
    ctx = context(request)
    if job_id is None:
        raise _no_job_to_stop(f"/{endpoint}", await ctx.api_at(endpoint))
    return await _stop(ctx, request, await ctx.job_at(endpoint, job_id))


@router.delete("/-/apis/{name}/jobs", tags=["operator"])
@router.delete("/tasks/{name:api_name}", tags=["cortex"])
async def stop_by_name_and_query(request: Request, name: str, job_id: JobId = None) -> Answer:
    """Stop one job (`jobID`)."""
    ctx = context(request)
    if job_id is None:
        await ctx.check_api(name)
        raise _no_job_to_stop(request.url.path, name)
    return await _stop(ctx, request, await ctx.job_of(name, job_id))


@router.delete("/-/apis/{name}/jobs/{job_id}", tags=["operator"])
@router.delete("/tasks/{name:api_name}/{job_id}", tags=["cortex"])
async def stop_by_name(request: Request, name: str, job_id: str) -> Answer:
    """Stop one job."""
    ctx = context(request)
    return await _stop(ctx, request, await ctx.job_of(name, job_id))


@router.delete("/{endpoint:endpoint}/{job_id}", tags=["jobs"])
async def stop_at_endpoint(request: Request, endpoint: str, job_id: str) -> Answer:
    """Stop one job."""
    ctx = context(request)
    return await _stop(ctx, request, await ctx.job_at(endpoint, job_id))


async def submit_to(
    ctx: Context, request: Request, endpoint: str, key: str | None = None
) -> Response:
    """Submit a job to the API at an endpoint.

    Raises:
        CortexError: an error of the contract.
    """
    name = ctx.catalogue.name_at(endpoint) or await ctx.api_at(endpoint)
    return await _submit(ctx, request, name, key)


async def status_at(
    ctx: Context, request: Request, endpoint: str, job_id: str, wait_s: float
) -> Response:
    """The status of a job, as soon as it has completed or `wait_s` seconds have passed.

    Raises:
        NotFound: there is no such job.
    """
    return await _status(ctx, request, await ctx.job_at(endpoint, job_id), wait_s)


async def _submit(ctx: Context, request: Request, name: str, key: str | None) -> Response:
    submission = await read_submission(request, ctx.bodies, with_digest=key is not None)
    draft = JobSpec(
        job_id=new_id(),
        api_name=name,
        config=submission.config,
        api_id="",
        timeout=submission.timeout,
        created_ns=now_ns(),
    )
    replay = None if key is None else Replay(key, submission.digest or "")
    record = await ctx.jobs.submit(draft, replay)
    return json_answer(submit_answer(record.spec))


async def _status(ctx: Context, request: Request, record: JobRecord, wait_s: float) -> Response:
    deadline = time.monotonic() + wait_s
    while shown_status(record) is Status.RUNNING and (left_s := deadline - time.monotonic()) > 0:
        changed = await ctx.jobs.next_record(record.spec.job_id, left_s)
        if changed is None:
            raise _removed(record)
        record = changed
    if shown_status(record) is Status.RUNNING:
        # Only the leader knows why a job waits, and whether its node can be reached.
        answer = await ctx.forwarded(request)
        if answer is not None:
            return answer
    if is_partial(record):
        whole = await ctx.store.whole_job(record.spec.job_id)
        if whole is None:
            raise _removed(record)
        record = whole
    api_spec = await ctx.versions.shown(record.spec.api_id)
    return json_answer(ctx.renderer.job(record, api_spec, request))


async def _list(
    ctx: Context,
    request: Request,
    name: str,
    *,
    limit: int,
    status: Status | None,
    cursor: int | None,
) -> Response:
    if (answer := await ctx.forwarded(request)) is not None:
        return answer
    page = await ctx.store.list_jobs(name, limit=limit, status=status, cursor=cursor)
    statuses = ctx.renderer.page(page.jobs)
    is_cut = len(statuses) < len(page.jobs)
    next_cursor = page.jobs[len(statuses) - 1].seq if is_cut else page.next_cursor
    return json_answer(with_texts({"next_cursor": next_cursor}, job_statuses=json_array(statuses)))


async def _stop(ctx: Context, request: Request, record: JobRecord) -> Answer:
    job_id = record.spec.job_id
    outcome = await ctx.jobs.stop(job_id, actor(request))
    if outcome.job is None:
        raise _removed(record)
    if not outcome.taken and outcome.job.wanted is not Wanted.STOP:
        raise Conflict(f"the job {job_id} has already completed ({shown_status(outcome.job)})")
    return Answer({"message": f"stopped job {job_id}"})


def _no_job_to_stop(path: str, name: str) -> InvalidRequest:
    return InvalidRequest(
        f"the job to stop is missing; use DELETE {path}/<job_id>, or `cortex delete {name}` to "
        "delete the API"
    )


def _removed(record: JobRecord) -> NotFound:
    return NotFound(
        f"the job {record.spec.job_id} has completed and was removed: finished jobs are kept for a "
        "limited time (`cortex serve --keep-jobs`)"
    )
