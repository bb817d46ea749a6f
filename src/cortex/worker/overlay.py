"""The workspace as an overlay file system: it shows the project, and writes all changes to a
separate folder. It is mounted at the project's path, in a mount namespace of the supervising
process alone. Hence absolute paths are private to the job as well, and the kernel removes the mount
when the process ends, however it ends. Requires CAP_SYS_ADMIN.
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
_INHERITED_FLAGS = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
# `redirect_dir` allows renaming a folder of the project. With `metacopy`, a file whose mode was
# changed would be stored without its content. `volatile` avoids a sync of the whole disk at each
# unmount.
_OPTIONS = "redirect_dir=on,metacopy=off,index=off,xino=off,volatile"
_OLD_OPTIONS = _OPTIONS.removesuffix(",volatile")  # of Linux before 5.10


class Overlay:
    """The overlay of one supervising process, which it moves into a new mount namespace."""

    __slots__ = (
        "_folder",
        "_initial_state",
        "_is_first",
        "_lower",
        "_mountinfo",
        "_options",
        "_poller",
        "_upper",
        "project",
    )

    def __init__(self, project: str, folder: str) -> None:
        """
        Raises:
            OSError: this process may not create a mount namespace.
        """
        self.project = project
        self._folder = folder
        self._is_first = True
        self._upper = -1
        self._initial_state: tuple[int, ...] = ()
        self._options = _OPTIONS
        _raise_on_error(libc.unshare(_CLONE_NEWNS), "unshare")
        # Later mounts of the machine appear here; mounts of this process appear nowhere else.
        _mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
        self._lower = files.open_folder(
            project
        )  # opened in this namespace: the kernel accepts no other
        self._mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._mountinfo, select.POLLPRI)

    @classmethod
    def mounted(cls, project: str, folder: str) -> Overlay | None:
        """A mounted overlay, or None if this machine does not allow one."""
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
    def private_fds(self) -> tuple[int, ...]:
        """File descriptors that a job must not have."""
        return (self._lower, self._mountinfo, *(() if self._upper < 0 else (self._upper,)))

    def project_time(self) -> int:
        """When the project was last deployed or repaired (its mtime, ns)."""
        return os.fstat(self._lower).st_mtime_ns

    def make(self) -> None:
        """Mount the overlay anew, without changes."""
        self._unmount()
        upper, work = self._changes, self._work
        os.mkdir(upper, 0o700)
        if self._is_first:  # later, the folder is reused: each new folder may cost a millisecond
            os.mkdir(work, 0o700)
            self._is_first = False
        # The overlay shows the project's folder with the owner and mode of the upper folder.
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
        self._initial_state = self._state()

    def is_untouched(self) -> bool:
        """Whether no job has changed anything: a first change makes an entry in the upper folder,
        or changes that folder itself."""
        return self._state() == self._initial_state and not os.listdir(self._upper)

    def is_reusable(self) -> bool:
        """Whether the mounts are unchanged: a job may have mounted or unmounted something."""
        return not self._poller.poll(0)

    def move_changes(self, folder: int) -> None:
        """Move what was made or changed into a job's folder.

        Raises:
            OSError: the changes could not be moved.
        """
        upper = self._changes
        if _drop_whiteouts(upper):
            trees.clear_own_changes(folder, f"{self._folder}/before")
            os.rename(upper, trees.OWN_CHANGES, dst_dir_fd=folder)

    def close(self) -> None:
        self._unmount()
        for fd in (self._lower, self._mountinfo):
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
        flags = os.fstatvfs(self._lower).f_flag & _INHERITED_FLAGS
        while True:
            # As descriptors: a comma or a colon in a path has a meaning in the mount options.
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
        if self._initial_state:
            _raise_on_error(libc.umount2(os.fsencode(self.project), _MNT_DETACH), "umount2")
        os.close(self._upper)
        self._upper, self._initial_state = -1, ()
        trees.remove(self._changes)
        # The kernel's marker of `volatile`, which prevents another mount with this folder.
        trees.remove(f"{self._work}/work/incompat")


def _drop_whiteouts(upper: str) -> bool:
    """Remove byte code and whiteouts, which mark deleted files; False if nothing else is left."""
    folders = [upper]
    for folder in folders:  # the loop extends it
        try:
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError:
            continue  # too deep to open: made by the job, and has no whiteouts
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
    _raise_on_error(libc.mount(source, target, kind, ctypes.c_ulong(flags), options), "mount")


def _raise_on_error(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
