"""Tokens and their scopes, on a real operator that requires them (401 and 403)."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from operator_harness import PROBE, Operator, operator, probe_yaml
from operator_with_tokens import SCOPES, cortex, operator_with_tokens, token


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, dict[str, str]]]:
    with operator_with_tokens(tmp_path_factory.mktemp("guarded"), "--require-token") as made:
        made[0].deployed(probe_yaml(), {"probe.py": PROBE})
        yield made


def send(running: Operator, method: str, path: str, token: str | None) -> httpx.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.request(method, running.url + path, headers=headers, json={}, timeout=60)


def routes(running: Operator) -> list[tuple[str, str]]:
    """Every route in the operator's OpenAPI document."""
    paths = running.http.get(f"{running.url}/-/openapi.json").json()["paths"]
    return [
        (method.upper(), re.sub(r"\{\w+\}", "probe", path))
        for path, methods in paths.items()
        for method in methods
    ]


def test_no_route_answers_without_a_token(secured: tuple[Operator, dict[str, str]]) -> None:
    running, _ = secured
    found = routes(running)
    assert len(found) > 12
    for method, path in [*found, ("GET", "/-/openapi.json"), ("GET", "/"), ("PUT", "/-/x")]:
        answer = send(running, method, path, None)
        if path in ("/healthz", "/readyz"):
            assert answer.status_code == 200
            continue
        assert (answer.status_code, answer.json()["kind"]) == (401, "auth.unauthorized"), path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "cortex token create" in answer.json()["message"]


