"""A job that makes a record of its own end and runs on, while the operator is restarted: it has not ended."""

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
    print("begun", flush=True)
    if config["first"]:
        forge(config)
    wait(config["restarted"])
    if not config["first"]:
        forge(config)
    wait(config["go"])
    return "the truth"
"""


@pytest.fixture(scope="module")
def other() -> Iterator[Operator]:
    with operator_as_root() as running:
        yield running


@pytest.fixture
def signs() -> Iterator[Path]:
    with passable_folder() as folder:
        yield folder


def forged(
    other: Operator, signs: Path, *, first: bool, closes: bool, more: str = ""
) -> tuple[str, Any]:
    """A job that has made its record before or after the operator was killed and started again.

    Args:
        more: added to what it asks for.
    """
    yaml = probe_yaml("forger").replace("cpu: 1m", f"cpu: 1m{more}")
    endpoint = other.deployed(yaml, {"probe.py": FORGER})
    config = {
        "record": RECORD,
        "first": first,
        "closes": closes,
        "restarted": str(signs / "restarted"),
        "go": str(signs / "go"),
    }
    job = other.submit(endpoint, config=config)
    other.await_log(endpoint, job, "forged" if first else "begun")
    other.kill()
    other.start()
    endpoint = f"{other.url}/forger"
    until(
        lambda: other.status(endpoint, job).get("worker_counts", {}).get("running") == 1,
        "it is seen to run",
    )
    (signs / "restarted").touch()
    other.await_log(endpoint, job, "forged")
    time.sleep(0.5)
    assert other.status(endpoint, job)["status"] == "status_running"
    return endpoint, job


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("closes", [False, True], ids=["", "in-a-closed-folder"])
@pytest.mark.parametrize("more", ["", ", mem: 1Gi"], ids=["", "mem"])
def test_a_forged_end_of_a_job_that_runs_is_not_believed(
    other: Operator, signs: Path, first: bool, closes: bool, more: str
) -> None:
    endpoint, job = forged(other, signs, first=first, closes=closes, more=more)
    (signs / "go").touch()
    end = other.finished(endpoint, job)
    assert (end["status"], end["result"]) == ("status_succeeded", "the truth")


@pytest.mark.parametrize("closes", [False, True], ids=["", "in-a-closed-folder"])
def test_a_job_with_a_forged_end_is_stopped(other: Operator, signs: Path, closes: bool) -> None:
    endpoint, job = forged(other, signs, first=True, closes=closes)
    assert other.delete(endpoint, job).status_code == 200
    assert other.finished(endpoint, job)["status"] == "status_stopped"
