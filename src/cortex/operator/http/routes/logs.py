"""The routes of a job's log: from an offset, by range, or followed to its end."""

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
from starlette.types import Receive, Scope, Send

from cortex.errors import NoLeader, NotFound, RangeNotSatisfiable, StorageUnavailable
from cortex.joblog.reader import REMOVED, REPLACED, Log, is_replaced, length, opened, read
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.operator.http.context import Context, context
from cortex.operator.logs.follow import event, follow
from cortex.spec.job import JobRecord, encode
from cortex.spec.lifecycle import IN_PROGRESS

router = APIRouter()

_CHUNK_BYTES = 256 * 1024
_END_TIMEOUT_S = 3.0
_TEXT = "text/plain; charset=utf-8"

Offset = Annotated[int, Query(ge=0, lt=2**63, description="The first byte of the log to return.")]


@router.get("/{endpoint:endpoint}/{job_id}/logs", tags=["jobs"])
async def logs_at_endpoint(
    request: Request, endpoint: str, job_id: str, offset: Offset = 0
) -> Response:
    """Get the job's log: as plain text from `offset` on or by Range, or, with
    `Accept: text/event-stream`, as events until the job ends."""
    ctx = context(request)
    return await _logs(ctx, request, await ctx.job_at(endpoint, job_id), offset)


@router.get("/-/apis/{name}/jobs/{job_id}/logs", tags=["operator"])
@router.get("/tasks/{name:api_name}/{job_id}/logs", tags=["cortex"])
async def logs_by_name(request: Request, name: str, job_id: str, offset: Offset = 0) -> Response:
    """Get the job's log, as at the API's endpoint."""
    ctx = context(request)
    return await _logs(ctx, request, await ctx.job_of(name, job_id), offset)


async def _logs(ctx: Context, request: Request, record: JobRecord, offset: int) -> Response:
    if record.state in IN_PROGRESS:  # the leader has the log
        if (answer := await ctx.forwarded_or_fail(request)) is not None:
            return answer
        ctx.jobs.refresh(record)
    _check_exists(record)
    if (answer := await _fetched(ctx, request, record)) is not None:
        return answer
    log = await _log_of(ctx, record)
    if "text/event-stream" in request.headers.get("accept", ""):
        return _event_stream(ctx, request, record, log, offset)
    return _plain_text(request, log, offset)


def _check_exists(record: JobRecord) -> None:
    if not record.has_folder:
        raise NotFound(
            f"the log of the job {record.spec.job_id} was removed: logs are kept for a limited "
            "time (`cortex serve --keep-logs`)"
        )


async def _fetched(ctx: Context, request: Request, record: JobRecord) -> Response | None:
    """Fetch the log of a finished job from the object store, if one is configured.

    Returns:
        The leader's response, if only the leader has the log. Else None: the log is on this
        machine.
    """
    archive, job_id = ctx.archive, record.spec.job_id
    if archive is None:
        return None
    if (live := ctx.jobs.find(job_id)) is not None:
        if record.state in IN_PROGRESS:
            return None
        await _wait_for_end(ctx, live)
    if not await archive.has(job_id):
        answer = await ctx.forwarded(request, or_status=HTTPStatus.NOT_FOUND)
        if answer is not None:
            return answer
    await archive.bring_back(record)
    return None


