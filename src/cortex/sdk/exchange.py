"""What is asked of an operator, apart from how it is sent: both clients carry out the same exchanges.

An exchange is a generator: it yields requests and pauses, is sent the answers, and returns its result. What
goes wrong is raised in it, where it was asked. So it is decided once when to ask again, and for how long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import quote

from cortex.errors import CortexError, NotFound

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from typing import IO

    from pydantic import JsonValue

    Files = Mapping[str, tuple[str, IO[bytes] | bytes, str]]

ANSWER_S = 30.0


@dataclass(frozen=True)
class Request:
    """One request; its path is relative to the operator's endpoint, which may itself have a path (an
    operator behind a proxy)."""

    method: str
    path: str
    params: Mapping[str, str | float] | None = None
    headers: Mapping[str, str] | None = None
    content: bytes | None = None
    data: Mapping[str, str] | None = None
    files: Files | None = None
    answer_s: float = ANSWER_S


@dataclass(frozen=True)
class Pause:
    """Time that passes before the next request."""

    seconds: float


T = TypeVar("T")
if TYPE_CHECKING:
    Exchange = Generator[Request | Pause, JsonValue, T]


class Course(Generic[T]):
    """An exchange under way."""

    result: T
    """What it returned, once it has ended."""

    def __init__(self, exchange: Exchange[T]) -> None:
        self._exchange = exchange
        self.asked: Request | Pause | None = None
        """What is to be done next; None once it has ended."""
        self.go_on(None)

    def go_on(self, outcome: JsonValue | CortexError) -> None:
        """With the answer to what was asked, or what went wrong; after a pause with None.

        Raises:
            CortexError: the exchange has failed.
        """
        try:
            if isinstance(outcome, CortexError):
                self.asked = self._exchange.throw(outcome)
            else:
                self.asked = self._exchange.send(outcome)
        except StopIteration as end:
            self.asked, self.result = None, end.value


def segment(text: str) -> str:
    """A name as one segment of a path.

    Raises:
        NotFound: it is one that leads to another path than the one meant.
    """
    if text in ("", ".", ".."):
        raise NotFound(f"nothing is called {text!r}")
    return quote(text, safe="")
