"""`cortex env`: the named operators that commands on this machine can use."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cortex.cli.options import Format, Output
from cortex.cli.output import print_json, print_line, show, table
from cortex.errors import InvalidRequest

app = typer.Typer(
    help="Configure the operators that commands use.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the environment.")]


@app.command("configure")
def configure(
    name: Name,
    operator_endpoint: Annotated[
        str | None,
        typer.Option("--operator-endpoint", "-o", metavar="URL", help="URL of the operator."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Token to send; - reads it from standard input. Without this option a stored "
            "token is kept if the endpoint stays the same.",
        ),
    ] = None,
) -> None:
    """Add the environment NAME, or change its operator. The first environment becomes the
    default."""
    from cortex.sdk import environments

    if operator_endpoint is None:
        operator_endpoint = _ask_for_endpoint()
    try:
        if token == "-":
            token = sys.stdin.readline().strip()
        environment = environments.configure(name, operator_endpoint, token)
    except InvalidRequest as error:
        raise typer.BadParameter(error.message) from error
    default = " (the default)" if environments.load().default == environment.name else ""
    print_line(f"configured {environment.name}: {environment.operator_endpoint}{default}")


@app.command("list")
def list_(output: Output = Format.PRETTY) -> None:
    """List the configured environments."""
    from cortex.sdk import environments

    known = environments.load()
    if output.is_json:
        print_json(known.as_json(), output)
    elif not known.all:
        local = environments.LOCAL
        print_line(f"no environment is configured: commands use {local.operator_endpoint}")
    else:
        rows = [
            (e.name, e.operator_endpoint, "default" if e.name == known.default else "")
            for e in known.all
        ]
        show(table(("env", "operator endpoint", ""), rows))


@app.command("default")
def default(name: Name) -> None:
    """Make NAME the environment of commands without --env."""
    from cortex.sdk import environments

    environments.set_default(name)
    print_line(f"{name} is the default environment")


@app.command("rename")
def rename(
    name: Name, new_name: Annotated[str, typer.Argument(metavar="NEW_NAME", help="Its new name.")]
) -> None:
    """Give the environment NAME another name."""
    from cortex.sdk import environments

    try:
        environments.rename(name, new_name)
    except InvalidRequest as error:
        raise typer.BadParameter(error.message) from error
    print_line(f"renamed {name} to {new_name}")


@app.command("delete")
def delete(name: Name) -> None:
    """Delete the environment NAME. Its operator is not affected."""
    from cortex.sdk import environments

    environments.delete(name)
    print_line(f"deleted {name}")


def _ask_for_endpoint() -> str:
    from cortex.sdk.environments import LOCAL

    if not sys.stdin.isatty():
        raise typer.BadParameter("missing; pass the URL", param_hint="--operator-endpoint")
    answer: str = typer.prompt("operator endpoint", default=LOCAL.operator_endpoint, err=True)
    return answer
