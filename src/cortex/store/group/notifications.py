"""What other operators of a PostgreSQL database change, told as it is committed: LISTEN, on a session of
its own. Opened by `OperatorGroup.listen`.

Nothing is told that happens while the session is lost. So whoever listens is told that too, once it is
there again, and looks at everything.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import structlog
from sqlalchemy import Engine

from cortex.store import postgresql

if TYPE_CHECKING:
    import psycopg

log = structlog.get_logger()

_LISTEN = "LISTEN cortex_jobs; LISTEN cortex_apis; LISTEN cortex_term"
_AGAIN_S = 0.2
_LOOK_S = 10  # the other side of a broken network says nothing
_PATIENCE_S = 5


class ChangeListener(Protocol):
    """Who is told, on the event loop: of its own changes, too."""

    def on_job_changed(self, job_id: str, *, own: bool) -> None:
        """A job was submitted, or is in another state, or wanted otherwise.

        Args:
            own: whether a session of the same name changed it.
        """

    def on_apis_changed(self) -> None:
        """Something was deployed or deleted."""

    def on_leader_changed(self) -> None:
        """Another operator drives."""

    def on_all_may_have_changed(self) -> None:
        """Something may have been missed."""


class ChangeFeed:
    """All of it happens on the event loop."""

    def __init__(self, engine: Engine, name: str, hearer: ChangeListener) -> None:
        self._engine = engine
        self._name = name
        self._hearer = hearer
        self._listens = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin; from here on nothing is missed that `ChangeListener` is not told of."""
        self._task = asyncio.create_task(self._run(), name="changes")
        listens = asyncio.create_task(self._listens.wait())
        await asyncio.wait({self._task, listens}, return_when=asyncio.FIRST_COMPLETED)
        listens.cancel()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        from psycopg import Error

        is_lost = False
        while True:
            try:
                session = await postgresql.session(self._engine, self._name)
                try:
                    await session.execute(_LISTEN)
                    self._listens.set()
                    is_lost = False
                    self._hearer.on_all_may_have_changed()
                    await self._listen(session)
                finally:
                    await session.close()
            except (Error, OSError, TimeoutError) as error:
                if not is_lost:
                    log.warning("others' changes are not heard now", error=str(error).strip())
                is_lost = True
                await asyncio.sleep(_AGAIN_S)

    async def _listen(self, session: psycopg.AsyncConnection) -> None:
        while True:
            async for told in session.notifies(timeout=_LOOK_S):
                self._tell(told.channel, told.payload)
            async with asyncio.timeout(_PATIENCE_S):
                await session.execute("SELECT 1")

    def _tell(self, channel: str, payload: str) -> None:
        if channel == "cortex_jobs":
            job_id, _, name = payload.partition(" ")
            self._hearer.on_job_changed(job_id, own=name == self._name)
        elif channel == "cortex_apis":
            self._hearer.on_apis_changed()
        else:
            self._hearer.on_leader_changed()
