"""The local engine's own promises: it runs jobs on the operator's machine, in environments that the
operator built there, and counts the capacity of that machine itself."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.engines.base import Capacity, CapacityFreed, Ending, Lost, NeverStarted
from cortex.engines.local import LocalEngine, fork_server
from cortex.spec.api import Compute
from engines.engine_harness import EngineHarness

SH = "/bin/sh"


@pytest.fixture
def harness(local_harness: EngineHarness) -> EngineHarness:
    return local_harness


def test_an_environment_without_python_is_lost_with_the_reason(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        for python, message in ((Path("/no/python"), "No such file"), (Path("/bin/false"), "")):
            harness.python = python
            attempt = harness.attempt("def task(config): pass")
            await harness.start(engine, attempt)
            lost = await harness.final(attempt)
            assert isinstance(lost, Lost)
            assert lost.reason.startswith("the environment's Python could not start")
            assert message in lost.reason

    harness.run(scenario)


def test_capacity_is_reserved_and_released(harness: EngineHarness) -> None:
    async def scenario(_: LocalEngine) -> None:
        engine = LocalEngine(harness.root, Capacity(1000, 4 << 30, 2), 1, "watchdog")
        await engine.open(harness.report)
        assert engine.ledger.refusal(Compute(gpu=8)) == "needs 8 GPUs, this machine has 2"
        assert engine.ledger.refusal(Compute(mem=4 << 30, cpu_m=1000, gpu=2)) is None
        assert engine.ledger.refusal(Compute(node_labels={"zone": ("a", "b")})) == (
            "needs a node with zone=a or b: labels are those of a cluster's nodes, and this operator runs "
            "jobs on its own machine"
        )
        assert engine.ledger.reserve("a", Compute(cpu_m=600, mem=3 << 30, gpu=1)) is None
        assert (
            engine.ledger.reserve("b", Compute(cpu_m=200, mem=2 << 30)) == "needs 2 GiB, 1 GiB free"
        )
        assert engine.ledger.reserve("b", Compute(cpu_m=2000)) == "needs 2 CPU, 0.4 free"
        assert engine.ledger.reserve("b", Compute(gpu=2)) == "needs 2 GPUs, 1 free"
        engine.ledger.release("a")
        assert harness.observations == [CapacityFreed()]
        assert engine.ledger.reserve("b", Compute(cpu_m=1000, mem=4 << 30, gpu=2)) is None
        engine.ledger.release("b")
        assert harness.observations == [CapacityFreed()]
        await engine.close()

    harness.run(scenario)


def test_gpus_are_allotted_by_index(harness: EngineHarness) -> None:
    async def scenario(_: LocalEngine) -> None:
        engine = LocalEngine(harness.root, Capacity(1000, 4 << 30, 3), 1, harness.memory_limit)
        await engine.open(harness.report)
        engine.ledger.reserve("another-job", Compute(gpu=1))
        attempt = harness.attempt(command=[SH, "-c", "echo [$CUDA_VISIBLE_DEVICES]"])
        await harness.outcome(engine, attempt)
        assert harness.log(attempt) == "[]\n"
        await engine.close()

    harness.run(scenario)


def test_proxies_are_passed_on_from_the_operator(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")

    async def scenario(engine: LocalEngine) -> None:
        attempt = harness.attempt(command=[SH, "-c", "echo $HTTPS_PROXY"])
        await harness.outcome(engine, attempt)
        assert harness.log(attempt) == "http://proxy\n"

    harness.run(scenario)


def test_a_deadline_ends_the_wait_for_the_imports_of_a_fork_server(
    harness: EngineHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "PRELOAD_TIMEOUT_S", 3600)
    harness.bare_environment({"third": "import time\ntime.sleep(300)\n"})

    async def scenario(engine: LocalEngine) -> None:
        code = "import third\ndef task(config): ..."
        attempt = harness.attempt(code, timeout=1, preload=("third",))
        await harness.start(engine, attempt)
        assert isinstance(await harness.final(attempt), NeverStarted)

    harness.run(scenario)


SLOW_TO_STOP = """
    import signal, sys, time
    def task(config):
        def clean_up(*_):
            time.sleep(config["takes_s"])
            print("cleaned up", flush=True)
            sys.exit(0)
        signal.signal(signal.SIGTERM, clean_up)
        print("runs", flush=True)
        time.sleep(300)
"""


def test_each_attempt_has_its_own_grace(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        patient = replace(harness.attempt(SLOW_TO_STOP, config={"takes_s": 1}), grace_s=60)
        hasty = replace(harness.attempt(SLOW_TO_STOP, config={"takes_s": 60}), grace_s=0.1)
        for attempt in (patient, hasty):
            await harness.start_attempt(engine, attempt)
            await harness.printed(attempt, "runs")
        for attempt in (patient, hasty):
            engine.stop(attempt.spec.job_id)
        assert (await harness.ended(hasty)).exit_code == -signal.SIGKILL
        assert (await harness.ended(patient)).ending is Ending.STOPPED
        assert "cleaned up" in harness.log(patient)
        assert "cleaned up" not in harness.log(hasty)

    harness.run(scenario)
