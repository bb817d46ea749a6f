"""Jobs and APIs as the contract shows them."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import JsonValue
from starlette.requests import Request

from cortex.operator.deploy.shown_specs import ShownSpec, shown_spec
from cortex.operator.dispatch.jobs import Jobs
from cortex.spec.job import JobRecord, JobSpec, Json, encode, with_texts
from cortex.spec.lifecycle import IN_PROGRESS, SHOWN, State, Status
from cortex.spec.times import rfc3339
from cortex.store import Deployment, Store

ASKED_AT = "cortex-asked-at"
"""The header that tells the `Host` of a request that another operator passes on."""

_RECENT = 10
_MOST_IN_PROGRESS = 1000
_MAX_PAGE_BYTES = 1024 * 1024


def submitted(spec: JobSpec) -> list[str]:
    """The answer to a submit. This and others are JSON text in pieces, as `with_texts` makes them."""
    return with_texts(_submitted(spec), config=spec.config)


def is_partial(record: JobRecord) -> bool:
    """Whether a config or a result is left out, which the store has."""
    return bool(_left_out(record))


def as_list(texts: list[list[str]]) -> list[str]:
    """A JSON array."""
    pieces = [piece for text in texts for piece in (",", *text)]
    return ["[", *pieces[1:], "]"]


def _left_out(record: JobRecord) -> list[str]:
    is_there = {
        "config": record.spec.config is not None,
        "result": record.result is not None or not record.has_result,
    }
    return [name for name in is_there if not is_there[name]]


def _submitted(spec: JobSpec) -> Json:
    return {
        "job_id": spec.job_id,
        "api_name": spec.api_name,
        "kind": spec.kind,
        "workers": spec.workers,
        "api_id": spec.api_id,
        "timeout": spec.timeout,
        "created_time": rfc3339(spec.created_ns),
    }


def shown(record: JobRecord, unreachable: str | None = None) -> Status:
    """The status that a job shows; `unreachable` is why its engine cannot be asked, if so."""
    status = SHOWN[record.state, record.wanted]
    if status is Status.RUNNING and unreachable is not None:
        return Status.UNKNOWN
    return status


class Renderer:
    """Answers made of what the store holds, and of what the leader's dispatcher holds in memory alone."""

    def __init__(self, store: Store, jobs: Jobs) -> None:
        self._store = store
        self._jobs = jobs

    def status(self, record: JobRecord) -> list[str]:
        """A `job_status`. A config and a result that are left out are null, and `truncated` names them."""
        spec = record.spec
        live = self._jobs.find(spec.job_id)
        unreachable = None if live is None else live.unreachable
        status = shown(record, unreachable)
        answer = _submitted(spec)
        answer["status"] = status.value
        answer["start_time"] = rfc3339(record.start_ns or spec.created_ns)
        message = record.message
        if status in (Status.RUNNING, Status.UNKNOWN):
            running = record.state is State.RUNNING
            answer["worker_counts"] = {"pending": int(not running), "running": int(running)}
            why_waiting = None if live is None else live.why_waiting
            message = unreachable or why_waiting or message
        else:
            answer["end_time"] = rfc3339(record.end_ns or spec.created_ns)
        if message is not None:
            answer["message"] = message
        if record.exit_code is not None:
            answer["exit_code"] = record.exit_code
        if left_out := _left_out(record):
            answer |= {**dict.fromkeys(left_out), "truncated": list[JsonValue](left_out)}
        return with_texts(answer, config=spec.config, result=record.result)

    def listed(self, records: Iterable[JobRecord]) -> list[list[str]]:
        """The statuses of the first of these jobs, as many as a page has room for."""
        statuses: list[list[str]] = []
        room = _MAX_PAGE_BYTES
        for record in records:
            status = self.status(record)
            room -= sum(map(len, status))
            if room < 0 and statuses:
                break
            statuses.append(status)
        return statuses

    def job(self, record: JobRecord, api_spec: ShownSpec, request: Request) -> list[str]:
        """The answer to a status request."""
        return with_texts(
            {"endpoint": f"{base(request)}/{api_spec.endpoint}/{record.spec.job_id}"},
            job_status=self.status(record),
            api_spec=api_spec.text,
        )

    async def api(self, deployment: Deployment, request: Request) -> list[str]:
        """An API with its jobs in progress, then the most recent others, and its versions. Where they are
        too many for one answer, `truncated` says so."""
        recent = await self._store.list_jobs(deployment.name, limit=_RECENT)
        running = await self._store.list_jobs(
            deployment.name, limit=_MOST_IN_PROGRESS, status=Status.RUNNING
        )
        versions = await self._store.versions(deployment.name)
        jobs = _in_progress_first(running.jobs, recent.jobs)
        statuses = self.listed(jobs)
        answer: Json = {
            "endpoint": f"{base(request)}/{deployment.endpoint}",
            "api_versions": [
                {"api_id": version.api_id, "last_updated": version.last_updated}
                for version in versions
            ],
            "hints": list[JsonValue](self._jobs.hints(deployment.spec.api_id)),
        }
        if len(statuses) < len(jobs):
            answer["truncated"] = ["task_job_statuses"]
        return with_texts(
            answer,
            spec=encode(shown_spec(deployment.spec)),
            task_job_statuses=as_list(statuses),
        )


def base(request: Request) -> str:
    """The address that a request came to, as its client knows it."""
    host = request.headers.get(ASKED_AT) or request.headers.get("host")
    if host is None:  # HTTP/1.0
        return str(request.base_url).rstrip("/")
    return f"{request.scope['scheme']}://{host}"


def _in_progress_first(running: Iterable[JobRecord], recent: list[JobRecord]) -> list[JobRecord]:
    first = list(running)
    seen = {job.spec.job_id for job in first}
    others = [job for job in recent if job.spec.job_id not in seen]
    stopping = [job for job in others if job.state in IN_PROGRESS]
    return first + stopping + [job for job in others if job.state not in IN_PROGRESS]
