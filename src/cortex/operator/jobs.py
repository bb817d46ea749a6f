"""The job routes: submit, status, stop, list, logs. The same handlers answer at an API's endpoint
and at the operator's own `/-/apis/{name}/jobs`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from pydantic import AfterValidator
from starlette.responses import Response, StreamingResponse

from cortex.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    RangeNotSatisfiable,
    StorageUnavailable,
)
from cortex.operator.context import Context, context
from cortex.operator.http import Answer, read_submission
from cortex.operator.logs import event, follow, read
from cortex.operator.render import shown, submitted
from cortex.spec.job import JobRecord, JobSpec, Submission
from cortex.spec.lifecycle import Status, Wanted
from cortex.spec.times import new_id, now_ns
from cortex.store import Replay

router = APIRouter(default_response_class=Answer)

_MAX_WAIT_S = 3600.0
_LISTED = 20
_MAX_LISTED = 1000
_CHUNK_BYTES = 256 * 1024
_TEXT = "text/plain; charset=utf-8"

_SUBMIT_DOC = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": Submission.model_json_schema()}},
    }
}


def _key(value: str | None) -> str | None:
    if value is not None and not 0 < len(value) <= 255:
        raise ValueError("an Idempotency-Key has 1 to 255 characters")
    return value


IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key"), AfterValidator(_key)]
JobId = Annotated[str | None, Query(alias="jobID", description="The job.")]
Wait = Annotated[
    float, Query(ge=0, le=_MAX_WAIT_S, description="Seconds to wait for the job to complete.")
]
Limit = Annotated[int, Query(ge=1, le=_MAX_LISTED, description="Jobs on a page.")]
Cursor = Annotated[int | None, Query(ge=1, lt=2**63, description="The page's `next_cursor`.")]
Offset = Annotated[int, Query(ge=0, lt=2**63, description="First byte.")]


@router.post("/{endpoint}", openapi_extra=_SUBMIT_DOC, tags=["jobs"])
async def submit(request: Request, endpoint: str, idempotency_key: IdempotencyKey = None) -> Answer:
    """Submit a job."""
    ctx = context(request)
    return await _submit(ctx, request, ctx.api_at(endpoint), idempotency_key)


@router.post("/-/apis/{name}/jobs", openapi_extra=_SUBMIT_DOC, tags=["operator"])
async def submit_by_name(
    request: Request, name: str, idempotency_key: IdempotencyKey = None
) -> Answer:
    """Submit a job."""
    return await _submit(context(request), request, name, idempotency_key)


@router.get("/{endpoint}", tags=["jobs"])
async def get(
    request: Request,
    endpoint: str,
    *,
    job_id: JobId = None,
    wait: Wait = 0,
    status: Status | None = None,
    limit: Limit = _LISTED,
    cursor: Cursor = None,
) -> Answer:
    """The status of one job (`jobID`), or the API's jobs, newest first."""
    ctx = context(request)
    if job_id is not None:
        return await _status(ctx, request, await _at_endpoint(ctx, endpoint, job_id), wait)
    page = await ctx.store.list_jobs(
        ctx.api_at(endpoint), limit=limit, status=status, cursor=cursor
    )
    return Answer(
        {
            "job_statuses": [ctx.renderer.status(job) for job in page.jobs],
            "next_cursor": page.next_cursor,
        }
    )


@router.get("/{endpoint}/{job_id}", tags=["jobs"])
async def status_at_endpoint(
    request: Request, endpoint: str, job_id: str, wait: Wait = 0
) -> Answer:
    """The status of one job."""
    ctx = context(request)
    return await _status(ctx, request, await _at_endpoint(ctx, endpoint, job_id), wait)


@router.get("/-/apis/{name}/jobs/{job_id}", tags=["operator"])
async def status_by_name(request: Request, name: str, job_id: str, wait: Wait = 0) -> Answer:
    """The status of one job."""
    ctx = context(request)
    return await _status(ctx, request, await _of_api(ctx, name, job_id), wait)


@router.delete("/{endpoint}", tags=["jobs"])
async def stop_by_query(request: Request, endpoint: str, job_id: JobId = None) -> Answer:
    """Stop one job (`jobID`)."""
    ctx = context(request)
    if job_id is None:
        raise InvalidRequest(
            f"say which job to stop: DELETE /{endpoint}/<job_id>; "
            f"`cortex delete {ctx.api_at(endpoint)}` deletes the API"
        )
    return await _stop(ctx, await _at_endpoint(ctx, endpoint, job_id))


@router.delete("/{endpoint}/{job_id}", tags=["jobs"])
async def stop_at_endpoint(request: Request, endpoint: str, job_id: str) -> Answer:
    """Stop one job."""
    ctx = context(request)
    return await _stop(ctx, await _at_endpoint(ctx, endpoint, job_id))


@router.delete("/-/apis/{name}/jobs/{job_id}", tags=["operator"])
async def stop_by_name(request: Request, name: str, job_id: str) -> Answer:
    """Stop one job."""
    ctx = context(request)
    return await _stop(ctx, await _of_api(ctx, name, job_id))


