"""`cortex deploy`: sends the APIs of a file, and the project folder around it, to the operator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.options import Env, Format, Output, Yes
from cortex.cli.output import hints, print_error, print_json, print_line

if TYPE_CHECKING:
    from cortex.sdk import DeployResult


def deploy(
    file: Annotated[Path, typer.Argument(help="The file that describes the APIs.")] = Path(
        "cortex.yaml"
    ),
    *,
    env: Env = None,
    force: Annotated[
        bool,
        typer.Option("--force", "-f", help="No effect, for old scripts: a deploy always replaces."),
    ] = False,
    yes: Yes = False,
    output: Output = Format.PRETTY,
) -> None:
    """Deploy the APIs of FILE together with its folder."""
    from cortex.sdk import client

    with client(env) as operator:
        show_results(operator.deploy(file, force=True), output)


def show_results(results: list[DeployResult], output: Format) -> None:
    """Print the result of a deploy for each API.

    Raises:
        typer.Exit: an API was not deployed.
    """
    if output.is_json:
        print_json(results, output)
    for result in results:
        if result["error"]:
            print_error(result["error"])
        elif output is Format.PRETTY:
            print_line(result["message"])
            if result["api"]:
                print_line(f"  {result['api']['endpoint']}")
                for hint in hints(result["api"]):
                    print_line(f"  {hint}")
    if any(result["error"] for result in results):
        raise typer.Exit(1)
