"""With `--run-as`, a job attacks processes of its own user: it can reach no other ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile_jobs import (
    SIGNALS_AFTER_HIDING,
    deploy_hostile,
    living_processes,
    start_attack,
    warm_up,
)
from operator_harness import Operator, probe_yaml, until
from root_operator import operator_as_root

USER = "games"  # other tests run jobs as `nobody`
pytestmark = pytest.mark.xdist_group(USER)  # RLIMIT_NPROC counts all processes of the user
MAX_PROCESSES = 100
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
def run_as_operator() -> Iterator[Operator]:
    with operator_as_root(
        USER, command_prefix=["prlimit", f"--nproc={MAX_PROCESSES}:{MAX_PROCESSES}"]
    ) as running:
        yield running


@pytest.mark.parametrize("what", ["stop_supervisor_repeatedly", "trace_supervisor"])
def test_a_timeout_holds_although_the_job_blocks_its_supervisor(
    run_as_operator: Operator, what: str
) -> None:
    path = warm_up(run_as_operator, deploy_hostile(run_as_operator))
    job = start_attack(run_as_operator, path, what, timeout=15)
    assert run_as_operator.finished(run_as_operator.url + path, job)["status"] == "status_timed_out"
    assert living_processes(run_as_operator, path, job) == []


@pytest.mark.parametrize("how", ["fork server first", "fork server stopped"])
def test_processes_hidden_from_all_relatives_are_ended(run_as_operator: Operator, how: str) -> None:
    path = deploy_hostile(
        run_as_operator, name=f"hides-{how.replace(' ', '-')}", more="  retries: 1\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        config = {"do": "hide", "file": f"{folder}/hidden", "signals": SIGNALS_AFTER_HIDING[how]}
        status = run_as_operator.run(run_as_operator.url + path, config=config)
        assert status["status"] == "status_succeeded", status
        assert status["result"] == [], "processes of the first attempt beside the second attempt"


def test_jobs_wait_while_another_job_has_all_processes_of_their_user(
    run_as_operator: Operator,
) -> None:
    go = run_as_operator.folder / "go"
    endpoints = [
        run_as_operator.deployed(probe_yaml(name), {"probe.py": FILL})
        for name in ("fills", "starves")
    ]
    fills, starves = endpoints

    def submitted(endpoint: str, *, fills: bool) -> Any:
        return run_as_operator.submit(endpoint, config={"fills": fills, "go": str(go)})

    first = submitted(fills, fills=True)
    run_as_operator.await_log(fills, first, "Resource temporarily unavailable")
    waiting = [(each, submitted(each, fills=False)) for each in (fills, fills, starves)]

    def words() -> str:
        return " ".join(str(run_as_operator.status(*each).get("message")) for each in waiting)

    until(
        lambda: "Resource temporarily unavailable" in words(), "the status says why the jobs wait"
    )
    go.touch()
    for each in [(fills, first), *waiting]:
        assert run_as_operator.finished(*each)["status"] == "status_succeeded"
