"""`cortex backup` and `cortex restore`: all of an operator's data in one file.

The commands work directly on the operator's data folder and store, as `cortex token` does. A backup
may be made while the operator runs; for a restore it must not run.
"""

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
    summary = back_up(settings, file)
    if settings.files is None:
        for identity in summary.missing:
            print_error(
                f"the project {identity} is deployed but missing from the data folder, so the "
                "backup lacks it; deploy it again"
            )
    _warn_of_changed(summary)
    print_line(f"backed up {_counts(summary)} in {file}")


def restore(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file that `cortex backup` has made.")
    ],
    data_dir: DataDir = None,
    store: StoreUrl = None,
    run_as: RunAs = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Move existing data aside first.")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Restore a backup into a new data folder, where no operator runs."""
    from cortex.operator.backup.restore import restore as restore_backup

    settings = _settings(data_dir, store, run_as, config)
    summary = restore_backup(settings, file, replace=force)
    _warn_of_changed(summary)
    if summary.aside is not None:
        print_line(f"the previous data is in {summary.aside}")
    print_line(f"restored {_counts(summary)} into {settings.data_dir}")


def _settings(
    data_dir: Path | None, store: str | None, run_as: str | None, config: Path | None
) -> Settings:
    from cortex.operator.config.sources import load

    given = {"data_dir": data_dir, "store": store, "run_as": run_as}
    return load(given, config).configuration.settings()


def _warn_of_changed(summary: Summary) -> None:
    for identity in summary.changed:
        print_error(
            f"the project {identity} was changed after its deploy; the backup has it as changed"
        )


def _counts(summary: Summary) -> str:
    return f"{summary.jobs:,} jobs, {summary.projects:,} projects and {summary.logs:,} logs"
