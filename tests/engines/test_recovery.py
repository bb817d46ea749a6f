"""What every engine promises when something dies: the operator, a supervisor, a fork server, a disk."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Attempt, Ended, Ending, Lost, NeverStarted, Started, Unreachable
from cortex.engines.local import LocalEngine
from engines.bench import Bench, exists, parent, until

SLEEP = """
    import os, sys, time
    def task(config):
        with open(config["file"], "a") as file:
            file.write("ran\\n")
        print("pid", os.getpid(), flush=True)
        while not os.path.exists(config["file"] + ".go"):
            time.sleep(0.01)
        return "done"
"""


def killed_operator(bench: Bench, attempt: Attempt, moment: str) -> Attempt:
    """An operator starts the attempt and is killed; the attempt as the store holds it then."""
    told = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "operator_process.py")],
        input=pickle.dumps((str(bench.root), bench.grace_s, bench.memory_limit, moment, attempt)),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == -signal.SIGKILL, told.stderr.decode()
    return replace(attempt, handle=told.stdout.decode())


def marker(bench: Bench) -> Path:
    return bench.project.parent / "marker"


def sleeper(bench: Bench) -> Attempt:
    return bench.attempt(SLEEP, config={"file": str(marker(bench))})


def go(bench: Bench) -> None:
    Path(f"{marker(bench)}.go").touch()


def test_a_job_outlives_its_operator_and_is_taken_up_again(bench: Bench) -> None:
    attempt = killed_operator(bench, sleeper(bench), "started")

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        started = await bench.started(attempt)
        assert engine.reserve("other", attempt.version.api.compute) is None
        go(bench)
        ended = await bench.ended(attempt)
        assert (ended.ending, ended.result) == (Ending.EXITED, "done")
        assert ended.start_ns == started.start_ns

    bench.run(scenario)
    assert marker(bench).read_text() == "ran\n"


def test_a_recovered_job_can_be_stopped(bench: Bench) -> None:
    attempt = killed_operator(bench, sleeper(bench), "started")

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        engine.stop(attempt.spec.job_id)
        assert (await bench.ended(attempt)).ending is Ending.STOPPED

    bench.run(scenario)


def test_a_job_that_finished_meanwhile_is_told_as_it_was(bench: Bench) -> None:
    attempt = killed_operator(bench, sleeper(bench), "started")
    go(bench)

    async def scenario(engine: LocalEngine) -> None:
        exit_record = bench.root / attempt.spec.job_id / "exit.1"
        await until(exit_record.exists)
        await engine.recover(attempt)
        assert (await bench.ended(attempt)).result == "done"

    bench.run(scenario)


def test_a_job_outlives_a_closed_engine(bench: Bench) -> None:
    attempt = sleeper(bench)

    async def first(engine: LocalEngine) -> None:
        nonlocal attempt
        job_id = attempt.spec.job_id
        attempt = replace(attempt, handle=engine.claim(job_id, 1))
        await engine.start(attempt)
        await bench.printed(attempt, "pid")

    async def second(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        go(bench)
        assert (await bench.ended(attempt)).result == "done"

    bench.run(first)
    bench.run(second)
    assert sum(isinstance(o, Ended) for o in bench.seen) == 1


def test_claimed_but_never_started_is_told_so_and_never_runs(bench: Bench) -> None:
    attempt = killed_operator(bench, sleeper(bench), "claimed")

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        assert isinstance(await bench.last(attempt), NeverStarted)
        await engine.start(attempt)  # as if its order had been on its way all the time
        await bench.last(attempt)
        assert not marker(bench).exists()
        again = replace(attempt, number=2, handle=engine.claim(attempt.spec.job_id, 2))
        go(bench)
        await engine.start(again)
        assert (await bench.ended(again)).result == "done"

    bench.run(scenario)
    assert marker(bench).read_text() == "ran\n"


@pytest.mark.parametrize("moment", ["0", "0.01", "0.03", "0.05", "0.08"])
def test_an_operator_killed_at_any_moment_starts_an_attempt_once_at_most(
    bench: Bench, moment: str
) -> None:
    go(bench)
    attempt = killed_operator(bench, sleeper(bench), moment)

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        last = await bench.last(attempt)
        if isinstance(last, NeverStarted):
            again = replace(attempt, number=2, handle=engine.claim(attempt.spec.job_id, 2))
            await engine.start(again)
            last = await bench.last(again)
        assert isinstance(last, Ended)
        assert last.result == "done"

    bench.run(scenario)
    assert marker(bench).read_text() == "ran\n"


def test_after_a_restart_of_the_machine_a_running_job_is_lost(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        handle = json.loads(engine.claim("probe", 1))
        handle["boot"] = "another"
        attempt = replace(sleeper(bench), handle=json.dumps(handle))
        await engine.recover(attempt)
        assert await bench.last(attempt) == Lost(
            attempt.spec.job_id, 1, "the machine restarted while the job ran"
        )

    bench.run(scenario)


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


def test_a_killed_supervisor_loses_the_job_and_leaves_nothing(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt(DAEMON, mem=512 << 20)
        await bench.start(engine, attempt)
        await bench.printed(attempt, "ready")
        await bench.printed(attempt, "daemon")
        os.kill(json.loads(bench.start_record(attempt).read_text())["pid"], signal.SIGKILL)
        lost = await bench.last(attempt)
        assert lost == Lost(attempt.spec.job_id, 1, "the supervising process was killed")
        left = [line for line in bench.left() if "forkserver.py" not in line]
        assert left == []

    bench.run(scenario)


def test_a_supervisor_killed_while_no_operator_ran_loses_the_job(bench: Bench) -> None:
    attempt = killed_operator(bench, bench.attempt(DAEMON), "started")

    async def scenario(engine: LocalEngine) -> None:
        await bench.printed(attempt, "ready")
        os.kill(json.loads(bench.start_record(attempt).read_text())["pid"], signal.SIGKILL)
        await engine.recover(attempt)
        assert isinstance(await bench.last(attempt), Lost)

    bench.run(scenario)


def test_a_killed_fork_server_takes_no_job_along(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = sleeper(bench)
        await bench.start(engine, attempt)
        await bench.printed(attempt, "pid")
        servers = [int(line.split(":")[0]) for line in bench.left() if "forkserver.py" in line]
        for pid in servers:
            if parent(pid) == os.getpid():
                os.kill(pid, signal.SIGKILL)
        again = bench.attempt("def task(c): return 2", api_id=attempt.spec.api_id)
        await bench.start(engine, again)
        last = await bench.last(again)
        assert isinstance(last, NeverStarted | Ended)
        go(bench)
        assert (await bench.ended(attempt)).result == "done"

    bench.run(scenario)


def test_a_folder_that_is_away_is_unreachable_until_it_is_back(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = sleeper(bench)
        await bench.start(engine, attempt)
        await bench.printed(attempt, "pid")
        away = bench.root.with_name("away")
        bench.root.rename(away)
        go(bench)
        await bench.unreachable(attempt)
        away.rename(bench.root)
        assert (await bench.ended(attempt)).result == "done"
        kinds = [type(o) for o in bench.seen]
        assert kinds == [Started, Unreachable, Ended]

    bench.run(scenario)


def test_recovering_while_the_folder_is_away_waits_for_it(bench: Bench) -> None:
    attempt = killed_operator(bench, sleeper(bench), "started")
    go(bench)

    async def scenario(engine: LocalEngine) -> None:
        folder = bench.root / attempt.spec.job_id
        away = bench.root / "away"
        folder.rename(away)
        await engine.recover(attempt)
        await bench.unreachable(attempt)
        away.rename(folder)
        assert (await bench.ended(attempt)).result == "done"

    bench.run(scenario)


def test_what_a_killed_operator_left_of_control_groups_is_swept(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        for path in (engine._limits.memory_dir("gone", 1), engine._limits.kill_dir("gone", 1)):
            if path is not None:
                Path(path).mkdir(exist_ok=True)  # noqa: ASYNC240  # not on a disk
        async with bench.engine():
            assert not [line for line in bench.left() if "gone" in line]

    bench.run(scenario)


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
    bench: Bench,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt(HIDDEN)
        await bench.start(engine, attempt)
        await bench.printed(attempt, "ready")
        await bench.printed(attempt, "hidden")
        words = bench.log(attempt).split()
        hidden = int(words[words.index("hidden") + 1])
        assert exists(hidden)
        os.kill(json.loads(bench.start_record(attempt).read_bytes())["pid"], signal.SIGKILL)
        assert isinstance(await bench.last(attempt), Lost)
        await until(lambda: not exists(hidden))

    bench.run(scenario)


def test_a_fork_server_that_is_killed_before_it_is_ready_fails_no_job(bench: Bench) -> None:
    bench.bare_environment({"slow": "import time\ntime.sleep(300)\n"})

    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt("import slow\ndef task(config): ...")
        await bench.start(engine, attempt)

        def importing() -> list[int]:
            mine = (p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if exists(p))
            return [p for p in mine if parent(p) == os.getpid() and _is_fork_server(p, bench)]

        await until(importing)
        os.kill(importing()[0], signal.SIGKILL)
        assert isinstance(await bench.last(attempt), NeverStarted)

    bench.run(scenario)


def _is_fork_server(pid: int, bench: Bench) -> bool:
    # The folder tells it from one of another test in the same process.
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"forkserver.py" in command and Path(f"/proc/{pid}/cwd").resolve() == bench.project
    except OSError:
        return False
