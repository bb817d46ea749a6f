"""The answers of every route and the OpenAPI document keep their fields and types.

`snapshot.json` stores them, and `make snapshot` rewrites it. A change that only adds fields needs
no rewrite.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cortex.errors import CortexError
from operator_harness import PROBE, Operator, probe_yaml, until
from operator_with_tokens import operator_with_tokens
from shapes import breaking_changes, openapi, shape, shape_of_answer

SNAPSHOT = Path(__file__).with_name("snapshot.json")
IS_REWRITTEN = "CORTEX_REWRITE_SNAPSHOT" in os.environ
SLEEP = {"do": "sleep", "s": 300}


class Answers:
    """Requests to one operator, and the shapes of its answers by name."""

    def __init__(self, running: Operator, tokens: dict[str, str]) -> None:
        self.running = running
        self.tokens = tokens
        self.shapes: dict[str, Any] = {}

    def record(
        self, name: str, method: str, path: str, *, token: str = "deploy", **options: Any
    ) -> httpx.Response:
        """Send a request and record the shape of its answer."""
        headers = {"Authorization": f"Bearer {self.tokens[token]}"} if token else {}
        headers |= options.pop("headers", {})
        url = f"{self.running.url}{path}"
        answer = httpx.request(method, url, headers=headers, timeout=120, **options)
        assert name not in self.shapes
        self.shapes[name] = shape_of_answer(answer)
        return answer

    def submit(self, api: str, **body: object) -> str:
        """Submit a job; its path."""
        job = self.running.submit(f"{self.running.url}/{api}", **body)
        return f"/{api}/{job['job_id']}"

    def wait_until(self, path: str, reached: Callable[[Any], object], what: str) -> None:
        until(lambda: reached(self.status(path)), what)

    def status(self, path: str) -> Any:
        return self.running.http.get(self.running.url + path).json()["job_status"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The current shapes of all answers."""
    with operator_with_tokens(tmp_path_factory.mktemp("snapshot"), "--require-token") as (
        running,
        tokens,
    ):
        answers = Answers(running, tokens)
        record_deploys(answers)
        record_jobs(answers)
        record_logs(answers)
        record_operator_routes(answers)
        record_errors(answers)
        document = running.http.get(f"{running.url}/-/openapi.json").json()
        kinds = {each.kind: each.http_status for each in errors(CortexError)}
        kinds = {kind: kinds[kind] for kind in kinds if not kind.startswith("client.")}
        yield {
            "answers": answers.shapes,
            "openapi": openapi(document),
            "kinds": dict(sorted(kinds.items())),
        }


def errors(root: type[CortexError]) -> Iterator[type[CortexError]]:
    yield root
    for each in root.__subclasses__():
        yield from errors(each)


def upload(yaml: str, archive: bytes | None = None) -> dict[str, Any]:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in {"cortex.yaml": yaml, "probe.py": PROBE}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return {
        "config": ("cortex.yaml", yaml.encode()),
        "project": ("project.tar.gz", packed.getvalue() if archive is None else archive),
    }


def record_deploys(answers: Answers) -> None:
    yaml = probe_yaml(more="  limits: {max_running: 1, max_waiting: 1}\n")
    answers.record("deploy", "POST", "/-/apis", files=upload(yaml))
    yaml = probe_yaml("other").replace("cpu: 1m", "cpu: 1m, mem: 64Mi")
    answers.record("deploy with a limit of memory", "POST", "/-/apis", files=upload(yaml))
    answers.record("deploy again", "POST", "/-/apis", files=upload(yaml))


