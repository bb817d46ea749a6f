"""DNS rebinding: the `Host` header must name the operator.

An attacker's DNS points the name of a page at the operator's machine. A browser on that machine
sends the page's requests to the operator as requests of one origin. Only the name is foreign.
"""

from __future__ import annotations

import io
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from client_variants import Connect
from contract.test_request_bodies import newest_job_ids
from contract.test_tokens import routes
from cortex.cli.main import run as cortex
from cortex.errors import ForeignHost
from cortex.projects.pack import pack
from operator_harness import PROBE, Operator, operator, probe_yaml
from operator_with_tokens import operator_with_tokens

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
EVIL = "evil.example"


def page_headers(running: Operator, name: str = EVIL) -> dict[str, str]:
    """The headers that a browser sends for a script of the page: its origin equals its host."""
    host = f"{name}:{urlsplit(running.url).port}"
    return {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}


def is_refused(answer: httpx.Response) -> bool:
    if answer.status_code != 421:
        return False
    if answer.request.method != "HEAD":
        assert answer.json()["kind"] == "request.foreign_host"
        assert "--allow-host" in answer.json()["message"]
    return True


def status_line(running: Operator, head: bytes) -> bytes:
    """The status line of the answer to a raw request."""
    parts = urlsplit(running.url)
    with socket.create_connection((parts.hostname, parts.port), 60) as connection:
        connection.sendall(head + b"Connection: close\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n")[0]


def test_a_rebound_page_runs_no_code(shared_operator: Operator, probe: str, tmp_path: Path) -> None:
    before = newest_job_ids(shared_operator, probe)
    headers = page_headers(shared_operator)
    assert is_refused(shared_operator.http.post(probe, json={}, headers=headers))
    keyed = {**headers, "Idempotency-Key": "rebound"}
    assert is_refused(shared_operator.http.post(probe, json={}, headers=keyed))
    (tmp_path / "evil.py").write_text(PROBE)
    archive = io.BytesIO()
    pack(tmp_path, archive)
    yaml = probe_yaml("evil").replace("probe.py", "evil.py")
    form = {"config": ("cortex.yaml", yaml.encode()), "project": ("p", archive.getvalue())}
    assert is_refused(
        shared_operator.http.post(f"{shared_operator.url}/-/apis", files=form, headers=headers)
    )
    assert shared_operator.http.get(f"{shared_operator.url}/-/apis/evil").status_code == 404
    assert newest_job_ids(shared_operator, probe) == before


def test_no_route_answers_a_rebound_page_by_any_method(
    shared_operator: Operator, probe: str
) -> None:
    paths = {path for _, path in routes(shared_operator)} | {
        "/",
        "/nothing",
        "/-/openapi.json",
        "/probe/1/",
    }
    assert {"/healthz", "/readyz", "/metrics", "/-/apis"} <= paths
    for path in sorted(paths):
        for method in METHODS:
            answer = shared_operator.http.request(
                method, shared_operator.url + path, headers=page_headers(shared_operator)
            )
            assert is_refused(answer), (method, path)


def test_no_spelling_of_a_foreign_host_is_accepted(shared_operator: Operator, probe: str) -> None:
    port = urlsplit(shared_operator.url).port
    for host in (
        EVIL, f"{EVIL}.", EVIL.upper(), f"localhost.{EVIL}", "localhost@evil.example", "localhost:80:80",
        f"evil-localhost:{port}", "localhost:-1", "localhost:x", "127.0.0.1.nip.io", f"127.0.0.1.{EVIL}",
        "[::1", "::1", "[::1].evil.example", "[evil.example]", "localhost/", "localhost ,evil.example", "",
        "xn--vil-bma.example", "\xebvil.example", "localhost%00.evil.example", "0x7f.1", "127.1", "127.0.0.01",
        ".localhost.evil.example", "localhost..", "*", "null", "a" * 5000,
    ):  # fmt: skip
        answer = shared_operator.http.post(
            probe, json={}, headers={b"Host": host.encode("latin-1")}
        )
        assert is_refused(answer), host
    # Headers of proxies are not believed: a client without a proxy can send them.
    spoofs = {"X-Forwarded-Host": "localhost", "Forwarded": "host=localhost"}
    spoofs |= {"Cortex-Relayed": "1", "Cortex-Asked-At": "localhost"}
    assert is_refused(
        shared_operator.http.post(
            probe, json={}, headers={**page_headers(shared_operator), **spoofs}
        )
    )
    ours = {"X-Forwarded-Host": EVIL, "Forwarded": f"host={EVIL}"}
    assert shared_operator.http.post(probe, json={}, headers=ours).status_code == 200


