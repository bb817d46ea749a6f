"""Control groups of every kind that this machine has: their processes end with them, and a group
that cannot be made loses its job with the reason."""

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

# Forks until it is killed or 60 s have passed, each time in a new session, and ignores all signals
# that a process can ignore.
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


def parent_groups() -> list[CgroupParent]:
    groups = []
    for controller, folders in cgroup_support._mounts().items():
        if controller in ("", "freezer", "pids"):
            groups.append(
                CgroupParent("v1" if controller else "v2", folders[0] / f"cortex-test{os.getpid()}")
            )
    return groups


@pytest.fixture(params=parent_groups(), ids=lambda group: group.folder.parent.name)
def parent_group(request: pytest.FixtureRequest) -> Iterator[CgroupParent]:
    made: CgroupParent = request.param
    try:
        made.folder.mkdir()
    except OSError as error:
        pytest.skip(f"this user has no control groups there: {error}")
    yield made
    made.remove()
    assert not made.folder.exists()


def test_a_fork_bomb_in_a_group_and_in_the_groups_below_it_ends(parent_group: CgroupParent) -> None:
    bomb = subprocess.Popen([sys.executable, "-c", BOMB], stdin=subprocess.PIPE, env={})
    group = parent_group.create_group_of(bomb.pid, "cortex-x-supervisor.1.1")
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


def test_an_exited_process_gets_no_group(parent_group: CgroupParent) -> None:
    exited = subprocess.Popen(["true"])
    exited.wait()
    with pytest.raises(ProcessLookupError):
        parent_group.create_group_of(exited.pid, "exited")
    assert not (parent_group.folder / "exited").exists()


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[EngineHarness]:
    made = EngineHarness(tmp_path)
    yield made

    def has_no_leftovers() -> bool:
        made.remove_orphaned_groups()
        return not made.leftovers()

    asyncio.run(until(has_no_leftovers))


def skip_without_memory_limits(engine: LocalEngine) -> None:
    if engine._cgroups.memory is None:
        pytest.skip("no control group limits memory here")


def test_a_job_whose_group_cannot_be_made_is_lost_with_the_reason(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        skip_without_memory_limits(engine)
        memory = engine._cgroups.memory
        assert memory is not None
        engine._cgroups.memory = replace(memory, folder=Path("/no/such"))
        attempt = harness.attempt("def task(config): ...", mem=64 << 20)
        await harness.start(engine, attempt)
        last = await harness.final(attempt)
        assert isinstance(last, Lost)
        assert last.reason.startswith("its control group cannot be made: ")
        engine._cgroups.memory = memory

    harness.run(scenario)


def test_a_job_whose_group_is_removed_is_lost_and_does_not_run_unlimited(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        skip_without_memory_limits(engine)
        harness.bare_environment({})
        attempt = harness.attempt("def task(config): ...", mem=64 << 20)
        await harness.start(engine, attempt)  # it waits for the fork server
        [group] = engine._cgroups._limits.values()
        group.rmdir()
        last = await harness.final(attempt)
        assert isinstance(last, Lost)
        assert "the job's control group does not exist" in last.reason

    harness.run(scenario)


def test_jobs_still_get_groups_after_a_superseded_operator_removed_the_parent_groups(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        skip_without_memory_limits(engine)
        assert engine._cgroups.memory is not None
        assert engine._cgroups.trees is not None
        engine._cgroups.memory.remove()
        engine._cgroups.trees.remove()
        attempt = harness.attempt(
            "def task(config): return open('/proc/self/cgroup').read()", mem=64 << 20
        )
        groups = str((await harness.outcome(engine, attempt)).result)
        assert f"{attempt.spec.job_id}-1" in groups
        assert "supervisor." in groups or engine._cgroups.memory == engine._cgroups.trees

    harness.run(scenario)


def test_a_parent_group_of_a_killed_operator_is_removed_also_from_an_unused_hierarchy(
    harness: EngineHarness,
) -> None:
    mounts = cgroup_support._mounts()
    unused = next((mounts[each][-1] for each in ("pids", "cpu", "") if each in mounts), None)
    if unused is None or not os.access(unused, os.W_OK):
        pytest.skip("this user has no control groups")
    parent_group = unused / f"{cgroup_support.group_prefix(harness.root)}jobs"
    parent_group.mkdir()

    async def scenario(engine: LocalEngine) -> None:
        assert parent_group.is_dir()

    harness.run(scenario)
    assert not parent_group.exists()


def test_a_parent_group_is_used_for_process_trees_where_no_memory_limit_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = cgroup_support._mounts()
    monkeypatch.setattr(cgroup_support, "_mounts", lambda: {**mounts, "": [], "memory": [tmp_path]})
    support = cgroup_support.probe(tmp_path)
    if support.trees is None:
        pytest.skip("this user has no control groups")
    assert support.kind == "watchdog"
    assert support.trees.folder.is_dir()
    support.trees.remove()


def test_a_group_without_a_live_process_is_an_orphan() -> None:
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
