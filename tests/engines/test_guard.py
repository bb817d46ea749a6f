"""The guard of a lost node ends its jobs, also a job that blocks its own supervisor."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys

import pytest

from cortex.engines.base import Lost
from cortex.engines.local import LocalEngine
from cortex.ray_node import guard
from cortex.worker import processes
from engines.engine_harness import EngineHarness

BLOCKS_SUPERVISOR = """
    import ctypes, os, signal, time
    def task(config):
        supervisor = os.getppid()
        ctypes.CDLL(None).prctl(1, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            print("pid", os.getpid(), flush=True)
            while True:
                os.kill(supervisor, signal.SIGSTOP)
                time.sleep(0.0001)
        print("pid", os.getpid(), flush=True)
        print("ready", flush=True)
        time.sleep(600)
"""


def test_the_guard_ends_a_job_that_blocks_its_supervisor(
    local_harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_STOP_TIMEOUT_S", 0.5)

    async def scenario(engine: LocalEngine) -> None:
        attempt = local_harness.attempt(BLOCKS_SUPERVISOR)
        await local_harness.start(engine, attempt)
        await local_harness.printed(attempt, "ready")
        await asyncio.to_thread(guard.end_all, local_harness.root)
        pids = re.findall(r"pid (\d+)", local_harness.log(attempt))
        assert [pid for pid in pids if processes.ticks_if_alive(pid) is not None] == []
        assert isinstance(await local_harness.final(attempt), Lost)

    local_harness.run(scenario)


def test_the_guard_needs_no_installed_package() -> None:
    """Python runs the guard isolated (-I -S). Here the guard finds no job to end."""
    exited = subprocess.Popen(["true"])
    exited.wait()
    command = [sys.executable, "-I", "-S", guard.__file__, "/nowhere", str(exited.pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
