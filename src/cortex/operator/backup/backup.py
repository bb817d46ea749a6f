"""A backup: one file with all data of an operator that it cannot recreate.

`cortex backup` calls it, whether or not the operator runs. `restore` reads it.

    cortex-backup.json               the manifest
    operator.db | operator.pgdump    the database, as it was at one moment
    projects/<id>.tar.gz             each project of a version in the database, as it is uploaded
    locks/<id>/<name>                the exact packages of its environments, from their first builds
    jobs/<job_id>/log.cut            where a part of a log was removed
    jobs/<job_id>/log                each log that is not in an object store, without that part
    cortex-backup.end                marks a complete backup

The database comes first, then the files that it refers to. The backup lacks what is created later.
Files that are removed meanwhile may be missing; if something needs a missing project, all is done
again.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Self

import cortex
from cortex.errors import StartupError
from cortex.joblog.reader import opened
from cortex.operator.config.settings import Settings
from cortex.projects.pack import open_tar_gz
from cortex.projects.repository import Projects
from cortex.spec.times import now_ns, rfc3339
from cortex.store import snapshot
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile

MANIFEST, END = "cortex-backup.json", "cortex-backup.end"
DATABASES = {"sqlite": "operator.db", "postgresql": "operator.pgdump"}
FORMAT = 1

_MAX_TRIES = 3
_CHUNK_BYTES = 1 << 20
_MEMORY_BYTES = 8 << 20
_SLACK_BYTES = 1 << 20  # a job may write these until its supervisor checks the log's size again


@dataclass(frozen=True)
class Manifest:
    """The description of a backup, in its first file."""

    format: int
    version: str
    created: str
    store: str
    revision: str
    changed: list[str] = field(default_factory=list)
    """The projects whose files were changed after their deploy."""

    def dumps(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """Read a manifest.

        Raises:
            StartupError: this version cannot restore the backup.
        """
        try:
            fields = json.loads(data)
            number = fields["format"]
            made = cls(
                **{name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StartupError("it is not a backup of an operator") from error
        if number != FORMAT:
            raise StartupError(
                f"it is of format {number!r}, and this version reads format {FORMAT}; restore it "
                f"with the version that made it, {made.version!r}"
            )
        snapshot.check_revision(str(made.revision))
        if (
            str(made.store) not in DATABASES
            or not isinstance(made.changed, list)
            or not isinstance(made.created, str)
            or not made.created.isascii()
        ):
            raise StartupError("it is not a backup of an operator")
        return made


@dataclass
class Summary:
    """The contents of a backup."""

    jobs: int = 0
    projects: int = 0
    logs: int = 0
    missing: list[str] = field(default_factory=list)
    """The projects that a version needs and that the data folder lacks."""
    changed: list[str] = field(default_factory=list)
    """As in the manifest."""
    aside: str | None = None
    """The folder to which a restore moved the previous data."""


def back_up(settings: Settings, file: Path) -> Summary:
    """Make a backup. The file gets its name when it is complete and on the disk.

    Raises:
        StartupError: the data folder has no operator's data, or the data cannot be read.
        OSError: the backup cannot be written.
    """
    target = file.absolute()
    with tempfile.TemporaryDirectory(prefix=".cortex-backup-", dir=target.parent) as name:
        for number in range(_MAX_TRIES):
            folder = Path(name, str(number))
            folder.mkdir()
            summary = _BackupWriter(settings, folder).write(folder / "backup")
            if not summary.missing:
                break
        (folder / "backup").rename(target)
        parent = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    return summary


class _BackupWriter:
    """Writes one backup."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self._settings = settings
        self._scratch = scratch
        self._projects = Projects(settings.projects, settings.locks)
        self._summary = Summary()

    def write(self, path: Path) -> Summary:
        database = self._scratch / "database"
        contents = snapshot.create(self._settings.database_url, database)
        self._summary.jobs = len(contents.logs)
        packed = dict(self._packed(contents))
        with _new_archive(path) as tar:
            store = "sqlite" if self._settings.store is None else "postgresql"
            manifest = Manifest(
                FORMAT,
                cortex.__version__,
                rfc3339(now_ns()),
                store,
                contents.revision,
                self._summary.changed,
            )
            _add_bytes(tar, MANIFEST, manifest.dumps())
            with database.open("rb") as content:
                _add(tar, DATABASES[store], content)
            for identity, archive in packed.items():
                with archive.open("rb") as content:
                    _add(tar, f"projects/{identity}.tar.gz", content)
                archive.unlink()
                for name, text in self._projects.locks(identity).items():
                    _add_bytes(tar, f"locks/{identity}/{name}", text.encode())
            for job_id, limit in self._unarchived(contents.logs):
                self._add_log(tar, job_id, limit)
            _add_bytes(tar, END, b"")
        return self._summary

    def _packed(self, contents: snapshot.Snapshot) -> Iterator[tuple[str, Path]]:
        """Pack the projects of the data folder, one by one."""
        for identity, is_needed in contents.projects.items():
            archive = self._scratch / f"{identity}.tar.gz"
            with tempfile.TemporaryDirectory(dir=self._scratch) as copy:
                try:
                    is_as_deployed = self._projects.pack(identity, Path(copy, "copy"), archive)
                except OSError:
                    if self._projects.folder(identity).is_dir():
                        raise
                    archive.unlink(missing_ok=True)
                    if is_needed:
                        self._summary.missing.append(identity)
                    continue
            self._summary.projects += 1
            if not is_as_deployed:
                self._summary.changed.append(identity)
            yield identity, archive

    def _unarchived(self, logs: dict[str, int]) -> Iterator[tuple[str, int]]:
        """The jobs with a folder here whose logs are not in the object store, with their log
        limits."""
        archived = _names(self._settings.archived)
        here = _names(self._settings.jobs) - archived
        return ((job_id, limit) for job_id, limit in logs.items() if job_id in here)

    def _add_log(self, tar: tarfile.TarFile, job_id: str, limit: int) -> None:
        log = self._settings.job_folders.log(job_id)
        for tries_left in range(_MAX_TRIES, -1, -1):
            with (
                opened(log) as file,
                tempfile.SpooledTemporaryFile(_MEMORY_BYTES, dir=str(self._scratch)) as copy,
            ):
                # No log: the job wrote nothing, replaced it, or its folder is being removed.
                if file is None:
                    return
                gap = file.gap(limit)
                if not _copy_log(file.fd, copy, gap, limit + _SLACK_BYTES):
                    return
                # A part that was cut meanwhile reads as zeros: copy again. A job may write its log,
                # and have it cut, for ever; the last try therefore takes what it gets.
                if tries_left and _fields(file.gap(limit)) != _fields(gap):
                    continue
                if gap is not None:
                    _add_bytes(tar, f"jobs/{job_id}/{logfile.CUT}", gap.dumps())
                _add(tar, f"jobs/{job_id}/{logfile.NAME}", copy)
                self._summary.logs += 1
                return


