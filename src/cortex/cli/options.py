"""Options that several commands share, so that they mean and read the same everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cortex.errors import CortexError


class BadValue(CortexError):
    """The value of an option cannot be used: one line about it, without the command's usage, and exit code 2."""

    kind = "client.bad_value"
    http_status = 400


class Format(StrEnum):
    """How a command prints its answer."""

    PRETTY = "pretty"
    JSON = "json"
    MIXED = "mixed"
    """JSON in base64 between marks, as Cortex's Python clients before v0.31 find it among other output."""

    @property
    def is_json(self) -> bool:
        """Whether programs read the answer."""
        return self is not Format.PRETTY


Env = Annotated[
    str | None,
    typer.Option("--env", "-e", metavar="NAME", help="Environment to use, else the default one."),
]
Output = Annotated[
    Format,
    typer.Option(
        "--output",
        "-o",
        help="For people, or the operator's answer as JSON; mixed is for Python clients of Cortex before v0.31.",
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Do it without asking.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Answer every question with yes.")]
ApiName = Annotated[str, typer.Argument(metavar="API", help="Name of a deployed API.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.")]
OptionalJobId = Annotated[str | None, typer.Argument(metavar="JOB", help="Id of a job.")]

# Of the operator itself
DataDir = Annotated[
    Path | None, typer.Option(help="Where an operator keeps jobs, projects and logs.")
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="postgresql://USER@HOST/DATABASE; else a file in the data folder."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The operator's settings, as YAML.")
]