def test_the_host_of_an_absolute_target_is_checked(shared_operator: Operator, probe: str) -> None:
    for head, status in (
        (b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n", b"421"),
        (b"GET http://evil.example?/healthz HTTP/1.0\r\n", b"421"),
        (b"GET http://localhost@evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n", b"400"),
        (b"GET http://evil.example@localhost/healthz HTTP/1.1\r\nHost: localhost\r\n", b"400"),
        (b"GET http://localhost/healthz HTTP/1.1\r\nHost: evil.example\r\n", b"200"),
        (b"GET http://[::1]:80/healthz HTTP/1.1\r\nHost: evil.example\r\n", b"200"),
        (b"GET //evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n", b"404"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\n", b"400"),
        (b"GET /healthz HTTP/1.0\r\n", b"200"),  # load balancers send this form, browsers do not
        (b"OPTIONS * HTTP/1.1\r\nHost: evil.example\r\n", b"421"),
    ):
        line = status_line(shared_operator, head)
        # A target without a path may also be refused as invalid.
        assert line.split()[1] == status or (b"?" in head and line.split()[1] == b"400"), head


def test_the_machines_own_names_are_accepted(shared_operator: Operator, probe: str) -> None:
    machine = socket.gethostname()
    for host in (
        "localhost", "LocalHost", "localhost.", "a.b.localhost", "127.0.0.1", "127.8.7.6", "[::1]", "[::1]:80",
        "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "192.168.1.5", "203.0.113.9", "[2001:db8::1]", "[fe80::1%25eth0]",
        machine, machine.upper(), machine.partition(".")[0], f"{machine.partition('.')[0]}.local",
    ):  # fmt: skip
        for port in ("", ":9", ":65535"):
            named = host if host.endswith("]:80") else host + port
            answer = shared_operator.http.get(probe, headers={"Host": named})
            assert answer.status_code == 200, (named, answer.text)


def test_only_allowed_names_are_accepted(tmp_path: Path) -> None:
    names = ["--allow-host", "Tasks.example.org", "--allow-host", "other.example.org:81"]
    pages = ["--allow-origin", "https://pages.example.org", "--allow-origin", "https://[x"]
    with operator(tmp_path, *names, *pages) as running:
        running.deployed(probe_yaml(), {"probe.py": PROBE})
        for host, status in (
            ("tasks.example.org", 200), ("TASKS.example.org.:9", 200), ("other.example.org:81", 200),
            ("other.example.org", 421), ("other.example.org:82", 421), ("pages.example.org", 200),
            ("a.tasks.example.org", 421), ("example.org", 421), (EVIL, 421),
        ):  # fmt: skip
            answer = running.http.get(f"{running.url}/probe", headers={"Host": host})
            assert answer.status_code == status, host
        # An allowed host is not an allowed origin.
        foreign = {"Host": "tasks.example.org", "Origin": "http://evil.example"}
        answer = running.http.post(f"{running.url}/probe", json={}, headers=foreign)
        assert answer.json()["kind"] == "request.foreign_origin"


def test_an_operator_with_tokens_accepts_any_host(tmp_path: Path) -> None:
    with operator_with_tokens(tmp_path, "--require-token") as (running, tokens):
        host = {"Host": EVIL}
        assert running.http.get(f"{running.url}/healthz", headers=host).status_code == 200
        with_token = {**host, "Authorization": f"Bearer {tokens['read']}"}
        for headers, status in ((with_token, 200), (page_headers(running), 401)):
            answer = httpx.get(f"{running.url}/-/apis", headers=headers, timeout=60)
            assert answer.status_code == status


def test_an_insecure_operator_accepts_only_allowed_names(tmp_path: Path) -> None:
    with operator(tmp_path, "--host", "0.0.0.0", "--insecure") as running:
        port = urlsplit(running.url).port
        assert running.http.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        answer = running.http.get(
            f"http://127.0.0.1:{port}/healthz", headers={"Host": "operator.cluster.svc"}
        )
        assert is_refused(answer)


def test_the_command_and_the_clients_name_the_flag_allow_host(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    connect: Connect,
) -> None:
    """The client uses a name that resolves to the operator's machine and is not allowed."""
    lookup = socket.getaddrinfo

    def rebound(host: str | bytes, *more: object, **named: object) -> object:
        is_evil = host in (EVIL, EVIL.encode())
        return lookup("localhost" if is_evil else host, *more, **named)  # type: ignore[arg-type]

    with operator(tmp_path) as running:
        monkeypatch.setattr(socket, "getaddrinfo", rebound)
        monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path / "cli"))
        url = f"http://{EVIL}:{urlsplit(running.url).port}"
        with connect(url) as client, pytest.raises(ForeignHost, match=re.escape("--allow-host")):
            client.list_apis()
        monkeypatch.setenv("CORTEX_OPERATOR_ENDPOINT", url)
        assert cortex(["get"]) == 1
        stderr = capsys.readouterr().err
        assert EVIL in stderr
        assert "--allow-host" in stderr