@pytest.mark.parametrize(
    "sent",
    [
        b"Bearer ctx_wrong", b"Bearer", b"Basic eDp5", b"ctx_wrong", b"Bearer a b",
        b"Bearer " + b"x" * 5000, b"Bearer \xff\xfe", b"Bearer ctx_\xc3\xa9", b"",
    ],
)  # fmt: skip
def test_every_wrong_token_is_refused(
    secured: tuple[Operator, dict[str, str]], sent: bytes
) -> None:
    running, _ = secured
    answer = httpx.get(f"{running.url}/probe", headers={b"Authorization": sent}, timeout=60)
    assert (answer.status_code, answer.json()["kind"]) == (401, "auth.unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_body_without_a_token_is_not_read(secured: tuple[Operator, dict[str, str]]) -> None:
    running, _ = secured

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 65536

    try:
        answer = httpx.post(f"{running.url}/-/apis", content=endless(), timeout=60)
    except httpx.ReadError:  # the operator closed the connection while the client still sent
        return
    assert answer.status_code == 401


def test_a_client_that_sends_all_before_it_reads_gets_the_401(
    secured: tuple[Operator, dict[str, str]],
) -> None:
    running, _ = secured
    request = urllib.request.Request(f"{running.url}/-/apis", bytes(20 << 20))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as answer:
        assert (answer.code, json.load(answer)["kind"]) == (401, "auth.unauthorized")


@pytest.mark.parametrize(
    ("method", "path", "needs"),
    [
        ("GET", "/probe", "read"),
        ("HEAD", "/probe", "read"),
        ("OPTIONS", "/probe", "read"),
        ("OPTIONS", "/-/apis", "read"),
        ("GET", "/tasks/probe", "read"),
        ("POST", "/tasks/probe", "submit"),
        ("DELETE", "/tasks/probe/JOB", "submit"),
        ("POST", "/-/apis/", "deploy"),
        ("DELETE", "/-/apis/nothing/", "deploy"),
        ("GET", "/-/apis", "read"),
        ("GET", "/-/info", "read"),
        ("GET", "/-/cluster", "read"),
        ("GET", "/metrics", "read"),
        ("POST", "/probe", "submit"),
        ("POST", "/-/apis/probe/jobs", "submit"),
        ("DELETE", "/probe/JOB", "submit"),
        ("DELETE", "/-/apis/probe/jobs/JOB", "submit"),
        ("POST", "/-/apis", "deploy"),
        ("DELETE", "/-/apis/nothing", "deploy"),
    ],
)
def test_a_scope_allows_only_its_own_requests(
    secured: tuple[Operator, dict[str, str]], method: str, path: str, needs: str
) -> None:
    running, tokens = secured
    for scope in SCOPES:
        job = send(running, "POST", "/probe", tokens["deploy"]).json()["job_id"]
        answer = send(running, method, path.replace("JOB", job), tokens[scope])
        if SCOPES.index(scope) >= SCOPES.index(needs):
            assert answer.status_code not in (401, 403), (scope, answer.text)
        else:
            assert (answer.status_code, answer.json()["kind"]) == (403, "auth.forbidden")
            assert needs in answer.json()["message"]
            assert f'scope="{needs}"' in answer.headers["www-authenticate"]


def test_the_scheme_is_read_in_any_case(secured: tuple[Operator, dict[str, str]]) -> None:
    running, tokens = secured
    headers = {"Authorization": f"bEARER {tokens['read']}"}
    assert httpx.get(f"{running.url}/probe", headers=headers, timeout=60).status_code == 200


def test_a_revoked_token_is_refused_from_the_next_request_on(tmp_path: Path) -> None:
    with operator_with_tokens(tmp_path, "--require-token") as (running, _):
        late = token(running.data_dir, "late", "read")
        assert send(running, "GET", "/-/apis", late).status_code == 200
        cortex("token", "revoke", "late", "--data-dir", str(running.data_dir))
        assert send(running, "GET", "/-/apis", late).status_code == 401


def test_tokens_appear_in_no_job_database_or_log(tmp_path: Path) -> None:
    with operator_with_tokens(tmp_path, "--require-token") as (running, tokens):
        running.environment["CORTEX_TOKEN"] = tokens["deploy"]
        running.stop()
        running.start()
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        surroundings = running.run(endpoint, config={"do": "surroundings"})["result"]
        assert "CORTEX_TOKEN" not in surroundings["env"]
        assert tokens["deploy"] not in json.dumps(surroundings)
        send(running, "GET", "/-/apis", "ctx_" + "wrong" * 8)
        data = b"".join(p.read_bytes() for p in running.data_dir.glob("operator.db*"))
        log = running.log.read_text()
        for secret in tokens.values():
            assert secret.encode() not in data
            assert secret not in log
        assert "wrongwrong" not in log


def refusal(data: Path, *options: str) -> str:
    return cortex("serve", "--port", "0", "--data-dir", str(data), *options, code=1)


def test_an_operator_beyond_localhost_requires_tokens(tmp_path: Path) -> None:
    error = refusal(tmp_path / "data", "--host", "0.0.0.0")
    assert "cortex token create" in error
    assert "--insecure" in error
    assert "cortex token create" in refusal(tmp_path / "data", "--require-token")
    with operator_with_tokens(tmp_path, "--host", "0.0.0.0") as (running, tokens):
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert send(running, "GET", "/-/apis", None).status_code == 401
        assert send(running, "GET", "/-/apis", tokens["read"]).status_code == 200
    with operator(tmp_path, "--host", "0.0.0.0", "--insecure") as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert send(running, "GET", "/-/apis", None).status_code == 200


def test_the_command_and_the_client_send_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cortex as package

    with operator_with_tokens(tmp_path, "--require-token") as (running, tokens):
        running.deployed(probe_yaml(), {"probe.py": PROBE})
        config: dict[str, Any] = {"CORTEX_CLI_CONFIG_DIR": str(tmp_path / "cli")}
        configure = ("env", "configure", "far", "--operator-endpoint", running.url)
        cortex(*configure, **config)
        assert "requires a token" in cortex("get", code=1, **config)
        cortex(*configure, "--token", tokens["read"], **config)
        assert "probe" in cortex("get", **config)
        assert "'submit'" in cortex("submit", "probe", code=1, **config)
        assert "job" in cortex("submit", "probe", CORTEX_TOKEN=tokens["submit"], **config)
        assert tokens["read"] not in cortex("env", "list", "-o", "json", **config)
        monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path / "cli"))
        with package.client("far") as client:
            assert [api["spec"]["name"] for api in client.list_apis()] == ["probe"]
            assert tokens["read"] not in repr(client)
            with pytest.raises(package.errors.Forbidden):
                client.submit_job("probe")


def test_the_command_creates_lists_and_revokes_tokens(tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "new" / "data"))
    assert "no operator's data" in cortex("token", "list", *data, code=1)
    made = json.loads(cortex("token", "create", "ci", "--scope", "submit", *data, "-o", "json"))
    assert made.keys() == {"name", "scope", "token"}
    assert re.fullmatch(r"ctx_[\w-]{43}", made["token"])
    assert "token 'ci' already exists" in cortex(
        "token", "create", "ci", "--scope", "read", *data, code=1
    )
    assert "is not a valid token name" in cortex(
        "token", "create", "a b", "--scope", "read", *data, code=1
    )
    cortex("token", "create", "x", "--scope", "everything", *data, code=2)
    (listed,) = json.loads(cortex("token", "list", *data, "-o", "json"))
    assert (listed["name"], listed["scope"]) == ("ci", "submit")
    assert made["token"] not in cortex("token", "list", *data)
    assert "no token 'nobody'" in cortex("token", "revoke", "nobody", *data, code=1)
    cortex("token", "revoke", "ci", *data)
    assert "no tokens" in cortex("token", "list", *data)
    assert (tmp_path / "new" / "data" / "operator.db").stat().st_mode & 0o077 == 0
