"""The promises of the local engine when a supervisor, a fork server or a disk fails. Those are
the local engine's own; `test_restarts` has the promises of every engine when its operator dies."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Attempt, Ended, Ending, Lost, NeverStarted, Started, Unreachable
from cortex.engines.local import LocalEngine, leftovers, records
from cortex.joblog.watch import FileWatch
from cortex.worker import processes
from cortex.worker.messages import JOB_ID_ROOM
from cortex.worker.processes import children, stat
from engines.engine_harness import SLEEP, EngineHarness, exists, parent, until


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


def test_after_a_restart_of_the_machine_a_running_job_is_lost(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        handle = json.loads(engine.claim("probe", 1))
        handle["boot"] = "another"
        attempt = replace(harness.sleeper(), handle=json.dumps(handle))
        await engine.recover(attempt)
        assert await harness.final(attempt) == Lost(
            attempt.spec.job_id, 1, "the machine restarted while the job ran"
        )

    harness.run(scenario)


DAEMON = """
    import os, signal, subprocess, time
    def task(config):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                print("daemon", flush=True)
                time.sleep(60)
            os._exit(0)
        os.wait()
        subprocess.Popen(["sleep", "60"], start_new_session=True)
        print("ready", flush=True)
        time.sleep(60)
"""


def test_a_killed_supervisor_loses_the_job_and_leaves_nothing(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(DAEMON, mem=512 << 20)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "ready")
        await harness.printed(attempt, "daemon")
        os.kill(json.loads(harness.start_record(attempt).read_text())["pid"], signal.SIGKILL)
        lost = await harness.final(attempt)
        assert lost == Lost(attempt.spec.job_id, 1, "the supervisor was killed")
        assert harness.leftovers_of_jobs() == []

    harness.run(scenario)


def test_a_supervisor_killed_while_no_operator_ran_loses_the_job(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.attempt(DAEMON), "started")

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "ready")
        os.kill(json.loads(harness.start_record(attempt).read_text())["pid"], signal.SIGKILL)
        await engine.recover(attempt)
        assert isinstance(await harness.final(attempt), Lost)

    harness.run(scenario)


def test_a_killed_fork_server_ends_no_job(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        servers = [
            int(line.split(":")[0]) for line in harness.leftovers() if "forkserver/main.py" in line
        ]
        for pid in servers:
            # A helper of a fork server may have exited meanwhile.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if parent(pid) == os.getpid():
                    os.kill(pid, signal.SIGKILL)
        again = harness.attempt("def task(c): return 2", api_id=attempt.spec.api_id)
        await harness.start(engine, again)
        last = await harness.final(again)
        assert isinstance(last, NeverStarted | Ended)
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_a_job_is_unreachable_while_the_jobs_folder_is_missing(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.started(attempt)
        supervisor = json.loads(harness.start_record(attempt).read_text())["pid"]
        moved = harness.root.with_name("moved")
        harness.root.rename(moved)
        os.kill(supervisor, signal.SIGKILL)
        await harness.unreachable(attempt)
        moved.rename(harness.root)
        await harness.final(attempt)
        kinds = [type(o) for o in harness.observations]
        assert kinds == [Started, Unreachable, Lost]

    harness.run(scenario)


def test_an_end_that_a_supervisor_reports_needs_no_folder(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        moved = harness.root.with_name("moved")
        harness.root.rename(moved)
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).result == "done"
        moved.rename(harness.root)

    harness.run(scenario)


def test_the_recovery_of_a_job_waits_for_a_missing_folder(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")
    harness.finish_sleeper()

    async def scenario(engine: LocalEngine) -> None:
        folder = harness.root / attempt.spec.job_id
        moved = harness.root / "moved"
        folder.rename(moved)
        await engine.recover(attempt)
        await harness.unreachable(attempt)
        moved.rename(folder)
        assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_control_groups_of_a_killed_operator_are_swept(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        groups = {engine._cgroups.memory, engine._cgroups.trees}
        parents = {group for group in groups if group is not None}
        for group in parents:
            # A pid and ticks of no process, and the names that earlier versions used.
            for name in ("gone-1", "supervisor.1.1", "probe.1.1", "probe.1.1.limit", "probe123"):
                (group.folder / f"{engine._cgroups.prefix}{name}" / "below").mkdir(parents=True)
        assert len([line for line in harness.leftovers() if "-jobs/" in line]) >= 5 * len(parents)
        async with harness.engine():
            await until(lambda: not [line for line in harness.leftovers() if "-jobs/" in line])

    harness.run(scenario)


HIDDEN = r"""
    import subprocess, sys, time
    CODE = (
        "import os, time\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "if os.fork(): os._exit(0)\n"
        "print('hidden', os.getpid(), flush=True)\n"
        "time.sleep(300)\n"
    )
    def task(config):
        subprocess.run([sys.executable, "-c", CODE], env={})
        print("ready", flush=True)
        time.sleep(300)
