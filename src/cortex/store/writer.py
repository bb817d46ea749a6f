"""The thread that writes, and commits writes in groups.

`Store` and `OperatorGroup` call it, and `Election` to renew the lease.

A write is a function of a connection. The thread takes all queued writes, runs them in one
transaction and commits once: a hundred submits share one fsync. If a write fails, the thread runs
the writes of its group again one by one, each in a transaction of its own, so that one failure
affects no other write. A write may therefore run twice and must depend on the database alone.

A write that is one `Statement` waits for no answer before the next is sent: on PostgreSQL, a group
of such writes costs one round trip, with the begin of the transaction and the fence, and one for
its commit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DatabaseError, DBAPIError, InternalError, OperationalError

from cortex.errors import CortexError, OutcomeUnknown, StorageUnavailable, Superseded
from cortex.store import postgresql, sqlite
from cortex.store.database import error_text
from cortex.store.prepared import Prepared, Statement, run_all

T = TypeVar("T")
Write = Callable[[Connection], T]


@dataclass(frozen=True, slots=True)
class Planned(Generic[T]):
    """A write that the thread plans when its turn comes, without the database."""

    plan: Callable[[], Write[T] | Statement[T]]


_MAX_GROUP = 512  # writes per commit: bounds how long the first write waits for the last
_RETRY_DELAY_S = 0.2
_LOCKED_TIMEOUT_S = 10.0
"""How long a write waits in all for another process that is writing to the same SQLite file."""
_BUSY_TIMEOUT_MS = 100
_MAX_CONFLICTS = 10
_BEGIN: Statement[None] = Statement(Prepared(text("BEGIN")), {}, lambda *_: None)
SUPERSEDED = "another operator is the leader now"
_OUTCOME_UNKNOWN = (
    "the connection to the store broke during the commit: the change may or may not have been "
    "stored; check before repeating it"
)


class CommitFence(Protocol):
    """Counts commits and fences off former leaders; see `group.member`."""

    def begin(self) -> Statement[int | None]:
        """The first statement of each transaction; the term in which this operator leads, or
        None."""

    def was_committed(self, connection: Connection) -> bool:
        """Whether the transaction that `begin` was last called for was committed."""


class Writer:
    """The one thread that writes.

    When the connection to a server breaks in the middle of a commit, the writer must not report a
    failure, for the server may have made the commit. The callers wait until the server answers
    again and the fence shows the outcome. Until then the writer refuses all other writes.
    """

    def __init__(self, engine: Engine, check_file: Callable[[], str | None] | None = None) -> None:
        """
        Args:
            check_file: why a commit would not last, or None; see `sqlite.DatabaseFile.problem`.
        """
        self._engine = engine
        self._file_problem = check_file or _no_problem
        self._had_file_problem = False
        self._connection: Connection | None = None
        self.fence: CommitFence | None = None
        self._unknown: _UnknownCommit | None = None
        self._queue: queue.SimpleQueue[_QueuedWrite | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    async def run(self, write: Write[T] | Planned[T], term: int | None = None) -> T:
        """Run a write; it is durable when this returns. Writes take effect in the order of calls.

        Cancelling the caller does not cancel a queued write.

        Args:
            term: of the leader, if the write belongs to that term alone.

        Returns:
            What the write returned.

        Raises:
            Superseded: the term has ended; nothing was stored.
            StorageUnavailable: the database did not accept the write; nothing was stored.
            OutcomeUnknown: the change may or may not have been stored.
            CortexError: the write raised it; nothing was stored.
        """
        queued = _QueuedWrite(write, asyncio.get_running_loop(), term)
        self._queue.put(queued)
        return cast(T, await queued.done)

    def close(self) -> None:
        """Finish the queued writes, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._commit_groups()
        finally:
            self._disconnect()

    def _commit_groups(self) -> None:
        while True:
            try:
                first = self._queue.get(timeout=_RETRY_DELAY_S if self._unknown else None)
            except queue.Empty:
                self._resolve_outcome()
                continue
            if first is None:
                return
            group = [first]
            is_last = False
            while len(group) < _MAX_GROUP and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    is_last = True
                    break
                group.append(following)
            self._commit(group)
            if is_last:
                return

    def _commit(self, group: list[_QueuedWrite]) -> None:
        if self._unknown is not None and not self._resolve_outcome():
            _refuse(group, StorageUnavailable("the store does not answer; try again later"))
            return
        while group:
            group = self._try(group, may_retry=True)

    def _commit_once_more(self, group: list[_QueuedWrite]) -> None:
        while group:
            group = self._try(group, may_retry=False)

    def _try(self, group: list[_QueuedWrite], *, may_retry: bool) -> list[_QueuedWrite]:
        """Commit a group and deliver the outcomes.

        Args:
            may_retry: whether to try once more if the connection turns out to be lost.

        Returns:
            The writes to try again: another process is writing to the SQLite file, or other writes
            of the group belonged to another term.
        """
        outcomes: list[object] = []
        is_connected = False
        try:
            if self._had_file_problem and (problem := self._check_file()) is not None:
                raise StorageUnavailable(problem)
            connection = self._connected()
            with connection.begin():
                is_connected = True
                outcomes = self._carry_out(group, connection)
        except _TermEnded as ended:  # rolled back; the connection is as before
            return _refuse_superseded(group, ended.current)
        except Exception as error:
            if not isinstance(error, CortexError):
                self._disconnect()  # its state is unknown
            if not is_connected and sqlite.is_locked(error):
                return _refuse_timed_out(group, error)
            self._handle_failure(
                group, outcomes, error, may_retry=may_retry, is_connected=is_connected
            )
            return []
        if (problem := self._check_file()) is not None:
            _refuse(group, OutcomeUnknown(f"the change may or may not have been stored: {problem}"))
        else:
            _deliver(group, outcomes)
        return []

    def _carry_out(self, group: list[_QueuedWrite], connection: Connection) -> list[object]:
        """Run a group's writes in the transaction, up to its commit; their outcomes.

        Raises:
            _TermEnded: some writes belong to another term.
        """
        opening: list[Statement[Any]] = []
        if connection.dialect.name != "sqlite":
            opening.append(_BEGIN)
        if self.fence is not None:
            opening.append(self.fence.begin())
        outcomes: list[object] = []
        unsent = [*opening]

        def send() -> None:
            is_first = not outcomes
            outcomes.extend(run_all(connection, unsent))
            unsent.clear()
            if is_first and self.fence is not None:
                term = cast(int | None, outcomes[len(opening) - 1])
                if any(write.term not in (None, term) for write in group):
                    raise _TermEnded(term)

        for write in group:
            planned = write.plan()
            if isinstance(planned, Statement):
                unsent.append(planned)
            else:
                send()
                outcomes.append(planned(connection))
        send()
        return outcomes[len(opening) :]

    def _handle_failure(
        self,
        group: list[_QueuedWrite],
        outcomes: list[object],
        error: Exception,
        *,
        may_retry: bool,
        is_connected: bool,
    ) -> None:
        is_lost = self._is_lost(error)
        if outcomes and self.fence is not None:  # even if the server reports its shutdown
            self._unknown = _UnknownCommit(group, outcomes, error, may_retry)
            self._resolve_outcome()
        elif outcomes and is_lost:
            _refuse(group, OutcomeUnknown(_OUTCOME_UNKNOWN))
        elif is_lost and is_connected and may_retry:
            self._commit_once_more(group)
        elif is_lost or not is_connected:
            _refuse(group, error)
        elif len(group) > 1:
            for write in group:
                self._commit([write])
        elif postgresql.is_conflict(error) and group[0].may_retry_conflict():
            self._commit(group)
        else:
            _refuse(group, error)

    def _check_file(self) -> str | None:
        """Why a commit would not last, or None.

        Called before a commit is acknowledged. Called before the commit as well only if there was a
        problem the last time, for the check takes as long as a part of a short commit.
        """
        problem = self._file_problem()
        self._had_file_problem = problem is not None
        return problem

    def _is_lost(self, error: Exception) -> bool:
        """Whether the connection was lost. If so, drop the others of the pool: they may be lost."""
        if not isinstance(error, DBAPIError) or not error.connection_invalidated:
            return False
        self._engine.dispose()
        return True

    def _resolve_outcome(self) -> bool:
        """Find out whether a commit was made that failed or whose answer was lost.

        Returns:
            False while the outcome is still unknown.
        """
        assert self._unknown is not None and self.fence is not None
        try:
            with self._connect() as connection, connection.begin():
                is_stored = self.fence.was_committed(connection)
        except DBAPIError:
            return False
        unknown, self._unknown = self._unknown, None
        if is_stored:
            _deliver(unknown.group, unknown.outcomes)
        elif unknown.may_retry:
            self._commit_once_more(unknown.group)
        else:
            _refuse(unknown.group, unknown.error)
        return self._unknown is None

    def _connect(self) -> Connection:
        return self._engine.connect().execution_options(writes=True)

    def _connected(self) -> Connection:
        """The thread's own connection: a checkout from the pool costs more than a short commit."""
        if self._connection is None:
            self._connection = self._connect()
            if self._engine.dialect.name == "sqlite":  # short, so that each write times out
                sqlite.first(self._connection, f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
            else:  # the driver's own BEGIN would cost a round trip; see `_carry_out`
                self._connection.execution_options(isolation_level="AUTOCOMMIT")
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(Exception):  # the connection may be the cause of the failure
                self._connection.invalidate()
            with suppress(Exception):
                self._connection.close()
            self._connection = None


class _QueuedWrite:
    __slots__ = ("conflicts", "done", "loop", "since", "term", "write")

    def __init__(
        self,
        write: Write[Any] | Planned[Any],
        loop: asyncio.AbstractEventLoop,
        term: int | None,
    ) -> None:
        self.write = write
        self.loop = loop
        self.term = term
        self.conflicts = 0
        self.since = time.monotonic()
        self.done: asyncio.Future[object] = loop.create_future()

    def plan(self) -> Write[Any] | Statement[Any]:
        """What to run."""
        return self.write.plan() if isinstance(self.write, Planned) else self.write

    def may_retry_conflict(self) -> bool:
        """Whether to try once more after a conflict with another operator's transaction."""
        self.conflicts += 1
        return self.conflicts < _MAX_CONFLICTS


class _TermEnded(Exception):
    """A write belongs to another term than the current one."""

    def __init__(self, current: int | None) -> None:
        super().__init__()
        self.current = current


@dataclass(frozen=True)
class _UnknownCommit:
    """A commit that may or may not have been made."""

    group: list[_QueuedWrite]
    outcomes: list[object]
    error: Exception
    may_retry: bool


def _refuse_timed_out(group: list[_QueuedWrite], error: Exception) -> list[_QueuedWrite]:
    """Refuse the writes that have waited longer than the timeout; return the others."""
    oldest = time.monotonic() - _LOCKED_TIMEOUT_S
    _refuse([write for write in group if write.since <= oldest], error)
    return [write for write in group if write.since > oldest]


def _refuse_superseded(group: list[_QueuedWrite], term: int | None) -> list[_QueuedWrite]:
    """Refuse the writes that belong to another term; return the others."""
    _refuse([write for write in group if write.term not in (None, term)], Superseded(SUPERSEDED))
    return [write for write in group if write.term in (None, term)]


def _no_problem() -> None:
    """The file check of a server, which guards its own files."""


def _refuse(group: list[_QueuedWrite], error: Exception) -> None:
    refusal = _refusal(error)
    _deliver(group, [refusal] * len(group))


def _refusal(error: Exception) -> Exception:
    """The error for the callers: StorageUnavailable if the database refused the write."""
    # The driver of SQLite reports a damaged file by the plain DatabaseError, whose other subclasses
    # are bugs of this program. PostgreSQL reports a damaged file, and a server that has become a
    # standby, by InternalError.
    if isinstance(error, OperationalError | InternalError) or type(error) is DatabaseError:
        return StorageUnavailable(
            f"the store does not accept writes: {error_text(error)}; try again later"
        )
    return error


def _deliver(group: list[_QueuedWrite], outcomes: list[object]) -> None:
    if not group:
        return

    def on_loop() -> None:
        for write, outcome in zip(group, outcomes, strict=True):
            if write.done.done():
                continue
            if isinstance(outcome, Exception):
                write.done.set_exception(outcome)
            else:
                write.done.set_result(outcome)

    try:
        group[0].loop.call_soon_threadsafe(on_loop)
    except RuntimeError:  # the loop is closed: no caller waits any more
        return
