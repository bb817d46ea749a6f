"""Fault injection. A real operator runs many mixed jobs, while the storm kills and stops processes
of every kind at random, and fills the disk from time to time. A model records the answers that
clients got, and the storm checks every later answer against it.

`make chaos`, or `python tests/chaos/storm.py --jobs 2000 --kills 500 --seed 7`. With
`--store postgresql` the storm also kills the PostgreSQL server and starts it again. With
`--operators 3` three operators share that server, and clients send each request to any of them; the
storm kills and stops the operators like other processes.

The seed fixes the actions and their order; their timing differs from run to run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from chaos.disk import Disk, mounted
from cortex.spec.times import parse_rfc3339
from operator_harness import FINAL, Operator, operators, processes_with, until
from postgresql_server import PostgreSQLServer, server

KILLED_PROCESSES = ["operator", "fork server", "supervisor", "worker"]
LINE_COUNT = 200
LEASE_S = 2
MAX_TIMEOUT_S = 20  # of a job
REVIVE_PROBABILITY = 0.2  # that killed operators are started again before the next action
WAIT_TIMEOUT_S = 6  # for the answer of one operator, where there are others
ANSWER_TIMEOUT_S = 120  # for the answer of any operator
MAX_FREEZE_S = 10  # of a stopped process; it has to fit into `SLACK_S`
# Beyond a timeout, grace included: a stopped supervisor and a loaded machine are late.
SLACK_S = 30

TASK = """
import os, signal, subprocess, sys, time

mark = os.environ["CORTEX_JOB_ID"] + "/" + os.environ["CORTEX_ATTEMPT"] + "\\n"
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
- name: again
  kind: TaskAPI
  definition: {path: task.py}
  compute: {cpu: 250m}
  retries: 2
- name: hungry
  kind: TaskAPI
  definition: {command: [python, hungry.py]}
  compute: {cpu: 250m, mem: 48Mi}
