"""Times as the contract writes them, and identifiers that sort by time."""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


def now_ns() -> int:
    """Nanoseconds since the epoch, UTC."""
    return time.time_ns()


def rfc3339(ns: int) -> str:
    """RFC 3339, UTC, nine fractional digits: `2020-07-16T14:56:10.276007415Z`."""
    seconds, fraction = divmod(ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def parse_rfc3339(text: str) -> datetime:
    """The time that `rfc3339` wrote, to the microsecond that `datetime` can hold."""
    return datetime.strptime(text[:26] + "+0000", "%Y-%m-%dT%H:%M:%S.%f%z")


def new_id() -> str:
    """A new identifier: 10 characters of milliseconds, then 8 of randomness; lower case."""
    value = (now_ns() // 1_000_000) << 40 | secrets.randbits(40)
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(85, -1, -5))
