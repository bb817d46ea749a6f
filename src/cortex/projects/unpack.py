"""Unpacks an uploaded project, and computes its identity. Anyone may have made the archive.

All files are written before any link is made, so that nothing is written through a link. The links
are made last and must stay inside of the project. The amount of data is limited while the stream is
read.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cortex.errors import InvalidProject
from cortex.projects.pack import MAX_PROJECT_BYTES, MAX_PROJECT_FILES

_CHUNK = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
_MAX_OVERHEAD_BYTES = 64 << 20
_MAX_TARGET_LENGTH = 1024
MAX_DEPTH = 100
"""The functions that make, walk and remove folders recurse once per level."""
# Errors that the names in an archive cause, and not the machine.
_ARCHIVE_ERRORS = {
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.EILSEQ,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
}


def unpack(
    archive: IO[bytes],
    target: Path,
    *,
    is_upload: bool = False,
    max_bytes: int = MAX_PROJECT_BYTES,
) -> None:
    """Unpack an archive that `pack` has written. After a failure nothing is left.

    Args:
        target: the folder to unpack into: a new one, or an empty one.
        is_upload: whether the number of files is limited. An earlier version may have stored a
            project with more.
        max_bytes: the limit for the sum of the files' sizes.

    Raises:
        InvalidProject: the archive is damaged, is too large, or contains what a project may not
            contain.
        FileExistsError: the target is not empty.
    """
    existed = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise FileExistsError(errno.EEXIST, "the folder to unpack into is not empty", str(target))
    try:
        _unpack(archive, target, is_upload, max_bytes)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if existed:
            target.mkdir(exist_ok=True)
        refusal = _refusal(error)
        if refusal is not None:
            raise refusal from error
        raise


def project_id(folder: Path) -> str:
    """SHA-256 over the names, executable bits, link targets and contents of a folder's files."""
    digest = hashlib.sha256()

    def add(*fields: bytes) -> None:
        for field in fields:
            digest.update(len(field).to_bytes(8, "big") + field)

    for path in sorted(_below(folder), key=os.fsencode):
        name = os.fsencode(path.relative_to(folder))
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            add(b"link", name, os.fsencode(path.readlink()))
        elif stat.S_ISDIR(info.st_mode):
            add(b"folder", name)
        else:
            add(b"program" if info.st_mode & stat.S_IXUSR else b"file", name)
            with path.open("rb") as file:
                add(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(parent, name)


class BoundedReader:
    """Reads the decompressed archive, limited to the size that a well-formed one has: for each
    member and in total."""

    def __init__(self, archive: IO[bytes], max_bytes: int | None) -> None:
        """
        Args:
            max_bytes: the limit in total; None if the caller limits it.
        """
        self._file = gzip.GzipFile(fileobj=archive, mode="rb")
        self._total_left = float("inf") if max_bytes is None else max_bytes
        self._member_left = 0

    def expect(self, size: int) -> None:
        """Set the limit for the next reads: a header, and a content of `size` bytes."""
        self._member_left = size + _MAX_HEADER_BYTES

    def finish(self) -> None:
        """Read the padding and the checksum at the end, which `tarfile` does not read."""
        self.expect(0)
        while self.read(_CHUNK):
            pass

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._member_left -= len(data)
        self._total_left -= len(data)
        if self._member_left < 0 or self._total_left < 0:
            raise InvalidProject(
                "the archive contains more data than its headers declare; pack the project again"
            )
        return data


def _unpack(archive: IO[bytes], target: Path, is_upload: bool, max_bytes: int) -> None:
    source = BoundedReader(archive, max_bytes + _MAX_OVERHEAD_BYTES)
    source.expect(0)
    links: list[tuple[Path, str]] = []
    left, count = max_bytes, 0
    folders = {Path()}
    with tarfile.open(fileobj=source, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
        while True:
            source.expect(0)
            member = tar.next()
            if member is None:
                break
            path = _path_of(member, target)
            count += _count_new(path.relative_to(target), folders, is_folder=member.isdir())
            left -= member.size
            if is_upload and count > MAX_PROJECT_FILES:
                raise InvalidProject(
                    f"the project has over {MAX_PROJECT_FILES:,} files and folders"
                )
            if left < 0:
                raise InvalidProject(f"the project is over {max_bytes >> 20} MiB")
            source.expect(member.size)
            _extract(tar, member, path, links)
    source.finish()
    for path, linked in links:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(linked)
    _check_links(target, [path for path, _ in links])


def _count_new(path: Path, folders: set[Path], *, is_folder: bool) -> int:
    """Add a member's folders to the known ones; how many files and folders the member makes.

    An archive need not list its folders, but the project has them, and they count: without this, an
    upload could make a hundred folders for each file.
    """
    known = len(folders)
    for folder in (path, *path.parents) if is_folder else path.parents:
        if folder in folders:
            break
        folders.add(folder)
    return len(folders) - known + (not is_folder)


def _extract(
    tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, links: list[tuple[Path, str]]
) -> None:
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
    elif member.issym():
        _check_target(member)
        links.append((path, member.linkname))
    elif member.isreg() and not member.issparse():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(tar, member, path)
    else:
        raise InvalidProject(f"{member.name!r} is neither a file, a folder nor a symbolic link")


def _path_of(member: tarfile.TarInfo, target: Path) -> Path:
    parts = member.name.rstrip("/").split("/")
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        raise InvalidProject(f"{member.name!r} leaves the project")
    if len(parts) > MAX_DEPTH:
        raise InvalidProject(f"{member.name[:200]!r} is over {MAX_DEPTH} folders deep")
    return target.joinpath(*parts)


def _check_target(member: tarfile.TarInfo) -> None:
    linked = member.linkname
    within = os.path.normpath(os.path.join(os.path.dirname(member.name), linked))  # noqa: PTH118, PTH120
    leaves = linked.startswith("/") or within.split("/")[0] == ".."
    if leaves or not linked or "\0" in linked or len(linked) > _MAX_TARGET_LENGTH:
        raise InvalidProject(f"the link {member.name!r} to {linked[:200]!r} leaves the project")


def _check_links(target: Path, links: list[Path]) -> None:
    """Check all links once they exist: a link that leads through other links may leave the
    project."""
    root = Path(os.path.realpath(target))
    for link in links:
        try:
            real = Path(os.path.realpath(link, strict=True))
        except FileNotFoundError:
            real = Path(os.path.realpath(link))
        if not real.is_relative_to(root):
            raise InvalidProject(f"the link {str(link.relative_to(target))!r} leaves the project")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = tar.extractfile(member)
    mode = 0o755 if member.mode & stat.S_IXUSR else 0o644
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, mode), "wb") as file:  # noqa: PTH123  # opens a descriptor
        os.fchmod(file.fileno(), mode)  # the umask may have reduced it
        while content is not None and (chunk := content.read(_CHUNK)):
            file.write(chunk)
        if file.tell() != member.size:
            raise InvalidProject(f"the archive ends within {member.name!r}; upload it again")


def _refusal(error: BaseException) -> InvalidProject | None:
    """The error for the client if the archive caused this one, else None."""
    if isinstance(error, tarfile.TarError | gzip.BadGzipFile | EOFError | zlib.error):
        return InvalidProject(f"the project is not a complete gzip tar archive ({error})")
    if isinstance(error, ValueError | OverflowError):
        return InvalidProject(f"the project's archive cannot be read ({error})")
    if isinstance(error, OSError) and error.errno in _ARCHIVE_ERRORS:
        name = os.fsdecode(error.filename or "").rsplit("/", 1)[-1][:200]
        return InvalidProject(
            f"the project's archive contains a file that cannot be made, {name!r}: {error.strerror}"
        )
    return None
