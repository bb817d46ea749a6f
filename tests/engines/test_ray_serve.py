"""An operator on a Ray cluster, over HTTP and by the command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import preloaded_cli
from engines.ray_harness import Session, agent_in
from operator_harness import PROBE, Operator, operator, probe_yaml, until
from s3_server import S3Server
from wheels import wheel

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]
EXAMPLE = Path(__file__).parents[2] / "examples" / "wordcount"


@pytest.fixture(scope="module")
def serving(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("serve")
    if len(ray_session.cluster.raylets_left()) < 2:  # tests before these may have lost one
        ray_session.cluster.add("beside")
    address, nodes = ray_session.cluster.address, str(folder / "nodes")
    with operator(
        folder / "operator", "--engine", "ray", "--ray-address", address, "--ray-node-dir", nodes
    ) as running:
        yield running


def test_an_example_is_deployed_runs_and_tells_its_log(serving: Operator) -> None:
    files = {
        str(path.relative_to(EXAMPLE)): path.read_text()
        for path in EXAMPLE.rglob("*")
        if path.is_file()
    }
    endpoint = serving.deployed(files.pop("cortex.yaml"), files)
    done = serving.run(endpoint)
    assert done["status"] == "status_succeeded", done
    assert serving.log_of(endpoint, done)


def has(serving: Operator, endpoint: str, job: Any, status: str) -> bool:
    return bool(serving.status(endpoint, job)["status"] == status)


def test_a_job_is_followed_and_stopped(serving: Operator) -> None:
    endpoint = serving.deployed(probe_yaml(), {"probe.py": PROBE})
    job = serving.submit(endpoint, config={"do": "sleep", "s": 300})
    serving.await_log(endpoint, job, "asleep")
    counts = {"pending": 0, "running": 1}
    # The log travels by another way than the start, and may be first.
    until(lambda: serving.status(endpoint, job)["worker_counts"] == counts, "a job that runs")
    assert serving.delete(endpoint, job).status_code == 200
    assert serving.status(endpoint, job)["status"] == "status_stopped"
    events = serving.http.get(
        f"{endpoint}/{job['job_id']}/logs", headers={"Accept": "text/event-stream"}
    ).text
    assert "asleep" in events
    assert "event: end" in events


def test_a_log_is_followed_while_the_job_writes_it(serving: Operator, tmp_path: Path) -> None:
    go = tmp_path / "go"
    endpoint = serving.deployed(probe_yaml(), {"probe.py": PROBE})
    job = serving.submit(endpoint, config={"do": "say", "lines": 3, "go": str(go)})
    url, seen = f"{endpoint}/{job['job_id']}/logs", ""
    with serving.http.stream("GET", url, headers={"Accept": "text/event-stream"}) as events:
        for text in events.iter_text():
            seen += text
            if "line 0" in seen and not go.exists():
                assert "line 1" not in seen
                # The log travels by another way than the start, and may be first.
                until(lambda: has(serving, endpoint, job, "status_running"), "a job that runs")
                go.touch()
    assert [f"line {number}" in seen for number in range(3)] == [True] * 3
    assert "event: end" in seen


def test_a_job_outlives_the_operator_and_its_end_is_known_after_the_restart(
    serving: Operator,
) -> None:
    endpoint = serving.deployed(probe_yaml(), {"probe.py": PROBE})
    job = serving.submit(endpoint, config={"do": "sleep", "s": 4})
    serving.await_log(endpoint, job, "asleep")
    serving.kill()
    serving.start()
    endpoint = f"{serving.url}/probe"
    done = serving.finished(endpoint, job)
    assert (done["status"], done["result"]) == ("status_succeeded", "rested")


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new one, which operators can reach that start from now on."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.bucket()


@pytest.fixture
def all_elsewhere(ray_session: Session, tmp_path: Path, database: str, bucket: str) -> list[str]:
    """The options of an operator that has nothing but its folder on its machine."""
    return [
        *("--engine", "ray", "--ray-address", ray_session.cluster.address),
        *("--ray-node-dir", str(tmp_path / "nodes")),
        *("--store", database, "--files", f"s3://{bucket}"),
    ]


def test_nothing_is_lost_with_the_operators_machine_where_all_else_is_elsewhere(
    tmp_path: Path, s3: S3Server, bucket: str, all_elsewhere: list[str]
) -> None:
    with operator(tmp_path / "operator", *all_elsewhere) as running:
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        over = running.submit(endpoint, config={"do": "say"})
        running.finished(endpoint, over)
        until(lambda: s3.keys(bucket, f"logs/{over['job_id']}/"), "the log is archived")
        job = running.submit(endpoint, config={"do": "sleep", "s": 5})
        running.await_log(endpoint, job, "asleep")
        running.kill()
        shutil.rmtree(running.data_dir)
        running.start()
        endpoint = f"{running.url}/probe"
        assert running.log_of(endpoint, over) == "line 0\n"
        done = running.finished(endpoint, job)
        assert (done["status"], done["result"]) == ("status_succeeded", "rested")
        assert running.log_of(endpoint, job) == "asleep\n"
        assert running.run(endpoint)["status"] == "status_succeeded"


WAITS = """
import os, time

