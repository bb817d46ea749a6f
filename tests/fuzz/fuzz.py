"""Fuzzing: sends a real operator requests that no client would send, and checks every answer
against the contract. `make fuzz`, or `python tests/fuzz/fuzz.py --requests 50000 --seed 7`;
`--replay upload/1234` sends one case of a seed again and shows it.

A case follows from the seed, its stream and its number alone. The program prints a table of the
answers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))
from fuzz import routes, uploads
from fuzz.answer_check import violation
from fuzz.archives import PLANTED
from fuzz.framing import framing
from fuzz.raw_http import WAIT_TIMEOUT_S, Answer, Case, Connection, request
from fuzz.readers import fuzz_readers
from fuzz.routes import World, operations
from operator_harness import Operator, operator, until

YAML = '- name: fuzz\n  kind: TaskAPI\n  definition: {command: ["true"]}\n  compute: {cpu: 1m}\n'
# Few jobs at a time: the fuzzing is about requests, not about the engine.
OPTIONS = ("--cpu", "0.004")
MAX_FAULTS = 20
STALLED_CLIENTS = 20
_DATA = {
    "projects",
    "locks",
    "archived",
    "checkpoints",
    "environments",
    "jobs",
    "folder.id",
    "operator.lock",
    "operator.db",
    "operator.db-wal",
    "operator.db-shm",
}
_LOG_FAULTS = (
    "Traceback",
    "request crashed",
    "dispatcher failed",
    "never retrieved",
    "never awaited",
)

# The share of all requests that a stream of cases gets.
STREAMS: dict[str, tuple[float, Callable[[random.Random, World], Case]]] = {
    "submit": (0.34, routes.submit),
    "route": (0.34, routes.route),
    "framing": (0.14, framing),
    "upload": (0.12, uploads.upload),
}
SCHEMA_SHARE = 0.06


@dataclass
class Report:
    """The requests and answers of a run."""

    requests: int = 0
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    submitted: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: tuple[int, int] = (0, 0)
    descriptors: tuple[int, int] = (0, 0)
    read: int = 0
    seconds: float = 0

    def table(self) -> str:
        """The answers by stream and status."""
        streams = sorted({stream for stream, _ in self.answers})
        statuses = sorted({status for _, status in self.answers})
        rows = [["", *statuses]]
        rows += [[s, *(str(self.answers[s, status] or "") for status in statuses)] for s in streams]
        return "\n".join("  ".join(cell.rjust(8) for cell in row) for row in rows)


class Run:
    """The fuzzing of one operator."""

    def __init__(self, target: Operator, endpoint: str, seed: int) -> None:
        self._target = target
        self._seed = seed
        self._lock = threading.Lock()
        self._private = str(target.data_dir.parent).encode()
        self.report = Report()
        parts = urlsplit(target.url)
        assert parts.hostname and parts.port
        self.address = (parts.hostname, parts.port)
        authorization = target.http.headers.get("authorization")
        described = target.http.get(f"{target.url}/-/openapi.json").json()
        self.world = World(
            host=parts.netloc.encode(),
            headers=[(b"Authorization", authorization.encode())] if authorization else [],
            endpoint=endpoint.rsplit("/", 1)[1],
            name="fuzz",
            operations=operations(described),
        )

    def run_all_streams(self, count: int) -> None:
        """Send all streams at the same time, each over its own connection."""
        threads = [
            threading.Thread(target=self._stream, args=(name, round(count * share)), name=name)
            for name, (share, _) in STREAMS.items()
        ]
        threads.append(threading.Thread(target=self._schema, args=(round(count * SCHEMA_SHARE),)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def case(self, stream: str, index: int) -> Case:
        return STREAMS[stream][1](random.Random(f"{self._seed}/{stream}/{index}"), self.world)

    def replay(self, stream: str, index: int) -> None:
        """Send one case, and show it."""
        case = self.case(stream, index)
        print(case)
        for answer in Connection(self.address).exchange(case):
            print(answer)

    def _stream(self, stream: str, count: int) -> None:
        connection = Connection(self.address)
        try:
            for index in range(count):
                if len(self.report.faults) >= MAX_FAULTS:
                    return
                case = self.case(stream, index)
                answers = connection.exchange(case)
                self._judge(stream, index, case, answers)
                for answer in answers:
                    self._remove_created(connection, answer, random.Random(index))
        except Exception as error:
            self._fault(f"{stream}: {type(error).__name__}: {error}")
            raise
        finally:
            connection.close()

    def _judge(self, stream: str, index: int, case: Case, answers: list[Answer]) -> None:
        with self._lock:
            self.report.requests += case.answers
        for answer in answers:
            status = str(answer.status) if answer.status else "closed"
            with self._lock:
                self.report.answers[stream, status] += 1
            if case.may_close and not answer.status and answer.broken == "closed":
                continue
            fault = violation(answer, case.method, self._private)
            if fault is not None:
                self._fault(
                    f"{stream}/{index}: {fault}\n  {case.sent[:300]!r}\n  {answer.body[:300]!r}"
                )
        if not answers:
            with self._lock:
                self.report.answers[stream, "left"] += 1

    def _remove_created(self, connection: Connection, answer: Answer, rng: random.Random) -> None:
        """Stop most of the accepted jobs, and delete the deployed APIs."""
        if answer.status != 200 or not answer.body.startswith((b'{"job_id"', b"[{")):
            return
        found = json.loads(answer.body)
        if isinstance(found, list):
            for done in found:
                if "message" in done and done["api"]["spec"]["name"] != "fuzz":
                    self._delete(connection, f"/-/apis/{done['api']['spec']['name']}")
            return
        job = (found["api_name"], found["job_id"])
        with self._lock:
            self.report.submitted.append(job)
        self.world.jobs.append(job[1])
        if rng.random() < 0.8:
            self._delete(connection, f"/-/apis/{job[0]}/jobs/{job[1]}")

    def _delete(self, connection: Connection, target: str) -> None:
        headers = [(b"Host", self.world.host), *self.world.headers]
        case = Case(request("DELETE", target, headers), "DELETE")
        self._judge("delete", 0, case, connection.exchange(case))

    def _schema(self, count: int) -> None:
        from fuzz.schema import fuzz_schema  # here: its import would slow the collection of tests

        headers = {name.decode(): value.decode() for name, value in self.world.headers}

        def judge(answer: Answer, method: str, sent: bytes) -> None:
            self._judge("schema", 0, Case(sent, method), [answer])

        try:
            fuzz_schema(self._target.url, headers, count, self._seed, judge)
        except Exception as error:
            self._fault(f"schema: {type(error).__name__}: {error}")
            raise

    def _fault(self, text: str) -> None:
        with self._lock:
            self.report.faults.append(text)


def fuzz(folder: Path, requests: int, seed: int) -> Report:
    """Fuzz an operator in `folder`. Fails where the operator broke the contract."""
    readers = folder / "readers"
    readers.mkdir(parents=True)
    started = time.monotonic()
    read = fuzz_readers(readers, seed, requests // 12)
    canaries = _plant_canary(folder / "home")
    with operator(folder / "home", *OPTIONS) as target:
        endpoint = target.deployed(YAML, {})
        assert target.run(endpoint)["status"] == "status_succeeded"
        run = Run(target, endpoint, seed)
        report = run.report
        report.read = read
        with ExitStack() as stalled:
            before = _memory(target), _descriptors(target)
            for connection in _stall(run):
                stalled.callback(connection.close)
            run.run_all_streams(requests)
            _assert_no(report.faults)
            answered = target.http.get(f"{target.url}/healthz")
            assert answered.status_code == 200
        report.seconds = time.monotonic() - started
        _assert_jobs_sound(target, endpoint, report)
        settled = before[1] + 16
        until(lambda: _descriptors(target) <= settled, "the operator has closed its descriptors")
        report.memory = before[0], _memory(target)
        report.descriptors = before[1], _descriptors(target)
        log = target.log.read_text()
        assert not [word for word in _LOG_FAULTS if word in log], log[-5000:]
        _assert_nothing_outside(target, canaries)
    return report


def _assert_no(faults: list[str]) -> None:
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:MAX_FAULTS]])


def _assert_jobs_sound(target: Operator, endpoint: str, report: Report) -> None:
    """Every acknowledged submit is a job, every job ends, and the next job succeeds."""
    for name, job_id in report.submitted:
        answer = target.http.get(
            f"{target.url}/-/apis/{name}/jobs/{job_id}",
            params={"wait": WAIT_TIMEOUT_S},
            timeout=2 * WAIT_TIMEOUT_S,
        )
        assert answer.status_code == 200, answer.text
        status = answer.json()["job_status"]
        assert status["status"] in {"status_succeeded", "status_stopped", "status_timed_out"}, (
            status
        )
    assert target.run(endpoint)["status"] == "status_succeeded"


def _plant_canary(home: Path) -> set[str]:
    """Put a canary beside the data folder, where archives aim, and return the allowed names."""
    home.mkdir(parents=True)
    (home / "canary").write_text("canary")
    (home / "canary").chmod(0o600)
    return {"canary", "data", "operator.log", "project", "cli"}


def _assert_nothing_outside(target: Operator, allowed: set[str]) -> None:
    home = target.data_dir.parent
    assert {path.name for path in home.iterdir()} <= allowed
    assert (home / "canary").read_text() == "canary"
    # The exact name: on Linux a backslash is a plain character, and such names stay in the project.
    assert not list(Path(tempfile.gettempdir()).glob(PLANTED))
    assert not list(home.rglob(PLANTED))
    unknown = {path.name for path in target.data_dir.iterdir()} - _DATA
    assert not unknown, unknown
    for path in (target.data_dir / "projects").rglob("*"):
        assert path.is_symlink() or path.lstat().st_mode & 0o7000 == 0, path
        assert not path.name.startswith(".incoming-"), path


def _stall(run: Run) -> list[Connection]:
    """Connections of clients whose requests never end."""
    heads = [
        b"POST /%s HTTP/1.1\r\nHost: %s\r\nContent-Length: 100\r\n\r\n{",
        b"POST /%s HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"POST /%s HTTP/1.1\r\nHost: %s\r\nX: ",
    ]
    found = []
    for number in range(STALLED_CLIENTS):
        sent = heads[number % len(heads)] % (run.world.endpoint.encode(), run.world.host)
        connection = Connection(run.address)
        connection.exchange(Case(sent, answers=0))
        found.append(connection)
    return found


def _memory(target: Operator) -> int:
    """The operator's resident memory in MiB."""
    status = Path(f"/proc/{target.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def _descriptors(target: Operator) -> int:
    return len(list(Path(f"/proc/{target.process.pid}/fd").iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--replay", metavar="STREAM/NUMBER")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cortex-fuzz-") as folder:
        if options.replay:
            stream, _, index = options.replay.partition("/")
            with operator(Path(folder), *OPTIONS) as target:
                endpoint = target.deployed(YAML, {})
                Run(target, endpoint, options.seed).replay(stream, int(index))
                print(target.log.read_text())
            return
        report = fuzz(Path(folder), options.requests, options.seed)
    print(report.table())
    print(
        f"{report.requests} requests in {report.seconds:.0f} s, {len(report.submitted)} jobs, "
        f"{report.read} readings in process, no fault; memory {report.memory[0]} -> "
        f"{report.memory[1]} MiB, file descriptors {report.descriptors[0]} -> "
        f"{report.descriptors[1]}"
    )


if __name__ == "__main__":
    main()
