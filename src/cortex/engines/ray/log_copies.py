"""The operator's copies of the logs on nodes, which grow with the originals.

A log is therefore read, followed and archived in the same way wherever its job ran, and it outlives
its node. The Ray engine calls it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cortex.engines.ray.messages import LogPiece
from cortex.worker import checks, files
from cortex.worker.messages import LogCut
from cortex.worker.supervisor import logfile


class LogCopies:
    """The copies below one folder, `<root>/<job_id>/log`.

    A copy begins with the output of the job's earlier attempts, up to the offset `base`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def path(self, job_id: str) -> Path:
        return self._root / job_id / logfile.NAME

    def size(self, job_id: str) -> int:
        try:
            return self.path(job_id).stat().st_size
        except FileNotFoundError:
            return 0

    def offset(self, job_id: str, base: int) -> int:
        """The offset in the node's log of the next piece to copy.

        It is 0 if the copy is shorter than `base`, as after a failed `take_up`.
        """
        return max(0, self.size(job_id) - base)

    def prepare(self, job_id: str) -> int:
        """Make the folder of a job; return the size of the copy."""
        self.path(job_id).parent.mkdir(0o700, parents=True, exist_ok=True)
        return self.size(job_id)

    def take_up(self, job_id: str, base: int) -> None:
        """Continue a copy.

        Its beginning, up to `base`, may be lost with the machine of an earlier operator. A message
        of the same length then replaces it.
        """
        size = self.prepare(job_id)
        if size < base:
            room = base - size - 1
            words = (
                f"[cortex: {base - size} bytes of the log were lost with the operator's machine]"
            )
            with self.path(job_id).open("ab") as file:
                file.write(f"{words[:room]:{room}}\n".encode())

    def touch(self, job_id: str) -> None:
        self.path(job_id).touch()

    def write(self, job_id: str, base: int, piece: LogPiece) -> None:
        """Write a piece at its offset in the node's log. Blocks for a short time.

        Raises:
            OSError: the disk cannot be written now; the caller may write the same piece again.
        """
        self.take_up(job_id, base)
        if piece.cut is not None:
            self._cut(job_id, base, piece.cut)
        fd = os.open(self.path(job_id), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.seek(base + piece.offset)
            file.write(piece.data)
            if piece.end > piece.offset + len(piece.data):
                file.truncate(base + piece.end)  # the node's log has a gap there

    def append(self, job_id: str, text: str) -> None:
        self.prepare(job_id)
        with self.path(job_id).open("a", encoding="utf-8") as file:
            file.write(text.rstrip("\n") + "\n")

    def _cut(self, job_id: str, base: int, record: bytes) -> None:
        cut = LogCut.loads(record)
        folder = files.open_folder(str(self.path(job_id).parent))
        try:
            known = files.read(folder, logfile.CUT)
            start = base + cut.start
            if known:  # a log has one gap: that of an earlier attempt grows
                with contextlib.suppress(checks.Invalid):
                    start = min(start, LogCut.loads(known).start)
            moved = LogCut(start=start, end=base + cut.end, limit=cut.limit).dumps()
            if known != moved:
                files.put(folder, logfile.CUT, moved)
                fd = os.open(self.path(job_id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                logfile.punch(fd, start, base + cut.end)
                os.close(fd)
        finally:
            os.close(folder)
