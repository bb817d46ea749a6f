"""Restores a backup into a data folder. `cortex restore` calls it, while no operator runs there.

An archive may come from anyone. Only the names of a backup are accepted, and no links; projects are
unpacked like uploads. All of it is unpacked and checked in `.restoring` before anything is
installed; the database comes last. An operator does not start if a restore was interrupted.

The restored folder is a new one, with an id of its own. Attempts that ran when the backup was made
are lost here (see `data_folder.give_up_lost_jobs`); the backup's original operator may still run
them.
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
from cortex.operator.data_folder import lock_exclusively, write_line
from cortex.projects.unpack import BoundedReader, project_id, unpack
from cortex.store import snapshot
from cortex.worker import checks, processes
from cortex.worker.messages import JOBS_FOLDER, LogCut
from cortex.worker.supervisor import logfile

_MAX_MANIFEST_BYTES = 1 << 24
_MAX_LOCKFILE_BYTES = 1 << 22
_MAX_CUT_BYTES = 1 << 12
_CHUNK_BYTES = 1 << 20
_JOBS_END_TIMEOUT_S = 5.0  # processes of a stopped operator may still be ending
_JOBS_END_POLL_INTERVAL_S = 0.1
_ID = r"[0-9A-Za-z_-]{1,64}"
_PROJECT = re.compile(rf"projects/({_ID})\.tar\.gz")
_LOCKFILE = re.compile(rf"locks/({_ID})/([\w-][\w.-]{{0,250}}\.lock)", re.ASCII)
_LOG = re.compile(rf"jobs/({_ID})/({logfile.NAME}|{re.escape(logfile.CUT)})")


def restore(settings: Settings, file: Path, *, replace: bool) -> Summary:
    """Restore a data folder and its database to their state in a backup.

    Args:
        replace: whether to move existing data of the folder aside, and to replace a PostgreSQL
            database.

    Raises:
        StartupError: the backup is incomplete or not readable by this version, an operator runs
            there, or there is existing data; the message says which. Nothing was changed.
        OSError: the backup cannot be read.
    """
    with (
        file.open("rb") as archive,
        _data_folder(settings.data_dir),
        lock_exclusively(settings, lambda: None),
    ):
        _check_destination(settings, replace=replace)
        if settings.account is not None:
            os.umask(0o022)  # the user of the jobs reads the unpacked files
        shutil.rmtree(settings.restore_folder, ignore_errors=True)
        settings.restore_folder.mkdir(0o700)
        unpacked = _UnpackedBackup(settings)
        try:
            unpacked.read(archive)
            if settings.store is not None:
                snapshot.restore(settings.store, unpacked.database)
        except BaseException as error:
            shutil.rmtree(settings.restore_folder)
            if isinstance(error, CortexError | OSError | tarfile.TarError | EOFError | zlib.error):
                raise StartupError(f"{file} cannot be restored: {error}") from error
            raise
        unpacked.install()
        shutil.rmtree(settings.restore_folder)
        return unpacked.summary


@contextmanager
def _data_folder(folder: Path) -> Iterator[None]:
    """Create the data folder if it is missing, and remove it again if the restore fails."""
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


def _check_destination(settings: Settings, *, replace: bool) -> None:
    if settings.store is not None:
        snapshot.check_is_unused(settings.store)
    # The leftovers of an interrupted restore are moved aside without `replace`.
    if not settings.restore_folder.exists() and not replace:
        existing = [path for path in _data_paths(settings) if _has_content(path)]
        if existing:
            raise StartupError(
                f"the data folder {settings.data_dir} has an operator's data "
                f"({existing[0].name}); choose a new folder with --data-dir, or use --force to "
                "move the existing data aside"
            )
        if settings.store is not None:
            snapshot.check_is_free(settings.store)
    _check_nothing_runs(settings)


def _check_nothing_runs(settings: Settings) -> None:
    if not settings.jobs.is_dir():
        return
    identity, deadline = (
        leftovers.folder_identity(settings.jobs),
        time.monotonic() + _JOBS_END_TIMEOUT_S,
    )
    while running := processes.with_variable(JOBS_FOLDER, identity):
        if time.monotonic() > deadline:
            raise StartupError(
                f"jobs of the data folder {settings.data_dir} still run (process {min(running)}); "
                "start the operator and stop them first, or restore into another folder"
            )
        time.sleep(_JOBS_END_POLL_INTERVAL_S)


def _data_paths(settings: Settings) -> list[Path]:
    """The paths of a data folder that belong to its database, and the database."""
    database = settings.database
    return [
        *(database.with_name(f"{database.name}{end}") for end in ("", "-wal", "-shm")),
        settings.projects,
        settings.locks,
        settings.jobs,
        settings.archived,
        settings.folder_id_file,
        settings.lost_folder_marker,
        settings.restore_time_file,
        settings.ray_namespace,
    ]


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() and not path.is_symlink() else os.path.lexists(path)


class _UnpackedBackup:
    """A backup, unpacked into the folder `.restoring`."""

    def __init__(self, settings: Settings) -> None:
        self.summary = Summary()
        self._settings = settings
        self._root = settings.restore_folder
        self._folders = JobFolders(self._root / settings.jobs.name)
        self._manifest: Manifest | None = None
        self._cuts: dict[str, LogCut] = {}

    @property
    def database(self) -> Path:
        """The unpacked database file."""
        assert self._manifest is not None
        return self._root / DATABASES[self._manifest.store]

    def read(self, archive: IO[bytes]) -> None:
        """Unpack and check the whole archive.

        Raises:
            StartupError, InvalidProject, OSError, TarError, EOFError, zlib.error: the archive is
                not a complete backup.
        """
        for name in ("projects", "locks", "jobs"):
            (self._root / name).mkdir()
        is_complete = False
        source = BoundedReader(archive, None)
        source.expect(0)
        with tarfile.open(fileobj=source, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
            while (member := tar.next()) is not None:
                if shutil.disk_usage(self._root).free < member.size:
                    raise StartupError(
                        f"the disk has no room for {member.name!r}: {member.size} bytes"
                    )
                source.expect(member.size)
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or member.issparse() or is_complete:
                    raise StartupError(f"{member.name!r} does not belong in a backup")
                with content:
                    is_complete = self._unpack(member.name, member.size, content)
                source.expect(0)
        source.finish()
        if not is_complete:
            raise StartupError("it is not complete: its end is missing")
        self._check_database()

    def install(self) -> None:
        """Move everything to its final path, on the disk."""
        settings = self._settings
        assert self._manifest is not None
        os.sync()
        self._move_existing_aside()
        for folder in (settings.projects, settings.locks, settings.jobs):
            with suppress(FileNotFoundError):
                folder.rmdir()
            (self._root / folder.name).rename(folder)
        write_line(settings.restore_time_file, self._manifest.created)
        if settings.store is None:
            (self._root / DATABASE).rename(settings.database)
        os.sync()

    def _move_existing_aside(self) -> None:
        existing = [path for path in _data_paths(self._settings) if _has_content(path)]
        if existing:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            aside = self._settings.data_dir / f"replaced-{stamp}-{os.getpid()}"
            aside.mkdir(0o700)
            for path in existing:
                path.rename(aside / path.name)
            self.summary.aside = str(aside)

    def _unpack(self, name: str, size: int, content: IO[bytes]) -> bool:
        """Unpack one member.

        Returns:
            Whether it is the last.
        """
        if self._manifest is None:
            if name != MANIFEST or size > _MAX_MANIFEST_BYTES:
                raise StartupError("it is not a backup of an operator")
            self._manifest = Manifest.loads(content.read())
            self._check_kind(self._manifest)
        elif name == DATABASES[self._manifest.store]:
            self._write(self._root / name, content, 0o600)
        elif match := _PROJECT.fullmatch(name):
            self._unpack_project(match[1], content)
        elif (match := _LOCKFILE.fullmatch(name)) and size <= _MAX_LOCKFILE_BYTES:
            folder = self._root / "locks" / match[1]
            folder.mkdir(exist_ok=True)
            self._write(folder / match[2], content)
        elif match := _LOG.fullmatch(name):
            self._unpack_log(match[1], match[2], size, content)
        elif name == END:
            return True
        else:
            raise StartupError(f"{name!r} does not belong in a backup")
        return False

    def _check_kind(self, manifest: Manifest) -> None:
        kind = "sqlite" if self._settings.store is None else "postgresql"
        if manifest.store != kind:
            database = {
                "sqlite": "a file in the data folder; omit --store",
                "postgresql": "PostgreSQL; use --store",
            }
            raise StartupError(f"its database is {database[manifest.store]}")

    def _unpack_project(self, identity: str, content: IO[bytes]) -> None:
        assert self._manifest is not None
        folder = self._root / "projects" / identity
        if folder.exists():
            raise StartupError(f"it has the project {identity} twice")
        unpack(content, folder)
        if project_id(folder) != identity:
            if identity not in self._manifest.changed:
                raise StartupError(f"the project {identity} is damaged")
            self.summary.changed.append(identity)
        self.summary.projects += 1

    def _unpack_log(self, job_id: str, name: str, size: int, content: IO[bytes]) -> None:
        if name == logfile.CUT:
            if size > _MAX_CUT_BYTES:
                raise StartupError(f"the log.cut of the job {job_id} is too long")
            self._cuts[job_id] = _cut(job_id, content.read())
            return
        folder, gap = self._folders.folder(job_id), self._cuts.pop(job_id, None)
        try:
            folder.mkdir(0o700)
        except FileExistsError as error:
            raise StartupError(f"it has the log of the job {job_id} twice") from error
        if gap is not None:
            if size < gap.start:
                raise StartupError(f"the log of the job {job_id} ends before its log.cut begins")
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
            raise StartupError(f"it has {path.name!r} twice") from error
        with os.fdopen(fd, "wb") as target:
            if gap is not None:
                target.write(content.read(gap.start))
                target.seek(gap.end)
            shutil.copyfileobj(content, target, _CHUNK_BYTES)
            target.truncate()

    def _check_database(self) -> None:
        if not self.database.exists():
            raise StartupError("it has no database")
        if self._settings.store is None:
            jobs = snapshot.read(self.database).logs
            self.summary.jobs = len(jobs)
            for job_id in self._folders.job_ids():
                if job_id not in jobs:
                    raise StartupError(
                        f"it has the log of a job that is not in its database, {job_id}"
                    )


def _cut(job_id: str, data: bytes) -> LogCut:
    try:
        return LogCut.loads(data)
    except checks.Invalid as error:
        raise StartupError(f"the log.cut of the job {job_id} cannot be read") from error
