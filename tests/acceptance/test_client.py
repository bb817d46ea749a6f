"""The Python client against a real operator."""

from __future__ import annotations

from pathlib import Path

import pytest

import cortex
from cortex.errors import Conflict, InvalidSpec, NotFound
from support import PROBE, Operator


@pytest.fixture
def client(shared: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cortex.Client:
    monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path / "config"))
    return cortex.new_client("test", shared.url)


def api(name: str) -> dict[str, object]:
    return {"name": name, "kind": "TaskAPI", "compute": {"cpu": "1m"}}


def test_a_function_is_deployed_and_run(client: cortex.Client, shared: Operator) -> None:
    factor = 3

    def task(config: dict[str, int]) -> int:
        print("computing")
        return config["x"] * factor

    client.create_api(api("from-function"), task=task)
    job = client.submit_job("from-function", config={"x": 14}, timeout=300)
    assert "".join(client.stream_job_logs("from-function", job["job_id"])) == "computing\n"
    done = client.get_job("from-function", job["job_id"], wait=60)
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
    assert client.get_job("from-class", job["job_id"], wait=60)["job_status"]["result"] == "six"


def test_a_folder_is_deployed_and_left_as_it_was(client: cortex.Client, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "probe.py").write_text(PROBE)
    spec = {**api("from-folder"), "definition": {"path": "probe.py", "config": {"a": 1}}}
    client.create_api(spec, project_dir=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["probe.py"]
    job = client.submit_job("from-folder")
    assert client.get_job("from-folder", job["job_id"], wait=60)["job_status"]["result"] == {"a": 1}

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


def test_mistakes_are_raised_as_what_they_are(client: cortex.Client, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="Bad_Name"):
        client.create_api({**api("Bad_Name"), "definition": {"path": "x.py"}}, project_dir=tmp_path)
    with pytest.raises(NotFound):
        client.submit_job("nothing")


def test_environments(client: cortex.Client, shared: Operator) -> None:
    listed = cortex.env_list()
    assert listed["default_environment"] == "test"
    assert cortex.client("test").list_apis() is not None
    cortex.env_delete("test")
    assert cortex.env_list()["environments"] == []