"""


def test_leftovers_of_a_killed_supervisor_are_found_without_session_or_environment(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(HIDDEN)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "ready")
        hidden = await harness.number_in_log(attempt, "hidden")
        assert exists(hidden)
        os.kill(json.loads(harness.start_record(attempt).read_bytes())["pid"], signal.SIGKILL)
        assert isinstance(await harness.final(attempt), Lost)
        await until(lambda: not exists(hidden))

    harness.run(scenario)


def test_a_fork_server_that_is_killed_before_it_is_ready_fails_no_job(
    harness: EngineHarness,
) -> None:
    harness.bare_environment({"slow": "import time\ntime.sleep(300)\n"})

    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("import slow\ndef task(config): ...")
        await harness.start(engine, attempt)

        def importing() -> list[int]:
            return [pid for pid in children(os.getpid()) if is_fork_server(pid, harness)]

        await until(importing)
        os.kill(importing()[0], signal.SIGKILL)
        assert isinstance(await harness.final(attempt), NeverStarted)

    harness.run(scenario)


def is_fork_server(pid: int, harness: EngineHarness) -> bool:
    # The folder distinguishes it from the fork servers of other tests in the same process.
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return (
            b"forkserver/main.py" in command
            and Path(f"/proc/{pid}/cwd").resolve() == harness.project
        )
    except OSError:
        return False


def pid_of(harness: EngineHarness, attempt: Attempt) -> int:
    return int(json.loads(harness.start_record(attempt).read_text())["pid"])


def test_one_supervisor_runs_one_job_after_another(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        code = "import os\ndef task(c): return os.getpid()"
        attempts = [harness.attempt(code)]
        version = attempts[0].version
        ends = [await harness.outcome(engine, attempts[0])]
        for _ in range(4):
            attempts.append(replace(harness.attempt(code), version=version))
            ends.append(await harness.outcome(engine, attempts[-1]))
        assert len({pid_of(harness, attempt) for attempt in attempts}) == 1
        assert len({end.result for end in ends}) == 5, "two jobs had the same process"

    harness.run(scenario)


def test_an_ended_job_is_reported_while_its_supervisor_runs_another(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, first)
        second = replace(harness.sleeper(), version=first.version)
        harness.write(SLEEP)
        await harness.start(engine, second)
        await harness.printed(second, "pid")
        assert pid_of(harness, first) == pid_of(harness, second)
        # A new operator, which does not have the end of the first job in its store.
        observations, harness.observations = harness.observations, []
        async with harness.engine() as other:
            await other.recover(replace(first, handle=records.make_handle()))
            assert (await harness.ended(first)).result == 1
            other.stop(first.spec.job_id)  # must not reach the second job
        harness.observations = observations
        harness.finish_sleeper()
        assert (await harness.ended(second)).result == "done"

    harness.run(scenario)


def reported_ends(harness: EngineHarness) -> list[Ended]:
    return [each for each in harness.observations if isinstance(each, Ended)]


def test_an_end_is_reported_to_a_second_operator_while_the_first_has_the_supervisor(
    harness: EngineHarness,
) -> None:
    """The supervisors of an operator that hangs wait for its next order."""

    async def scenario(engine: LocalEngine) -> None:
        attempt = await harness.start_attempt(engine, harness.sleeper())
        await harness.printed(attempt, "pid")
        async with harness.engine() as other:
            await other.recover(attempt)
            harness.finish_sleeper()
            await until(lambda: len(reported_ends(harness)) == 2)
            assert exists(pid_of(harness, attempt))

    harness.run(scenario)


def test_an_end_is_reported_where_records_cannot_be_watched(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user has no inotify instance left: the end of the process shows the end of the job."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many inotify instances")

    attempt = harness.killed_operator(harness.sleeper(), "started")
    monkeypatch.setattr(FileWatch, "watch_appearance", refuse)

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "pid")
        await engine.recover(attempt)
        harness.finish_sleeper()
        assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_a_late_stop_does_not_reach_the_next_job(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        code = "def task(c): return 1"
        version = harness.attempt(code).version
        for _ in range(30):
            attempt = replace(harness.attempt(code), version=version)
            await harness.start(engine, attempt)
            await until(harness.start_record(attempt).exists)
            engine.stop(attempt.spec.job_id)  # the job may have ended by itself before
            following = replace(harness.attempt(code), version=version)
            assert (await harness.outcome(engine, following)).ending is Ending.EXITED
            assert (await harness.ended(attempt)).ending in (Ending.EXITED, Ending.STOPPED)

    harness.run(scenario)


def test_idle_supervisors_end_with_their_version(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, attempt)
        pid = pid_of(harness, attempt)
        assert exists(pid)
        engine.forget(versions=[attempt.version.api.api_id])
        await until(lambda: not exists(pid))

    harness.run(scenario)


def test_a_supervisor_that_is_killed_while_idle_fails_no_job(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, attempt)
        for signum in (signal.SIGKILL, signal.SIGTERM):
            pid = pid_of(harness, attempt)
            os.kill(pid, signum)
            await until(lambda pid=pid: not exists(pid))
            for _ in range(2):  # until the engine has observed it: else its order may fail
                await asyncio.sleep(0)
            following = replace(harness.attempt("def task(c): return 1"), version=attempt.version)
            assert (await harness.outcome(engine, following)).result == 1
            attempt = following

    harness.run(scenario)


def test_a_waiting_job_process_that_is_killed_fails_no_job(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, attempt)
        supervisor = pid_of(harness, attempt)
        await until(lambda: len(children(supervisor)) == 1)
        [waiting] = children(supervisor)
        os.kill(waiting, signal.SIGKILL)
        await until(lambda: (stat(waiting) or "Z")[0] == "Z")
        following = replace(harness.attempt("def task(c): return 1"), version=attempt.version)
        assert (await harness.outcome(engine, following)).result == 1
        assert pid_of(harness, following) == supervisor

    harness.run(scenario)


def test_a_file_that_changes_after_the_fork_ahead_is_run_as_changed(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, attempt)
        await until(lambda: len(children(pid_of(harness, attempt))) == 1)
        following = replace(harness.attempt("def task(c): return 1 + 1"), version=attempt.version)
        assert (await harness.outcome(engine, following)).result == 2

    harness.run(scenario)


def test_an_order_that_no_supervisor_took_is_fenced_without_a_search(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be very many such orders, and a search reads all processes and control groups."""
    searched: list[str] = []
    with_variable = processes.with_variable

    def counted(name: str, value: str) -> dict[int, int]:
        searched.append("processes")
        return with_variable(name, value)

    monkeypatch.setattr(processes, "with_variable", counted)

    async def scenario(engine: LocalEngine) -> None:
        for existing in ([], ["files"]):
            attempt = harness.attempt("def task(config): pass")
            attempt = replace(attempt, handle=engine.claim(attempt.spec.job_id, 1))
            for name in existing:
                (harness.folder(attempt) / name).mkdir()
            await engine.recover(attempt)
            assert isinstance(await harness.final(attempt), NeverStarted)
            assert searched == ["processes"] * len(existing)

    harness.run(scenario)


