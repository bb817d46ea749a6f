"""A backup: one file with all that an operator cannot make again. Called by `cortex backup`, beside the operator or
without it; `restore` takes it back.

    cortex-backup.json               what it is, and of when
    operator.db | operator.pgdump    the database as it was at one moment
    projects/<id>.tar.gz             each project that a version of then has, as it is uploaded
    locks/<id>/<name>                what environments held when they were first built
    jobs/<job_id>/log.cut            where a part of a log is gone
    jobs/<job_id>/log                each log that is not in a store of files, without that part
    cortex-backup.end                nothing is missing

The database comes first, then what it tells of. What came later is not in it; what went later may be missing, and
where something needs that, all is done again.
"""

from __future__ import annotations

import gzip
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
from cortex.projects.repository import Projects
from cortex.spec.times import now_ns, rfc3339
from cortex.store import snapshot
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile

MANIFEST, END = "cortex-backup.json", "cortex-backup.end"
DATABASES = {"sqlite": "operator.db", "postgresql": "operator.pgdump"}
FORMAT = 1

_TRIES = 3
_CHUNK = 1 << 20
_IN_MEMORY = 8 << 20
_SLACK = 1 << 20  # what a job writes until its supervising process looks again


@dataclass(frozen=True)
class Manifest:
    """What a backup says of itself."""

    format: int
    version: str
    created: str
    store: str
    revision: str
    changed: list[str] = field(default_factory=list)
    """The projects that somebody has changed after their deploy."""

    def dumps(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def loads(cls, data: bytes) -> Self:
        """
        Raises:
            StartupError: it is none that this version can restore.
        """
        try:
            fields = json.loads(data)
            number = fields["format"]
            made = cls(
                **{name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StartupError("it is no backup of an operator") from error
        if number != FORMAT:
            raise StartupError(
                f"it is of format {number!r}, and this version knows {FORMAT}: restore it with the version "
                f"that made it, {made.version!r}"
            )
        snapshot.check_revision(str(made.revision))
        if (
            str(made.store) not in DATABASES
            or not isinstance(made.changed, list)
            or not isinstance(made.created, str)
            or not made.created.isascii()
        ):
            raise StartupError("it is no backup of an operator")
        return made


@dataclass
class Summary:
    """What is in a backup."""

    jobs: int = 0
    projects: int = 0
    logs: int = 0
    missing: list[str] = field(default_factory=list)
    """The projects that something needs and that are not here."""
    changed: list[str] = field(default_factory=list)
    aside: str | None = None
    """Where a restore has put what was there."""


def back_up(settings: Settings, file: Path) -> Summary:
    """Make a backup. The file gets its name when it is whole and on the disk.

    Raises:
        StartupError: there is nothing to back up, or it cannot be read.
        OSError: the backup cannot be written.
    """
    target = file.absolute()
    with tempfile.TemporaryDirectory(prefix=".cortex-backup-", dir=target.parent) as name:
        for number in range(_TRIES):
            place = Path(name, str(number))
            place.mkdir()
            summary = _Backup(settings, place).write(place / "backup")
            if not summary.missing:
                break
        (place / "backup").rename(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return summary


class _Backup:
    """One that is made."""

    def __init__(self, settings: Settings, place: Path) -> None:
        self._settings = settings
        self._place = place
        self._projects = Projects(settings.projects, settings.locks)
        self._summary = Summary()

    def write(self, path: Path) -> Summary:
        database = self._place / "database"
        found = snapshot.take(self._settings.database_url, database)
        self._summary.jobs = len(found.logs)
        packed = dict(self._packed(found))
        with _written(path) as tar:
            store = "sqlite" if self._settings.store is None else "postgresql"
            manifest = Manifest(
                FORMAT,
                cortex.__version__,
                rfc3339(now_ns()),
                store,
                found.revision,
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
            for job_id, most in self._unarchived(found.logs):
                self._add_log(tar, job_id, most)
            _add_bytes(tar, END, b"")
        return self._summary

    def _packed(self, found: snapshot.Snapshot) -> Iterator[tuple[str, Path]]:
        """The projects that are here, packed one by one."""
        for identity, is_needed in found.projects.items():
            archive = self._place / f"{identity}.tar.gz"
            with tempfile.TemporaryDirectory(dir=self._place) as copy:
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
        """The jobs of the database that have a folder here, and whose logs a store of files has not."""
        archived = _names(self._settings.archived)
        here = _names(self._settings.jobs) - archived
        return ((job_id, most) for job_id, most in logs.items() if job_id in here)

    def _add_log(self, tar: tarfile.TarFile, job_id: str, most: int) -> None:
        log = self._settings.job_folders.log(job_id)
        for last in range(_TRIES, -1, -1):
            with (
                opened(log) as file,
                tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(self._place)) as kept,
            ):
                # The job never wrote a line, or its folder is being removed, or the job has spoilt it.
                if file is None:
                    return
                gap = file.gap(most)
                if not _copy_log(file.fd, kept, gap, most + _SLACK):
                    return
                # Bytes that were punched out meanwhile read as zeros. A job may write without end.
                if last and _fields(file.gap(most)) != _fields(gap):
                    continue
                if gap is not None:
                    _add_bytes(tar, f"jobs/{job_id}/{logfile.CUT}", gap.dumps())
                _add(tar, f"jobs/{job_id}/{logfile.NAME}", kept)
                self._summary.logs += 1
                return


def _copy_log(fd: int, kept: IO[bytes], gap: LogCut | None, most: int) -> bool:
    """Copy a log without its gap, and no more than its limit: a job can make the file of any length.
    False where the log has become shorter."""
    first = _copy(fd, kept, 0, most if gap is None else min(most, gap.start))
    if gap is not None:
        _copy(fd, kept, gap.end, most - first)
    return gap is None or first == gap.start


def _fields(gap: LogCut | None) -> dict[str, object] | None:
    return None if gap is None else gap.fields()


@contextmanager
def _written(path: Path) -> Iterator[tarfile.TarFile]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    # Its owner's alone: it holds what jobs find in their environment, and what they returned.
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=1) as zipped,
            tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
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


def _copy(fd: int, target: IO[bytes], start: int, most: int) -> int:
    """Copy up to so many bytes of a file; how many there were."""
    done = 0
    while done < most and (piece := os.pread(fd, min(_CHUNK, most - done), start + done)):
        target.write(piece)
        done += len(piece)
    return done


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()
