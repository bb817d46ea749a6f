"""An operator on a Ray cluster, over HTTP and with the `cortex` command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import preloaded_cli
from engines.engine_harness import exists
from engines.ray_cluster import RayCluster, absent_cluster
from engines.ray_harness import RaySession, agent_pid
from operator_harness import PROBE, Operator, operator, operators, probe_yaml, until
from s3_server import S3Server
from wheels import wheel

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]
EXAMPLE = Path(__file__).parents[2] / "examples" / "wordcount"


@pytest.fixture(scope="module")
def ray_operator(
    ray_session: RaySession, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("serve")
    if len(ray_session.cluster.live_raylets()) < 2:  # earlier tests may have killed one
        ray_session.cluster.add("beside")
    address, nodes = ray_session.cluster.address, str(folder / "nodes")
    with operator(
        folder / "operator", "--engine", "ray", "--ray-address", address, "--ray-node-dir", nodes
    ) as running:
        yield running


def test_an_example_runs_and_the_operator_serves_its_log(ray_operator: Operator) -> None:
    files = {
        str(path.relative_to(EXAMPLE)): path.read_text()
        for path in EXAMPLE.rglob("*")
        if path.is_file()
    }
    endpoint = ray_operator.deployed(files.pop("cortex.yaml"), files)
    done = ray_operator.run(endpoint)
    assert done["status"] == "status_succeeded", done
    assert ray_operator.log_of(endpoint, done)


def has(ray_operator: Operator, endpoint: str, job: Any, status: str) -> bool:
    return bool(ray_operator.status(endpoint, job)["status"] == status)


def test_a_job_is_followed_and_stopped(ray_operator: Operator) -> None:
    endpoint = ray_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = ray_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    ray_operator.await_log(endpoint, job, "asleep")
    counts = {"pending": 0, "running": 1}
    # The log and the start take different ways, and the log may arrive first.
    until(lambda: ray_operator.status(endpoint, job)["worker_counts"] == counts, "a job that runs")
    assert ray_operator.delete(endpoint, job).status_code == 200
    assert ray_operator.status(endpoint, job)["status"] == "status_stopped"
    events = ray_operator.http.get(
        f"{endpoint}/{job['job_id']}/logs", headers={"Accept": "text/event-stream"}
    ).text
    assert "asleep" in events
    assert "event: end" in events


def test_a_log_is_followed_while_the_job_writes_it(ray_operator: Operator, tmp_path: Path) -> None:
    go = tmp_path / "go"
    endpoint = ray_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = ray_operator.submit(endpoint, config={"do": "say", "lines": 3, "go": str(go)})
    url, received = f"{endpoint}/{job['job_id']}/logs", ""
    with ray_operator.http.stream("GET", url, headers={"Accept": "text/event-stream"}) as events:
        for text in events.iter_text():
            received += text
            if "line 0" in received and not go.exists():
                assert "line 1" not in received
                # The log and the start take different ways, and the log may arrive first.
                until(lambda: has(ray_operator, endpoint, job, "status_running"), "a job that runs")
                go.touch()
    assert [f"line {number}" in received for number in range(3)] == [True] * 3
    assert "event: end" in received


def test_a_job_outlives_the_operator_and_its_end_is_known_after_the_restart(
    ray_operator: Operator,
) -> None:
    endpoint = ray_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = ray_operator.submit(endpoint, config={"do": "sleep", "s": 4})
    ray_operator.await_log(endpoint, job, "asleep")
    ray_operator.kill()
    ray_operator.start()
    endpoint = f"{ray_operator.url}/probe"
    done = ray_operator.finished(endpoint, job)
    assert (done["status"], done["result"]) == ("status_succeeded", "rested")


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket. Operators that start from now on can reach it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3.bucket()


@pytest.fixture
def remote_storage(
    ray_session: RaySession, tmp_path: Path, database: str, bucket: str
) -> list[str]:
    """Options of an operator whose machine has only its data folder."""
    return [
        *("--engine", "ray", "--ray-address", ray_session.cluster.address),
        *("--ray-node-dir", str(tmp_path / "nodes")),
        *("--store", database, "--files", f"s3://{bucket}"),
    ]


def test_nothing_is_lost_with_the_operators_machine_where_all_data_is_elsewhere(
    tmp_path: Path, s3: S3Server, bucket: str, remote_storage: list[str]
) -> None:
    with operator(tmp_path / "operator", *remote_storage) as running:
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        ended = running.submit(endpoint, config={"do": "say"})
        running.finished(endpoint, ended)
        until(lambda: s3.keys(bucket, f"logs/{ended['job_id']}/"), "the log is archived")
        job = running.submit(endpoint, config={"do": "sleep", "s": 5})
        running.await_log(endpoint, job, "asleep")
        running.kill()
        shutil.rmtree(running.data_dir)
        running.start()
        endpoint = f"{running.url}/probe"
        assert running.log_of(endpoint, ended) == "line 0\n"
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
    tmp_path: Path, s3: S3Server, bucket: str, remote_storage: list[str]
) -> None:
    go = tmp_path / "go"
    said = "line 0\nline 1\n"
    with (
        operator(tmp_path / "a", *remote_storage) as a,
        operator(tmp_path / "b", *remote_storage) as b,
    ):
        assert len({(each.data_dir / "folder.id").read_text() for each in (a, b)}) == 1
        endpoint = b.deployed(probe_yaml(), {"probe.py": WAITS})  # a, the leader, fetches it
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
        until((a.data_dir / "archived" / job["job_id"]).exists, "a has checked its copy of the log")
        assert a.log_of(f"{a.url}/probe", job) == said
        stored = s3.client().get_object(Bucket=bucket, Key=f"logs/{job['job_id']}/log")
        assert stored["Body"].read().decode() == said


def test_nodes_build_a_version_with_the_same_packages_whenever_they_build_it(
    ray_operator: Operator, tmp_path: Path
) -> None:
    wheels = tmp_path / "wheels"
    wheel(wheels, version="1.0")
    task = (
        "import importlib.metadata, time\n"
        "def task(config):\n"
        "    print(importlib.metadata.version('tinyprobe'), flush=True)\n"
        "    time.sleep(config['s'])\n"
    )
    requirements = f"--no-index\n--find-links {wheels}\ntinyprobe\n"
    yaml = probe_yaml("locked").replace("cpu: 1m", "cpu: 6")
    endpoint = ray_operator.deployed(yaml, {"probe.py": task, "requirements.txt": requirements})
    assert ray_operator.log_of(endpoint, ray_operator.run(endpoint, config={"s": 0})) == "1.0\n"
    until(
        lambda: list((ray_operator.data_dir / "locks").glob("*/*.lock")), "the lock file is saved"
    )
    wheel(wheels, version="2.0")
    # No node has room for both at a time: the other node builds it now.
    jobs = [ray_operator.submit(endpoint, config={"s": 300}) for _ in range(2)]
    for job in jobs:
        ray_operator.await_log(endpoint, job, "\n")
    assert [ray_operator.log_of(endpoint, job) for job in jobs] == ["1.0\n", "1.0\n"]
    for job in jobs:
        ray_operator.delete(endpoint, job)


def test_a_job_is_unknown_while_its_agent_is_down_and_then_running_again(
    ray_operator: Operator, ray_session: RaySession
) -> None:
    endpoint = ray_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = ray_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    ray_operator.await_log(endpoint, job, "asleep")
    nodes = ray_operator.data_dir.parents[1] / "nodes"
    (agent_folder,) = (folder.parents[1] for folder in nodes.glob(f"*/*/jobs/{job['job_id']}"))
    node_id = (agent_folder / "owner").read_text().split()[0]
    with ray_session.cluster.raylet_stopped(node_id):  # else Ray replaces the agent within a second
        os.kill(agent_pid(agent_folder), signal.SIGKILL)
        until(lambda: has(ray_operator, endpoint, job, "status_unknown"), "unknown")
        message = ray_operator.status(endpoint, job)["message"]
        failure = r"(connection refused|connection reset by peer|socket closed)( \([\d.:]+\))?"
        by_ray = f"its agent does not answer: {failure}"
        by_connection = r"the connection to the agent of \S+ broke: the other end closed it"
        assert re.fullmatch(f"{by_ray}|{by_connection}", message), message
        problems = ray_operator.http.get(f"{ray_operator.url}/-/cluster").json()["nodes"]
        assert not any("rpc_code" in (node["problem"] or "") for node in problems)
        # The whole text is for the operator.
        until(lambda: "rpc_code: 14" in ray_operator.log.read_text(), "Ray's text in the log")
    until(lambda: has(ray_operator, endpoint, job, "status_running"), "running again")
    assert ray_operator.delete(endpoint, job).status_code == 200
    assert has(ray_operator, endpoint, job, "status_stopped")


def test_waiting_jobs_and_refused_jobs_have_a_reason(ray_operator: Operator) -> None:
    files = {"probe.py": PROBE}
    yaml = probe_yaml("large").replace("cpu: 1m", "cpu: 6")
    endpoint = ray_operator.deployed(yaml, files)
    first = ray_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    ray_operator.await_log(endpoint, first, "asleep")
    others = [ray_operator.submit(endpoint, config={"do": "sleep", "s": 300}) for _ in range(2)]
    message = "needs 6 CPU, 2 free on one node"
    until(
        lambda: any(
            message in ray_operator.status(endpoint, job).get("message", "") for job in others
        ),
        "a waiting job says what it waits for",
    )
    for job in (*others, first):
        assert ray_operator.delete(endpoint, job).status_code == 200
    yaml = probe_yaml("huge").replace("cpu: 1m", "cpu: 1m, gpu: 9")
    [api] = ray_operator.deploy(yaml, files).json()
    reason = "no job of 'huge' can run here: needs 9 GPUs, the largest node has 2"
    assert api["warnings"] == [reason]
    refused = ray_operator.http.post(api["api"]["endpoint"], json={})
    assert (refused.status_code, refused.json()["kind"]) == (409, "conflict")
    assert refused.json()["message"].startswith(reason)


def test_the_command_shows_the_nodes(ray_operator: Operator, tmp_path: Path) -> None:
    env = {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(tmp_path)}

    def cortex(*arguments: str) -> str:
        done = preloaded_cli.run(*arguments, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    until(lambda: len(ready_nodes(ray_operator)) > 1, "both nodes are ready")
    cortex("env", "configure", "ray", "--operator-endpoint", ray_operator.url)
    info = json.loads(cortex("cluster", "info", "-o", "json"))
    assert info["engine"] == "ray"
    assert {node["total"]["cpu"] for node in info["nodes"]} == {8.0}
    assert all(node["is_ready"] for node in info["nodes"])
    assert len(cortex("cluster", "info").splitlines()) == len(info["nodes"]) + 1


def test_a_node_without_cpu_has_no_agent(ray_operator: Operator, ray_session: RaySession) -> None:
    until(lambda: len(ready_nodes(ray_operator)) > 1, "both nodes are ready")
    before = len(ray_operator.http.get(f"{ray_operator.url}/-/cluster").json()["nodes"])
    cluster = ray_session.cluster
    cluster.add("without-cpu", cpus=0)
    cluster.add("with-cpu", cpus=1)  # joins later: once it is ready, the other one would be listed
    until(lambda: 1 in [node["total"]["cpu"] for node in ready_nodes(ray_operator)], "a new node")
    nodes = ray_operator.http.get(f"{ray_operator.url}/-/cluster").json()["nodes"]
    assert len(nodes) == before + 1
    assert all(node["total"]["cpu"] for node in nodes)
    owners = {path.read_text().split()[0] for path in cluster_nodes(ray_operator).glob("*/*/owner")}
    assert cluster.node_id("with-cpu") in owners
    assert cluster.node_id("without-cpu") not in owners
    for name in ("without-cpu", "with-cpu"):
        cluster.kill(name)


def cluster_nodes(ray_operator: Operator) -> Path:
    """The parent of the folders of the agents."""
    return ray_operator.data_dir.parents[1] / "nodes"


def test_large_results_arrive_and_a_dropped_result_is_named(ray_operator: Operator) -> None:
    task = "def task(config):\n    return 'x' * config['length']\n"
    endpoint = ray_operator.deployed(probe_yaml("returns"), {"probe.py": task})
    largest = (1 << 20) - 2  # with its quotes, the result has 1 MiB
    jobs = [ray_operator.submit(endpoint, config={"length": largest}) for _ in range(8)]
    for job in jobs:
        assert len(ray_operator.finished(endpoint, job)["result"]) == largest
    job = ray_operator.submit(endpoint, config={"length": 3 << 20})
    done = ray_operator.finished(endpoint, job)
    assert done["status"] == "status_succeeded"
    assert "result" not in done
    assert "it takes 3 MiB (3145730 bytes), more than the limit of 1 MiB" in done["message"]
    assert ray_operator.log_of(endpoint, job) == f"cortex: {done['message']}\n"


WAITS_IN_FIRST_ATTEMPT = """
import os, time

