"""Background tasks, in a process that the test can end if the event loop hangs."""

from __future__ import annotations

import subprocess
import sys

# The waiter runs when the task is done and its done callbacks have not run yet.
FINISH = """
import asyncio
from cortex.system.background import Background


async def main():
    background = Background("failed")
    last_step = asyncio.get_running_loop().create_future()

    async def work():
        last_step.set_result(None)

    background.run(work())
    await last_step
    assert len(background) == 1
    await background.finish()
    assert len(background) == 0


asyncio.run(main())
"""


def test_finish_returns_after_a_task_whose_callbacks_have_not_run() -> None:
    """A process of its own: in an event loop that hangs, no timeout fires."""
    subprocess.run([sys.executable, "-c", FINISH], check=True, timeout=60)
