"""Sizes and fractions of cores, in the notation of Kubernetes and `cortex.yaml`."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

MILLI = 1000
"""Thousandths in a core."""

_CPU = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(m?)", re.ASCII)
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)(?:[eE]\+?(\d{1,2})|([kKMGT]i?))?", re.ASCII)
_NEAR_SIZE = re.compile(r"(\d{1,18})\s*([kmgt])(i?)(?:b|bytes?)?", re.ASCII | re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_MAX_BYTES = 1 << 62


def read_cpu_m(text: str) -> int | None:
    """Thousandths of a core, rounded up: 500 for `0.5` and `500m`; None if the text is invalid."""
    matched = _CPU.fullmatch(text)
    if matched is None:
        return None
    return _rounded_up(Decimal(matched[1]) * (1 if matched[2] else MILLI))


def read_bytes(text: str) -> int | None:
    """Bytes, rounded up, of `1000000`, `1e6`, `512Mi` (base 1024) or `1G`; None if invalid."""
    matched = _SIZE.fullmatch(text)
    if matched is None:
        return None
    exponent, suffix = matched[2], matched[3] or ""
    if exponent:
        scale = 10 ** int(exponent)
    else:
        base = 1024 if suffix.endswith("i") else 1000
        scale = base ** _POWERS.get(suffix[:1].upper(), 0)
    found = _rounded_up(Decimal(matched[1]) * scale)
    return found if found <= _MAX_BYTES else None


def near_size(text: str) -> str | None:
    """The size that the user probably meant, such as `512Mi` for `512 MiB`, or None."""
    matched = _NEAR_SIZE.fullmatch(text)
    if matched is None:
        return None
    near = f"{matched[1]}{matched[2].upper()}{matched[3].lower()}"
    return None if read_bytes(near) is None else near


def _rounded_up(number: Decimal) -> int:
    return int(number.to_integral_value(ROUND_CEILING))
