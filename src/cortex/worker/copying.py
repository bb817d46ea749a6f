"""A workspace as a copy of the project: for a user who may mount nothing. Each supervising process has one, and all
its jobs find the project there. A look at each file tells whether a job has changed it, and only what a job has
changed is copied again.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from cortex.worker import trees

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_PIECE = 1 << 20
# A file system, or a container's filter of system calls, that knows no copy within the kernel.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
_CLOCK_REALTIME_COARSE = 5
_TICK_S = 0.001


class Copy:
    """Of one supervising process."""

    __slots__ = ("_folder", "_marks", "_source", "project")

    def __init__(self, project: str, folder: str) -> None:
        self._source = project
        self._folder = folder
        self.project = f"{folder}/{os.path.basename(project)}"
        self._marks: dict[str, int] = {}  # of each path below, what it is known by

    files = ()

    def project_time(self) -> int:
        """When the project was last deployed, or mended."""
        return os.stat(self._source).st_mtime_ns

    def make(self) -> None:
        """Make it what the project is, which it may be for the most part."""
        # A job that leaves its folder by `..` finds none that it could write in, unless it is root's.
        os.chmod(self._folder, 0o700)
        self._restore()
        os.chmod(self._folder, 0o500)
        _await_tick()
        self._marks = {}
        self._marks = self._look()

    def is_untouched(self) -> bool:
        """Whether no job has changed anything."""
        return self._look() == self._marks

    def is_sound(self) -> bool:
        """Whether the next job can be given it: what is wrong with a copy, `make` repairs."""
        return True

    def move_changes(self, folder: int) -> None:
        """Move what was made or changed into a job's folder.

        Raises:
            OSError: some could not be moved.
        """
        changed = [path for path in self._changed() if trees.BYTE_CODE not in path.split("/")]
        if not changed:
            return
        os.chmod(self._folder, 0o700)
        trees.clear_kept(folder, f"{self._folder}/before")
        made: set[str] = set()
        os.mkdir(trees.KEPT, 0o755, dir_fd=folder)
        failed: OSError | None = None
        for path in changed:
            try:
                _make_folders(folder, path, made)
                os.rename(self.project + path, trees.KEPT + path, dst_dir_fd=folder)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Its folder is about to be removed."""
        os.chmod(self._folder, 0o700)

    def _changed(self) -> list[str]:
        """What a job has made or changed, by paths below: files, and folders that the project does not have."""
        found = []
        for path, mark in self._look().items():
            if self._marks.get(path) != mark:
                about = os.lstat(self.project + path)
                if not stat.S_ISDIR(about.st_mode) or path not in self._marks:
                    found.append(path)
        return found

    def _look(self) -> dict[str, int]:
        """What each path below is known by now; of what the project does not have, only the uppermost."""
        try:
            marks = {"": _mark(os.lstat(self.project))}
        except OSError:
            return {}
        folders = [""]
        for folder in folders:  # which grows meanwhile
            try:
                entries = self._listed(folder, marks[folder])
            except OSError:
                continue  # not a folder any more, or none that may be read
            for entry in entries:
                path = f"{folder}/{entry.name}"
                about = entry.stat(follow_symlinks=False)
                marks[path] = _mark(about)
                if stat.S_ISDIR(about.st_mode) and (path in self._marks or not self._marks):
                    folders.append(path)
        return marks

    def _listed(self, folder: str, mark: int) -> list[os.DirEntry[str]]:
        path = self.project + folder
        if self._marks and self._marks[folder] != mark and not os.path.islink(path):
            os.chmod(path, 0o700)  # a job may have closed it
        with os.scandir(path) as entries:
            return list(entries)

    def _restore(self) -> None:
        folders = [""]
        for folder in folders:  # which grows meanwhile
            folders += self._restored(folder)
        # Last, and what is below first: a folder may be closed to its own owner.
        for folder in reversed(folders):
            mode = _mode_of(self._source + folder)
            if mode != stat.S_IMODE(os.stat(self.project + folder).st_mode):
                os.chmod(self.project + folder, mode)

    def _restored(self, folder: str) -> list[str]:
        """Let the files of a folder be what they are in the project; the folders in it."""
        source, target = self._source + folder, self.project + folder
        wanted = {}
        if _mode_of(source):
            with os.scandir(source) as entries:
                wanted = {entry.name: entry for entry in entries}
        _make_folder(target)
        for name in os.listdir(target):
            if name not in wanted:
                trees.remove(f"{target}/{name}")
        below = []
        for name, entry in wanted.items():
            path = f"{folder}/{name}"
            if entry.is_dir(follow_symlinks=False):
                below.append(path)
            else:
                self._restore_file(entry, path)
        return below

    def _restore_file(self, entry: os.DirEntry[str], path: str) -> None:
        try:
            if not self._is_same(entry, path):
                trees.remove(self.project + path)
                _copy(entry, self.project + path)
        except FileNotFoundError:
            if os.path.lexists(entry.path):
                raise
            # Byte code that is compiled ahead meanwhile has another name until it is whole.
            trees.remove(self.project + path)

    def _is_same(self, entry: os.DirEntry[str], path: str) -> bool:
        """Whether the copy of a file is as it was made, and the project's file is as it was then."""
        try:
            about = os.lstat(self.project + path)
        except FileNotFoundError:
            return False
        wanted = entry.stat(follow_symlinks=False)
        return self._marks.get(path) == _mark(about) and _shown(wanted) == _shown(about)


