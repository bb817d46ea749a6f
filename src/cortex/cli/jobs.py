"""Commands that act on jobs: `submit`, `logs`, and `delete`, which stops a job or deletes an
API."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli import job_config
from cortex.cli.get import job_details
from cortex.cli.options import ApiName, Env, Force, Format, OptionalJobId, Output, Yes
from cortex.cli.output import print_json, print_line, print_note, show
from cortex.cli.waiting import retry_until_available
from cortex.errors import CortexError

if TYPE_CHECKING:
    from cortex.sdk import Client, JobView, SubmittedJob

NO_SUCCESS = 3
"""The exit code of `submit --wait` for a job that did not succeed."""

# One request waits so long for the job's end. The client retries within that time, so a shorter
# outage of the operator is not reported.
_LONG_POLL_S = 20.0


def submit(
    api: ApiName,
    *,
    config: Annotated[
        str | None,
        typer.Option(metavar="JSON|@FILE", help="Overrides the API's own config, key by key."),
    ] = None,
    timeout: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds from now after which the operator ends the job."),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Submits with the same key and options make one job."),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help=f"Wait for the job's end and show the job; exit with {NO_SUCCESS} unless it "
            "succeeded.",
        ),
    ] = False,
    env: Env = None,
    output: Output = Format.PRETTY,
) -> None:
    """Submit a job to API."""
    from cortex.sdk import client

    parsed = None if config is None else job_config.read_config(config)
    with client(env) as operator:
        job = operator.submit_job(api, parsed, timeout, idempotency_key=idempotency_key)
        if output is Format.PRETTY:
            print_line(f"submitted job {job['job_id']}")
            print_line(f"  cortex get {api} {job['job_id']}")
            print_line(f"  cortex logs {api} {job['job_id']}")
        elif not wait:
            print_json(job, output)
        if wait:
            sys.stdout.flush()
            _show_ended(_wait_for_end(operator, job), output)


def _wait_for_end(operator: Client, job: SubmittedJob) -> JobView:
    api, job_id = job["api_name"], job["job_id"]
    try:
        while True:
            view = retry_until_available(lambda: operator.get_job(api, job_id, wait=_LONG_POLL_S))
            if "end_time" in view["job_status"]:
                return view
    except (CortexError, KeyboardInterrupt):
        print_note(f"No longer waiting for job {job_id}; show it with `cortex get {api} {job_id}`")
        raise


def _show_ended(view: JobView, output: Format) -> None:
    if output.is_json:
        print_json(view, output)
    else:
        print_line("")
        show(job_details(view))
    if view["job_status"]["status"] != "status_succeeded":
        raise typer.Exit(NO_SUCCESS)


def logs(
    api: ApiName,
    job: OptionalJobId = None,
    *,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow/--no-follow",
            "-f",
            help="Follow the log until the job ends, or print what is written so far.",
        ),
    ] = True,
    env: Env = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", hidden=True)] = False,
    random_pod: Annotated[bool, typer.Option("--random-pod", hidden=True)] = False,
) -> None:
    """Print the log of JOB, or of the newest job of API, and follow it until the job ends."""
    from cortex.sdk import client

    with client(env) as operator:
        if job is None:
            job = operator.newest_job(api)["job_id"]
            print_note(f"the log of job {job}")
        read_log = operator.stream_job_logs if follow else operator.read_job_logs
        for text in read_log(api, job):
            sys.stdout.write(text)
            sys.stdout.flush()


def delete(
    api: ApiName,
    job: OptionalJobId = None,
    *,
    force: Force = False,
    yes: Yes = False,
    keep_cache: Annotated[bool, typer.Option("--keep-cache", "-c", hidden=True)] = False,
    env: Env = None,
    output: Output = Format.PRETTY,
) -> None:
    """Stop JOB, or delete API, which also stops its running jobs."""
    from cortex.sdk import client

    with client(env) as operator:
        if job is not None:
            answer = operator.stop_job(api, job)
        else:
            if not (force or yes):
                _confirm(operator, api)
            answer = operator.delete_api(api)
    if output.is_json:
        print_json(answer, output)
    else:
        print_line(answer["message"])


def _confirm(operator: Client, api: str) -> None:
    if not sys.stdin.isatty():
        raise typer.BadParameter(
            f"deleting {api} needs confirmation, and there is no terminal to ask on; pass --force",
            param_hint="--force",
        )
    jobs = operator.get_api(api)["task_job_statuses"]
    running = sum(job["status"] == "status_running" for job in jobs)
    stops = f" and stop its {running} running job{'s' * (running != 1)}" if running else ""
    # Not `typer.confirm`: it writes to stdout, which is for the answer's JSON.
    sys.stderr.write(f"delete {api}{stops}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Exit(1)
