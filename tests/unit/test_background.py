"""Work in the background of an event loop."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from cortex.errors import StorageUnavailable
from cortex.system.background import retrying

ERRORS = (StorageUnavailable, OSError)


def test_work_is_repeated_until_it_succeeds() -> None:
    failures = [*[StorageUnavailable("the disk is full")] * 3, OSError("no descriptors")]

    async def work() -> int:
        if failures:
            raise failures.pop(0)
        return 7

    with structlog.testing.capture_logs() as logged:
        result = asyncio.run(retrying(work, ERRORS, delay_s=0, warning="cannot write yet", job="j"))
    assert result == 7
    assert logged == [
        {"event": "cannot write yet", "log_level": "warning", "job": "j", "error": error}
        for error in ("the disk is full", "no descriptors")
    ]


def test_other_errors_are_raised() -> None:
    async def work() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        asyncio.run(retrying(work, ERRORS, delay_s=0, warning="cannot write yet"))


def test_a_retry_waits_for_its_delay_and_can_be_cancelled() -> None:
    attempts = 0

    async def work() -> None:
        nonlocal attempts
        attempts += 1
        raise OSError("never")

    async def main() -> None:
        async with asyncio.timeout(0.05):
            await retrying(work, ERRORS, delay_s=60, warning="cannot write yet")

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert attempts == 1
