"""The promises of every engine about one attempt, from its start to its end."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Ended, Ending, Engine, NeverStarted, Started
from engines.engine_harness import EngineHarness, exists

MIB = 1 << 20
SH = "/bin/sh"


def test_a_task_succeeds_with_its_result(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(
            "class Task:\n    def __call__(self, config):\n        return {'got': config}\n",
            config={"mine": [1, "ä"]},
        )
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code, ended.message) == (Ending.EXITED, 0, None)
        assert ended.has_result
        assert ended.result == {"got": {"deployed": True, "mine": [1, "ä"]}}
        assert attempt.spec.created_ns <= ended.start_ns <= ended.end_ns

    harness.run(scenario)


def test_a_start_is_reported_while_the_job_runs(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.sleeper()
        await harness.start(engine, attempt)
        started = await harness.started(attempt)
        harness.finish_sleeper()
        ended = await harness.ended(attempt)
        assert attempt.spec.created_ns <= started.start_ns == ended.start_ns
        assert harness.observations.index(started) < harness.observations.index(ended)

    harness.run(scenario)


def test_a_task_may_be_a_function(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        ended = await harness.outcome(engine, harness.attempt("def task(config): return 7"))
        assert (ended.result, ended.has_result) == (7, True)

    harness.run(scenario)


def test_an_exception_is_exit_1_with_its_last_line_and_a_traceback_of_the_users_frames(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        harness.write("def check(c):\n    raise ValueError(f'bad {c}')\n", "helper.py")
        attempt = harness.attempt(
            "import helper\nclass Task:\n    def __call__(self, config):\n"
            "        print('before')\n        helper.check('C')\n"
        )
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code) == (Ending.EXITED, 1)
        assert ended.message == "ValueError: bad C"
        assert not ended.has_result
        lines = harness.log(attempt).splitlines()
        assert lines[:2] == ["before", "Traceback (most recent call last):"]
        assert lines[-1] == "ValueError: bad C"
        files = [line.split('"')[1] for line in lines if line.startswith("  File")]
        here = harness.files(attempt).name
        assert [file.split("/")[-2:] for file in files] == [[here, "task.py"], [here, "helper.py"]]

    harness.run(scenario)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import nowhere_to_be_found",
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("x = 1", "task.py defines neither a class Task nor a function task(config)"),
        ("def task(config) return 1", "SyntaxError"),
        ("class Task: pass", "the class Task of task.py has no method __call__"),
        ("async def task(config): pass", "the task is async"),
    ],
)
def test_a_file_that_is_no_task_is_a_clear_error(
    harness: EngineHarness, code: str, message: str
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(code)
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code) == (Ending.EXITED, 1)
        assert ended.message is not None
        assert ended.message.startswith(message)
        assert message in harness.log(attempt)
        assert "cortex/worker" not in harness.log(attempt)

    harness.run(scenario)


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("0", 0, None),
        ("None", 0, None),
        ("3", 3, "exit code 3: on my way"),
        ("'no such file'", 1, "no such file"),
    ],
)
def test_sys_exit_is_honoured(
    harness: EngineHarness, code: str, exit_code: int, message: str | None
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(
            f"import sys\ndef task(config):\n    print('on my way')\n    sys.exit({code})\n"
        )
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code, ended.message) == (
            Ending.EXITED,
            exit_code,
            message,
        )
        assert not ended.has_result

    harness.run(scenario)


@pytest.mark.parametrize(
    ("command", "exit_code", "message"),
    [
        (["true"], 0, None),
        ([SH, "-c", "echo one; echo two; echo; exit 3"], 3, "exit code 3: two"),
        ([SH, "-c", "exit 7"], 7, "exit code 7"),
        ([SH, "-c", "kill -SEGV $$"], -signal.SIGSEGV, "killed by SIGSEGV"),
        ([SH, "-c", "kill -KILL $$"], -signal.SIGKILL, "killed by SIGKILL"),
        (["no-such-program", "x"], 127, "exit code 127: cortex: cannot run 'no-such-program'"),
        (["./not-executable"], 126, "exit code 126: cortex: cannot run './not-executable'"),
    ],
)
def test_a_command_ends_with_its_own_exit_code(
    harness: EngineHarness, command: list[str], exit_code: int, message: str | None
) -> None:
    async def scenario(engine: Engine) -> None:
        harness.write("x", "not-executable")
        ended = await harness.outcome(engine, harness.attempt(command=command))
        assert (ended.ending, ended.exit_code) == (Ending.EXITED, exit_code)
        assert (ended.message or "").startswith(message or "")
        assert (ended.message is None) == (message is None)

    harness.run(scenario)


def test_a_worker_that_is_killed_from_outside_has_exited_by_that_signal(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(
            "import os, time\ndef task(config):\n"
            "    print('pid', os.getpid(), flush=True)\n    time.sleep(60)\n"
        )
        await harness.start(engine, attempt)
        await harness.printed(attempt, "pid")
        os.kill(int(harness.log(attempt).split()[1]), signal.SIGKILL)
        ended = await harness.ended(attempt)
        assert (ended.ending, ended.exit_code) == (Ending.EXITED, -9)

    harness.run(scenario)


# The process stays large until the watchdog has measured it.
EAT = """
b = []
for _ in range(400): b.append(bytearray(1 << 20)); time.sleep(0.002)
time.sleep(60)
"""
# A leftover process has a second from the end of its shell. The interpreter has started by then:
# the shell waits for the file "ready".
EAT_AFTER_SHELL_ENDS = """
import os, time
shell = os.getppid()
open("ready", "w").close()
while os.getppid() == shell: time.sleep(0.001)
b = bytearray(128 << 20)
time.sleep(60)
"""


def test_a_task_over_its_memory_is_out_of_memory(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        eat = "\n".join("    " + line for line in EAT.splitlines())
        attempt = harness.attempt(f"import time\ndef task(config):\n{eat}\n", mem=96 * MIB)
        ended = await harness.outcome(engine, attempt)
        assert ended.ending is Ending.OUT_OF_MEMORY
        assert ended.exit_code == -9
        assert ended.message == "exceeded its memory limit of 96 MiB"

    harness.run(scenario)


def test_a_child_over_the_memory_is_out_of_memory_though_its_shell_continues(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        (harness.project / "eat.py").write_text("import time\n" + EAT)
        attempt = harness.attempt(
            command=[SH, "-c", f"{sys.executable} eat.py; sleep 60; exit 0"], mem=96 * MIB
        )
        ended = await harness.outcome(engine, attempt)
        assert ended.ending is Ending.OUT_OF_MEMORY

    harness.run(scenario)


def test_a_child_over_the_memory_after_its_shell_ended_is_out_of_memory(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: Engine) -> None:
        (harness.project / "eat.py").write_text(EAT_AFTER_SHELL_ENDS)
        script = f"{sys.executable} eat.py & until [ -e ready ]; do sleep 0.01; done"
        attempt = harness.attempt(command=[SH, "-c", script], mem=64 * MIB)
        ended = await harness.outcome(engine, attempt)
        assert ended.ending is Ending.OUT_OF_MEMORY

    harness.run(scenario)


def test_a_task_within_its_memory_succeeds(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(config): return len(bytearray(8 << 20))", mem=96 * MIB)
        assert (await harness.outcome(engine, attempt)).result == 8 * MIB

    harness.run(scenario)


def test_the_timeout_ends_a_job(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        code = "import time\ndef task(config): time.sleep(config['s'])"
        first = harness.attempt(code, config={"s": 0})
        # Without a first job, the timeout may pass before there is an interpreter.
        await harness.outcome(engine, first)
        attempt = harness.attempt(code, config={"s": 60}, timeout=1)
        ended = await harness.outcome(engine, replace(attempt, version=first.version))
        assert ended.ending is Ending.TIMED_OUT
        assert ended.message == "timeout of 1 s passed"
        deadline_ns = attempt.spec.deadline_ns
        assert deadline_ns is not None
        assert ended.end_ns >= deadline_ns

    harness.run(scenario)


def test_a_stopped_task_may_save_its_work(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("""
            import os, signal, sys, time
            def save(*_):
                os.write(1, b"saved\\n")  # print is not safe in a signal handler
                sys.exit(0)
            def task(config):
                signal.signal(signal.SIGTERM, save)
                print("ready", flush=True)
                time.sleep(60)
        """)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "ready")
        engine.stop(attempt.spec.job_id)
        ended = await harness.ended(attempt)
        assert (ended.ending, ended.exit_code) == (Ending.STOPPED, 0)
        assert harness.log(attempt) == "ready\nsaved\n"
        engine.stop(attempt.spec.job_id)  # has no effect on an ended job

    harness.grace_s = 60
    harness.run(scenario)


def test_a_task_that_ignores_the_stop_is_killed_after_the_grace(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("""
            import signal, time
            def task(config):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print("ready", flush=True)
                time.sleep(60)
        """)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "ready")
        engine.stop(attempt.spec.job_id)
        ended = await harness.ended(attempt)
        assert (ended.ending, ended.exit_code) == (Ending.STOPPED, -9)

    harness.grace_s = 0.3
    harness.run(scenario)


def test_a_stop_right_after_the_start_is_not_lost(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        for _ in range(5):
            attempt = harness.attempt(command=["sleep", "60"], api_id="same")
            await harness.start(engine, attempt)
            engine.stop(attempt.spec.job_id)
            last = await harness.final(attempt)
            assert isinstance(last, NeverStarted) or (
                isinstance(last, Ended) and last.ending is Ending.STOPPED
            )

    harness.run(scenario)


DAEMON = """
    import os, signal, time
    def task(config):
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print("daemon", os.getpid(), flush=True)
                os.write(write, b"1")
                time.sleep(60)
            os._exit(0)
        os.wait()
        os.read(read, 1)
        time.sleep(config["sleep"])
