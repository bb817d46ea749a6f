"""Jobs that damage their own process or leave threads in it: their ends are reported correctly."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex.engines.base import Attempt, Ending
from cortex.engines.local import LocalEngine
from engines.engine_harness import EngineHarness


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


async def end_of(
    harness: EngineHarness, engine: LocalEngine, attempt: Attempt
) -> tuple[object, ...]:
    """Start an attempt; how it ended."""
    ended = await harness.outcome(engine, attempt)
    return ended.ending, ended.exit_code, ended.message


@pytest.mark.parametrize(
    ("end", "exit_code", "message"),
    [
        ("return 'done'", 0, None),
        ("sys.exit('words')", 1, "exit code 1: words"),
        ("raise ValueError('x')", 1, "exit code 1: ValueError: x"),
    ],
)
def test_a_task_that_closes_all_its_files_ends_with_its_own_exit_code(
    harness: EngineHarness, end: str, exit_code: int, message: str | None
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(f"""
            import atexit, os, pathlib, sys
            atexit.register(pathlib.Path("at-exit").touch)
            def task(config):
                os.closerange(3, 1000)
                {end}
        """)
        assert await end_of(harness, engine, attempt) == (Ending.EXITED, exit_code, message)
        assert ("has closed the file" in harness.log(attempt)) == (exit_code == 0)
        assert (harness.own_files(attempt) / "at-exit").exists()

    harness.run(scenario)


def test_a_users_file_that_reuses_our_descriptor_number_is_not_written_to(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("""
            import os
            def task(config):
                os.closerange(3, 1000)
                task.files = [open(f"file{number}", "w") for number in range(8)]
                return "done"
        """)
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code) == (Ending.EXITED, 0)
        files = [harness.own_files(attempt) / f"file{number}" for number in range(8)]
        assert [file.read_text() for file in files] == [""] * 8

    harness.run(scenario)


@pytest.mark.parametrize(
    "spoil",
    [
        "sys.stdout.close(); sys.stderr.close()",
        "full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 1); os.dup2(full, 2)",
    ],
)
def test_a_task_without_usable_streams_ends_with_its_own_exit_code(
    harness: EngineHarness, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        for end, exit_code, message in (
            (
                "return object()",
                0,
                "the task's return value was not kept: it is not JSON: "
                "Object of type object is not JSON serializable",
            ),
            ("sys.exit('words')", 1, "words"),
            ("raise ValueError('x')", 1, "ValueError: x"),
            (
                "return later()",
                1,
                "the task is async: nothing of it has run. "
                "Define def task(config), and call asyncio.run in it",
            ),
        ):
            attempt = harness.attempt(f"""
                import os, sys
                async def later(): pass
                def task(config):
                    {spoil}
                    {end}
            """)
            assert await end_of(harness, engine, attempt) == (Ending.EXITED, exit_code, message)

    harness.run(scenario)


def test_a_value_whose_methods_fail_fails_no_job(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        for end, exit_code, message in (
            ("sys.exit(Shy())", 1, "<its message cannot be shown>"),
            (
                "return {Shy(): 1, 'a': Late()}",
                0,
                "the task's return value was not kept: it is not JSON: "
                "keys must be str, int, float, bool or None, not Shy",
            ),
        ):
            attempt = harness.attempt(f"""
                import json, sys
                class Shy(Exception):
                    def __str__(self): raise self
                class Late(dict):
                    def items(self): raise Shy
                    def __len__(self): return 1
                def task(config):
                    {end}
            """)
            assert await end_of(harness, engine, attempt) == (Ending.EXITED, exit_code, message)

    harness.run(scenario)


def test_the_outcome_of_a_process_forked_by_hand_is_not_the_tasks(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        for end in (
            "raise ValueError('in the child')",
            "sys.exit('in the child')",
            "return 'child'",
        ):
            attempt = harness.attempt(f"""
                import os, sys
                def task(config):
                    pid = os.fork()
                    if pid == 0:
                        {end}
                    os.waitpid(pid, 0)
                    return "done"
            """)
            ended = await harness.outcome(engine, attempt)
            assert (ended.exit_code, ended.result) == (0, "done")

    harness.run(scenario)


def test_an_error_that_names_a_file_whose_name_is_not_utf_8_can_be_stored(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("def task(config): open(b'/no/\\xff')")
        ended = await harness.outcome(engine, attempt)
        assert ended.message == (
            "FileNotFoundError: [Errno 2] No such file or directory: b'/no/\\xff'"
        )
        attempt = harness.attempt(
            "import os\ndef task(config): raise OSError(os.fsdecode(b'\\xff'))"
        )
        assert (await harness.outcome(engine, attempt)).message == r"OSError: \udcff"

    harness.run(scenario)


@pytest.mark.parametrize("levels", [250, 251, 600, 950, 965, 970, 975, 980, 985, 5000])
def test_a_result_is_stored_unless_it_is_nested_deeper_than_a_config_may_be(
    harness: EngineHarness, levels: int
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(f"""
            def task(config):
                nested = "innermost"
                for level in range({levels}):
                    nested = [nested] if level % 2 else {{"a": 1, "b": nested}}
                return nested
        """)
        ended = await harness.outcome(engine, attempt)
        assert (ended.exit_code, ended.has_result) == (0, levels <= 250)
        assert ("was not kept" in (ended.message or "")) == (levels > 250)

    harness.run(scenario)


def test_many_brackets_do_not_count_as_depth(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        for value in ("[[]] * 1000", "'[' * 1000", "[{'a': '{'}] * 300"):
            ended = await harness.outcome(
                engine, harness.attempt(f"def task(config): return {value}")
            )
            assert ended.result == eval(value)

    harness.run(scenario)


WITHOUT_FIRST_THREAD = """
    import ctypes, os, signal, threading, time
    def continue_alone(write):
        while "Z" not in open(f"/proc/{os.getpid()}/stat").read():
            time.sleep(0.01)
        print("alone", os.getpid(), flush=True)
        os.close(write)
        time.sleep(60)
    def end_first_thread(write):
        threading.Thread(target=continue_alone, args=(write,)).start()
        ctypes.CDLL(None).pthread_exit(None)
    def task(config):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        read, write = os.pipe()
        if config["itself"] or os.fork() == 0:
            end_first_thread(write)
        os.close(write)
        os.read(read, 1)
"""


def is_alive(harness: EngineHarness, attempt: Attempt) -> bool:
    """Whether the process exists whose pid is in the log; it has no memory left to find it by."""
    return Path("/proc", harness.log(attempt).split()[1]).exists()


def test_a_job_whose_first_thread_has_ended_can_be_stopped(harness: EngineHarness) -> None:
    harness.grace_s = 0.2

    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(WITHOUT_FIRST_THREAD, config={"itself": True})
        await harness.start(engine, attempt)
        await harness.printed(attempt, "alone")
        engine.stop(attempt.spec.job_id)
        assert (await harness.ended(attempt)).ending is Ending.STOPPED
        assert not is_alive(harness, attempt)

    harness.run(scenario)


def test_a_process_whose_first_thread_has_ended_ends_with_its_job(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(WITHOUT_FIRST_THREAD, config={"itself": False})
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code) == (Ending.EXITED, 0)
        assert not is_alive(harness, attempt)

    harness.run(scenario)
