"""The three examples, run as their READMEs say, and the demo."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from cortex.projects.pack import pack
from operator_harness import CORTEX, Operator, processes_with, until

ROOT = Path(__file__).parents[2]


def deploy(shared_operator: Operator, example: str) -> str:
    folder = ROOT / "examples" / example
    archive = io.BytesIO()
    pack(folder, archive)
    response = shared_operator.upload((folder / "cortex.yaml").read_text(), archive.getvalue())
    assert response.status_code == 200, response.text
    return str(response.json()[0]["api"]["endpoint"])


def saved_files(shared_operator: Operator, job: dict[str, str]) -> list[Path]:
    folder = shared_operator.data_dir / "jobs" / job["job_id"] / "files"
    return [path for path in folder.rglob("*") if path.is_file()]


def test_iris_trains_and_writes_a_model(shared_operator: Operator) -> None:
    endpoint = deploy(shared_operator, "iris")
    job = shared_operator.submit(endpoint, config={"C": 0.5})
    done = shared_operator.finished(endpoint, job)
    assert done["status"] == "status_succeeded", shared_operator.log_of(endpoint, job)
    assert done["result"]["accuracy"] > 0.8
    assert [path.stat().st_size > 100 for path in saved_files(shared_operator, job)] == [True]


def test_wordcount_processes_a_file(shared_operator: Operator) -> None:
    endpoint = deploy(shared_operator, "wordcount")
    job = shared_operator.submit(endpoint)
    assert shared_operator.finished(endpoint, job)["status"] == "status_succeeded"
    assert any(character.isdigit() for character in shared_operator.log_of(endpoint, job))


def test_checkpoint_saves_when_stopped_and_resumes(long_grace_operator: Operator) -> None:
    endpoint = deploy(long_grace_operator, "checkpoint")
    job = long_grace_operator.submit(endpoint, config={"steps": 10_000, "interval_s": 0.05})
    long_grace_operator.await_log(endpoint, job, "step")
    assert long_grace_operator.delete(endpoint, job).status_code == 200
    until(lambda: saved_files(long_grace_operator, job), "the checkpoint")
    until(lambda: not processes_with(job["job_id"]), "its processes have exited")
    (checkpoint,) = saved_files(long_grace_operator, job)
    steps = json.loads(checkpoint.read_text())["steps"]
    again = long_grace_operator.submit(
        endpoint, config={"steps": steps + 3, "interval_s": 0.01, "checkpoint": str(checkpoint)}
    )
    done = long_grace_operator.finished(endpoint, again)
    assert (done["status"], done["result"]["steps"]) == ("status_succeeded", steps + 3)
    assert f"resuming after step {steps}" in long_grace_operator.log_of(endpoint, again)


@pytest.mark.parametrize("example", ["iris", "wordcount", "checkpoint"])
def test_the_readme_of_every_example_deploys_it(example: str) -> None:
    assert "cortex deploy" in (ROOT / "examples" / example / "README.md").read_text()


def test_the_demo_succeeds_and_cleans_up(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "examples" / "demo.sh")],
        env={
            **os.environ,
            "PATH": f"{Path(CORTEX).parent}:{os.environ['PATH']}",
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "status_succeeded" in done.stdout or "succeeded" in done.stdout
    assert "accuracy" in done.stdout
    assert list(tmp_path.iterdir()) == [], "the demo cleans up"
    until(lambda: not processes_with(str(tmp_path)), "its processes have exited")
