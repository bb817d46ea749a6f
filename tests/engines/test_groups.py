"""Control groups of every kind that this machine has: what is in one ends with it, and what they cannot do is told."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Lost
from cortex.engines.local import LocalEngine, cgroup_support, cgroups
from cortex.engines.local.cgroups import CgroupParent
from cortex.worker import processes
from engines.engine_harness import EngineHarness, until

# It multiplies for as long as nobody ends it, each time in a session of its own, and ignores whatever can be.
BOMB = """
import os, signal, sys, time
sys.stdin.read()
for number in signal.valid_signals():
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
until = time.monotonic() + 60
made = 0
while time.monotonic() < until:
    if made < 8 and os.fork() == 0:
        made = 8 * (os.getpid() % 2)
        os.setsid()
    made += 1
    time.sleep(0.01)
"""


def places() -> list[CgroupParent]:
    found = []
    for controller, folders in cgroup_support._mounts().items():
        if controller in ("", "freezer", "pids"):
            found.append(
                CgroupParent("v1" if controller else "v2", folders[0] / f"cortex-test{os.getpid()}")
            )
    return found


@pytest.fixture(params=places(), ids=lambda place: place.folder.parent.name)
def place(request: pytest.FixtureRequest) -> Iterator[CgroupParent]:
    made: CgroupParent = request.param
    try:
        made.folder.mkdir()
    except OSError as error:
        pytest.skip(f"this user has no control groups there: {error}")
    yield made
    made.remove()
    assert not made.folder.exists()


def test_what_multiplies_in_a_group_and_in_those_below_it_ends(place: CgroupParent) -> None:
    bomb = subprocess.Popen([sys.executable, "-c", BOMB], stdin=subprocess.PIPE, env={})
    group = place.create_group_of(bomb.pid, "cortex-x-supervisor.1.1")
    below = group / "a" / "b"
    below.mkdir(parents=True)
    assert bomb.stdin is not None
    bomb.stdin.close()
    end = time.monotonic() + 60
    while len(cgroups.members(group)) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    cgroups.write(below / "cgroup.procs", cgroups.members(group)[-1])
    members = cgroups.members(group) + cgroups.members(below)
    assert cgroups.kill_and_remove(group, 60)
    bomb.wait()
    assert not group.exists()
    assert not [pid for pid in members if (about := processes.stat(pid)) and about[0] not in "ZX"]


def test_a_process_that_is_gone_gets_no_group(place: CgroupParent) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(ProcessLookupError):
        place.create_group_of(gone.pid, "gone")
    assert not (place.folder / "gone").exists()


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[EngineHarness]:
    made = EngineHarness(tmp_path)
    yield made

    def nothing_is_left() -> bool:
        made.sweep()
        return not made.left()

    asyncio.run(until(nothing_is_left))


def limited(engine: LocalEngine) -> None:
    if engine._cgroups.memory is None:
        pytest.skip("no control group limits memory here")


def test_a_job_whose_group_cannot_be_made_is_lost_with_the_reason(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        limited(engine)
        place = engine._cgroups.memory
        assert place is not None
        engine._cgroups.memory = replace(place, folder=Path("/no/such"))
        attempt = harness.attempt("def task(config): ...", mem=64 << 20)
        await harness.start(engine, attempt)
        last = await harness.last(attempt)
        assert isinstance(last, Lost)
        assert last.reason.startswith("its control group cannot be made: ")
        engine._cgroups.memory = place

    harness.run(scenario)


def test_a_job_whose_group_somebody_removes_is_lost_and_runs_without_no_limit(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        limited(engine)
        harness.bare_environment({})
        attempt = harness.attempt("def task(config): ...", mem=64 << 20)
        await harness.start(engine, attempt)  # it waits for the interpreter
        [group] = engine._cgroups._limits.values()
        group.rmdir()
        last = await harness.last(attempt)
        assert isinstance(last, Lost)
        assert "the job's control group does not exist" in last.reason

    harness.run(scenario)


def test_a_superseded_operator_that_closes_takes_no_groups_place(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        limited(engine)
        assert engine._cgroups.memory is not None
        assert engine._cgroups.trees is not None
        engine._cgroups.memory.remove()
        engine._cgroups.trees.remove()
        attempt = harness.attempt(
            "def task(config): return open('/proc/self/cgroup').read()", mem=64 << 20
        )
        found = str((await harness.outcome(engine, attempt)).result)
        assert f"{attempt.spec.job_id}-1" in found
        assert "supervisor." in found or engine._cgroups.memory == engine._cgroups.trees

    harness.run(scenario)


def test_a_place_of_an_operator_that_was_killed_goes_although_another_hierarchy_works_now(
    harness: EngineHarness,
) -> None:
    mounts = cgroup_support._mounts()
    of_another = next((mounts[each][-1] for each in ("pids", "cpu", "") if each in mounts), None)
    if of_another is None or not os.access(of_another, os.W_OK):
        pytest.skip("this user has no control groups")
    place = of_another / f"{cgroup_support.group_prefix(harness.root)}jobs"
    place.mkdir()

    async def scenario(engine: LocalEngine) -> None:
        assert place.is_dir()

    harness.run(scenario)
    assert not place.exists()


def test_a_place_that_works_stays_where_no_limit_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = cgroup_support._mounts()
    monkeypatch.setattr(cgroup_support, "_mounts", lambda: {**mounts, "": [], "memory": [tmp_path]})
    found = cgroup_support.probe(tmp_path)
    if found.trees is None:
        pytest.skip("this user has no control groups")
    assert found.kind == "watchdog"
    assert found.trees.folder.is_dir()
    found.trees.remove()


def test_a_group_is_of_a_process_that_lives_or_an_orphan() -> None:
    about = processes.stat("self")
    assert about is not None
    assert not cgroups.is_orphaned(Path(f"cortex-a-supervisor.{os.getpid()}.{about[2]}"))
    assert cgroups.is_orphaned(Path(f"cortex-a-supervisor.{os.getpid()}.{about[2] + 1}"))
    assert cgroups.is_orphaned(Path("cortex-a-probe.1.0.limit"))
    assert not cgroups.is_orphaned(Path("cortex-a-01m8jff2wbtpp7xy25-1"))
    zombie = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    ticks = processes.stat(zombie.pid)
    zombie.stdout.read()
    assert ticks is not None
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert cgroups.is_orphaned(Path(f"cortex-a-supervisor.{zombie.pid}.{ticks[2]}"))
    zombie.wait()
    zombie.stdout.close()
