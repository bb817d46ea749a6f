"""A backup taken back into a data folder. Called by `cortex restore`, while no operator is there.

An archive may come from anyone: only names that a backup has are taken, no links, and projects go the way of an upload.
All of it is unpacked and checked in `.restoring` before anything gets its place; the database gets its own last. An
operator does not start where that was cut off.

The folder is a new one: it gets an id of its own, and what ran when the backup was made is lost here (`place`), where the
machine of the backup may still run it.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cortex.engines.local import leftovers
from cortex.errors import CortexError, StartupError
from cortex.joblog.folders import JobFolders
from cortex.operator.backup.backup import DATABASES, END, MANIFEST, Manifest, Summary
from cortex.operator.config.settings import DATABASE, Settings
from cortex.operator.data_folder import held, write
from cortex.projects.unpack import BoundedReader, project_id, unpack
from cortex.store import snapshot
from cortex.worker import checks, processes
from cortex.worker.messages import JOBS_FOLDER, LogCut
from cortex.worker.supervisor import logfile

_MANIFEST_BYTES = 1 << 24
_LOCK_BYTES = 1 << 22
_CUT_BYTES = 1 << 12
_CHUNK = 1 << 20
_GOES_S = 5.0  # what an operator that has just been stopped lets end
_ID = r"[0-9A-Za-z_-]{1,64}"
_PROJECT = re.compile(rf"projects/({_ID})\.tar\.gz")
_LOCK = re.compile(rf"locks/({_ID})/([\w-][\w.-]{{0,250}}\.lock)", re.ASCII)
_LOG = re.compile(rf"jobs/({_ID})/({logfile.NAME}|{re.escape(logfile.CUT)})")


def restore(settings: Settings, file: Path, *, replace: bool) -> Summary:
    """Make a data folder, and the database that belongs with it, what they were when a backup was made.

    Args:
        replace: whether what is there is to be put aside (a folder) or replaced (a PostgreSQL database).

    Raises:
        StartupError: it is no whole backup that this version knows, an operator is there or has its data there; it
            says which. Nothing has changed then.
        OSError: the backup cannot be read.
    """
    with file.open("rb") as archive, _folder(settings.data_dir), held(settings, lambda: None):
        _check_place(settings, replace=replace)
        if settings.account is not None:
            os.umask(0o022)  # jobs of another user read what is unpacked here
        shutil.rmtree(settings.restoring, ignore_errors=True)
        settings.restoring.mkdir(0o700)
        unpacked = _Unpacked(settings)
        try:
            unpacked.read(archive)
            if settings.store is not None:
                snapshot.put_back(settings.store, unpacked.database)
        except BaseException as error:
            shutil.rmtree(settings.restoring)
            if isinstance(error, CortexError | OSError | tarfile.TarError | EOFError | zlib.error):
                raise StartupError(f"{file} cannot be restored: {error}") from error
            raise
        unpacked.place()
        shutil.rmtree(settings.restoring)
        return unpacked.summary


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """The data folder; one that was made for a restore that came to nothing is removed."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                (folder / "operator.lock").unlink(missing_ok=True)
                folder.rmdir()
        raise


def _check_place(settings: Settings, *, replace: bool) -> None:
    if settings.store is not None:
        snapshot.check_is_unused(settings.store)
    if (
        not settings.restoring.exists() and not replace
    ):  # what is left of one that was cut off is put aside
        found = [path for path in _places(settings) if _is_something(path)]
        if found:
            raise StartupError(
                f"the data folder {settings.data_dir} has an operator's data ({found[0].name}): name a new one with "
                "--data-dir, or say --force to put what it has aside"
            )
        if settings.store is not None:
            snapshot.check_is_free(settings.store)
    _check_nothing_runs(settings)


def _check_nothing_runs(settings: Settings) -> None:
    if not settings.jobs.is_dir():
        return
    mark, until = leftovers.folder_identity(settings.jobs), time.monotonic() + _GOES_S
    while running := processes.with_variable(JOBS_FOLDER, mark):
        if time.monotonic() > until:
            raise StartupError(
                f"jobs of the data folder {settings.data_dir} still run, as process {min(running)}: start the operator "
                "and stop them first, or restore into another folder"
            )
        time.sleep(0.1)


def _places(settings: Settings) -> list[Path]:
    """What a data folder has that belongs with its database."""
    database = settings.database
    return [
        *(database.with_name(f"{database.name}{end}") for end in ("", "-wal", "-shm")),
        settings.projects,
        settings.locks,
        settings.jobs,
        settings.archived,
        settings.identity,
        settings.taken_over,
        settings.restored,
        settings.ray_namespace,
    ]


def _is_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() and not path.is_symlink() else os.path.lexists(path)


