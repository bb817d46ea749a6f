"""Fault injection: a real operator with many mixed jobs, while processes of every kind are killed and
stopped at random; a model beside it knows what its client was told, and every answer is held against
that. `make chaos`, or `python tests/chaos/storm.py --jobs 2000 --kills 500 --seed 7`.

The seed fixes what is done in which order; what the machine makes of it differs from run to run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import FINAL, Operator, operator, processes_with, until

LINES = 200
SLACK_S = 30  # beyond timeout and grace: a stopped supervisor is late, and so is a loaded machine

TASK = """
import os, signal, subprocess, sys, time

mark = os.environ["CORTEX_JOB_ID"] + "\\n"
fd = os.open({marks!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(fd, mark.encode())
os.close(fd)


def task(config):
    kind = config["kind"]
    if kind == "fail":
        raise ValueError("as asked")
    if kind == "exit":
        sys.exit(7)
    if kind == "say":
        for number in range({lines}):
            print("line", number)
    if kind == "sleep":
        time.sleep(300)
    if kind == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    if kind == "breed":
        code = "import os, time; os.setsid(); os.fork(); time.sleep(300)"
        for _ in range(2):
            subprocess.Popen([sys.executable, "-c", code])
    time.sleep(config["pause"])
    return kind
"""
HUNGRY = "import task\\nhoard = []\\nwhile True: hoard.append(bytearray(b'x') * 4194304)\\n"
YAML = """
- name: storm
  kind: TaskAPI
  definition: {path: task.py}
  compute: {cpu: 250m}
- name: hungry
  kind: TaskAPI
  definition: {command: [python, hungry.py]}
  compute: {cpu: 250m, mem: 48Mi}
"""
# What a job of each kind ends as when nobody interferes.
ENDS = {
    "quick": "status_succeeded",
    "say": "status_succeeded",
    "breed": "status_succeeded",
    "fail": "status_worker_error",
    "exit": "status_worker_error",
    "hungry": "status_worker_oom",
    "sleep": "status_timed_out",
    "stubborn": "status_timed_out",
}
WEIGHTS = {
    "quick": 6, "say": 4, "breed": 2, "fail": 2, "exit": 1, "hungry": 1, "sleep": 2, "stubborn": 1,
}  # fmt: skip


class Violation(AssertionError):
    """A client was told something that is not so."""


@dataclass
class Job:
    """What the client knows of a job, and what was done to its processes."""

    kind: str
    answer: dict[str, Any]
    stopped: bool = False
    killed: set[str] = field(default_factory=set)
    final: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return str(self.answer["job_id"])

    def allowed(self) -> set[str]:
        if self.stopped:
            return {"status_stopped"}
        ends = {ENDS[self.kind]}
        if "supervisor" in self.killed:
            ends.add("status_unexpected_error")
        if "worker" in self.killed:
            ends.add("status_worker_error")
        return ends


class Storm:
    """One run. `check` and the actions raise Violation."""

    def __init__(self, running: Operator, seed: int) -> None:
        self.running = running
        self.random = random.Random(seed)
        self.jobs: list[Job] = []
        self.kills: Counter[str] = Counter()
        self.marks = running.data_dir.parent / "marks"
        self.frozen: list[int] = []
        task = TASK.format(marks=str(self.marks), lines=LINES)
        response = running.deploy(YAML, {"task.py": task, "hungry.py": HUNGRY.replace("\\n", "\n")})
        assert response.status_code == 200, response.text

    def run(self, jobs: int, kills: int) -> None:
        """Submit `jobs` and kill `kills` times, in random order; then wait and check it all."""
        plan = ["submit"] * jobs + ["kill"] * kills
        plan += ["stop"] * (jobs // 6) + ["look"] * jobs + ["freeze"] * (kills // 4)
        self.random.shuffle(plan)
        actions: dict[str, Callable[[], None]] = {
            "submit": self.submit, "kill": self.kill, "stop": self.stop,
            "look": self.look, "freeze": self.freeze,
        }  # fmt: skip
        for name in plan:
            actions[name]()
        self.thaw()
        for job in self.jobs:
            self.check(job, wait=120)
        self.running.kill()
        self.running.start()
        for job in self.jobs:
            self.check(job, wait=0)
        self.check_marks()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send until it is answered; an operator that was killed is started again."""
        for _ in range(50):
            try:
                response = self.running.http.request(method, self.running.url + path, **more)
            except httpx.TransportError:
                self.thaw()
                if self.running.process.poll() is not None:
                    self.running.start()
                continue
            if response.status_code >= 500:
                raise Violation(f"{method} {path}: {response.status_code} {response.text}")
            return response
        raise Violation(f"{method} {path}: never answered")

    def submit(self) -> None:
        kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        body: dict[str, object] = {"config": {"kind": kind, "pause": self.random.random() / 5}}
        if kind in ("sleep", "stubborn"):
            body["timeout"] = self.random.randint(1, 20)
        api = "hungry" if kind == "hungry" else "storm"
        # With the key a submit whose answer was lost is sent again, and is still one job.
        key = {"Idempotency-Key": f"{len(self.jobs)}"}
        response = self.request("POST", f"/{api}", json=body, headers=key)
        if response.status_code != 200:
            raise Violation(f"submit: {response.status_code} {response.text}")
        self.jobs.append(Job(kind, response.json()))

    def stop(self) -> None:
        if not self.jobs:
            return
        job = self.random.choice(self.jobs[-40:])
        response = self.request("DELETE", f"/{job.answer['api_name']}/{job.id}")
        if response.status_code == 200:
            if job.final is not None and job.final["status"] != "status_stopped":
                raise Violation(f"{job}: stopped after it had completed")
            job.stopped = True
        elif response.status_code != 409 or job.stopped:
            raise Violation(f"{job}: {response.status_code} {response.text}")
        self.check(job, wait=0)

    def look(self) -> None:
        if self.jobs:
            self.check(self.random.choice(self.jobs), wait=0)

    def check(self, job: Job, wait: int) -> None:
        path = f"/{job.answer['api_name']}/{job.id}"
        until_s = time.monotonic() + wait
        while True:
            response = self.request("GET", path, params={"wait": min(wait, 20)})
            if response.status_code != 200:
                raise Violation(f"{job}: {response.status_code} {response.text}")
            seen = response.json()["job_status"]
            if seen["status"] in FINAL or time.monotonic() >= until_s:
                break
        if job.final is not None and any(
            seen.get(f) != job.final.get(f) for f in ("status", "start_time", "end_time", "message")
        ):
            raise Violation(f"{job}: a final status changed to {seen}")
        if job.stopped and seen["status"] != "status_stopped":
            raise Violation(f"{job}: an acknowledged stop was lost: {seen}")
        if seen["status"] not in FINAL:
            if wait:
                raise Violation(f"{job}: never final: {seen}")
            return
        if seen["status"] not in job.allowed():
            raise Violation(f"{job}: not the right ending: {seen}")
        if not seen["created_time"] <= seen["start_time"] <= seen["end_time"]:
            raise Violation(f"{job}: times out of order: {seen}")
        if job.kind == "say" and seen["status"] == "status_succeeded" and job.final is None:
            log = self.request("GET", f"{path}/logs").text
            if log != "".join(f"line {n}\n" for n in range(LINES)):
                raise Violation(f"{job}: its log is not complete: {len(log)} bytes")
        job.final = seen

    def check_marks(self) -> None:
        """No job's code started twice; what ran to an end of its own had started."""
        starts = Counter(self.marks.read_text().split())
        for job in self.jobs:
            if starts[job.id] > 1:
                raise Violation(f"{job}: started {starts[job.id]} times")
            if job.final and job.final["status"] == "status_succeeded" and not starts[job.id]:
                raise Violation(f"{job}: succeeded and never started")

    def kill(self) -> None:
        kind = self.random.choice(["operator", "fork server", "supervisor", "worker"])
        if kind == "operator":
            self.running.kill()
            self.running.start()
            self.kills[kind] += 1
            return
        pid = self.victim(kind)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.kills[kind] += 1

    def freeze(self) -> None:
        """Stop a process for a while: until the next answer is late, or the next one is stopped."""
        self.thaw()
        pid = self.victim(self.random.choice(["fork server", "supervisor"]))
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.frozen.append(pid)

    def thaw(self) -> None:
        while self.frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.frozen.pop(), signal.SIGCONT)

    def victim(self, kind: str) -> int | None:
        """A process of that kind that is there now; the job it belongs to is remembered."""
        servers = [p for p in _children(self.running.process.pid) if b"forkserver" in _command(p)]
        if kind == "fork server":
            return self.random.choice(servers) if servers else None
        supervisors = [child for server in servers for child in _children(server)]
        self.random.shuffle(supervisors)
        for supervisor in supervisors:
            for worker in _children(supervisor):
                job = self.job_of(worker)
                if job is not None:
                    job.killed.add(kind)
                    return supervisor if kind == "supervisor" else worker
        return None

    def job_of(self, worker: int) -> Job | None:
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{worker}/environ").read_bytes()
            for job in self.jobs[-200:]:
                if f"CORTEX_JOB_ID={job.id}".encode() in environ:
                    return job
        return None


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{thread}/children").read_text()
            found += map(int, text.split())
    return found


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def storm(folder: Path, *, jobs: int, kills: int, seed: int) -> Storm:
    """One whole run on an operator of its own; nothing of it may be left at the end."""
    with operator(folder, "--cpu", "2") as running:
        run = Storm(running, seed)
        try:
            run.run(jobs, kills)
        finally:
            run.thaw()
        until(lambda: not processes_with("CORTEX_JOB_ID=" + run.jobs[-1].id), "the last one gone")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=700)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = storm(Path(folder), jobs=options.jobs, kills=options.kills, seed=options.seed)
    ends = Counter(job.final["status"] for job in run.jobs if job.final)
    print(f"{len(run.jobs)} jobs, {sum(run.kills.values())} kills {dict(run.kills)}")
    print(f"{dict(ends)}\nno violation in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
