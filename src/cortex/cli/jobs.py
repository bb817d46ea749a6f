"""Commands that act on jobs: `submit`, `logs`, and `delete`, which stops one or deletes an API."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.options import ApiName, Env, Force, Format, JobId, OptionalJobId, Output, Yes
from cortex.cli.output import print_json, print_line

if TYPE_CHECKING:
    from cortex.client import Client
    from cortex.spec.job import Json


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
    env: Env = None,
    output: Output = Format.PRETTY,
) -> None:
    """Submit a job to API."""
    from cortex.client import client

    parsed = None if config is None else _config(config)
    with client(env) as operator:
        job = operator.submit_job(api, parsed, timeout, idempotency_key=idempotency_key)
    if output is Format.JSON:
        print_json(job)
        return
    print_line(f"submitted job {job['job_id']}")
    print_line(f"  cortex get {api} {job['job_id']}")
    print_line(f"  cortex logs {api} {job['job_id']}")


def logs(api: ApiName, job: JobId, env: Env = None) -> None:
    """Print the log of JOB, as it is written until the job ends."""
    from cortex.client import client

    with client(env) as operator:
        for text in operator.stream_job_logs(api, job):
            sys.stdout.write(text)
            sys.stdout.flush()


def delete(
    api: ApiName,
    job: OptionalJobId = None,
    *,
    force: Force = False,
    yes: Yes = False,
    env: Env = None,
    output: Output = Format.PRETTY,
) -> None:
    """Stop JOB, or delete API, which ends its running jobs as stopped."""
    from cortex.client import client

    with client(env) as operator:
        if job is not None:
            answer = operator.stop_job(api, job)
        else:
            if not (force or yes):
                _confirm(operator, api)
            answer = operator.delete_api(api)
    if output is Format.JSON:
        print_json(answer)
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


def _config(given: str) -> Json:
    try:
        text = Path(given[1:]).expanduser().read_text("utf-8") if given[:1] == "@" else given
        config: Json = json.loads(text, parse_constant=_reject)
    except OSError as error:
        raise typer.BadParameter(
            f"{given[1:]} cannot be read: {error.strerror}", param_hint="--config"
        ) from error
    except ValueError as error:
        raise typer.BadParameter(f"it is no JSON: {error}", param_hint="--config") from error
    if not isinstance(config, dict):
        raise typer.BadParameter(
            "it must be a JSON object, as in '{\"C\": 0.5}'", param_hint="--config"
        )
    return config


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not in the language")
