"""Whether a call is a statement. Cortex's client printed a log where it was called, and returned nothing:
`client.stream_job_logs(api, job)`. Here the same call returns the log's text, to iterate over, and a caller
that drops it has asked for the former.
"""

from __future__ import annotations

import dis
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def is_statement(caller: FrameType) -> bool:
    """Whether a frame drops the result of the call that it makes now, or leaves it to an interactive
    interpreter to show."""
    instructions = dis.get_instructions(caller.f_code)
    following = next((each for each in instructions if each.offset > caller.f_lasti), None)
    if following is None:
        return False
    return following.opname in ("POP_TOP", "PRINT_EXPR") or (
        # Python 3.12 and later
        following.opname == "CALL_INTRINSIC_1" and following.argrepr == "INTRINSIC_PRINT"
    )
