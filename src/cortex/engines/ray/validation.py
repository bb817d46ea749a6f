"""Validates the messages of nodes, which a job could forge: it runs as the user of the agent.

`attempts` and `calls` use it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from cortex.engines.base import (
    Capacity,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Observation,
    Started,
    Unreachable,
    Waits,
)
from cortex.engines.ray.messages import Checkpoint, Lock, LogPiece
from cortex.worker import checks
from cortex.worker.messages import ExitRecord, StartRecord, shorten

_MAX_LOCK_FILE_BYTES = 1 << 22
# What tar and gzip add to the files of a checkpoint at most.
_MAX_ARCHIVE_OVERHEAD_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PROJECT_ID = re.compile(r"[0-9a-z]{1,128}", re.ASCII)
_LOCK_FILE_NAME = re.compile(r"[\w-][\w.-]{0,200}\.lock", re.ASCII)


def checked_observation(observation: object) -> Observation:
    """An observation of one attempt, with values that can be stored and shown.

    Raises:
        checks.Invalid: a value is invalid, or nodes do not report such an observation.
    """
    if isinstance(observation, Started):
        start = StartRecord.from_fields(
            {"attempt": observation.attempt, "start_ns": observation.start_ns}
        )
        return replace(observation, start_ns=start.start_ns)
    if isinstance(observation, Ended):
        return _checked_end(observation)
    if isinstance(observation, Lost | Unreachable | Waits):
        return replace(observation, reason=_checked_reason(observation.reason))
    if isinstance(observation, NeverStarted):
        blocked_by = observation.held_up_by
        blocked_by = None if blocked_by is None else _checked_reason(blocked_by)
        return replace(observation, held_up_by=blocked_by)
    raise checks.Invalid(f"nodes do not report a {type(observation).__name__}")


def checked_lock_file(lock: Lock) -> Lock:
    """A lock file whose name can be used as a file name.

    Raises:
        checks.Invalid: the project, the name or the text is invalid.
    """
    if not isinstance(lock.project_id, str) or not _PROJECT_ID.fullmatch(lock.project_id):
        raise checks.Invalid("the project id is invalid")
    if not isinstance(lock.name, str) or not _LOCK_FILE_NAME.fullmatch(lock.name):
        raise checks.Invalid("the name of the lock file is invalid")
    if not isinstance(lock.text, str) or len(lock.text) > _MAX_LOCK_FILE_BYTES:
        raise checks.Invalid("the text is not a string, or too long")
    return replace(lock, text=lock.text.encode("utf-8", "backslashreplace").decode())


def checked_checkpoint(checkpoint: Checkpoint, limit: int) -> Checkpoint:
    """A checkpoint of a tracked attempt that an agent offers.

    Args:
        limit: the `limits.checkpoint` of the job's version.

    Raises:
        checks.Invalid: its size or its digest is invalid.
    """
    size, digest = checkpoint.size, checkpoint.digest
    if type(size) is not int or not 0 < size <= limit + _MAX_ARCHIVE_OVERHEAD_BYTES:
        raise checks.Invalid("the size of the checkpoint is out of range")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise checks.Invalid("the digest of the checkpoint is invalid")
    return checkpoint


def checked_node_report(held: object, problem: object) -> tuple[Capacity, str | None]:
    """What an agent reports of its node in each poll: `Poll.held` and `Poll.problem`.

    Raises:
        checks.Invalid: a value is invalid.
    """
    amounts = (held.cpu_m, held.mem, held.gpu) if isinstance(held, Capacity) else ()
    if not amounts or any(type(each) is not int or each < 0 for each in amounts):
        raise checks.Invalid("its agent reports an invalid amount of reservations")
    assert isinstance(held, Capacity)
    return held, None if problem is None else _checked_reason(problem)


def checked_log_piece(piece: object) -> LogPiece:
    """A piece of a log that can be written to a file.

    Raises:
        checks.Invalid: the piece is invalid.
    """
    if not isinstance(piece, LogPiece) or not isinstance(piece.data, bytes):
        raise checks.Invalid("the message is not a piece of a log")
    offsets = (piece.offset, piece.end)
    if any(type(offset) is not int for offset in offsets):
        raise checks.Invalid("an offset in the log is not an integer")
    if not 0 <= piece.offset <= piece.offset + len(piece.data) <= piece.end <= checks.MAX_FILE:
        raise checks.Invalid("an offset in the log is out of range")
    return piece


def _checked_end(end: Ended) -> Ended:
    if not isinstance(end.hints, tuple) or not isinstance(end.measures, tuple):
        raise checks.Invalid("hints or measures are not a tuple")
    record = ExitRecord.from_fields(
        {
            "attempt": end.attempt,
            "ending": end.ending,
            "exit_code": end.exit_code,
            "start_ns": end.start_ns,
            "end_ns": end.end_ns,
            "message": end.message,
            "result": end.result,
            "has_result": end.has_result,
            "hints": list(end.hints),
            "measures": list(end.measures),
        }
    )
    return replace(
        end,
        ending=Ending(record.ending),
        start_ns=record.start_ns,
        end_ns=record.end_ns,
        message=record.message,
        result=record.result,  # type: ignore[arg-type]  # ExitRecord.of checks that it is JSON
        has_result=record.has_result,
        hints=tuple(record.hints),
        measures=tuple(record.measures),
    )


def _checked_reason(reason: object) -> str:
    if not isinstance(reason, str):
        raise checks.Invalid("the reason is not a string")
    return shorten(reason)
