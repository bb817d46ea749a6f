"""Methods and paths of the HTTP interface.

HEAD is GET without its body, OPTIONS and `Allow` list the methods of a route, and a slash at the
end of a path changes nothing.
"""

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
CONNECTION_HEADERS = {"date", "transfer-encoding"}  # differ from answer to answer


def send(shared_operator: Operator, method: str, path: str, **headers: str) -> httpx.Response:
    return httpx.request(method, shared_operator.url + path, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def job_id(shared_operator: Operator, probe: str) -> str:
    return str(shared_operator.run(probe, config={"do": "say", "lines": 3})["job_id"])


def of_probe(path: str, job_id: str) -> str:
    return path.format(name="probe", endpoint="probe", job_id=job_id)


def test_the_table_has_every_route(shared_operator: Operator) -> None:
    described = send(shared_operator, "GET", "/-/openapi.json").json()["paths"]
    found = {path: {method.upper() for method in methods} for path, methods in described.items()}
    expected = {path: methods - {"HEAD", "OPTIONS"} for path, methods in METHODS.items()}
    del expected["/-/openapi.json"]
    assert found == expected


@pytest.mark.parametrize("path", METHODS)
def test_options_and_a_405_list_the_allowed_methods(
    shared_operator: Operator, job_id: str, path: str
) -> None:
    path = of_probe(path, job_id)
    options = send(shared_operator, "OPTIONS", path)
    assert (options.status_code, options.content) == (204, b"")
    allowed = METHODS[next(p for p in METHODS if of_probe(p, job_id) == path)]
    assert set(options.headers["allow"].split(", ")) == allowed
    for method in {"DELETE", "PATCH", "POST", "PUT", "TRACE"} - allowed:
        refused = send(shared_operator, method, path)
        assert (refused.status_code, refused.json()["kind"]) == (405, "request.method_not_allowed")
        assert refused.headers["allow"] == options.headers["allow"]
        assert f"{method} is not allowed on {path}; use " in refused.json()["message"]


@pytest.mark.parametrize(
    "path", ["/a/b/c/d", "/-/nothing", "/", "/-", "/metrics/x", "/healthz/x/logs"]
)
def test_an_unknown_path_is_404_for_every_method(shared_operator: Operator, path: str) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "POST", "DELETE"):
        answer = send(shared_operator, method, path)
        assert answer.status_code == 404, method
        assert answer.content == b"" if method == "HEAD" else answer.json()["kind"] == "not_found"


def test_options_of_the_server_lists_all_methods(shared_operator: Operator) -> None:
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
    got, head = send(shared_operator, "GET", path), send(shared_operator, "HEAD", path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers.keys() - CONNECTION_HEADERS == got.headers.keys() - CONNECTION_HEADERS
    assert head.headers["content-type"] == got.headers["content-type"]
    # The figures of /metrics change all the time.
    if path != "/metrics" and "content-length" in got.headers:
        assert head.headers["content-length"] == got.headers["content-length"]


def test_head_of_a_range_of_a_log_is_get_without_its_body(
    shared_operator: Operator, job_id: str
) -> None:
    path = f"/probe/{job_id}/logs"
    for span, status in (("bytes=2-5", 206), ("bytes=9999-", 416)):
        got, head = (send(shared_operator, method, path, Range=span) for method in ("GET", "HEAD"))
        assert (got.status_code, head.status_code, head.content) == (status, status, b"")
        for name in ("content-length", "content-range"):
            assert head.headers.get(name) == got.headers.get(name)


def test_head_of_a_followed_log_ends_at_once(shared_operator: Operator, probe: str) -> None:
    """The job outlives the answer. A GET would follow its log to the end."""
    job = shared_operator.submit(probe, config={"do": "sleep", "s": 300})
    until(lambda: "asleep" in shared_operator.log_of(probe, job), "the job runs")
    head = send(shared_operator, "HEAD", f"/probe/{job['job_id']}/logs", Accept="text/event-stream")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    assert shared_operator.status(probe, job)["status"] == "status_running"
    shared_operator.delete(probe, job)
    until(lambda: "exit_code" in shared_operator.status(probe, job), "its processes have exited")
    assert "Traceback" not in shared_operator.log.read_text()


def test_a_connection_stays_usable_after_head(shared_operator: Operator, job_id: str) -> None:
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
            send(shared_operator, method, path),
            send(shared_operator, method, f"{path}/"),
        )
        assert slashed.status_code == plain.status_code != 404
        assert slashed.headers.keys() == plain.headers.keys()
        if path not in ("/metrics", "/-/apis", "/-/cluster"):  # these show jobs of other tests
            assert slashed.content == plain.content


def test_jobs_are_submitted_and_stopped_with_a_slash_at_the_end(
    shared_operator: Operator, probe: str
) -> None:
    def submitted() -> str:
        answer = httpx.post(f"{probe}/", json={"config": {"do": "sleep", "s": 300}}, timeout=60)
        assert (answer.status_code, answer.history) == (200, [])
        return str(answer.json()["job_id"])

    for path in (f"/probe/{submitted()}/", f"/probe/?jobID={submitted()}"):
        assert send(shared_operator, "GET", path).json()["job_status"]["status"] == "status_running"
        assert send(shared_operator, "DELETE", path).json()["message"].startswith("stopped job")
        assert send(shared_operator, "GET", path).json()["job_status"]["status"] == "status_stopped"
    assert send(shared_operator, "GET", "/probe//").status_code == 404


def test_an_api_is_deployed_and_deleted_with_a_slash_at_the_end(shared_operator: Operator) -> None:
    answer = httpx.post(
        f"{shared_operator.url}/-/apis/",
        files={"config": ("c", b""), "project": ("p", b"")},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["kind"]) == (400, "spec.invalid")
    shared_operator.deployed(probe_yaml("slashed"), {"probe.py": PROBE})
    assert send(shared_operator, "DELETE", "/-/apis/slashed/").status_code == 200
    assert send(shared_operator, "GET", "/-/apis/slashed").status_code == 404
