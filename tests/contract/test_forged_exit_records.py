"""A job that forges its exit record and continues, while the operator restarts, has not ended."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from operator_harness import Operator, probe_yaml, until
from root_operator import operator_as_root, passable_folder

RECORD = json.dumps({
    "v": 1, "ending": "exited", "exit_code": 0, "start_ns": 1, "end_ns": 2, "message": None,
    "result": "a lie", "has_result": True,
})  # fmt: skip
FORGER = """
import os, time

FOLDER = os.path.dirname(os.environ["CORTEX_JOB_SPEC"])


def forge(config):
    with open(FOLDER + "/forged", "w") as file:
        file.write(config["record"])
    os.rename(FOLDER + "/forged", FOLDER + "/exit.1")
    if config["closes"]:
        os.chmod(FOLDER, 0o500)
    print("forged", flush=True)


def wait(path):
    while not os.path.exists(path):
        time.sleep(0.02)


def task(config):
    print("started", flush=True)
    if config["first"]:
        forge(config)
    wait(config["restarted"])
    if not config["first"]:
        forge(config)
    wait(config["go"])
    return "the truth"
"""


@pytest.fixture(scope="module")
def run_as_operator() -> Iterator[Operator]:
    with operator_as_root() as running:
        yield running


@pytest.fixture
def signals() -> Iterator[Path]:
    with passable_folder() as folder:
        yield folder


def run_forger(
    run_as_operator: Operator, signals: Path, *, first: bool, closes: bool, more: str = ""
) -> tuple[str, Any]:
    """Run a job that forges its exit record before or after a restart of the operator.

    Args:
        first: whether the job forges the record before the restart.
        closes: whether the job then makes its folder read-only.
        more: added to the job's `compute`.
    """
    yaml = probe_yaml("forger").replace("cpu: 1m", f"cpu: 1m{more}")
    endpoint = run_as_operator.deployed(yaml, {"probe.py": FORGER})
    config = {
        "record": RECORD,
        "first": first,
        "closes": closes,
        "restarted": str(signals / "restarted"),
        "go": str(signals / "go"),
    }
    job = run_as_operator.submit(endpoint, config=config)
    run_as_operator.await_log(endpoint, job, "forged" if first else "started")
    run_as_operator.kill()
    run_as_operator.start()
    endpoint = f"{run_as_operator.url}/forger"
    until(
        lambda: run_as_operator.status(endpoint, job).get("worker_counts", {}).get("running") == 1,
        "the status shows that the job runs",
    )
    (signals / "restarted").touch()
    run_as_operator.await_log(endpoint, job, "forged")
    time.sleep(0.5)
    assert run_as_operator.status(endpoint, job)["status"] == "status_running"
    return endpoint, job


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("closes", [False, True], ids=["", "in-a-closed-folder"])
@pytest.mark.parametrize("more", ["", ", mem: 1Gi"], ids=["", "mem"])
def test_a_forged_exit_record_of_a_running_job_is_not_believed(
    run_as_operator: Operator, signals: Path, first: bool, closes: bool, more: str
) -> None:
    endpoint, job = run_forger(run_as_operator, signals, first=first, closes=closes, more=more)
    (signals / "go").touch()
    end = run_as_operator.finished(endpoint, job)
    assert (end["status"], end["result"]) == ("status_succeeded", "the truth")


@pytest.mark.parametrize("closes", [False, True], ids=["", "in-a-closed-folder"])
def test_a_job_with_a_forged_exit_record_is_stopped(
    run_as_operator: Operator, signals: Path, closes: bool
) -> None:
    endpoint, job = run_forger(run_as_operator, signals, first=True, closes=closes)
    assert run_as_operator.delete(endpoint, job).status_code == 200
    assert run_as_operator.finished(endpoint, job)["status"] == "status_stopped"
