"""What users' code may tell the operator, which acts on it with rights that the code may not have."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import cortex
from cortex.account import Account
from cortex.engines.base import Attempt, Lost
from cortex.engines.local import LocalEngine, limits, records
from cortex.worker.processes import stat
from engines.bench import Bench

NOBODY = Account("nobody", 65534, 65534, (65534,), "/")
START = {"pid": 1, "ticks": 1, "start_ns": 1, "cgroups": [], "gpus": []}
END = {"ending": "exited", "exit_code": 0, "start_ns": 1, "end_ns": 1, "message": None}


@pytest.fixture
def bench(local_bench: Bench) -> Bench:
    return local_bench


def forged(bench: Bench, name: str, data: bytes) -> Attempt:
    """An attempt of an earlier operator, with such a record."""
    attempt = bench.attempt("def task(config): ...", handle=records.handle())
    records.make(str(bench.folder(attempt)), None)
    (bench.folder(attempt) / "start.1").write_text(json.dumps(START))
    (bench.folder(attempt) / name).write_bytes(data)
    return attempt


def test_a_record_that_is_none_is_a_lost_job_and_nothing_else(bench: Bench) -> None:
    odd = [b"[" * 100000, b"[]", b"1", b'"ending"', b"null", b"\xff"]
    start = [
        {"pid": "x"}, {"pid": -1}, {"pid": 1 << 40}, {"ticks": None}, {"start_ns": 1 << 70},
        {"cgroups": "/"}, {"cgroups": [1]}, {"gpus": {"a": 1}}, {"gpus": ["0"]},
    ]  # fmt: skip
    end = [
        {"ending": "over"}, {"ending": ["exited"]}, {"exit_code": "0"}, {"exit_code": 1 << 40},
        {"start_ns": None}, {"end_ns": 1 << 70}, {"message": {}},
    ]  # fmt: skip
    spoilt = [("start.1", data) for data in odd] + [("exit.1", data) for data in odd]
    spoilt += [("start.1", json.dumps({**START, **field}).encode()) for field in start]
    spoilt += [("exit.1", json.dumps({**END, **field}).encode()) for field in end]

    async def scenario(engine: LocalEngine) -> None:
        for name, data in spoilt:
            attempt = forged(bench, name, data)
            await engine.recover(attempt)
            assert isinstance(await bench.last(attempt), Lost), (name, data)
            engine.stop(attempt.spec.job_id)

    bench.run(scenario)


def test_what_can_be_no_record_is_not_read(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = forged(bench, "exit.1", json.dumps(END).encode())
        os.truncate(bench.folder(attempt) / "exit.1", 1 << 40)
        await engine.recover(attempt)
        assert isinstance(await bench.last(attempt), Lost)
        attempt = forged(bench, "job.json", b"{}")
        with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(bench.folder(attempt)):
            bound.bind("exit.1")
        await engine.recover(attempt)
        assert isinstance(await bench.last(attempt), Lost)

    bench.run(scenario)


def test_no_group_but_its_own_is_ended_with_a_job(bench: Bench, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"]) as victim:

        async def scenario(engine: LocalEngine) -> None:
            attempt = forged(bench, "exit.1", b"")
            group = tmp_path / "group" / f"{limits.prefix(bench.root)}{attempt.spec.job_id}-1"
            group.mkdir(parents=True)
            (group / "cgroup.procs").write_text(f"{victim.pid}\n")
            (group / "cgroup.kill").touch()
            start = {**START, "cgroups": [str(group), f"/sys/fs/cgroup/../..{group}"]}
            bench.start_record(attempt).write_text(json.dumps(start))
            await engine.recover(attempt)
            assert isinstance(await bench.last(attempt), Lost)
            assert victim.poll() is None
            assert (group / "cgroup.kill").read_text() == ""

        bench.run(scenario)
        victim.kill()


def test_a_process_of_somebody_elses_is_no_supervisor(bench: Bench) -> None:
    about = stat(os.getpid())
    assert about is not None
    own = json.dumps({**START, "pid": os.getpid(), "ticks": about[2]}).encode()
    attempt = forged(bench, "start.1", own)
    alive = records.look(bench.folder(attempt), attempt)
    assert isinstance(alive, records.Alive)
    os.close(alive.pidfd)
    look = records.look(bench.folder(attempt), attempt, NOBODY)
    assert isinstance(look, records.Gone)
    same = replace(NOBODY, uid=os.getuid())
    alive = records.look(bench.folder(attempt), attempt, same)
    assert isinstance(alive, records.Alive)
    os.close(alive.pidfd)


FORGED = """#!{python}
import json, os, socket, sys
sys.path.insert(0, {source!r})
from cortex.worker import bare, messages
sys.stdin.read()
operator = socket.socket(fileno=int(sys.argv[3]))
operator.send(messages.Reply().dumps())
while operator.recv(65536):
    ours, theirs = bare.socketpair()
    reply = messages.Reply(pid={pid})
    bare.send_fds(operator, reply.dumps(), (os.pidfd_open({pid}), ours.fileno()))
"""


def test_a_fork_server_cannot_name_a_process_of_somebody_elses(bench: Bench) -> None:
    assert os.geteuid() == 0, "this test needs root, as the operator does for --run-as"
    own = Account("root", 0, 0, (0,), "/")
    with subprocess.Popen(["sleep", "300"], user=NOBODY.uid) as victim:
        bench.python = bench.project / "python"
        source = str(Path(cortex.__file__).parents[1])
        script = FORGED.format(python=sys.executable, source=source, pid=victim.pid)
        bench.python.write_text(script)
        bench.python.chmod(0o755)

        async def scenario(_: LocalEngine) -> None:
            engine = LocalEngine(bench.root, None, 1, bench.memory_limit, own)
            await engine.open(bench._saw)
            attempt = bench.attempt("def task(config): ...")
            await bench.start(engine, attempt)
            last = await bench.last(attempt)
            assert isinstance(last, Lost)
            assert "not of the jobs' user" in last.reason
            await engine.close()
            assert victim.poll() is None

        bench.run(scenario)
        victim.kill()
