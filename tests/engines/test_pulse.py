"""A fork server that does not do its work is noticed and replaced; one that works hard is not."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from dataclasses import replace

import pytest

from cortex.engines.base import NeverStarted
from cortex.engines.local import LocalEngine, process, pulse
from cortex.worker import processes
from engines.bench import Bench, until
from engines.test_recovery import pid_of

# Takes what the fork server is asked from its own socket, by the numbers of system calls that all machines have.
STEALS = """
    import ctypes, os, select, socket
    libc = ctypes.CDLL(None, use_errno=True)
    def task(config):
        server = int(open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[1])
        pidfd = libc.syscall(434, server, 0)
        own = []
        for number in range(3, 64):
            fd = libc.syscall(438, pidfd, number, 0)
            if fd >= 0 and os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                own.append(socket.socket(fileno=fd))
        print("stolen", len(own), flush=True)
        while own:
            for each in select.select(own, [], [])[0]:
                each.recv(100)
"""


@pytest.fixture
def bench(local_bench: Bench) -> Bench:
    return local_bench


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "LOOK_S", 0.1)


def server_of(bench: Bench, attempt: object) -> int:
    about = processes.stat(pid_of(bench, attempt))  # type: ignore[arg-type]
    assert about is not None
    return about[1]


def test_a_fork_server_whose_orders_somebody_else_takes_is_replaced(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        thief = bench.attempt(STEALS)
        await bench.start(engine, thief)
        await bench.printed(thief, "stolen")
        if "stolen 0" in bench.log(thief):
            pytest.skip("processes of one user may not take files of one another here")
        server = server_of(bench, thief)
        # Those that were asked for before have supervising processes.
        others = [replace(bench.attempt(STEALS), version=thief.version) for _ in range(4)]
        for other in others:
            await bench.start(engine, other)
        await until(lambda: any(isinstance(seen, NeverStarted) for seen in bench.seen))
        assert pulse.SILENT in bench.waits
        # Its socket has not ended: the thief has it.
        await until(lambda: processes.living(server) is None)
        bench.write("def task(config): return 1")
        after = replace(bench.attempt("def task(config): return 1"), version=thief.version)
        assert (await bench.outcome(engine, after)).result == 1
        for each in (thief, *others):
            engine.stop(each.spec.job_id)
            await bench.last(each)

    bench.run(scenario)


SLOW = "import time\ntime.sleep(1)\n"


def test_an_import_that_takes_many_looks_is_waited_for(bench: Bench) -> None:
    bench.bare_environment({"slow": SLOW})

    async def scenario(engine: LocalEngine) -> None:
        code = "import slow, sys\ndef task(config): return 'slow' in sys.modules"
        attempt = bench.attempt(code, preload=("slow",))
        end = await bench.outcome(engine, attempt)
        assert (end.result, end.hints) == (True, ())

    bench.run(scenario)


def test_a_fork_server_that_is_stopped_in_an_import_goes_on(bench: Bench) -> None:
    bench.bare_environment({"stops": f"import os\nos.kill(os.getpid(), {int(signal.SIGSTOP)})\n"})

    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt("import stops\ndef task(config): ...", preload=("stops",))
        end = await bench.outcome(engine, attempt)
        assert end.hints == ()
        assert pulse.STOPPED in bench.waits

    bench.run(scenario)


def test_a_look_that_has_no_descriptors_is_made_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, looks = processes.stat, [0]

    def short(pid: int | str) -> tuple[str, int, int] | None:
        looks[0] += 1
        if looks[0] == 1:
            raise OSError(24, "too many open files")
        return stat(pid)

    bench.bare_environment({"stops": f"import os\nos.kill(os.getpid(), {int(signal.SIGSTOP)})\n"})

    async def scenario(engine: LocalEngine) -> None:
        monkeypatch.setattr(pulse.processes, "stat", short)
        attempt = bench.attempt("import stops\ndef task(config): return 1", preload=("stops",))
        assert (await bench.outcome(engine, attempt)).result == 1
        assert looks[0] > 1

    bench.run(scenario)


def test_a_fork_server_is_ended_also_where_there_is_no_thread_to_wait_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*_: object) -> None:
        raise OSError(11, "no thread is to be had")

    monkeypatch.setattr(process, "in_thread", refuse)
    with subprocess.Popen(["sleep", "300"]) as running:
        asyncio.run(process.ended(running))
        assert running.returncode == -signal.SIGKILL
