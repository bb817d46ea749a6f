"""The workspace as a copy of the project, for a user who may not mount. Each supervising process
has one copy for all its jobs. The state of each file shows whether a job has changed it; only
changed files are copied again.
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
# The file system does not support copy_file_range, or a container's seccomp filter forbids it.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)
_CLOCK_REALTIME_COARSE = 5
_TICK_S = 0.001


class Copy:
    """The copy of one supervising process."""

    __slots__ = ("_fingerprints", "_folder", "_source", "project")

    def __init__(self, project: str, folder: str) -> None:
        self._source = project
        self._folder = folder
        self.project = f"{folder}/{os.path.basename(project)}"
        self._fingerprints: dict[str, int] = {}  # by path below the project

    private_fds = ()

    def project_time(self) -> int:
        """When the project was last deployed or repaired (its mtime, ns)."""
        return os.stat(self._source).st_mtime_ns

    def make(self) -> None:
        """Make the copy equal to the project. Files that are equal already stay."""
        # A job that leaves its folder through `..` must not be able to write there; root still can.
        os.chmod(self._folder, 0o700)
        self._restore()
        os.chmod(self._folder, 0o500)
        _await_tick()
        self._fingerprints = {}
        self._fingerprints = self._snapshot()

    def is_untouched(self) -> bool:
        """Whether no job has changed the copy."""
        return self._snapshot() == self._fingerprints

    def is_reusable(self) -> bool:
        """Whether the next job can get the copy: always, because `make` repairs it."""
        return True

    def move_changes(self, folder: int) -> None:
        """Move what was made or changed into a job's folder.

        Raises:
            OSError: some changes could not be moved.
        """
        changed = [path for path in self._changed() if trees.BYTE_CODE not in path.split("/")]
        if not changed:
            return
        os.chmod(self._folder, 0o700)
        trees.clear_own_changes(folder, f"{self._folder}/before")
        made: set[str] = set()
        os.mkdir(trees.OWN_CHANGES, 0o755, dir_fd=folder)
        failed: OSError | None = None
        for path in changed:
            try:
                _make_folders(folder, path, made)
                os.rename(self.project + path, trees.OWN_CHANGES + path, dst_dir_fd=folder)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Make the folder of the copy removable."""
        os.chmod(self._folder, 0o700)

    def _changed(self) -> list[str]:
        """The paths that a job has made or changed: files, and folders that the project lacks."""
        found = []
        for path, fingerprint in self._snapshot().items():
            if self._fingerprints.get(path) != fingerprint:
                about = os.lstat(self.project + path)
                if not stat.S_ISDIR(about.st_mode) or path not in self._fingerprints:
                    found.append(path)
        return found

    def _snapshot(self) -> dict[str, int]:
        """The current fingerprint of each path. New folders are not searched."""
        try:
            fingerprints = {"": _fingerprint(os.lstat(self.project))}
        except OSError:
            return {}
        folders = [""]
        for folder in folders:  # the loop extends it
            try:
                entries = self._list_folder(folder, fingerprints[folder])
            except OSError:
                continue  # no longer a folder, or not readable
            for entry in entries:
                path = f"{folder}/{entry.name}"
                about = entry.stat(follow_symlinks=False)
                fingerprints[path] = _fingerprint(about)
                if stat.S_ISDIR(about.st_mode) and (
                    path in self._fingerprints or not self._fingerprints
                ):
                    folders.append(path)
        return fingerprints

    def _list_folder(self, folder: str, fingerprint: int) -> list[os.DirEntry[str]]:
        path = self.project + folder
        if (
            self._fingerprints
            and self._fingerprints[folder] != fingerprint
            and not os.path.islink(path)
        ):
            os.chmod(path, 0o700)  # a job may have changed its mode
        with os.scandir(path) as entries:
            return list(entries)

    def _restore(self) -> None:
        folders = [""]
        for folder in folders:  # the loop extends it
            folders += self._restore_folder(folder)
        # Last, and subfolders first: a folder's mode may lock out its owner.
        for folder in reversed(folders):
            mode = _mode_of(self._source + folder)
            if mode != stat.S_IMODE(os.stat(self.project + folder).st_mode):
                os.chmod(self.project + folder, mode)

    def _restore_folder(self, folder: str) -> list[str]:
        """Make the files of a folder equal to those of the project; its subfolders."""
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
            # Removed from the project meanwhile: byte code has a temporary name at first.
            trees.remove(self.project + path)

    def _is_same(self, entry: os.DirEntry[str], path: str) -> bool:
        """Whether neither the copy of a file nor its source has changed since it was copied."""
        try:
            about = os.lstat(self.project + path)
        except FileNotFoundError:
            return False
        wanted = entry.stat(follow_symlinks=False)
        return self._fingerprints.get(path) == _fingerprint(about) and _visible_state(
            wanted
        ) == _visible_state(about)


def _mode_of(folder: str) -> int:
    """The mode for the copy of a folder. A job may not read it if this user may not."""
    mode = stat.S_IMODE(os.stat(folder).st_mode)
    return mode if os.access(folder, os.R_OK | os.X_OK) else 0


def _make_folder(path: str) -> None:
    """Make a folder that its owner can write in, and replace any other file there."""
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
    """Make the parent folders of a path below `OWN_CHANGES`, except those in `made`."""
    above = ""
    for name in path.split("/")[1:-1]:
        above = f"{above}/{name}"
        if above not in made:
            os.mkdir(trees.OWN_CHANGES + above, 0o755, dir_fd=folder)
            made.add(above)


def _fingerprint(about: os.stat_result) -> int:
    """A value that differs between two states of a file: any change by a job changes the ctime."""
    return hash((about.st_ino, about.st_mode, about.st_size, about.st_mtime_ns, about.st_ctime_ns))


def _visible_state(about: os.stat_result) -> tuple[int, int, int]:
    """What is equal for a file and its copy."""
    return about.st_mode, about.st_size, about.st_mtime_ns


def _copy(entry: os.DirEntry[str], target: str) -> None:
    """Copy a file or a link with its mode and times: byte code is valid for one mtime of its source
    only. Other kinds of files are not part of a project."""
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
    """Copy a file's content.

    Returns:
        the mode for the copy. If this user may not read the file, a job may not either.
    """
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
        # If the file system supports it, both files share their blocks until one is written to.
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
    """Wait for the next tick of the clock that kernels before 6.13 stamp changes with. It stands
    still for milliseconds: an immediate change by a job would have the same time as the copy."""
    before = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) == before:
        time.sleep(_TICK_S)
