"""`cortex cluster`: the machines that an operator's jobs run on."""

from __future__ import annotations

from typing import Any, cast

import typer

from cortex.cli.options import Env, Format, Output
from cortex.cli.output import print_json, print_line, show, table

_GIB = 1 << 30

app = typer.Typer(
    help="Show the machines that jobs run on.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    """Without a callback typer would make the only command the group itself."""


@app.command("info")
def info(env: Env = None, output: Output = Format.PRETTY) -> None:
    """Show each node with its total and free resources and its labels."""
    from cortex.sdk import client

    with client(env) as operator:
        cluster = operator.cluster_info()
    if output.is_json:
        print_json(cluster, output)
        return
    nodes = cast("list[dict[str, Any]]", cluster["nodes"])
    problem = cluster.get("problem")  # operators of earlier versions do not send it
    if problem is not None:
        print_line(f"{problem}; jobs wait, and the operator retries")
    if not nodes:
        if problem is None:
            print_line(f"the engine ({cluster['engine']}) has no nodes now")
        return
    columns = ("node", "state", "CPU free", "memory free", "GPUs free")
    if any(node["labels"] for node in nodes):
        show(table((*columns, "labels"), ((*_row(node), _labels(node)) for node in nodes)))
    else:
        show(table(columns, map(_row, nodes)))


def _row(node: dict[str, Any]) -> tuple[str, ...]:
    state = "ready" if node["is_ready"] else node["problem"] or "starting"
    free, total = node["free"], node["total"]
    return (
        node["name"],
        state,
        f"{free['cpu']:g} of {total['cpu']:g}",
        f"{free['mem'] / _GIB:.1f} of {total['mem'] / _GIB:.1f} GiB",
        f"{free['gpu']} of {total['gpu']}",
    )


def _labels(node: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(node["labels"].items()))
