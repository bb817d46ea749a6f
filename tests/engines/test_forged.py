"""Forged records and messages of users' code, which the operator must not trust."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cortex
from cortex.engines.base import Attempt, Lost, NeverStarted
from cortex.engines.local import LocalEngine, cgroup_support, records
from cortex.system.account import Account
from cortex.worker.processes import stat
from engines.engine_harness import EngineHarness, parent, until
from engines.test_recovery import DAEMON, is_fork_server, pid_of
from operator_harness import as_unprivileged_owner

NOBODY = Account("nobody", 65534, 65534, (65534,), "/")
START = {"pid": 1, "ticks": 1, "start_ns": 1, "gpus": []}
END = {"ending": "exited", "exit_code": 0, "start_ns": 1, "end_ns": 1, "message": None}


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


def attempt_with_record(harness: EngineHarness, name: str, data: bytes) -> Attempt:
    """An attempt of an earlier operator, with this record in its folder."""
    attempt = harness.attempt("def task(config): ...", handle=records.make_handle())
    harness.root.mkdir(exist_ok=True)
    records.create_job_folder(str(harness.folder(attempt)), None)
    (harness.folder(attempt) / "start.1").write_text(json.dumps(START))
    (harness.folder(attempt) / name).write_bytes(data)
    return attempt


def test_an_invalid_record_is_a_lost_job_and_nothing_else(harness: EngineHarness) -> None:
    invalid = [b"", b"[" * 100000, b"[]", b"1", b'"ending"', b"null", b"\xff"]
    start: list[dict[str, Any]] = [
        {"pid": "x"}, {"pid": -1}, {"pid": 1 << 40}, {"ticks": None}, {"start_ns": 1 << 70},
        {"gpus": {"a": 1}}, {"gpus": ["0"]},
    ]  # fmt: skip
    end: list[dict[str, Any]] = [
        {"ending": "over"}, {"ending": ["exited"]}, {"exit_code": "0"}, {"exit_code": 1 << 40},
        {"start_ns": None}, {"end_ns": 1 << 70}, {"message": {}},
    ]  # fmt: skip
    spoilt = [("start.1", data) for data in invalid] + [("exit.1", data) for data in invalid]
    spoilt += [("start.1", json.dumps({**START, **field}).encode()) for field in start]
    spoilt += [("exit.1", json.dumps({**END, **field}).encode()) for field in end]

    async def scenario(engine: LocalEngine) -> None:
        for name, data in spoilt:
            attempt = attempt_with_record(harness, name, data)
            await engine.recover(attempt)
            assert isinstance(await harness.final(attempt), Lost), (name, data)
            engine.stop(attempt.spec.job_id)

    harness.run(scenario)


def attempt_with_spoilt_start_record(
    harness: EngineHarness, spoil: Callable[[Path], object]
) -> Attempt:
    """An attempt that runs without its operator, and has spoilt its start record."""
    attempt = harness.killed_operator(harness.sleeper(), "started")
    asyncio.run(harness.printed(attempt, "pid"))
    spoil(harness.start_record(attempt))
    return attempt


def replacing(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(record: Path) -> None:
        record.unlink()
        make(record)

    return spoil


SPOILS: dict[str, Callable[[Path], object]] = {
    "emptied": lambda record: record.write_bytes(b""),
    "garbled": lambda record: record.write_bytes(b"\0\0"),
    "fenced": lambda record: record.write_bytes(b'{"fenced": true}'),
    "another's": lambda record: record.write_text(json.dumps(START)),
    "removed": lambda record: record.unlink(),
    "link": replacing(lambda record: record.symlink_to("elsewhere")),
    "pipe": replacing(os.mkfifo),
    "folder": replacing(os.mkdir),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_that_has_spoilt_its_start_record_is_still_recovered(
    harness: EngineHarness, spoil: str
) -> None:
    attempt = attempt_with_spoilt_start_record(harness, SPOILS[spoil])

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        await harness.started(attempt)
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).result == "done"
        assert harness.marker.read_text() == "ran\n"

    harness.run(scenario)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_with_a_spoilt_start_record_and_no_supervisor_is_ended_and_lost(
    harness: EngineHarness, spoil: str
) -> None:
    attempt = harness.killed_operator(harness.attempt(DAEMON, mem=512 << 20), "started")

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "daemon")
        await harness.printed(attempt, "ready")
        supervisor = pid_of(harness, attempt)
        # The fork server of the killed operator would end the remaining processes as well.
        await until(lambda: not is_fork_server(parent(supervisor), harness))
        SPOILS[spoil](harness.start_record(attempt))
        os.kill(supervisor, signal.SIGKILL)
        await engine.recover(attempt)
        assert isinstance(await harness.final(attempt), Lost)
        assert harness.leftovers_of_jobs() == []

    harness.run(scenario)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_with_a_spoilt_start_record_leaves_no_process_when_its_supervisor_dies(
    harness: EngineHarness, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(DAEMON, mem=512 << 20)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "daemon")
        await harness.printed(attempt, "ready")
        supervisor = pid_of(harness, attempt)
        SPOILS[spoil](harness.start_record(attempt))
        os.kill(supervisor, signal.SIGKILL)
        assert isinstance(await harness.final(attempt), Lost | NeverStarted)
        assert harness.leftovers_of_jobs() == []

    harness.run(scenario)


def test_a_job_that_has_no_environment_and_no_record_is_not_started_again(
    harness: EngineHarness,
) -> None:
    command = ["env", "-i", "sh", "-c", 'echo pid; until [ -e "$0" ]; do sleep 0.1; done']
    go = f"{harness.marker}.go"
    attempt = harness.killed_operator(harness.attempt(command=[*command, go]), "started")

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "pid")
        harness.start_record(attempt).write_bytes(b"")
        await engine.recover(attempt)
        await harness.started(attempt)
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).exit_code == 0

    harness.run(scenario)


def test_a_valid_exit_record_counts_without_a_valid_start_record(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        for spoil in SPOILS.values():
            attempt = attempt_with_record(harness, "exit.1", json.dumps(END).encode())
            spoil(harness.start_record(attempt))
            await engine.recover(attempt)
            assert (await harness.ended(attempt)).exit_code == 0

    harness.run(scenario)


def test_a_record_that_its_owner_may_not_read_does_not_count(harness: EngineHarness) -> None:
    attempt = attempt_with_record(harness, "exit.1", json.dumps(END).encode())

    def move_folder(own: Path) -> None:
        harness.folder(attempt).rename(own / attempt.spec.job_id)

    def is_exited_without_record(own: Path) -> bool:
        for record in (own / attempt.spec.job_id).iterdir():
            record.chmod(0)
        state = records.inspect_attempt(own / attempt.spec.job_id, attempt)
        return isinstance(state, records.Exited) and state.exit is None

    assert as_unprivileged_owner(move_folder, is_exited_without_record)


def test_a_file_that_cannot_be_a_record_is_not_read(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = attempt_with_record(harness, "exit.1", json.dumps(END).encode())
        os.truncate(harness.folder(attempt) / "exit.1", 1 << 40)
        await engine.recover(attempt)
        assert isinstance(await harness.final(attempt), Lost)
        attempt = attempt_with_record(harness, "job.json", b"{}")
        with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(harness.folder(attempt)):
            bound.bind("exit.1")
        await engine.recover(attempt)
        assert isinstance(await harness.final(attempt), Lost)

    harness.run(scenario)


def test_only_the_group_of_a_job_is_ended_with_it(harness: EngineHarness, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"]) as victim:

        async def scenario(engine: LocalEngine) -> None:
            attempt = attempt_with_record(harness, "exit.1", b"")
            group = (
                tmp_path
                / "group"
                / f"{cgroup_support.group_prefix(harness.root)}{attempt.spec.job_id}-1"
            )
            group.mkdir(parents=True)
            (group / "cgroup.procs").write_text(f"{victim.pid}\n")
            (group / "cgroup.kill").touch()
            start = {**START, "cgroups": [str(group), f"/sys/fs/cgroup/../..{group}"]}
            harness.start_record(attempt).write_text(json.dumps(start))
            await engine.recover(attempt)
            assert isinstance(await harness.final(attempt), Lost)
            assert victim.poll() is None
            assert (group / "cgroup.kill").read_text() == ""

        harness.run(scenario)
        victim.kill()


def test_a_process_of_another_user_is_no_supervisor(harness: EngineHarness) -> None:
    about = stat(os.getpid())
    assert about is not None
    own = json.dumps({**START, "pid": os.getpid(), "ticks": about[2]}).encode()
    attempt = attempt_with_record(harness, "start.1", own)
    alive = records.inspect_attempt(harness.folder(attempt), attempt)
    assert isinstance(alive, records.Alive)
    os.close(alive.pidfd)
    state = records.inspect_attempt(harness.folder(attempt), attempt, NOBODY)
    assert isinstance(state, records.Exited)
    same = replace(NOBODY, uid=os.getuid())
    alive = records.inspect_attempt(harness.folder(attempt), attempt, same)
    assert isinstance(alive, records.Alive)
    os.close(alive.pidfd)


def test_a_process_without_the_jobs_folder_open_is_no_supervisor(
    harness: EngineHarness,
) -> None:
    with subprocess.Popen(["sleep", "300"]) as victim:
        about = stat(victim.pid)
        assert about is not None
        own = json.dumps({**START, "pid": victim.pid, "ticks": about[2]}).encode()

        async def scenario(engine: LocalEngine) -> None:
            attempt = attempt_with_record(harness, "start.1", own)
            await engine.recover(attempt)
            engine.stop(attempt.spec.job_id)
            assert isinstance(await harness.final(attempt), Lost)
            assert victim.poll() is None

        harness.run(scenario)
        victim.kill()


FORGED_FORK_SERVER = """#!{python}
import json, os, socket, sys
sys.path.insert(0, {source!r})
from cortex.worker import messages, syscalls
sys.stdin.read()
operator = socket.socket(fileno=int(sys.argv[3]))
operator.send(messages.Reply().dumps())
while operator.recv(65536):
    ours, theirs = syscalls.socketpair()
    reply = messages.Reply(pid={pid})
    syscalls.send_fds(operator, reply.dumps(), (os.pidfd_open({pid}), ours.fileno()))
