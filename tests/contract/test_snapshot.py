"""The answers of every route and the OpenAPI document keep their fields and types: `snapshot.json`
has them. `make snapshot` rewrites it; a change that only adds fields needs no rewrite.
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
from shapes import broken, openapi, shape, shape_of_answer

SNAPSHOT = Path(__file__).with_name("snapshot.json")
IS_REWRITTEN = "CORTEX_REWRITE_SNAPSHOT" in os.environ
SLEEP = {"do": "sleep", "s": 300}


class Answers:
    """Requests to one operator, and the shapes of its answers by name."""

    def __init__(self, running: Operator, tokens: dict[str, str]) -> None:
        self.running = running
        self.tokens = tokens
        self.shapes: dict[str, Any] = {}

    def ask(
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

    def waits_until(self, path: str, reached: Callable[[Any], object], what: str) -> None:
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
        ask_deploys(answers)
        ask_jobs(answers)
        ask_logs(answers)
        ask_operator(answers)
        ask_errors(answers)
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


def ask_deploys(answers: Answers) -> None:
    yaml = probe_yaml(more="  limits: {max_running: 1, max_waiting: 1}\n")
    answers.ask("deploy", "POST", "/-/apis", files=upload(yaml))
    yaml = probe_yaml("other").replace("cpu: 1m", "cpu: 1m, mem: 64Mi")
    answers.ask("deploy with a limit of memory", "POST", "/-/apis", files=upload(yaml))
    answers.ask("deploy again", "POST", "/-/apis", files=upload(yaml))


def ask_jobs(answers: Answers) -> None:
    jobs = answers.running.data_dir / "jobs"
    submitted = answers.ask("submit", "POST", "/probe", json={"config": SLEEP, "timeout": 300})
    job = f"/probe/{submitted.json()['job_id']}"
    answers.waits_until(job, lambda status: status["worker_counts"]["running"], "it runs")
    answers.ask("status: running", "GET", job)
    waiting = answers.submit("probe")
    answers.waits_until(waiting, lambda status: "message" in status, "it waits")
    answers.ask("status: waiting", "GET", waiting)
    answers.ask("error: limit.max_waiting", "POST", "/probe", json={})
    answers.ask("stop", "DELETE", waiting)
    answers.ask("status: stopped, waiting", "GET", waiting)
    answers.ask("stop by query", "DELETE", f"/probe?jobID={job.rsplit('/', 1)[1]}")
    answers.ask("status: stopped", "GET", f"{job}?wait=60")

    key = {"Idempotency-Key": "a key"}
    answers.ask("submit by name", "POST", "/-/apis/other/jobs", json={}, headers=key)
    answers.ask("submit again", "POST", "/-/apis/other/jobs", json={}, headers=key)
    answers.ask("submit as in Cortex", "POST", "/tasks/other", json={"config": {"a": 1}})
    timed_out = answers.submit("other", timeout=1, config=SLEEP)
    oom = answers.submit("other", config={"do": "allocate"})
    failed = answers.submit("other", config={"do": "fail", "message": "as asked"})
    lost = answers.submit("other", config=SLEEP)
    done = answers.submit("other", config={"text": "x" * 3000, "nested": {"list": [1, None]}})
    answers.ask("status: succeeded", "GET", f"{done}?wait=60")
    by_name = f"/-/apis/other/jobs/{done.split('/')[-1]}"
    answers.ask("status by name", "GET", by_name)
    answers.ask("status by query", "GET", f"/other?jobID={done.split('/')[-1]}")
    answers.ask("status as in Cortex", "GET", f"/tasks/other/{done.split('/')[-1]}")
    answers.ask("status: worker_error", "GET", f"{failed}?wait=60")
    answers.ask("status: worker_oom", "GET", f"{oom}?wait=60")
    answers.ask("status: timed_out", "GET", f"{timed_out}?wait=60")
    answers.waits_until(lost, lambda status: status["worker_counts"]["running"], "it runs")
    away = jobs.with_name("away")
    supervisor = json.loads((jobs / lost.split("/")[-1] / "start.1").read_text())["pid"]
    jobs.rename(away)  # the engine cannot tell the end of a job without its folder
    os.kill(supervisor, signal.SIGKILL)
    answers.waits_until(lost, lambda status: status["status"] == "status_unknown", "unknown")
    answers.ask("status: unknown", "GET", lost)
    if jobs.exists():
        shutil.rmtree(jobs)
    away.rename(jobs)
    answers.ask("status: unexpected_error", "GET", f"{lost}?wait=60")

    answers.ask("error: conflict, a job that has completed", "DELETE", done)
    answers.ask(
        "error: conflict, a key", "POST", "/-/apis/other/jobs", json={"timeout": 1}, headers=key
    )
    answers.ask("list", "GET", "/other?limit=2")
    answers.ask("list by name", "GET", "/-/apis/other/jobs")
    answers.ask("list, last page", "GET", "/other?status=status_succeeded&limit=1000")


def ask_logs(answers: Answers) -> None:
    path = answers.submit("other", config={"do": "say", "lines": 3})
    answers.running.http.get(f"{answers.running.url}{path}?wait=60")
    events = {"Accept": "text/event-stream"}
    answers.ask("logs", "GET", f"{path}/logs")
    answers.ask("logs by name", "GET", f"/-/apis/other/jobs/{path.split('/')[-1]}/logs")
    answers.ask("logs from an offset", "GET", f"{path}/logs?offset=7")
    answers.ask("logs, a range", "GET", f"{path}/logs", headers={"Range": "bytes=0-5"})
    answers.ask("logs, followed", "GET", f"{path}/logs", headers=events)
    beyond = {"Range": "bytes=1000-"}
    answers.ask("error: request.range_not_satisfiable", "GET", f"{path}/logs", headers=beyond)


def ask_operator(answers: Answers) -> None:
    answers.ask("healthz", "GET", "/healthz", token="")
    answers.ask("readyz", "GET", "/readyz", token="")
    answers.ask("metrics", "GET", "/metrics")
    answers.ask("info", "GET", "/-/info")
    answers.ask("cluster", "GET", "/-/cluster")
    answers.ask("apis", "GET", "/-/apis")
    answers.ask("api", "GET", "/-/apis/other")
    answers.ask("head", "HEAD", "/-/info")
    answers.ask("options", "OPTIONS", "/-/apis")
    answers.ask("delete", "DELETE", "/-/apis/probe")
    answers.ask("error: auth.unauthorized", "GET", "/-/info", token="")
    answers.ask("error: auth.forbidden", "POST", "/other", token="read", json={})
    until(lambda: len(audit(answers)) >= 10, "refusals are in the audit")
    answers.ask("audit", "GET", "/-/audit?limit=1000")
    answers.ask("audit, a page", "GET", "/-/audit?limit=1")


def audit(answers: Answers) -> list[Any]:
    url = f"{answers.running.url}/-/audit?limit=1000"
    entries = answers.running.http.get(url).json()["entries"]
    assert isinstance(entries, list)
    return entries


def ask_errors(answers: Answers) -> None:
    def error(kind: str, method: str, path: str, **options: Any) -> None:
        answer = answers.ask(f"error: {kind}", method, path, **options)
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


def test_nothing_is_removed_and_nothing_gets_another_type(shapes: dict[str, Any]) -> None:
    if IS_REWRITTEN:
        SNAPSHOT.write_text(json.dumps(shapes, indent=1, sort_keys=True) + "\n")
    lines = broken(json.loads(SNAPSHOT.read_text()), shapes)
    assert not lines, "\n".join(
        [*lines, "if this is intended: run `make snapshot`, and tell it in CHANGELOG.md"]
    )


def test_every_route_is_asked(shapes: dict[str, Any]) -> None:
    """A new route needs a request above."""
    asked = json.dumps(sorted(shapes["openapi"]))
    known = json.dumps(sorted(json.loads(SNAPSHOT.read_text())["openapi"]))
    assert asked == known, "request the new route in this file, then run `make snapshot`"


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
    assert broken(before, now) == [line]


def test_what_is_added_breaks_nothing() -> None:
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
    assert broken(before, now) == []