def _copy_log(fd: int, copy: IO[bytes], gap: LogCut | None, max_bytes: int) -> bool:
    """Copy a log around its gap.

    Args:
        max_bytes: copied at most, because a job can make its log any length.

    Returns:
        False if the log has become shorter.
    """
    before_gap = _copy(fd, copy, 0, max_bytes if gap is None else min(max_bytes, gap.start))
    if gap is not None:
        _copy(fd, copy, gap.end, max_bytes - before_gap)
    return gap is None or before_gap == gap.start


def _fields(gap: LogCut | None) -> dict[str, object] | None:
    return None if gap is None else gap.fields()


@contextmanager
def _new_archive(path: Path) -> Iterator[tarfile.TarFile]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    # Closed to other users: a backup has the environment variables and results of jobs.
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        with open_tar_gz(file, level=1) as tar:
            yield tar
        file.flush()
        os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes]) -> None:
    member = tarfile.TarInfo(name)
    member.mode, member.mtime = 0o600, int(time.time())
    member.size = content.seek(0, os.SEEK_END)
    content.seek(0)
    tar.addfile(member, content)


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    _add(tar, name, io.BytesIO(data))


def _copy(fd: int, target: IO[bytes], start: int, max_bytes: int) -> int:
    """Copy bytes of a file from an offset on.

    Returns:
        How many bytes were copied: fewer than `max_bytes` at the end of the file.
    """
    copied = 0
    while copied < max_bytes:
        piece = os.pread(fd, min(_CHUNK_BYTES, max_bytes - copied), start + copied)
        if not piece:
            break
        target.write(piece)
        copied += len(piece)
    return copied


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
