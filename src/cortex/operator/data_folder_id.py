"""Where an operator is at home: a data folder with an id, which its database and its store of files
belong with. Called by the app when it opens, and by whoever begins to drive.

A data folder can be lost. Where jobs run in a cluster and all else is in the store of files, nothing
was lost with it: a new folder takes its id over. So may several operators, each with a folder of its own.
Where jobs ran on the lost machine, somebody has to say that it is gone (`lost_folder`), for a machine
that still runs jobs looks the same from here.
"""

from __future__ import annotations

from contextlib import suppress

import structlog

from cortex.errors import StartupError, StorageUnavailable
from cortex.objects import ObjectStore
from cortex.operator.config.settings import Settings
from cortex.operator.data_folder import read, write
from cortex.operator.dispatch.live_jobs import platform_ending
from cortex.spec.job import JobRecord
from cortex.spec.lifecycle import CLAIMED, Event
from cortex.spec.times import new_id
from cortex.store import Facts, Store
from cortex.worker import processes

log = structlog.get_logger()


async def settle(settings: Settings, store: Store, files: ObjectStore | None) -> str:
    """Join the operators of the database with this data folder; its id.

    Raises:
        StartupError: database or files belong with another data folder, operators are there that run
            jobs elsewhere, or one of them cannot be used.
    """
    try:
        # Whoever comes at the same time finds what the first one has made.
        async with store.join_lock:
            return _settle(settings, store, files)
    except StorageUnavailable as error:
        raise StartupError(error.message) from error


async def give_up_lost(settings: Settings, store: Store) -> None:
    """End the jobs that ran with a lost data folder, whose place this one took, and lose the attempts that ran when
    the backup was made that this one was restored from. What waits runs here.

    Raises:
        StorageUnavailable: not now.
    """
    lost = read(settings.taken_over)
    if lost is not None:
        reason = f"the machine that it ran on was lost, with the data folder {lost}"
        await _give_up(store, reason, is_final=True)
        settings.taken_over.unlink(missing_ok=True)
    made = read(settings.restored)
    if made is not None:
        reason = f"the operator's data was restored from a backup of {made}, when it ran: what became of it is not known"
        await _give_up(store, reason, is_final=False)
        settings.restored.unlink(missing_ok=True)


async def _give_up(store: Store, reason: str, *, is_final: bool) -> None:
    for record in await store.jobs_in_progress():
        if record.state not in CLAIMED:
            continue
        job_id, number = record.spec.job_id, record.losses + 1
        if not is_final and await _may_try_again(store, record):
            facts: Facts = {
                "of_attempt": record.attempt,
                "message": f"attempt {number} was lost: {reason}",
            }
            if (await store.apply(job_id, Event.RETRY, facts, record.spec)).taken:
                log.warning("attempt lost", job=job_id, number=number, reason=reason)
                continue
        facts = {"of_attempt": record.attempt, **platform_ending(reason)}
        await store.apply(job_id, Event.LOSE, facts, record.spec)
        log.warning("job lost", job=job_id, reason=reason)


async def _may_try_again(store: Store, record: JobRecord) -> bool:
    version = await store.version(record.spec.api_id)
    return version is not None and record.losses < version.retries


def _settle(settings: Settings, store: Store, files: ObjectStore | None) -> str:
    path, lost = settings.identity, settings.lost_folder
    owner = None if files is None else files.owner()
    places = store.operators.data_folder_ids()
    own = read(path)
    if own is None:
        is_all_elsewhere = settings.ray is not None and owner is not None and owner in places
        own = owner if is_all_elsewhere and owner is not None else new_id()
        write(path, own)  # before a database is told it
    if files is not None and owner not in {None, own, lost, *places}:
        raise StartupError(
            f"the store of files {files.url} belongs with another data folder, {owner}: start the "
            "operator on that one, or name another prefix with --files. If it is lost for good, say "
            f"--lost-folder {owner}."
        )
    is_marked = settings.taken_over.exists()
    if lost is not None and lost != own and lost in places:
        # Before the database is told: from then on nothing else says that its jobs are to be given up.
        write(settings.taken_over, lost)
    runs_on = processes.boot_id() if settings.ray is None else "ray"
    try:
        store.operators.join(own, runs_on, settings.advertise, instead_of=lost)
    except StartupError:
        if not is_marked:
            _unmark(settings, store)
        raise
    if files is not None:
        files.set_owner(own)
    return own


def _unmark(settings: Settings, store: Store) -> None:
    """It did not take a lost folder's place, as far as that can be told: no jobs are to be given up, least of
    all those that this folder has of another database."""
    with suppress(StorageUnavailable):
        if settings.lost_folder in store.operators.data_folder_ids():
            settings.taken_over.unlink(missing_ok=True)
