"""How a job's log gets from its node to the operator: the node's agent reads it in pieces, and the
operator appends the pieces to a copy.

Operators read, follow and archive copies like logs of jobs on their own machine, and a copy
outlives its node.

The agent calls `read_piece`, the Ray engine `LogCopies`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cortex.engines.ray.messages import LogPiece
from cortex.joblog.folders import JobFolders
from cortex.joblog.reader import open_log
from cortex.worker import checks, files
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile

ATTEMPT = "log.attempt"


def read_piece(log: Path, offset: int, size: int, limit: int) -> LogPiece:
    """Up to `size` bytes of a log from an offset on. A piece that reaches the gap ends after it.

    Args:
        limit: the `limits.log` of the API's version.

    Returns:
        The piece; an empty one where no log can be opened.
    """
    try:
        file = open_log(log)
    except OSError:
        file = None
    if file is None:
        return LogPiece(offset, b"", offset, None)
    with contextlib.closing(file):
        part = file.part(offset, size, limit)
    gap, end = part.gap, part.end
    if gap is None:
        return LogPiece(offset, part.data, end, None)
    return LogPiece(offset, part.data, gap.end if gap.start <= end < gap.end else end, gap.dumps())


class LogCopies:
    """The copies below one root, in the layout of `JobFolders`.

    All methods block, and are short. A copy begins with the logs of earlier attempts, up to the
    offset `base`; the log of the attempt's node follows.
    """

    def __init__(self, folders: JobFolders) -> None:
        self.folders = folders

    def size(self, job_id: str) -> int:
        """The size of a copy; 0 where none exists."""
        try:
            return self.folders.log(job_id).stat().st_size
        except FileNotFoundError:
            return 0

    def offset(self, job_id: str, base: int) -> int:
        """The offset in the node's log at which the copy continues; 0 where the copy lacks a part
        of its beginning."""
        return max(0, self.size(job_id) - base)

    def begin(self, job_id: str, attempt: int) -> int:
        """Create the folder of a job, for an attempt that begins.

        Returns:
            The size of the copy so far: the offset `base` of the attempt.
        """
        self.folders.folder(job_id).mkdir(0o700, parents=True, exist_ok=True)
        base = self.size(job_id)
        if attempt > 1:
            self._note(job_id, attempt, base)
        return base

    def recover(self, job_id: str, attempt: int, base: int) -> None:
        """Continue the copy of an attempt that this operator or another one has begun.

        What this operator has copied beyond `base` of an earlier attempt is removed: the other
        operator had copied less of it, and the attempt's own log belongs there.
        """
        if attempt > 1 and not self._is_noted(job_id, attempt, base):
            self.folders.folder(job_id).mkdir(0o700, parents=True, exist_ok=True)
            if self.size(job_id) > base:
                self._truncate(job_id, base)
            self._note(job_id, attempt, base)
        self.resume(job_id, base)

    def resume(self, job_id: str, base: int) -> None:
        """Continue a copy.

        Where its beginning up to `base` was lost with another machine, fill it with a line that
        reports the loss.
        """
        self.folders.folder(job_id).mkdir(0o700, parents=True, exist_ok=True)
        size = self.size(job_id)
        if size < base:
            room = base - size - 1
            notice = (
                f"[cortex: {base - size} bytes of the log were lost with the operator's machine]"
            )
            with self.folders.log(job_id).open("ab") as file:
                file.write(f"{notice[:room]:{room}}\n".encode())

    def touch(self, job_id: str) -> None:
        """Create an empty copy, if none exists."""
        self.folders.log(job_id).touch()

    def write(self, job_id: str, base: int, piece: LogPiece) -> None:
        """Write a piece at its offset in the node's log.

        Raises:
            OSError: the disk accepts no write now; the caller may write the same piece again.
        """
        if base:
            self.resume(job_id, base)
        try:
            self._write(job_id, base, piece)
        except FileNotFoundError:
            self.folders.folder(job_id).mkdir(0o700, parents=True, exist_ok=True)
            self._write(job_id, base, piece)

    def _write(self, job_id: str, base: int, piece: LogPiece) -> None:
        if piece.cut is not None:
            self._cut(job_id, base, piece.cut)
        fd = os.open(self.folders.log(job_id), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.seek(base + piece.offset)
            file.write(piece.data)
            if piece.end > piece.offset + len(piece.data):
                file.truncate(base + piece.end)  # a hole, as in the node's log

    def _truncate(self, job_id: str, size: int) -> None:
        cut = self.folders.cut(job_id)
        with contextlib.suppress(FileNotFoundError, checks.Invalid):
            gap = LogCut.loads(cut.read_bytes())
            if gap.start >= size:
                cut.unlink()
            elif gap.end > size:
                cut.write_bytes(LogCut(start=gap.start, end=size, limit=gap.limit).dumps())
        os.truncate(self.folders.log(job_id), size)

    def _note(self, job_id: str, attempt: int, base: int) -> None:
        """Note whose log the copy has beyond `base`. A copy without a note has that of the first
        attempt."""
        folder = files.open_folder(str(self.folders.folder(job_id)))
        try:
            files.replace(folder, ATTEMPT, f"{attempt} {base}".encode())
        finally:
            os.close(folder)

    def _is_noted(self, job_id: str, attempt: int, base: int) -> bool:
        try:
            note = (self.folders.folder(job_id) / ATTEMPT).read_text()
        except FileNotFoundError:
            return False
        return note == f"{attempt} {base}"

    def _cut(self, job_id: str, base: int, record: bytes) -> None:
        cut = LogCut.loads(record)
        folder = files.open_folder(str(self.folders.folder(job_id)))
        try:
            known = files.read(folder, logfile.CUT)
            start = base + cut.start
            if known:  # a log has one gap: that of an earlier attempt grows
                with contextlib.suppress(checks.Invalid):
                    start = min(start, LogCut.loads(known).start)
            moved = LogCut(start=start, end=base + cut.end, limit=cut.limit).dumps()
            if known != moved:
                files.replace(folder, logfile.CUT, moved)
                fd = os.open(self.folders.log(job_id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                logfile.punch(fd, start, base + cut.end)
                os.close(fd)
        finally:
            os.close(folder)
