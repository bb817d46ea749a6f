"""The JSON of jobs and APIs, as the contract has it.

Answers are pieces of JSON text, as `with_texts` makes them: texts that the store has are not parsed
again.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import JsonValue
from starlette.requests import Request

from cortex.operator.deploy.shown_specs import ShownSpec, shown_spec
from cortex.operator.dispatch.jobs import Jobs
from cortex.operator.ha.forwarding import ORIGINAL_HOST
from cortex.spec.job import JobRecord, JobSpec, Json, encode, shown_status, with_texts
from cortex.spec.lifecycle import IN_PROGRESS, State, Status
from cortex.spec.times import rfc3339
from cortex.store import Deployment, Store

_RECENT = 10
_MAX_IN_PROGRESS = 1000
_MAX_PAGE_BYTES = 1024 * 1024


def submit_answer(spec: JobSpec) -> list[str]:
    """The answer to a submit."""
    return with_texts(_job_fields(spec), config=spec.config)


def is_partial(record: JobRecord) -> bool:
    """Whether the record lacks a config or a result that the store has."""
    return bool(_omitted(record))


def json_array(texts: list[list[str]]) -> list[str]:
    """A JSON array of texts."""
    pieces = [piece for text in texts for piece in (",", *text)]
    return ["[", *pieces[1:], "]"]


def _omitted(record: JobRecord) -> list[str]:
    is_complete = {
        "config": record.spec.config is not None,
        "result": record.result is not None or not record.has_result,
    }
    return [name for name in is_complete if not is_complete[name]]


def _job_fields(spec: JobSpec) -> Json:
    return {
        "job_id": spec.job_id,
        "api_name": spec.api_name,
        "kind": spec.kind,
        "workers": spec.workers,
        "api_id": spec.api_id,
        "timeout": spec.timeout,
        "created_time": rfc3339(spec.created_ns),
    }


class Renderer:
    """Renders jobs and APIs from the store and from the leader's jobs in memory."""

    def __init__(self, store: Store, jobs: Jobs) -> None:
        self._store = store
        self._jobs = jobs

    def status(self, record: JobRecord) -> list[str]:
        """A `job_status`.

        A config or a result that the record lacks is null, and `truncated` names it.
        """
        spec = record.spec
        live = self._jobs.find(spec.job_id)
        unreachable = None if live is None else live.unreachable
        status = shown_status(record, unreachable)
        answer = _job_fields(spec)
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
        if omitted := _omitted(record):
            answer |= {**dict.fromkeys(omitted), "truncated": list[JsonValue](omitted)}
        return with_texts(answer, config=spec.config, result=record.result)

    def page(self, records: Iterable[JobRecord]) -> list[list[str]]:
        """The statuses of the first of these jobs, as many as fit on a page; at least one."""
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
            {"endpoint": f"{base_url(request)}/{api_spec.endpoint}/{record.spec.job_id}"},
            job_status=self.status(record),
            api_spec=api_spec.text,
        )

    async def api(self, deployment: Deployment, request: Request) -> list[str]:
        """An API with its versions and its jobs: those in progress, then the most recent others.

        If not all of these jobs fit in one answer, `truncated` names the field.
        """
        recent = await self._store.list_jobs(deployment.name, limit=_RECENT)
        running = await self._store.list_jobs(
            deployment.name, limit=_MAX_IN_PROGRESS, status=Status.RUNNING
        )
        versions = await self._store.versions(deployment.name)
        jobs = _in_progress_first(running.jobs, recent.jobs)
        statuses = self.page(jobs)
        answer: Json = {
            "endpoint": f"{base_url(request)}/{deployment.endpoint}",
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
            task_job_statuses=json_array(statuses),
        )


def base_url(request: Request) -> str:
    """The operator's URL, as the client of a request knows it."""
    host = request.headers.get(ORIGINAL_HOST) or request.headers.get("host")
    if host is None:  # HTTP/1.0
        return str(request.base_url).rstrip("/")
    return f"{request.scope['scheme']}://{host}"


def _in_progress_first(running: Iterable[JobRecord], recent: list[JobRecord]) -> list[JobRecord]:
    first = list(running)
    listed = {job.spec.job_id for job in first}
    others = [job for job in recent if job.spec.job_id not in listed]
    stopping = [job for job in others if job.state in IN_PROGRESS]
    return first + stopping + [job for job in others if job.state not in IN_PROGRESS]
