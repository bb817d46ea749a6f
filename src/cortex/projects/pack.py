"""Packs a project's folder as a gzip tar stream: the client's upload.

The archive contains all files that `ignored` does not exclude. The same files give the same bytes.
Sizes are summed before any file is read, so that a `cortex.yaml` in a home folder by accident is
refused soon.
"""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from cortex.errors import InvalidProject
from cortex.projects.ignored import IGNORE_FILE, StoredFiles, UploadFiles

MAX_PROJECT_BYTES = 100 << 20
MAX_PROJECT_FILES = 20_000
_MAX_SHOWN = 20
# In a project over the limits so many more files are measured, to name the largest.
_MAX_MEASURED = 20_000
_MAX_NAMED = 5
_MAIN_SHARE, _LARGE_SHARE = 0.5, 0.2


@dataclass(frozen=True)
class PackSummary:
    """A packed project."""

    files: int
    """The number of files and links."""
    bytes: int
    """The sum of their sizes."""
    left_out: str | None = None
    """A message that names the environments and caches that were left out."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    name: str
    info: os.stat_result
    target: str | None = None

    @property
    def size(self) -> int:
        return self.info.st_size if stat.S_ISREG(self.info.st_mode) else 0


def pack(folder: Path, out: IO[bytes]) -> PackSummary:
    """Write the project in `folder` to `out`.

    Raises:
        InvalidProject: it is too large, a link leaves it, or something in it cannot be packed.
    """
    with _file_errors():
        selection = UploadFiles(folder)
        files, size = _pack(folder, selection, out)
    return PackSummary(files, size, selection.left_out())


def pack_stored(folder: Path, out: IO[bytes]) -> None:
    """Write a project to `out` that was unpacked from an upload: no file is excluded again, and the
    limits of an upload do not apply.

    Raises:
        InvalidProject: a link leaves the project, or something in it cannot be packed.
    """
    with _file_errors():
        _pack(folder, StoredFiles(), out)


@contextmanager
def open_tar_gz(out: IO[bytes], level: int = 9) -> Iterator[tarfile.TarFile]:
    """A tar archive that is compressed and written to `out` as its members are added.

    The same members give the same bytes.

    Args:
        level: gzip's, from 1 (fast) to 9 (small).
    """
    with (
        _Gzip(out, level) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        yield tar


@contextmanager
def _file_errors() -> Iterator[None]:
    """Turn errors about the project's files into InvalidProject."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise InvalidProject(f"{os.fsdecode(error.filename)}: {error.strerror}") from error


def _pack(folder: Path, selection: UploadFiles | StoredFiles, out: IO[bytes]) -> tuple[int, int]:
    entries = _entries(folder, selection)
    with open_tar_gz(out) as tar:
        for entry in entries:
            _write(entry, tar)
    files = [entry for entry in entries if not stat.S_ISDIR(entry.info.st_mode)]
    return len(files), sum(entry.size for entry in files)


class _Gzip(gzip.GzipFile):
    """A gzip stream: the same content gives the same bytes."""

    def __init__(self, out: IO[bytes], level: int) -> None:
        """
        Raises:
            OSError: the header cannot be written to `out`.
        """
        try:
            super().__init__(filename="", mode="wb", compresslevel=level, fileobj=out, mtime=0)
        except BaseException:
            # Leave nothing to write: the finalizer would try, and Python 3.13 prints its error.
            self.fileobj = None  # type: ignore[assignment]  # as `close` does
            raise


def _write(entry: _Entry, tar: tarfile.TarFile) -> None:
    member = tarfile.TarInfo(entry.name)
    if entry.target is not None:
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, entry.target, 0o777
        tar.addfile(member)
    elif stat.S_ISDIR(entry.info.st_mode):
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
    else:
        member.size = entry.size
        member.mode = 0o755 if entry.info.st_mode & stat.S_IXUSR else 0o644
        with entry.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != entry.size:
                raise InvalidProject(f"{entry.name} changed while it was packed; try again")
            tar.addfile(member, file)


