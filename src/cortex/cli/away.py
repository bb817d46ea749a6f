"""Commands that go on when the operator is away: that it is gone is told once, and when it answers again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from cortex.cli.output import print_note
from cortex.errors import CortexError

_PAUSE_S = 2.0

T = TypeVar("T")


def until_back(ask: Callable[[], T]) -> T:
    """The answer, however long the operator is away.

    Raises:
        CortexError: an error that will not pass.
    """
    told = False
    while True:
        try:
            answer = ask()
        except CortexError as error:
            _check_passing(error)
            if not told:
                print_note(f"{error.message}\nThis goes on when it answers again.")
            told = True
            time.sleep(_PAUSE_S)
            continue
        if told:
            print_note("The operator answers again.")
        return answer


def _check_passing(error: CortexError) -> None:
    from cortex.sdk.again import is_passing

    if not is_passing(error):
        raise error
