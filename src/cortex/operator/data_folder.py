"""An operator's data folder: made, held, and told from others. Called by the app at the start."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cortex.errors import StartupError
from cortex.operator.config.settings import Settings
from cortex.store import SAVED, put_back
from cortex.worker import files

_PATIENCE_S = 5.0  # somebody who has just come looks around for as long at most
_AGAIN_S = 0.05


def make_folders(settings: Settings) -> None:
    """Make what is missing. Other users of this machine cannot enter: a project's `.env` has secrets.

    Raises:
        StartupError: it cannot be made.
    """
    account = settings.account
    for_jobs = (settings.projects, settings.environments, settings.jobs)
    try:
        for folder in (*for_jobs, settings.locks, settings.archived):
            folder.mkdir(parents=True, exist_ok=True)
            is_shared = account is not None and folder in for_jobs
            with suppress(PermissionError):  # another user's, who let this operator write there
                if account is not None and is_shared:
                    os.chown(folder, -1, account.gid)
                folder.chmod(0o750 if is_shared else 0o700)
    except OSError as error:
        raise StartupError(
            f"the data folder {settings.data_dir} cannot be used: {error}. "
            "Choose another with --data-dir, or give this user the right to write there."
        ) from error


def check_whole(settings: Settings) -> None:
    """Whether nothing of the folder is missing that was here: what is made anew would take its place.

    Raises:
        StartupError: the database was lost, and there is a copy that was saved of it, or a restore was cut off.
    """
    database = settings.database
    saved = sorted(database.parent.glob(f"{database.name}{SAVED}*"))
    if settings.store is None and saved:
        raise StartupError(
            f"the database {database} was removed, moved or replaced under an operator, which saved all that was stored "
            f"as {saved[-1]}: {put_back(database)} To go on with what is there instead, move that file elsewhere."
        )
    if settings.restoring.exists():
        raise StartupError(
            f"a restore into the data folder {settings.data_dir} was cut off: run `cortex restore` again"
        )


@contextmanager
def held(settings: Settings, alone: Callable[[], None]) -> Iterator[None]:
    """Hold the folder alone: two operators on one would both drive its jobs.

    Args:
        alone: clears what was cut off.

    Raises:
        StartupError: another operator uses it.
    """
    with _opened(settings.lock) as file:
        if not _locked(file, fcntl.LOCK_EX):
            raise _in_use(settings, file)
        _sign(file)
        alone()
        yield


@contextmanager
def held_with_others(settings: Settings, alone: Callable[[], None]) -> Iterator[None]:
    """Hold the folder together with the other operators on the store.

    Args:
        alone: clears what was cut off; called while nobody else is here.

    Raises:
        StartupError: an operator uses it that is not on a store which they could share.
    """
    with _opened(settings.lock) as file:
        if _locked(file, fcntl.LOCK_EX):  # nobody else is here
            alone()
            _sign(file)
        deadline = time.monotonic() + _PATIENCE_S
        while not _locked(file, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise _in_use(settings, file)
            time.sleep(_AGAIN_S)
        yield


def namespace(settings: Settings, place: str) -> str:
    """The name under which the operator's agents and jobs are found in a Ray cluster: the same in a data
    folder that takes the place of this one."""
    found = read(settings.ray_namespace)
    if found is None:
        found = f"cortex-{place}"
        write(settings.ray_namespace, found)
    return found


def read(path: Path) -> str | None:
    """A line of the folder's, or None.

    Raises:
        StartupError: it cannot be read.
    """
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error


def write(path: Path, text: str) -> None:
    """Write a line of the folder's: whole, and on the disk when this returns.

    Raises:
        StartupError: it cannot be written.
    """
    try:
        folder = files.open_folder(str(path.parent))
        try:
            files.replace(folder, path.name, text.encode())
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error}") from error


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("a+")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error}") from error


def _locked(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(file: IO[str]) -> None:
    with suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()


def _in_use(settings: Settings, file: IO[str]) -> StartupError:
    file.seek(0)
    owner = file.read().strip() or "unknown"
    return StartupError(
        f"the data folder {settings.data_dir} is in use by another operator (pid {owner}). Stop that "
        "one, or choose another folder with --data-dir. Several operators share a folder where all of "
        "them share a --store on PostgreSQL."
    )
