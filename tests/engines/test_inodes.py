"""What a job costs the disk: each new inode costs a millisecond where many files were removed lately."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Attempt
from cortex.engines.local import LocalEngine, records
from engines.bench import SLEEP, Bench, exists, until
from engines.test_forged import SPOILS
from engines.test_recovery import pid_of

CODE = "def task(config): return config.get('number')"


@pytest.fixture
def bench(local_bench: Bench) -> Bench:
    return local_bench


def inodes(bench: Bench) -> set[int]:
    return {path.lstat().st_ino for path in bench.root.rglob("*")}


def following(bench: Bench, first: Attempt, code: str | None = CODE, number: int = 0) -> Attempt:
    """An attempt of the same version, which the same supervising process gets."""
    made = bench.attempt(code, config={"number": number})
    return replace(made, version=first.version)


async def begun_with_byte_code(bench: Bench, engine: LocalEngine, attempt: Attempt) -> Attempt:
    """A job that has ended in a workspace with the project's byte code, which another process compiles meanwhile."""
    first = await begun(bench, engine, attempt)
    await until(lambda: list(bench.project.glob("__pycache__/task.*.pyc")))
    code = (bench.project / "task.py").read_text()
    return await begun(bench, engine, following(bench, first, code))


async def begun(bench: Bench, engine: LocalEngine, attempt: Attempt) -> Attempt:
    attempt = await bench.begin(engine, attempt)
    await bench.ended(attempt)
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
def test_a_job_that_writes_nothing_but_its_log_makes_two_inodes(bench: Bench, code: str) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await begun_with_byte_code(bench, engine, bench.attempt(code))
        for number in range(20):
            before = inodes(bench)
            attempt = await begun(bench, engine, following(bench, first, code, number))
            new = inodes(bench) - before
            folder = bench.folder(attempt)
            assert new == {folder.stat().st_ino, (folder / "log").stat().st_ino}
            assert pid_of(bench, attempt) == pid_of(bench, first)

    bench.run(scenario)


def test_the_jobs_of_a_command_make_two_inodes_each(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await begun(bench, engine, bench.attempt(command=["ls", "-l", "/proc/self/fd"]))
        log = bench.log(first)
        for _ in range(5):
            before = inodes(bench)
            attempt = bench.attempt(command=["ls"])
            attempt = await begun(bench, engine, replace(attempt, version=first.version))
            assert len(inodes(bench) - before) == 2
            # It inherits none of the files that jobs share.
            assert bench.log(attempt).count(" -> ") == log.count(" -> ")

    bench.run(scenario)


def test_a_task_inherits_none_of_the_files_that_jobs_share(bench: Bench) -> None:
    code = """
        import os
        def task(config):
            paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            return [os.readlink(path) for path in paths if os.path.lexists(path)]
    """

    async def scenario(engine: LocalEngine) -> None:
        first = await begun(bench, engine, bench.attempt(code))
        root = str(bench.root)
        for _ in range(5):
            attempt = await begun(bench, engine, following(bench, first, code))
            names = (await bench.ended(attempt)).result
            assert isinstance(names, list)
            below = {name for name in names if str(name).startswith(root)}
            assert below == {str(bench.folder(attempt) / "log")}

    bench.run(scenario)


def test_each_job_finds_its_own_files_and_what_it_has_written_stays(bench: Bench) -> None:
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
        first = bench.attempt(code, config={"number": 0})
        attempts = [await begun(bench, engine, first)]
        for number in range(1, 8):
            attempt = following(bench, first, code, number)
            attempts.append(await begun(bench, engine, attempt))
        for number, attempt in enumerate(attempts):
            assert (await bench.ended(attempt)).result == [attempt.spec.job_id, number, []]
            if number % 2:
                model = bench.folder(attempt) / "files" / "model"
                assert model.read_text() == str(number)

    bench.run(scenario)


def test_operators_that_take_over_are_told_each_end_from_the_journal(bench: Bench) -> None:
    """The first operator hangs before it has stored anything, and its supervising process goes on with its
    jobs: the next operator asks after all of them."""

    async def scenario(engine: LocalEngine) -> None:
        first = await begun(bench, engine, bench.attempt(CODE, config={"number": 0}))
        attempts = [first]
        for number in range(1, 5):
            attempts.append(await begun(bench, engine, following(bench, first, number=number)))
        bench.write(SLEEP)
        running = await bench.begin(engine, replace(bench.sleeper(), version=first.version))
        await bench.printed(running, "pid")
        assert {pid_of(bench, each) for each in (*attempts, running)} == {pid_of(bench, first)}
        seen, bench.seen = bench.seen, []
        async with bench.engine() as other:
            for attempt in (*attempts, running):
                await other.recover(attempt)
            for number, attempt in enumerate(attempts):
                assert (await bench.ended(attempt)).result == number
            await bench.started(running)
            bench.go()
            assert (await bench.ended(running)).result == "done"
            assert exists(pid_of(bench, running)), "it waits for the next job of the first operator"
            # The journal goes on, and says of the ends that were told what it said before.
            bench.write(CODE)
            later = await begun(bench, engine, following(bench, first, number=9))
            for number, attempt in enumerate((*attempts, later)):
                found = records.read_exit(bench.folder(attempt), 1).exit
                assert found is not None
                assert found.result == (9 if attempt is later else number)
        bench.seen = seen

    bench.run(scenario)


def test_an_end_without_an_operator_has_a_file_of_its_own(bench: Bench) -> None:
    """Which is synced, and which an operator of an older version can read."""
    ended: list[Attempt] = []

    async def scenario(engine: LocalEngine) -> None:
        first = await begun(bench, engine, bench.attempt(CODE, config={"number": 1}))
        bench.write(SLEEP)
        running = await bench.begin(engine, replace(bench.sleeper(), version=first.version))
        await bench.printed(running, "pid")
        ended.extend((first, running))

    bench.run(scenario)
    bench.go()
    first, running = ended
    record = bench.folder(running) / "exit.1"
    asyncio.run(until(record.exists))
    assert json.loads(record.read_bytes())["result"] == "done"
    assert (bench.folder(first) / "exit.1").read_text().startswith("\n")


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_that_spoils_its_start_record_harms_no_job_before_or_after_it(
    bench: Bench, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = await begun(bench, engine, bench.attempt(CODE, config={"number": 1}))
        supervisor = pid_of(bench, first)
        bench.write(SLEEP)
        second = await bench.begin(engine, replace(bench.sleeper(), version=first.version))
        await bench.printed(second, "pid")
        SPOILS[spoil](bench.start_record(second))
        seen, bench.seen = bench.seen, []
        async with bench.engine() as other:
            await other.recover(first)
            assert (await bench.ended(first)).result == 1
        bench.seen = seen
        bench.go()
        assert (await bench.ended(second)).result == "done"
        Path(f"{bench.marker}.go").unlink()  # noqa: ASYNC240  # the test has nothing else to do
        third = await bench.begin(engine, replace(bench.sleeper(), version=first.version))
        await bench.printed(third, "pid")
        assert pid_of(bench, third) == supervisor
        seen, bench.seen = bench.seen, []
        async with bench.engine() as other:
            for attempt in (first, second, third):
                await other.recover(attempt)
            assert (await bench.ended(first)).result == 1
            assert (await bench.ended(second)).result == "done"
            await bench.started(third)
            bench.go()
            assert (await bench.ended(third)).result == "done"
        bench.seen = seen

    bench.run(scenario)
