"""`cortex serve`: runs the operator.

The options of the command are made from the fields of `Configuration` when the command is called:
`Configuration` needs pydantic, and the operator much more, and no other command should load them.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from cortex.cli import streams
from cortex.cli.options import ConfigFile


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve", cls=_ServeCommand, help=serve.__doc__)(lambda: None)


class _ServeCommand(TyperCommand):
    """The command as the list of commands needs it: its name and help. A call makes its options."""

    # Typer has a copy of click, whose types are private.
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        gc.disable()  # until all modules are loaded: collections would scan objects that all stay
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(self.name, help=self.help)(_with_options())
        return typer.main.get_command(app).make_context(*args, **kwargs)


def serve(
    *,
    config: ConfigFile = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration and exit.")
    ] = False,
    **flags: object,
) -> None:
    """Run the operator. SIGTERM ends it; its jobs continue, and the next start recovers them.

    Every option can also be set by an environment variable, such as CORTEX_SERVE_KEEP_JOBS, or in a
    YAML file, as keep_jobs.
    """
    import asyncio

    import uvloop

    from cortex.operator.app import run
    from cortex.operator.config.sources import load

    effective = load(flags, config)
    if show_config:
        sys.stdout.write(effective.as_yaml())
        return
    settings = effective.configuration.settings()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(settings, _announce))


def _with_options() -> Callable[..., None]:
    """`serve` with the signature that typer reads: an option for each setting, then its own."""

    def command(**values: Any) -> None:
        serve(**values)

    own = inspect.signature(serve, eval_str=True).parameters.values()
    parameters = [*_setting_options(), *(each for each in own if each.kind is not each.VAR_KEYWORD)]
    command.__dict__["__signature__"] = inspect.Signature(parameters)
    return command


def _setting_options() -> Iterable[inspect.Parameter]:
    """An option for each setting. An option that is not given is None."""
    from cortex.operator.config.schema import Configuration, described

    types = get_type_hints(Configuration)  # without the checks: `load` applies them
    for name, setting in described(Configuration).items():
        option = typer.Option(
            metavar=setting.metavar,
            help=setting.help,
            show_default=setting.unset or _shown(Configuration.model_fields[name].default),
        )
        value = list[str] if get_origin(types[name]) is tuple else types[name]
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[value | None, option],
        )


def _shown(default: object) -> str | bool:
    """A default as `--help` shows it; False for no, nothing and several, which it does not show."""
    return False if default in (None, False, ()) else str(default)


def _announce(url: str) -> None:
    try:
        sys.stdout.write(f"Cortex operator listening on {url}\n")
        sys.stdout.flush()
    except OSError:  # a service's output may be closed, which must not stop the operator
        streams.discard_output()
