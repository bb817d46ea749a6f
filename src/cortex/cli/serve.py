"""`cortex serve`: the operator. It is imported only when the command runs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import platformdirs
import typer


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8888,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where jobs, projects and logs are kept.")
    ] = None,
    cpu: Annotated[float | None, typer.Option(min=0.001, help="Cores that jobs may take.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory that jobs may take, as 16Gi.")] = None,
    gpu: Annotated[int | None, typer.Option(min=0, help="GPUs that jobs may take.")] = None,
    grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds between SIGTERM and SIGKILL when a job is stopped."),
    ] = 10,
    insecure: Annotated[
        bool, typer.Option(help="Listen beyond this machine: whoever gets there can run code.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of pages that may call the operator.")
    ] = None,
) -> None:
    """Run the operator. SIGTERM ends it; its jobs go on, and it finds them again."""
    from cortex.engines.base import Capacity
    from cortex.engines.local.capacity import detect
    from cortex.operator.app import run
    from cortex.operator.settings import Settings
    from cortex.spec.quantities import read_bytes

    found = detect()
    mem_bytes = found.mem if mem is None else read_bytes(mem)
    if mem_bytes is None:
        raise typer.BadParameter(f"{mem!r} is no size; write 16Gi", param_hint="--mem")
    capacity = Capacity(
        cpu_m=found.cpu_m if cpu is None else round(cpu * 1000),
        mem=mem_bytes,
        gpu=found.gpu if gpu is None else gpu,
    )
    settings = Settings(
        data_dir=(data_dir or Path(platformdirs.user_data_dir("cortex"))).absolute(),
        host=host,
        port=port,
        capacity=capacity,
        grace_s=grace,
        insecure=insecure,
        allowed_origins=frozenset(allow_origin or ()),
    )
    asyncio.run(run(settings, _announce))


def _announce(url: str) -> None:
    sys.stdout.write(f"Cortex operator listening on {url}\n")
    sys.stdout.flush()
