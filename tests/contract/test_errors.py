"""Errors: every refused request gets JSON with `kind` and `message`, never HTML."""

from __future__ import annotations

import contextlib
import os
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from operator_harness import Operator


def error_message(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer.keys() == {"kind", "message"}
    assert "Traceback" not in answer["message"]
    return str(answer["message"])


@pytest.mark.parametrize("path", ["/nothing", "/-/nothing", "/a/b/c/d", "/", "/-/apis/nothing"])
def test_an_unknown_path_is_404(shared_operator: Operator, path: str) -> None:
    error_message(shared_operator.http.get(shared_operator.url + path), 404)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("job_id", ["nothing", "01m86r4cr7z0cxg55g", "%00", "%ff", "a" * 3000])
def test_an_unknown_job_is_404(
    shared_operator: Operator, probe: str, method: str, job_id: str
) -> None:
    error_message(shared_operator.http.request(method, f"{probe}/{job_id}"), 404)
    error_message(shared_operator.http.request(method, f"{probe}?jobID={job_id}"), 404)


def test_an_unknown_api_is_404(shared_operator: Operator) -> None:
    error_message(shared_operator.http.post(f"{shared_operator.url}/nothing", json={}), 404)
    error_message(shared_operator.http.delete(f"{shared_operator.url}/-/apis/nothing"), 404)


def test_a_job_is_found_only_at_its_own_api(shared_operator: Operator, probe: str) -> None:
    from operator_harness import PROBE, probe_yaml

    other = shared_operator.deployed(probe_yaml("other"), {"probe.py": PROBE})
    job = shared_operator.submit(probe)
    error_message(shared_operator.http.get(f"{other}/{job['job_id']}"), 404)
    error_message(shared_operator.http.delete(f"{other}/{job['job_id']}"), 404)
    error_message(shared_operator.http.get(f"{other}/{job['job_id']}/logs"), 404)


@pytest.mark.parametrize(("method", "path"), [("PUT", ""), ("PATCH", ""), ("POST", "/job")])
def test_a_method_that_is_not_allowed_is_405(
    shared_operator: Operator, probe: str, method: str, path: str
) -> None:
    response = shared_operator.http.request(method, probe + path, json={})
    error_message(response, 405)
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost"])
def test_a_foreign_origin_is_403(shared_operator: Operator, probe: str, origin: str) -> None:
    message = error_message(
        shared_operator.http.post(probe, json={}, headers={"Origin": origin}), 403
    )
    assert "--allow-origin" in message


def test_the_own_origin_is_accepted(shared_operator: Operator, probe: str) -> None:
    response = shared_operator.http.post(probe, json={}, headers={"Origin": shared_operator.url})
    assert response.status_code == 200


def test_the_health_routes_answer(shared_operator: Operator) -> None:
    assert shared_operator.http.get(f"{shared_operator.url}/healthz").json() == {"status": "ok"}
    assert shared_operator.http.get(f"{shared_operator.url}/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_the_health_routes_answer_head(shared_operator: Operator, path: str) -> None:
    """Load balancers that check only the status send HEAD."""
    got, head = (
        shared_operator.http.request(method, shared_operator.url + path)
        for method in ("GET", "HEAD")
    )
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.headers[name] == got.headers[name]


def test_info_describes_the_operator(shared_operator: Operator) -> None:
    info = shared_operator.http.get(f"{shared_operator.url}/-/info").json()
    assert info["engine"] == "local"
    assert info["own_folder"] == ("overlay" if os.geteuid() == 0 else "copy")
    assert info["capacity"]["cpu"] > 0


def test_openapi_lists_the_routes(shared_operator: Operator) -> None:
    paths = shared_operator.http.get(f"{shared_operator.url}/-/openapi.json").json()["paths"]
    assert {"/{endpoint}", "/{endpoint}/{job_id}", "/-/apis"} <= paths.keys()


def test_openapi_describes_errors_as_they_are_answered(shared_operator: Operator) -> None:
    described = shared_operator.http.get(f"{shared_operator.url}/-/openapi.json").json()
    for methods in described["paths"].values():
        for operation in methods.values():
            assert operation["responses"].keys() == {"200", "default"}
            schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}
    fields = described["components"]["schemas"]["Error"]["properties"]
    assert fields.keys() == {"kind", "message"}


def raw_request(shared_operator: Operator, data: bytes) -> httpx.Response:
    """The answer to a raw request on a connection that the operator then closes."""
    parts = urlsplit(shared_operator.url)
    with socket.create_connection((parts.hostname, parts.port), 30) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines)
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00 a TLS greeting",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: b\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000,
        b"POST /probe HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /probe HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{}\r\n",
    ],
    ids=["tls", "host", "hosts", "connect", "long", "length", "chunk"],
)
def test_invalid_http_is_refused_as_json(
    shared_operator: Operator, probe: str, data: bytes
) -> None:
    response = raw_request(shared_operator, data)
    assert "HTTP" in error_message(response, 400)
    assert response.headers["connection"] == "close"


def test_an_offered_upgrade_loses_no_body(shared_operator: Operator, probe: str) -> None:
    """By default Java's client offers HTTP/2 with every request, including those with a body."""
    body = b'{"config": {"kept": true}}'
    request = (
        b"POST /probe HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings%s\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nContent-Length: %d\r\n\r\n%s"
    )
    response = raw_request(shared_operator, request % (b", close", len(body), body))
    assert (response.status_code, response.json()["config"]) == (200, {"kept": True})


def test_the_size_of_a_header_in_pieces_is_limited(shared_operator: Operator) -> None:
    parts = urlsplit(shared_operator.url)
    with socket.create_connection((parts.hostname, parts.port), 30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        # The operator closes the connection before all is sent.
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                connection.sendall(b"X: " + b"a" * 4096 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            received = connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 400 ")


def test_clients_that_disconnect_early_leave_no_error_in_the_log(
    shared_operator: Operator, probe: str
) -> None:
    parts = urlsplit(shared_operator.url)
    form = b"Content-Type: multipart/form-data; boundary=b\r\n"
    for path, more in ((b"/probe", b""), (b"/-/apis", form)):
        with socket.create_connection((parts.hostname, parts.port), 30) as connection:
            head = b"POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: 9\r\n\r\n{"
            connection.sendall(head % (path, more))
    job = shared_operator.run(probe)
    assert job["status"] == "status_succeeded"
    assert "crashed" not in shared_operator.log.read_text()