async def _wait_for_end(ctx: Context, live: LiveJob) -> None:
    """Wait for the end of a job that the store holds as ended. This operator has just stored it, or
    another operator has, which leads by now and has the whole log.

    Raises:
        NoLeader: this operator does not know the end.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_TIMEOUT_S):
            while ctx.jobs.find(live.job_id) is live:
                await live.changed()
    if live.record.state in IN_PROGRESS:
        raise NoLeader("this operator is no longer the leader; retry")


async def _log_of(ctx: Context, record: JobRecord) -> Log:
    spec = await ctx.versions.spec(record.spec.api_id)
    path = ctx.settings.job_folders.log(record.spec.job_id)
    return Log(path, spec.limits.log, record.losses + 1)


def _event_stream(
    ctx: Context, request: Request, record: JobRecord, log: Log, offset: int
) -> Response:
    last_id = request.headers.get("last-event-id", "")
    start = int(last_id) if re.fullmatch(r"\d{1,18}", last_id, re.ASCII) else offset
    return LogAnswer(
        _events(ctx, record, log, start),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )


def _plain_text(request: Request, log: Log, offset: int) -> Response:
    """The log as it is now, or the range of it that the request names."""
    size = length(log.path)
    if size == 0 and is_replaced(log.path):
        return Response(REPLACED, media_type=_TEXT)
    headers = {"Accept-Ranges": "bytes"}
    span = _requested_range(request.headers.get("range"), size)
    if span is None:
        pieces = _from_offset(log, min(offset, size), size)
        return LogAnswer(pieces, headers=headers, media_type=_TEXT)
    start, end = _readable_range(log, *span)
    headers |= {
        "Content-Length": str(end - start),
        "Content-Range": f"bytes {start}-{end - 1}/{size}",
    }
    return LogAnswer(_exact_range(log, start, end), 206, headers, media_type=_TEXT)


class LogAnswer(StreamingResponse):
    """A log, sent while it is read.

    The answer breaks off if the log cannot be read further or continues at another operator.
    Clients then retry.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(NoLeader, StorageUnavailable):
            await super().__call__(scope, receive, send)


def _requested_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Parse a Range header.

    Returns:
        The range's first byte and the byte after its last; None for a header that the server
        ignores (RFC 9110, 14.2), such as one with another unit or several ranges.

    Raises:
        RangeNotSatisfiable: the range begins beyond the end of the log.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header or "", re.ASCII)
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if start >= size:
        raise RangeNotSatisfiable(f"the log has {size} bytes; request a range within them")
    return None if end <= start else (start, end)


def _readable_range(log: Log, start: int, end: int) -> tuple[int, int]:
    """The part of a range before or after the gap of a log that was cut.

    Raises:
        RangeNotSatisfiable: the whole range is in the gap.
    """
    with opened(log.path) as file:
        gap = None if file is None else file.gap(log.limit, log.attempts)
    if gap is None or end <= gap.start or start >= gap.end:
        return start, end
    if start < gap.start:
        return start, gap.start
    if end <= gap.end:
        raise RangeNotSatisfiable(
            f"the log was over its limit, and its bytes {gap.start} to {gap.end - 1} were removed; "
            "request a range outside of them"
        )
    return gap.end, end


async def _from_offset(log: Log, start: int, end: int) -> AsyncIterator[bytes]:
    """The log from an offset to the end that it had at the request. A line stands for a gap."""
    while start < end:
        piece = await asyncio.to_thread(read, log, start, min(_CHUNK_BYTES, end - start))
        if not piece.data:
            yield REMOVED.encode()
            return
        start = piece.end
        yield piece.data


async def _exact_range(log: Log, start: int, end: int) -> AsyncIterator[bytes]:
    """Exactly these bytes of a log that may grow or be cut meanwhile."""
    while start < end:
        piece = await asyncio.to_thread(read, log, start, min(_CHUNK_BYTES, end - start))
        if not piece.data or piece.is_marker:
            raise StorageUnavailable("the log was cut or removed while it was read; retry")
        start = piece.end
        yield piece.data


async def _events(ctx: Context, record: JobRecord, log: Log, offset: int) -> AsyncIterator[str]:
    job_id = record.spec.job_id
    live = ctx.jobs.find(job_id)
    async for piece in follow(log, offset, partial(ctx.jobs.find, job_id), ctx.watcher):
        yield ": keep-alive\n\n" if piece is None else event("log", encode(piece[1]), piece[0])
    record = await ctx.store.whole_job(job_id) or record
    is_partial = live is not None and live.record.state in IN_PROGRESS
    if record.state in IN_PROGRESS or is_partial:
        # Another operator became the leader, and has the rest of the log.
        raise NoLeader("this operator is no longer the leader; retry")
    yield event("end", "".join(ctx.renderer.status(record)))
