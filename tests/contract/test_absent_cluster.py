"""Operators whose Ray cluster never answers: nothing listens at its address. No Ray runs here."""

from __future__ import annotations

import os
from pathlib import Path

import preloaded_cli
from operator_harness import PROBE, Operator, operator, operators, probe_yaml, until
from operator_with_tokens import operator_with_tokens

OPTIONS = ("--engine", "ray", "--ray-address", "127.0.0.1:1")
AWAY = "the Ray cluster at 127.0.0.1:1 cannot be joined: nothing answers there"
WAITS = "waits for the Ray cluster at 127.0.0.1:1, which cannot be joined: nothing answers there"


def await_waiting(running: Operator, job: object) -> None:
    endpoint = f"{running.url}/probe"
    until(
        lambda: WAITS in running.status(endpoint, job).get("message", ""),  # or an earlier job does
        "the job says what it waits for",
    )


def test_an_operator_serves_without_its_cluster(tmp_path: Path) -> None:
    with operator(tmp_path, *OPTIONS) as running:
        assert "cannot join the ray cluster" in running.log.read_text()
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint)
        await_waiting(running, job)
        assert running.log_of(endpoint, job) == ""
        ready = running.http.get(f"{running.url}/readyz")
        assert ready.status_code == 200
        assert ready.json()["problem"].startswith(AWAY)
        env = {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(tmp_path)}
        preloaded_cli.run("env", "configure", "e", "--operator-endpoint", running.url, env=env)
        shown = preloaded_cli.run("cluster", "info", env=env).stdout
        assert shown.startswith(AWAY)
        assert shown.endswith("; jobs wait, and the operator retries\n")
        timed_out = running.run(endpoint, timeout=1)
        assert timed_out["status"] == "status_timed_out"
        assert running.delete(endpoint, job).status_code == 200
        assert running.finished(endpoint, job)["status"] == "status_stopped"


def test_where_tokens_are_required_readyz_does_not_name_the_cluster(tmp_path: Path) -> None:
    with operator_with_tokens(tmp_path, *OPTIONS, "--require-token") as (running, _):
        anonymous = {"Authorization": ""}
        ready = running.http.get(f"{running.url}/readyz", headers=anonymous).json()
        assert ready == {
            "status": "ready",
            "problem": "the engine cannot start jobs now; `cortex cluster info` says why",
        }
        assert running.http.get(f"{running.url}/-/cluster").json()["problem"].startswith(AWAY)


def test_another_operator_takes_over_without_the_cluster(tmp_path: Path, database: str) -> None:
    with operators(tmp_path, 2, *OPTIONS, "--store", database) as (one, other):
        endpoint = one.deployed(probe_yaml(), {"probe.py": PROBE})
        job = one.submit(endpoint)
        await_waiting(one, job)
        for each in (one, other):  # each leads in turn
            each.kill()
            survivor = other if each is one else one
            await_waiting(survivor, survivor.submit(f"{survivor.url}/probe"))
            await_waiting(survivor, job)
            each.start()
