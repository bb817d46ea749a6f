"""Hostile jobs beside honest ones. A real operator runs as root, its jobs as a user without rights.
Hostile jobs attack their records, sockets, related processes, folders and groups at random. In the
end no honest job has a wrong status, no answer was a 500, no process or file is left, and no job
has read or changed a file of root.

`make chaos`, or `python tests/chaos/hostile.py --hostile 500 --honest 500 --seed 7`.
"""

from __future__ import annotations

import argparse
import os
import random
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from cortex.worker import trees
from operator_harness import FINAL, Operator, operator, reachable_interpreter, until

USER = "nobody"
TIMEOUT_S = 8
SLACK_S = 60  # beyond a timeout, on a loaded machine
STOP_SHARE = 0.2  # of the jobs
MAX_RUNNING = 6
SECRET = "what only root may read"
HONEST = """
import os, sys, time

def task(config):
    kind = config["kind"]
    print("honest", config["number"], flush=True)
    if kind == "fail":
        raise ValueError("as asked")
    if kind == "exit":
        sys.exit(7)
    if kind == "sleep":
        time.sleep(600)
    return {"number": config["number"], "text": "x" * 1000}
"""
STATUS_BY_KIND = {
    "quick": "status_succeeded",
    "fail": "status_worker_error",
    "exit": "status_worker_error",
    "sleep": "status_timed_out",
}
YAML = f"""
- name: hostile
  kind: TaskAPI
  definition: {{path: hostile_task.py}}
  compute: {{cpu: 1m, mem: 256Mi}}
  limits: {{max_running: {MAX_RUNNING}, log: 1Mi}}
- name: persistent
  kind: TaskAPI
  definition: {{path: hostile_task.py}}
  compute: {{cpu: 1m}}
  limits: {{max_running: {MAX_RUNNING}}}
  retries: 1
- name: honest
  kind: TaskAPI
  definition: {{path: honest.py}}
  compute: {{cpu: 1m}}
  limits: {{max_running: {MAX_RUNNING}}}
"""


@dataclass
class Job:
    """A job, as its client knows it."""

    api: str
    kind: str
    number: int
    answer: dict[str, Any]
    is_stopped: bool = False
    final: dict[str, Any] | None = None

    @property
    def expected(self) -> str:
        return "status_stopped" if self.is_stopped else STATUS_BY_KIND[self.kind]


