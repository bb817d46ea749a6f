"""Fault injection in a whole cluster. Two operators on machines of their own run many jobs on three
nodes, with PostgreSQL and S3, while the storm kills, stops and cuts off machines and processes of
every kind. Ray has its default health settings.

`make chaos-cluster`, or `python tests/chaos/cluster_storm.py --jobs 60 --faults 15 --seed 7` as
root. The seed fixes the actions and their order; their timing differs from run to run.

The storm records what clients were answered, and checks at any time and at the end:
- no status is wrong: a final status never changes, is one that the job's program and the faults
  allow, and has a result and a log that belong to it;
- no attempt runs twice, and a job has a new attempt only after a fault that may have ended the
  earlier one, and only as often as its API allows;
- no acknowledged job is missing, and none is without an end.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from chaos.storm import LINE_COUNT, STATUS_BY_KIND, Violation
from cluster.machines import AGENT, DATABASE, DRIVER, FILES, GCS, HEAD, RAYLET, Machines, machines
from cortex.spec.times import parse_rfc3339
from operator_harness import FINAL, Operator

NODES = {"n1": "zone=a", "n2": "zone=b", "n3": "zone=b"}
OPERATORS = ["o1", "o2"]
MAX_ACTIVE = 3  # faults at a time
MAX_FAULT_S = 15
TEND_INTERVAL_S = 2
RAYLET_START_S = 45  # after which a raylet that does not run is started again
DEADLY_S = 90  # after which Ray has declared a silent node dead
DEADLY_PROBABILITY = 0.1  # that a silent node is silent for that long
REQUEST_TIMEOUT_S = 6  # of one operator
ANSWER_TIMEOUT_S = 240  # of any operator
END_TIMEOUT_S = 420  # of a job, after the last fault
MAX_TIMEOUT_S = 20  # of a job
# Beyond a timeout: a node that is cut off ends its job by itself, and nobody can know it earlier.
SLACK_S = DEADLY_S + 60
PROBLEM_TIMEOUT_S = 1
VARIABLE = re.compile(r"\b[0-9a-z]{18}\b|\b[0-9a-f]{12,}\b|\d+\.\d+\.\d+\.\d+(:\d+)?")
NOISE = re.compile(
    r"\x1b|rpc_code|grpc|\.cc:\d|\.py:\d|Traceback|ray::|call_agent|IOError|Errno|ipv4"
)

TASK = """
import os, signal, sys, time

