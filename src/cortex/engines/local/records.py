"""The records in a job's folder, as the local engine reads them: `start.<n>` and `exit.<n>`. The
job can write to its folder. Its records are checked before the engine believes them, and where they
cannot be believed, the processes of the machine show what runs (`leftovers`).

Blocking and short; called by the engine, in threads where a disk may be slow.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Attempt
from cortex.engines.local import leftovers
from cortex.system.account import Account
from cortex.worker import beneath, checks, files, processes
from cortex.worker.messages import ExitRecord, StartRecord

HANDLE_VERSION = 1
_MAX_LINES = 4096
"""The lines that are read of a journal, which is no longer than `reuse.MAX_JOURNAL`."""
_MAX_RECORDS = 64
"""The lines of a journal that may name one job: its own record, and results of other jobs."""


@dataclass(frozen=True)
class Fenced:
    """The attempt never ran, and never will."""


@dataclass(frozen=True)
class Alive:
    """The attempt's supervisor is alive. The caller closes the pidfd."""

    pidfd: int
    start: StartRecord


@dataclass(frozen=True)
class Exited:
    """The attempt's supervisor has exited."""

    exit: ExitRecord | None
    start: StartRecord | None
    rebooted: bool
    invalid: str | None = None
    """Why the exit record is invalid; None if it is valid."""
    copied: bool = False
    """Whether the attempt ran with another data folder, of which this one is a copy."""


AttemptState = Fenced | Alive | Exited


def make_handle(root: Path | None = None, gpus: Sequence[int] = ()) -> str:
    """The handle of an attempt, which the store keeps.

    Args:
        root: the folder of all jobs, if a copy of it must be recognized.
        gpus: the indices of the attempt's GPUs.
    """
    of_gpus = {"gpus": list(gpus)} if gpus else {}
    of_root = {} if root is None else {"folder": leftovers.folder_identity(root)}
    return json.dumps({"v": HANDLE_VERSION, "boot": processes.boot_id(), **of_gpus, **of_root})


def create_job_folder(folder: str, account: Account | None) -> None:
    """Create a job's folder. The supervisor lays it out.

    Raises:
        OSError: the folder cannot be created, as where the data folder was moved away.
    """
    with contextlib.suppress(FileExistsError):  # a later attempt's
        os.mkdir(folder, 0o700)  # noqa: PTH102  # for each job: creating a Path takes as long as mkdir(2)
    if account is not None:
        account.own(Path(folder))


def granted_gpus(folder: Path, attempt: Attempt) -> list[int]:
    """The indices of a recovered attempt's GPUs. Handles of earlier versions lack them: then the
    start record has them, if it can be read now. The job can write that record, and gets no more
    than it asked for."""
    granted = _of_handle(attempt.handle, "gpus")
    if isinstance(granted, list):
        return granted
    try:
        with _opened(folder, must_exist=True) as fd:
            assert fd is not None
            start = read_start(fd, folder.name, attempt.number)
    except OSError:
        return []
    recorded = [] if start is None else start.gpus
    return (
        recorded if len(set(recorded)) == len(recorded) == attempt.version.api.compute.gpu else []
    )


def inspect_attempt(folder: Path, attempt: Attempt, account: Account | None = None) -> AttemptState:
    """The state of an attempt. Fences off an attempt that has not started.

    Args:
        account: the user of the jobs and their supervisors, whatever a record says, if that is not
            the operator's own.

    Raises:
        OSError: the folder cannot be read now.
    """
    rebooted = _of_handle(attempt.handle, "boot") != processes.boot_id()
    ran_in = _of_handle(attempt.handle, "folder")
    with _opened(folder, must_exist=not rebooted) as fd:
        if fd is None:
            return Exited(None, None, rebooted=True)
        start = read_start(fd, folder.name, attempt.number)
        record, invalid = _exit(fd, folder.name, attempt.number)
        copied = ran_in is not None and ran_in != leftovers.folder_identity(folder.parent)
        # The exit record first: the supervisor may be alive with another job.
        if rebooted or copied or record is not None:
            forger = None if rebooted or copied else _forger(start, fd, folder.name, account)
            return forger or Exited(record, start, rebooted, invalid, copied)
        if start is None:
            fence = StartRecord(job_id=folder.name, attempt=attempt.number, fenced=True)
            with beneath.opened(str(folder.parent)) as above:
                files.create(fd, f"start.{attempt.number}", fence.dumps(), made_in=above)
            start = read_start(fd, folder.name, attempt.number)
        if start is None or start.fenced:
            if not (_is_laid_out(fd) and leftovers.has_begun(folder, attempt.number)):
                return Fenced()
            start = StartRecord()
        alive = _alive(start, fd, account) or _alive(leftovers.find_supervisor(fd), fd, account)
        if alive is not None:
            return alive
        record, invalid = _exit(fd, folder.name, attempt.number)
        return Exited(record, start, rebooted=False, invalid=invalid)


def read_exit(folder: Path, attempt: int) -> Exited:
    """The records of a supervisor that has just exited. Without an exit record, `inspect_attempt`
    determines the state.

    Raises:
        OSError: the folder cannot be read now.
    """
    # Both are read through one open folder: it may be moved away, or back, in between.
    with _opened(folder, must_exist=True) as fd:
        assert fd is not None
        record, invalid = _exit(fd, folder.name, attempt)
        start = None if record is None else read_start(fd, folder.name, attempt)
        return Exited(record, start, rebooted=False, invalid=invalid)


