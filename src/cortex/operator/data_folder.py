"""An operator's data folder: created, locked, and identified. Called by the app at the start.

The folder has an id. Its database and its object store belong to that id.

A data folder can be lost. If jobs run in a cluster and all other data is in the object store,
nothing was lost with the folder: a new folder takes its id over. Several operators, each with a
folder of its own, share one id in the same way. If jobs ran on the lost machine, an administrator
has to declare the folder lost (`--lost-folder`), because a machine that still runs jobs looks the
same from here.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import structlog

from cortex.errors import StartupError, StorageUnavailable
from cortex.objects import ObjectStore
from cortex.operator.config.settings import Settings
from cortex.operator.dispatch.live_jobs import platform_end
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import CLAIMED, Event
from cortex.spec.times import new_id
from cortex.store import SAVED, Store, restore_instructions
from cortex.store.events import Retry
from cortex.worker import files as atomic_files
from cortex.worker import processes

log = structlog.get_logger()

_LOCK_TIMEOUT_S = 5.0  # a starting operator has the lock exclusively for less
_LOCK_RETRY_DELAY_S = 0.05


def make_folders(settings: Settings) -> None:
    """Create the missing folders, closed to other users: a project's `.env` has secrets.

    Raises:
        StartupError: a folder cannot be created.
    """
    account = settings.account
    for_jobs = (settings.projects, settings.environments, settings.jobs)
    try:
        for folder in (*for_jobs, settings.locks, settings.archived, settings.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
            is_shared = account is not None and folder in for_jobs
            with suppress(
                PermissionError
            ):  # another user owns it, and lets this operator write there
                if account is not None and is_shared:
                    os.chown(folder, -1, account.gid)
                folder.chmod(0o750 if is_shared else 0o700)
    except OSError as error:
        raise StartupError(
            f"the data folder {settings.data_dir} cannot be used: {error}. "
            "Choose another with --data-dir, or give this user the right to write there."
        ) from error


def check_is_intact(settings: Settings) -> None:
    """Check that no earlier data is missing: the operator would create it anew, empty.

    Raises:
        StartupError: the database was lost and a saved copy exists, or a restore was interrupted.
    """
    database = settings.database
    saved = sorted(database.parent.glob(f"{database.name}{SAVED}*"))
    if settings.store is None and saved:
        raise StartupError(
            f"the database {database} was removed, moved or replaced while an operator ran, which "
            f"saved a copy as {saved[-1]}: {restore_instructions(database)} To continue with the "
            "present database instead, move that copy elsewhere."
        )
    if settings.restore_folder.exists():
        raise StartupError(
            f"a restore into the data folder {settings.data_dir} was cut off; run `cortex "
            "restore` again"
        )


@contextmanager
def lock_exclusively(settings: Settings, clean_up: Callable[[], None]) -> Iterator[None]:
    """Lock the folder for this operator alone: two operators on one would both dispatch its jobs.

    Args:
        clean_up: removes leftovers of interrupted work.

    Raises:
        StartupError: another operator uses the folder.
    """
    with _lock_file(settings.lock) as file:
        if not _try_lock(file, fcntl.LOCK_EX):
            raise _in_use(settings, file)
        _write_pid(file)
        clean_up()
        yield


@contextmanager
def lock_shared(settings: Settings, clean_up: Callable[[], None]) -> Iterator[None]:
    """Lock the folder together with the other operators on the same PostgreSQL database.

    Args:
        clean_up: removes leftovers of interrupted work. Called only while no other operator uses
            the folder.

    Raises:
        StartupError: an operator that does not share the database uses the folder.
    """
    with _lock_file(settings.lock) as file:
        if _try_lock(file, fcntl.LOCK_EX):  # no other operator uses the folder
            clean_up()
            _write_pid(file)
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not _try_lock(file, fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise _in_use(settings, file)
            time.sleep(_LOCK_RETRY_DELAY_S)
        yield


def _lock_file(path: Path) -> IO[str]:
    try:
        return path.open("a+")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error}") from error


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_pid(file: IO[str]) -> None:
    with suppress(OSError):  # on a full disk, the lock works without the pid
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()


def _in_use(settings: Settings, file: IO[str]) -> StartupError:
    file.seek(0)
    owner = file.read().strip() or "unknown"
    return StartupError(
        f"the data folder {settings.data_dir} is in use by another operator (pid {owner}). Stop "
        "that operator, or choose another folder with --data-dir. Operators can share a folder "
        "if all of them share a --store on PostgreSQL."
    )


async def join_group(settings: Settings, store: Store, files: ObjectStore | None) -> str:
    """Join the operators on the database with this data folder.

    Args:
        files: the object store, if one is configured.

    Returns:
        The id of the data folder.

    Raises:
        StartupError: the database or the object store belongs to another data folder, operators
            there run jobs elsewhere, or the database cannot be used, or an object store that this
            data folder has not used before.
    """
    try:
        # Operators that start at the same time join one by one: the first creates the id.
        async with store.join_lock:
            return _join(settings, store, files)
    except StorageUnavailable as error:
        raise StartupError(error.message) from error


def _join(settings: Settings, store: Store, files: ObjectStore | None) -> str:
    path, lost = settings.folder_id_file, settings.lost_folder
    known_ids = store.operators.data_folder_ids()
    own = read_line(path)
    # Nothing is lost while such an object store is away: the operator starts without it.
    is_used = files is not None and lost not in known_ids and _has_used(settings, own, files)
    owner = None if files is None or is_used else files.owner()
    if own is None:
        can_take_over = settings.ray is not None and owner is not None and owner in known_ids
        own = owner if can_take_over and owner is not None else new_id()
        write_line(path, own)  # before the database has it
    if files is not None and owner not in {None, own, lost, *known_ids}:
        raise StartupError(
            f"the object store {files.url} belongs with another data folder, {owner}. Start the "
            "operator on that folder, or choose another prefix with --files. If that folder is "
            f"lost for good, use --lost-folder {owner}."
        )
    was_marked = settings.lost_folder_marker.exists()
    if lost is not None and lost != own and lost in known_ids:
        # Before the database changes: afterwards, only the marker says that jobs have to be given
        # up.
        write_line(settings.lost_folder_marker, lost)
    runs_on = processes.boot_id() if settings.ray is None else "ray"
    try:
        store.operators.join(own, runs_on, settings.advertise, instead_of=lost)
    except StartupError:
        if not was_marked:
            _remove_marker(settings, store)
        raise
    if files is not None and is_used:
        files.expect_owner(own, instead_of=lost)
    elif files is not None:
        files.set_owner(own)
        write_line(settings.object_store_file, f"{own} {files.url}")
    return own


def _has_used(settings: Settings, own: str | None, files: ObjectStore) -> bool:
    return own is not None and read_line(settings.object_store_file) == f"{own} {files.url}"


def _remove_marker(settings: Settings, store: Store) -> None:
    """Remove the lost-folder marker if the lost folder is still in the database.

    This folder did not replace it then, and no jobs may be given up: least of all those that this
    folder has from another database.
    """
    with suppress(StorageUnavailable):
        if settings.lost_folder in store.operators.data_folder_ids():
            settings.lost_folder_marker.unlink(missing_ok=True)


async def give_up_lost_jobs(settings: Settings, store: Store) -> None:
    """Give up attempts that run, or ran, where this operator cannot reach them.

    The jobs that ran with a lost data folder fail. The attempts that ran when this folder's backup
    was made are lost, and retried as far as their API allows. Waiting jobs run here.

    Raises:
        StorageUnavailable: the store cannot be used right now.
    """
    lost = read_line(settings.lost_folder_marker)
    if lost is not None:
        reason = f"the machine that it ran on was lost, with the data folder {lost}"
        await _give_up(store, reason, is_final=True)
        settings.lost_folder_marker.unlink(missing_ok=True)
    backup_time = read_line(settings.restore_time_file)
    if backup_time is not None:
        reason = (
            f"the operator's data was restored from a backup of {backup_time}, when the job ran; "
            "its outcome is unknown"
        )
        await _give_up(store, reason, is_final=False)
        settings.restore_time_file.unlink(missing_ok=True)


async def _give_up(store: Store, reason: str, *, is_final: bool) -> None:
    for record in await store.jobs_in_progress():
        if record.state not in CLAIMED:
            continue
        job_id, number = record.spec.job_id, record.losses + 1
        if not is_final and await _may_retry(store, record):
            retry = Retry(record.attempt, f"attempt {number} was lost: {reason}")
            if (await store.apply(job_id, retry, record.spec)).taken:
                log.warning("attempt lost", job=job_id, number=number, reason=reason)
                continue
        await store.apply(job_id, platform_end(Event.LOSE, record, reason), record.spec)
        log.warning("job lost", job=job_id, reason=reason)


async def _may_retry(store: Store, record: JobRecord) -> bool:
    version = await store.version(record.spec.api_id)
    return version is not None and record.losses < version.retries


def ray_namespace(settings: Settings, data_folder_id: str) -> str:
    """The namespace of the operator's agents and jobs in a Ray cluster.

    A data folder that replaces this one keeps the namespace.
    """
    name = read_line(settings.ray_namespace)
    if name is None:
        name = f"cortex-{data_folder_id}"
        write_line(settings.ray_namespace, name)
    return name


def read_line(path: Path) -> str | None:
    """Read a file of one line; None if there is no such file.

    Raises:
        StartupError: the file cannot be read.
    """
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {error}") from error


def write_line(path: Path, text: str) -> None:
    """Replace a file of one line atomically. It is on the disk when this returns.

    Raises:
        StartupError: the file cannot be written.
    """
    try:
        folder = atomic_files.open_folder(str(path.parent))
        try:
            atomic_files.replace_durably(folder, path.name, text.encode())
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error}") from error
