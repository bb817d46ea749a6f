"""Times in the notation of the contract, and identifiers that sort by time."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from functools import lru_cache

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_PAIRS = [high + low for high in _ALPHABET for low in _ALPHABET]


def now_ns() -> int:
    """Nanoseconds since the epoch, UTC."""
    return time.time_ns()


def rfc3339(ns: int) -> str:
    """RFC 3339, UTC, nine fractional digits: `2020-07-16T14:56:10.276007415Z`."""
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{_second(seconds)}.{fraction:09d}Z"


def parse_rfc3339(text: str) -> datetime:
    """The time of a text from `rfc3339`, to the microsecond: the resolution of `datetime`."""
    return datetime.strptime(text[:26] + "+0000", "%Y-%m-%dT%H:%M:%S.%f%z")


def new_id() -> str:
    """A new identifier: 10 characters of milliseconds, then 8 of randomness; lower case."""
    return _base32(now_ns() // 1_000_000, 10) + _base32(random.getrandbits(40), 8)


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:19]


def _base32(value: int, length: int) -> str:
    """The last `length` digits of a number, in base 32; `length` is even."""
    return "".join([_PAIRS[value >> shift & 1023] for shift in range(5 * length - 10, -1, -10)])
