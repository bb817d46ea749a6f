"""A v2 group that kills a tree at one stroke: used with v2 limits, tried here on an empty v2 mount."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from cortex.engines.base import Ending, Lost
from cortex.engines.local import LocalEngine, limits
from engines.bench import Bench

MOUNT = next(
    (
        p
        for p in map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"))
        if (p / "cgroup.procs").exists()
    ),
    None,
)
ESCAPE = """
    import os, subprocess, time
    def task(config):
        # Nothing in its environment, command line or parents tells whose it is.
        subprocess.Popen(["sleep", "60"], env={}, cwd="/", start_new_session=True)
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def grouped(local_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    if MOUNT is None or not os.access(MOUNT / "cgroup.procs", os.W_OK):
        pytest.skip("there is no v2 mount that this user may write")
    found = limits.Limits("watchdog", limits.prefix(local_bench.root), None, MOUNT)
    monkeypatch.setattr(limits, "probe", lambda *_: found)
    monkeypatch.setattr(limits, "watchdog", lambda _: found)
    return local_bench


def test_a_stop_ends_all_that_is_in_the_group(grouped: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = grouped.attempt(ESCAPE)
        await grouped.start(engine, attempt)
        await grouped.printed(attempt, "ready")
        engine.stop(attempt.spec.job_id)
        assert (await grouped.ended(attempt)).ending is Ending.STOPPED

    grouped.grace_s = 0.3
    grouped.run(scenario)


def test_a_killed_supervisor_leaves_nothing_in_the_group(grouped: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = grouped.attempt(ESCAPE)
        await grouped.start(engine, attempt)
        await grouped.printed(attempt, "ready")
        record = json.loads(grouped.start_record(attempt).read_text())
        [group] = record["cgroups"]
        assert len((Path(group) / "cgroup.procs").read_text().split()) == 2
        os.kill(record["pid"], signal.SIGKILL)
        assert isinstance(await grouped.last(attempt), Lost)
        assert not [line for line in grouped.left() if line.startswith("/sys/fs")]

    grouped.run(scenario)
