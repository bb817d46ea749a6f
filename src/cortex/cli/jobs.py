"""Commands that act on jobs: `submit`, `logs`, and `delete`, which stops one or deletes an API."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli import job_config
from cortex.cli.away import until_back
from cortex.cli.get import one_job
from cortex.cli.options import ApiName, Env, Force, Format, OptionalJobId, Output, Yes
from cortex.cli.output import print_json, print_line, print_note, show
from cortex.errors import CortexError

if TYPE_CHECKING:
    from cortex.sdk import Client, JobView, SubmittedJob

NO_SUCCESS = 3
"""The exit code for a job that was waited for and did not succeed."""

# For so long an operator is away without a word about it.
_WAIT_S = 20.0


def submit(
    api: ApiName,
    *,
    config: Annotated[
        str | None,
        typer.Option(metavar="JSON|@FILE", help="Overrides the API's own config, key by key."),
    ] = None,
    timeout: Annotated[
        int | None, typer.Option(min=1, help="Seconds from now after which the job is ended.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Submits with the same key and options are one job."),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help=f"Wait until the job has ended, and show it; exit with {NO_SUCCESS} unless it succeeded.",
        ),
    ] = False,
    env: Env = None,
    output: Output = Format.PRETTY,
) -> None:
    """Submit a job to API."""
    from cortex.sdk import client

    parsed = None if config is None else job_config.read(config)
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
            _show_ended(_ended(operator, job), output)


def _ended(operator: Client, job: SubmittedJob) -> JobView:
    api, job_id = job["api_name"], job["job_id"]
    try:
        while True:
            view = until_back(lambda: operator.get_job(api, job_id, wait=_WAIT_S))
            if "end_time" in view["job_status"]:
                return view
    except (CortexError, KeyboardInterrupt):
        print_note(f"The job {job_id} is not waited for any more: `cortex get {api} {job_id}`")
        raise


def _show_ended(view: JobView, output: Format) -> None:
    if output.is_json:
        print_json(view, output)
    else:
        print_line("")
        show(one_job(view))
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
            help="Go on until the job ends, or print what there is and end.",
        ),
    ] = True,
    env: Env = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", hidden=True)] = False,
    random_pod: Annotated[bool, typer.Option("--random-pod", hidden=True)] = False,
) -> None:
    """Print the log of JOB, or of the newest job of API, as it is written until the job ends."""
    from cortex.sdk import client

    with client(env) as operator:
        if job is None:
            job = operator.newest_job(api)["job_id"]
            print_note(f"the log of job {job}")
        read = operator.stream_job_logs if follow else operator.read_job_logs
        for text in read(api, job):
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
    """Stop JOB, or delete API, which ends its running jobs as stopped."""
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
            f"deleting {api} asks for confirmation, and here is no terminal to ask on: pass --force",
            param_hint="--force",
        )
    jobs = operator.get_api(api)["task_job_statuses"]
    running = sum(job["status"] == "status_running" for job in jobs)
    stops = f" and stop its {running} running job{'s' * (running != 1)}" if running else ""
    # Not `typer.confirm`: what it writes ends up on stdout, where the answer's JSON goes.
    sys.stderr.write(f"delete {api}{stops}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Exit(1)
