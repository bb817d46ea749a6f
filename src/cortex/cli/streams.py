"""Standard input, output and error of the command. Each may be closed, full or without a reader.

A failed write to standard output is an error of the command. A failed write to standard error is
dropped: there is no place left to report it.
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


def set_up() -> None:
    """Make the streams usable. Called once, at the start of the process."""
    # Otherwise the next file or connection would get the number of a closed stream. A write to a
    # file that is open for reading fails as a write to a closed one does.
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        if not _is_open(number):
            os.open(os.devnull, mode)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # until the process exits
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Errors(2, "w", closefd=False), sys.stderr)


def discard_output() -> None:
    """Discard what is buffered for standard output and all further writes, which cannot fail any
    more."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


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
            # Another program that shares the pipe or terminal may have made it non-blocking.
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


def _text(raw: io.FileIO, original: TextIO | None) -> io.TextIOWrapper:
    """A text stream with the encoding and buffering of the original one."""
    known = original if isinstance(original, io.TextIOWrapper) else None
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=known.encoding if known else None,
        errors="backslashreplace",
        line_buffering=known.line_buffering if known else False,
        write_through=known.write_through if known else False,
    )
