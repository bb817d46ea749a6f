"""What a job can do to the processes of its own user, where `--run-as` names one: they are all that it reaches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile_jobs import HIDES, begun, deployed, left, warmed_up
from operator_harness import Operator, probe_yaml, until
from root_operator import operator_as_root

USER = "games"  # nobody's processes are other tests'
pytestmark = pytest.mark.xdist_group(USER)  # all of its processes are counted together
MOST = 100
FILL = """
import os, subprocess, sys, time

def task(config):
    made = []
    if config["fills"]:
        try:
            while True:
                made.append(subprocess.Popen(["sleep", "600"]))
        except OSError as error:
            print(error, flush=True)
    while not os.path.exists(config["go"]):
        time.sleep(0.05)
    for each in made:
        each.kill()
    for each in made:
        each.wait()
"""


@pytest.fixture(scope="module")
def other() -> Iterator[Operator]:
    with operator_as_root(USER, within=["prlimit", f"--nproc={MOST}:{MOST}"]) as running:
        yield running


@pytest.mark.parametrize("what", ["stop_it_again_and_again", "trace_it"])
def test_a_timeout_is_kept_although_the_job_holds_up_its_supervisor(
    other: Operator, what: str
) -> None:
    path = warmed_up(other, deployed(other))
    job = begun(other, path, what, timeout=15)
    assert other.finished(other.url + path, job)["status"] == "status_timed_out"
    assert left(other, path, job) == []


@pytest.mark.parametrize("how", ["fork server first", "fork server stopped"])
def test_what_has_hidden_from_all_its_relatives_is_ended(other: Operator, how: str) -> None:
    path = deployed(other, name=f"hides-{how.replace(' ', '-')}", more="  retries: 1\n")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        config = {"do": "hide", "file": f"{folder}/hidden", "signals": HIDES[how]}
        status = other.run(other.url + path, config=config)
        assert status["status"] == "status_succeeded", status
        assert status["result"] == [], "beside the second attempt"


def test_jobs_wait_while_another_has_all_the_processes_that_their_user_may_have(
    other: Operator,
) -> None:
    go = other.folder / "go"
    endpoints = [
        other.deployed(probe_yaml(name), {"probe.py": FILL}) for name in ("fills", "starves")
    ]
    fills, starves = endpoints

    def submitted(endpoint: str, *, fills: bool) -> Any:
        return other.submit(endpoint, config={"fills": fills, "go": str(go)})

    first = submitted(fills, fills=True)
    other.await_log(fills, first, "Resource temporarily unavailable")
    waiting = [(each, submitted(each, fills=False)) for each in (fills, fills, starves)]

    def words() -> str:
        return " ".join(str(other.status(*each).get("message")) for each in waiting)

    until(lambda: "Resource temporarily unavailable" in words(), "what they wait for")
    go.touch()
    for each in [(fills, first), *waiting]:
        assert other.finished(*each)["status"] == "status_succeeded"
