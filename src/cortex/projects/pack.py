"""A project's folder as a gzip tar stream: what the client uploads.

All files but those that `ignored` leaves out. The same files give the same bytes. Sizes are summed before
anything is read, so that a `cortex.yaml` that lies in a home folder by accident is refused soon.
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
from cortex.projects.ignored import IGNORE_FILE, Chosen, Everything

MAX_PROJECT_BYTES = 100 << 20
MAX_PROJECT_FILES = 20_000
_MOST_SHOWN = 20
# Of a project over the limits, as many more are weighed to name what is large in it.
_MAX_WEIGHED = 20_000
_MAX_NAMED = 5
_IS_MOST, _IS_MUCH = 0.5, 0.2


@dataclass(frozen=True)
class PackSummary:
    """What was packed: how many files and links, and the sum of their sizes; and what was left out that its author
    may miss, in words."""

    files: int
    bytes: int
    left_out: str | None = None


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
    with _refusals():
        chosen = Chosen(folder)
        files, size = _pack(folder, chosen, out)
    return PackSummary(files, size, chosen.left_out())


def pack_kept(folder: Path, out: IO[bytes]) -> None:
    """Write a project to `out` that was packed and unpacked before: nothing is chosen again.

    Raises:
        InvalidProject: as `pack` does.
    """
    with _refusals():
        _pack(folder, Everything(), out)


@contextmanager
def _refusals() -> Iterator[None]:
    """What the project's own files cause, as errors of ours."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise InvalidProject(f"{os.fsdecode(error.filename)}: {error.strerror}") from error


def _pack(folder: Path, rules: Chosen | Everything, out: IO[bytes]) -> tuple[int, int]:
    entries = _entries(folder, rules)
    with (
        Gzip(out) as zipped,
        tarfile.open(fileobj=zipped, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for entry in entries:
            _write(entry, tar)
    files = [entry for entry in entries if not stat.S_ISDIR(entry.info.st_mode)]
    return len(files), sum(entry.size for entry in files)


class Gzip(gzip.GzipFile):
    """A gzip stream: the same content gives the same bytes."""

    def __init__(self, out: IO[bytes]) -> None:
        """
        Raises:
            OSError: `out` takes no header.
        """
        try:
            super().__init__(filename="", mode="wb", fileobj=out, mtime=0)
        except BaseException:
            # Nothing is left to write: else Python 3.13 prints the error of the finalizer, which tries.
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


def _entries(folder: Path, rules: Chosen | Everything) -> list[_Entry]:
    root = Path(os.path.realpath(folder))
    entries: list[_Entry] = []
    mistakes: list[str] = []
    total = 0
    found = _walk(root, rules)
    for path, name, info in found:
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
            rest: list[_Entry] = []
            with suppress(OSError):  # the project is refused in any case
                rest += (_Entry(*each) for each in islice(found, _MAX_WEIGHED))
            raise InvalidProject(_too_large(folder, [*entries, *rest], total))
        if len(mistakes) == _MOST_SHOWN:
            break
    if mistakes:
        advice = f"remove them, or list them in {IGNORE_FILE}"
        raise InvalidProject("\n".join([*mistakes, f"({advice})"]))
    return entries


def _walk(root: Path, rules: Chosen | Everything) -> Iterator[tuple[Path, str, os.stat_result]]:
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
            if not rules.take(name, entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                below.append((f"{name}/", folder / entry.name))
            else:
                yield folder / entry.name, name, entry.stat(follow_symlinks=False)
        waiting += reversed(below)


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


def _too_large(folder: Path, entries: list[_Entry], total: int) -> str:
    named = _largest(entries, by_size=total > MAX_PROJECT_BYTES)
    listed = "".join(f"\n  {name} ({_amount(size, files)})" for name, size, files in named)
    limits = f"{MAX_PROJECT_BYTES >> 20} MiB or {MAX_PROJECT_FILES:,} files"
    example = "".join(f"\n  /{name}" for name, _, _ in named)
    return (
        f"the project in {folder.absolute()} has over {limits}; the largest in it:{listed}\n"
        f"list what jobs do not need in {IGNORE_FILE} beside cortex.yaml (the syntax of .gitignore), for "
        f"example:{example}\n"
        "or move cortex.yaml into a folder of its own; large data belongs to where jobs read it from"
    )


def _largest(entries: list[_Entry], *, by_size: bool) -> list[tuple[str, int, int]]:
    """The names of what takes most, with its bytes and its number of files. A folder stands for what is in it, but
    where it is most of the project and something in it is much of the folder."""
    weights: dict[str, tuple[int, int]] = {}
    folders = {f"{entry.name}/" for entry in entries if stat.S_ISDIR(entry.info.st_mode)}
    below: dict[str, set[str]] = {}
    for entry in entries:
        child = entry.name
        if f"{child}/" in folders:
            continue
        weights[child] = (entry.size, 1)
        while child:
            head = child.removesuffix("/").rpartition("/")[0]
            parent = f"{head}/" if head else ""
            below.setdefault(parent, set()).add(child)
            size, files = weights.get(parent, (0, 0))
            weights[parent] = (size + entry.size, files + 1)
            child = parent

    def weight(name: str) -> int:
        return weights[name][0 if by_size else 1]

    def is_opened(name: str) -> bool:
        is_most = name in below and weight(name) >= _IS_MOST * weight("")
        return is_most and max(map(weight, below[name])) >= _IS_MUCH * weight(name)

    names = below.get("", set())
    while opened := {name for name in names if is_opened(name)}:
        names = (names - opened).union(*(below[name] for name in opened))
    largest = sorted(names, key=lambda name: (-weight(name), name))[:_MAX_NAMED]
    return [(name, *weights[name]) for name in largest]


def _amount(size: int, files: int) -> str:
    many = f", {files:,} files" if files > 1 else ""
    return f"{size / (1 << 20):.1f} MiB{many}"
