"""The thread that writes, and groups commits. Called by `Store` and `OperatorGroup`, and by `Election` to
renew.

Every write is a function of a connection. The writer takes all that wait, runs them in one
transaction and commits once: a hundred submits share one fsync. A write that fails makes its group
run one by one, each in a transaction of its own, so it takes no other down; a write must therefore
be a function of the database alone.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DatabaseError, DBAPIError, InternalError, OperationalError

from cortex.errors import CortexError, OutcomeUnknown, StorageUnavailable, Superseded
from cortex.store import postgresql, sqlite
from cortex.store.database import words

T = TypeVar("T")
Write = Callable[[Connection], T]

_GROUP = 512  # writes per commit: bounds how long the first of them waits for the last
_ASK_AGAIN_S = 0.2
_PATIENCE_S = 10.0
"""How long a write waits in all for another process that writes to the same file, whatever waits before it."""
_LOOK_MS = 100
_MOST_CONFLICTS = 10
_OUTCOME_UNKNOWN = (
    "the connection to the store was lost in the middle of the change: look whether it was made, "
    "before you make it again"
)


class CommitFence(Protocol):
    """What tells which commits were made, and in which term this operator drives; see `member`."""

    def enter(self, connection: Connection) -> int | None:
        """Begin a transaction; the term as it is in it."""

    def holds(self, connection: Connection) -> bool:
        """Whether the transaction that was entered last was committed."""


class Writer:
    """The one thread that writes.

    Where the connection to a server is lost in the middle of a commit, nobody may be told that it
    failed, for it may be there. Its callers wait until the server answers again and the fence tells;
    meanwhile all other writes are refused.
    """

    def __init__(self, engine: Engine, lost: Callable[[], str | None] | None = None) -> None:
        """
        Args:
            lost: tells why what is committed now would not be there later, if so.
        """
        self._engine = engine
        self._lost = lost or _never
        self._is_lost_file = False
        self._connection: Connection | None = None
        self.fence: CommitFence | None = None
        self._unknown: _Unknown | None = None
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    async def run(self, write: Write[T], term: int | None = None) -> T:
        """Run a write; it is durable when this returns. Writes take effect in the order of calls.

        Args:
            term: the only one in which it may be stored, if there is such a one.

        Raises:
            Superseded: that term is over; nothing was stored.
            StorageUnavailable: the database did not take it; nothing was stored.
            CortexError: what the write raised; nothing was stored.
        """
        job = _Job(write, asyncio.get_running_loop(), term)
        self._waiting.put(job)
        # Who does not wait for it any more does not undo a write that is already queued.
        return cast(T, await job.done)

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._take()
        finally:
            self._let_go()

    def _take(self) -> None:
        while True:
            try:
                first = self._waiting.get(timeout=_ASK_AGAIN_S if self._unknown else None)
            except queue.Empty:
                self._settle()
                continue
            if first is None:
                return
            group = [first]
            last = False
            while len(group) < _GROUP and not self._waiting.empty():
                following = self._waiting.get()
                if following is None:
                    last = True
                    break
                group.append(following)
            self._commit(group)
            if last:
                return

    def _commit(self, group: list[_Job]) -> None:
        if self._unknown is not None and not self._settle():
            _refuse(group, StorageUnavailable("the store does not answer now. Try again later."))
            return
        while group:
            group = self._try(group, again=True)

    def _try(self, group: list[_Job], *, again: bool) -> list[_Job]:
        """Commit them, and tell what came of it; those that have to wait for another process.

        Args:
            again: whether to try once more where a connection turns out to be lost.
        """
        outcomes: list[object] = []
        is_connected = False
        try:
            if self._is_lost_file and (why := self._look()) is not None:
                raise StorageUnavailable(why)
            connection = self._connected()
            with connection.begin():
                is_connected = True
                if self.fence is None:
                    outcomes = [job.write(connection) for job in group]
                else:
                    term = self.fence.enter(connection)
                    outcomes = [job.write_in(term, connection) for job in group]
        except Exception as error:
            if not isinstance(error, CortexError):
                self._let_go()  # whatever state it is in
            if not is_connected and sqlite.is_locked(error):
                return _in_time(group, error)
            self._failed(group, outcomes, error, again=again, is_connected=is_connected)
            return []
        if (why := self._look()) is not None:
            _refuse(group, OutcomeUnknown(f"whether the change is there later is not known: {why}"))
        else:
            _deliver(group, outcomes)
        return []

    def _failed(
        self,
        group: list[_Job],
        outcomes: list[object],
        error: Exception,
        *,
        again: bool,
        is_connected: bool,
    ) -> None:
        is_lost = self._is_lost(error)
        if outcomes and self.fence is not None:  # also where a server that ends says so
            self._unknown = _Unknown(group, outcomes, error, again)
            self._settle()
        elif outcomes and is_lost:
            _refuse(group, OutcomeUnknown(_OUTCOME_UNKNOWN))
        elif is_lost and is_connected and again:
            self._try(group, again=False)
        elif is_lost or not is_connected:
            _refuse(group, error)
        elif len(group) > 1:
            for job in group:
                self._commit([job])
        elif postgresql.is_conflict(error) and group[0].may_try_again():
            self._commit(group)
        else:
            _refuse(group, error)

    def _look(self) -> str | None:
        """Why what was committed would not be there later. Asked before what is acknowledged, and where that was so
        the last time also before what is committed: to ask takes as long as a part of a short commit."""
        why = self._lost()
        self._is_lost_file = why is not None
        return why

    def _is_lost(self, error: Exception) -> bool:
        """Whether a connection was lost: the pool may hold others that were lost likewise."""
        if not isinstance(error, DBAPIError) or not error.connection_invalidated:
            return False
        self._engine.dispose()
        return True

    def _settle(self) -> bool:
        """Find out what came of a commit that failed or whose answer was lost; False while that cannot
        be told."""
        assert self._unknown is not None and self.fence is not None
        try:
            with self._connect() as connection, connection.begin():
                is_stored = self.fence.holds(connection)
        except DBAPIError:
            return False
        unknown, self._unknown = self._unknown, None
        if is_stored:
            _deliver(unknown.group, unknown.outcomes)
        elif unknown.again:
            self._try(unknown.group, again=False)
        else:
            _refuse(unknown.group, unknown.error)
        return self._unknown is None

    def _connect(self) -> Connection:
        return self._engine.connect().execution_options(writes=True)

    def _connected(self) -> Connection:
        """The one connection, kept: to borrow one for each commit costs more than a short commit."""
        if self._connection is None:
            self._connection = self._connect()
            if self._engine.dialect.name == "sqlite":  # whoever waits longest is answered in time
                sqlite.first(self._connection, f"PRAGMA busy_timeout={_LOOK_MS}")
        return self._connection

    def _let_go(self) -> None:
        if self._connection is not None:
            with suppress(Exception):  # it may be what failed
                self._connection.invalidate()
            with suppress(Exception):
                self._connection.close()
            self._connection = None


class _Job:
    __slots__ = ("conflicts", "done", "loop", "since", "term", "write")

    def __init__(
        self, write: Write[object], loop: asyncio.AbstractEventLoop, term: int | None
    ) -> None:
        self.write = write
        self.loop = loop
        self.term = term
        self.conflicts = 0
        self.since = time.monotonic()
        self.done: asyncio.Future[object] = loop.create_future()

    def write_in(self, term: int | None, connection: Connection) -> object:
        """Run it, or refuse it where its term is not this one."""
        if self.term not in (None, term):
            return Superseded("another operator drives the jobs now")
        return self.write(connection)

    def may_try_again(self) -> bool:
        """Whether to try once more after other operators were in the way."""
        self.conflicts += 1
        return self.conflicts < _MOST_CONFLICTS


@dataclass(frozen=True)
class _Unknown:
    """A commit of which nobody knows yet whether it was made."""

    group: list[_Job]
    outcomes: list[object]
    error: Exception
    again: bool


def _in_time(group: list[_Job], error: Exception) -> list[_Job]:
    """Those that may wait on; the others are refused."""
    until = time.monotonic() - _PATIENCE_S
    _refuse([job for job in group if job.since <= until], error)
    return [job for job in group if job.since > until]


def _never() -> None:
    """Of a server: it knows for itself."""


def _refuse(group: list[_Job], error: Exception) -> None:
    told = _told(error)
    _deliver(group, [told] * len(group))


def _told(error: Exception) -> Exception:
    # SQLite tells of a damaged file by the plain class, whose others are mistakes of ours; PostgreSQL
    # of that, and of a server that has become a standby, by the internal one.
    if isinstance(error, OperationalError | InternalError) or type(error) is DatabaseError:
        return StorageUnavailable(
            f"the store takes no writes now: {words(error)}. Try again later."
        )
    return error


def _deliver(group: list[_Job], outcomes: list[object]) -> None:
    if not group:
        return

    def on_loop() -> None:
        for job, outcome in zip(group, outcomes, strict=True):
            if job.done.done():
                continue
            if isinstance(outcome, Exception):
                job.done.set_exception(outcome)
            else:
                job.done.set_result(outcome)

    try:
        group[0].loop.call_soon_threadsafe(on_loop)
    except RuntimeError:  # the loop was closed: nobody is left to tell
        return
