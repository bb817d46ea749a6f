"""Sizes as users write them: bytes, or a number with a suffix of Kubernetes' quantities."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)(?:[eE]\+?(\d{1,2})|([kKMGT]i?))?")
_SUFFIXES = {
    f"{letter}{kind}": (1024 if kind else 1000) ** power
    for power, letters in enumerate(("kK", "M", "G", "T"), start=1)
    for letter in letters
    for kind in ("", "i")
}


def bytes_of(text: str) -> int | None:
    """Bytes of `512Mi`, `1G`, `1e9` or a bare number, rounded up; None for anything else."""
    matched = _SIZE.fullmatch(text)
    if matched is None:
        return None
    scale = 10 ** int(matched[2]) if matched[2] else _SUFFIXES.get(matched[3] or "", 1)
    return whole(Decimal(matched[1]) * scale)


def whole(number: Decimal) -> int:
    """A number rounded up."""
    return int(number.to_integral_value(ROUND_CEILING))