"""
# How a job of each kind ends without interference.
STATUS_BY_KIND = {
    "quick": "status_succeeded",
    "say": "status_succeeded",
    "breed": "status_succeeded",
    "fail": "status_worker_error",
    "exit": "status_worker_error",
    "hungry": "status_worker_oom",
    "sleep": "status_timed_out",
    "stubborn": "status_timed_out",
}
RETRIES = {"again": 2}
WEIGHTS = {
    "quick": 6, "say": 4, "breed": 2, "fail": 2, "exit": 1, "hungry": 1, "sleep": 2, "stubborn": 1,
}  # fmt: skip


class Violation(AssertionError):
    """A client got a wrong answer."""


@dataclass
class Job:
    """A job, as its client knows it, and the faults that hit its processes."""

    kind: str
    answer: dict[str, Any]
    stopped: bool = False
    killed: Counter[str] = field(default_factory=Counter)
    had_full_disk: bool = False  # while it may have written to its log
    final: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return str(self.answer["job_id"])

    @property
    def retries(self) -> int:
        return RETRIES.get(self.answer["api_name"], 0)

    def allowed(self) -> set[str]:
        if self.stopped:
            return {"status_stopped"}
        ends = {STATUS_BY_KIND[self.kind]}
        # A job that was lost after its timeout is not retried.
        has_timeout = self.answer["timeout"] is not None and self.killed["supervisor"]
        if self.killed["supervisor"] > self.retries or has_timeout:
            ends.add("status_unexpected_error")
        if self.killed["worker"] or (self.had_full_disk and self.kind == "say"):
            ends.add("status_worker_error")
        return ends


class Database:
    """A PostgreSQL server that the storm kills, and that a timer starts again."""

    def __init__(self, running: PostgreSQLServer) -> None:
        self._server = running
        self._return: threading.Timer | None = None

    @property
    def is_down(self) -> bool:
        return self._return is not None and self._return.is_alive()

    def kill_for(self, for_s: float) -> None:
        self.await_return()
        self._server.kill()
        self._return = threading.Timer(for_s, self._server.start)
        self._return.start()

    def await_return(self) -> None:
        if self._return is not None:
            self._return.join()


class Storm:
    """One run. `check_job` and the actions raise Violation."""

    def __init__(
        self,
        all_operators: list[Operator],
        disk: Disk,
        seed: int,
        database: Database | None = None,
        max_timeout_s: int = MAX_TIMEOUT_S,
    ) -> None:
        self.operators = all_operators
        self.has_several = len(all_operators) > 1
        self.disk = disk
        self.database = database
        self.max_timeout_s = max_timeout_s
        self.is_disk_full = False
        self.random = random.Random(seed)
        # Not `random`: the number of requests differs from run to run.
        self.operator_random = random.Random(seed)
        self.jobs: list[Job] = []
        self.kills: Counter[str] = Counter()
        self.freezes: Counter[str] = Counter()
        self.max_wait_s = WAIT_TIMEOUT_S // 2 if self.has_several else 20
        running = all_operators[0]
        self.marks = running.data_dir.parent / "marks"
        self.frozen: list[int] = []
        self.frozen_since = 0.0
        task = TASK.format(marks=str(self.marks), lines=LINE_COUNT)
        response = running.deploy(YAML, {"task.py": task, "hungry.py": HUNGRY.replace("\\n", "\n")})
        assert response.status_code == 200, response.text
        for each in all_operators if self.has_several else ():
            each.http.timeout = WAIT_TIMEOUT_S

    def run(self, jobs: int, kills: int) -> None:
        """Submit `jobs` jobs and kill `kills` times, in random order. Then wait for all jobs and
        check them."""
        plan: list[Callable[[], None]] = [self.submit, self.check_any] * jobs
        plan += [self.stop] * (jobs // 6) + [self.fill] * (kills // 10)
        plan += [self.kill_database] * (kills // 6 if self.database is not None else 0)
        # All kinds equally often, so that a short run has each of them.
        plan += [partial(self.kill, kind) for kind in islice(cycle(KILLED_PROCESSES), kills)]
        frozen = ["fork server", "supervisor", *["operator"] * self.has_several]
        plan += [partial(self.freeze, kind) for kind in islice(cycle(frozen), kills // 4)]
        self.random.shuffle(plan)
        for act in plan:
            if self.has_several and self.operator_random.random() < REVIVE_PROBABILITY:
                self.revive()
            if time.monotonic() - self.frozen_since > MAX_FREEZE_S:
                self.thaw()
            act()
        self.thaw()
        self.free_disk()
        self.revive()
        for job in self.jobs:
            self.check_job(job, wait=120)
        for each in self.operators:
            each.kill()
        self.revive()
        for job in self.jobs:
            self.check_job(job, wait=0)
        self.check_start_marks()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send a request to any operator until one answers. Start one where all were killed."""
        until_s = time.monotonic() + ANSWER_TIMEOUT_S
        while time.monotonic() < until_s:
            was_away = self.database is not None and self.database.is_down
            asked = self.operator_random.choice(self.operators)
            try:
                response = asked.http.request(method, asked.url + path, **more)
            except httpx.TransportError:
                self.thaw()
                if not any(each.process.poll() is None for each in self.operators):
                    self.start(asked)
                continue
            if response.status_code == 503 and "operator.no_driver" in response.text:
                time.sleep(0.1)
                continue
            if response.status_code == 503 and self.is_disk_full:
                self.free_disk()
                continue
            if response.status_code == 503 and was_away:
                self.await_database()
                continue
            if response.status_code >= 500:
                raise Violation(f"{method} {path}: {response.status_code} {response.text}")
            return response
        raise Violation(f"{method} {path}: never answered")

    def submit(self) -> None:
        kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        body: dict[str, object] = {"config": {"kind": kind, "pause": self.random.random() / 5}}
        if kind in ("sleep", "stubborn"):
            body["timeout"] = self.random.randint(1, self.max_timeout_s)
        api = "hungry" if kind == "hungry" else self.random.choice(["storm", "again"])
        # With the key, a submit that is repeated after its answer was lost is still one job.
        key = {"Idempotency-Key": f"{len(self.jobs)}"}
        response = self.request("POST", f"/{api}", json=body, headers=key)
        if response.status_code != 200:
            raise Violation(f"submit: {response.status_code} {response.text}")
        self.jobs.append(Job(kind, response.json(), had_full_disk=self.is_disk_full))

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
        self.check_job(job, wait=0)

    def check_any(self) -> None:
        if self.jobs:
            self.check_job(self.random.choice(self.jobs), wait=0)

    def check_job(self, job: Job, wait: int) -> None:
        path = f"/{job.answer['api_name']}/{job.id}"
        until_s = time.monotonic() + wait
        while True:
            response = self.request("GET", path, params={"wait": min(wait, self.max_wait_s)})
            if response.status_code != 200:
                raise Violation(f"{job}: {response.status_code} {response.text}")
            status = response.json()["job_status"]
            if status["status"] in FINAL or time.monotonic() >= until_s:
                break
        if job.final is not None and any(
            status.get(f) != job.final.get(f)
            for f in ("status", "start_time", "end_time", "message")
        ):
            raise Violation(f"{job}: a final status changed to {status}")
        if job.stopped and status["status"] != "status_stopped":
            raise Violation(f"{job}: an acknowledged stop was lost: {status}")
        if status["status"] not in FINAL:
            if wait:
                raise Violation(f"{job}: never final: {status}")
            return
        if status["status"] not in job.allowed():
            raise Violation(f"{job}: not an allowed final status: {status}")
        _check_times(job, status)
        has_log = status["status"] == "status_succeeded" and not job.had_full_disk
        if job.kind == "say" and has_log and job.final is None:
            log = self.request("GET", f"{path}/logs").text
            log = log.rpartition(" begins\n")[2]  # of the last attempt
            if log != "".join(f"line {n}\n" for n in range(LINE_COUNT)):
                raise Violation(f"{job}: its log is not complete: {len(log)} bytes")
        job.final = status

    def check_start_marks(self) -> None:
        """Check that no code started twice in an attempt, that a job started again only after a
        loss and only as often as its API allows, and that each job that succeeded had started."""
        marks = Counter(self.marks.read_text().split())
        twice = [mark for mark, count in marks.items() if count > 1]
        if twice:
            raise Violation(f"started twice: {twice}")
        starts = Counter(mark.partition("/")[0] for mark in marks)
        for job in self.jobs:
            if starts[job.id] > 1 + min(job.retries, job.killed["supervisor"]):
                raise Violation(f"{job}: started {starts[job.id]} times")
            if job.final and job.final["status"] == "status_succeeded" and not starts[job.id]:
                raise Violation(f"{job}: succeeded and never started")

    def kill(self, kind: str) -> None:
        if kind == "operator":
            operator = self.random.choice(self.operators)
            operator.kill()
            if not self.has_several:
                self.start(operator)
            self.kills[kind] += 1
            return
        pid = self.victim(kind)
        if pid is not None:
            _signal(pid, signal.SIGKILL)
            self.kills[kind] += 1

    def revive(self) -> None:
        """Start the operators that were killed."""
        for each in self.operators:
            if each.process.poll() is not None:
                self.start(each)

    def start(self, operator: Operator) -> None:
        """Start an operator, after its disk has space and its database runs."""
        self.free_disk()
        self.await_database()
        operator.start()

    def kill_database(self) -> None:
        assert self.database is not None
        self.database.kill_for(self.random.random() * 2)
        self.kills["database"] += 1

    def await_database(self) -> None:
        if self.database is not None:
            self.database.await_return()

    def fill(self) -> None:
        """Fill the disk. It stays full until an operator refuses a request or the next fill."""
        self.free_disk()
        for job in self.jobs:
            job.had_full_disk = job.had_full_disk or job.final is None
        self.is_disk_full = True
        self.disk.fill()

    def free_disk(self) -> None:
        if self.is_disk_full:
            self.disk.empty()
            self.is_disk_full = False

    def freeze(self, kind: str) -> None:
        """Stop a process until an answer is late, or until the storm stops the next process."""
        self.thaw()
        pid = self.random.choice(self.operators).process.pid if kind == "operator" else None
        if kind != "operator":
            pid = self.victim(kind)
        if pid is not None:
            self.freezes[kind] += 1
            self.frozen_since = time.monotonic()
            _signal(pid, signal.SIGSTOP)
            self.frozen.append(pid)

    def thaw(self) -> None:
        while self.frozen:
            _signal(self.frozen.pop(), signal.SIGCONT)

    def victim(self, kind: str) -> int | None:
        """A running process of that kind. The model counts the kill for its job. The supervisor is
        stopped here: otherwise it could have another job when it is killed."""
        children = [pid for each in self.operators for pid in _children(each.process.pid)]
        forked = [pid for pid in children if b"forkserver" in _command(pid)]
        # The operator inherits the supervisors of a fork server that was killed.
        servers = [pid for pid in forked if not _is_supervisor(pid)]
        if kind == "fork server":
            return self.random.choice(servers) if servers else None
        supervisors = [child for server in servers for child in _children(server)]
        supervisors += [pid for pid in forked if pid not in servers]
        self.random.shuffle(supervisors)
        for supervisor in supervisors:
            if kind == "supervisor":
                _signal(supervisor, signal.SIGSTOP)
            for worker in _children(supervisor):
                job = self.job_of(worker)
                if job is not None:
                    job.killed[kind] += 1
                    return supervisor if kind == "supervisor" else worker
            if kind == "supervisor":
                _signal(supervisor, signal.SIGCONT)
        return None

    def job_of(self, worker: int) -> Job | None:
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{worker}/environ").read_bytes()
            for job in self.jobs[-200:]:
                if f"CORTEX_JOB_ID={job.id}".encode() in environ:
                    return job
        return None


