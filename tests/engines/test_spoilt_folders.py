"""Jobs that spoil their folder or stop their supervisor: their ends are reported correctly."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from cortex.engines.base import Ending, Lost
from cortex.engines.local import LocalEngine
from cortex.joblog.folders import JobFolders
from engines.engine_harness import EngineHarness, until
from engines.test_recovery import pid_of


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


SPOILS = ["shutil.rmtree(folder)", "os.mkdir(folder + '/exit.1')"]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_that_has_spoilt_its_folder_loses_no_more_than_a_large_result(
    harness: EngineHarness, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(f"""
            import os, shutil
            def task(config):
                folder = os.path.dirname(os.environ["CORTEX_JOB_DIR"])
                {spoil}
                return "x" * 100000
        """)
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code, ended.has_result) == (Ending.EXITED, 0, False)
        assert ended.message == "the return value was lost with the folder of the job"

    harness.run(scenario)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_job_that_has_spoilt_its_folder_ends_with_its_own_result(
    harness: EngineHarness, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(f"""
            import os, shutil
            def task(config):
                folder = os.path.dirname(os.environ["CORTEX_JOB_DIR"])
                {spoil}
                return "done"
        """)
        ended = await harness.outcome(engine, attempt)
        assert (ended.ending, ended.exit_code, ended.result) == (Ending.EXITED, 0, "done")

    harness.run(scenario)


PLANT = """
    import os, sys, time
    def task(config):
        log = os.path.dirname(os.environ["CORTEX_JOB_DIR"]) + "/log"
        if os.environ["CORTEX_ATTEMPT"] == "2":
            print("again")
            return
        os.unlink(log)
        outside = config["folder"]
        {plant}
        open(outside + "/planted", "w").close()
        time.sleep(300)
"""
PLANTS = [
    "os.symlink(outside + '/elsewhere', log)",
    "os.link(outside + '/elsewhere', log)",
    "os.mkfifo(log)",
]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_file_that_replaces_a_log_is_not_written_to(harness: EngineHarness, plant: str) -> None:
    async def scenario(engine: LocalEngine) -> None:
        outside = harness.root.parent
        attempt = harness.attempt(PLANT.format(plant=plant), config={"folder": str(outside)})
        elsewhere, planted = outside / "elsewhere", outside / "planted"
        elsewhere.write_text("outside")
        attempt = await harness.start_attempt(engine, attempt)
        await until(planted.exists)
        os.kill(pid_of(harness, attempt), signal.SIGKILL)
        assert isinstance(await harness.final(attempt), Lost)
        with pytest.raises(OSError, match="log"):
            JobFolders(harness.root).append_to_log(attempt.spec.job_id, "a line of the operator")
        attempt = await harness.start_attempt(
            engine, replace(attempt, losses=1, lost="it was lost"), 2
        )
        assert (await harness.ended(attempt)).exit_code == 0
        assert harness.log(attempt) == "cortex: it was lost; attempt 2 begins\nagain\n"
        assert elsewhere.read_text() == "outside"

    harness.run(scenario)


def test_a_file_that_a_log_links_to_is_not_cut(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        large = harness.root.parent / "large"
        attempt = harness.attempt(
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
        await harness.outcome(engine, attempt)
        assert large.read_text() == "line\n" * 100000

    harness.run(scenario)


def test_a_stop_reaches_a_stopped_supervisor(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt("""
            import os, signal, time
            def task(config):
                os.kill(os.getppid(), signal.SIGSTOP)
                print("stopped", flush=True)
                time.sleep(300)
        """)
        await harness.start(engine, attempt)
        await harness.printed(attempt, "stopped")
        engine.stop(attempt.spec.job_id)
        assert (await harness.ended(attempt)).ending is Ending.STOPPED

    harness.run(scenario)


def test_a_stop_after_a_restart_reaches_a_stopped_supervisor(harness: EngineHarness) -> None:
    attempt = harness.killed_operator(harness.sleeper(), "started")

    async def scenario(engine: LocalEngine) -> None:
        await harness.printed(attempt, "pid")
        os.kill(pid_of(harness, attempt), signal.SIGSTOP)
        await engine.recover(attempt)
        engine.stop(attempt.spec.job_id)
        assert (await harness.ended(attempt)).ending is Ending.STOPPED

    harness.run(scenario)