def task(config):
    print("attempt", os.environ["CORTEX_ATTEMPT"], flush=True)
    while os.environ["CORTEX_ATTEMPT"] == "1":
        time.sleep(0.1)
    return int(os.environ["CORTEX_ATTEMPT"])
"""


def ready_nodes(ray_operator: Operator) -> list[Any]:
    nodes = ray_operator.http.get(f"{ray_operator.url}/-/cluster").json()["nodes"]
    return [node for node in nodes if node["is_ready"]]


def test_a_job_goes_to_a_node_with_its_labels(
    ray_operator: Operator, ray_session: RaySession
) -> None:
    cluster = ray_session.cluster
    cluster.add("labelled", cpus=1, labels="zone=b,example.com/disk=ssd")
    labels = {"zone": "b", "example.com/disk": "ssd"}
    until(
        lambda: labels in [node["labels"] for node in ready_nodes(ray_operator)],
        "the new node is ready",
    )
    yaml = probe_yaml("labelled").replace("cpu: 1m", "cpu: 1m, node_labels: {zone: [a, b]}")
    endpoint = ray_operator.deployed(yaml, {"probe.py": PROBE})
    for _ in range(2):
        done = ray_operator.run(endpoint, config={"do": "surroundings"})
        agent_folder = Path(done["result"]["env"]["CORTEX_JOB_DIR"]).parents[2]
        assert (agent_folder / "owner").read_text().split()[0] == cluster.node_id("labelled")
    yaml = probe_yaml("nowhere").replace("cpu: 1m", "cpu: 1m, node_labels: {zone: z}")
    refused = ray_operator.http.post(ray_operator.deployed(yaml, {"probe.py": PROBE}), json={})
    assert refused.status_code == 409
    assert "needs a node with zone=z, and there is none" in refused.json()["message"]
    cluster.kill("labelled")
    until(
        lambda: labels not in [node["labels"] for node in ready_nodes(ray_operator)],
        "the node is lost",
    )
    job = ray_operator.submit(endpoint)
    message = "waits for a node with zone=a or b: the cluster has none now"
    until(
        lambda: ray_operator.status(endpoint, job).get("message") == message,
        "the job says what it waits for",
    )
    assert ray_operator.delete(endpoint, job).status_code == 200


def test_a_job_for_a_zone_without_nodes_stops_no_other_job(
    ray_operator: Operator, ray_session: RaySession
) -> None:
    cluster = ray_session.cluster

    def zones() -> list[Any]:
        return [node["labels"].get("zone") for node in ready_nodes(ray_operator)]

    cluster.add("away", cpus=1, labels="zone=away")
    until(lambda: "away" in zones(), "the new node is ready")
    cluster.kill("away")
    until(lambda: zones() and "away" not in zones(), "the node is lost")
    yaml = probe_yaml("zoned").replace("cpu: 1m", "cpu: 1m, node_labels: {zone: away}")
    zoned = ray_operator.deployed(yaml, {"probe.py": PROBE})
    waiting = [ray_operator.submit(zoned) for _ in range(2)]
    message = "waits for a node with zone=away: the cluster has none now"
    for job in waiting:
        until(lambda job=job: ray_operator.status(zoned, job).get("message") == message, "it waits")
    anywhere = ray_operator.deployed(probe_yaml("anywhere"), {"probe.py": PROBE})
    assert ray_operator.run(anywhere)["status"] == "status_succeeded"
    # A job that has to wait itself, behind them, starts as well.
    yaml = probe_yaml("large").replace("cpu: 1m", "cpu: 6")
    large = ray_operator.deployed(yaml, {"probe.py": PROBE})
    running = [ray_operator.submit(large, config={"do": "sleep", "s": 300}) for _ in zones()]
    for job in running:
        ray_operator.await_log(large, job, "asleep")
    last = ray_operator.submit(large)
    reason = "needs 6 CPU, 2 free on one node"
    until(lambda: ray_operator.status(large, last).get("message") == reason, "it waits")
    assert ray_operator.delete(large, running[0]).status_code == 200
    assert ray_operator.finished(large, last)["status"] == "status_succeeded"
    assert [ray_operator.status(zoned, job)["message"] for job in waiting] == [message] * 2
    for job in running[1:]:
        assert ray_operator.delete(large, job).status_code == 200
    cluster.add("away", cpus=1, labels="zone=away")
    for job in waiting:
        assert ray_operator.finished(zoned, job)["status"] == "status_succeeded"
    cluster.kill("away")


def kill(ray_operator: Operator, cluster: RayCluster) -> None:
    cluster.kill("third")


def terminate(ray_operator: Operator, cluster: RayCluster) -> None:
    cluster.terminate("third")


def drain(ray_operator: Operator, cluster: RayCluster) -> None:
    raylet = cluster.raylets["third"]
    cluster.drain("third", deadline_s=30)
    del cluster.raylets["third"]

    def problems() -> list[str]:
        nodes = ray_operator.http.get(f"{ray_operator.url}/-/cluster").json()["nodes"]
        return [node["problem"] for node in nodes if node["problem"]]

    def is_shown() -> bool:
        return any("it is being drained, and ends in" in problem for problem in problems())

    until(is_shown, "the node is shown as drained")
    # Ray ends the raylet of a drained node that is idle. The agent has to leave for that.
    until(lambda: not exists(raylet), "the raylet has ended by itself")


@pytest.mark.parametrize(
    ("lose", "reason"),
    [
        (kill, r"the node \S+ was lost"),
        (terminate, r"the node \S+ was ended: .*SIGTERM.*"),
        (drain, r"the node \S+ is being drained"),
    ],
)
def test_a_job_whose_node_is_lost_gets_a_new_attempt_on_another_node(
    ray_operator: Operator,
    ray_session: RaySession,
    lose: Callable[[Operator, RayCluster], None],
    reason: str,
) -> None:
    ray_session.cluster.add("third", cpus=16)  # the node with the most free capacity

    def sizes() -> list[float]:
        return sorted(node["total"]["cpu"] for node in ready_nodes(ray_operator))

    until(lambda: len(sizes()) > 1 and sizes()[-1] == 16, "the new node and another are ready")
    endpoint = ray_operator.deployed(
        probe_yaml("again", "  retries: 1\n"), {"probe.py": WAITS_IN_FIRST_ATTEMPT}
    )
    job = ray_operator.submit(endpoint)
    ray_operator.await_log(endpoint, job, "attempt 1")
    lose(ray_operator, ray_session.cluster)
    done = ray_operator.finished(endpoint, job)
    assert (done["status"], done["result"]) == ("status_succeeded", 2)
    lines = ray_operator.log_of(endpoint, job).splitlines()
    assert lines[0] == "attempt 1"
    assert re.fullmatch(rf"cortex: attempt 1 was lost: {reason}; attempt 2 begins", lines[1])
    assert lines[2] == "attempt 2"


CHECKPOINTS = """
import os, time

