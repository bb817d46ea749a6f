"""An operator that is killed: claims and starts an attempt in a process of its own, tells its handle,
and dies by SIGKILL at the moment that the test asks for. Run by `test_recovery`."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from pathlib import Path

from cortex.engines.base import Attempt, Observation, Started
from cortex.engines.local import LocalEngine


async def main() -> None:
    root, grace_s, memory_limit, moment, attempt = pickle.load(sys.stdin.buffer)
    assert isinstance(attempt, Attempt)
    started = asyncio.Event()

    def report(observation: Observation) -> None:
        if isinstance(observation, Started):
            started.set()

    engine = LocalEngine(Path(root), None, grace_s, memory_limit)
    await engine.open(report)
    handle = engine.claim(attempt.spec.job_id, attempt.number)
    sys.stdout.write(handle)
    sys.stdout.flush()
    if moment == "claimed":
        os.kill(os.getpid(), signal.SIGKILL)
    await engine.start(Attempt(attempt.spec, attempt.version, attempt.number, handle))
    if moment == "started":
        await started.wait()
    else:
        # From "not even a fork server" to "long running": each of these moments must be safe.
        await asyncio.sleep(float(moment))
    os.kill(os.getpid(), signal.SIGKILL)


asyncio.run(main())
