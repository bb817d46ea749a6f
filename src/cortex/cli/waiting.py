"""Repeats requests of commands that continue while the operator is unavailable. A note on stderr
reports the outage once, and its end. Called by `get --watch` and `submit --wait`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from cortex.cli.output import print_note
from cortex.errors import CortexError

_RETRY_DELAY_S = 2.0

T = TypeVar("T")


def retry_until_available(request: Callable[[], T]) -> T:
    """Repeat a request, without a time limit, until the operator answers it.

    Raises:
        CortexError: an error that is not temporary.
    """
    is_reported = False
    while True:
        try:
            answer = request()
        except CortexError as error:
            _raise_permanent(error)
            if not is_reported:
                print_note(f"{error.message}\nRetrying until the operator answers.")
            is_reported = True
            time.sleep(_RETRY_DELAY_S)
            continue
        if is_reported:
            print_note("The operator answers again.")
        return answer


def _raise_permanent(error: CortexError) -> None:
    from cortex.sdk.exchange import is_transient

    if not is_transient(error):
        raise error
