"""What the local engine promises when something dies: a supervisor, a fork server, a disk. These are its
own processes and files; what every engine promises of an operator that dies is in `test_restarts`."""

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
        assert await harness.last(attempt) == Lost(
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
        lost = await harness.last(attempt)
        assert lost == Lost(attempt.spec.job_id, 1, "the supervisor was killed")
        assert harness.left_of_jobs() == []

    harness.run(scenario)


def test_a_supervisor_killed_while_no_operator_ran_loses_the_job(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.attempt(DAEMON), "started")

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "ready")
        os.kill(json.loads(harness.start_record(attempt).read_text())["pid"], signal.SIGKILL)
        await engine.recover(attempt)
        assert isinstance(await harness.last(attempt), Lost)

    harness.run(scenario)


def test_a_killed_fork_server_takes_no_job_along(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        servers = [
            int(line.split(":")[0]) for line in harness.left() if "forkserver/main.py" in line
        ]
        for pid in servers:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it was one's helper
                if parent(pid) == os.getpid():
                    os.kill(pid, signal.SIGKILL)
        again = harness.attempt("def task(c): return 2", api_id=attempt.spec.api_id)
        await harness.start(engine, again)
        last = await harness.last(again)
        assert isinstance(last, NeverStarted | Ended)
        harness.go()
        assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_a_folder_that_is_away_is_unreachable_until_it_is_back(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.started(attempt)
        supervisor = json.loads(harness.start_record(attempt).read_text())["pid"]
        away = harness.root.with_name("away")
        harness.root.rename(away)
        os.kill(supervisor, signal.SIGKILL)
        await harness.unreachable(attempt)
        away.rename(harness.root)
        await harness.last(attempt)
        kinds = [type(o) for o in harness.seen]
        assert kinds == [Started, Unreachable, Lost]

    harness.run(scenario)


def test_what_a_supervisor_says_needs_no_folder(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        away = harness.root.with_name("away")
        harness.root.rename(away)
        harness.go()
        assert (await harness.ended(attempt)).result == "done"
        away.rename(harness.root)

    harness.run(scenario)


def test_recovering_while_the_folder_is_away_waits_for_it(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")
    harness.go()

    async def scenario(engine: LocalEngine) -> None:
        folder = harness.root / attempt.spec.job_id
        away = harness.root / "away"
        folder.rename(away)
        await engine.recover(attempt)
        await harness.unreachable(attempt)
        away.rename(folder)
        assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_what_a_killed_operator_left_of_control_groups_is_swept(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        found = {engine._cgroups.memory, engine._cgroups.trees}
        places = {place for place in found if place is not None}
        for place in places:
            # A pid and its ticks that nobody has, and what earlier versions called it.
            for name in ("gone-1", "supervisor.1.1", "probe.1.1", "probe.1.1.limit", "probe123"):
                (place.folder / f"{engine._cgroups.prefix}{name}" / "below").mkdir(parents=True)
        assert len([line for line in harness.left() if "-jobs/" in line]) >= 5 * len(places)
        async with harness.engine():
            await until(lambda: not [line for line in harness.left() if "-jobs/" in line])

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


def test_what_a_killed_supervisor_leaves_is_found_without_session_or_environment(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(HIDDEN)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "ready")
        hidden = await harness.number_after(attempt, "hidden")
        assert exists(hidden)
        os.kill(json.loads(harness.start_record(attempt).read_bytes())["pid"], signal.SIGKILL)
        assert isinstance(await harness.last(attempt), Lost)
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
        assert isinstance(await harness.last(attempt), NeverStarted)

    harness.run(scenario)


def is_fork_server(pid: int, harness: EngineHarness) -> bool:
    # The folder tells it from one of another test in the same process.
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


def test_one_supervising_process_takes_one_job_after_another(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        code = "import os\ndef task(c): return os.getpid()"
        attempts = [harness.attempt(code)]
        version = attempts[0].version
        ends = [await harness.outcome(engine, attempts[0])]
        for _ in range(4):
            attempts.append(replace(harness.attempt(code), version=version))
            ends.append(await harness.outcome(engine, attempts[-1]))
        assert len({pid_of(harness, attempt) for attempt in attempts}) == 1
        assert len({end.result for end in ends}) == 5, "each job has a process of its own"

    harness.run(scenario)


def test_a_job_that_ended_is_told_so_also_while_its_supervisor_has_another(
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
        # An operator that comes up and had not stored the end of the first job yet.
        seen, harness.seen = harness.seen, []
        async with harness.engine() as other:
            await other.recover(replace(first, handle=records.make_handle()))
            assert (await harness.ended(first)).result == 1
            other.stop(first.spec.job_id)  # nothing that could reach the second
        harness.seen = seen
        harness.go()
        assert (await harness.ended(second)).result == "done"

    harness.run(scenario)


def ends(harness: EngineHarness) -> list[Ended]:
    return [seen for seen in harness.seen if isinstance(seen, Ended)]


def test_an_end_is_told_to_another_operator_while_the_first_keeps_the_supervisor(
    harness: EngineHarness,
) -> None:
    """As where an operator hangs, whose supervising processes wait for its next order."""

    async def scenario(engine: LocalEngine) -> None:
        attempt = await harness.begin(engine, harness.sleeper())
        await harness.printed(attempt, "pid")
        async with harness.engine() as other:
            await other.recover(attempt)
            harness.go()
            await until(lambda: len(ends(harness)) == 2)
            assert exists(pid_of(harness, attempt))

    harness.run(scenario)


def test_an_end_is_told_where_records_cannot_be_watched(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user has no inotify instance left: the end of the process tells."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many inotify instances")

    attempt = harness.killed_operator(harness.sleeper(), "started")
    monkeypatch.setattr(FileWatch, "watch_appearance", refuse)

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "pid")
        await engine.recover(attempt)
        harness.go()
        assert (await harness.ended(attempt)).result == "done"

    harness.run(scenario)


def test_a_stop_that_comes_late_is_not_taken_to_be_about_the_next_job(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        code = "def task(c): return 1"
        version = harness.attempt(code).version
        for _ in range(30):
            attempt = replace(harness.attempt(code), version=version)
            await harness.start(engine, attempt)
            await until(harness.start_record(attempt).exists)
            engine.stop(attempt.spec.job_id)  # it may have ended by itself already
            following = replace(harness.attempt(code), version=version)
            assert (await harness.outcome(engine, following)).ending is Ending.EXITED
            assert (await harness.ended(attempt)).ending in (Ending.EXITED, Ending.STOPPED)

    harness.run(scenario)


def test_idle_supervising_processes_end_with_their_version(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, attempt)
        pid = pid_of(harness, attempt)
        assert exists(pid)
        engine.forget(versions=[attempt.version.api.api_id])
        await until(lambda: not exists(pid))

    harness.run(scenario)


def test_a_supervising_process_that_is_killed_while_idle_costs_nobody_anything(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, attempt)
        for signum in (signal.SIGKILL, signal.SIGTERM):
            pid = pid_of(harness, attempt)
            os.kill(pid, signum)
            await until(lambda pid=pid: not exists(pid))
            for _ in range(2):  # the engine sees it too: else its order may come to nothing
                await asyncio.sleep(0)
            following = replace(harness.attempt("def task(c): return 1"), version=attempt.version)
            assert (await harness.outcome(engine, following)).result == 1
            attempt = following

    harness.run(scenario)


def test_the_process_of_the_next_job_that_is_killed_while_it_waits_costs_nobody_anything(
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


def test_a_file_that_changes_after_the_next_process_was_made_is_run_as_it_is_then(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(c): return 1")
        await harness.outcome(engine, attempt)
        await until(lambda: len(children(pid_of(harness, attempt))) == 1)
        following = replace(harness.attempt("def task(c): return 1 + 1"), version=attempt.version)
        assert (await harness.outcome(engine, following)).result == 2

    harness.run(scenario)


def test_an_order_that_nobody_took_up_is_fenced_without_a_search(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be very many, and a search looks at all processes and control groups there are."""
    searched: list[str] = []
    with_variable = processes.with_variable

    def counted(name: str, value: str) -> dict[int, int]:
        searched.append("processes")
        return with_variable(name, value)

    monkeypatch.setattr(processes, "with_variable", counted)

    async def scenario(engine: LocalEngine) -> None:
        for laid_out in ([], ["files"]):
            attempt = harness.attempt("def task(config): pass")
            attempt = replace(attempt, handle=engine.claim(attempt.spec.job_id, 1))
            for name in laid_out:
                (harness.folder(attempt) / name).mkdir()
            await engine.recover(attempt)
            assert isinstance(await harness.last(attempt), NeverStarted)
            assert searched == ["processes"] * len(laid_out)

    harness.run(scenario)


@contextlib.contextmanager
def sleeping(job_id: str, *fds: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "CORTEX_JOB_ID": job_id}
    with subprocess.Popen(["sleep", "300"], env=environment, pass_fds=fds) as running:
        try:
            # Right after it was executed it has no environment yet.
            asyncio.run(
                until(lambda: running.pid in processes.with_variable("CORTEX_JOB_ID", job_id))
            )
            yield running
        finally:
            running.kill()


def test_an_operator_that_hung_leaves_alone_what_a_later_attempt_runs(tmp_path: Path) -> None:
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


def test_a_job_that_writes_the_start_of_a_later_attempt_is_ended_all_the_same(
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
        assert isinstance(await harness.last(attempt), Lost)
        assert harness.left_of_jobs() == []

    harness.run(scenario)


def test_a_process_that_shows_no_environment_at_one_look_is_found_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does in the midst of an exec, for some microseconds."""
    with_variable, looks = processes.with_variable, [0]

    def blind_at_first(name: str, value: str) -> dict[int, int]:
        looks[0] += 1
        return {} if looks[0] == 1 else with_variable(name, value)

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
