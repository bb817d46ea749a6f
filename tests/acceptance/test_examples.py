"""The three examples, as their READMEs say, and the demo."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import pytest

from cortex.projects.pack import pack
from support import CORTEX, Operator, processes_with, until

ROOT = Path(__file__).parents[2]


def deploy(shared: Operator, example: str) -> str:
    folder = ROOT / "examples" / example
    archive = io.BytesIO()
    pack(folder, archive)
    response = shared.upload((folder / "cortex.yaml").read_text(), archive.getvalue())
    assert response.status_code == 200, response.text
    return str(response.json()[0]["api"]["endpoint"])


def saved(shared: Operator, job: dict[str, str]) -> list[Path]:
    folder = shared.data_dir / "jobs" / job["job_id"] / "files"
    return [path for path in folder.rglob("*") if path.is_file()]


def test_iris_trains_and_writes_a_model(shared: Operator) -> None:
    endpoint = deploy(shared, "iris")
    job = shared.submit(endpoint, config={"C": 0.5})
    done = shared.finished(endpoint, job)
    assert done["status"] == "status_succeeded", shared.log_of(endpoint, job)
    assert done["result"]["accuracy"] > 0.8
    assert [path.stat().st_size > 100 for path in saved(shared, job)] == [True]


def test_wordcount_processes_a_file(shared: Operator) -> None:
    endpoint = deploy(shared, "wordcount")
    job = shared.submit(endpoint)
    assert shared.finished(endpoint, job)["status"] == "status_succeeded"
    assert any(character.isdigit() for character in shared.log_of(endpoint, job))


def test_checkpoint_saves_when_stopped_and_resumes(patient: Operator) -> None:
    endpoint = deploy(patient, "checkpoint")
    job = patient.submit(endpoint, config={"steps": 10_000, "interval_s": 0.05})
    patient.await_log(endpoint, job, "step")
    assert patient.delete(endpoint, job).status_code == 200
    until(lambda: saved(patient, job), "the checkpoint")
    until(lambda: not processes_with(job["job_id"]), "its processes gone")
    (checkpoint,) = saved(patient, job)
    steps = json.loads(checkpoint.read_text())["steps"]
    again = patient.submit(
        endpoint, config={"steps": steps + 3, "interval_s": 0.01, "checkpoint": str(checkpoint)}
    )
    done = patient.finished(endpoint, again)
    assert (done["status"], done["result"]["steps"]) == ("status_succeeded", steps + 3)
    assert f"resuming after step {steps}" in patient.log_of(endpoint, again)


@pytest.mark.parametrize("example", ["iris", "wordcount", "checkpoint"])
def test_every_example_is_explained(example: str) -> None:
    assert "cortex deploy" in (ROOT / "examples" / example / "README.md").read_text()


def test_the_demo(tmp_path: Path) -> None:
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
    assert list(tmp_path.iterdir()) == [], "it cleans up"
    until(lambda: not processes_with(str(tmp_path)), "its processes gone")