def _entries(folder: Path, selection: UploadFiles | StoredFiles) -> list[_Entry]:
    root = Path(os.path.realpath(folder))
    entries: list[_Entry] = []
    errors: list[str] = []
    total = 0
    found = _walk(root, selection)
    for path, name, info in found:
        target = None
        if stat.S_ISLNK(info.st_mode):
            target = _target(root, path)
            if target is None:
                errors.append(f"{name}: a link to {path.readlink()}, outside of the project")
        elif not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
            errors.append(f"{name}: {_kind(info.st_mode)}, which cannot be packed")
        entries.append(_Entry(path, name, info, target))
        total += entries[-1].size
        is_too_large = total > MAX_PROJECT_BYTES or len(entries) > MAX_PROJECT_FILES
        if is_too_large and isinstance(selection, UploadFiles):
            rest: list[_Entry] = []
            with suppress(OSError):  # the project is refused anyway
                rest += (_Entry(*each) for each in islice(found, _MAX_MEASURED))
            raise InvalidProject(_too_large(folder, [*entries, *rest], total))
        if len(errors) == _MAX_SHOWN:
            break
    if errors:
        advice = f"remove them, or list them in {IGNORE_FILE}"
        raise InvalidProject("\n".join([*errors, f"({advice})"]))
    return entries


def _walk(
    root: Path, selection: UploadFiles | StoredFiles
) -> Iterator[tuple[Path, str, os.stat_result]]:
    """The project's files, links and folders, sorted, a folder before its content."""
    pending = [("", root)]
    while pending:
        prefix, folder = pending.pop()
        if prefix:
            yield folder, prefix[:-1], folder.lstat()
        below: list[tuple[str, Path]] = []
        with os.scandir(folder) as scanned:
            found = sorted(scanned, key=lambda entry: os.fsencode(entry.name))
        for entry in found:
            name = prefix + entry.name
            if not selection.includes(name, entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                below.append((f"{name}/", folder / entry.name))
            else:
                yield folder / entry.name, name, entry.stat(follow_symlinks=False)
        pending += reversed(below)


def _target(root: Path, link: Path) -> str | None:
    """The target of a link as a relative path that does not leave the project; None for a target
    outside."""
    real = Path(os.path.realpath(link))
    if not real.is_relative_to(root):
        return None
    target = str(link.readlink())
    normal = os.path.normpath(link.parent.relative_to(root) / target)
    if not Path(target).is_absolute() and normal.split("/")[0] != "..":
        return target
    return os.path.relpath(real, os.path.realpath(link.parent))


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISSOCK, "a socket"), (stat.S_ISFIFO, "a named pipe"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


def _too_large(folder: Path, entries: list[_Entry], total: int) -> str:
    named = _largest(entries, by_size=total > MAX_PROJECT_BYTES)
    listed = "".join(f"\n  {name} ({_amount(size, files)})" for name, size, files in named)
    limits = f"{MAX_PROJECT_BYTES >> 20} MiB or {MAX_PROJECT_FILES:,} files"
    example = "".join(f"\n  /{name}" for name, _, _ in named)
    return (
        f"the project in {folder.absolute()} is over {limits}; the largest in it:{listed}\n"
        f"list what jobs do not need in {IGNORE_FILE} beside cortex.yaml (the syntax of "
        f".gitignore), for example:{example}\n"
        "or move cortex.yaml into a folder of its own; store large data where jobs can read it from"
    )


def _largest(entries: list[_Entry], *, by_size: bool) -> list[tuple[str, int, int]]:
    """The largest files and folders, each with its bytes and its number of files. A folder is
    replaced by its content if it makes up most of the project and something in it makes up much of
    the folder."""
    sizes: dict[str, tuple[int, int]] = {}
    folders = {f"{entry.name}/" for entry in entries if stat.S_ISDIR(entry.info.st_mode)}
    below: dict[str, set[str]] = {}
    for entry in entries:
        child = entry.name
        if f"{child}/" in folders:
            continue
        sizes[child] = (entry.size, 1)
        while child:
            head = child.removesuffix("/").rpartition("/")[0]
            parent = f"{head}/" if head else ""
            below.setdefault(parent, set()).add(child)
            size, files = sizes.get(parent, (0, 0))
            sizes[parent] = (size + entry.size, files + 1)
            child = parent

    def measure(name: str) -> int:
        return sizes[name][0 if by_size else 1]

    def is_expanded(name: str) -> bool:
        is_main = name in below and measure(name) >= _MAIN_SHARE * measure("")
        return is_main and max(map(measure, below[name])) >= _LARGE_SHARE * measure(name)

    names = below.get("", set())
    while expanded := {name for name in names if is_expanded(name)}:
        names = (names - expanded).union(*(below[name] for name in expanded))
    largest = sorted(names, key=lambda name: (-measure(name), name))[:_MAX_NAMED]
    return [(name, *sizes[name]) for name in largest]


def _amount(size: int, files: int) -> str:
    count = f", {files:,} files" if files > 1 else ""
    return f"{size / (1 << 20):.1f} MiB{count}"
