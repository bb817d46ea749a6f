"""Jobs that make their log larger than a disk, or forge the file `log.cut`.

The operator serves and archives no more of a log than `limits.log` allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contract.test_logs import events
from cortex.joblog.reader import REPLACED
from operator_harness import Operator, operator, until

LIMIT = 1 << 20
MAX_BYTES = LIMIT + (256 << 10)
MAX_FILE_SIZE = (1 << 63) - 1
YAML = f"""
- name: forger
  kind: TaskAPI
  definition: {{path: forger.py}}
  compute: {{cpu: 1m}}
  limits: {{log: {LIMIT}}}
"""
# With `hurry` the job kills its supervisor, which would otherwise cut the log.
FORGER = """
import os, signal, time


def task(config):
    print("first", flush=True)
    folder = os.path.dirname(os.environ["CORTEX_JOB_SPEC"])
    log = f"{folder}/log"
    if config.get("cut") is not None:
        with open(f"{folder}/log.cut", "w") as file:
            file.write(config["cut"])
    if config.get("size"):
        size = config["size"]
        while True:  # the largest size that this file system allows
            try:
                os.truncate(log, size)
                break
            except OSError:
                size //= 2
    with open(log, "ab") as file:
        try:
            file.write(b"last\\n")
        except OSError:
            pass
    if config.get("instead"):
        os.unlink(log)
        {"folder": os.mkdir, "pipe": os.mkfifo}[config["instead"]](log)
    if config.get("hurry"):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
"""
SIZES = [1 << 32, 1 << 45, MAX_FILE_SIZE]
CUTS = {
    "none": None,
    "almost nothing": {"start": 0, "end": 1, "limit": LIMIT},
    "a little": {"start": 100, "end": 4096, "limit": 1 << 59},
    "more than there is": {"start": 5, "end": 1 << 62, "limit": LIMIT},
    "texts": {"start": "0", "end": "5", "limit": "1Mi"},
    "no end": {"start": 5, "end": -1, "limit": LIMIT},
}  # fmt: skip


@pytest.fixture(scope="module")
def archiving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, Path]]:
    folder = tmp_path_factory.mktemp("archiving")
    (folder / "files").mkdir()
    with operator(folder, "--files", f"file://{folder / 'files'}") as running:
        yield running, folder / "files"


@pytest.fixture(scope="module")
def forger(archiving: tuple[Operator, Path]) -> str:
    return archiving[0].deployed(YAML, {"forger.py": FORGER})


def read_all(own_operator: Operator, endpoint: str, job: Any, folder: Path) -> str:
    """The log of a job. Read, followed and archived, it must be the same, and within its limit."""
    url = f"{endpoint}/{job['job_id']}/logs"
    text = own_operator.http.get(url).text
    assert len(text) <= MAX_BYTES
    followed = "".join(json.loads(each["data"]) for each in list(events(own_operator, url))[:-1])
    assert followed == text
    part = own_operator.http.get(url, headers={"Range": f"bytes=0-{MAX_FILE_SIZE - 1}"})
    assert part.status_code in (200, 206, 416)
    assert len(part.content) <= MAX_BYTES
    until((own_operator.data_dir / "archived" / job["job_id"]).exists, "the log is archived")
    stored = folder / "logs" / job["job_id"] / "log"
    assert stored.stat().st_size <= MAX_BYTES
    for name in ("log", "log.cut"):
        (own_operator.data_dir / "jobs" / job["job_id"] / name).unlink(missing_ok=True)
    assert own_operator.http.get(url).text == text
    return text


@pytest.mark.parametrize("hurry", [False, True], ids=["supervised", "hurried"])
@pytest.mark.parametrize("size", SIZES)
def test_a_log_as_large_as_a_file_can_be_is_cut(
    archiving: tuple[Operator, Path], forger: str, size: int, hurry: bool
) -> None:
    own_operator, folder = archiving
    found = own_operator.run(forger, config={"size": size, "hurry": hurry})
    assert found["status"] == ("status_unexpected_error" if hurry else "status_succeeded")
    text = read_all(own_operator, forger, found, folder)
    assert text.startswith("first\n")
    assert "of the log are gone: limits.log is 1 MiB]" in text


@pytest.mark.parametrize("name", CUTS)
def test_a_forged_log_cut_is_believed_only_where_it_can_be_true(
    archiving: tuple[Operator, Path], forger: str, name: str
) -> None:
    own_operator, folder = archiving
    cut = None if CUTS[name] is None else json.dumps(CUTS[name])
    found = own_operator.run(forger, config={"size": 1 << 32, "cut": cut, "hurry": True})
    assert "of the log are gone: limits.log is 1 MiB]" in read_all(
        own_operator, forger, found, folder
    )
    found = own_operator.run(forger, config={"cut": cut})
    text = read_all(own_operator, forger, found, folder)
    assert text.endswith("irst\nlast\n")
    assert text.startswith("[cortex: " if name == "almost nothing" else "first")


@pytest.mark.parametrize("instead", ["folder", "pipe"])
def test_a_folder_or_pipe_that_replaces_a_log_is_reported(
    archiving: tuple[Operator, Path], forger: str, instead: str
) -> None:
    own_operator, folder = archiving
    found = own_operator.run(forger, config={"instead": instead})
    assert found["status"] == "status_succeeded"
    assert own_operator.log_of(forger, found) == REPLACED
    until((own_operator.data_dir / "archived" / found["job_id"]).exists, "the log is archived")
    assert (folder / "logs" / found["job_id"] / "log").read_text() == REPLACED
    assert own_operator.log_of(forger, found) == REPLACED


def test_a_large_log_of_a_running_job_is_cut(archiving: tuple[Operator, Path], forger: str) -> None:
    """The job stops its supervisor, which would otherwise cut the log."""
    own_operator, _ = archiving
    code = FORGER.replace("SIGKILL", "SIGSTOP")
    endpoint = own_operator.deployed(YAML.replace("forger", "holder"), {"holder.py": code})
    job = own_operator.submit(endpoint, config={"size": 1 << 45, "hurry": True})
    log = own_operator.data_dir / "jobs" / job["job_id"] / "log"
    until(lambda: log.exists() and log.stat().st_size > LIMIT, "the log exceeds its limit")
    text = own_operator.log_of(endpoint, job)
    assert text.startswith("first\n")
    assert len(text) <= MAX_BYTES
    own_operator.delete(endpoint, job)
