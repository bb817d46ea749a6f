"""Which operator of a PostgreSQL database drives its jobs: one, and another as soon as that one dies or
hangs. Opened by `OperatorGroup.campaign`.

Every operator waits for a session-level advisory lock, on a session of its own. The server drops it with
the session, so with the process, and gives it to the next at once. An operator that hangs keeps its
session; so there is a lease as well, in its row, which it renews from its event loop. Whoever waits looks
at it when it ends, by the server's clock, and if it was not renewed ends the sessions of the one that hangs.

A lock is no proof, for its holder learns late that it was lost. What is stored is fenced off by the term
in the holder's row (`member`): to take over is to take that out. So an operator that was superseded stores
nothing that is for the driver alone; it is told when it tries to, or to renew, and goes on without driving.

When the session is lost, as by a restart of the server, the lock is taken again; whoever finds its own
term in its row then has never been away.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import structlog
from sqlalchemy import Connection, Engine, text

from cortex.errors import StorageUnavailable, Superseded
from cortex.spec.times import now_ns
from cortex.store import postgresql
from cortex.store.database import read
from cortex.store.group.member import OperatorRow
from cortex.store.writer import Writer

if TYPE_CHECKING:
    import psycopg

log = structlog.get_logger()

_KEY = 0x636F_7274_6578  # any number that nobody else takes
_AGAIN_S = 0.2
_PATIENCE_S = 1.0  # a session ends shortly after its process
_LEAST_WAIT_S = 0.1
_LOOK_S = 10  # the other side of a broken network says nothing
_RENEWALS = 4  # in the time of a lease

_NOW_NS = "(extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"
_TRY = "SELECT pg_try_advisory_lock(%s)"
_LOCK = "SELECT pg_advisory_lock(%s)"
# A server that does not look would give the lock to one that has died while it waited.
_LOOKS = "SET client_connection_check_interval = '2s'"
_HURRY = "SET lock_timeout = '3s'"
_OURS = "SELECT 1 FROM operators WHERE operator_id = %s AND term = %s"
_TAKE = f"""
UPDATE operators SET
    term = CASE operator_id WHEN %(id)s THEN %(term)s::bigint END,
    until_ns = CASE operator_id WHEN %(id)s THEN {_NOW_NS} + %(length_ns)s END
WHERE operator_id = %(id)s OR term IS NOT NULL
"""
_TELL = "SELECT pg_notify('cortex_term', '')"
_SESSIONS_OF_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity JOIN operators
    ON application_name LIKE 'cortex ' || operator_id || ' %%'
WHERE datname = current_database() AND term IS NOT NULL AND operator_id <> %s
"""
_RENEW = text(f"UPDATE operators SET until_ns = {_NOW_NS} + :length_ns WHERE operator_id = :id")
_HOLDER = text(
    f"SELECT pid, application_name AS name, (SELECT until_ns - {_NOW_NS} FROM operators "
    "WHERE term IS NOT NULL AND application_name LIKE 'cortex ' || operator_id || ' %') AS left_ns "
    "FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE locktype = 'advisory' AND granted AND objsubid = 1 "
    "AND ((classid::bigint << 32) | objid::bigint) = :key "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
_END_SESSION = text("SELECT pg_terminate_backend(:pid)")
_END_SESSIONS = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = :name"
)


class LeaderCallbacks(Protocol):
    """Who drives while it holds the lease. Called on the event loop, one after the other."""

    async def drive(self) -> None:
        """Begin to drive.

        Raises:
            StartupError: it never can, as it is set up.
            StorageUnavailable: not now.
        """

    async def step_down(self) -> None:
        """Stop driving; also where `drive` came to nothing."""

    def failed(self, error: Exception) -> None:
        """It can never drive: the operator has to end."""


