"""The election of the leader among the operators of a PostgreSQL database.

Exactly one operator leads, and another takes over as soon as the leader dies or hangs. Opened by
`OperatorGroup.join_election`.

Every operator waits for one session-level advisory lock, on a session of its own. The server
releases the lock when the session ends, thus when the process ends, and grants it to the next
operator at once.

A hanging operator keeps its session. The leader therefore also has a lease: an expiry time in its
row, which it renews from its event loop. A waiting operator reads the lease at its expiry, by the
server's clock. If the leader has not renewed it, the waiting operator ends the leader's sessions.

The lock alone proves nothing, for its holder learns late that it lost the lock. The term in the
leader's row is the proof (`member`): a new leader clears the terms of all other rows. A superseded
operator can store nothing that belongs to the leader. It notices at its next such write or renewal,
steps down, and joins the election again.

When the leader loses only its session, as in a restart of the server, it acquires the lock again.
If its row still has its term, no other operator led meanwhile, and the term goes on.
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
from cortex.store.lock_keys import LEADER_LOCK
from cortex.store.writer import Writer

if TYPE_CHECKING:
    import psycopg

log = structlog.get_logger()

_RETRY_DELAY_S = 0.2
_HOLDER_CHECK_DELAY_S = 1.0  # a session ends shortly after its process
_MIN_WAIT_S = 0.1
_PROBE_INTERVAL_S = 10  # the far side of a broken network sends nothing
_RENEWALS_PER_LEASE = 4

_NOW_NS = "(extract(epoch FROM clock_timestamp()) * 1000000000)::bigint"
_TRY_LOCK = "SELECT pg_try_advisory_lock(%s)"
_LOCK = "SELECT pg_advisory_lock(%s)"
# Without this check the server would grant the lock to an operator that died while it waited.
_CHECK_CONNECTION = "SET client_connection_check_interval = '2s'"
_SET_LOCK_TIMEOUT = "SET lock_timeout = '3s'"
_HAS_TERM = "SELECT 1 FROM operators WHERE operator_id = %s AND term = %s"
_BEGIN_TERM = f"""
UPDATE operators SET
    term = CASE operator_id WHEN %(id)s THEN %(term)s::bigint END,
    until_ns = CASE operator_id WHEN %(id)s THEN {_NOW_NS} + %(length_ns)s END
WHERE operator_id = %(id)s OR term IS NOT NULL
"""
_NOTIFY = "SELECT pg_notify('cortex_term', '')"
_END_SESSIONS_OF_LEADER = """
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
    """What an operator does when it becomes the leader and when it ceases to be the leader.

    The election calls one method at a time, on the event loop.
    """

    async def lead(self) -> None:
        """Begin to lead.

        Raises:
            StartupError: this operator can never lead with its configuration.
            StorageUnavailable: it cannot lead at the moment.
        """

    async def step_down(self) -> None:
        """Stop leading; also called after `lead` failed, and before the first term."""

    def on_failure(self, error: Exception) -> None:
        """This operator can never lead: it must end."""


