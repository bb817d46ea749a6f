"""Asking again, over the time that an operator takes to come back. Used by the clients, and by the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING

from cortex.errors import CortexError, OperatorUnreachable
from cortex.sdk.exchange import Pause, Request

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.sdk.exchange import Exchange

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_PATIENCE_S = 5.0  # an operator is being started right now, perhaps


def until_answered(ask: Callable[[], Request], deadline: float) -> Exchange[JsonValue]:
    """The answer, once an operator that is away or takes no writes for now is back; one that was never there
    is not waited for long. What may be done twice only.

    Args:
        deadline: by the monotonic clock; it is asked once at least, and for the last time then.

    Raises:
        CortexError: an error that will not pass, or that was still there at the deadline.
    """
    pauses, soon = _pauses(), min(deadline, monotonic() + _PATIENCE_S)
    while True:
        try:
            return (yield ask())
        except CortexError as error:
            was_there = not isinstance(error, OperatorUnreachable) or error.was_there
            left_s = (deadline if was_there else soon) - monotonic()
            if not is_passing(error) or left_s <= 0:
                raise
        yield Pause(min(next(pauses), left_s))


def is_passing(error: CortexError) -> bool:
    """Whether the same request may be answered a moment later: broken and refused connections are a 503
    as well."""
    return error.http_status == HTTPStatus.SERVICE_UNAVAILABLE


def _pauses() -> Iterator[float]:
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
