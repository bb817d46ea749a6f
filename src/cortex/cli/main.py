"""The `cortex` command: its groups put together, and the one place where errors are printed.

Exit codes: 0, 1 for what went wrong, 2 for a command that was not understood, 3 for a job that was waited for and
did not succeed, 130 for Ctrl-C.
Modules that take long to load are imported by the commands that need them.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from cortex import __version__
from cortex.cli import cluster, env, former, streams, token
from cortex.cli.audit import audit
from cortex.cli.backup import backup, restore
from cortex.cli.deploy import deploy
from cortex.cli.get import get
from cortex.cli.jobs import delete, logs, submit
from cortex.cli.options import BadValue, Env
from cortex.cli.output import print_error, print_line
from cortex.cli.serve import serve
from cortex.errors import CortexError

# httpx loads a command of its own, and with it what draws on terminals, which takes as long as all else of httpx. What
# is None here the import system takes not to be there.
sys.modules["httpx._main"] = None  # type: ignore[assignment]

app = typer.Typer(
    name="cortex",
    help="Your Python function, command or script behind a URL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain: boxes would break a message into lines at the width of a terminal that may not be there.
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
        operators = operator.info()["version"]
    print_line(f"cli version: {__version__}\noperator version: {operators}")


def _print_version(asked: bool) -> None:
    if asked:
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


app.command("serve")(serve)
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
former.add_to(app, cluster.app)


def main() -> None:
    """Run the command that the process was started with, and end the process."""
    streams.settle()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command, and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A log may hold what the locale's encoding does not: it is shown escaped then.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as `head` does
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
