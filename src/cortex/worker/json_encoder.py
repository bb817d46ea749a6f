"""Reusable JSON encoders. `json.dumps` makes a new encoder for each value: that takes longer than
encoding a short message, and touches pages that each fork would copy.
"""

from __future__ import annotations

import json.encoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Make = Callable[..., Callable[[object, int], Iterable[str]]]


def encoder(*, for_one: bool = False, allow_nan: bool = True) -> Callable[[object], str]:
    """Make a function that encodes as `json.dumps` does.

    Args:
        for_one: the function encodes one value, and checks it for circular references. Without
            this, it encodes many values without the check: they come from JSON, or are made by this
            package.
        allow_nan: whether to accept NaN and infinity, which JSON does not have.
    """
    whole = json.JSONEncoder(allow_nan=allow_nan)
    make: Make | None = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C extension
        return whole.encode
    # The containers around the current value. An error in the middle leaves entries in it:
    # therefore a function with this check must not be used again.
    containers: dict[int, object] | None = {} if for_one else None
    text = json.encoder.encode_basestring_ascii
    encode = make(containers, whole.default, text, None, ": ", ", ", False, False, allow_nan)
    join = "".join
    return lambda value: join(encode(value, 0))