class Election:
    """All of it happens on the event loop."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        member: OperatorRow,
        writer: Writer,
        candidate: LeaderCallbacks,
        length_s: float,
    ) -> None:
        """
        Args:
            name: of this operator's sessions.
            length_s: after which an operator that hangs is taken not to drive any more.
        """
        self._engine = engine
        self._name = name
        self._member = member
        self._writer = writer
        self._candidate = candidate
        self._length_s = length_s
        self._is_settled = asyncio.Event()
        self._turn = asyncio.Lock()  # of those that begin and end terms
        self._tasks: list[asyncio.Task[None]] = []
        self._renewing: asyncio.Task[None] | None = None
        self._term: int | None = None  # that the candidate was told of
        self._silent: tuple[int, float] | None = None

    async def open(self) -> None:
        """Stand for it; when this returns this operator drives, or another one does."""
        task = asyncio.create_task(self._stand(), name="lease")
        self._tasks.append(task)
        settled = asyncio.create_task(self._is_settled.wait())
        await asyncio.wait({task, settled}, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if task.done():
            task.result()

    async def close(self) -> None:
        """Step down, if this operator drives."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._step_down()

    def superseded(self, term: int) -> None:
        """A write was refused: that term is over."""
        if self._member.term == term:
            self._member.term = None  # nothing of it is tried any more
            task = asyncio.create_task(self._end_term(term), name="step down")
            self._tasks.append(task)

    async def _stand(self) -> None:
        from psycopg import Error

        is_lost = False
        while True:
            try:
                session = await postgresql.session(self._engine, self._name)
                is_lost = False
                try:
                    await self._lock(session)
                    if not await self._goes_on(session):
                        await self._begin_term(session)
                    self._is_settled.set()
                    await self._watch(session)
                finally:
                    await session.close()
            except (Error, OSError, TimeoutError, StorageUnavailable) as error:
                if not is_lost:
                    log.warning("the store's lock cannot be had now", error=str(error).strip())
                is_lost = True
            except Exception as error:
                if self._is_settled.is_set():  # else `open` tells
                    self._candidate.failed(error)
                raise
            await asyncio.sleep(_AGAIN_S)

    # The lock

    async def _lock(self, session: psycopg.AsyncConnection) -> None:
        """Wait for it, and see to it that who holds it drives."""
        import psycopg

        with suppress(psycopg.Error):  # one that is too old, or whose system has no way to look
            await session.execute(_LOOKS)
        found = await (await session.execute(_TRY, [_KEY])).fetchone()
        if found == (True,):
            return
        waiting = asyncio.ensure_future(session.execute(_LOCK, [_KEY]))
        try:
            wait_s = _PATIENCE_S
            while not (await asyncio.wait({waiting}, timeout=wait_s))[0]:
                wait_s = await self._look_at_holder()
                self._is_settled.set()
            waiting.result()
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    async def _look_at_holder(self) -> float:
        """End the sessions of one that holds the lock and does not drive; for how long to wait else."""
        try:
            return await asyncio.to_thread(read, self._engine, self._judge)
        except StorageUnavailable:
            return _PATIENCE_S

    def _judge(self, connection: Connection) -> float:
        holder = connection.execute(_HOLDER, {"key": _KEY}).first()
        if holder is None or holder.name is None:
            return _PATIENCE_S
        if holder.name == self._name:
            # Ours, of before the session was lost: the server does not know that yet.
            connection.execute(_END_SESSION, {"pid": holder.pid})
            return _PATIENCE_S
        now_s = time.monotonic()
        left_s = None if holder.left_ns is None else holder.left_ns / 1e9
        if left_s is None:  # it has just got the lock, or hangs right there
            if self._silent is None or self._silent[0] != holder.pid:
                self._silent = (holder.pid, now_s)
            left_s = self._silent[1] + self._length_s - now_s
        if left_s > 0:
            return max(_LEAST_WAIT_S, min(left_s, self._length_s))
        log.warning("the operator that drives hangs: it is superseded", operator=holder.name)
        connection.execute(_END_SESSIONS, {"name": holder.name})
        return _PATIENCE_S

    async def _watch(self, session: psycopg.AsyncConnection) -> None:
        """Until the session is lost, or the term."""
        while self._member.term is not None:
            async for _ in session.notifies(timeout=_LOOK_S):
                pass  # nothing is listened to: what comes is the session's end
            async with asyncio.timeout(_LOOK_S / 2):
                await session.execute("SELECT 1")

    # Terms

    async def _goes_on(self, session: psycopg.AsyncConnection) -> bool:
        """Whether the term of before the session was lost is still the one."""
        term = self._member.term
        if term is None:
            return False
        found = await session.execute(_OURS, [self._member.id, term])
        return await found.fetchone() is not None and self._member.term == term

    async def _begin_term(self, session: psycopg.AsyncConnection) -> None:
        async with self._turn:
            await self._step_down()
            term = now_ns()
            await self._take(session, term)
            self._member.term = self._term = term
            self._renewing = asyncio.create_task(self._renew(term), name="renew the lease")
            log.info("drives the jobs of the store", term=term)
            try:
                await self._candidate.drive()
            except BaseException:
                await self._step_down()
                raise

    async def _take(self, session: psycopg.AsyncConnection, term: int) -> None:
        from psycopg.errors import LockNotAvailable

        values = {"id": self._member.id, "term": term, "length_ns": int(self._length_s * 1e9)}
        await session.execute(_HURRY)
        while True:
            try:
                await session.execute(_TAKE, values)
                break
            except LockNotAvailable:  # a transaction of one that hangs
                await session.execute(_SESSIONS_OF_OTHERS, [self._member.id])
        await session.execute(_TELL)

    async def _renew(self, term: int) -> None:
        values = {"id": self._member.id, "length_ns": int(self._length_s * 1e9)}
        while True:
            await asyncio.sleep(self._length_s / _RENEWALS)
            try:
                await self._writer.run(lambda c: c.execute(_RENEW, values).rowcount, term)
            except StorageUnavailable as error:
                if isinstance(error, Superseded):
                    self.superseded(term)
                    return

    async def _end_term(self, term: int) -> None:
        async with self._turn:
            if self._term == term:
                log.warning("another operator drives the jobs now; this one goes on without")
                await self._step_down()

    async def _step_down(self) -> None:
        self._member.term = self._term = None
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
            self._renewing = None
        await self._candidate.step_down()
