"""A small disk, a tmpfs, that a test can fill, make read-only and repair."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 1 << 20
_WAIT_TIMEOUT_S = 60


class Disk:
    """A mounted file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / ".filler"

    def fill(self) -> None:
        """Take all free space."""
        size = _BLOCK
        with self._filler.open("ab", buffering=0) as file:
            while size:
                try:
                    file.write(b"x" * size)
                except OSError:
                    size //= 2

    def empty(self) -> None:
        """Free the space that `fill` took."""
        self._filler.unlink()

    def remount(self, options: str) -> None:
        _once_unused("mount", "-o", f"remount,{options}", str(self.folder))


@contextmanager
def mounted(folder: Path, options: str = "size=48m") -> Iterator[Disk]:
    """Mount a new disk at a folder while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    _as_root("mount", "-t", "tmpfs", "-o", f"{options},mode=777", "tmpfs", str(folder))
    try:
        yield Disk(folder)
    finally:
        _once_unused("umount", str(folder))


def _once_unused(*command: str) -> None:
    """Retry a command while a process of the last job still ends or closes its files."""
    until = time.monotonic() + _WAIT_TIMEOUT_S
    while subprocess.run([*_root(), *command], check=False).returncode != 0:
        assert time.monotonic() < until, f"still in use: {command}"
        time.sleep(0.1)


def _as_root(*command: str) -> None:
    subprocess.run([*_root(), *command], check=True)


def _root() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-n"]
