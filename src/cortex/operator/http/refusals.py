"""Refused requests on their way to the audit. Called by `auth`; closed by the app.

Anybody can send requests without a token. So equal ones are counted, and few entries are written however
many there are.
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

_DELAY_S = 1.0
_INTERVAL_S = 60.0
MAX_KINDS = 50
"""Entries of one minute; refusals of further callers are counted in one of them, without their address."""
_OTHERS = Actor(None, "others")


@dataclass
class _Counted:
    time_ns: int
    count: int = 0


class Refusals:
    """One per operator that requires tokens."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._counted: dict[tuple[Actor, str], _Counted] = {}
        self._writing: asyncio.Task[None] | None = None

    def add(self, actor: Actor, method: str, kind: str) -> None:
        """Count a refused request.

        Args:
            kind: of the error that it was answered with.
        """
        key = (actor, f"{method}: {kind}")
        if key not in self._counted and len(self._counted) >= MAX_KINDS:
            key = (_OTHERS, kind)
        self._counted.setdefault(key, _Counted(now_ns())).count += 1
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_again_and_again())

    async def close(self) -> None:
        """Write what is not written yet."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        await self._write()

    async def _write_again_and_again(self) -> None:
        await asyncio.sleep(_DELAY_S)
        while self._counted:
            await self._write()
            await asyncio.sleep(_INTERVAL_S)
        self._writing = None

    async def _write(self) -> None:
        counted, self._counted = self._counted, {}
        entries = [
            AuditEntry(Action.REFUSE, actor, each.time_ns, message=words, count=each.count)
            for (actor, words), each in counted.items()
        ]
        if not entries:
            return
        try:
            await self._store.add_to_audit(entries)
        except StorageUnavailable as error:
            log.warning("refused requests are missing in the audit", error=str(error))
