"""A small disk of its own that can be filled, made read-only and mended: a tmpfs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 1 << 20


class Disk:
    """A mounted file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / ".filler"

    def fill(self) -> None:
        """Take all the room there is."""
        size = _BLOCK
        with self._filler.open("ab", buffering=0) as file:
            while size:
                try:
                    file.write(b"x" * size)
                except OSError:
                    size //= 2

    def empty(self) -> None:
        """Give the room back."""
        self._filler.unlink()

    def remount(self, options: str) -> None:
        _as_root("mount", "-o", f"remount,{options}", str(self.folder))


@contextmanager
def mounted(folder: Path, options: str = "size=48m") -> Iterator[Disk]:
    """A new disk at a folder, for as long as the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    _as_root("mount", "-t", "tmpfs", "-o", f"{options},mode=777", "tmpfs", str(folder))
    try:
        yield Disk(folder)
    finally:
        _unmount(folder)


def _unmount(folder: Path) -> None:
    for _ in range(100):
        if subprocess.run([*_root(), "umount", str(folder)], check=False).returncode == 0:
            return
        time.sleep(0.1)  # a process of the last job may be about to end
    raise AssertionError(f"{folder} is still in use")


def _as_root(*command: str) -> None:
    subprocess.run([*_root(), *command], check=True)


def _root() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-n"]