def _check_times(job: Job, status: dict[str, Any]) -> None:
    if not status["created_time"] <= status["start_time"] <= status["end_time"]:
        raise Violation(f"{job}: times out of order: {status}")
    if status["status"] == "status_timed_out":
        lasted = parse_rfc3339(status["end_time"]) - parse_rfc3339(status["created_time"])
        if lasted.total_seconds() > status["timeout"] + SLACK_S:
            raise Violation(f"{job}: outlived its timeout: {status}")


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


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


def _is_supervisor(pid: int) -> bool:
    """Whether a process is a supervisor, which always blocks SIGHUP, and not a fork server."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigBlk:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGHUP - 1) & 1)
    return True  # it has exited


def storm(
    folder: Path,
    *,
    jobs: int,
    kills: int,
    seed: int,
    store: str = "sqlite",
    operator_count: int = 1,
    max_timeout_s: int = MAX_TIMEOUT_S,
) -> Storm:
    """Run a storm on new operators. No process of its last job may be left at the end."""
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(mounted(folder / "data", "size=256m"))
        database, options = None, []
        if store == "postgresql":
            made = stack.enter_context(server())
            database, options = Database(made), ["--store", made.url(made.create())]
            options += ["--lease", str(LEASE_S)]
        running = stack.enter_context(operators(folder, operator_count, "--cpu", "2", *options))
        run = Storm(running, disk, seed, database, max_timeout_s)
        try:
            run.run(jobs, kills)
        finally:
            run.thaw()
            run.free_disk()
            run.await_database()
        last = "CORTEX_JOB_ID=" + run.jobs[-1].id
        until(lambda: not processes_with(last), "the last job's processes have ended")
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=1100)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--operators", type=int, default=1, help="more than one with PostgreSQL")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = storm(
            Path(folder),
            jobs=options.jobs,
            kills=options.kills,
            seed=options.seed,
            store=options.store,
            operator_count=options.operators,
        )
    ends = Counter(job.final["status"] for job in run.jobs if job.final)
    print(f"{len(run.jobs)} jobs, {sum(run.kills.values())} kills {dict(run.kills)}")
    print(f"{sum(run.freezes.values())} stopped for a while {dict(run.freezes)}")
    print(f"{dict(ends)}\nno violation in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
