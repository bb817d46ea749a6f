"""JSON encoders that are made once. `json.dumps` makes a new one for each value, which takes longer than to
encode a short message, and touches what each fork would copy.
"""

from __future__ import annotations

import json.encoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Make = Callable[..., Callable[[object, int], Iterable[str]]]


def encoder(*, for_one: bool = False, allow_nan: bool = True) -> Callable[[object], str]:
    """What encodes as `json.dumps` does.

    Args:
        for_one: it encodes one value, of which nobody knows whether it holds itself. An encoder of many does not
            look for that: it is for values that come from JSON, or go into it as they were made.
        allow_nan: whether it takes the numbers that JSON does not have.
    """
    whole = json.JSONEncoder(allow_nan=allow_nan)
    make: Make | None = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the extension
        return whole.encode
    # What a value is inside of. Who fails in the middle leaves some in it.
    held: dict[int, object] | None = {} if for_one else None
    text = json.encoder.encode_basestring_ascii
    encode = make(held, whole.default, text, None, ": ", ", ", False, False, allow_nan)
    join = "".join
    return lambda value: join(encode(value, 0))
