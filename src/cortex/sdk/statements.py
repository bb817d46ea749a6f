"""Recognizes a call whose result is dropped.

In Cortex's own client, `client.stream_job_logs(api, job)` printed the log and returned nothing.
Here the call returns the log's text, to iterate over. A caller that drops the result expects the
former.
"""

from __future__ import annotations

import dis
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


def is_statement(caller: FrameType) -> bool:
    """Whether the call in progress is a statement of its own.

    Args:
        caller: the frame that makes the call.

    Returns:
        Whether the frame drops the result, or passes it to the display of an interactive
        interpreter.
    """
    instructions = dis.get_instructions(caller.f_code)
    following = next((each for each in instructions if each.offset > caller.f_lasti), None)
    if following is None:
        return False
    return following.opname in ("POP_TOP", "PRINT_EXPR") or (
        # since Python 3.12
        following.opname == "CALL_INTRINSIC_1" and following.argrepr == "INTRINSIC_PRINT"
    )
