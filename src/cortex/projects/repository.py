"""The operator's projects: each is a folder named after its id, with a copy in the object store if
one is configured. The lock files of a project record what its environment contained when it was
first built.

    <data folder>/projects/<id>/            and  <object store>/projects/<id>/project.tar.gz
    <data folder>/locks/<id>/<name>         and  <object store>/projects/<id>/<name>

Called by the operator's deploys, versions, retention and backups, by `environments`, and by the
agents on a cluster's nodes. All methods block, and any thread may call them.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from cortex.errors import InvalidProject
from cortex.objects import ObjectStore
from cortex.projects import trash
from cortex.projects.lockfiles import SUFFIX
from cortex.projects.pack import open_tar_gz
from cortex.projects.repair import restore_files
from cortex.projects.unpack import project_id, unpack
from cortex.spec.times import new_id

log = structlog.get_logger()

_INCOMING = ".incoming-"
_OBJECTS = "projects"
_ARCHIVE = "project.tar.gz"
# A younger object may belong to a deploy that is not acknowledged yet.
_MIN_AGE_S = 3600
_TICK_NS = 10**9  # longer than that of any clock of a file system


class Projects:
    """The projects of one data folder."""

    def __init__(self, root: Path, locks: Path, objects: ObjectStore | None = None) -> None:
        self._root = root
        self._locks = locks
        self._objects = objects
        self._saving = threading.Lock()
        self._locks_fetched: set[str] = set()
        """The projects whose lock files have all been fetched from the object store."""
        self._locks_read: dict[str, tuple[int, dict[str, str]]] = {}
        """By project: when the folder of its lock files had changed last, and their contents."""

    def folder(self, identity: str) -> Path:
        """The folder of a project's files, whether or not they are on this machine."""
        return self._root / identity

    def remove_leftovers(self) -> None:
        """Remove what an interrupted operator has left: incoming files and trash."""
        for leftover in (*self._root.glob(f"{_INCOMING}*"), *self.trashed_folders()):
            _remove(leftover)

    def reset_cache(self) -> None:
        """Look for lock files in the object store again: another operator may have added some."""
        self._locks_fetched.clear()

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A path for an incoming file or folder, which is removed afterwards unless it was moved
        away."""
        path = self._root / f"{_INCOMING}{new_id()}"
        try:
            yield path
        finally:
            _remove(path)

    def add_project(self, incoming: Path) -> str:
        """Store a new project. It is durable when this returns.

        Args:
            incoming: the folder of its files; it is moved.

        Returns:
            The project's id.

        Raises:
            StorageUnavailable: the project is not stored, because the object store cannot be
                written.
        """
        identity = project_id(incoming)
        if self._objects is not None:
            self._upload(self._objects, identity, incoming)
        self.install_files(identity, incoming)
        return identity

    def install_files(self, identity: str, incoming: Path) -> None:
        """Make an incoming folder the files of a project. They are durable when this returns."""
        if trash.mark_used(self.folder(identity)):
            self._restore(identity, incoming)
        else:
            # One sync of the disk is cheaper than one for each of thousands of small files.
            os.sync()
            try:
                incoming.rename(self.folder(identity))
            except OSError:
                if not self.folder(identity).is_dir():  # another thread has installed it
                    raise
        # An acknowledged deploy survives a power failure, wherever the database is that records it.
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def ensure_local(self, identity: str) -> bool:
        """Fetch a project from the object store unless it is on this machine.

        Returns:
            Whether it is on this machine now.

        Raises:
            StorageUnavailable: the object store cannot be read now.
        """
        if self.folder(identity).is_dir():
            return True
        if self._objects is None:
            return False
        with self.incoming() as archive, self.incoming() as folder:
            if not self._objects.get(f"{_OBJECTS}/{identity}/{_ARCHIVE}", archive):
                return False
            try:
                with archive.open("rb") as content:
                    unpack(content, folder)
                is_whole = project_id(folder) == identity
            except InvalidProject:
                is_whole = False
            if not is_whole:
                log.error("a project in the object store is damaged", project=identity)
                return False
            self.install_files(identity, folder)
        log.info("project fetched", project=identity)
        return True

    def upload_missing(self, used: set[str]) -> None:
        """Upload the projects that the object store lacks: it may have been configured after their
        deploys.

        Args:
            used: the ids of the projects to upload.

        Raises:
            StorageUnavailable: the object store may lack some still.
        """
        if self._objects is None:
            return
        stored = self._objects.listed(_OBJECTS)
        for identity in used:
            folder, name = self.folder(identity), f"{_OBJECTS}/{identity}/{_ARCHIVE}"
            if name in stored or not folder.is_dir():
                continue
            with self.incoming() as copy, self.incoming() as archive:
                if self.pack(identity, copy, archive):
                    self._objects.put(name, archive)
                else:
                    log.error("a project was changed after its deploy", project=identity)

    def pack(self, identity: str, copy: Path, archive: Path) -> bool:
        """Pack a project that is on this machine into an archive that `unpack` accepts.

        Args:
            copy: a path for a temporary copy of the project.

        Returns:
            Whether the project is as it was deployed.

        Raises:
            OSError: the project is not on this machine, or is being removed.
        """
        # Python has written byte code there since. Any other change makes it a different project.
        try:
            shutil.copytree(self.folder(identity), copy, symlinks=True, ignore=_not_in_project)
        except shutil.Error as error:  # its argument is a list, for example of removed files
            raise OSError(str(error)) from error
        _archive(copy, archive)
        return project_id(copy) == identity

    def locks(self, identity: str) -> dict[str, str]:
        """All lock files of a project, by name.

        Raises:
            StorageUnavailable: the object store cannot be read now.
        """
        if self._objects is not None and identity not in self._locks_fetched:
            folder = f"{_OBJECTS}/{identity}/"
            for path in self._objects.listed(folder):
                if path.endswith(SUFFIX):
                    self.lockfile(identity, path.removeprefix(folder))
            self._locks_fetched.add(identity)
        try:
            changed_ns = (self._locks / identity).stat().st_mtime_ns
            files = list((self._locks / identity).iterdir())
        except FileNotFoundError:
            changed_ns, files = 0, []
        found = {file.name: file.read_text("utf-8") for file in files if file.suffix == SUFFIX}
        # A folder that changes twice within a tick of the kernel's clock keeps its time.
        if time.time_ns() - changed_ns > _TICK_NS:
            self._locks_read[identity] = changed_ns, found
        return found

    def known_locks(self, identity: str) -> dict[str, str] | None:
        """All lock files of a project, if they have not changed since `locks` read them: a single
        stat(2) says so. None where `locks` has to be called.

        Raises:
            OSError: the folder cannot be read now.
        """
        if self._objects is not None and identity not in self._locks_fetched:
            return None
        known = self._locks_read.get(identity)
        if known is None:
            return None
        try:
            changed_ns = (self._locks / identity).stat().st_mtime_ns
        except FileNotFoundError:
            changed_ns = 0
        return known[1] if known[0] == changed_ns else None

    def lockfile(self, identity: str, name: str) -> str | None:
        """The content of a project's lock file; None if there is none.

        Raises:
            StorageUnavailable: the object store cannot be read now.
        """
        local = self.local_lockfile(identity, name)
        if local is not None or self._objects is None:
            return local
        data = self._objects.read(f"{_OBJECTS}/{identity}/{name}")
        if data is None:
            return None
        text = data.decode("utf-8", "replace")
        self._write_lockfile(identity, name, text)
        return text

    def local_lockfile(self, identity: str, name: str) -> str | None:
        """The content of a project's lock file if it is on this machine."""
        try:
            return (self._locks / identity / name).read_text("utf-8")
        except FileNotFoundError:
            return None

    def save_lockfile(self, identity: str, name: str, text: str) -> None:
        """Store a lock file of a project.

        Raises:
            StorageUnavailable: it is not stored.
        """
        if self._objects is not None:
            self._objects.put(f"{_OBJECTS}/{identity}/{name}", text.encode())
        self._write_lockfile(identity, name, text)

    def save_lockfile_if_absent(self, identity: str, name: str, text: str) -> None:
        """Store a lock file of a project, unless it has one of that name.

        Raises:
            StorageUnavailable: it is not stored.
        """
        with self._saving:
            if self.lockfile(identity, name) is None:
                self.save_lockfile(identity, name, text)

    def last_used(self) -> dict[str, int]:
        """The projects on this machine, each with the time of its last deploy or fetch, for
        `move_to_trash`."""
        return {folder.name: trash.last_used_ns(folder) for folder in self.local_folders()}

    def local_folders(self) -> list[Path]:
        """The folders of all projects on this machine."""
        return [path for path in self._root.iterdir() if not path.name.startswith(".")]

    def move_to_trash(self, identity: str, used_ns: int) -> None:
        """Move an unused project to the trash, unless it has been deployed or fetched again.

        Args:
            used_ns: its time from `last_used`, read before the project was found to be unused.
        """
        trash.move_if_unused(self.folder(identity), used_ns)

    def trashed_folders(self) -> list[Path]:
        """The projects in the trash; the caller deletes them."""
        return trash.trashed_folders(self._root)

    def prune_unused(self, used: set[str]) -> None:
        """Delete the lock files of unused projects that are not on this machine, and the objects of
        unused projects.

        Args:
            used: the ids of the projects that some version uses.

        Raises:
            StorageUnavailable: the object store may contain some still.
        """
        self._locks_fetched &= used
        for identity in set(self._locks_read) - used:
            self._locks_read.pop(identity, None)
        for folder in self._locks.iterdir():
            if folder.name not in used and not self.folder(folder.name).exists():
                shutil.rmtree(folder, ignore_errors=True)
        if self._objects is not None:
            ages = self._objects.listed(_OBJECTS).items()
            self._objects.delete(
                [
                    name
                    for name, age_s in ages
                    if age_s > _MIN_AGE_S and _project_of(name) not in used
                ]
            )

    def _restore(self, identity: str, incoming: Path) -> None:
        restored = restore_files(self.folder(identity), incoming)
        if restored:
            log.warning(
                "a project was changed after its deploy", project=identity, restored=restored
            )
            os.sync()
            # Jobs that start from now on find the restored files.
            trash.mark_used(self.folder(identity))

    def _upload(self, objects: ObjectStore, identity: str, folder: Path) -> None:
        # An object that exists is uploaded again: its age starts anew, and no retention deletes it.
        with self.incoming() as archive:
            _archive(folder, archive)
            objects.put(f"{_OBJECTS}/{identity}/{_ARCHIVE}", archive)

    def _write_lockfile(self, identity: str, name: str, text: str) -> None:
        path = self._locks / identity / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{new_id()}")
        part.write_text(text, "utf-8")
        part.rename(path)


def _not_in_project(folder: str, names: list[str]) -> set[str]:
    """The names in a folder that are no part of the project: Python's byte code, and pipes, sockets
    and devices, on which copying would block or fail."""
    modes = {name: Path(folder, name).lstat().st_mode for name in names}
    kinds = (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)
    special = {name for name, mode in modes.items() if not any(is_kind(mode) for is_kind in kinds)}
    return special | ({"__pycache__"} & set(names))


def _archive(folder: Path, target: Path) -> None:
    """Write all of a folder to an archive that `unpack` accepts."""
    with target.open("wb") as file, open_tar_gz(file) as tar:
        for parent, folders, names in os.walk(folder):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            # `unpack` makes the folder of each file; only an empty folder needs an entry.
            itself = [] if folders or names or parent == str(folder) else [""]
            for name in (*itself, *links, *names):
                path = Path(parent, name)
                tar.add(path, str(path.relative_to(folder)), recursive=False, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The entry without its owner and time, so that equal projects give equal archives."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _project_of(name: str) -> str:
    """The id of the project that an object belongs to."""
    return name.split("/")[1]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
