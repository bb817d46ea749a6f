"""Runs the examples of the pages: the README's project and commands, and the clients' examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from operator_harness import CORTEX, Operator

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def run(shared_operator: Operator, folder: Path, *command: str) -> str:
    env = {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(folder / "config")}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def configure(shared_operator: Operator, folder: Path) -> None:
    run(
        shared_operator,
        folder,
        CORTEX,
        "env",
        "configure",
        "docs",
        "--operator-endpoint",
        shared_operator.url,
    )


def test_the_first_example_of_the_readme_runs(shared_operator: Operator, tmp_path: Path) -> None:
    (code,) = blocks("README.md", "python")
    (yaml,) = blocks("README.md", "yaml")
    commands = blocks("README.md", "sh")[0]
    # Renamed: other tests deploy the example `iris` on the same operator.
    (tmp_path / "iris.py").write_text(code)
    (tmp_path / "cortex.yaml").write_text(yaml.replace("name: iris", "name: readme"))
    configure(shared_operator, tmp_path)
    (submit,) = re.findall(r"-d '(.*)'", commands)
    lines = [line.partition("#")[0].split() for line in commands.splitlines()]
    shown = [line[1:] for line in lines if line[:1] == ["cortex"] and line[1] != "serve"]
    assert [line[0] for line in shown] == ["deploy", "get", "logs", "delete"]
    run(shared_operator, tmp_path, CORTEX, *shown[0])
    response = shared_operator.http.post(
        f"{shared_operator.url}/readme",
        content=submit,
        headers={"Content-Type": "application/json"},
    )
    job = response.json()
    done = shared_operator.finished(f"{shared_operator.url}/readme", job)
    assert done["result"] == {"accuracy": 0.97}
    for line in shown[1:]:
        words = [{"iris": "readme", "JOB_ID": job["job_id"]}.get(word, word) for word in line]
        run(shared_operator, tmp_path, CORTEX, *words)


def test_the_examples_of_the_python_clients_run(shared_operator: Operator, tmp_path: Path) -> None:
    code, asyncio_code = blocks("docs/cli.md", "python")
    configure(shared_operator, tmp_path)
    (tmp_path / "example.py").write_text(code)
    assert "status_succeeded {'rows': 300}" in run(
        shared_operator, tmp_path, sys.executable, "example.py"
    )
    (tmp_path / "example.py").write_text(asyncio_code)
    output = run(
        shared_operator, tmp_path, sys.executable, "-X", "dev", "-W", "error", "example.py"
    )
    assert output.splitlines() == ["{'rows': 150}", "{'rows': 300}", "{'rows': 450}"]