@contextlib.contextmanager
def sleeping(job_id: str, *fds: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "CORTEX_JOB_ID": job_id}
    with subprocess.Popen(["sleep", "300"], env=environment, pass_fds=fds) as running:
        try:
            # Right after the exec, /proc shows no environment yet.
            asyncio.run(
                until(lambda: running.pid in processes.with_variable("CORTEX_JOB_ID", job_id))
            )
            yield running
        finally:
            running.kill()


def test_an_operator_that_hung_ends_no_process_of_a_later_attempt(tmp_path: Path) -> None:
    folder = tmp_path / "job-of-two-attempts"
    folder.mkdir()
    (folder / "start.1").touch()
    (folder / "start.2").touch()
    opened = os.open(folder, os.O_RDONLY)
    with sleeping("-" * JOB_ID_ROOM, opened), sleeping(folder.name) as running:
        leftovers.end_leftovers(folder, 1)
        assert running.poll() is None
        leftovers.end_leftovers(folder, 2)
        assert running.wait() == -signal.SIGKILL
    os.close(opened)


def test_a_job_that_writes_the_start_record_of_a_later_attempt_is_still_ended(
    harness: EngineHarness,
) -> None:
    attempt = harness.killed_operator(harness.attempt(DAEMON, mem=512 << 20), "started")

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "daemon")
        await harness.printed(attempt, "ready")
        supervisor = pid_of(harness, attempt)
        await until(lambda: not is_fork_server(parent(supervisor), harness))
        for number in (2, 99):
            own = {"job_id": attempt.spec.job_id, "attempt": number, "pid": os.getpid()}
            harness.start_record(attempt).with_suffix(f".{number}").write_text(json.dumps(own))
        os.kill(supervisor, signal.SIGKILL)
        await engine.recover(attempt)
        assert isinstance(await harness.final(attempt), Lost)
        assert harness.leftovers_of_jobs() == []

    harness.run(scenario)


def test_a_process_without_an_environment_in_one_search_is_found_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an exec, /proc shows no environment for some microseconds."""
    with_variable, searches = processes.with_variable, [0]

    def blind_at_first(name: str, value: str) -> dict[int, int]:
        searches[0] += 1
        return {} if searches[0] == 1 else with_variable(name, value)

    monkeypatch.setattr(processes, "with_variable", blind_at_first)
    folder = tmp_path / "job-that-executes"
    folder.mkdir()
    environment = {**os.environ, "CORTEX_JOB_ID": folder.name}
    with subprocess.Popen(["sleep", "300"], env=environment) as running:
        asyncio.run(until(lambda: with_variable("CORTEX_JOB_ID", folder.name)))
        try:
            leftovers.end_leftovers(folder, 1)
            assert running.wait(60) == -signal.SIGKILL
        finally:
            running.kill()
