"""`cortex get`: shows all APIs, one API, or one job. `submit --wait` shows a job in the same
way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.options import Env, Format, OptionalJobId, Output
from cortex.cli.output import (
    ago,
    console,
    duration,
    fields,
    hints,
    local_time,
    print_json,
    print_line,
    show,
    status_text,
    table,
)
from cortex.cli.waiting import retry_until_available

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cortex.sdk import ApiView, Client, JobOutline, JobView, ListedJob

_POLL_INTERVAL_S = 2.0


@dataclass(frozen=True)
class _Page:
    """An answer of the operator to show."""

    answer: object
    body: Callable[[], RenderableType]
    """Makes the output for people."""
    is_final: bool = False
    """Whether the answer cannot change any more."""


def get(
    api: Annotated[
        str | None, typer.Argument(metavar="API", help="Name of a deployed API.")
    ] = None,
    job: OptionalJobId = None,
    *,
    env: Env = None,
    output: Output = Format.PRETTY,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", hidden=True)] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Refresh the output until Ctrl-C or the job's end."),
    ] = False,
) -> None:
    """Show all APIs, one API with its jobs, or one job."""
    from cortex.sdk import client

    if watch and output.is_json:
        raise typer.BadParameter("possible with -o pretty only", param_hint="--watch")
    with client(env) as operator:
        page = _page(operator, api, job)
        if output.is_json:
            print_json(page.answer, output)
        elif watch:
            _watch(page, lambda: _page(operator, api, job))
        else:
            show(page.body())


def job_details(view: JobView) -> RenderableType:
    """The output for people that shows a job."""
    job = view["job_status"]
    pairs: list[tuple[str, RenderableType]] = [
        ("job", job["job_id"]),
        ("api", job["api_name"]),
        ("version", job["api_id"]),
        ("status", status_text(job)),
    ]
    if job.get("message"):
        pairs.append(("message", job.get("message") or ""))
    pairs += [
        ("created", local_time(job["created_time"])),
        ("started", local_time(job["start_time"]) if _has_started(job) else "-"),
        ("ended", local_time(job["end_time"]) if "end_time" in job else "-"),
        ("duration", duration(job) if _has_started(job) else "-"),
        ("timeout", "none" if job["timeout"] is None else f"{job['timeout']}s from submission"),
        ("config", _inline(job["config"])),
    ]
    if job.get("exit_code") is not None:
        pairs.append(("exit code", str(job.get("exit_code"))))
    if "result" in job:
        pairs.append(("result", _inline(job["result"])))
    return fields([*pairs, ("endpoint", view["endpoint"])])


def _watch(page: _Page, refresh: Callable[[], _Page]) -> None:
    from rich.live import Live

    if not sys.stdout.isatty():
        while True:
            show(page.body())
            sys.stdout.flush()
            if page.is_final:
                return
            time.sleep(_POLL_INTERVAL_S)
            print_line("")
            page = retry_until_available(refresh)
    # Notes on stderr appear above the page, if stderr is the terminal.
    with Live(
        page.body(),
        console=console(),
        auto_refresh=False,
        redirect_stderr=sys.stderr.isatty(),
    ) as live:
        while not page.is_final:
            time.sleep(_POLL_INTERVAL_S)
            page = retry_until_available(refresh)
            live.update(page.body(), refresh=True)


def _page(operator: Client, api: str | None, job: str | None) -> _Page:
    if api is None:
        apis = operator.list_apis()
        return _Page(apis, lambda: _all_apis(apis, operator))
    if job is None:
        one = operator.get_api(api)
        return _Page([one], lambda: _one_api(one))
    view = operator.get_job(api, job)
    return _Page(view, lambda: job_details(view), is_final="end_time" in view["job_status"])


def _all_apis(apis: list[ApiView], operator: Client) -> RenderableType:
    if not apis:
        return f"no APIs are deployed at {operator.operator_endpoint}; run `cortex deploy FILE`"
    rows = [
        (
            operator.name,
            str(api["spec"]["name"]),
            str(api["spec"]["kind"]),
            api["endpoint"],
            str(_running(api)),
            ago(str(api["spec"]["last_updated"])),
        )
        for api in apis
    ]
    return table(("env", "api", "kind", "endpoint", "running jobs", "last updated"), rows)


def _one_api(api: ApiView) -> RenderableType:
    from rich.console import Group

    spec = api["spec"]
    head = fields(
        [
            ("api", str(spec["name"])),
            ("kind", str(spec["kind"])),
            ("endpoint", api["endpoint"]),
            ("version", str(spec["api_id"])),
            ("running jobs", str(_running(api))),
            ("last updated", ago(str(spec["last_updated"]))),
        ]
    )
    versions = table(
        ("version", "last updated"),
        [(v["api_id"], ago(v["last_updated"])) for v in api["api_versions"]],
    )
    lines = hints(api)
    advice: list[RenderableType] = ["", *lines] if lines else []
    return Group(head, *advice, "", _jobs(api["task_job_statuses"]), "", versions)


def _jobs(jobs: list[ListedJob]) -> RenderableType:
    if not jobs:
        return "no jobs have been submitted yet"
    rows = [
        (job["job_id"], status_text(job), ago(job["created_time"]), duration(job), job["api_id"])
        for job in jobs
    ]
    return table(("job", "status", "submitted", "duration", "version"), rows)


def _has_started(job: JobOutline) -> bool:
    return "end_time" in job or bool(job.get("worker_counts", {}).get("running"))


def _running(api: ApiView) -> int:
    return sum(job["status"] == "status_running" for job in api["task_job_statuses"])


def _inline(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