"""


def test_a_fork_server_cannot_name_a_process_of_another_user(harness: EngineHarness) -> None:
    assert os.geteuid() == 0, "this test needs root, as the operator does for --run-as"
    own = Account("root", 0, 0, (0,), "/")
    with subprocess.Popen(["sleep", "300"], user=NOBODY.uid) as victim:
        harness.python = harness.project / "python"
        source = str(Path(cortex.__file__).parents[1])
        script = FORGED_FORK_SERVER.format(python=sys.executable, source=source, pid=victim.pid)
        harness.python.write_text(script)
        harness.python.chmod(0o755)

        async def scenario(_: LocalEngine) -> None:
            engine = LocalEngine(harness.root, None, 1, harness.memory_limit, own)
            await engine.open(harness.report)
            attempt = harness.attempt("def task(config): ...")
            await harness.start(engine, attempt)
            last = await harness.final(attempt)
            assert isinstance(last, Lost)
            assert "not run as the jobs' user" in last.reason
            await engine.close()
            assert victim.poll() is None

        harness.run(scenario)
        victim.kill()


SPEAKING_FORK_SERVER = """#!{python}
import array, json, os, socket, sys
sys.path.insert(0, {source!r})
from cortex.worker import messages
sys.stdin.read()
operator = socket.socket(fileno=int(sys.argv[3]))
ready = messages.Reply().dumps()
pid = json.dumps(dict(pid=os.getpid())).encode()