def is_supervised(folder: Path, attempt: int) -> bool:
    """Whether a supervisor of this attempt is alive, or may still start."""
    try:
        with _opened(folder, must_exist=True) as fd:
            assert fd is not None
            start = read_start(fd, folder.name, attempt)
            has_exit = _exit(fd, folder.name, attempt)[0] is not None
            forger = _forger(start, fd, folder.name, None) if has_exit else None
    except OSError:
        return False
    if forger is not None:
        os.close(forger.pidfd)
        return True
    if start is None or has_exit:
        return not has_exit
    try:
        pidfd = None if start.fenced else processes.open_pidfd(start.pid, start.ticks)
    except OSError:
        return True
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


@contextlib.contextmanager
def _opened(folder: Path, *, must_exist: bool):  # type: ignore[no-untyped-def]  # the decorator's type is the return's
    try:
        fd = files.open_folder(str(folder))
    except FileNotFoundError:
        if must_exist or not folder.parent.is_dir():
            raise
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _of_handle(handle: str, name: str) -> object:
    try:
        return json.loads(handle)[name]
    except (ValueError, KeyError, TypeError):
        return None


def _alive(
    start: StartRecord | None, folder: int, account: Account | None, *, if_unknown: bool = True
) -> Alive | None:
    """The supervisor that a record names, if it has this folder open. The job may have written that
    record.

    Args:
        if_unknown: the answer where this user may not read what that process has open.
    """
    pidfd = None if start is None else processes.open_pidfd(start.pid, start.ticks)
    if start is None or pidfd is None:
        return None
    is_its = False
    try:
        is_users = account is None or processes.owner(start.pid) == account.uid
        is_its = is_users and leftovers.has_open(start.pid, folder, if_unknown=if_unknown)
    finally:
        if not is_its:
            os.close(pidfd)
    return Alive(pidfd, start) if is_its else None


def _forger(
    start: StartRecord | None, folder: int, job_id: str, account: Account | None
) -> Alive | None:
    """The supervisor of a job that still runs although an exit record exists: a forged record."""
    alive = _alive(start, folder, account, if_unknown=False)
    if alive is None:
        return None
    runs = False
    try:
        runs = leftovers.runs_below(alive.start.pid, job_id)
    finally:
        if not runs:
            os.close(alive.pidfd)
    return alive if runs else None


def _is_laid_out(folder: int) -> bool:
    """Whether a supervisor has laid out the folder. If not, the attempt is not worth a search
    through all processes and groups: there may be very many such attempts."""
    return any(not name.startswith("start.") for name in os.listdir(folder))


def read_start(folder: int, job_id: str, attempt: int) -> StartRecord | None:
    """The start record of an attempt; None where none exists, an empty record where it cannot be
    read. A record is complete before it gets its name. An incomplete record was spoilt by the job
    or a loss of power. A record that names another job is that of a later job, and then this
    attempt has an exit record."""
    name = f"start.{attempt}"
    data = _read(folder, name)
    if data is None:
        return None
    try:
        record = StartRecord.loads(data)
    except checks.Invalid:
        return StartRecord()
    return record if _is_of(record, job_id, attempt, folder, name) else StartRecord()


def _exit(folder: int, job_id: str, attempt: int) -> tuple[ExitRecord | None, str | None]:
    """The exit record of an attempt, or what is wrong with the file. Each record of a journal is a
    line; a record with a file of its own has no newline. The first record of the attempt counts:
    the lines after it are of later jobs, which may spoil them."""
    name = f"exit.{attempt}"
    *lines, last = (_read(folder, name) or b"").split(b"\n", _MAX_LINES)
    own = job_id.encode()
    invalid = None
    for data in [*[line for line in lines if own in line][:_MAX_RECORDS], last]:
        try:
            record = _exit_of(data) if data else None
        except checks.Invalid as error:
            invalid = invalid or str(error)
            continue
        if record is not None and _is_of(record, job_id, attempt, folder, name):
            return record, None
    return None, invalid


def _exit_of(data: bytes) -> ExitRecord:
    if len(data) > checks.MAX_EXIT_RECORD:
        raise checks.Invalid(
            f"it takes {len(data)} bytes; at most {checks.MAX_EXIT_RECORD} are allowed"
        )
    return ExitRecord.loads(data)


def _is_of(
    record: StartRecord | ExitRecord, job_id: str, attempt: int, folder: int, name: str
) -> bool:
    """Whether a record belongs to the attempt in whose folder it has this name. Records of earlier
    versions name no job and have files of their own. In a file that several jobs share, any of them
    may have written the record."""
    if record.job_id != "":
        return (record.job_id, record.attempt) == (job_id, attempt)
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_nlink == 1
    except FileNotFoundError:
        return False


def _read(folder: int, name: str) -> bytes | None:
    """The content of a record; empty where the file cannot be a record or its owner may not read
    it; None where no file exists."""
    try:
        data = files.read(folder, name)
    except PermissionError:
        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode & 0o400:
            raise
        return b""
    if data is None and _exists(folder, name):
        return b""
    return data


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