def _mode_of(folder: str) -> int:
    """The mode of a folder's copy: one that this user may not look into, a job may not look into either."""
    mode = stat.S_IMODE(os.stat(folder).st_mode)
    return mode if os.access(folder, os.R_OK | os.X_OK) else 0


def _make_folder(path: str) -> None:
    """Let there be a folder that can be written in."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        about = os.lstat(path)
        if not stat.S_ISDIR(about.st_mode):
            trees.remove(path)
            os.mkdir(path, 0o700)
        elif about.st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(path, 0o700)


def _make_folders(folder: int, path: str, made: set[str]) -> None:
    """Make the folders that are above a path below `KEPT`, but for those that are made."""
    above = ""
    for name in path.split("/")[1:-1]:
        above = f"{above}/{name}"
        if above not in made:
            os.mkdir(trees.KEPT + above, 0o755, dir_fd=folder)
            made.add(above)


def _mark(about: os.stat_result) -> int:
    """What tells one state of a file from another: whatever a job does to it, its time of change is another."""
    return hash((about.st_ino, about.st_mode, about.st_size, about.st_mtime_ns, about.st_ctime_ns))


def _shown(about: os.stat_result) -> tuple[int, int, int]:
    """What a file and its copy have in common."""
    return about.st_mode, about.st_size, about.st_mtime_ns


def _copy(entry: os.DirEntry[str], target: str) -> None:
    """Copy a file or a link with its mode and times: byte code is valid for a source of its time. What is neither is
    no part of a project."""
    if entry.is_symlink():
        os.symlink(os.readlink(entry.path), target)
        times = entry.stat(follow_symlinks=False)
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns), follow_symlinks=False)
    elif entry.is_file(follow_symlinks=False):
        about = entry.stat(follow_symlinks=False)
        fd = os.open(target, _WRITE, 0o600)
        try:
            os.fchmod(fd, _fill(fd, entry.path, about))
            os.utime(fd, ns=(about.st_atime_ns, about.st_mtime_ns))
        finally:
            os.close(fd)


def _fill(fd: int, source: str, about: os.stat_result) -> int:
    """Copy a file's content; the mode of the copy. A file that this user may not read, a job may not read either."""
    try:
        read = os.open(source, _READ)
    except PermissionError:
        return 0
    try:
        left = about.st_size
        while left > 0 and (done := _copy_range(read, fd, left)):
            left -= done
    finally:
        os.close(read)
    return stat.S_IMODE(about.st_mode)


def _copy_range(read: int, write: int, count: int) -> int:
    try:
        # Where the file system can, both share their blocks until one of them is written to.
        return os.copy_file_range(read, write, count)
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    data = os.read(read, min(count, _PIECE))
    left = memoryview(data)
    while left:
        left = left[os.write(write, left) :]
    return len(data)


def _await_tick() -> None:
    """Kernels before 6.13 stamp changes with a clock that stands still for milliseconds: what a job does at once would
    have the same time as the copy."""
    before = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) == before:
        time.sleep(_TICK_S)
