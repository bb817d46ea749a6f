"""`cortex serve`: the operator. What it needs is imported only when the command runs."""

from __future__ import annotations

import gc
import sys
from enum import StrEnum
from typing import Annotated

import typer

from cortex.cli import streams
from cortex.cli.options import ConfigFile, DataDir, StoreUrl


class EngineName(StrEnum):
    """The engines that an operator can drive."""

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
            help="Where other operators on the store reach this one.",
            show_default="as it listens",
        ),
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which another operator takes over from one that hangs.",
            show_default="10",
        ),
    ] = None,
    files: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="s3://BUCKET/PREFIX for projects and the logs of finished jobs; else the data folder.",
        ),
    ] = None,
    lost_folder: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="A data folder that is lost for good; jobs that ran on its machine end.",
        ),
    ] = None,
    cpu: Annotated[float | None, typer.Option(help="Cores that jobs may take.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory that jobs may take, as 16Gi.")] = None,
    gpu: Annotated[int | None, typer.Option(help="GPUs that jobs may take.")] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            help="Seconds between SIGTERM and SIGKILL when a job is stopped.", show_default="10"
        ),
    ] = None,
    build_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which the build of an environment is ended.", show_default="1800"
        ),
    ] = None,
    build_env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Variable of the operator's that builds find, too."),
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
            help="The Ray cluster, of which this machine runs a node; auto finds it.",
        ),
    ] = None,
    ray_node_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Where Ray's nodes keep projects, environments and jobs."
        ),
    ] = None,
    run_as: Annotated[
        str | None,
        typer.Option(
            metavar="USER", help="System user that jobs run as; the operator has to be root."
        ),
    ] = None,
    keep_jobs: Annotated[
        float | None,
        typer.Option(help="Days that finished jobs are kept; 0 is for ever.", show_default="90"),
    ] = None,
    keep_logs: Annotated[
        float | None,
        typer.Option(
            help="Days that the logs and files of finished jobs are kept; 0 is for ever.",
            show_default="30",
        ),
    ] = None,
    keep_count: Annotated[
        int | None, typer.Option(help="Finished jobs kept of each API, the newest.")
    ] = None,
    keep_audit: Annotated[
        float | None,
        typer.Option(help="Days that the audit is kept; 0 is for ever.", show_default="365"),
    ] = None,
    max_waiting_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bytes of config of all jobs that wait; a submit beyond is refused.",
            show_default="1Gi",
        ),
    ] = None,
    require_token: Annotated[
        bool | None,
        typer.Option(help="Ask for tokens on this machine too; beyond it they always are."),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(help="Ask nobody for a token: whoever reaches it can run code."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Origin of pages that may call the operator."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name by which the operator may be asked without tokens, beside the machine's own.",
        ),
    ] = None,
    config: ConfigFile = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration, and end.")
    ] = False,
) -> None:
    """Run the operator. SIGTERM ends it; its jobs go on, and it finds them again.

    Every option can be given by an environment variable too, as CORTEX_SERVE_KEEP_JOBS, or in a YAML
    file, as keep_jobs.
    """
    gc.disable()  # until all is loaded: what is looked through again and again meanwhile stays
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
    except OSError:  # a service's output may be closed: its jobs matter more
        streams.discard_output()
