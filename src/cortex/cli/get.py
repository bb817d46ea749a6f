"""`cortex get`: all APIs, one API, or one job, which other commands show as well."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.away import until_back
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
    status_words,
    table,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cortex.sdk import ApiView, Client, JobOutline, JobView, ListedJob

_WATCH_S = 2.0


@dataclass(frozen=True)
class _Page:
    """An answer, how people see it, and whether it will never change again."""

    answer: object
    body: Callable[[], RenderableType]
    final: bool = False


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
        typer.Option(
            "--watch", "-w", help="Show it again as it changes, until Ctrl-C or the job's end."
        ),
    ] = False,
) -> None:
    """Show all APIs, one API with its jobs, or one job."""
    from cortex.sdk import client

    if watch and output.is_json:
        raise typer.BadParameter("it goes with -o pretty only", param_hint="--watch")
    with client(env) as operator:
        page = _page(operator, api, job)
        if output.is_json:
            print_json(page.answer, output)
        elif watch:
            _watch(page, lambda: _page(operator, api, job))
        else:
            show(page.body())


def one_job(view: JobView) -> RenderableType:
    """A job for people."""
    job = view["job_status"]
    pairs: list[tuple[str, RenderableType]] = [
        ("job", job["job_id"]),
        ("api", job["api_name"]),
        ("version", job["api_id"]),
        ("status", status_words(job)),
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


def _watch(page: _Page, again: Callable[[], _Page]) -> None:
    from rich.live import Live

    if not sys.stdout.isatty():
        while True:
            show(page.body())
            sys.stdout.flush()
            if page.final:
                return
            time.sleep(_WATCH_S)
            print_line("")
            page = until_back(again)
    # What is said on stderr stands above the page, unless it goes elsewhere.
    with Live(
        page.body(),
        console=console(),
        auto_refresh=False,
        redirect_stderr=sys.stderr.isatty(),
    ) as live:
        while not page.final:
            time.sleep(_WATCH_S)
            page = until_back(again)
            live.update(page.body(), refresh=True)


def _page(operator: Client, api: str | None, job: str | None) -> _Page:
    if api is None:
        apis = operator.list_apis()
        return _Page(apis, lambda: _all_apis(apis, operator))
    if job is None:
        one = operator.get_api(api)
        return _Page([one], lambda: _one_api(one))
    view = operator.get_job(api, job)
    return _Page(view, lambda: one_job(view), final="end_time" in view["job_status"])


def _all_apis(apis: list[ApiView], operator: Client) -> RenderableType:
    if not apis:
        return f"no APIs are deployed at {operator.operator_endpoint}: `cortex deploy FILE` does it"
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
    advice = hints(api)
    told: list[RenderableType] = ["", *advice] if advice else []
    return Group(head, *told, "", _jobs(api["task_job_statuses"]), "", versions)


def _jobs(jobs: list[ListedJob]) -> RenderableType:
    if not jobs:
        return "no jobs were submitted yet"
    rows = [
        (job["job_id"], status_words(job), ago(job["created_time"]), duration(job), job["api_id"])
        for job in jobs
    ]
    return table(("job", "status", "submitted", "duration", "version"), rows)


def _has_started(job: JobOutline) -> bool:
    return "end_time" in job or bool(job.get("worker_counts", {}).get("running"))


def _running(api: ApiView) -> int:
    return sum(job["status"] == "status_running" for job in api["task_job_statuses"])


def _inline(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