mark = f"{os.environ['CORTEX_JOB_ID']} {os.environ['CORTEX_ATTEMPT']} {os.uname().nodename}\\n"
fd = os.open(MARKS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(fd, mark.encode())
os.close(fd)


def task(config):
    kind = config["kind"]
    if kind == "fail":
        raise ValueError("as asked")
    if kind == "exit":
        sys.exit(7)
    if kind == "say":
        for number in range(LINES):
            print("line", number)
    if kind == "sleep":
        time.sleep(300)
    if kind == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    time.sleep(config["pause"])
    return kind
"""
APIS = {"storm": (0, None), "again": (2, None), "in-a": (0, "a"), "again-in-b": (2, "b")}
WEIGHTS = {"quick": 6, "say": 4, "fail": 2, "exit": 1, "sleep": 2, "stubborn": 1}


def yaml() -> str:
    return "".join(
        f"- name: {name}\n"
        "  kind: TaskAPI\n"
        "  definition: {path: task.py}\n"
        f"  compute: {{cpu: 250m{'' if zone is None else f', node_labels: {{zone: {zone}}}'}}}\n"
        f"  retries: {retries}\n"
        for name, (retries, zone) in APIS.items()
    )


@dataclass
class Job:
    """A job, as its client knows it."""

    kind: str
    answer: dict[str, Any]
    stopped: bool = False
    final: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return str(self.answer["job_id"])

    @property
    def path(self) -> str:
        return f"/{self.answer['api_name']}/{self.id}"

    @property
    def retries(self) -> int:
        return APIS[self.answer["api_name"]][0]


@dataclass
class Fault:
    """A fault that has an end."""

    kind: str
    machine: str
    ends_s: float
    undo: Callable[[], None]


@dataclass
class Storm:
    """One run. `check_job` and the actions raise Violation."""

    cluster: Machines
    seed: int
    jobs: list[Job] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    active: list[Fault] = field(default_factory=list)
    losses: list[tuple[float, str]] = field(default_factory=list)
    """When (Unix time) a fault began that may lose a node's jobs, and the node."""
    exits: list[str] = field(default_factory=list)
    """Why operators have ended by themselves."""
    noisy: list[str] = field(default_factory=list)
    """Messages that are no sentences for users."""
    messages: Counter[str] = field(default_factory=Counter)
    """What users were told, without numbers and names that differ from run to run."""
    killed: set[str] = field(default_factory=set)
    max_silence_s: float = 0.0
    tended_s: float = 0.0
    started_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        # Not `random`: the number of requests differs from run to run.
        self.request_random = random.Random(self.seed)
        self.marks_file = self.cluster.shared / "marks"
        self.kinds: dict[str, Callable[[], Fault | None]] = {
            "operator killed": self.kill_operator,
            "operator stopped": partial(self.stop, OPERATORS, "cortex serve"),
            "driver killed": partial(self.kill, OPERATORS, DRIVER),
            "agent killed": partial(self.kill, list(NODES), AGENT),
            "raylet stopped": partial(self.stop, list(NODES), RAYLET, may_lose=True),
            "raylet killed": partial(self.lose_node, RAYLET),
            "node lost": partial(self.lose_node, None),
            "node cut off": partial(self.cut, list(NODES), may_lose=True),
            "operator cut off": partial(self.cut, OPERATORS),
            "database cut off": partial(self.cut, [DATABASE]),
            "files cut off": partial(self.cut, [FILES]),
            "packets to an operator dropped": self.cut_direction,
            "connections to an operator refused": self.refuse_connections,
            "head stopped": partial(self.stop, [HEAD], GCS),
            "database killed": self.kill_database,
            "head lost": self.lose_head,
        }

    def run(self, jobs: int, faults: int) -> None:
        """Submit `jobs` jobs, and let `faults` faults happen, in random order. Then end all faults,
        wait for all jobs, and check them."""
        self.deploy()
        plan: list[Callable[[], None]] = [self.submit, self.check_any] * jobs
        plan += [self.stop_job] * (jobs // 8)
        # All kinds equally often, so that a short run has each of them.
        kinds = itertools.islice(itertools.cycle(self.kinds), faults)
        plan += [partial(self.inject, kind) for kind in kinds]
        self.random.shuffle(plan)
        for number, act in enumerate(plan):
            self.tick()
            act()
            if number % 100 == 99:
                print(f"{number + 1} of {len(plan)} actions", flush=True)
        self.calm()
        self.await_all()
        for name, running in self.cluster.operators.items():
            running.kill()
            self.killed.add(name)
        self.revive()
        for job in self.jobs:
            self.check_job(job)
        self.check_marks()
        self.check_list()
        self.check_processes()

    def deploy(self) -> None:
        running = self.cluster.operators[OPERATORS[0]]
        task = TASK.replace("MARKS", repr(str(self.marks_file))).replace("LINES", str(LINE_COUNT))
        response = running.deploy(yaml(), {"task.py": task})
        assert response.status_code == 200, response.text
        for each in self.cluster.operators.values():
            each.http.timeout = httpx.Timeout(REQUEST_TIMEOUT_S)

    # Requests.

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send a request to any operator until one answers."""
        began_s = time.monotonic()
        last = ""
        while time.monotonic() < began_s + ANSWER_TIMEOUT_S:
            self.tick()
            asked = self.request_random.choice(list(self.cluster.operators.values()))
            try:
                response = asked.http.request(method, asked.url + path, **more)
            except httpx.TransportError as error:
                last = repr(error)
                self.revive()
                time.sleep(0.05)
                continue
            if response.status_code == 503:  # no leader, no database or no files now
                last = response.text
                time.sleep(0.1)
                continue
            if response.status_code >= 500:
                raise Violation(f"{method} {path}: {response.status_code} {response.text}")
            self.max_silence_s = max(self.max_silence_s, time.monotonic() - began_s)
            return response
        raise Violation(f"{method} {path}: no answer within {ANSWER_TIMEOUT_S} s; last: {last}")

    def submit(self) -> None:
        kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        body: dict[str, object] = {"config": {"kind": kind, "pause": self.random.random() * 2}}
        if STATUS_BY_KIND[kind] == "status_timed_out":
            body["timeout"] = self.random.randint(1, MAX_TIMEOUT_S)
        api = self.random.choice(list(APIS))
        # With the key, a submit that is repeated after its answer was lost is still one job.
        key = {"Idempotency-Key": f"{len(self.jobs)}"}
        response = self.request("POST", f"/{api}", json=body, headers=key)
        if response.status_code != 200:
            raise Violation(f"submit: {response.status_code} {response.text}")
        self.jobs.append(Job(kind, response.json()))

    def stop_job(self) -> None:
        if not self.jobs:
            return
        job = self.random.choice(self.jobs[-40:])
        response = self.request("DELETE", job.path)
        if response.status_code == 200:
            if job.final is not None and job.final["status"] != "status_stopped":
                raise Violation(f"{job}: stopped after it had completed")
            job.stopped = True
        elif response.status_code != 409 or job.stopped:
            raise Violation(f"{job}: {response.status_code} {response.text}")
        self.check_job(job)

    # Checks.

    def check_any(self) -> None:
        if self.jobs:
            self.check_job(self.random.choice(self.jobs))
        self.note_problems()

    def note(self, message: str) -> None:
        """Note a message for users."""
        if NOISE.search(message):
            self.noisy.append(message)
        if message:
            self.messages[VARIABLE.sub("_", message)] += 1

    def note_problems(self) -> None:
        """Note the problems that operators show of themselves, the cluster and its nodes."""
        for running in self.cluster.operators.values():
            for path in ("/readyz", "/-/cluster"):
                try:
                    shown = running.http.get(running.url + path, timeout=PROBLEM_TIMEOUT_S)
                except httpx.TransportError:
                    continue
                content = shown.json()
                if shown.status_code >= 400:
                    self.note(f"{path}: {shown.status_code} {shown.text}")
                    continue
                for each in (content, *content.get("nodes", ())):
                    if problem := each.get("problem"):
                        self.note(f"{path}: {problem}")

    def check_job(self, job: Job) -> bool:
        """Check what an operator answers about a job; whether the job has ended."""
        response = self.request("GET", job.path)
        if response.status_code != 200:
            raise Violation(f"{job}: {response.status_code} {response.text}")
        status = response.json()["job_status"]
        message = status.get("message") or ""
        self.note(f"{status['status']}: {message}" if message else "")
        if job.final is not None and any(
            status.get(key) != job.final.get(key)
            for key in ("status", "start_time", "end_time", "message", "result")
        ):
            raise Violation(f"{job}: a final status changed to {status}")
        if job.stopped and status["status"] != "status_stopped":
            raise Violation(f"{job}: an acknowledged stop was lost: {status}")
        if status["status"] not in FINAL:
            return False
        if status["status"] not in self.allowed(job, status):
            raise Violation(f"{job}: not an allowed final status: {status}")
        if not status["created_time"] <= status["start_time"] <= status["end_time"]:
            raise Violation(f"{job}: times out of order: {status}")
        if status["status"] == "status_succeeded" and status.get("result") != job.kind:
            raise Violation(f"{job}: not its result: {status}")
        if job.final is None and job.kind == "say" and status["status"] == "status_succeeded":
            answer = self.log_of(job)
            log = answer.text.rpartition(" begins\n")[2]
            if log != "".join(f"line {number}\n" for number in range(LINE_COUNT)):
                about = f"{answer.status_code}, {len(log)} bytes: {log[:300]!r}"
                raise Violation(f"{job}: its log is not complete: {about}")
        job.final = status
        return True

    def log_of(self, job: Job) -> httpx.Response:
        """The log of a job that has ended. An operator that was the leader may owe it for a while to
        the object store, with which an answer says so."""
        until_s = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            answer = self.request("GET", f"{job.path}/logs")
            if answer.status_code != 404 or time.monotonic() > until_s:
                return answer
            self.note(f"log: {answer.json()['message']}")
            self.revive()
            time.sleep(0.5)

    def allowed(self, job: Job, status: dict[str, Any]) -> set[str]:
        """The final statuses that a job may have."""
        if job.stopped:
            return {"status_stopped"}
        ends = {STATUS_BY_KIND[job.kind]}
        starts = [mark for mark in self.marks() if mark[0] == job.id]
        lost = self.lost_during(status)
        may_be_lost = bool(lost & {mark[2] for mark in starts} if starts else lost)
        # An attempt whose node was lost counts, whether or not its code had started. A job that was
        # lost after its timeout gets no new attempt.
        count = max(len(starts), self.count_losses(status))
        is_last = count > job.retries or job.answer["timeout"] is not None
        if may_be_lost and (is_last or not starts):
            ends.add("status_unexpected_error")
        return ends

    def lost_during(self, status: dict[str, Any]) -> set[str]:
        """The nodes whose jobs may have been lost while this job was in progress."""
        begin_s = parse_rfc3339(status["created_time"]).timestamp() - SLACK_S
        end_s = parse_rfc3339(status["end_time"]).timestamp()
        return {node for since_s, node in self.losses if begin_s <= since_s <= end_s}

    def count_losses(self, status: dict[str, Any]) -> int:
        """How often nodes may have been lost while this job was in progress; all of them at once is
        one loss."""
        begin_s = parse_rfc3339(status["created_time"]).timestamp() - SLACK_S
        end_s = parse_rfc3339(status["end_time"]).timestamp()
        times = sorted(since_s for since_s, _ in self.losses if begin_s <= since_s <= end_s)
        return sum(later - earlier > 1 for earlier, later in itertools.pairwise([0, *times]))

    def await_all(self) -> None:
        """Wait until all jobs have ended."""
        until_s = time.monotonic() + END_TIMEOUT_S
        left = list(self.jobs)
        while left := [job for job in left if not self.check_job(job)]:
            if time.monotonic() > until_s:
                about = [self.request("GET", job.path).json()["job_status"] for job in left[:5]]
                raise Violation(f"{len(left)} jobs have no end: {about}")
            time.sleep(0.5)

    def marks(self) -> list[tuple[str, str, str]]:
        """Job, attempt and machine of each start of a job's code."""
        if not self.marks_file.exists():
            return []
        lines = self.marks_file.read_text().splitlines()
        return [(job, attempt, node) for job, attempt, node in map(str.split, lines)]

    def check_marks(self) -> None:
        """Check that no code started twice in an attempt, that a job started again only after a
        loss and only as often as its API allows, and that each job that succeeded had started."""
        marks = self.marks()
        twice = [mark for mark, count in Counter(mark[:2] for mark in marks).items() if count > 1]
        if twice:
            raise Violation(f"ran twice: {[mark for mark in marks if mark[:2] in twice]}")
        known = {job.id: job for job in self.jobs}
        if unknown := {mark[0] for mark in marks} - set(known):
            raise Violation(f"ran, and no client has submitted it: {unknown}")
        for job in self.jobs:
            starts = [mark for mark in marks if mark[0] == job.id]
            if len(starts) > 1 + job.retries:
                raise Violation(f"{job}: started {len(starts)} times: {starts}")
            for _, attempt, node in starts[:-1]:
                if job.final is None or node not in self.lost_during(job.final):
                    raise Violation(f"{job}: attempt {attempt} ran again, and {node} was not lost")
            if job.final and job.final["status"] == "status_succeeded" and not starts:
                raise Violation(f"{job}: succeeded and never started")

    def check_list(self) -> None:
        """Check that the lists of jobs have each acknowledged job, and no other."""
        listed: Counter[str] = Counter()
        for api in APIS:
            query: dict[str, str] = {"limit": "500"}
            while True:
                page = self.request("GET", f"/{api}", params=query).json()
                listed.update(status["job_id"] for status in page["job_statuses"])
                if not page.get("next_cursor"):
                    break
                query["cursor"] = page["next_cursor"]
        expected = Counter(job.id for job in self.jobs)
        if listed != expected:
            raise Violation(f"missing: {expected - listed}; unexpected: {listed - expected}")

    def check_processes(self) -> None:
        """Check that no process of a job is left on a node."""
        until_s = time.monotonic() + SLACK_S
        while left := [
            (name, pid)
            for name in NODES
            for pid in self.cluster.network.machines[name].processes()
            if _is_of_a_job(pid)
        ]:
            if time.monotonic() > until_s:
                raise Violation(f"processes of jobs are left: {left}")
            time.sleep(0.5)

    # Faults.

    def inject(self, kind: str) -> None:
        """Let a fault of a kind happen, when few others are active."""
        while len(self.active) >= MAX_ACTIVE:
            self.check_any()
            time.sleep(0.1)
            self.tick()
        fault = self.kinds[kind]()
        if fault is None:
            self.skipped[kind] += 1
        else:
            self.faults[kind] += 1
            self.active.append(fault)

    def tick(self) -> None:
        """End the faults whose time has come."""
        now_s = time.monotonic()
        due = [fault for fault in self.active if fault.ends_s <= now_s]
        self.active = [fault for fault in self.active if fault.ends_s > now_s]
        for fault in due:
            fault.undo()
        if now_s > self.tended_s + TEND_INTERVAL_S:
            self.tended_s = now_s
            down = {fault.machine for fault in self.active}
            for name in () if HEAD in down else (*NODES, *OPERATORS):
                is_starting = now_s < self.started_s.get(name, 0.0) + RAYLET_START_S
                if name not in down and not is_starting and not self.cluster.pids(name, RAYLET):
                    self.start_node(name)

    def start_node(self, name: str) -> None:
        """Start the raylet of a node, as a machine's service manager does."""
        self.started_s[name] = time.monotonic()
        self.cluster.start_node(name)

    def calm(self) -> None:
        """End all faults, and start what does not run."""
        for fault in self.active:
            fault.ends_s = 0.0
        self.tick()
        self.revive()

    def revive(self) -> None:
        """Start the operators that have ended, unless a fault keeps them down."""
        down = {fault.machine for fault in self.active}
        if {DATABASE, FILES, HEAD} & down:
            return
        for name, running in self.cluster.operators.items():
            if name in down or running.process.poll() is None:
                continue
            if name not in self.killed:
                self.exits.append(f"{name}: {_last_line(running)}")
            self.killed.discard(name)
            try:
                running.start()
            except AssertionError:
                self.exits.append(f"{name} did not start: {_last_line(running)}")
                self.killed.add(name)  # the next attempt is not another exit
                time.sleep(1)

    def kill_operator(self) -> Fault | None:
        name = self.pick(OPERATORS)
        if name is None:
            return None
        running = self.cluster.operators[name]
        if running.process.poll() is None:
            running.kill()
        self.killed.add(name)
        return Fault("operator", name, self.later(), self.revive)

    def kill(self, names: list[str], kind: str) -> Fault | None:
        """Kill processes that Cortex or Ray replaces."""
        # A standby has no driver.
        name = self.pick([name for name in names if self.cluster.pids(name, kind)])
        if name is None:
            return None
        self.cluster.kill(name, kind)
        return Fault(kind, name, time.monotonic(), lambda: None)

    def stop(self, names: list[str], kind: str, *, may_lose: bool = False) -> Fault | None:
        """Stop processes for a while."""
        name = self.pick(names)
        if name is None or not self.cluster.pids(name, kind):
            return None
        ends_s = self.silent_until(name) if may_lose else self.later()
        resume = self.cluster.stop(name, kind)
        return Fault(kind, name, ends_s, resume)

    def cut(self, names: list[str], *, may_lose: bool = False) -> Fault | None:
        """Cut a machine's link for a while."""
        name = self.pick(names)
        if name is None:
            return None
        ends_s = self.silent_until(name) if may_lose else self.later()
        self.cluster.network.cut(name)
        return Fault("cut", name, ends_s, partial(self.cluster.network.heal, name))

    def cut_direction(self) -> Fault | None:
        name = self.pick(list(NODES))
        if name is None:
            return None
        self.cluster.network.cut_direction(name, self.random.choice(OPERATORS))
        return Fault("cut", name, self.later(), partial(self.cluster.network.heal, name))

    def refuse_connections(self) -> Fault | None:
        name = self.pick(list(NODES))
        if name is None:
            return None
        self.cluster.network.refuse_connections(name, self.random.choice(OPERATORS))
        return Fault("cut", name, self.later(), partial(self.cluster.network.heal, name))

    def lose_node(self, kind: str | None) -> Fault | None:
        """Kill a node's raylet, or everything on its machine, and start the node again later."""
        name = self.pick(list(NODES))
        if name is None:
            return None
        self.losses.append((time.time(), name))
        if kind is None:
            self.cluster.kill_node(name)
        elif self.cluster.pids(name, kind):
            self.cluster.kill(name, kind)
        return Fault("node", name, self.later(), partial(self.start_node, name))

    def kill_database(self) -> Fault | None:
        name = self.pick([DATABASE])
        if name is None:
            return None
        self.cluster.database.kill()
        return Fault("database", name, self.later(), self.cluster.database.start)

    def lose_head(self) -> Fault | None:
        """Start a new head in place of a killed one, and all nodes with it."""
        self.calm()
        self.losses += [(time.time(), name) for name in NODES]
        for name in OPERATORS:
            self.cluster.operators[name].kill()
            self.killed.add(name)
        self.cluster.kill_head()
        for name in (*NODES, *OPERATORS):
            self.cluster.kill_node(name)
        self.cluster.start_head()
        for name in (*NODES, *OPERATORS):
            self.start_node(name)
        self.cluster.await_ray()
        self.revive()
        return Fault("head", HEAD, time.monotonic(), lambda: None)

    def pick(self, names: list[str]) -> str | None:
        """A machine without an active fault."""
        down = {fault.machine for fault in self.active}
        free = [name for name in names if name not in down]
        return self.random.choice(free) if free else None

    def later(self) -> float:
        return time.monotonic() + 1 + self.random.random() * (MAX_FAULT_S - 1)

    def silent_until(self, name: str) -> float:
        """When a node answers again. Some nodes are silent until Ray has declared them dead."""
        if self.random.random() < DEADLY_PROBABILITY:
            self.losses.append((time.time(), name))
            return time.monotonic() + DEADLY_S
        return self.later()


def _last_line(running: Operator) -> str:
    lines = running.log.read_text().splitlines()
    return lines[-1] if lines else "no message"


def _is_of_a_job(pid: int) -> bool:
    # A fork server reserves this variable for a job's id, filled with dashes.
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return re.search(rb"\bCORTEX_JOB_ID=[0-9a-z]", environ) is not None


def storm(*, jobs: int, faults: int, seed: int) -> Storm:
    """Run a storm on new machines."""
    with machines() as cluster:
        cluster.start_storage()
        cluster.start_head()
        for name, labels in NODES.items():
            cluster.add_node(name, labels)
        first, *_ = [cluster.start_operator(name) for name in OPERATORS]
        cluster.await_ready(first, *NODES)
        run = Storm(cluster, seed)
        try:
            run.run(jobs, faults)
        finally:
            summarize(run)
            for fault in run.active:  # a stopped process cannot be ended in an orderly way
                fault.undo()
        return run


def summarize(run: Storm) -> None:
    """Print what happened."""
    ends = Counter(job.final["status"] for job in run.jobs if job.final)
    attempts = Counter(int(attempt) for _, attempt, _ in run.marks())
    print(f"{len(run.jobs)} jobs {dict(ends)}, starts by attempt {dict(attempts)}")
    print(f"{sum(run.faults.values())} faults {dict(run.faults)}, skipped {dict(run.skipped)}")
    started = {mark[0] for mark in run.marks()}
    failed = [job for job in run.jobs if job.final and job.id not in started and not job.stopped]
    never = Counter(job.final["status"] for job in failed if job.final)
    print(f"ends of jobs that never started and were not stopped {dict(never)}")
    print(f"longest wait for an answer {run.max_silence_s:.1f} s")
    for what, texts in (("ended by themselves", run.exits), ("messages with noise", run.noisy)):
        print(f"{len(texts)} {what}")
        for text, count in Counter(texts).most_common(5):
            print(f"  {count} x {text[:300]}")
    print(f"{len(run.messages)} different messages for users")
    for text, count in run.messages.most_common():
        print(f"  {count} x {text[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    options = parser.parse_args()
    # As Ctrl-C: the machines are ended and removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.geteuid() != 0:
        parser.error("machines of network namespaces need root")
    print(f"seed {options.seed}", flush=True)
    start_s = time.monotonic()
    storm(jobs=options.jobs, faults=options.faults, seed=options.seed)
    print(f"no violation in {time.monotonic() - start_s:.0f} s")


if __name__ == "__main__":
    main()
