"""A project's folder as a gzip tar stream: what the client uploads.

All files but dot-files, byte code and what `.cortexignore` excludes; `.env` at the top is included.
The same files give the same bytes. Sizes are summed before anything is read, so that a
`cortex.yaml` that lies in a home folder by accident is refused at once.
"""

from __future__ import annotations

import gzip
import heapq
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pathspec import GitIgnoreSpec

from cortex.errors import InvalidProject

MAX_PROJECT_BYTES = 100 << 20
MAX_PROJECT_FILES = 20_000
IGNORE_FILE = ".cortexignore"
_MOST_SHOWN = 20
_BYTE_CODE = (".pyc", ".pyo")


@dataclass(frozen=True)
class PackSummary:
    """What was packed: how many files and links, and the sum of their sizes."""

    files: int
    bytes: int


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
    try:
        entries = _entries(folder)
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for entry in entries:
                _write(entry, tar)
    except OSError as error:
        if error.filename is None:
            raise
        raise InvalidProject(f"{os.fsdecode(error.filename)}: {error.strerror}") from error
    files = [entry for entry in entries if not stat.S_ISDIR(entry.info.st_mode)]
    return PackSummary(len(files), sum(entry.size for entry in files))


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


def _entries(folder: Path) -> list[_Entry]:
    if not folder.is_dir():
        raise InvalidProject(f"{folder} is not a folder")
    root = Path(os.path.realpath(folder))
    entries: list[_Entry] = []
    mistakes: list[str] = []
    total = 0
    for path, name, info in _walk(root, _ignored(root)):
        target = None
        if stat.S_ISLNK(info.st_mode):
            target = _target(root, path)
            if target is None:
                mistakes.append(f"{name}: a link to {path.readlink()}, outside of the project")
        elif not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
            mistakes.append(f"{name}: {_kind(info.st_mode)}, which cannot be packed")
        entries.append(_Entry(path, name, info, target))
        total += entries[-1].size
        if total > MAX_PROJECT_BYTES or len(entries) > MAX_PROJECT_FILES:
            raise InvalidProject(_too_large(folder, entries))
        if len(mistakes) == _MOST_SHOWN:
            break
    if mistakes:
        advice = f"remove them, or list them in {IGNORE_FILE}"
        raise InvalidProject("\n".join([*mistakes, f"({advice})"]))
    return entries


def _walk(root: Path, ignored: GitIgnoreSpec) -> Iterator[tuple[Path, str, os.stat_result]]:
    """Everything that belongs to the project, sorted, a folder before what is in it."""
    waiting = [("", root)]
    while waiting:
        prefix, folder = waiting.pop()
        if prefix:
            yield folder, prefix[:-1], folder.lstat()
        below: list[tuple[str, Path]] = []
        with os.scandir(folder) as scanned:
            found = sorted(scanned, key=lambda entry: os.fsencode(entry.name))
        for entry in found:
            name = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if _is_left_out(name, entry.name) or ignored.match_file(
                f"{name}/" if is_folder else name
            ):
                continue
            if is_folder:
                below.append((f"{name}/", folder / entry.name))
            else:
                yield folder / entry.name, name, entry.stat(follow_symlinks=False)
        waiting += reversed(below)


def _is_left_out(path: str, name: str) -> bool:
    is_hidden = name.startswith(".") and path != ".env"
    return is_hidden or name == "__pycache__" or name.endswith(_BYTE_CODE)


def _ignored(root: Path) -> GitIgnoreSpec:
    file = root / IGNORE_FILE
    if not file.is_file():
        return GitIgnoreSpec.from_lines([])
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidProject(f"{IGNORE_FILE} is not UTF-8 text; save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError as error:
            found = f"found {line!r}; allowed: a pattern as in .gitignore"
            raise InvalidProject(f"{IGNORE_FILE}:{number}: {found}") from error
    return GitIgnoreSpec.from_lines(lines)


def _target(root: Path, link: Path) -> str | None:
    """Where a link points, relative and by a way inside the project; None if that is outside."""
    real = Path(os.path.realpath(link))
    if not real.is_relative_to(root):
        return None
    target = str(link.readlink())
    within = os.path.normpath(link.parent.relative_to(root) / target)
    if not Path(target).is_absolute() and within.split("/")[0] != "..":
        return target
    return os.path.relpath(real, os.path.realpath(link.parent))


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISSOCK, "a socket"), (stat.S_ISFIFO, "a named pipe"))
    return next((word for is_kind, word in kinds if is_kind(mode)), "a device")


def _too_large(folder: Path, entries: list[_Entry]) -> str:
    largest = heapq.nlargest(5, entries, key=lambda entry: entry.size)
    listed = "".join(f"\n  {e.name} ({e.size / (1 << 20):.1f} MiB)" for e in largest)
    limits = f"{MAX_PROJECT_BYTES >> 20} MiB or {MAX_PROJECT_FILES:,} files"
    return (
        f"the project in {folder.absolute()} has over {limits}; its largest files so far:{listed}\n"
        f"list what jobs do not need in {IGNORE_FILE} (the syntax of .gitignore), "
        "or move cortex.yaml into a folder of its own"
    )
