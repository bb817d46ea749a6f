"""The change feed: every change that an operator of a PostgreSQL database commits.

It uses LISTEN on a session of its own. Opened by `OperatorGroup.subscribe`.

Notifications that are sent while the session is lost never arrive. The feed then reconnects and
calls `on_all_may_have_changed`, so that the listener reads everything again.
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
_RETRY_DELAY_S = 0.2
_PROBE_INTERVAL_S = 10  # the far side of a broken network sends nothing
_PROBE_TIMEOUT_S = 5


class ChangeListener(Protocol):
    """Called on the event loop for each committed change, including this operator's own."""

    def on_job_changed(self, job_id: str, *, own: bool) -> None:
        """A job was submitted, or its state or its wanted changed.

        Args:
            own: whether a session of this operator made the change.
        """

    def on_apis_changed(self) -> None:
        """An API was deployed or deleted."""

    def on_leader_changed(self) -> None:
        """Another operator became the leader."""

    def on_all_may_have_changed(self) -> None:
        """Notifications may have been missed: the feed has just (re)connected."""


class ChangeFeed:
    """One subscription. Everything happens on the event loop."""

    def __init__(self, engine: Engine, name: str, listener: ChangeListener) -> None:
        """
        Args:
            name: of this operator's sessions.
        """
        self._engine = engine
        self._name = name
        self._listener = listener
        self._is_subscribed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Returns once subscribed. Every later gap is reported by `on_all_may_have_changed`."""
        self._task = asyncio.create_task(self._run(), name="changes")
        subscribed = asyncio.create_task(self._is_subscribed.wait())
        await asyncio.wait({self._task, subscribed}, return_when=asyncio.FIRST_COMPLETED)
        subscribed.cancel()

    async def close(self) -> None:
        """End the subscription."""
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
                    self._is_subscribed.set()
                    is_lost = False
                    self._listener.on_all_may_have_changed()
                    await self._receive(session)
                finally:
                    await session.close()
            except (Error, OSError, TimeoutError) as error:
                if not is_lost:
                    log.warning("change feed disconnected", error=str(error).strip())
                is_lost = True
                await asyncio.sleep(_RETRY_DELAY_S)

    async def _receive(self, session: psycopg.AsyncConnection) -> None:
        while True:
            async for notification in session.notifies(timeout=_PROBE_INTERVAL_S):
                self._dispatch(notification.channel, notification.payload)
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await session.execute("SELECT 1")

    def _dispatch(self, channel: str, payload: str) -> None:
        if channel == "cortex_jobs":
            job_id, _, name = payload.partition(" ")
            self._listener.on_job_changed(job_id, own=name == self._name)
        elif channel == "cortex_apis":
            self._listener.on_apis_changed()
        else:
            self._listener.on_leader_changed()
