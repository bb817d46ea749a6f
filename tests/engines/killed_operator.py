"""An operator that is killed: claims and starts an attempt in its own process, prints the
handle, and kills itself by SIGKILL at the moment that the test chooses.
`EngineHarness.killed_operator` runs it."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from dataclasses import replace

from cortex.engines.base import Attempt, CapacityFreed, Observation, Started
from cortex.engines.local import LocalEngine
from cortex.engines.ray import RayEngine


async def main() -> None:
    kind, arguments, moment, attempt = pickle.load(sys.stdin.buffer)
    assert isinstance(attempt, Attempt)
    started, freed = asyncio.Event(), asyncio.Event()

    def report(observation: Observation) -> None:
        if isinstance(observation, Started):
            started.set()
        elif isinstance(observation, CapacityFreed):
            freed.set()

    engine = {"local": LocalEngine, "ray": RayEngine}[kind](*arguments)
    await engine.open(report)
    compute = attempt.version.api.compute
    while engine.ledger.reserve(attempt.spec.job_id, compute) is not None:
        freed.clear()
        await freed.wait()
    handle = engine.claim(attempt.spec.job_id, attempt.number)
    sys.stdout.write(handle)
    sys.stdout.flush()
    if moment == "claimed":
        os.kill(os.getpid(), signal.SIGKILL)
    engine.start(replace(attempt, handle=handle))
    if moment == "started":
        await started.wait()
    else:
        # From "not even a fork server" to "long running": each moment must be safe.
        await asyncio.sleep(float(moment))
    os.kill(os.getpid(), signal.SIGKILL)


asyncio.run(main())
