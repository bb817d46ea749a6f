"""Standard input, output and error of the command, each of which may be closed, full or without a reader.

What cannot be written on standard output is an error of the command. What cannot be written on standard
error is dropped: nowhere is left to report it.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


class OutputError(OSError):
    """Standard output cannot be written."""


def settle() -> None:
    """Make the streams usable. Called once, when the process begins."""
    # Else the first file or connection that is opened gets the number of a closed stream. To write on a
    # file that is open for reading fails as on a closed one.
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        if not _is_open(number):
            os.open(os.devnull, mode)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # for as long as the process lives
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Errors(2, "w", closefd=False), sys.stderr)


def discard_output() -> None:
    """Send what is and what will be written on standard output nowhere, so that it fails no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class _Output(io.FileIO):
    def write(self, data: Buffer, /) -> int:
        try:
            return self._write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error

    def _write(self, data: Buffer) -> int:
        while True:
            # A program at the other end of a pipe or terminal may have made it one that does not block.
            written: int | None = super().write(data)
            if written is not None:
                return written
            select.select([], [self], [])


class _Errors(io.FileIO):
    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _text(raw: io.FileIO, before: TextIO | None) -> io.TextIOWrapper:
    was = before if isinstance(before, io.TextIOWrapper) else None
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=was.encoding if was else None,
        errors="backslashreplace",
        line_buffering=was.line_buffering if was else False,
        write_through=was.write_through if was else False,
    )
