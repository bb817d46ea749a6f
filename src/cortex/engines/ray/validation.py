"""What a node tells, looked at before it is believed: jobs run beside its agent, as the same user. Called by
`attempts` and `orders`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from cortex.engines.base import (
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Observation,
    Started,
    Unreachable,
    Waits,
)
from cortex.engines.ray.messages import Lock, LogPiece
from cortex.worker import checks
from cortex.worker.messages import ExitRecord, StartRecord, shorten

_MOST_LOCK = 1 << 22
_PROJECT = re.compile(r"[0-9a-z]{1,128}", re.ASCII)
_LOCK = re.compile(r"[\w-][\w.-]{0,200}\.lock", re.ASCII)


def checked(seen: object) -> Observation:
    """What a node says of one attempt, as it can be stored and shown.

    Raises:
        checks.Invalid: that cannot be.
    """
    if isinstance(seen, Started):
        start = StartRecord.from_fields({"attempt": seen.attempt, "start_ns": seen.start_ns})
        return replace(seen, start_ns=start.start_ns)
    if isinstance(seen, Ended):
        return _ended(seen)
    if isinstance(seen, Lost | Unreachable | Waits):
        return replace(seen, reason=_words(seen.reason))
    if isinstance(seen, NeverStarted):
        held_up_by = None if seen.held_up_by is None else _words(seen.held_up_by)
        return replace(seen, held_up_by=held_up_by)
    raise checks.Invalid(f"a {type(seen).__name__} is nothing that a node tells")


def checked_lock(lock: Lock) -> Lock:
    """A lock file that can be kept under its name.

    Raises:
        checks.Invalid: it is none.
    """
    if not isinstance(lock.project_id, str) or not _PROJECT.fullmatch(lock.project_id):
        raise checks.Invalid("it is of no project")
    if not isinstance(lock.name, str) or not _LOCK.fullmatch(lock.name):
        raise checks.Invalid("it has no name of a lock file")
    if not isinstance(lock.text, str) or len(lock.text) > _MOST_LOCK:
        raise checks.Invalid("its text is none, or too long")
    return replace(lock, text=lock.text.encode("utf-8", "backslashreplace").decode())


def checked_piece(piece: object) -> LogPiece:
    """A piece of a log that can be written to a file.

    Raises:
        checks.Invalid: it is none.
    """
    if not isinstance(piece, LogPiece) or not isinstance(piece.data, bytes):
        raise checks.Invalid("it is no piece of a log")
    offsets = (piece.offset, piece.end)
    if any(type(offset) is not int for offset in offsets):
        raise checks.Invalid("its offsets are no numbers")
    if not 0 <= piece.offset <= piece.offset + len(piece.data) <= piece.end <= checks.MAX_FILE:
        raise checks.Invalid("no log has such offsets")
    return piece


def _ended(seen: Ended) -> Ended:
    if not isinstance(seen.hints, tuple) or not isinstance(seen.measures, tuple):
        raise checks.Invalid("its hints or measures are no lists")
    record = ExitRecord.from_fields(
        {
            "attempt": seen.attempt,
            "ending": seen.ending,
            "exit_code": seen.exit_code,
            "start_ns": seen.start_ns,
            "end_ns": seen.end_ns,
            "message": seen.message,
            "result": seen.result,
            "has_result": seen.has_result,
            "hints": list(seen.hints),
            "measures": list(seen.measures),
        }
    )
    return replace(
        seen,
        ending=Ending(record.ending),
        start_ns=record.start_ns,
        end_ns=record.end_ns,
        message=record.message,
        result=record.result,  # type: ignore[arg-type]  # it can be JSON, as was checked
        has_result=record.has_result,
        hints=tuple(record.hints),
        measures=tuple(record.measures),
    )


def _words(reason: object) -> str:
    if not isinstance(reason, str):
        raise checks.Invalid("it gives no reason in words")
    return shorten(reason)
