"""A job's folder as the local engine sees it: `<root>/<job_id>/` with log, start.N and exit.N, and while the job
runs job.json and files/ (`worker.reuse`). The job can write there: what its records say is looked at before it is believed, and where
that cannot be, processes are asked for what runs (`remains`).
Blocking and short; called by the engine, in threads where a disk is waited for.
"""

from __future__ import annotations

import contextlib
import errno
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
from cortex.worker.supervisor import logfile

HANDLE_VERSION = 1
_MOST_LINES = 4096
"""That a journal may have; it is no longer than `reuse.MAX_JOURNAL`."""
_MOST_RECORDS = 64
"""That a journal may have which seem to be of one job: the first is its own, and others may name it in their results."""
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True)
class Fenced:
    """The attempt never ran, and never will."""


@dataclass(frozen=True)
class Alive:
    """Its supervisor is there; the pidfd is the caller's to close."""

    pidfd: int
    start: StartRecord


@dataclass(frozen=True)
class Gone:
    """Its supervisor is not there."""

    exit: ExitRecord | None
    start: StartRecord | None
    rebooted: bool
    why: str | None = None
    """What is wrong with the record of its end, where there is one that is none."""
    copied: bool = False
    """Whether it ran with another data folder, of which this one is a copy."""


AttemptState = Fenced | Alive | Gone


def handle(root: Path | None = None, gpus: Sequence[int] = ()) -> str:
    """What the store keeps of an attempt.

    Args:
        root: the folder of all jobs, where a copy of it is to be told from it.
        gpus: those that it has.
    """
    held = {"gpus": list(gpus)} if gpus else {}
    of_root = {} if root is None else {"folder": leftovers.identity(root)}
    return json.dumps({"v": HANDLE_VERSION, "boot": processes.boot_id(), **held, **of_root})


def make(folder: str, account: Account | None) -> None:
    """Make a job's folder, whose supervising process lays it out.

    Raises:
        OSError: it cannot be made, as where the data folder was moved away.
    """
    with contextlib.suppress(FileExistsError):  # a later attempt's
        os.mkdir(folder, 0o700)  # noqa: PTH102  # for each job: to make a Path takes as long again
    if account is not None:
        account.own(Path(folder))


def held_gpus(folder: Path, attempt: Attempt) -> list[int]:
    """The GPUs that a recovered attempt holds. Where an earlier version has claimed it its start record tells, as far
    as that can be read now; and that is the job's to write, which has no more than it has asked for."""
    held = _of_handle(attempt.handle, "gpus")
    if isinstance(held, list):
        return held
    try:
        with _opened(folder, must_exist=True) as fd:
            assert fd is not None
            start = _start(fd, folder.name, attempt.number)
    except OSError:
        return []
    told = [] if start is None else start.gpus
    return told if len(set(told)) == len(told) == attempt.version.api.compute.gpu else []


def look(folder: Path, attempt: Attempt, account: Account | None = None) -> AttemptState:
    """What has become of an attempt. Fences one that has not started.

    Args:
        account: whose jobs are, if they are not the operator's own: so are their supervisors, whatever a
            record says.

    Raises:
        OSError: the folder cannot be asked now.
    """
    rebooted = _of_handle(attempt.handle, "boot") != processes.boot_id()
    ran_in = _of_handle(attempt.handle, "folder")
    with _opened(folder, must_exist=not rebooted) as fd:
        if fd is None:
            return Gone(None, None, rebooted=True)
        start = _start(fd, folder.name, attempt.number)
        over, why = _exit(fd, folder.name, attempt.number)
        copied = ran_in is not None and ran_in != leftovers.identity(folder.parent)
        # The end is asked for first: its supervisor may be there still, with another job.
        if rebooted or copied or over is not None:
            forger = None if rebooted or copied else _forger(start, fd, folder.name, account)
            return forger or Gone(over, start, rebooted, why, copied)
        if start is None:
            fence = StartRecord(job_id=folder.name, attempt=attempt.number, fenced=True)
            with beneath.opened(str(folder.parent)) as above:
                files.create(fd, f"start.{attempt.number}", fence.dumps(), made_in=above)
            start = _start(fd, folder.name, attempt.number)
        if start is None or start.fenced:
            if not (_is_laid_out(fd) and leftovers.has_begun(folder, attempt.number)):
                return Fenced()
            start = StartRecord()
        alive = _alive(start, fd, account) or _alive(leftovers.supervisor(fd), fd, account)
        if alive is not None:
            return alive
        over, why = _exit(fd, folder.name, attempt.number)
        return Gone(over, start, rebooted=False, why=why)


