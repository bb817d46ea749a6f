"""The projects that an operator has: each a folder under its id, and a copy in the store of files where
there is one. Beside a project lie its lock files: what its environment held when it was first built.

    <data folder>/projects/<id>/            and  <files>/projects/<id>/project.tar.gz
    <data folder>/locks/<id>/<name>         and  <files>/projects/<id>/<name>

Called by deploys, versions, environments and retention; all methods block, and may be called in any
thread.
"""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from cortex.errors import InvalidProject
from cortex.objects import ObjectStore
from cortex.projects import trash
from cortex.projects.lockfiles import SUFFIX
from cortex.projects.repair import mend
from cortex.projects.unpack import project_id, unpack
from cortex.spec.times import new_id

log = structlog.get_logger()

_INCOMING = ".incoming-"
_ABOVE = "projects"
_ARCHIVE = "project.tar.gz"
# What was stored just now may be of a deploy that is not acknowledged yet.
_YOUNG_S = 3600


class Projects:
    """The projects of one data folder."""

    def __init__(self, root: Path, locks: Path, files: ObjectStore | None = None) -> None:
        self._root = root
        self._locks = locks
        self._files = files
        self._keeping = threading.Lock()
        self._looked: set[str] = set()  # projects all of whose lock files are here

    def folder(self, identity: str) -> Path:
        """Where a project's files are, as far as they are here."""
        return self._root / identity

    def open(self) -> None:
        """Remove what was cut off."""
        for leftover in (*self._root.glob(f"{_INCOMING}*"), *self.to_remove()):
            _remove(leftover)

    def start_over(self) -> None:
        """Another operator may have kept lock files since."""
        self._looked.clear()

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """A place for what comes in; gone afterwards, unless it was taken in."""
        place = self._root / f"{_INCOMING}{new_id()}"
        try:
            yield place
        finally:
            _remove(place)

    def take_in(self, incoming: Path) -> str:
        """Keep a project that came in; its id. It is durable when this returns.

        Raises:
            StorageUnavailable: it is not kept, for the store of files takes nothing now.
        """
        identity = project_id(incoming)
        if self._files is not None:
            self._send(self._files, identity, incoming)
        self.place(identity, incoming)
        return identity

    def place(self, identity: str, incoming: Path) -> None:
        """Let what came in be a project's files. Durable when it returns."""
        if trash.touch(self.folder(identity)):
            if mended := mend(self.folder(identity), incoming):
                log.warning(
                    "a project was changed after its deploy", project=identity, mended=mended
                )
                os.sync()
                trash.touch(
                    self.folder(identity)
                )  # jobs that begin from now on see what was mended
        else:
            # Of thousands of small files that is cheaper at one stroke than one by one.
            os.sync()
            try:
                incoming.rename(self.folder(identity))
            except OSError:
                if not self.folder(identity).is_dir():  # another fetch was quicker
                    raise
        # An acknowledged deploy survives power loss, wherever the database is that tells of it.
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def fetch(self, identity: str) -> bool:
        """Bring a project here from the store of files; whether it is here now.

        Raises:
            StorageUnavailable: that cannot be told now.
        """
        if self.folder(identity).is_dir():
            return True
        if self._files is None:
            return False
        with self.incoming() as archive, self.incoming() as folder:
            if not self._files.get(f"{_ABOVE}/{identity}/{_ARCHIVE}", archive):
                return False
            try:
                with archive.open("rb") as content:
                    unpack(content, folder)
                is_whole = project_id(folder) == identity
            except InvalidProject:
                is_whole = False
            if not is_whole:
                log.error("a project in the store of files is damaged", project=identity)
                return False
            self.place(identity, folder)
        log.info("project fetched", project=identity)
        return True

    def send_missing(self, used: set[str]) -> None:
        """Send the store of files what it has not: it may be younger than the projects.

        Raises:
            StorageUnavailable: some may be missing there.
        """
        if self._files is None:
            return
        there = self._files.listed(_ABOVE)
        for identity in used:
            folder, name = self.folder(identity), f"{_ABOVE}/{identity}/{_ARCHIVE}"
            if name in there or not folder.is_dir():
                continue
            with self.incoming() as copy, self.incoming() as archive:
                if self.pack(identity, copy, archive):
                    self._files.put(name, archive)
                else:
                    log.error("a project was changed after its deploy", project=identity)

    def pack(self, identity: str, copy: Path, archive: Path) -> bool:
        """Pack a project that is here into an archive, which `unpack` takes; whether it is as it was deployed.

        Args:
            copy: a place for a copy of it.

        Raises:
            OSError: it is not here, or not any more.
        """
        # Python has written there since; whatever else did has spoiled it.
        try:
            shutil.copytree(self.folder(identity), copy, symlinks=True, ignore=_no_part)
        except (
            shutil.Error
        ) as error:  # what it tells is a list of files that went away meanwhile, say
            raise OSError(str(error)) from error
        _archive(copy, archive)
        return project_id(copy) == identity

    def locks(self, identity: str) -> dict[str, str]:
        """All lock files of a project, by their names.

        Raises:
            StorageUnavailable: that cannot be told now.
        """
        if self._files is not None and identity not in self._looked:
            above = f"{_ABOVE}/{identity}/"
            for path in self._files.listed(above):
                if path.endswith(SUFFIX):
                    self.lock(identity, path.removeprefix(above))
            self._looked.add(identity)
        try:
            files = list((self._locks / identity).iterdir())
        except FileNotFoundError:
            return {}
        return {file.name: file.read_text("utf-8") for file in files if file.suffix == SUFFIX}

    def lock(self, identity: str, name: str) -> str | None:
        """A lock file of a project, if it has it.

        Raises:
            StorageUnavailable: that cannot be told now.
        """
        here = self.lock_here(identity, name)
        if here is not None or self._files is None:
            return here
        found = self._files.read(f"{_ABOVE}/{identity}/{name}")
        if found is None:
            return None
        text = found.decode("utf-8", "replace")
        self._write_lock(identity, name, text)
        return text

    def lock_here(self, identity: str, name: str) -> str | None:
        """A lock file of a project, if it is on this machine."""
        try:
            return (self._locks / identity / name).read_text("utf-8")
        except FileNotFoundError:
            return None

    def keep_lock(self, identity: str, name: str, text: str) -> None:
        """Keep a lock file with a project.

        Raises:
            StorageUnavailable: it is not kept.
        """
        if self._files is not None:
            self._files.put(f"{_ABOVE}/{identity}/{name}", text.encode())
        self._write_lock(identity, name, text)

    def keep_first_lock(self, identity: str, name: str, text: str) -> None:
        """Keep a lock file with a project that has none of that name.

        Raises:
            StorageUnavailable: it is not kept.
        """
        with self._keeping:
            if self.lock(identity, name) is None:
                self.keep_lock(identity, name, text)

    def here(self) -> dict[str, int]:
        """The projects that are here, each with when it came in last."""
        return {folder.name: trash.touched(folder) for folder in self.folders()}

    def folders(self) -> list[Path]:
        """The folders of all that are here."""
        return [path for path in self._root.iterdir() if not path.name.startswith(".")]

    def put_away(self, identity: str, came: int) -> None:
        """Put a project away that nothing uses, unless it has come in again since."""
        trash.put_away(self.folder(identity), came)

    def to_remove(self) -> list[Path]:
        """The folders that were put away."""
        return trash.to_remove(self._root)

    def forget_all_but(self, used: set[str]) -> None:
        """Remove what is kept of projects that nothing uses and that are not here any more.

        Raises:
            StorageUnavailable: some may be left in the store of files.
        """
        self._looked &= used
        for folder in self._locks.iterdir():
            if folder.name not in used and not self.folder(folder.name).exists():
                shutil.rmtree(folder, ignore_errors=True)
        if self._files is not None:
            there = self._files.listed(_ABOVE).items()
            unused = [name for name, age_s in there if age_s > _YOUNG_S and _of(name) not in used]
            self._files.delete(unused)

    def _send(self, files: ObjectStore, identity: str, folder: Path) -> None:
        # Also what is there already: it is young again then, and no retention takes it away.
        with self.incoming() as archive:
            _archive(folder, archive)
            files.put(f"{_ABOVE}/{identity}/{_ARCHIVE}", archive)

    def _write_lock(self, identity: str, name: str, text: str) -> None:
        path = self._locks / identity / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{new_id()}")
        part.write_text(text, "utf-8")
        part.rename(path)


def _no_part(folder: str, names: list[str]) -> set[str]:
    """What of a folder is no part of its project: what Python keeps there, and what is no file, for which
    copying would wait or fail."""
    modes = {name: Path(folder, name).lstat().st_mode for name in names}
    kinds = (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)
    odd = {name for name, mode in modes.items() if not any(is_kind(mode) for is_kind in kinds)}
    return odd | ({"__pycache__"} & set(names))


def _archive(folder: Path, target: Path) -> None:
    """All of a folder, as `unpack` takes it."""
    with (
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for parent, folders, names in os.walk(folder):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            # Folders are made with what is in them; only empty ones have to be told.
            itself = [] if folders or names or parent == str(folder) else [""]
            for name in (*itself, *links, *names):
                path = Path(parent, name)
                tar.add(path, str(path.relative_to(folder)), recursive=False, filter=_plain)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def _of(name: str) -> str:
    """The project that a file in the store of files belongs to."""
    return name.split("/")[1]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
