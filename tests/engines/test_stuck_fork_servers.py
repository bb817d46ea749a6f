"""The engine replaces a fork server that hangs, and keeps a busy one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from dataclasses import replace

import pytest

from cortex.engines.base import Attempt, Ended, NeverStarted
from cortex.engines.local import LocalEngine, fork_server_health, fork_server_process
from cortex.worker import processes
from engines.engine_harness import EngineHarness, until
from engines.test_recovery import pid_of

# Takes the fork server's orders from a copy of its socket, by the numbers of system calls that are
# the same on all machines.
STEALS_ORDERS = """
    import ctypes, os, socket, time
    libc = ctypes.CDLL(None, use_errno=True)
    def task(config):
        own = stolen_sockets() if config["steals"] else []
        while not os.path.exists(config["go"]):
            for _ in range(1000 if own else 0):
                for each in own:
                    try:
                        each.recv(100, socket.MSG_DONTWAIT)
                    except OSError:
                        pass
            time.sleep(0 if own else 0.02)
    def stolen_sockets():
        server = int(open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[1])
        pidfd = libc.syscall(434, server, 0)
        own = []
        for number in range(3, 64):
            fd = libc.syscall(438, pidfd, number, 0)
            if fd >= 0 and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                own.append(socket.socket(fileno=fd))
        print("stolen", len(own), flush=True)
        return own
"""


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server_health, "POLL_INTERVAL_S", 0.1)


def fork_server_of(harness: EngineHarness, attempt: object) -> int:
    about = processes.stat(pid_of(harness, attempt))  # type: ignore[arg-type]
    assert about is not None
    return about[1]


def test_a_fork_server_whose_orders_another_process_takes_is_replaced(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        go = str(harness.marker)
        thief = harness.attempt(STEALS_ORDERS, config={"steals": True, "go": go}, cpu_m=1)
        await harness.start(engine, thief)
        await harness.printed(thief, "stolen")
        if "stolen 0" in harness.log(thief):
            pytest.skip("processes of one user may not take files of one another here")
        server = fork_server_of(harness, thief)
        others: list[Attempt] = []

        def is_stolen() -> bool:
            return any(isinstance(each, NeverStarted) for each in harness.observations)

        while not is_stolen() and len(others) < 400:
            for _ in range(8):  # of 8 orders at a time, the thief usually gets at least one
                each = harness.attempt(config={"steals": False, "go": go})
                others.append(replace(each, version=thief.version))
                await harness.start(engine, others[-1])
            with contextlib.suppress(AssertionError):
                await until(is_stolen, 5)
        assert fork_server_health.SILENT in harness.wait_reasons
        # The socket is still open: the thief has a copy.
        await until(lambda: processes.ticks_if_alive(server) is None)
        after = replace(harness.attempt(config={"steals": False, "go": go}), version=thief.version)
        await harness.start(engine, after)
        await harness.started(after)
        harness.marker.touch()
        for each in (thief, *others, after):
            assert isinstance(await harness.final(each), Ended | NeverStarted)
        engine.forget(versions=[thief.version.api.api_id])
        await until(
            lambda: not [line for line in harness.leftovers() if "forkserver/main.py" in line]
        )

    harness.run(scenario)


SLOW = "import time\ntime.sleep(1)\n"


def test_an_import_that_lasts_for_many_polls_does_not_count_as_a_hang(
    harness: EngineHarness,
) -> None:
    harness.bare_environment({"slow": SLOW})

    async def scenario(engine: LocalEngine) -> None:
        code = "import slow, sys\ndef task(config): return 'slow' in sys.modules"
        attempt = harness.attempt(code, preload=("slow",))
        end = await harness.outcome(engine, attempt)
        assert (end.result, end.hints) == (True, ())

    harness.run(scenario)


def test_a_fork_server_that_is_stopped_in_an_import_is_continued(harness: EngineHarness) -> None:
    harness.bare_environment({"stops": f"import os\nos.kill(os.getpid(), {int(signal.SIGSTOP)})\n"})

    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("import stops\ndef task(config): ...", preload=("stops",))
        end = await harness.outcome(engine, attempt)
        assert end.hints == ()
        assert fork_server_health.STOPPED in harness.wait_reasons

    harness.run(scenario)


def test_a_poll_that_fails_for_lack_of_descriptors_is_repeated(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, polls = processes.stat, [0]

    def fail_once(pid: int | str) -> tuple[str, int, int] | None:
        polls[0] += 1
        if polls[0] == 1:
            raise OSError(24, "too many open files")
        return stat(pid)

    harness.bare_environment({"stops": f"import os\nos.kill(os.getpid(), {int(signal.SIGSTOP)})\n"})

    async def scenario(engine: LocalEngine) -> None:
        monkeypatch.setattr(processes, "stat", fail_once)
        attempt = harness.attempt("import stops\ndef task(config): return 1", preload=("stops",))
        assert (await harness.outcome(engine, attempt)).result == 1
        assert polls[0] > 1

    harness.run(scenario)


def test_a_fork_server_is_ended_also_where_no_thread_can_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: object) -> None:
        raise OSError(11, "no thread is to be had")

    monkeypatch.setattr(fork_server_process, "in_thread", refuse)
    with subprocess.Popen(["sleep", "300"]) as running:
        asyncio.run(fork_server_process.wait_or_kill(running))
        assert running.returncode == -signal.SIGKILL
