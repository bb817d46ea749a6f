"""Counts requests refused for their token, and writes the counts to the audit.

Anyone can send requests without a token. Equal refusals are therefore counted together, and the
number of entries is limited however many requests are refused. Called by `auth`; closed by the app.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from cortex.errors import StorageUnavailable
from cortex.spec.audit import Action, Actor, AuditEntry
from cortex.spec.times import now_ns
from cortex.store import Store

log = structlog.get_logger()

_FIRST_WRITE_DELAY_S = 1.0
_WRITE_INTERVAL_S = 60.0
MAX_KINDS = 50
"""Entries per minute. Refusals of further callers are counted together, without their addresses."""
_FURTHER_CALLERS = Actor(None, "others")


@dataclass
class _Count:
    time_ns: int
    count: int = 0


class Refusals:
    """The refusals of one operator that requires tokens."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counts: dict[tuple[Actor, str], _Count] = {}
        self._writer: asyncio.Task[None] | None = None

    def add(self, actor: Actor, method: str, kind: str) -> None:
        """Count a refused request.

        Args:
            kind: the kind of the error that the client received.
        """
        key = (actor, f"{method}: {kind}")
        if key not in self._counts and len(self._counts) >= MAX_KINDS:
            key = (_FURTHER_CALLERS, kind)
        self._counts.setdefault(key, _Count(now_ns())).count += 1
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_periodically())

    async def close(self) -> None:
        """Write the remaining counts."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._write()

    async def _write_periodically(self) -> None:
        await asyncio.sleep(_FIRST_WRITE_DELAY_S)
        while self._counts:
            await self._write()
            await asyncio.sleep(_WRITE_INTERVAL_S)
        self._writer = None

    async def _write(self) -> None:
        counts, self._counts = self._counts, {}
        entries = [
            AuditEntry(Action.REFUSE, actor, each.time_ns, message=message, count=each.count)
            for (actor, message), each in counts.items()
        ]
        if not entries:
            return
        try:
            await self._store.add_to_audit(entries)
        except StorageUnavailable as error:
            log.warning("cannot write refused requests to the audit", error=str(error))