class Election:
    """One operator's part in the election. Everything happens on the event loop."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        member: OperatorRow,
        writer: Writer,
        callbacks: LeaderCallbacks,
        lease_s: float,
    ) -> None:
        """
        Args:
            name: of this operator's sessions.
            lease_s: a leader that does not renew its lease for this long is superseded.
        """
        self._engine = engine
        self._name = name
        self._member = member
        self._writer = writer
        self._callbacks = callbacks
        self._lease_s = lease_s
        self._has_leader = asyncio.Event()
        self._term_lock = asyncio.Lock()  # terms begin and end one at a time
        self._tasks: list[asyncio.Task[None]] = []
        self._renewal: asyncio.Task[None] | None = None
        self._term: int | None = None  # in which the callbacks lead
        self._holder_without_term: tuple[int, float] | None = None
        """The pid of a lock holder that is not the leader yet, and when it was first seen."""

    async def open(self) -> None:
        """Join the election; returns when there is a leader, this operator or another one."""
        task = asyncio.create_task(self._run(), name="leader election")
        self._tasks.append(task)
        has_leader = asyncio.create_task(self._has_leader.wait())
        await asyncio.wait({task, has_leader}, return_when=asyncio.FIRST_COMPLETED)
        has_leader.cancel()
        if task.done():
            task.result()

    async def close(self) -> None:
        """Leave the election, and step down if this operator leads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._step_down()

    def on_superseded(self, term: int) -> None:
        """The store refused a write of this term, because the term has ended."""
        if self._member.term == term:
            self._member.term = None  # the writer refuses all other writes of this term at once
            task = asyncio.create_task(self._end_term(term), name="step down")
            self._tasks.append(task)

    async def _run(self) -> None:
        from psycopg import Error

        is_lost = False
        while True:
            try:
                session = await postgresql.session(self._engine, self._name)
                is_lost = False
                try:
                    await self._acquire_lock(session)
                    if not await self._is_term_current(session):
                        await self._begin_term(session)
                    self._has_leader.set()
                    await self._await_loss(session)
                finally:
                    await session.close()
            except (Error, OSError, TimeoutError, StorageUnavailable) as error:
                if not is_lost:
                    log.warning("cannot acquire the leader lock", error=str(error).strip())
                is_lost = True
            except Exception as error:
                if self._has_leader.is_set():  # before that, `open` raises the error
                    self._callbacks.on_failure(error)
                raise
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _acquire_lock(self, session: psycopg.AsyncConnection) -> None:
        """Wait for the lock, and supersede a holder that hangs."""
        import psycopg

        with suppress(psycopg.Error):  # an old server, or a system without this check
            await session.execute(_CHECK_CONNECTION)
        row = await (await session.execute(_TRY_LOCK, [LEADER_LOCK])).fetchone()
        if row == (True,):
            return
        waiting = asyncio.ensure_future(session.execute(_LOCK, [LEADER_LOCK]))
        try:
            wait_s = _HOLDER_CHECK_DELAY_S
            while not (await asyncio.wait({waiting}, timeout=wait_s))[0]:
                wait_s = await self._check_holder()
                self._has_leader.set()
            waiting.result()
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    async def _check_holder(self) -> float:
        """End the sessions of a lock holder that hangs; the seconds until the next check."""
        try:
            return await asyncio.to_thread(read, self._engine, self._supersede_if_hanging)
        except StorageUnavailable:
            return _HOLDER_CHECK_DELAY_S

    def _supersede_if_hanging(self, connection: Connection) -> float:
        holder = connection.execute(_HOLDER, {"key": LEADER_LOCK}).first()
        if holder is None or holder.name is None:
            return _HOLDER_CHECK_DELAY_S
        if holder.name == self._name:
            # This operator's previous session: the server has not noticed yet that it is lost.
            connection.execute(_END_SESSION, {"pid": holder.pid})
            return _HOLDER_CHECK_DELAY_S
        now_s = time.monotonic()
        left_s = None if holder.left_ns is None else holder.left_ns / 1e9
        if left_s is None:  # it acquired the lock just now, or hangs before its term began
            if self._holder_without_term is None or self._holder_without_term[0] != holder.pid:
                self._holder_without_term = (holder.pid, now_s)
            left_s = self._holder_without_term[1] + self._lease_s - now_s
        if left_s > 0:
            return max(_MIN_WAIT_S, min(left_s, self._lease_s))
        log.warning("the leader hangs; superseding it", operator=holder.name)
        connection.execute(_END_SESSIONS, {"name": holder.name})
        return _HOLDER_CHECK_DELAY_S

    async def _await_loss(self, session: psycopg.AsyncConnection) -> None:
        """Wait until the session or the term is lost."""
        while self._member.term is not None:
            async for _ in session.notifies(timeout=_PROBE_INTERVAL_S):
                pass  # this session has no LISTEN: only the session's end interrupts the wait
            async with asyncio.timeout(_PROBE_INTERVAL_S / 2):
                await session.execute("SELECT 1")

    async def _is_term_current(self, session: psycopg.AsyncConnection) -> bool:
        """Whether the term from before a lost session is still the leader's term."""
        term = self._member.term
        if term is None:
            return False
        result = await session.execute(_HAS_TERM, [self._member.id, term])
        return await result.fetchone() is not None and self._member.term == term

    async def _begin_term(self, session: psycopg.AsyncConnection) -> None:
        async with self._term_lock:
            await self._step_down()
            term = now_ns()
            await self._store_term(session, term)
            self._member.term = self._term = term
            self._renewal = asyncio.create_task(self._renew(term), name="renew the lease")
            log.info("became leader", term=term)
            try:
                await self._callbacks.lead()
            except BaseException:
                await self._step_down()
                raise

    async def _store_term(self, session: psycopg.AsyncConnection, term: int) -> None:
        from psycopg.errors import LockNotAvailable

        values = {"id": self._member.id, "term": term, "length_ns": int(self._lease_s * 1e9)}
        await session.execute(_SET_LOCK_TIMEOUT)
        while True:
            try:
                await session.execute(_BEGIN_TERM, values)
                break
            except LockNotAvailable:  # a transaction of the hanging leader has its row locked
                await session.execute(_END_SESSIONS_OF_LEADER, [self._member.id])
        await session.execute(_NOTIFY)

    async def _renew(self, term: int) -> None:
        values = {"id": self._member.id, "length_ns": int(self._lease_s * 1e9)}
        while True:
            await asyncio.sleep(self._lease_s / _RENEWALS_PER_LEASE)
            try:
                await self._writer.run(lambda c: c.execute(_RENEW, values).rowcount, term)
            except StorageUnavailable as error:
                if isinstance(error, Superseded):
                    self.on_superseded(term)
                    return

    async def _end_term(self, term: int) -> None:
        async with self._term_lock:
            if self._term == term:
                log.warning("superseded by another leader; this operator steps down")
                await self._step_down()

    async def _step_down(self) -> None:
        self._member.term = self._term = None
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
            self._renewal = None
        await self._callbacks.step_down()