"""


@pytest.mark.parametrize("sleep", [0.2, 60])
def test_daemonised_grandchildren_end_with_the_job(harness: EngineHarness, sleep: float) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(DAEMON, config={"sleep": sleep})
        await harness.start(engine, attempt)
        await harness.printed(attempt, "daemon")
        pid = int(harness.log(attempt).split()[1])
        if sleep > 1:
            engine.stop(attempt.spec.job_id)
        ended = await harness.ended(attempt)
        assert ended.ending is (Ending.STOPPED if sleep > 1 else Ending.EXITED)
        assert not exists(pid)

    harness.grace_s = 0.3
    harness.run(scenario)


def test_a_stop_ends_a_fork_bomb(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        # Each process lives for 5 ms and then forks a successor; there are never more than 60.
        attempt = harness.attempt("""
            import os, signal, time
            def task(config):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print("ready", flush=True)
                for _ in range(20):
                    if os.fork() == 0:
                        os.setsid()
                        for _ in range(3000):
                            time.sleep(0.005)
                            if os.fork():
                                os._exit(0)
                        os._exit(0)
                time.sleep(60)
        """)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "ready")
        engine.stop(attempt.spec.job_id)
        assert (await harness.ended(attempt)).ending is Ending.STOPPED

    harness.grace_s = 0.2
    harness.run(scenario)


def test_the_log_is_complete_and_in_order(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("""
            import subprocess, sys, threading, time
            written = threading.Event()
            def late():
                written.wait()
                time.sleep(0.1)
                print("from a thread")
            def task(config):
                print("ünï\\udc80")
                print("error", file=sys.stderr)
                subprocess.run(["echo", "child"])
                threading.Thread(target=late).start()
                import atexit
                atexit.register(print, "at exit")
                sys.stdout.write("no newline")
                written.set()
        """)
        await harness.outcome(engine, attempt)
        assert harness.log(attempt) == (
            "ünï\\udc80\nerror\nchild\nno newlinefrom a thread\nat exit\n"
        )

    harness.run(scenario)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("object()", "not JSON"),
        ("float('nan')", "not JSON"),
        ("'x' * (1 << 20)", "more than the limit of 1 MiB (1048576 bytes)"),
    ],
)
def test_a_result_that_cannot_be_stored_does_not_fail_the_task(
    harness: EngineHarness, value: str, why: str
) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(f"def task(config): return {value}")
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code, ended.has_result) == (Ending.EXITED, 0, False)
        assert ended.message is not None
        assert why in ended.message

    harness.run(scenario)


def test_a_large_result_is_stored(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        ended = await harness.outcome(
            engine, harness.attempt("def task(config): return 'x' * 1000000")
        )
        assert ended.result == "x" * 1000000

    harness.run(scenario)


def test_nothing_leaks_from_one_job_to_the_next(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.write("seen = []\n", "state.py")
        code = """
            import random, os, state
            import json
            def task(config):
                state.seen.append(1)
                json.leaked = getattr(json, "leaked", 0) + 1
                os.environ["LEAK"] = os.environ.get("LEAK", "") + "x"
                return [len(state.seen), json.leaked, os.environ["LEAK"], random.random()]
        """
        results = []
        for _ in range(2):
            ended = await harness.outcome(engine, harness.attempt(code, api_id="same"))
            results.append(ended.result)
        assert [r[:3] for r in results if isinstance(r, list)] == [[1, 1, "x"]] * 2
        assert results[0] != results[1]

    harness.run(scenario)


def test_the_users_modules_shadow_others_as_in_plain_python(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        # The worker has imported its own json before. A built-in module is never the user's.
        harness.write("mine = True\n", "json.py")
        harness.write("mine = True\n", "lib/other.py")
        attempt = harness.attempt(
            "import json, other\ndef task(config): return [json.mine, other.mine]",
            python_path="lib",
        )
        assert (await harness.outcome(engine, attempt)).result == [True, True]

    harness.run(scenario)


def test_multiprocessing_works_with_every_start_method(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(
            """
            import multiprocessing
            from cortex.logger import logger
            def double(x):
                return 2 * x
            def task(config):
                found = []
                for method in ("fork", "spawn", "forkserver"):
                    with multiprocessing.get_context(method).Pool(2) as pool:
                        found += pool.map(double, [1, 2])
                return found
            """,
            path="deep/work.py",
        )
        assert (await harness.outcome(engine, attempt)).result == [2, 4, 2, 4, 2, 4]

    harness.run(scenario)


def test_the_environment_is_clean(harness: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPERATORS_SECRET", "s")
    harness.env = {"MINE": "m", "PATH": "/opt/bin:/usr/bin:/bin"}

    async def scenario(engine: Engine) -> None:
        probe = "import os\ndef task(config): return dict(os.environ)"
        attempt = harness.attempt(probe)
        env = (await harness.outcome(engine, attempt)).result
        assert isinstance(env, dict)
        folder = harness.folder(attempt)
        assert "OPERATORS_SECRET" not in env
        assert env["MINE"] == "m"
        assert env["CORTEX_JOB_ID"] == attempt.spec.job_id
        assert env["CORTEX_API_NAME"] == "probe"
        assert env["CORTEX_JOB_DIR"] == str(folder / "files")
        assert env["CORTEX_LOG_LEVEL"] == "info"
        assert env["PYTHONUNBUFFERED"] == "1"
        assert (folder / "files").is_dir()
        assert env["CORTEX_JOB_SPEC"] == str(folder / "job.json")
        job = json.loads((folder / "job.json").read_text())
        assert job["config"] == {"deployed": True}
        attempt = harness.attempt(command=["env"])
        await harness.outcome(engine, attempt)
        names = {line.partition("=")[0] for line in harness.log(attempt).splitlines()}
        assert names == set(env) - {"LC_CTYPE"} or names == set(env)

    harness.run(scenario)


def test_a_worker_inherits_no_file_and_no_signal_state(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(command=["ls", "-l", "/proc/self/fd"])
        await harness.outcome(engine, attempt)
        lines = harness.log(attempt).splitlines()
        targets = [line.split(" -> ")[1] for line in lines if " -> " in line]
        path = str(harness.folder(attempt) / "log")
        assert targets[:3] == ["/dev/null", path, path]
        assert len(targets) == 4  # the last is the folder that ls lists
        attempt = harness.attempt(command=["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"])
        await harness.outcome(engine, attempt)
        masks = [int(line.split()[1], 16) for line in harness.log(attempt).splitlines()]
        # Signals 32 and 33 belong to the C library: no program can reset their inherited state.
        assert [mask & ~(0b11 << 31) for mask in masks] == [0, 0]
        attempt = harness.attempt("import os\ndef task(c): return os.listdir('/proc/self/fd')")
        fds = (await harness.outcome(engine, attempt)).result
        assert isinstance(fds, list)
        assert len(fds) == 5  # three streams, the pipe for the result, and the listed folder
        attempt = harness.attempt(command=["pwd"])
        await harness.outcome(engine, attempt)
        # A copy of the project has its folder's name, an overlay its whole path.
        assert Path(harness.log(attempt).strip()).name == harness.files(attempt).name

    harness.run(scenario)


def test_the_logger_writes_json_lines(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("""
            from cortex.logger import logger
            def task(config):
                logger.debug("not shown")
                logger.info("hello %s", "you", extra={"rows": 3})
                try:
                    1 / 0
                except ZeroDivisionError:
                    logger.exception("oh")
        """)
        await harness.outcome(engine, attempt)
        first, second = map(json.loads, harness.log(attempt).splitlines())
        assert first.pop("timestamp").endswith("Z")
        assert first == {
            "level": "info",
            "message": "hello you",
            "api_name": "probe",
            "job_id": attempt.spec.job_id,
            "rows": 3,
        }
        assert second["exc_info"].endswith("ZeroDivisionError: division by zero")

    harness.run(scenario)


def test_a_job_has_the_users_environment_and_the_preloaded_modules(harness: EngineHarness) -> None:
    """The operator's site-packages are not visible; `definition.preload` is imported ahead."""

    async def scenario(engine: Engine) -> None:
        ahead = "import os\npid = os.getpid()\n"
        harness.bare_environment({"third": ahead, "fourth": ahead})
        harness.write("import os\npid = os.getpid()\n", "own.py")
        attempt = harness.attempt(
            """
            import importlib.util, os, sys
            import own, third, fourth
            from cortex.logger import logger
            def task(config):
                logger.info("here")
                return {
                    "pydantic": importlib.util.find_spec("pydantic") is not None,
                    "own": own.pid == os.getpid(),
                    "third": third.pid == os.getpid(),
                    "fourth": fourth.pid == os.getpid(),
                    "prefix": sys.prefix,
                    "venv": os.environ["VIRTUAL_ENV"],
                }
            """,
            preload=("fourth",),
        )
        result = (await harness.outcome(engine, attempt)).result
        assert isinstance(result, dict)
        venv = result.pop("venv")
        assert venv != sys.prefix
        expected = {"pydantic": False, "own": True, "third": True, "fourth": False}
        assert result == {**expected, "prefix": venv}

    harness.run(scenario)


