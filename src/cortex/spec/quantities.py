"""Sizes and shares of cores, as Kubernetes and `cortex.yaml` write them."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

from cortex.spec.api import MILLI

_CPU = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(m?)", re.ASCII)
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)(?:[eE]\+?(\d{1,2})|([kKMGT]i?))?", re.ASCII)
_NEAR_SIZE = re.compile(r"(\d{1,18})\s*([kmgt])(i?)(?:b|bytes?)?", re.ASCII | re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_LARGEST = 1 << 62


def read_cpu_m(text: str) -> int | None:
    """Thousandths of a core, rounded up: 500 for `0.5` and for `500m`; None if it is neither."""
    matched = _CPU.fullmatch(text)
    if matched is None:
        return None
    return _rounded_up(Decimal(matched[1]) * (1 if matched[2] else MILLI))


def read_bytes(text: str) -> int | None:
    """Bytes, rounded up: of `1000000`, `1e6`, `512Mi` (1024 based) or `1G`; None if it is no size."""
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
    return found if found <= _LARGEST else None


def near_size(text: str) -> str | None:
    """The size that was probably meant: `512Mi` for `512 MiB`."""
    matched = _NEAR_SIZE.fullmatch(text)
    if matched is None:
        return None
    near = f"{matched[1]}{matched[2].upper()}{matched[3].lower()}"
    return None if read_bytes(near) is None else near


def _rounded_up(number: Decimal) -> int:
    return int(number.to_integral_value(ROUND_CEILING))
