"""The routes of a job's log: as a whole, from an offset, by range, or followed to its end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from cortex.errors import NoLeader, NotFound, RangeNotSatisfiable, StorageUnavailable
from cortex.joblog.reader import REMOVED, REPLACED, Log, is_replaced, length, opened, read
from cortex.operator.http.answers import Receive, Scope, Send
from cortex.operator.http.context import Context, context
from cortex.operator.logs.follow import event, follow
from cortex.spec.job import JobRecord, encode
from cortex.spec.lifecycle import IN_PROGRESS

router = APIRouter()

_CHUNK_BYTES = 256 * 1024
_TEXT = "text/plain; charset=utf-8"

Offset = Annotated[int, Query(ge=0, lt=2**63, description="First byte.")]


@router.get("/{endpoint:endpoint}/{job_id}/logs", tags=["jobs"])
async def logs_at_endpoint(
    request: Request, endpoint: str, job_id: str, offset: Offset = 0
) -> Response:
    """The job's log: plain text (from `offset`, or by Range), or with `Accept: text/event-stream`
    followed to its end."""
    ctx = context(request)
    return await _logs(ctx, request, await ctx.job_at(endpoint, job_id), offset)


@router.get("/-/apis/{name}/jobs/{job_id}/logs", tags=["operator"])
@router.get("/tasks/{name:api_name}/{job_id}/logs", tags=["cortex"])
async def logs_by_name(request: Request, name: str, job_id: str, offset: Offset = 0) -> Response:
    """The job's log, as at the API's endpoint."""
    ctx = context(request)
    return await _logs(ctx, request, await ctx.job_of(name, job_id), offset)


async def _logs(ctx: Context, request: Request, record: JobRecord, offset: int) -> Response:
    job_id = record.spec.job_id
    if record.state in IN_PROGRESS:
        if (answer := await ctx.forwarded_or_fail(request)) is not None:
            return answer
        ctx.jobs.refresh(record)
    if not record.has_folder:
        raise NotFound(
            f"the log of the job {job_id} was removed: logs are kept for a time "
            "(`cortex serve --keep-logs`)"
        )
    if ctx.archive is not None and ctx.jobs.find(job_id) is None:
        if not await ctx.archive.has(job_id):
            answer = await ctx.forwarded(request, or_status=HTTPStatus.NOT_FOUND)
            if answer is not None:
                return answer
        await ctx.archive.bring_back(record)
    spec = await ctx.versions.spec(record.spec.api_id)
    log = Log(ctx.settings.job_folders.log(job_id), spec.limits.log, record.losses + 1)
    if "text/event-stream" in request.headers.get("accept", ""):
        resumed = request.headers.get("last-event-id", "")
        start = int(resumed) if re.fullmatch(r"\d{1,18}", resumed, re.ASCII) else offset
        return Begun(
            _events(ctx, record, log, start),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )
    size = length(log.path)
    if size == 0 and is_replaced(log.path):
        return Response(REPLACED, media_type=_TEXT)
    headers = {"Accept-Ranges": "bytes"}
    span = _span(request.headers.get("range"), size)
    if span is None:
        parts = _rest(log, min(offset, size), size)
        return Begun(parts, headers=headers, media_type=_TEXT)
    start, end = _kept(log, *span)
    headers |= {
        "Content-Length": str(end - start),
        "Content-Range": f"bytes {start}-{end - 1}/{size}",
    }
    return Begun(_part(log, start, end), 206, headers, media_type=_TEXT)


class Begun(StreamingResponse):
    """A log that is read while it is sent. The response breaks off where another operator leads from now
    on, or where the log cannot be read; clients then reconnect."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(NoLeader, StorageUnavailable):
            await super().__call__(scope, receive, send)


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """The offsets of the first byte and after the last of a Range header. None for a header that RFC 9110
    lets servers ignore: other units, several ranges.

    Raises:
        RangeNotSatisfiable: the range begins beyond the end of the log.
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


def _kept(log: Log, start: int, end: int) -> tuple[int, int]:
    """The part of a range that the log still has: of a log with a gap, the part before or after it.

    Raises:
        RangeNotSatisfiable: the range lies within the gap.
    """
    with opened(log.path) as file:
        gap = None if file is None else file.gap(log.limit, log.attempts)
    if gap is None or end <= gap.start or start >= gap.end:
        return start, end
    if start < gap.start:
        return start, gap.start
    if end <= gap.end:
        raise RangeNotSatisfiable(
            f"the bytes from {gap.start} up to {gap.end} of the log are gone: it was over its limit"
        )
    return gap.end, end


async def _rest(log: Log, start: int, end: int) -> AsyncIterator[bytes]:
    """A log up to the end that it had at the request, with a line in place of its gap."""
    while start < end:
        piece = await asyncio.to_thread(read, log, start, min(_CHUNK_BYTES, end - start))
        if not piece.data:
            yield REMOVED.encode()
            return
        start = piece.end
        yield piece.data


async def _part(log: Log, start: int, end: int) -> AsyncIterator[bytes]:
    """Exactly these bytes of a log that may grow or lose its middle meanwhile."""
    while start < end:
        piece = await asyncio.to_thread(read, log, start, min(_CHUNK_BYTES, end - start))
        if not piece.data or piece.is_marker:
            raise StorageUnavailable("the log was cut or removed while it was read")
        start = piece.end
        yield piece.data


async def _events(ctx: Context, record: JobRecord, log: Log, offset: int) -> AsyncIterator[str]:
    job_id = record.spec.job_id
    async for piece in follow(log, offset, partial(ctx.jobs.find, job_id), ctx.watcher):
        yield ": still here\n\n" if piece is None else event("log", encode(piece[1]), piece[0])
    record = await ctx.store.whole_job(job_id) or record
    if record.state in IN_PROGRESS:  # the log goes on at the new leader
        raise NoLeader("this operator does not lead any more")
    yield event("end", "".join(ctx.renderer.status(record)))
