"""A workspace as an overlay: a file system that shows the project, and keeps each change in a folder of its own. It is
mounted at the project's path, in a mount namespace of the supervising process alone: absolute paths are private
too, and nothing is mounted any more once that process is gone, however it ended. It takes CAP_SYS_ADMIN.
"""

from __future__ import annotations

import ctypes
import os
import select
import stat

from cortex.worker import files, trees
from cortex.worker.processes import libc

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_SLAVE = 0x4000, 1 << 19
_MNT_DETACH = 2
# `MS_NOSUID` and the others have the values of `ST_NOSUID` and the others.
_KEPT_FLAGS = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
# With `redirect_dir`, a folder of the project can be renamed as anywhere else. With `metacopy`, a file whose mode has
# been changed would be kept without its content; `volatile` spares a sync of the whole disk at each unmount.
_OPTIONS = "redirect_dir=on,metacopy=off,index=off,xino=off,volatile"
_OLD_OPTIONS = _OPTIONS.removesuffix(",volatile")  # of Linux before 5.10


class Overlay:
    """Of one supervising process, which is in a mount namespace of its own from then on."""

    __slots__ = (
        "_folder",
        "_is_first",
        "_lower",
        "_made",
        "_mounts",
        "_options",
        "_poller",
        "_upper",
        "project",
    )

    def __init__(self, project: str, folder: str) -> None:
        """
        Raises:
            OSError: this process may not have a mount namespace.
        """
        self.project = project
        self._folder = folder
        self._is_first = True
        self._upper = -1
        self._made: tuple[int, ...] = ()
        self._options = _OPTIONS
        _check(libc.unshare(_CLONE_NEWNS), "unshare")
        # What the machine mounts later is seen here; what is mounted here is seen nowhere else.
        _mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
        self._lower = files.open_folder(project)  # the kernel takes it from this namespace alone
        self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._mounts, select.POLLPRI)

    @classmethod
    def mounted(cls, project: str, folder: str) -> Overlay | None:
        """One that works, or None."""
        try:
            made = cls(project, folder)
        except OSError:
            return None
        try:
            made.make()
        except OSError:
            made.close()
            return None
        return made

    @property
    def files(self) -> tuple[int, ...]:
        """Descriptors that no job may have."""
        return (self._lower, self._mounts, *(() if self._upper < 0 else (self._upper,)))

    def project_time(self) -> int:
        """When the project was last deployed, or mended."""
        return os.fstat(self._lower).st_mtime_ns

    def make(self) -> None:
        """Mount it anew, with nothing changed."""
        self._unmount()
        upper, work = self._changes, self._work
        os.mkdir(upper, 0o700)
        if (
            self._is_first
        ):  # else it is as the last mount left it: each new folder may cost a millisecond
            os.mkdir(work, 0o700)
            self._is_first = False
        # Its owner and mode are those that the project's folder is seen with.
        about = os.fstat(self._lower)
        os.chown(upper, about.st_uid, about.st_gid)
        os.chmod(upper, stat.S_IMODE(about.st_mode))
        self._upper = files.open_folder(upper)
        fd = files.open_folder(work)
        try:
            self._mount(fd)
        finally:
            os.close(fd)
        self._poller.poll(0)
        self._made = self._state()

    def is_untouched(self) -> bool:
        """Whether no job has changed anything: each first change makes an entry, or is one of the folder itself."""
        return self._state() == self._made and not os.listdir(self._upper)

    def is_sound(self) -> bool:
        """Whether what is mounted here is what was: a job may have mounted or unmounted something."""
        return not self._poller.poll(0)

    def move_changes(self, folder: int) -> None:
        """Move what was made or changed into a job's folder.

        Raises:
            OSError: it could not be moved.
        """
        upper = self._changes
        if _drop_marks(upper):
            trees.clear_kept(folder, f"{self._folder}/before")
            os.rename(upper, trees.KEPT, dst_dir_fd=folder)

    def close(self) -> None:
        self._unmount()
        for fd in (self._lower, self._mounts):
            os.close(fd)

    @property
    def _changes(self) -> str:
        return f"{self._folder}/upper"

    @property
    def _work(self) -> str:
        return f"{self._folder}/work"

    def _state(self) -> tuple[int, ...]:
        about = os.fstat(self._upper)
        return about.st_mode, about.st_uid, about.st_gid, about.st_mtime_ns, about.st_ctime_ns

    def _mount(self, work: int) -> None:
        flags = os.fstatvfs(self._lower).f_flag & _KEPT_FLAGS
        while True:
            # By descriptors: in the options a comma or a colon of a path would have a meaning.
            layers = (
                f"lowerdir={_path(self._lower)},upperdir={_path(self._upper)},workdir={_path(work)}"
            )
            try:
                options = f"{layers},{self._options}".encode()
                _mount(b"overlay", os.fsencode(self.project), b"overlay", flags, options)
            except OSError:
                if self._options == _OLD_OPTIONS:
                    raise
                self._options = _OLD_OPTIONS
            else:
                return

    def _unmount(self) -> None:
        if self._upper < 0:
            return
        if self._made:
            _check(libc.umount2(os.fsencode(self.project), _MNT_DETACH), "umount2")
        os.close(self._upper)
        self._upper, self._made = -1, ()
        trees.remove(self._changes)
        # The kernel's mark of `volatile`, which forbids another mount with this folder.
        trees.remove(f"{self._work}/work/incompat")


def _drop_marks(upper: str) -> bool:
    """Remove what marks a deleted file, and byte code; whether there is anything else."""
    folders = [upper]
    for folder in folders:  # which grows meanwhile
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError:
            continue  # too deep to open: there are no marks in what the job alone has made
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                if entry.name == trees.BYTE_CODE:
                    trees.remove(entry.path)
                else:
                    folders.append(entry.path)
            elif not entry.is_file(follow_symlinks=False) and not entry.is_symlink():
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISCHR(about.st_mode) and about.st_rdev == 0:
                    os.unlink(entry.path)
    return bool(os.listdir(upper))


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _mount(
    source: bytes, target: bytes, kind: bytes | None, flags: int, options: bytes | None
) -> None:
    _check(libc.mount(source, target, kind, ctypes.c_ulong(flags), options), "mount")


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
