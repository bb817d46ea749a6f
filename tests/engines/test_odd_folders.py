"""What a job may do to its folder and to the process that watches over it, and is told as it is all the same."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from cortex.engines.base import Ending, Lost
from cortex.engines.local import LocalEngine
from cortex.joblog.folders import JobFolders
from engines.bench import Bench, until
from engines.test_recovery import pid_of


@pytest.fixture
def bench(local_bench: Bench) -> Bench:
    return local_bench


SPOILS = ["shutil.rmtree(folder)", "os.mkdir(folder + '/exit.1')"]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_that_has_spoilt_its_folder_loses_no_more_than_a_large_result(
    bench: Bench, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt(f"""
            import os, shutil
            def task(config):
                folder = os.path.dirname(os.environ["CORTEX_JOB_DIR"])
                {spoil}
                return "x" * 100000
        """)
        ended = await bench.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code, ended.has_result) == (Ending.EXITED, 0, False)
        assert ended.message == "the return value was lost with the folder of the job"

    bench.run(scenario)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_that_has_spoilt_its_folder_ends_as_it_ends(bench: Bench, spoil: str) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt(f"""
            import os, shutil
            def task(config):
                folder = os.path.dirname(os.environ["CORTEX_JOB_DIR"])
                {spoil}
                return "done"
        """)
        ended = await bench.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code, ended.result) == (Ending.EXITED, 0, "done")

    bench.run(scenario)


PLANT = """
    import os, sys, time
    def task(config):
        log = os.path.dirname(os.environ["CORTEX_JOB_DIR"]) + "/log"
        if os.environ["CORTEX_ATTEMPT"] == "2":
            print("again")
            return
        os.unlink(log)
        theirs = config["folder"]
        {plant}
        open(theirs + "/planted", "w").close()
        time.sleep(300)
"""
PLANTS = [
    "os.symlink(theirs + '/elsewhere', log)",
    "os.link(theirs + '/elsewhere', log)",
    "os.mkfifo(log)",
]


@pytest.mark.parametrize("plant", PLANTS)
def test_what_was_put_in_a_logs_place_is_not_written_to(bench: Bench, plant: str) -> None:
    async def scenario(engine: LocalEngine) -> None:
        theirs = bench.root.parent
        attempt = bench.attempt(PLANT.format(plant=plant), config={"folder": str(theirs)})
        elsewhere, planted = theirs / "elsewhere", theirs / "planted"
        elsewhere.write_text("theirs")
        attempt = await bench.begin(engine, attempt)
        await until(planted.exists)
        os.kill(pid_of(bench, attempt), signal.SIGKILL)
        assert isinstance(await bench.last(attempt), Lost)
        with pytest.raises(OSError, match="log"):
            JobFolders(bench.root).append_to_log(attempt.spec.job_id, "words of the operator")
        attempt = await bench.begin(engine, replace(attempt, losses=1, lost="it was lost"), 2)
        assert (await bench.ended(attempt)).exit_code == 0
        assert bench.log(attempt) == "cortex: it was lost; attempt 2 begins\nagain\n"
        assert elsewhere.read_text() == "theirs"

    bench.run(scenario)


def test_a_file_that_a_log_links_to_is_not_cut(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        large = bench.root.parent / "large"
        attempt = bench.attempt(
            """
            import os
            def task(config):
                large = config["file"]
                log = os.path.dirname(os.environ["CORTEX_JOB_DIR"]) + "/log"
                with open(large, "w") as file:
                    for _ in range(100000):
                        print("line", file=file)
                os.unlink(log)
                os.symlink(large, log)
            """,
            config={"file": str(large)},
            log_limit=65536,
        )
        await bench.outcome(engine, attempt)
        assert large.read_text() == "line\n" * 100000

    bench.run(scenario)


def test_a_stop_reaches_a_supervising_process_that_is_stopped(bench: Bench) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = bench.attempt("""
            import os, signal, time
            def task(config):
                os.kill(os.getppid(), signal.SIGSTOP)
                print("stopped", flush=True)
                time.sleep(300)
        """)
        await bench.start(engine, attempt)
        await bench.printed(attempt, "stopped")
        engine.stop(attempt.spec.job_id)
        assert (await bench.ended(attempt)).ending is Ending.STOPPED

    bench.run(scenario)


def test_a_stop_after_a_restart_reaches_one_that_is_stopped(bench: Bench) -> None:
    attempt = bench.killed_operator(bench.sleeper(), "started")

    async def scenario(engine: LocalEngine) -> None:
        await bench.printed(attempt, "pid")
        os.kill(pid_of(bench, attempt), signal.SIGSTOP)
        await engine.recover(attempt)
        engine.stop(attempt.spec.job_id)
        assert (await bench.ended(attempt)).ending is Ending.STOPPED

    bench.run(scenario)
