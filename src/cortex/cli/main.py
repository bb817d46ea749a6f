"""The `cortex` command: puts the command groups together, and is the only place that prints errors.

Exit codes: 0, 1 for an error, 2 for a command line that is not valid, 3 for a job that `submit
--wait` waited for and that did not succeed, 130 for Ctrl-C. Modules that take long to load are
imported by the commands that need them.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from cortex import __version__
from cortex.cli import cluster, env, legacy, serve, streams, token
from cortex.cli.audit import audit
from cortex.cli.backup import backup, restore
from cortex.cli.deploy import deploy
from cortex.cli.get import get
from cortex.cli.jobs import delete, logs, submit
from cortex.cli.options import BadValue, Env
from cortex.cli.output import print_error, print_line
from cortex.errors import CortexError

app = typer.Typer(
    name="cortex",
    help="Your Python function, command or script behind a URL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Without markup, because boxes would wrap messages at a terminal's width, and there may be no
    # terminal.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def version(env: Env = None) -> None:
    """Print the version of this command; with --env, the operator's as well."""
    if env is None:
        print_line(__version__)
        return
    from cortex.sdk import client

    with client(env) as operator:
        operator_version = operator.info()["version"]
    print_line(f"cli version: {__version__}\noperator version: {operator_version}")


def _print_version(is_requested: bool) -> None:
    if is_requested:
        print_line(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Your Python function, command or script behind a URL."""


serve.add_to(app)
app.command("deploy")(deploy)
app.command("get")(get)
app.command("describe", hidden=True)(get)
app.command("submit")(submit)
app.command("logs")(logs)
app.command("delete")(delete)
app.command("audit")(audit)
app.add_typer(cluster.app, name="cluster")
app.add_typer(env.app, name="env")
app.add_typer(token.app, name="token")
app.command("backup")(backup)
app.command("restore")(restore)
app.command("version")(version)
legacy.add_to(app, cluster.app)


def main() -> None:
    """Run the command of this process's arguments, and exit."""
    streams.set_up()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command, and return its exit code."""
    # httpx imports its own command line, and with it rich, which takes as long as the rest of
    # httpx. The import system treats a module that is None here as missing.
    sys.modules["httpx._main"] = None  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        # A log may contain characters that the locale's encoding lacks: escape them.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has exited, as `head` does
        streams.discard_output()
        return 1
    except streams.OutputError as error:
        print_error(f"standard output cannot be written: {error.strerror}")
        streams.discard_output()
        return 1
    return code


def _run(arguments: list[str]) -> int:
    try:
        app(arguments, prog_name="cortex")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except CortexError as error:
        print_error(error.message)
        return 2 if isinstance(error, BadValue) else 1
    except (BrokenPipeError, streams.OutputError):
        raise
    except OSError as error:
        print_error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    main()