def task(config):
    folder = os.path.join(os.environ["CORTEX_JOB_DIR"], "checkpoint")
    path = os.path.join(folder, "deep", "step")
    if os.path.exists(path):
        return [os.environ["CORTEX_ATTEMPT"], open(path).read(), folder]
    os.makedirs(os.path.dirname(path))
    with open(path, "w") as file:
        file.write("7")
    print("saved", flush=True)
    time.sleep(600)
"""


def test_a_checkpoint_follows_its_job_to_another_node(
    tmp_path: Path,
    ray_session: RaySession,
    s3: S3Server,
    bucket: str,
    remote_storage: list[str],
) -> None:
    cluster = ray_session.cluster
    cluster.add("doomed", cpus=4, labels="pair=a")
    cluster.add("heir", cpus=4, labels="pair=b")
    yaml = probe_yaml("follows", "  retries: 1\n").replace(
        "cpu: 1m", "cpu: 1m, node_labels: {pair: [a, b]}"
    )
    with operator(tmp_path / "operator", *remote_storage) as running:
        until(
            lambda: sum("pair" in node["labels"] for node in ready_nodes(running)) == 2,
            "both nodes are ready",
        )
        endpoint = running.deployed(yaml, {"probe.py": CHECKPOINTS})
        job = running.submit(endpoint)
        running.await_log(endpoint, job, "saved")
        key = f"checkpoints/{job['job_id']}"
        until(lambda: s3.keys(bucket, key), "the checkpoint is stored")
        folders = (tmp_path / "nodes").glob(f"*/*/jobs/{job['job_id']}/files")
        (before,) = [folder.parents[2] for folder in folders]
        node = (before / "owner").read_text().split()[0]
        (name,) = [each for each in cluster.raylets if cluster.node_id(each) == node]
        cluster.kill(name)
        done = running.finished(endpoint, job)
        assert done["status"] == "status_succeeded", done
        attempt, step, folder = done["result"]
        assert (attempt, step) == ("2", "7")
        assert not Path(folder).is_relative_to(before)
        until(lambda: not s3.keys(bucket, key), "the checkpoint is removed with the end of the job")
    for name in {"doomed", "heir"} & set(cluster.raylets):
        cluster.kill(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "ray"], "HOST:PORT"),
        (["--engine", "ray", "--ray-address", "ray"], "'ray' is not HOST:PORT"),
        (["--engine", "ray", "--ray-address", "h:1", "--cpu", "2"], "--cpu needs --engine local"),
        (["--engine", "ray", "--ray-address", "h:99999"], "'h:99999' is not HOST:PORT"),
        (["--engine", "ray", "--ray-address", "a..b:1"], "'a..b:1' is not HOST:PORT"),
        (
            ["--ray-address", "h:1"],
            "--ray-address, --ray-node-dir and --ray-autoscaler need --engine ray",
        ),
    ],
)
def test_conflicting_options_are_an_error(options: list[str], message: str) -> None:
    done = preloaded_cli.run("serve", *options)
    assert done.returncode == 1
    assert message in done.stderr


def test_an_operator_starts_before_its_cluster_and_serves_while_the_cluster_is_away(
    tmp_path: Path,
) -> None:
    nodes = str(tmp_path / "nodes")
    with (
        absent_cluster() as cluster,
        operator(
            tmp_path / "operator",
            *("--engine", "ray", "--ray-address", cluster.address, "--ray-node-dir", nodes),
        ) as running,
    ):
        assert "cannot join the ray cluster" in running.log.read_text()
        away = f"the Ray cluster at {cluster.address} cannot be joined: nothing answers there"
        waits = f"waits for the Ray cluster at {cluster.address}, which cannot be joined: nothing"
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        early = running.submit(endpoint, config={"do": "sleep", "s": 300})
        stopped = running.submit(endpoint)
        message = running.status(endpoint, early)["message"]
        assert message.startswith(waits), message
        assert running.delete(endpoint, stopped).status_code == 200
        assert has(running, endpoint, stopped, "status_stopped")
        ready = running.http.get(f"{running.url}/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert ready.json()["problem"].startswith(away)
        env = {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(tmp_path)}
        env["CORTEX_OPERATOR_ENDPOINT"] = running.url
        preloaded_cli.run("env", "configure", "e", "--operator-endpoint", running.url, env=env)
        shown = preloaded_cli.run("cluster", "info", env=env)
        assert shown.stdout.startswith(away), shown
        assert shown.stdout.endswith("; jobs wait, and the operator retries\n")

        cluster.start_head()
        running.await_log(endpoint, early, "asleep")
        assert running.http.get(f"{running.url}/readyz").json() == {"status": "ready"}
        assert running.http.get(f"{running.url}/-/cluster").json()["problem"] is None
        ended = running.submit(endpoint, config={"do": "say"})
        running.finished(endpoint, ended)

        cluster.kill_head()
        running.kill()
        running.start()
        endpoint = f"{running.url}/probe"
        found = running.status(endpoint, early)
        assert found["status"] == "status_unknown"
        assert found["message"].startswith(away)
        assert running.log_of(endpoint, ended) == "line 0\n"
        assert running.log_of(endpoint, early) == "asleep\n"
        late = running.submit(endpoint)
        assert running.status(endpoint, late)["message"].startswith(waits)
        until(lambda: not cluster.live_raylets(), "the nodes have left")
        cluster.start_head()
        lost = running.finished(endpoint, early)
        assert lost["status"] == "status_unexpected_error"
        assert re.fullmatch(r"its node \S+ is no longer in the cluster", lost["message"])
        assert running.finished(endpoint, late)["status"] == "status_succeeded"


def test_an_operator_takes_over_while_the_head_hangs(
    tmp_path: Path, ray_session: RaySession, database: str
) -> None:
    cluster = ray_session.cluster
    options = (
        *("--engine", "ray", "--ray-address", cluster.address, "--store", database),
        *("--ray-node-dir", str(tmp_path / "nodes")),
    )
    with operators(tmp_path, 2, *options) as (one, other):
        endpoint = one.deployed(probe_yaml(), {"probe.py": PROBE})
        until(lambda: ready_nodes(one), "a node is ready")
        job, to_stop = [
            one.submit(endpoint, config={"do": "sleep", "s": seconds}) for seconds in (60, 300)
        ]
        for each in (job, to_stop):
            one.await_log(endpoint, each, "asleep")
        leader, follower = (one, other) if _leads(one) else (other, one)
        endpoint = f"{follower.url}/probe"
        with cluster.head_stopped():
            leader.kill()
            until(lambda: _leads(follower), "the other operator leads")
            until(lambda: has(follower, endpoint, job, "status_unknown"), "the job is unknown")
            assert (
                "cannot be joined: it did not answer" in follower.status(endpoint, job)["message"]
            )
            assert follower.log_of(endpoint, job) == "asleep\n"
            late = follower.submit(endpoint)
            waits = f"waits for the Ray cluster at {cluster.address}, which cannot be joined"
            assert waits in follower.status(endpoint, late)["message"]
            assert follower.delete(endpoint, to_stop).status_code == 200
            assert has(follower, endpoint, to_stop, "status_stopped")
        done = follower.finished(endpoint, job)
        assert (done["status"], done["result"]) == ("status_succeeded", "rested")
        assert follower.finished(endpoint, late)["status"] == "status_succeeded"
        assert has(follower, endpoint, to_stop, "status_stopped")


def _leads(running: Operator) -> bool:
    metrics = running.http.get(f"{running.url}/metrics").text
    return "cortex_operator_drives 1.0" in metrics