def task(config):
    print("line 0", flush=True)
    while not os.path.exists(config["go"]):
        time.sleep(0.01)
    print("line 1", flush=True)
"""


def test_operators_with_folders_of_their_own_take_over_from_each_other(
    tmp_path: Path, s3: S3Server, bucket: str, all_elsewhere: list[str]
) -> None:
    go = tmp_path / "go"
    said = "line 0\nline 1\n"
    with (
        operator(tmp_path / "a", *all_elsewhere) as a,
        operator(tmp_path / "b", *all_elsewhere) as b,
    ):
        assert len({(each.data_dir / "folder.id").read_text() for each in (a, b)}) == 1
        endpoint = b.deployed(probe_yaml(), {"probe.py": WAITS})  # and a, which drives, fetches it
        job = b.submit(endpoint, config={"go": str(go)})
        a.await_log(f"{a.url}/probe", job, "line 0")
        copy = a.data_dir / "jobs" / job["job_id"] / "log"
        until(lambda: copy.read_text() == "line 0\n", "a has the beginning")
        a.kill()
        go.touch()
        assert b.finished(endpoint, job)["status"] == "status_succeeded"
        until(lambda: s3.keys(bucket, f"logs/{job['job_id']}/"), "the log is archived")
        a.start()
        assert copy.read_text() == "line 0\n"
        assert a.log_of(f"{a.url}/probe", job) == said
        b.kill()
        until((a.data_dir / "archived" / job["job_id"]).exists, "a has looked at what it has")
        assert a.log_of(f"{a.url}/probe", job) == said
        stored = s3.client().get_object(Bucket=bucket, Key=f"logs/{job['job_id']}/log")
        assert stored["Body"].read().decode() == said


def test_nodes_build_a_version_with_the_same_packages_whenever_they_build_it(
    serving: Operator, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    wheel(shelf, version="1.0")
    task = (
        "import importlib.metadata, time\n"
        "def task(config):\n"
        "    print(importlib.metadata.version('tinyprobe'), flush=True)\n"
        "    time.sleep(config['s'])\n"
    )
    requirements = f"--no-index\n--find-links {shelf}\ntinyprobe\n"
    yaml = probe_yaml("locked").replace("cpu: 1m", "cpu: 6")
    endpoint = serving.deployed(yaml, {"probe.py": task, "requirements.txt": requirements})
    assert serving.log_of(endpoint, serving.run(endpoint, config={"s": 0})) == "1.0\n"
    until(lambda: list((serving.data_dir / "locks").glob("*/*.lock")), "its lock is kept")
    wheel(shelf, version="2.0")
    # No node takes both at a time, so one of them builds it now.
    jobs = [serving.submit(endpoint, config={"s": 300}) for _ in range(2)]
    for job in jobs:
        serving.await_log(endpoint, job, "\n")
    assert [serving.log_of(endpoint, job) for job in jobs] == ["1.0\n", "1.0\n"]
    for job in jobs:
        serving.delete(endpoint, job)


def test_while_its_agent_is_away_a_job_is_unknown_and_then_what_it_is(
    serving: Operator, ray_session: Session
) -> None:
    endpoint = serving.deployed(probe_yaml(), {"probe.py": PROBE})
    job = serving.submit(endpoint, config={"do": "sleep", "s": 300})
    serving.await_log(endpoint, job, "asleep")
    nodes = serving.data_dir.parents[1] / "nodes"
    (slot,) = (folder.parents[1] for folder in nodes.glob(f"*/*/jobs/{job['job_id']}"))
    node_id = (slot / "owner").read_text().split()[0]
    with ray_session.cluster.raylet_stopped(node_id):  # else the agent is back within a second
        os.kill(agent_in(slot), signal.SIGKILL)
        until(lambda: has(serving, endpoint, job, "status_unknown"), "unknown")
    until(lambda: has(serving, endpoint, job, "status_running"), "running again")
    assert serving.delete(endpoint, job).status_code == 200
    assert has(serving, endpoint, job, "status_stopped")


def test_what_waits_and_what_is_refused_says_why(serving: Operator) -> None:
    files = {"probe.py": PROBE}
    yaml = probe_yaml("large").replace("cpu: 1m", "cpu: 6")
    endpoint = serving.deployed(yaml, files)
    first = serving.submit(endpoint, config={"do": "sleep", "s": 300})
    serving.await_log(endpoint, first, "asleep")
    others = [serving.submit(endpoint, config={"do": "sleep", "s": 300}) for _ in range(2)]
    words = "needs 6 CPU, 2 free on one node"
    until(
        lambda: any(words in serving.status(endpoint, job).get("message", "") for job in others),
        "a job that waits says for what",
    )
    for job in (*others, first):
        assert serving.delete(endpoint, job).status_code == 200
    yaml = probe_yaml("huge").replace("cpu: 1m", "cpu: 1m, gpu: 9")
    done = serving.run(serving.deployed(yaml, files))
    assert done["status"] == "status_unexpected_error"
    assert done["message"] == "needs 9 GPUs, the largest node has 2"


def test_the_command_shows_the_nodes(serving: Operator, tmp_path: Path) -> None:
    env = {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(tmp_path)}

    def cortex(*arguments: str) -> str:
        done = preloaded_cli.run(*arguments, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    until(lambda: len(ready_nodes(serving)) > 1, "both nodes are ready")
    cortex("env", "configure", "ray", "--operator-endpoint", serving.url)
    told = json.loads(cortex("cluster", "info", "-o", "json"))
    assert told["engine"] == "ray"
    assert {node["total"]["cpu"] for node in told["nodes"]} == {8.0}
    assert all(node["is_ready"] for node in told["nodes"])
    assert len(cortex("cluster", "info").splitlines()) == len(told["nodes"]) + 1


AGAIN = """
import os, time

