"""A log that is read while things happen to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cortex.operator import log_routes


def test_a_log_that_is_removed_while_it_is_read_ends_with_a_line_that_says_so(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * (log_routes._CHUNK_BYTES + 1))

    async def read() -> list[bytes]:
        pieces = []
        async for piece in log_routes._rest(log, 0, log.stat().st_size):
            pieces.append(piece)
            log.unlink(missing_ok=True)
        return pieces

    first, last = asyncio.run(read())
    assert len(first) == log_routes._CHUNK_BYTES
    assert last == b"[cortex: the log was removed while it was read]\n"
