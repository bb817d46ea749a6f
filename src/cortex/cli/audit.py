"""`cortex audit`: the changes that users made, and the requests that were refused because of their
token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.options import Env, Format, Output
from cortex.cli.output import local_time, print_json, print_line, show, table

if TYPE_CHECKING:
    from cortex.sdk.types import AuditEntry


def audit(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Entries to show, the newest.")] = 50,
    env: Env = None,
    output: Output = Format.PRETTY,
) -> None:
    """Show who deployed, deleted, stopped, made and revoked tokens, and what was refused."""
    from cortex.sdk import client

    with client(env) as operator:
        entries = operator.audit(limit)["entries"]
    if output.is_json:
        print_json(entries, output)
    elif not entries:
        print_line("the audit has no entries yet")
    else:
        show(table(("time", "action", "by", "from", "of", "details"), map(_row, entries)))


def _row(entry: AuditEntry) -> tuple[str, ...]:
    target = "/".join(part for part in (entry["api_name"], entry["job_id"]) if part)
    times = f"{entry['count']} times" if entry["count"] > 1 else ""
    details = ", ".join(part for part in (entry["message"], times) if part)
    return (
        local_time(entry["time"]),
        entry["action"],
        entry["by"] or "-",
        entry["address"] or "-",
        target or entry["token"] or "-",
        details,
    )
