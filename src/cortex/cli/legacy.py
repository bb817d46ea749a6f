"""Commands of the original Cortex that differ here or have no use: scripts that call them continue
to work, or get an error that says what to do instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cortex.cli.deploy import show_results
from cortex.cli.options import ApiName, Env, Force, Format, Output, Yes
from cortex.cli.output import print_json, print_line
from cortex.errors import CortexError, InvalidProject


class Shell(StrEnum):
    """The shells with completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


_COMPLETE = "_CORTEX_COMPLETE"  # typer derives this variable from the name of the command
_HOW_TO_SERVE = (
    "Start the operator with `cortex serve`: on this machine, or with --engine ray on a Ray "
    "cluster (docs/ray.md)."
)
_NO_CLUSTER = "this version of Cortex does not manage clusters."
_ADVICE = {
    "up": f"{_NO_CLUSTER} {_HOW_TO_SERVE}",
    "down": f"{_NO_CLUSTER} Stop the operator that `cortex serve` runs; its data folder stays.",
    "configure": f"{_NO_CLUSTER} {_HOW_TO_SERVE} Its settings: docs/configuration.md.",
    "scale": f"{_NO_CLUSTER} Ray's own autoscaler starts and stops nodes: docs/ray.md.",
    "export": "APIs cannot be exported: keep cortex.yaml and its project. "
    "`cortex get API -o json` shows each API as it is deployed.",
    "health": "the operator reports its health at GET /healthz and /readyz; `cortex cluster info` "
    "shows its machines.",
}


def add_to(app: typer.Typer, cluster: typer.Typer) -> None:
    """Add the commands."""
    app.command("refresh", hidden=True)(refresh)
    app.command("patch", hidden=True)(patch)
    app.command("completion")(completion)
    _refuse(
        app,
        "prepare-debug",
        "jobs do not run in containers. A task is plain Python: "
        "`python -c 'import task; task.task({})'` in the project's folder runs it as a job does.",
    )
    for name, advice in _ADVICE.items():
        _refuse(cluster, name, advice)
    gcp = typer.Typer(hidden=True, rich_markup_mode=None)
    for name in ("up", "info", "down"):
        _refuse(gcp, name, f"{_NO_CLUSTER} {_HOW_TO_SERVE}")
    app.add_typer(gcp, name="cluster-gcp")


def refresh(
    api: ApiName, *, env: Env = None, force: Force = False, output: Output = Format.PRETTY
) -> None:
    """Do nothing: each job of API is a new process."""
    from cortex.sdk import client

    with client(env) as operator:
        name = operator.get_api(api)["spec"]["name"]
    message = (
        f"{name} has nothing to restart, because each job is a new process; to send changed files, "
        "run `cortex deploy`"
    )
    if output.is_json:
        print_json({"message": message}, output)
    else:
        print_line(message)


def patch(
    file: Annotated[Path, typer.Argument(help="The file that describes the APIs.")] = Path(
        "cortex.yaml"
    ),
    *,
    env: Env = None,
    force: Force = False,
    yes: Yes = False,
    output: Output = Format.PRETTY,
) -> None:
    """Deploy the APIs of FILE again, together with its folder."""
    from cortex.sdk import client
    from cortex.sdk.deploys import apis_of_file

    apis = apis_of_file(file)
    with client(env) as operator:
        for api in apis:
            operator.get_api(api.name)
            path = api.definition.path
            if path is not None and not (file.parent / path).is_file():
                raise InvalidProject(
                    f"{file}: {path}, which {api.name} runs, is not in the folder of {file.name}. "
                    "A patch sends the whole project: run `cortex deploy` in the project's folder"
                )
        show_results(operator.deploy(file, force=True), output)


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print the completion script of a shell: `source <(cortex completion bash)` in ~/.bashrc."""
    os.environ[_COMPLETE] = f"source_{shell.value}"
    try:
        context.find_root().command.main([], prog_name="cortex")
    finally:
        del os.environ[_COMPLETE]


def _refuse(app: typer.Typer, name: str, advice: str) -> None:
    """Add a command that accepts any arguments and fails with advice."""

    def command() -> None:
        raise CortexError(f"cortex {name}: {advice}", kind="client.no_such_command")

    command.__doc__ = f"Not available: {advice}"
    any_arguments = {"ignore_unknown_options": True, "allow_extra_args": True}
    register: Callable[[Callable[[], None]], object] = app.command(
        name, hidden=True, context_settings=any_arguments
    )
    register(command)
