"""The new inodes of a job: each costs a millisecond where many files were removed recently."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Attempt
from cortex.engines.local import LocalEngine, records
from engines.engine_harness import SLEEP, EngineHarness, exists, until
from engines.test_forged import SPOILS
from engines.test_recovery import pid_of

CODE = "def task(config): return config.get('number')"


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


def inodes(harness: EngineHarness) -> set[int]:
    return {path.lstat().st_ino for path in harness.root.rglob("*")}


def next_attempt(
    harness: EngineHarness, first: Attempt, code: str | None = CODE, number: int = 0
) -> Attempt:
    """An attempt of the same version, which the same supervisor gets."""
    made = harness.attempt(code, config={"number": number})
    return replace(made, version=first.version)


async def finished_with_byte_code(
    harness: EngineHarness, engine: LocalEngine, attempt: Attempt
) -> Attempt:
    """Run jobs until the project has byte code, which the fork server compiles; the last job."""
    first = await finished(harness, engine, attempt)
    await until(lambda: list(harness.project.glob("__pycache__/task.*.pyc")))
    code = (harness.project / "task.py").read_text()
    return await finished(harness, engine, next_attempt(harness, first, code))


async def finished(harness: EngineHarness, engine: LocalEngine, attempt: Attempt) -> Attempt:
    """Start an attempt and wait for its end; the attempt with its handle."""
    attempt = await harness.start_attempt(engine, attempt)
    await harness.ended(attempt)
    return attempt


@pytest.mark.parametrize(
    "code",
    [
        CODE,
        "def task(config): print('a line')",
        "def task(config): raise ValueError('as asked')",
        "import os\ndef task(config): os._exit(3)",
        "import json, os\ndef task(config): return json.load(open(os.environ['CORTEX_JOB_SPEC']))",
        "import os\ndef task(config): return os.listdir(os.environ['CORTEX_JOB_DIR'])",
    ],
)
def test_a_job_that_writes_nothing_but_its_log_makes_two_inodes(
    harness: EngineHarness, code: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await finished_with_byte_code(harness, engine, harness.attempt(code))
        for number in range(20):
            before = inodes(harness)
            attempt = await finished(harness, engine, next_attempt(harness, first, code, number))
            new = inodes(harness) - before
            folder = harness.folder(attempt)
            assert new == {folder.stat().st_ino, (folder / "log").stat().st_ino}
            assert pid_of(harness, attempt) == pid_of(harness, first)

    harness.run(scenario)


def test_the_jobs_of_a_command_make_two_inodes_each(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await finished(
            harness, engine, harness.attempt(command=["ls", "-l", "/proc/self/fd"])
        )
        log = harness.log(first)
        for _ in range(5):
            before = inodes(harness)
            attempt = harness.attempt(command=["ls"])
            attempt = await finished(harness, engine, replace(attempt, version=first.version))
            assert len(inodes(harness) - before) == 2
            # The command inherits none of the files that jobs share.
            assert harness.log(attempt).count(" -> ") == log.count(" -> ")

    harness.run(scenario)


def test_a_task_inherits_none_of_the_files_that_jobs_share(harness: EngineHarness) -> None:
    code = """
        import os
        def task(config):
            paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            return [os.readlink(path) for path in paths if os.path.lexists(path)]
    """

    async def scenario(engine: LocalEngine) -> None:
        first = await finished(harness, engine, harness.attempt(code))
        root = str(harness.root)
        for _ in range(5):
            attempt = await finished(harness, engine, next_attempt(harness, first, code))
            names = (await harness.ended(attempt)).result
            assert isinstance(names, list)
            below = {name for name in names if str(name).startswith(root)}
            assert below == {str(harness.folder(attempt) / "log")}

    harness.run(scenario)


def test_each_job_finds_its_own_files_and_its_written_files_stay(harness: EngineHarness) -> None:
    code = """
        import json, os
        def task(config):
            with open(os.environ["CORTEX_JOB_SPEC"]) as file:
                spec = json.load(file)
            folder = os.environ["CORTEX_JOB_DIR"]
            found = os.listdir(folder)
            if config["number"] % 2:
                with open(os.path.join(folder, "model"), "w") as file:
                    file.write(str(config["number"]))
            return [spec["job_id"], spec["config"]["number"], found]
    """

    async def scenario(engine: LocalEngine) -> None:
        first = harness.attempt(code, config={"number": 0})
        attempts = [await finished(harness, engine, first)]
        for number in range(1, 8):
            attempt = next_attempt(harness, first, code, number)
            attempts.append(await finished(harness, engine, attempt))
        for number, attempt in enumerate(attempts):
            assert (await harness.ended(attempt)).result == [attempt.spec.job_id, number, []]
            if number % 2:
                model = harness.folder(attempt) / "files" / "model"
                assert model.read_text() == str(number)

    harness.run(scenario)


def test_operators_that_take_over_read_each_end_from_the_journal(
    harness: EngineHarness,
) -> None:
    """The first operator hangs before it has stored anything, and its supervisor continues with
    its jobs: the next operator recovers all of them."""

    async def scenario(engine: LocalEngine) -> None:
        first = await finished(harness, engine, harness.attempt(CODE, config={"number": 0}))
        attempts = [first]
        for number in range(1, 5):
            attempts.append(
                await finished(harness, engine, next_attempt(harness, first, number=number))
            )
        harness.write(SLEEP)
        running = await harness.start_attempt(
            engine, replace(harness.sleeper(), version=first.version)
        )
        await harness.printed(running, "pid")
        assert {pid_of(harness, each) for each in (*attempts, running)} == {pid_of(harness, first)}
        observations, harness.observations = harness.observations, []
        async with harness.engine() as other:
            for attempt in (*attempts, running):
                await other.recover(attempt)
            for number, attempt in enumerate(attempts):
                assert (await harness.ended(attempt)).result == number
            await harness.started(running)
            harness.finish_sleeper()
            assert (await harness.ended(running)).result == "done"
            assert exists(pid_of(harness, running)), (
                "the supervisor waits for the next job of the first operator"
            )
            # The journal grows, and its records of the reported ends stay as they were.
            harness.write(CODE)
            later = await finished(harness, engine, next_attempt(harness, first, number=9))
            for number, attempt in enumerate((*attempts, later)):
                found = records.read_exit(harness.folder(attempt), 1).exit
                assert found is not None
                assert found.result == (9 if attempt is later else number)
        harness.observations = observations

    harness.run(scenario)


def test_an_end_without_an_operator_has_its_own_file(harness: EngineHarness) -> None:
    """The file is synced, and an operator of an older version can read it."""
    ended: list[Attempt] = []

    async def scenario(engine: LocalEngine) -> None:
        first = await finished(harness, engine, harness.attempt(CODE, config={"number": 1}))
        harness.write(SLEEP)
        running = await harness.start_attempt(
            engine, replace(harness.sleeper(), version=first.version)
        )
        await harness.printed(running, "pid")
        ended.extend((first, running))

    harness.run(scenario)
    harness.finish_sleeper()
    first, running = ended
    record = harness.folder(running) / "exit.1"
    asyncio.run(until(record.exists))
    assert json.loads(record.read_bytes())["result"] == "done"
    assert (harness.folder(first) / "exit.1").read_text().startswith("\n")


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_that_spoils_its_start_record_harms_no_job_before_or_after_it(
    harness: EngineHarness, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await finished(harness, engine, harness.attempt(CODE, config={"number": 1}))
        supervisor = pid_of(harness, first)
        harness.write(SLEEP)
        second = await harness.start_attempt(
            engine, replace(harness.sleeper(), version=first.version)
        )
        await harness.printed(second, "pid")
        SPOILS[spoil](harness.start_record(second))
        observations, harness.observations = harness.observations, []
        async with harness.engine() as other:
            await other.recover(first)
            assert (await harness.ended(first)).result == 1
        harness.observations = observations
        harness.finish_sleeper()
        assert (await harness.ended(second)).result == "done"
        Path(f"{harness.marker}.go").unlink()  # noqa: ASYNC240  # the test has nothing else to do
        third = await harness.start_attempt(
            engine, replace(harness.sleeper(), version=first.version)
        )
        await harness.printed(third, "pid")
        assert pid_of(harness, third) == supervisor
        observations, harness.observations = harness.observations, []
        async with harness.engine() as other:
            for attempt in (first, second, third):
                await other.recover(attempt)
            assert (await harness.ended(first)).result == 1
            assert (await harness.ended(second)).result == "done"
            await harness.started(third)
            harness.finish_sleeper()
            assert (await harness.ended(third)).result == "done"
        harness.observations = observations

    harness.run(scenario)
