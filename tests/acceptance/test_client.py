"""The Python clients against a real operator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import cortex
from client_variants import AwaitedClient, Connect
from cortex.errors import Conflict, InvalidRequest, InvalidSpec, NotFound
from operator_harness import PROBE, WAIT_TIMEOUT_S, Operator, until
from operator_proxy import OperatorProxy


@pytest.fixture(params=[cortex.client, AwaitedClient.of_environment], ids=["sync", "async"])
def client(
    shared_operator: Operator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[cortex.Client]:
    monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path / "config"))
    cortex.new_client("test", shared_operator.url).close()
    with request.param() as made:
        yield made


def api(name: str) -> dict[str, object]:
    return {"name": name, "kind": "TaskAPI", "compute": {"cpu": "1m"}}


def test_a_function_is_deployed_and_run(client: cortex.Client, shared_operator: Operator) -> None:
    factor = 3

    def task(config: dict[str, int]) -> int:
        print("computing")
        return config["x"] * factor

    client.create_api(api("from-function"), task=task)
    job = client.submit_job("from-function", config={"x": 14}, timeout=300)
    assert "".join(client.stream_job_logs("from-function", job["job_id"])) == "computing\n"
    done = client.get_job("from-function", job["job_id"], wait=WAIT_TIMEOUT_S)
    assert done["job_status"]["result"] == 42


def test_a_class_is_deployed_and_run_with_requirements(client: cortex.Client) -> None:
    class Task:
        def __init__(self) -> None:
            import six

            self.six = six

        def __call__(self, config: dict[str, int]) -> str:
            return str(self.six.__name__)

    client.create_api(api("from-class"), task=Task, requirements=["six"])
    job = client.submit_job("from-class")
    done = client.get_job("from-class", job["job_id"], wait=WAIT_TIMEOUT_S)
    assert done["job_status"]["result"] == "six"


def test_a_folder_is_deployed_without_being_changed(client: cortex.Client, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "probe.py").write_text(PROBE)
    spec = {**api("from-folder"), "definition": {"path": "probe.py", "config": {"a": 1}}}
    client.create_api(spec, project_dir=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["probe.py"]
    job = client.submit_job("from-folder")
    done = client.get_job("from-folder", job["job_id"], wait=WAIT_TIMEOUT_S)
    assert done["job_status"]["result"] == {"a": 1}

    running = client.submit_job("from-folder", config={"do": "sleep", "s": 300})
    client.stop_job("from-folder", running["job_id"])
    assert (
        client.get_job("from-folder", running["job_id"])["job_status"]["status"] == "status_stopped"
    )
    with pytest.raises(Conflict):
        client.stop_job("from-folder", job["job_id"])
    assert "from-folder" in {each["spec"]["name"] for each in client.list_apis()}
    client.delete_api("from-folder")
    with pytest.raises(NotFound):
        client.get_api("from-folder")


def test_mistakes_raise_the_matching_error(client: cortex.Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="Bad_Name"):
        client.create_api({**api("Bad_Name"), "definition": {"path": "x.py"}}, project_dir=tmp_path)
    with pytest.raises(NotFound):
        client.submit_job("nothing")


def test_environments_are_listed_and_deleted(
    client: cortex.Client, shared_operator: Operator
) -> None:
    listed = cortex.env_list()
    assert listed["default_environment"] == "test"
    assert cortex.client("test").list_apis() is not None
    cortex.env_delete("test")
    assert cortex.env_list()["environments"] == []


def test_a_wait_continues_after_the_operator_was_killed(
    connect: Connect, own_operator: Operator, operator_proxy: OperatorProxy
) -> None:
    with connect(operator_proxy.url) as client, ThreadPoolExecutor(1) as pool:
        job = client.submit_job("probe", {"do": "sleep", "s": 300})
        waiting = pool.submit(client.get_job, "probe", job["job_id"], wait=WAIT_TIMEOUT_S)
        assert operator_proxy.long_poll_arrived.wait(WAIT_TIMEOUT_S)
        own_operator.kill()
        until(
            lambda: operator_proxy.refused_connections, "the client retried while no operator ran"
        )
        own_operator.start()
        assert own_operator.delete(f"{own_operator.url}/probe", job).status_code == 200
        assert waiting.result(WAIT_TIMEOUT_S)["job_status"]["status"] == "status_stopped"


def test_a_job_is_known_after_a_restart_of_the_operator(
    connect: Connect, own_operator: Operator, operator_proxy: OperatorProxy
) -> None:
    with connect(operator_proxy.url) as client:
        job = client.submit_job("probe", {"x": 1})
        own_operator.kill()
        own_operator.start()
        view = client.get_job("probe", job["job_id"], wait=WAIT_TIMEOUT_S)
    assert view["job_status"]["status"] == "status_succeeded"
    result: Any = view["job_status"]["result"]
    assert result["x"] == 1


def test_a_followed_log_continues_after_the_operator_was_killed(
    connect: Connect, own_operator: Operator, operator_proxy: OperatorProxy
) -> None:
    with connect(operator_proxy.url) as client:
        job = client.submit_job("probe", {"do": "sleep", "s": 300})
        log = client.stream_job_logs("probe", job["job_id"])
        assert next(log) == "asleep\n"
        own_operator.kill()
        own_operator.start()
        client.stop_job("probe", job["job_id"])
        assert "".join(log) == ""


def test_a_log_is_read_as_written_until_now(
    connect: Connect, own_operator: Operator, operator_proxy: OperatorProxy
) -> None:
    with connect(operator_proxy.url) as client:
        running = client.submit_job("probe", {"do": "sleep", "s": 300})
        own_operator.await_log(f"{own_operator.url}/probe", running, "asleep")
        assert "".join(client.read_job_logs("probe", running["job_id"])) == "asleep\n"
        with pytest.raises(NotFound):
            "".join(client.read_job_logs("probe", "nothing"))


def test_a_submit_whose_answer_was_lost_is_one_job(
    connect: Connect, operator_proxy: OperatorProxy
) -> None:
    operator_proxy.answers_to_lose = 2
    with connect(operator_proxy.url) as client:
        job = client.submit_job("probe", {"do": "echo"})
        page = client.list_jobs("probe")
    assert [answer.split()[1] for answer in operator_proxy.lost_answers] == [b"200", b"200"]
    assert [each["job_id"] for each in page["job_statuses"]] == [job["job_id"]]
    assert page["next_cursor"] is None


def test_a_given_idempotency_key_makes_one_job(
    connect: Connect, operator_proxy: OperatorProxy
) -> None:
    with connect(operator_proxy.url) as client:
        first = client.submit_job("probe", {"x": "\ud800"}, 300, idempotency_key="order 17")
        again = client.submit_job("probe", {"x": "\ud800"}, 300, idempotency_key="order 17")
        assert again == first
        assert first["config"] == {"x": "\ud800"}
        with pytest.raises(Conflict, match="order 17"):
            client.submit_job("probe", {"x": 2}, idempotency_key="order 17")
        assert client.submit_job("probe")["job_id"] != first["job_id"]


def test_jobs_are_listed_page_by_page(connect: Connect, operator_proxy: OperatorProxy) -> None:
    with connect(operator_proxy.url) as client:
        jobs = [client.submit_job("probe", timeout=300)["job_id"] for _ in range(3)]
        for job in jobs:
            client.get_job("probe", job, wait=WAIT_TIMEOUT_S)
        page = client.list_jobs("probe", "status_succeeded", limit=2)
        rest = client.list_jobs("probe", limit=2, cursor=page["next_cursor"])
        found = [each["job_id"] for each in page["job_statuses"] + rest["job_statuses"]]
        assert found == jobs[::-1]
        assert client.list_jobs("probe", "status_stopped")["job_statuses"] == []
        with pytest.raises(InvalidRequest, match="status"):
            client.list_jobs("probe", "odd")
        with pytest.raises(NotFound):
            client.list_jobs("nothing")


CHAIN = """
import cortex
from cortex_internal.lib.log import logger


class Task:
    def __call__(self, config):
        client = cortex.Client(config["url"])
        if "next" not in config:
            return "the last"
        job = client.submit_job(config["next"], {"url": config["url"]})
        logger.info("submitted", extra={"next": job["job_id"], "loss": float("nan")})
        client.stream_job_logs(config["next"], job["job_id"])
        return client.get_job(config["next"], job["job_id"], wait=60)["job_status"]["result"]
"""


def test_a_task_submits_to_another_api_and_waits_for_it(shared_operator: Operator) -> None:
    yaml = "- {{name: {}, kind: TaskAPI, definition: {{path: chain.py}}, compute: {{cpu: 1m}}}}\n"
    shared_operator.deployed(yaml.format("chain-last"), {"chain.py": CHAIN})
    first = shared_operator.deployed(yaml.format("chain-first"), {"chain.py": CHAIN})
    job = shared_operator.submit(first, config={"url": shared_operator.url, "next": "chain-last"})
    ended = shared_operator.finished(first, job)
    log = shared_operator.log_of(first, job)
    assert (ended["status"], ended.get("result")) == ("status_succeeded", "the last"), log
    record = json.loads(log.splitlines()[0])
    assert (record["job_id"], record["loss"]) == (job["job_id"], "NaN")