def task(config):
    print("attempt", os.environ["CORTEX_ATTEMPT"], flush=True)
    while os.environ["CORTEX_ATTEMPT"] == "1":
        time.sleep(0.1)
    return int(os.environ["CORTEX_ATTEMPT"])
"""


def ready_nodes(serving: Operator) -> list[Any]:
    told = serving.http.get(f"{serving.url}/-/cluster").json()["nodes"]
    return [node for node in told if node["is_ready"]]


def test_a_job_goes_to_a_node_with_its_labels(serving: Operator, ray_session: Session) -> None:
    cluster = ray_session.cluster
    cluster.add("labelled", cpus=1, labels="zone=b,example.com/disk=ssd")
    labels = {"zone": "b", "example.com/disk": "ssd"}
    until(
        lambda: labels in [node["labels"] for node in ready_nodes(serving)], "the new node is ready"
    )
    yaml = probe_yaml("labelled").replace("cpu: 1m", "cpu: 1m, node_labels: {zone: [a, b]}")
    endpoint = serving.deployed(yaml, {"probe.py": PROBE})
    for _ in range(2):
        done = serving.run(endpoint, config={"do": "surroundings"})
        slot = Path(done["result"]["env"]["CORTEX_JOB_DIR"]).parents[2]
        assert (slot / "owner").read_text().split()[0] == cluster.node_id("labelled")
    yaml = probe_yaml("nowhere").replace("cpu: 1m", "cpu: 1m, node_labels: {zone: z}")
    done = serving.run(serving.deployed(yaml, {"probe.py": PROBE}))
    assert done["status"] == "status_unexpected_error"
    assert done["message"] == "needs a node with zone=z, and there is none"
    cluster.kill("labelled")
    until(
        lambda: labels not in [node["labels"] for node in ready_nodes(serving)], "the node is away"
    )
    job = serving.submit(endpoint)
    words = "waits for a node with zone=a or b: the cluster has none now"
    until(
        lambda: serving.status(endpoint, job).get("message") == words, "it says what it waits for"
    )
    assert serving.delete(endpoint, job).status_code == 200


def test_a_job_whose_node_is_lost_is_tried_again_on_another(
    serving: Operator, ray_session: Session
) -> None:
    ray_session.cluster.add("third", cpus=16)  # the emptiest of all

    def sizes() -> list[float]:
        return sorted(node["total"]["cpu"] for node in ready_nodes(serving))

    until(lambda: len(sizes()) > 1 and sizes()[-1] == 16, "the new node and another are ready")
    endpoint = serving.deployed(probe_yaml("again", "  retries: 1\n"), {"probe.py": AGAIN})
    job = serving.submit(endpoint)
    serving.await_log(endpoint, job, "attempt 1")
    ray_session.cluster.kill("third")
    done = serving.finished(endpoint, job)
    assert (done["status"], done["result"]) == ("status_succeeded", 2)
    lines = serving.log_of(endpoint, job).splitlines()
    assert lines[0] == "attempt 1"
    assert re.fullmatch(
        r"cortex: attempt 1 was lost: the node \S+ was lost; attempt 2 begins", lines[1]
    )
    assert lines[2] == "attempt 2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "ray"], "HOST:PORT"),
        (["--engine", "ray", "--ray-address", "ray"], "'ray' is not HOST:PORT"),
        (["--engine", "ray", "--ray-address", "h:1", "--cpu", "2"], "--cpu needs --engine local"),
        (["--ray-address", "h:1"], "--ray-address and --ray-node-dir need --engine ray"),
    ],
)
def test_options_that_do_not_go_together_are_told(options: list[str], words: str) -> None:
    done = preloaded_cli.run("serve", *options)
    assert done.returncode == 1
    assert words in done.stderr


def test_a_cluster_that_is_not_there_is_told_by_the_command(tmp_path: Path) -> None:
    options = ["--data-dir", str(tmp_path), "--engine", "ray", "--ray-address", "127.0.0.1:1"]
    done = preloaded_cli.run("serve", "--port", "0", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the Ray cluster at 127.0.0.1:1 cannot be joined: nothing")