def ended(folder: Path, attempt: int) -> Gone:
    """What a supervisor that has just ended has left: where that is no end, `look` has to tell.

    Raises:
        OSError: the folder cannot be asked now.
    """
    # Both are read through one open folder: it may be moved away, or back, in between.
    with _opened(folder, must_exist=True) as fd:
        assert fd is not None
        over, why = _exit(fd, folder.name, attempt)
        start = None if over is None else _start(fd, folder.name, attempt)
        return Gone(over, start, rebooted=False, why=why)


def supervised(folder: Path, attempt: int) -> bool:
    """Whether a supervisor of this attempt is alive, or may yet come."""
    try:
        with _opened(folder, must_exist=True) as fd:
            assert fd is not None
            start = _start(fd, folder.name, attempt)
            over = _exit(fd, folder.name, attempt)[0] is not None
            forger = _forger(start, fd, folder.name, None) if over else None
    except OSError:
        return False
    if forger is not None:
        os.close(forger.pidfd)
        return True
    if start is None or over:
        return not over
    try:
        pidfd = None if start.fenced else processes.open_pidfd(start.pid, start.ticks)
    except OSError:
        return True
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is not None


def append(log: Path, text: str) -> None:
    """Add a line to a job's log, as the operator: what an earlier attempt has put in its place is not followed.

    Raises:
        OSError: it is none, or nothing can be written now.
    """
    log.parent.mkdir(exist_ok=True)
    with beneath.opened(str(log.parent)) as folder:
        fd = os.open(log.name, _APPEND, 0o644, dir_fd=folder)
        with os.fdopen(fd, "a", encoding="utf-8") as file:
            if not logfile.is_own(folder, fd):
                raise OSError(errno.EINVAL, "not a plain file of the job's alone", str(log))
            file.write(text.rstrip("\n") + "\n")


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
    """The supervisor that a record tells of, if it is that of this folder, whoever wrote the record.

    Args:
        if_unknown: the answer where the system does not let this user know what that process has open.
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
    """The supervisor of a job that runs, although there is a record of its end: the job has made that itself."""
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
    """Whether anybody has ever taken up the order of an attempt: of very many that nobody has, none is worth a
    search through all processes and groups."""
    return any(not name.startswith("start.") for name in os.listdir(folder))


def _start(folder: int, job_id: str, attempt: int) -> StartRecord | None:
    """Who began an attempt: None where there is no record, an empty one where that cannot be told. A record got
    its name with all of its content. What is not whole was spoilt by the job or a loss of power; what names
    another job is the record of a later one, and then this one has an exit record."""
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
    """How an attempt ended; where there is a record of that which is none, what is wrong with it. Each record of a
    journal is a line; a record with a file of its own has no newline. The first record of the attempt counts: what
    follows is of a later job, and may be spoilt by it."""
    name = f"exit.{attempt}"
    *lines, last = (_read(folder, name) or b"").split(b"\n", _MOST_LINES)
    own = job_id.encode()
    why = None
    for data in [*[line for line in lines if own in line][:_MOST_RECORDS], last]:
        try:
            record = _exit_of(data) if data else None
        except checks.Invalid as error:
            why = why or str(error)
            continue
        if record is not None and _is_of(record, job_id, attempt, folder, name):
            return record, None
    return None, why


def _exit_of(data: bytes) -> ExitRecord:
    if len(data) > checks.MAX_EXIT_RECORD:
        raise checks.Invalid(
            f"it takes {len(data)} bytes; at most {checks.MAX_EXIT_RECORD} are allowed"
        )
    return ExitRecord.loads(data)


def _is_of(
    record: StartRecord | ExitRecord, job_id: str, attempt: int, folder: int, name: str
) -> bool:
    """Whether a record is that of an attempt, in whose folder it has this name. A record of old names no job and
    has a file of its own; in a file of several jobs each of these may have written it."""
    if record.job_id != "":
        return (record.job_id, record.attempt) == (job_id, attempt)
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_nlink == 1
    except FileNotFoundError:
        return False


def _read(folder: int, name: str) -> bytes | None:
    """The content of a record; nothing of what can be none, or that its owner may not read; None where
    there is not even that."""
    try:
        data = files.read(folder, name)
    except PermissionError:
        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode & 0o400:
            raise
        return b""
    if data is None and _is_there(folder, name):
        return b""
    return data


def _is_there(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
