"""`cortex token`: makes and revokes the tokens of an operator.

The commands work directly on the operator's store, in its data folder or in PostgreSQL: anyone who
can write there administers the operator. A running operator applies a change from the next request
on.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cortex.cli.options import ConfigFile, DataDir, Format, Output, StoreUrl
from cortex.cli.output import print_json, print_line, show, table
from cortex.errors import StartupError
from cortex.spec.audit import Actor
from cortex.spec.times import rfc3339
from cortex.spec.tokens import Scope, checked_name, digest, new_secret

if TYPE_CHECKING:
    from cortex.operator.config.schema import Configuration
    from cortex.store import Store

T = TypeVar("T")

app = typer.Typer(
    help="Make and revoke the tokens of the operator on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the token's user or purpose.")]


@app.command("create")
def create(
    name: Name,
    scope: Annotated[
        Scope,
        typer.Option(
            help="read; submit (and stop jobs); deploy (and delete APIs). Each includes the one "
            "before."
        ),
    ],
    data_dir: DataDir = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
    output: Output = Format.PRETTY,
) -> None:
    """Make a token and print it. It is not stored, and cannot be shown again."""
    secret = new_secret()
    checked_name(name)
    configuration = _configuration(data_dir, store, config)
    _make_folder(configuration)
    _with_store(
        configuration, lambda opened: opened.create_token(name, scope, digest(secret), _actor())
    )
    if output.is_json:
        print_json({"name": name, "scope": scope.value, "token": secret}, output)
    else:
        print_line(secret)


@app.command("list")
def list_(
    data_dir: DataDir = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
    output: Output = Format.PRETTY,
) -> None:
    """List the tokens, without their secrets."""
    tokens = _with_store(_configuration(data_dir, store, config), lambda opened: opened.tokens())
    if output.is_json:
        print_json(
            [
                {"name": t.name, "scope": t.scope.value, "created_time": rfc3339(t.created_ns)}
                for t in tokens
            ],
            output,
        )
    elif not tokens:
        print_line("there are no tokens; make one with `cortex token create NAME --scope SCOPE`")
    else:
        rows = [(t.name, t.scope.value, rfc3339(t.created_ns)[:19] + "Z") for t in tokens]
        show(table(("token", "scope", "created"), rows))


@app.command("revoke")
def revoke(
    name: Name,
    data_dir: DataDir = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Revoke a token: requests with it are refused from then on."""
    configuration = _configuration(data_dir, store, config)
    _with_store(configuration, lambda opened: opened.revoke_token(name, _actor()))
    print_line(f"revoked {name}")


def _configuration(data_dir: Path | None, store: str | None, config: Path | None) -> Configuration:
    from cortex.operator.config.sources import load

    return load({"data_dir": data_dir, "store": store}, config).configuration


def _actor() -> Actor:
    """The system user that runs the command; for `sudo` the user who called it."""
    try:
        name = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without an entry, as in a container
        name = f"uid {os.getuid()}"
    return Actor(name)


def _make_folder(configuration: Configuration) -> None:
    folder = configuration.data_dir.absolute()
    try:
        if configuration.store is None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"cannot make the data folder {folder}: {error}. Choose another with --data-dir"
        ) from error


def _with_store(configuration: Configuration, work: Callable[[Store], Awaitable[T]]) -> T:
    import asyncio

    from cortex.store import Store

    folder = configuration.data_dir.absolute()
    if configuration.store is None and not folder.is_dir():
        raise StartupError(
            f"no operator's data in {folder}; name the data folder with --data-dir, or the "
            "database with --store"
        )

    async def main() -> T:
        opened = Store(configuration.database_url)
        try:
            return await work(opened)
        finally:
            opened.close()

    return asyncio.run(main())
