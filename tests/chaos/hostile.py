"""Hostile jobs beside honest ones: a real operator as root, whose jobs run as a user without rights. Hostile jobs
attack their records, sockets, relatives, folders and groups at random. Then no honest job may have a wrong status,
no answer may be a 500, nothing may be left, and no file of root's may have been read or changed.

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
from operator_harness import FINAL, Operator, operator, reachable, until

USER = "nobody"
TIMEOUT_S = 8
SLACK_S = 60  # beyond a timeout, on a loaded machine
STOPPED = 0.2  # of the jobs
AT_ONCE = 6
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
ENDS = {
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
  limits: {{max_running: {AT_ONCE}, log: 1Mi}}
- name: persistent
  kind: TaskAPI
  definition: {{path: hostile_task.py}}
  compute: {{cpu: 1m}}
  limits: {{max_running: {AT_ONCE}}}
  retries: 1
- name: honest
  kind: TaskAPI
  definition: {{path: honest.py}}
  compute: {{cpu: 1m}}
  limits: {{max_running: {AT_ONCE}}}
"""


@dataclass
class Job:
    """A job, and what its client knows of it."""

    api: str
    kind: str
    number: int
    answer: dict[str, Any]
    is_stopped: bool = False
    final: dict[str, Any] | None = None

    @property
    def expected(self) -> str:
        return "status_stopped" if self.is_stopped else ENDS[self.kind]


