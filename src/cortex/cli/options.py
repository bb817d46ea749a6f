"""Options and arguments that several commands share, with the same meaning and help text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cortex.errors import CortexError


class BadValue(CortexError):
    """The value of an option is not valid. The command prints one line without its usage, and exits
    with code 2."""

    kind = "client.bad_value"
    http_status = 400


class Format(StrEnum):
    """The output format of a command."""

    PRETTY = "pretty"
    JSON = "json"
    MIXED = "mixed"
    """JSON in base64 between markers, by which Cortex's Python clients before v0.31 find it among
    other output."""

    @property
    def is_json(self) -> bool:
        """Whether the output is for programs."""
        return self is not Format.PRETTY


Env = Annotated[
    str | None,
    typer.Option(
        "--env", "-e", metavar="NAME", help="Environment to use instead of the default one."
    ),
]
Output = Annotated[
    Format,
    typer.Option(
        "--output",
        "-o",
        help="pretty for people, json for the operator's answer as JSON; mixed is for Python "
        "clients of Cortex before v0.31.",
    ),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Do not ask for confirmation.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Answer yes to every question.")]
ApiName = Annotated[str, typer.Argument(metavar="API", help="Name of a deployed API.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.")]
OptionalJobId = Annotated[str | None, typer.Argument(metavar="JOB", help="Id of a job.")]

# Settings of the operator. `Configuration` describes them in the same words, but takes too long to
# import here; a test compares the two.
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the operator's jobs, projects and logs.",
        show_default="the platform's folder for user data",
    ),
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="PostgreSQL database, as postgresql://USER@HOST/DATABASE.",
        show_default="a file in the data folder",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="YAML file of the operator's settings.")
]