def record_jobs(answers: Answers) -> None:
    jobs = answers.running.data_dir / "jobs"
    submitted = answers.record("submit", "POST", "/probe", json={"config": SLEEP, "timeout": 300})
    job = f"/probe/{submitted.json()['job_id']}"
    answers.wait_until(job, lambda status: status["worker_counts"]["running"], "the job runs")
    answers.record("status: running", "GET", job)
    waiting = answers.submit("probe")
    answers.wait_until(waiting, lambda status: "message" in status, "the job waits")
    answers.record("status: waiting", "GET", waiting)
    answers.record("error: limit.max_waiting", "POST", "/probe", json={})
    answers.record("stop", "DELETE", waiting)
    answers.record("status: stopped, waiting", "GET", waiting)
    answers.record("stop by query", "DELETE", f"/probe?jobID={job.rsplit('/', 1)[1]}")
    answers.record("status: stopped", "GET", f"{job}?wait=60")

    key = {"Idempotency-Key": "a key"}
    answers.record("submit by name", "POST", "/-/apis/other/jobs", json={}, headers=key)
    answers.record("submit again", "POST", "/-/apis/other/jobs", json={}, headers=key)
    answers.record("submit as in Cortex", "POST", "/tasks/other", json={"config": {"a": 1}})
    timed_out = answers.submit("other", timeout=1, config=SLEEP)
    oom = answers.submit("other", config={"do": "allocate"})
    failed = answers.submit("other", config={"do": "fail", "message": "as asked"})
    lost = answers.submit("other", config=SLEEP)
    done = answers.submit("other", config={"text": "x" * 3000, "nested": {"list": [1, None]}})
    answers.record("status: succeeded", "GET", f"{done}?wait=60")
    by_name = f"/-/apis/other/jobs/{done.split('/')[-1]}"
    answers.record("status by name", "GET", by_name)
    answers.record("status by query", "GET", f"/other?jobID={done.split('/')[-1]}")
    answers.record("status as in Cortex", "GET", f"/tasks/other/{done.split('/')[-1]}")
    answers.record("status: worker_error", "GET", f"{failed}?wait=60")
    answers.record("status: worker_oom", "GET", f"{oom}?wait=60")
    answers.record("status: timed_out", "GET", f"{timed_out}?wait=60")
    answers.wait_until(lost, lambda status: status["worker_counts"]["running"], "the job runs")
    moved = jobs.with_name("away")
    supervisor = json.loads((jobs / lost.split("/")[-1] / "start.1").read_text())["pid"]
    jobs.rename(moved)  # without the folder the engine cannot read how the job ended
    os.kill(supervisor, signal.SIGKILL)
    answers.wait_until(
        lost, lambda status: status["status"] == "status_unknown", "the status is unknown"
    )
    answers.record("status: unknown", "GET", lost)
    if jobs.exists():
        shutil.rmtree(jobs)
    moved.rename(jobs)
    answers.record("status: unexpected_error", "GET", f"{lost}?wait=60")

    answers.record("error: conflict, a job that has completed", "DELETE", done)
    answers.record(
        "error: conflict, a key", "POST", "/-/apis/other/jobs", json={"timeout": 1}, headers=key
    )
    answers.record("list", "GET", "/other?limit=2")
    answers.record("list by name", "GET", "/-/apis/other/jobs")
    answers.record("list, last page", "GET", "/other?status=status_succeeded&limit=1000")


def record_logs(answers: Answers) -> None:
    path = answers.submit("other", config={"do": "say", "lines": 3})
    answers.running.http.get(f"{answers.running.url}{path}?wait=60")
    events = {"Accept": "text/event-stream"}
    answers.record("logs", "GET", f"{path}/logs")
    answers.record("logs by name", "GET", f"/-/apis/other/jobs/{path.split('/')[-1]}/logs")
    answers.record("logs from an offset", "GET", f"{path}/logs?offset=7")
    answers.record("logs, a range", "GET", f"{path}/logs", headers={"Range": "bytes=0-5"})
    answers.record("logs, followed", "GET", f"{path}/logs", headers=events)
    beyond = {"Range": "bytes=1000-"}
    answers.record("error: request.range_not_satisfiable", "GET", f"{path}/logs", headers=beyond)


def record_operator_routes(answers: Answers) -> None:
    answers.record("healthz", "GET", "/healthz", token="")
    answers.record("readyz", "GET", "/readyz", token="")
    answers.record("metrics", "GET", "/metrics")
    answers.record("info", "GET", "/-/info")
    answers.record("cluster", "GET", "/-/cluster")
    answers.record("apis", "GET", "/-/apis")
    answers.record("api", "GET", "/-/apis/other")
    answers.record("head", "HEAD", "/-/info")
    answers.record("options", "OPTIONS", "/-/apis")
    answers.record("delete", "DELETE", "/-/apis/probe")
    answers.record("error: auth.unauthorized", "GET", "/-/info", token="")
    answers.record("error: auth.forbidden", "POST", "/other", token="read", json={})
    until(lambda: len(audit(answers)) >= 10, "refusals are in the audit")
    answers.record("audit", "GET", "/-/audit?limit=1000")
    answers.record("audit, a page", "GET", "/-/audit?limit=1")


def audit(answers: Answers) -> list[Any]:
    url = f"{answers.running.url}/-/audit?limit=1000"
    entries = answers.running.http.get(url).json()["entries"]
    assert isinstance(entries, list)
    return entries


