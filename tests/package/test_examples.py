"""The examples as plain programs. The acceptance tests run them as deployed jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cortex.spec.cortex_yaml import read_apis

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["iris", "wordcount", "checkpoint"])
def test_an_example_describes_one_api_of_its_name(name: str) -> None:
    file = EXAMPLES / name / "cortex.yaml"
    [api] = read_apis(file.read_text(), str(file))
    assert api.name == name
    assert (file.parent / "README.md").exists()


def test_wordcount_counts(tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "count.sh", "gettysburg.txt"],
        cwd=EXAMPLES / "wordcount",
        env={**os.environ, "CORTEX_JOB_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    counts = (tmp_path / "counts.txt").read_text().split()
    assert counts[:2] == ["13", "that"]
    assert "13 that" in done.stdout


def checkpoint(tmp_path: Path, config: dict[str, object]) -> subprocess.Popen[str]:
    code = f"import checkpoint, json; print(json.dumps(checkpoint.Task()({config!r})), flush=True)"
    return subprocess.Popen(
        [sys.executable, "-B", "-c", code],
        cwd=EXAMPLES / "checkpoint",
        env={**os.environ, "CORTEX_JOB_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_checkpoint_saves_when_stopped_and_resumes_from_there(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint.json"
    with checkpoint(tmp_path, {"steps": 100000, "interval_s": 0.01, "checkpoint": None}) as stopped:
        assert stopped.stdout is not None
        assert "step 1 of" in stopped.stdout.readline()
        stopped.send_signal(signal.SIGTERM)
        assert str(saved) in stopped.stdout.read().splitlines()[-1]
    assert stopped.returncode == 143
    steps = json.loads(saved.read_text())["steps"]

    config = {"steps": steps + 2, "interval_s": 0.01, "checkpoint": str(saved)}
    with checkpoint(tmp_path, config) as resumed:
        assert resumed.stdout is not None
        result = json.loads(resumed.stdout.read().splitlines()[-1])
    assert resumed.returncode == 0
    assert result["steps"] == steps + 2
