"""Commands of Cortex that do something else here, or for which nothing is left to do: scripts that call them
go on, or are told what to do instead.
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
    """Those whose completion can be set up."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


_COMPLETE = "_CORTEX_COMPLETE"  # typer reads it, by the name of the command
_NO_CLUSTER = (
    "An operator runs where `cortex serve` is started: on this machine, or on a Ray cluster with "
    "--engine ray; docs/ray.md tells how."
)
_INSTEAD = {
    "up": f"no cluster is made here. {_NO_CLUSTER}",
    "down": "no cluster was made here. Stop the operator that `cortex serve` runs; its data folder stays.",
    "configure": f"no cluster was made here. {_NO_CLUSTER} Its settings: docs/configuration.md.",
    "scale": "no cluster was made here. Ray's own autoscaler starts and stops nodes: docs/ray.md.",
    "export": "what is deployed is not exported: keep cortex.yaml and its project. "
    "`cortex get API -o json` shows each API as it is deployed.",
    "health": "an operator tells its health itself: GET /healthz and /readyz; `cortex cluster info` "
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
        "no container is made to debug in. A task is plain Python: "
        "`python -c 'import task; task.task({})'` in the project's folder runs it as a job does.",
    )
    for name, words in _INSTEAD.items():
        _refuse(cluster, name, words)
    gcp = typer.Typer(hidden=True, rich_markup_mode=None)
    for name in ("up", "info", "down"):
        _refuse(gcp, name, f"no cluster is made here. {_NO_CLUSTER}")
    app.add_typer(gcp, name="cluster-gcp")


def refresh(
    api: ApiName, *, env: Env = None, force: Force = False, output: Output = Format.PRETTY
) -> None:
    """Do nothing to API: each job is a new process already."""
    from cortex.sdk import client

    with client(env) as operator:
        name = operator.get_api(api)["spec"]["name"]
    message = f"{name} has nothing to restart: each job is a new process. `cortex deploy` brings changed files"
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
    """Deploy the APIs of FILE, with the folder that it lies in, where they are deployed already."""
    from cortex.sdk import client
    from cortex.sdk.deploys import apis_of_file

    described = apis_of_file(file)
    with client(env) as operator:
        for api in described:
            operator.get_api(api.name)
            path = api.definition.path
            if path is not None and not (file.parent / path).is_file():
                raise InvalidProject(
                    f"{file}: {path}, which {api.name} runs, is not in the folder of {file.name}. A patch "
                    "sends the project again: run `cortex deploy` in the project's folder"
                )
        show_results(operator.deploy(file, force=True), output)


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print the completion of a shell: `source <(cortex completion bash)` in ~/.bashrc."""
    from cortex.cli.main import app

    os.environ[_COMPLETE] = f"source_{shell.value}"
    try:
        app([], prog_name="cortex")
    finally:
        del os.environ[_COMPLETE]


def _refuse(app: typer.Typer, name: str, words: str) -> None:
    def command() -> None:
        raise CortexError(f"cortex {name}: {words}", kind="client.no_such_command")

    command.__doc__ = f"Not here: {words}"
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    register: Callable[[Callable[[], None]], object] = app.command(
        name, hidden=True, context_settings=anything
    )
    register(command)
