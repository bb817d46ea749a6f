"""Methods and paths: HEAD as GET without its body, OPTIONS and `Allow` as the routes have it, and a slash
at the end of a path."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import httpx
import pytest

from operator_harness import PROBE, Operator, probe_yaml, until

OF_A_JOB = {"DELETE", "GET", "HEAD", "OPTIONS"}
OF_AN_API = OF_A_JOB | {"POST"}
READ_ONLY = {"GET", "HEAD", "OPTIONS"}
METHODS = {
    "/healthz": READ_ONLY,
    "/readyz": READ_ONLY,
    "/metrics": READ_ONLY,
    "/-/openapi.json": READ_ONLY,
    "/-/info": READ_ONLY,
    "/-/audit": READ_ONLY,
    "/-/cluster": READ_ONLY,
    "/-/apis": READ_ONLY | {"POST"},
    "/-/apis/{name}": OF_A_JOB,
    "/-/apis/{name}/jobs": OF_AN_API,
    "/-/apis/{name}/jobs/{job_id}": OF_A_JOB,
    "/-/apis/{name}/jobs/{job_id}/logs": READ_ONLY,
    "/tasks/{name}": OF_AN_API,
    "/tasks/{name}/{job_id}": OF_A_JOB,
    "/tasks/{name}/{job_id}/logs": READ_ONLY,
    "/{endpoint}": OF_AN_API,
    "/{endpoint}/{job_id}": OF_A_JOB,
    "/{endpoint}/{job_id}/logs": READ_ONLY,
}
OWN = {"date", "transfer-encoding"}  # of each answer, not of what it tells


def asked(shared_operator: Operator, method: str, path: str, **headers: str) -> httpx.Response:
    return httpx.request(method, shared_operator.url + path, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def job_id(shared_operator: Operator, probe: str) -> str:
    return str(shared_operator.run(probe, config={"do": "say", "lines": 3})["job_id"])


def of_probe(path: str, job_id: str) -> str:
    return path.format(name="probe", endpoint="probe", job_id=job_id)


def test_every_route_is_here(shared_operator: Operator) -> None:
    described = asked(shared_operator, "GET", "/-/openapi.json").json()["paths"]
    found = {path: {method.upper() for method in methods} for path, methods in described.items()}
    expected = {path: methods - {"HEAD", "OPTIONS"} for path, methods in METHODS.items()}
    del expected["/-/openapi.json"]
    assert found == expected


@pytest.mark.parametrize("path", METHODS)
def test_options_and_a_405_tell_what_the_path_takes(
    shared_operator: Operator, job_id: str, path: str
) -> None:
    path = of_probe(path, job_id)
    told = asked(shared_operator, "OPTIONS", path)
    assert (told.status_code, told.content) == (204, b"")
    allowed = METHODS[next(p for p in METHODS if of_probe(p, job_id) == path)]
    assert set(told.headers["allow"].split(", ")) == allowed
    for method in {"DELETE", "PATCH", "POST", "PUT", "TRACE"} - allowed:
        refused = asked(shared_operator, method, path)
        assert (refused.status_code, refused.json()["kind"]) == (405, "request.method_not_allowed")
        assert refused.headers["allow"] == told.headers["allow"]
        assert f"{method} is not allowed on {path}; use " in refused.json()["message"]


@pytest.mark.parametrize(
    "path", ["/a/b/c/d", "/-/nothing", "/", "/-", "/metrics/x", "/healthz/x/logs"]
)
def test_where_nothing_is_there_is_no_method(shared_operator: Operator, path: str) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "POST", "DELETE"):
        answer = asked(shared_operator, method, path)
        assert answer.status_code == 404, method
        assert answer.content == b"" if method == "HEAD" else answer.json()["kind"] == "not_found"


def test_options_of_the_server(shared_operator: Operator) -> None:
    parts = urlsplit(shared_operator.url)
    with socket.create_connection((parts.hostname, parts.port), 60) as connection:
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert received.startswith(b"HTTP/1.1 204 ")
    assert b"allow: DELETE, GET, HEAD, OPTIONS, POST\r\n" in received


@pytest.mark.parametrize(
    "path",
    [
        *METHODS,
        "/{endpoint}?jobID={job_id}",
        "/{endpoint}?limit=1",
        "/{endpoint}?limit=wrong",
        "/{endpoint}/{job_id}?wait=1",
        "/{endpoint}/{job_id}?wait=1.5",
        "/{endpoint}/nothing",
        "/nothing",
        "/-/apis/nothing",
        "/tasks/nothing",
    ],
)
def test_head_is_get_without_its_body(shared_operator: Operator, job_id: str, path: str) -> None:
    path = of_probe(path, job_id)
    got, head = asked(shared_operator, "GET", path), asked(shared_operator, "HEAD", path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers.keys() - OWN == got.headers.keys() - OWN
    assert head.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics" and "content-length" in got.headers:  # whose figures change all the time
        assert head.headers["content-length"] == got.headers["content-length"]


def test_head_of_a_part_of_a_log(shared_operator: Operator, job_id: str) -> None:
    path = f"/probe/{job_id}/logs"
    for span, status in (("bytes=2-5", 206), ("bytes=9999-", 416)):
        got, head = (asked(shared_operator, method, path, Range=span) for method in ("GET", "HEAD"))
        assert (got.status_code, head.status_code, head.content) == (status, status, b"")
        for name in ("content-length", "content-range"):
            assert head.headers.get(name) == got.headers.get(name)


def test_head_of_a_followed_log_ends_at_once(shared_operator: Operator, probe: str) -> None:
    """The job outlives the answer: it would be followed to its end."""
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    until(lambda: "asleep" in shared_operator.log_of(probe, job), "it runs")
    head = asked(
        shared_operator, "HEAD", f"/probe/{job['job_id']}/logs", Accept="text/event-stream"
    )
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    assert shared_operator.status(probe, job)["status"] == "status_running"
    shared_operator.delete(probe, job)
    until(lambda: "exit_code" in shared_operator.status(probe, job), "its processes are gone")
    assert "Traceback" not in shared_operator.log.read_text()


def test_a_connection_goes_on_after_head(shared_operator: Operator, job_id: str) -> None:
    with httpx.Client(base_url=shared_operator.url, timeout=60) as client:
        for path in ("/healthz", f"/probe/{job_id}/logs", f"/probe/{job_id}"):
            assert client.head(path).content == b""
            assert client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("path", METHODS)
def test_a_slash_at_the_end_changes_nothing(
    shared_operator: Operator, job_id: str, path: str
) -> None:
    path = of_probe(path, job_id)
    for method in ("GET", "HEAD", "OPTIONS"):
        plain, slashed = (
            asked(shared_operator, method, path),
            asked(shared_operator, method, f"{path}/"),
        )
        assert slashed.status_code == plain.status_code != 404
        assert slashed.headers.keys() == plain.headers.keys()
        if path not in ("/metrics", "/-/apis", "/-/cluster"):  # where other jobs are seen
            assert slashed.content == plain.content


def test_jobs_are_submitted_and_stopped_with_a_slash_at_the_end(
    shared_operator: Operator, probe: str
) -> None:
    def submitted() -> str:
        answer = httpx.post(f"{probe}/", json={"config": {"do": "sleep", "s": 300}}, timeout=60)
        assert (answer.status_code, answer.history) == (200, [])
        return str(answer.json()["job_id"])

    for path in (f"/probe/{submitted()}/", f"/probe/?jobID={submitted()}"):
        assert (
            asked(shared_operator, "GET", path).json()["job_status"]["status"] == "status_running"
        )
        assert asked(shared_operator, "DELETE", path).json()["message"].startswith("stopped job")
        assert (
            asked(shared_operator, "GET", path).json()["job_status"]["status"] == "status_stopped"
        )
    assert asked(shared_operator, "GET", "/probe//").status_code == 404


def test_an_api_is_deployed_and_deleted_with_a_slash_at_the_end(shared_operator: Operator) -> None:
    answer = httpx.post(
        f"{shared_operator.url}/-/apis/",
        files={"config": ("c", b""), "project": ("p", b"")},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["kind"]) == (400, "spec.invalid")
    shared_operator.deployed(probe_yaml("slashed"), {"probe.py": PROBE})
    assert asked(shared_operator, "DELETE", "/-/apis/slashed/").status_code == 200
    assert asked(shared_operator, "GET", "/-/apis/slashed").status_code == 404
