"""Fault injection: a real operator with many mixed jobs, while processes of every kind are killed and
stopped at random and its disk fills up now and then; a model beside it knows what its client was told, and every answer is held against
that. `make chaos`, or `python tests/chaos/storm.py --jobs 2000 --kills 500 --seed 7`. With `--store postgresql`
the operator has a PostgreSQL server, which is killed and started again now and then as well; and with
`--operators 3` there are several on it, of which clients ask any: each is killed and stopped like the rest.

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

KILLED = ["operator", "fork server", "supervisor", "worker"]
LINES = 200
LEASE_S = 2
LONGEST_S = 20  # the longest timeout of a job that has one
COMES_BACK = 0.2  # how likely whoever was killed is started again before the next step
WAIT_TIMEOUT_S = 6  # for an answer, where another operator can be asked
ANSWERED_S = 120  # within which somebody answers
FROZEN_S = 10  # the longest that a process is stopped, so that `SLACK_S` has room for it
SLACK_S = (
    30  # beyond a timeout, grace included: a stopped supervisor is late, and so is a loaded machine
)

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
RETRIES = {"again": 2}
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
    killed: Counter[str] = field(default_factory=Counter)
    starved: bool = False  # the disk was full while it may have written to its log
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
        ends = {ENDS[self.kind]}
        # One that was lost after its time is not tried again.
        has_timeout = self.answer["timeout"] is not None and self.killed["supervisor"]
        if self.killed["supervisor"] > self.retries or has_timeout:
            ends.add("status_unexpected_error")
        if self.killed["worker"] or (self.starved and self.kind == "say"):
            ends.add("status_worker_error")
        return ends


class Database:
    """A PostgreSQL server that something starts again a while after it was killed."""

    def __init__(self, running: PostgreSQLServer) -> None:
        self._server = running
        self._return: threading.Timer | None = None

    @property
    def is_away(self) -> bool:
        return self._return is not None and self._return.is_alive()

    def die(self, for_s: float) -> None:
        self.come_back()
        self._server.kill()
        self._return = threading.Timer(for_s, self._server.start)
        self._return.start()

    def come_back(self) -> None:
        if self._return is not None:
            self._return.join()


class Storm:
    """One run. `check` and the actions raise Violation."""

    def __init__(
        self,
        all_of_them: list[Operator],
        disk: Disk,
        seed: int,
        database: Database | None = None,
        longest_s: int = LONGEST_S,
    ) -> None:
        self.operators = all_of_them
        self.are_several = len(all_of_them) > 1
        self.disk = disk
        self.database = database
        self.longest_s = longest_s
        self.is_full = False
        self.random = random.Random(seed)
        self.whom = random.Random(seed)  # of its own: how often somebody is asked is not planned
        self.jobs: list[Job] = []
        self.kills: Counter[str] = Counter()
        self.freezes: Counter[str] = Counter()
        self.most_wait_s = WAIT_TIMEOUT_S // 2 if self.are_several else 20
        running = all_of_them[0]
        self.marks = running.data_dir.parent / "marks"
        self.frozen: list[int] = []
        self.frozen_since = 0.0
        task = TASK.format(marks=str(self.marks), lines=LINES)
        response = running.deploy(YAML, {"task.py": task, "hungry.py": HUNGRY.replace("\\n", "\n")})
        assert response.status_code == 200, response.text
        for each in all_of_them if self.are_several else ():
            each.http.timeout = WAIT_TIMEOUT_S

    def run(self, jobs: int, kills: int) -> None:
        """Submit `jobs` and kill `kills` times, in random order; then wait and check it all."""
        plan: list[Callable[[], None]] = [self.submit, self.look] * jobs
        plan += [self.stop] * (jobs // 6) + [self.fill] * (kills // 10)
        plan += [self.take_database] * (kills // 6 if self.database is not None else 0)
        # As many of each kind as of any other, so that a short run has all of them.
        plan += [partial(self.kill, kind) for kind in islice(cycle(KILLED), kills)]
        frozen = ["fork server", "supervisor", *["operator"] * self.are_several]
        plan += [partial(self.freeze, kind) for kind in islice(cycle(frozen), kills // 4)]
        self.random.shuffle(plan)
        for act in plan:
            if self.are_several and self.whom.random() < COMES_BACK:
                self.revive()
            if time.monotonic() - self.frozen_since > FROZEN_S:
                self.thaw()
            act()
        self.thaw()
        self.make_room()
        self.revive()
        for job in self.jobs:
            self.check(job, wait=120)
        for each in self.operators:
            each.kill()
        self.revive()
        for job in self.jobs:
            self.check(job, wait=0)
        self.check_marks()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send until it is answered, by any; an operator that was killed is started again."""
        until_s = time.monotonic() + ANSWERED_S
        while time.monotonic() < until_s:
            was_away = self.database is not None and self.database.is_away
            asked = self.whom.choice(self.operators)
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
            if response.status_code == 503 and self.is_full:
                self.make_room()
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
            body["timeout"] = self.random.randint(1, self.longest_s)
        api = "hungry" if kind == "hungry" else self.random.choice(["storm", "again"])
        # With the key a submit whose answer was lost is sent again, and is still one job.
        key = {"Idempotency-Key": f"{len(self.jobs)}"}
        response = self.request("POST", f"/{api}", json=body, headers=key)
        if response.status_code != 200:
            raise Violation(f"submit: {response.status_code} {response.text}")
        self.jobs.append(Job(kind, response.json(), starved=self.is_full))

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
            response = self.request("GET", path, params={"wait": min(wait, self.most_wait_s)})
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
        _check_times(job, seen)
        is_told = seen["status"] == "status_succeeded" and job.final is None and not job.starved
        if job.kind == "say" and is_told:
            log = self.request("GET", f"{path}/logs").text
            log = log.rpartition(" begins\n")[2]  # the last attempt's, where there were more
            if log != "".join(f"line {n}\n" for n in range(LINES)):
                raise Violation(f"{job}: its log is not complete: {len(log)} bytes")
        job.final = seen

    def check_marks(self) -> None:
        """No job's code started twice in an attempt, nor again but after a loss and as often as its API
        allows; what ran to an end of its own had started."""
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
            if not self.are_several:
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
        """Start an operator, and see to what it does not start without."""
        self.make_room()
        self.await_database()
        operator.start()

    def take_database(self) -> None:
        assert self.database is not None
        self.database.die(self.random.random() * 2)
        self.kills["database"] += 1

    def await_database(self) -> None:
        if self.database is not None:
            self.database.come_back()

    def fill(self) -> None:
        """Fill the disk, until something is refused for it or it is filled again."""
        self.make_room()
        for job in self.jobs:
            job.starved = job.starved or job.final is None
        self.is_full = True
        self.disk.fill()

    def make_room(self) -> None:
        if self.is_full:
            self.disk.empty()
            self.is_full = False

    def freeze(self, kind: str) -> None:
        """Stop a process for a while: until the next answer is late, or the next one is stopped."""
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
        """A process of that kind that is there now; the job it belongs to is remembered. A supervisor
        is stopped, or it might have another job by the time that it is killed."""
        children = [pid for each in self.operators for pid in _children(each.process.pid)]
        forked = [pid for pid in children if b"forkserver" in _command(pid)]
        # The operator inherits the supervising processes of a fork server that was killed.
        servers = [pid for pid in forked if not _is_supervising(pid)]
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