def record_errors(answers: Answers) -> None:
    def error(kind: str, method: str, path: str, **options: Any) -> None:
        answer = answers.record(f"error: {kind}", method, path, **options)
        assert answer.json()["kind"] == kind.partition(",")[0], answer.text

    origin = {"Origin": "http://elsewhere.example"}
    yaml = probe_yaml("other")
    error("request.invalid", "POST", "/other", content=b"{")
    error("spec.invalid", "POST", "/-/apis", files=upload("- name: Bad_Name\n"))
    error("project.invalid", "POST", "/-/apis", files=upload(yaml, b"no archive"))
    error("request.foreign_origin", "POST", "/other", json={}, headers=origin)
    error("not_found", "GET", "/other/01m86r4cr7z0cxg55g")
    error("not_found, an API", "POST", "/nothing", json={})
    error("request.method_not_allowed", "PUT", "/other", json={})
    no_force = {"data": {"force": "false"}, "files": upload(yaml)}
    error("conflict, an API that is deployed", "POST", "/-/apis", **no_force)
    error("request.too_large", "POST", "/other", content=b" " * (10 * 1024**2 + 1))
    xml = {"Content-Type": "application/xml"}
    error("request.unsupported_media_type", "POST", "/other", content=b"<a/>", headers=xml)
    coding = {"Content-Encoding": "br"}
    error("request.unsupported_media_type, a coding", "POST", "/other", content=b"", headers=coding)


def test_no_field_is_removed_or_changes_its_type(shapes: dict[str, Any]) -> None:
    if IS_REWRITTEN:
        SNAPSHOT.write_text(json.dumps(shapes, indent=1, sort_keys=True) + "\n")
    lines = breaking_changes(json.loads(SNAPSHOT.read_text()), shapes)
    assert not lines, "\n".join(
        [
            *lines,
            "if this is intended: run `make snapshot`, and describe the change in CHANGELOG.md",
        ]
    )


def test_every_route_is_requested(shapes: dict[str, Any]) -> None:
    """A new route needs a request above."""
    requested = json.dumps(sorted(shapes["openapi"]))
    known = json.dumps(sorted(json.loads(SNAPSHOT.read_text())["openapi"]))
    assert requested == known, "request the new route in this file, then run `make snapshot`"


def test_a_foreign_host_is_refused_in_the_same_shape(
    shared_operator: Operator, shapes: dict[str, Any]
) -> None:
    answer = shared_operator.http.get(
        f"{shared_operator.url}/-/info", headers={"Host": "elsewhere.example"}
    )
    assert (answer.status_code, answer.json()["kind"]) == (421, "request.foreign_host")
    assert shape(answer.json()) == shapes["answers"]["error: not_found"]["body"]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a field is removed": (
        lambda s: s["answers"]["info"]["body"].pop("$.capacity.cpu"),
        "answers info body $.capacity.cpu: removed",
    ),
    "a field gets another type": (
        lambda s: s["answers"]["submit"]["body"].update({"$.timeout": "string"}),
        "answers submit body $.timeout: was 'integer', is 'string'",
    ),
    "a status changes": (
        lambda s: s["answers"]["submit"].update({"status": 201}),
        "answers submit status: was 200, is 201",
    ),
    "a header is removed": (
        lambda s: s["answers"]["logs, a range"]["headers"].remove("content-range"),
        "answers logs, a range headers: content-range removed",
    ),
    "a kind is removed": (lambda s: s["kinds"].pop("conflict"), "kinds conflict: removed"),
    "a metric is removed": (
        lambda s: s["answers"]["metrics"]["metrics"].pop("cortex_jobs_ended"),
        "answers metrics metrics cortex_jobs_ended: removed",
    ),
    "a parameter is removed": (
        lambda s: s["openapi"]["/{endpoint}"]["get"]["parameters"].pop("query:cursor"),
        "openapi /{endpoint} get parameters query:cursor: removed",
    ),
    "a parameter is required": (
        lambda s: s["openapi"]["/{endpoint}"]["get"]["parameters"].update(
            {"query:by": {"in": "query", "name": "by", "required": True}}
        ),
        "openapi /{endpoint} get parameters query:by: is required now",
    ),
    "a route is removed": (lambda s: s["openapi"].pop("/-/info"), "openapi /-/info: removed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_breaks_clients_is_found(name: str) -> None:
    before = json.loads(SNAPSHOT.read_text())
    now = copy.deepcopy(before)
    change, line = CHANGES[name]
    change(now)
    assert breaking_changes(before, now) == [line]


def test_additions_break_no_client() -> None:
    before = json.loads(SNAPSHOT.read_text())
    now = copy.deepcopy(before)
    now["answers"]["info"]["body"]["$.added"] = "string"
    now["answers"]["info"]["headers"].append("x-added")
    now["answers"]["added"] = now["answers"]["info"]
    now["kinds"]["added"] = 400
    parameters = now["openapi"]["/{endpoint}"]["get"]["parameters"]
    parameters["query:by"] = {"in": "query", "name": "by", "required": False}
    schema = now["openapi"]["/{endpoint}"]["get"]["responses"]["200"]["content"]["application/json"]
    schema["schema"]["properties"] = {"job_statuses": {"type": "array"}}
    assert breaking_changes(before, now) == []
