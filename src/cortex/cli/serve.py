"""`cortex serve`: runs the operator. The command imports the operator when it runs."""

from __future__ import annotations

import gc
import sys
from enum import StrEnum
from typing import Annotated

import typer

from cortex.cli import streams
from cortex.cli.options import ConfigFile, DataDir, StoreUrl


class EngineName(StrEnum):
    """The engines that an operator can use."""

    LOCAL = "local"
    RAY = "ray"


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default="localhost")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="0 takes any free port.", show_default="8888")
    ] = None,
    data_dir: DataDir = None,
    store: StoreUrl = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="URL at which other operators on the store reach this one.",
            show_default="as it listens",
        ),
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which another operator takes over from a leader that hangs.",
            show_default="10",
        ),
    ] = None,
    files: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="s3://BUCKET/PREFIX for projects and archived logs; default: the data folder.",
        ),
    ] = None,
    lost_folder: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Id of a data folder that is lost for good; the jobs of its machine end.",
        ),
    ] = None,
    cpu: Annotated[float | None, typer.Option(help="Cores that jobs may use.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory that jobs may use, such as 16Gi.")] = None,
    gpu: Annotated[int | None, typer.Option(help="GPUs that jobs may use.")] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            help="Seconds between SIGTERM and SIGKILL when a job is stopped.", show_default="10"
        ),
    ] = None,
    build_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which the operator ends the build of an environment.",
            show_default="1800",
        ),
    ] = None,
    build_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Variable of the operator's environment that builds get as well."
        ),
    ] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(
            help="Where jobs run: on this machine, or on a Ray cluster.", show_default="local"
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The Ray cluster, with a node on this machine; auto finds it.",
        ),
    ] = None,
    ray_node_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Folder on Ray's nodes for projects, environments and jobs."
        ),
    ] = None,
    run_as: Annotated[
        str | None,
        typer.Option(
            metavar="USER", help="System user that jobs run as; the operator must run as root."
        ),
    ] = None,
    keep_jobs: Annotated[
        float | None,
        typer.Option(help="Days to keep finished jobs; 0 is for ever.", show_default="90"),
    ] = None,
    keep_logs: Annotated[
        float | None,
        typer.Option(
            help="Days to keep the logs and files of finished jobs; 0 is for ever.",
            show_default="30",
        ),
    ] = None,
    keep_count: Annotated[
        int | None, typer.Option(help="Number of finished jobs to keep for each API, the newest.")
    ] = None,
    keep_audit: Annotated[
        float | None,
        typer.Option(help="Days to keep the audit; 0 is for ever.", show_default="365"),
    ] = None,
    max_waiting_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Limit for the config of all waiting jobs; a submit beyond it is refused.",
            show_default="1Gi",
        ),
    ] = None,
    require_token: Annotated[
        bool | None,
        typer.Option(
            help="Require tokens on this machine as well; for other machines they always are."
        ),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(help="Require no tokens: anyone who can reach the operator can run code."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Origin of web pages that may call the operator."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another host name that requests without tokens may use for the operator.",
        ),
    ] = None,
    config: ConfigFile = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration and exit.")
    ] = False,
) -> None:
    """Run the operator. SIGTERM ends it; its jobs continue, and the next start recovers them.

    Every option can also be set by an environment variable, such as CORTEX_SERVE_KEEP_JOBS, or in a
    YAML file, as keep_jobs.
    """
    gc.disable()  # until all modules are loaded: collections would scan objects that all stay
    import asyncio

    import uvloop

    from cortex.operator.app import run
    from cortex.operator.config.sources import load

    effective = load(
        {
            "host": host,
            "port": port,
            "data_dir": data_dir,
            "store": store,
            "advertise": advertise,
            "lease": lease,
            "files": files,
            "lost_folder": lost_folder,
            "cpu": cpu,
            "mem": mem,
            "gpu": gpu,
            "grace": grace,
            "build_timeout": build_timeout,
            "build_env": build_env,
            "engine": None if engine is None else engine.value,
            "ray_address": ray_address,
            "ray_node_dir": ray_node_dir,
            "run_as": run_as,
            "keep_jobs": keep_jobs,
            "keep_logs": keep_logs,
            "keep_count": keep_count,
            "keep_audit": keep_audit,
            "max_waiting_bytes": max_waiting_bytes,
            "require_token": require_token,
            "insecure": insecure,
            "allow_origin": allow_origin,
            "allow_host": allow_host,
        },
        config,
    )
    if show_config:
        sys.stdout.write(effective.shown())
        return
    settings = effective.configuration.settings()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(settings, _announce))


def _announce(url: str) -> None:
    try:
        sys.stdout.write(f"Cortex operator listening on {url}\n")
        sys.stdout.flush()
    except OSError:  # a service's output may be closed, which must not stop the operator
        streams.discard_output()