def _check_times(job: Job, seen: dict[str, Any]) -> None:
    if not seen["created_time"] <= seen["start_time"] <= seen["end_time"]:
        raise Violation(f"{job}: times out of order: {seen}")
    if seen["status"] == "status_timed_out":
        lasted = parse_rfc3339(seen["end_time"]) - parse_rfc3339(seen["created_time"])
        if lasted.total_seconds() > seen["timeout"] + SLACK_S:
            raise Violation(f"{job}: outlived its timeout: {seen}")


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


def _is_supervising(pid: int) -> bool:
    """Whether it is a supervising process, not a fork server: it holds back SIGHUP for good."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigBlk:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGHUP - 1) & 1)
    return True  # it is gone


def storm(
    folder: Path,
    *,
    jobs: int,
    kills: int,
    seed: int,
    store: str = "sqlite",
    number: int = 1,
    longest_s: int = LONGEST_S,
) -> Storm:
    """One whole run on operators of its own; nothing of it may be left at the end."""
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(mounted(folder / "data", "size=256m"))
        database, options = None, []
        if store == "postgresql":
            made = stack.enter_context(server())
            database, options = Database(made), ["--store", made.url(made.create())]
            options += ["--lease", str(LEASE_S)]
        running = stack.enter_context(operators(folder, number, "--cpu", "2", *options))
        run = Storm(running, disk, seed, database, longest_s)
        try:
            run.run(jobs, kills)
        finally:
            run.thaw()
            run.make_room()
            run.await_database()
        until(lambda: not processes_with("CORTEX_JOB_ID=" + run.jobs[-1].id), "the last one gone")
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
            number=options.operators,
        )
    ends = Counter(job.final["status"] for job in run.jobs if job.final)
    print(f"{len(run.jobs)} jobs, {sum(run.kills.values())} kills {dict(run.kills)}")
    print(f"{sum(run.freezes.values())} stopped for a while {dict(run.freezes)}")
    print(f"{dict(ends)}\nno violation in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