@router.get("/{endpoint}/{job_id}/logs", tags=["jobs"])
async def logs_at_endpoint(
    request: Request, endpoint: str, job_id: str, offset: Offset = 0
) -> Response:
    """The job's log: plain text (from `offset`, or by Range), or with `Accept: text/event-stream`
    followed to its end."""
    ctx = context(request)
    return _logs(ctx, request, await _at_endpoint(ctx, endpoint, job_id), offset)


@router.get("/-/apis/{name}/jobs/{job_id}/logs", tags=["operator"])
async def logs_by_name(request: Request, name: str, job_id: str, offset: Offset = 0) -> Response:
    """The job's log, as at the API's endpoint."""
    ctx = context(request)
    return _logs(ctx, request, await _of_api(ctx, name, job_id), offset)


async def _submit(ctx: Context, request: Request, name: str, key: str | None) -> Answer:
    submission, body = await read_submission(request)
    draft = JobSpec(
        job_id=new_id(),
        api_name=name,
        config=submission.config or {},
        api_id="",
        timeout=submission.timeout,
        created_ns=now_ns(),
    )
    replay = None if key is None else Replay(key, _hash(body))
    record, is_new = await ctx.store.submit(draft, replay)
    if is_new:
        ctx.dispatcher.submitted(record)
    return Answer(submitted(record.spec))


def _hash(body: bytes) -> str:
    same = json.dumps(json.loads(body), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(same.encode()).hexdigest()


async def _status(ctx: Context, request: Request, record: JobRecord, wait_s: float) -> Answer:
    job_id = record.spec.job_id
    deadline = time.monotonic() + wait_s
    while shown(record) is Status.RUNNING and (left := deadline - time.monotonic()) > 0:
        change = asyncio.ensure_future(ctx.dispatcher.change(job_id))
        record = await _found(ctx, job_id)  # read after listening: no change is missed
        if shown(record) is Status.RUNNING:
            await asyncio.wait([change], timeout=left)
            record = await _found(ctx, job_id)
        change.cancel()
    return Answer(await ctx.renderer.job(record, request.base_url))


async def _stop(ctx: Context, record: JobRecord) -> Answer:
    job_id = record.spec.job_id
    outcome = await ctx.dispatcher.stop(job_id)
    now = outcome.job or record
    if not outcome.taken and now.wanted is not Wanted.STOP:
        raise Conflict(f"the job {job_id} has already completed ({shown(now)})")
    return Answer({"message": f"stopped job {job_id}"})


def _logs(ctx: Context, request: Request, record: JobRecord, offset: int) -> Response:
    job_id = record.spec.job_id
    path = ctx.engine.log(job_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        resumed = request.headers.get("last-event-id", "")
        start = int(resumed) if resumed.isascii() and resumed.isdigit() else offset
        return StreamingResponse(
            _events(ctx, job_id, start),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
    try:
        size = path.stat().st_size
    except FileNotFoundError:  # it has not started
        size = 0
    span = _span(request.headers.get("range"), size)
    start, end = span or (min(offset, size), size)
    headers = {"Accept-Ranges": "bytes", "Content-Length": str(end - start)}
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(
        _part(path, start, end), 200 if span is None else 206, headers, media_type=_TEXT
    )


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the one after the last of a Range header; None for one to be ignored, as
    RFC 9110 has it for other units and several ranges.

    Raises:
        RangeNotSatisfiable: it begins beyond the end.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header or "", re.ASCII)
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size:
        raise RangeNotSatisfiable(f"the log has {size} bytes; ask for a range within them")
    return None if end <= start else (start, end)


async def _part(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    """Exactly these bytes of a file that may be growing."""
    while start < end:
        chunk = await asyncio.to_thread(read, path, start, min(_CHUNK_BYTES, end - start))
        if not chunk:
            raise StorageUnavailable(f"{path} became shorter while it was read")
        start += len(chunk)
        yield chunk


async def _events(ctx: Context, job_id: str, offset: int) -> AsyncIterator[str]:
    path = ctx.engine.log(job_id)
    async for piece in follow(job_id, path, offset, ctx.dispatcher, ctx.watcher):
        yield ": still here\n\n" if piece is None else event("log", piece[1], piece[0])
    yield event("end", ctx.renderer.status(await _found(ctx, job_id)))


async def _at_endpoint(ctx: Context, endpoint: str, job_id: str) -> JobRecord:
    """The job, where it is reached: its API's endpoint, also after the API was deleted."""
    record = await ctx.store.job(job_id)
    if record is not None:
        live = ctx.endpoints.get(endpoint)
        spec = await ctx.versions.spec(record.spec.api_id)
        if record.spec.api_name == live or (spec.networking.endpoint == endpoint and not live):
            return record
    raise NotFound(f"there is no job {job_id!r} at /{endpoint}; `cortex get` lists APIs and jobs")


async def _of_api(ctx: Context, name: str, job_id: str) -> JobRecord:
    record = await ctx.store.job(job_id)
    if record is None or record.spec.api_name != name:
        raise NotFound(f"the API {name!r} has no job {job_id!r}; see `cortex get {name}`")
    return record


async def _found(ctx: Context, job_id: str) -> JobRecord:
    record = await ctx.store.job(job_id)
    assert record is not None, "jobs are never deleted while they are looked at"
    return record
