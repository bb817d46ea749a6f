"""`cortex deploy`: the APIs of a file, and the project around it, to the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cortex.cli.options import Env, Format, Output, Yes
from cortex.cli.output import print_error, print_json, print_line


def deploy(
    file: Annotated[Path, typer.Argument(help="The file that describes the APIs.")] = Path(
        "cortex.yaml"
    ),
    *,
    env: Env = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="For old scripts: a deploy always replaces.")
    ] = False,
    yes: Yes = False,
    output: Output = Format.PRETTY,
) -> None:
    """Deploy the APIs of FILE together with the folder that it lies in."""
    from cortex.client import client

    with client(env) as operator:
        results = operator.deploy(file, force=True)
    if output is Format.JSON:
        print_json(results)
    for result in results:
        if result["error"]:
            print_error(result["error"])
        elif output is Format.PRETTY:
            print_line(result["message"])
            if result["api"]:
                print_line(f"  {result['api']['endpoint']}")
    if any(result["error"] for result in results):
        raise typer.Exit(1)