@dataclass
class HostileRun:
    """One run."""

    running: Operator
    random: random.Random
    mark: str
    canary: Path
    jobs: list[Job] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def run(self, hostile: int, honest: int) -> Counter[str]:
        """Run as many jobs of each sort, and return the final statuses of the hostile ones."""
        here = Path(__file__).parent
        files = {"hostile_task.py": (here / "hostile_task.py").read_text(), "honest.py": HONEST}
        response = self.running.deploy(YAML, files)
        assert response.status_code == 200, response.text
        before = self._root_files()
        are_done = threading.Event()
        readers = [threading.Thread(target=self._poll_answers, args=(are_done,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            kinds = ["hostile"] * hostile + ["honest"] * honest
            self.random.shuffle(kinds)
            for number, kind in enumerate(kinds):
                self._submit(number, kind)
            self._await_ends()
        finally:
            are_done.set()
            for reader in readers:
                reader.join()
        self._check(before)
        return Counter(
            job.final["status"] for job in self.jobs if job.final and job.api != "honest"
        )

    def _submit(self, number: int, kind: str) -> None:
        if kind == "honest":
            api, what = "honest", self.random.choices(list(STATUS_BY_KIND), [8, 2, 2, 1])[0]
            config: dict[str, Any] = {"kind": what, "number": number}
        else:
            api, what = self.random.choice(["hostile", "persistent"]), "hostile"
            seed = self.random.randrange(2**31)
            config = {"seed": seed, "canary": str(self.canary), "mark": self.mark}
        # A timeout counts from the submit, and honest jobs wait for each other.
        timeout = None if api == "honest" and what != "sleep" else TIMEOUT_S
        answer = self._request("POST", f"/{api}", json={"config": config, "timeout": timeout})
        job = Job(api, what, number, answer.json())
        self.jobs.append(job)
        if self.random.random() < STOP_SHARE:
            time.sleep(self.random.random() * 0.2)
            stopped = self._request("DELETE", f"/{api}/{job.answer['job_id']}")
            if stopped.status_code == 200:
                job.is_stopped = True
            elif stopped.status_code != 409:
                self.violations.append(f"{job}: the answer to a stop was {stopped.status_code}")
        elif len(self.jobs) > 4 * MAX_RUNNING:
            self._request("GET", f"/{api}/{self.jobs[-4 * MAX_RUNNING].answer['job_id']}?wait=2")

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = self.running.http.request(method, self.running.url + path, **options)
        if answer.status_code >= 500 or (answer.status_code >= 400 and method == "POST"):
            self.violations.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer

    def _poll_answers(self, are_done: threading.Event) -> None:
        """Poll pages that every user can read, and the status and log of random jobs."""
        chosen = random.Random(1)
        paths = [
            "/-/apis",
            "/hostile?limit=100",
            "/persistent?limit=100",
            "/honest",
            "/-/info",
            "/metrics",
        ]
        while not are_done.is_set():
            path = chosen.choice(paths)
            if self.jobs and chosen.random() < 0.5:
                job = chosen.choice(self.jobs)
                path = f"/{job.api}/{job.answer['job_id']}{chosen.choice(['', '/logs'])}"
            answer = self._request("GET", path)
            if SECRET in answer.text:
                self.violations.append(f"GET {path} shows a secret of root")
            time.sleep(0.02)

    def _await_ends(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S + SLACK_S + len(self.jobs) * 0.5
        for job in self.jobs:
            path = f"/{job.api}/{job.answer['job_id']}"
            while job.final is None and time.monotonic() < deadline:
                status = self._request("GET", f"{path}?wait=10").json()["job_status"]
                if status["status"] in FINAL:
                    job.final = status
            if job.final is None:
                self.violations.append(f"{job}: never ended")

    def _check(self, before: dict[str, tuple[object, ...]]) -> None:
        for job in self.jobs:
            if job.api != "honest" or job.final is None:
                continue
            result = job.final.get("result")
            if job.final["status"] != job.expected:
                self.violations.append(f"{job}: expected {job.expected}")
            elif job.expected == "status_succeeded" and result != {
                "number": job.number, "text": "x" * 1000
            }:  # fmt: skip
                self.violations.append(f"{job}: the result of another job")
            elif job.expected == "status_succeeded":
                log = self._request("GET", f"/honest/{job.answer['job_id']}/logs").text
                if log != f"honest {job.number}\n":
                    self.violations.append(f"{job}: the log of another job: {log[:200]!r}")
        for job in self.jobs:
            again = self._request("GET", f"/{job.api}/{job.answer['job_id']}").json()["job_status"]
            if job.final is not None and _immutable(again) != _immutable(job.final):
                self.violations.append(f"{job}: its final status has changed to {again}")
        until(
            lambda: not self._hidden_processes(),
            f"hidden processes have ended: {self._hidden_processes()}",
        )
        after = self._root_files()
        self.violations += [
            f"a job has changed {path} of root: {before[path]} -> {after.get(path)}"
            for path in before
            if after.get(path) != before[path]
        ]

    def _hidden_processes(self) -> list[str]:
        done = subprocess.run(
            ["pgrep", "-f", f"^{self.mark}"], capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    def _root_files(self) -> dict[str, tuple[object, ...]]:
        """The owner, mode, links and content of files that no job may change."""
        paths = [self.canary, Path("/etc/passwd"), Path("/etc/shadow"), Path("/bin/sleep")]
        paths += (self.running.data_dir / "projects").rglob("*.py")
        found: dict[str, tuple[object, ...]] = {}
        for path in paths:
            about = path.lstat()
            found[str(path)] = (
                about.st_uid, about.st_gid, stat.filemode(about.st_mode), about.st_nlink,
                path.read_bytes(),
            )  # fmt: skip
        return found


def _immutable(status: dict[str, Any]) -> dict[str, Any]:
    """The part of a final status that never changes. A stopped job gets its exit code later, when
    its processes have ended."""
    is_stopped = status["status"] == "status_stopped"
    return {k: v for k, v in status.items() if k != "exit_code" or not is_stopped}


@contextmanager
def traversable_folder() -> Iterator[Path]:
    """A folder that the jobs' user can traverse. `trees` removes it: jobs nest folders so deeply
    that `shutil` exceeds the recursion limit."""
    folder = tempfile.mkdtemp()
    try:
        yield Path(folder)
    finally:
        trees.remove(folder)


def run_hostile_jobs(folder: Path, hostile: int, honest: int, seed: int) -> Counter[str]:
    """Run hostile jobs beside honest ones, and return the final statuses of the hostile ones.

    Raises:
        AssertionError: the operator broke a promise; the message lists the violations.
    """
    assert os.geteuid() == 0, "--run-as needs root; run this as root"
    folder.chmod(0o755)
    canary = folder / "secret"
    canary.write_text(SECRET)
    canary.chmod(0o600)
    mark = f"hostile-{os.getpid()}-{seed}"
    with operator(
        folder, "--run-as", USER, "--cpu", "4", command_prefix=reachable_interpreter()
    ) as running:
        hostile_run = HostileRun(running, random.Random(seed), mark, canary)
        try:
            ends = hostile_run.run(hostile, honest)
        finally:
            subprocess.run(["pkill", "-9", "-f", f"^{mark}"], check=False)
        assert not hostile_run.violations, "\n".join(hostile_run.violations[:50])
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hostile", type=int, default=500)
    parser.add_argument("--honest", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    begin = time.monotonic()
    with traversable_folder() as folder:
        ends = run_hostile_jobs(folder, given.hostile, given.honest, given.seed)
    print(f"{given.hostile} hostile jobs beside {given.honest} honest ones: no violation")
    print(dict(ends), f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