@pytest.mark.parametrize(
    ("module", "exit_code"),
    [
        (
            "import threading, time\nt = threading.Thread(target=time.sleep, args=(60,), daemon=True)\nt.start()\n",
            0,
        ),
        ("import os\nfile = open(os.devnull)\n", 0),
        ("import os\nos._exit(5)\n", 5),
    ],
    ids=["thread", "file", "exit"],
)
def test_an_import_that_jobs_cannot_share_is_done_by_each_job(
    harness: EngineHarness, module: str, exit_code: int
) -> None:
    async def scenario(engine: Engine) -> None:
        harness.bare_environment({"third": "import os\npid = os.getpid()\n" + module})
        attempt = harness.attempt(
            "import os, third\ndef task(config): return third.pid == os.getpid()"
        )
        ended = await harness.outcome(engine, attempt)
        assert ended.exit_code == exit_code
        assert ended.result is (None if exit_code else True)

    harness.run(scenario)


def test_a_stop_while_the_fork_server_imports_takes_effect_at_once(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        harness.bare_environment({"third": "import time\ntime.sleep(5)\n"})
        attempt = harness.attempt("import third\ndef task(config): print('ran')")
        await harness.start(engine, attempt)
        engine.stop(attempt.spec.job_id)
        assert isinstance(await harness.final(attempt), NeverStarted)
        assert harness.log(attempt) == ""

    harness.run(scenario)


def test_many_jobs_run_at_once_and_each_has_its_own_result(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempts = [
            harness.attempt(
                "def task(c): return c['i']", config={"i": i}, api_id="same", mem=64 * MIB, cpu_m=1
            )
            for i in range(40)
        ]
        for attempt in attempts:
            await harness.start(engine, attempt)
        assert [(await harness.ended(a)).result for a in attempts] == list(range(40))
        starts = [each.job_id for each in harness.observations if isinstance(each, Started)]
        assert len(starts) == len(set(starts))

    harness.run(scenario)


def test_a_config_of_any_size_reaches_the_task_and_its_file(harness: EngineHarness) -> None:
    code = """
        import json, os
        def task(config):
            stored = json.load(open(os.environ["CORTEX_JOB_SPEC"]))["config"]
            return [len(config["long"]), stored == config]
    """

    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt(code, config={"long": "x" * 3_000_000})
        await harness.start(engine, attempt)
        assert (await harness.ended(attempt)).result == [3_000_000, True]

    harness.run(scenario)


def test_a_result_of_any_size_is_stored(harness: EngineHarness) -> None:
    async def scenario(engine: Engine) -> None:
        attempt = harness.attempt("def task(c): return 'x' * 900_000")
        await harness.start(engine, attempt)
        assert (await harness.ended(attempt)).result == "x" * 900_000

    harness.run(scenario)