@dataclass
class Battle:
    """One run."""

    running: Operator
    random: random.Random
    mark: str
    canary: Path
    jobs: list[Job] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def fight(self, hostile: int, honest: int) -> Counter[str]:
        """Run so many of each; the final statuses of the hostile ones."""
        here = Path(__file__).parent
        files = {"hostile_task.py": (here / "hostile_task.py").read_text(), "honest.py": HONEST}
        response = self.running.deploy(YAML, files)
        assert response.status_code == 200, response.text
        before = self._of_root()
        over = threading.Event()
        readers = [threading.Thread(target=self._read, args=(over,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            kinds = ["hostile"] * hostile + ["honest"] * honest
            self.random.shuffle(kinds)
            for number, kind in enumerate(kinds):
                self._submit(number, kind)
            self._await()
        finally:
            over.set()
            for reader in readers:
                reader.join()
        self._check(before)
        return Counter(
            job.final["status"] for job in self.jobs if job.final and job.api != "honest"
        )

    def _submit(self, number: int, kind: str) -> None:
        if kind == "honest":
            api, what = "honest", self.random.choices(list(ENDS), [8, 2, 2, 1])[0]
            config: dict[str, Any] = {"kind": what, "number": number}
        else:
            api, what = self.random.choice(["hostile", "persistent"]), "hostile"
            seed = self.random.randrange(2**31)
            config = {"seed": seed, "canary": str(self.canary), "mark": self.mark}
        # Honest jobs wait for each other alone: one with a timeout counts it from its submit.
        timeout = None if api == "honest" and what != "sleep" else TIMEOUT_S
        answer = self._ask("POST", f"/{api}", json={"config": config, "timeout": timeout})
        job = Job(api, what, number, answer.json())
        self.jobs.append(job)
        if self.random.random() < STOPPED:
            time.sleep(self.random.random() * 0.2)
            stopped = self._ask("DELETE", f"/{api}/{job.answer['job_id']}")
            if stopped.status_code == 200:
                job.is_stopped = True
            elif stopped.status_code != 409:
                self.wrong.append(f"{job}: a stop was answered with {stopped.status_code}")
        elif len(self.jobs) > 4 * AT_ONCE:
            self._ask("GET", f"/{api}/{self.jobs[-4 * AT_ONCE].answer['job_id']}?wait=2", at=True)

    def _ask(self, method: str, path: str, *, at: bool = False, **options: Any) -> httpx.Response:
        answer = self.running.http.request(method, self.running.url + path, **options)
        if answer.status_code >= 500 or (answer.status_code >= 400 and method == "POST"):
            self.wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer

    def _read(self, over: threading.Event) -> None:
        """Ask for what everybody sees, all the time."""
        chosen = random.Random(1)
        paths = [
            "/-/apis",
            "/hostile?limit=100",
            "/persistent?limit=100",
            "/honest",
            "/-/info",
            "/metrics",
        ]
        while not over.is_set():
            path = chosen.choice(paths)
            if self.jobs and chosen.random() < 0.5:
                job = chosen.choice(self.jobs)
                path = f"/{job.api}/{job.answer['job_id']}{chosen.choice(['', '/logs'])}"
            answer = self._ask("GET", path)
            if SECRET in answer.text:
                self.wrong.append(f"GET {path} tells a secret of root's")
            time.sleep(0.02)

    def _await(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S + SLACK_S + len(self.jobs) * 0.5
        for job in self.jobs:
            path = f"/{job.api}/{job.answer['job_id']}"
            while job.final is None and time.monotonic() < deadline:
                status = self._ask("GET", f"{path}?wait=10").json()["job_status"]
                if status["status"] in FINAL:
                    job.final = status
            if job.final is None:
                self.wrong.append(f"{job}: never ended")

    def _check(self, before: dict[str, tuple[object, ...]]) -> None:
        for job in self.jobs:
            if job.api != "honest" or job.final is None:
                continue
            result = job.final.get("result")
            if job.final["status"] != job.expected:
                self.wrong.append(f"{job}: expected {job.expected}")
            elif job.expected == "status_succeeded" and result != {
                "number": job.number, "text": "x" * 1000
            }:  # fmt: skip
                self.wrong.append(f"{job}: another's result")
            elif job.expected == "status_succeeded":
                log = self._ask("GET", f"/honest/{job.answer['job_id']}/logs").text
                if log != f"honest {job.number}\n":
                    self.wrong.append(f"{job}: another log: {log[:200]!r}")
        for job in self.jobs:
            again = self._ask("GET", f"/{job.api}/{job.answer['job_id']}").json()["job_status"]
            if job.final is not None and _fixed(again) != _fixed(job.final):
                self.wrong.append(f"{job}: its final status has changed to {again}")
        until(lambda: not self._hidden(), f"what hides is gone: {self._hidden()}")
        after = self._of_root()
        self.wrong += [
            f"{path} of root's was changed: {before[path]} -> {after.get(path)}"
            for path in before
            if after.get(path) != before[path]
        ]

    def _hidden(self) -> list[str]:
        done = subprocess.run(
            ["pgrep", "-f", f"^{self.mark}"], capture_output=True, text=True, check=False
        )
        return done.stdout.split()

    def _of_root(self) -> dict[str, tuple[object, ...]]:
        """What may not change: who owns it, its rights, its links, its content."""
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


def _fixed(status: dict[str, Any]) -> dict[str, Any]:
    """What never changes of a final status: a stopped job gets its exit code when its processes are gone."""
    is_stopped = status["status"] == "status_stopped"
    return {k: v for k, v in status.items() if k != "exit_code" or not is_stopped}


@contextmanager
def room() -> Iterator[Path]:
    """A folder that the jobs' user can pass; `shutil` comes to the end of its stack in what jobs make there."""
    folder = tempfile.mkdtemp()
    try:
        yield Path(folder)
    finally:
        trees.remove(folder)


def battle(folder: Path, hostile: int, honest: int, seed: int) -> Counter[str]:
    """Run hostile jobs beside honest ones; the final statuses of the hostile ones.

    Raises:
        AssertionError: the operator did what it may not do; it says all that it did.
    """
    assert os.geteuid() == 0, "the operator has to be root, as for --run-as"
    folder.chmod(0o755)
    canary = folder / "secret"
    canary.write_text(SECRET)
    canary.chmod(0o600)
    mark = f"hostile-{os.getpid()}-{seed}"
    with operator(folder, "--run-as", USER, "--cpu", "4", within=reachable()) as running:
        fought = Battle(running, random.Random(seed), mark, canary)
        try:
            ends = fought.fight(hostile, honest)
        finally:
            subprocess.run(["pkill", "-9", "-f", f"^{mark}"], check=False)
        assert not fought.wrong, "\n".join(fought.wrong[:50])
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hostile", type=int, default=500)
    parser.add_argument("--honest", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    begin = time.monotonic()
    with room() as folder:
        ends = battle(folder, given.hostile, given.honest, given.seed)
    print(f"{given.hostile} hostile jobs beside {given.honest} honest ones: no violation")
    print(dict(ends), f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