def send(data, *fds):
    packed = array.array("i", fds)
    operator.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)] if fds else [])


def pidfd():
    return os.pidfd_open(os.getpid())


{sends}
operator.recv(1)
while operator.recv(65536):
    pass
"""
MESSAGES = {
    "no JSON": "send(b'{')",
    "other types": """send(b'{"pid": "1"}')""",
    "an import that was not requested": """send(b'{"importing": "os"}')""",
    "that it is ready, twice": "send(ready); send(ready)",
    "a process that was not requested": "send(pid, pidfd(), operator.fileno())",
    "an error without a request": """send(b'{"error": "no"}')""",
    "files with nothing": "send(ready, 1, 2); send(b'x')",
    "a file for a process": "send(ready); operator.recv(9); send(pid, 1, operator.fileno())",
    "a file for a socket": "send(ready); operator.recv(9); send(pid, pidfd(), os.open('/', 0))",
    "a socket of another kind": (
        "send(ready); operator.recv(9); send(pid, pidfd(), socket.socketpair()[0].fileno())"
    ),
    "a record": """send(b'{"record": {"end_ns": "x"}, "ended": true}')""",
    "very much": "for _ in range(100000): send(ready)",
}


@pytest.mark.parametrize("sends", MESSAGES)
def test_a_fork_server_whose_socket_users_code_writes_to_harms_no_other_version(
    harness: EngineHarness, sends: str
) -> None:
    good = harness.python
    harness.python = harness.project / "python"
    source = str(Path(cortex.__file__).parents[1])
    harness.python.write_text(
        SPEAKING_FORK_SERVER.format(python=sys.executable, source=source, sends=MESSAGES[sends])
    )
    harness.python.chmod(0o755)

    async def scenario(engine: LocalEngine) -> None:
        before = set(os.listdir("/proc/self/fd"))
        attempt = harness.attempt("def task(config): ...")
        await harness.start(engine, attempt)
        last = await harness.final(attempt)
        assert isinstance(last, Lost | NeverStarted)
        if isinstance(last, Lost):
            assert "not valid" in last.reason or "not run as the jobs' user" in last.reason
        engine.forget(versions=[attempt.spec.api_id])
        await until(lambda: len(set(os.listdir("/proc/self/fd")) - before) <= 1)
        harness.python = good
        assert (
            await harness.outcome(engine, harness.attempt("def task(config): return 1"))
        ).result == 1

    harness.run(scenario)


def test_a_job_cannot_claim_a_gpu_that_it_does_not_have(harness: EngineHarness) -> None:
    """The handle in the store lists the job's GPUs. A handle of an earlier version has no such
    list: there the start record counts."""
    attempt = harness.attempt("def task(config): ...", gpu=1, handle=records.make_handle(gpus=[1]))
    old = replace(attempt, handle=records.make_handle())
    harness.root.mkdir(exist_ok=True)
    records.create_job_folder(str(harness.folder(attempt)), None)
    job_id = attempt.spec.job_id
    for gpus, granted in (([1], [1]), ([0, 1], []), ([], []), ([0, 0], []), (["0"], [])):
        start = {**START, "job_id": job_id, "attempt": 1, "gpus": gpus}
        harness.start_record(attempt).write_text(json.dumps(start))
        assert records.granted_gpus(harness.folder(attempt), attempt) == [1]
        assert records.granted_gpus(harness.folder(attempt), old) == granted
    assert records.granted_gpus(harness.folder(attempt), replace(old, handle="[]")) == []
