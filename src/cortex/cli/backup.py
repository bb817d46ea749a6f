"""`cortex backup` and `cortex restore`: all that an operator has, in one file. The commands work on its data folder and its
store, as `cortex token` does: a backup also while it runs, a restore while it does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cortex.cli.options import ConfigFile, DataDir, StoreUrl
from cortex.cli.output import print_error, print_line

if TYPE_CHECKING:
    from cortex.operator.backup.backup import Summary
    from cortex.operator.config.settings import Settings

RunAs = Annotated[
    str | None, typer.Option(metavar="USER", help="System user that the operator's jobs run as.")
]


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup, as FILE.tar.gz.")],
    data_dir: DataDir = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Back up the operator on this machine into one file, also while it runs."""
    from cortex.operator.backup.backup import back_up

    settings = _settings(data_dir, store, None, config)
    made = back_up(settings, file)
    if settings.files is None:
        for identity in made.missing:
            print_error(
                f"the project {identity} is deployed and not in the data folder: it is not in the backup"
            )
    _warn_of_changed(made)
    print_line(f"backed up {_words(made)} in {file}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `cortex backup` has made.")],
    data_dir: DataDir = None,
    store: StoreUrl = None,
    run_as: RunAs = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Put aside what the data folder has.")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Restore a backup into a new data folder, where no operator runs."""
    from cortex.operator.backup.restore import restore as put_back

    settings = _settings(data_dir, store, run_as, config)
    done = put_back(settings, file, replace=force)
    _warn_of_changed(done)
    if done.aside is not None:
        print_line(f"what was there is in {done.aside}")
    print_line(f"restored {_words(done)} into {settings.data_dir}")


def _settings(
    data_dir: Path | None, store: str | None, run_as: str | None, config: Path | None
) -> Settings:
    from cortex.operator.config.sources import load

    given = {"data_dir": data_dir, "store": store, "run_as": run_as}
    return load(given, config).configuration.settings()


def _warn_of_changed(summary: Summary) -> None:
    for identity in summary.changed:
        print_error(f"the project {identity} was changed after its deploy, and is as it was found")


def _words(summary: Summary) -> str:
    return f"{summary.jobs:,} jobs, {summary.projects:,} projects and {summary.logs:,} logs"