class _Unpacked:
    """What is read of a backup, in the folder `.restoring`."""

    def __init__(self, settings: Settings) -> None:
        self.summary = Summary()
        self._settings = settings
        self._root = settings.restoring
        self._folders = JobFolders(self._root / settings.jobs.name)
        self._manifest: Manifest | None = None
        self._cuts: dict[str, LogCut] = {}

    @property
    def database(self) -> Path:
        """The file that has it."""
        assert self._manifest is not None
        return self._root / DATABASES[self._manifest.store]

    def read(self, archive: IO[bytes]) -> None:
        """Unpack and check all of it.

        Raises:
            StartupError, InvalidProject, OSError, TarError, EOFError, zlib.error: it is no whole backup.
        """
        for name in ("projects", "locks", "jobs"):
            (self._root / name).mkdir()
        is_whole = False
        source = BoundedReader(archive, None)
        source.expect(0)
        with tarfile.open(fileobj=source, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
            while (member := tar.next()) is not None:
                if shutil.disk_usage(self._root).free < member.size:
                    raise StartupError(f"there is no room for {member.name!r}: {member.size} bytes")
                source.expect(member.size)
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or member.issparse() or is_whole:
                    raise StartupError(f"{member.name!r} is nothing that a backup has")
                with content:
                    is_whole = self._take(member.name, member.size, content)
                source.expect(0)
        source.finish()
        if not is_whole:
            raise StartupError("it is not whole: its end is missing")
        self._check_database()

    def place(self) -> None:
        """Let all of it have its place, on the disk."""
        settings = self._settings
        assert self._manifest is not None
        os.sync()
        self._put_aside()
        for folder in (settings.projects, settings.locks, settings.jobs):
            with suppress(FileNotFoundError):
                folder.rmdir()
            (self._root / folder.name).rename(folder)
        write(settings.restored, self._manifest.created)
        if settings.store is None:
            (self._root / DATABASE).rename(settings.database)
        os.sync()

    def _put_aside(self) -> None:
        there = [path for path in _places(self._settings) if _is_something(path)]
        if there:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            aside = self._settings.data_dir / f"replaced-{stamp}-{os.getpid()}"
            aside.mkdir(0o700)
            for path in there:
                path.rename(aside / path.name)
            self.summary.aside = str(aside)

    def _take(self, name: str, size: int, content: IO[bytes]) -> bool:
        """Take one member; whether it is the last."""
        if self._manifest is None:
            if name != MANIFEST or size > _MANIFEST_BYTES:
                raise StartupError("it is no backup of an operator")
            self._manifest = Manifest.loads(content.read())
            self._check_kind(self._manifest)
        elif name == DATABASES[self._manifest.store]:
            self._write(self._root / name, content, 0o600)
        elif found := _PROJECT.fullmatch(name):
            self._take_project(found[1], content)
        elif (found := _LOCK.fullmatch(name)) and size <= _LOCK_BYTES:
            folder = self._root / "locks" / found[1]
            folder.mkdir(exist_ok=True)
            self._write(folder / found[2], content)
        elif found := _LOG.fullmatch(name):
            self._take_log(found[1], found[2], size, content)
        elif name == END:
            return True
        else:
            raise StartupError(f"{name!r} is nothing that a backup has")
        return False

    def _check_kind(self, manifest: Manifest) -> None:
        kind = "sqlite" if self._settings.store is None else "postgresql"
        if manifest.store != kind:
            said = {
                "sqlite": "a file in the data folder: leave --store out",
                "postgresql": "PostgreSQL: say --store",
            }
            raise StartupError(f"its database is {said[manifest.store]}")

    def _take_project(self, identity: str, content: IO[bytes]) -> None:
        assert self._manifest is not None
        folder = self._root / "projects" / identity
        if folder.exists():
            raise StartupError(f"the project {identity} is there twice")
        unpack(content, folder)
        if project_id(folder) != identity:
            if identity not in self._manifest.changed:
                raise StartupError(f"the project {identity} is damaged")
            self.summary.changed.append(identity)
        self.summary.projects += 1

    def _take_log(self, job_id: str, name: str, size: int, content: IO[bytes]) -> None:
        if name == logfile.CUT:
            if size > _CUT_BYTES:
                raise StartupError(f"what is gone of the log of the job {job_id} is too long")
            self._cuts[job_id] = _cut(job_id, content.read())
            return
        folder, gap = self._folders.folder(job_id), self._cuts.pop(job_id, None)
        try:
            folder.mkdir(0o700)
        except FileExistsError as error:
            raise StartupError(f"the log of the job {job_id} is there twice") from error
        if gap is not None:
            if size < gap.start:
                raise StartupError(
                    f"the log of the job {job_id} is shorter than what is gone of it begins"
                )
            self._folders.cut(job_id).write_bytes(gap.dumps())
        self._write(self._folders.log(job_id), content, gap=gap)
        self.summary.logs += 1
        if self._settings.account is not None:
            for path in (*folder.iterdir(), folder):
                self._settings.account.own(path)

    def _write(
        self, path: Path, content: IO[bytes], mode: int = 0o644, gap: LogCut | None = None
    ) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags, mode)
        except FileExistsError as error:
            raise StartupError(f"{path.name!r} is there twice") from error
        with os.fdopen(fd, "wb") as target:
            if gap is not None:
                target.write(content.read(gap.start))
                target.seek(gap.end)
            shutil.copyfileobj(content, target, _CHUNK)
            target.truncate()

    def _check_database(self) -> None:
        if not self.database.exists():
            raise StartupError("it has no database")
        if self._settings.store is None:
            jobs = snapshot.read(self.database).logs
            self.summary.jobs = len(jobs)
            for job_id in self._folders.job_ids():
                if job_id not in jobs:
                    raise StartupError(f"it has a log of a job that its database has not, {job_id}")


def _cut(job_id: str, data: bytes) -> LogCut:
    try:
        return LogCut.loads(data)
    except checks.Invalid as error:
        words = f"what is gone of the log of the job {job_id} cannot be read"
        raise StartupError(words) from error
