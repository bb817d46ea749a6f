"""The audit (docs/security.md): changes with their actors, refusals, and revoked tokens."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from cortex.operator.http.refusals import MAX_KINDS, Refusals
from cortex.spec.audit import Actor
from operator_harness import PROBE, Operator, operator, probe_yaml, until
from operator_with_tokens import cortex, operator_with_tokens, token

DAY_NS = 86_400 * 10**9


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Operator, dict[str, str]]]:
    with operator_with_tokens(tmp_path_factory.mktemp("audited"), "--require-token") as made:
        made[0].deployed(probe_yaml(), {"probe.py": PROBE})
        yield made


def get(running: Operator, path: str, secret: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {secret}"}
    return httpx.get(running.url + path, headers=headers, timeout=60, **options)


def audit(running: Operator, **params: Any) -> list[dict[str, Any]]:
    answer = running.http.get(f"{running.url}/-/audit", params=params)
    assert answer.status_code == 200, answer.text
    entries = answer.json()["entries"]
    assert isinstance(entries, list)
    return entries


def with_action(running: Operator, action: str) -> list[dict[str, Any]]:
    return [entry for entry in audit(running, limit=1000) if entry["action"] == action]


def test_deploys_stops_and_deletions_are_recorded_with_their_actors(
    secured: tuple[Operator, dict[str, str]],
) -> None:
    running, tokens = secured
    endpoint = running.deployed(probe_yaml("watched"), {"probe.py": PROBE})
    version = running.http.get(f"{running.url}/-/apis/watched").json()[0]["spec"]["api_id"]
    job = running.submit(endpoint, config={"do": "sleep", "s": 300})["job_id"]
    headers = {"Authorization": f"Bearer {tokens['submit']}"}
    for _ in range(2):  # the second request changes nothing
        assert httpx.delete(f"{endpoint}/{job}", headers=headers, timeout=60).status_code == 200
    assert running.http.delete(f"{running.url}/-/apis/watched").status_code == 200
    found = [e for e in audit(running) if e["api_name"] == "watched"]
    assert [(e["action"], e["by"], e["job_id"]) for e in found] == [
        ("delete", "deploy", None), ("stop", "submit", job), ("deploy", "deploy", None),
    ]  # fmt: skip
    assert found[2]["message"] == f"version {version}"
    assert {e["address"] for e in found} == {"127.0.0.1"}
    assert all(e["time"].endswith("Z") and e["count"] == 1 for e in found)


def test_changes_of_tokens_are_recorded_with_their_actors(
    secured: tuple[Operator, dict[str, str]],
) -> None:
    running, _ = secured
    token(running.data_dir, "brief", "read")
    cortex("token", "revoke", "brief", "--data-dir", str(running.data_dir))
    found = [e for e in audit(running) if e["token"] == "brief"]
    assert [e["action"] for e in found] == ["revoke_token", "create_token"]
    assert found[1]["message"] == "scope read"
    assert all(e["by"] and e["address"] is None for e in found)


def test_refused_requests_are_counted(secured: tuple[Operator, dict[str, str]]) -> None:
    running, tokens = secured
    for _ in range(3):
        assert get(running, "/probe", "wrong").status_code == 401
    refused = httpx.post(
        f"{running.url}/probe",
        headers={"Authorization": f"Bearer {tokens['read']}"},
        json={},
        timeout=60,
    )
    assert refused.status_code == 403

    def are_recorded() -> bool:
        found = with_action(running, "refuse")
        unauthorized = sum(e["count"] for e in found if e["by"] is None)
        forbidden = [e for e in found if e["by"] == "read"]
        return unauthorized >= 3 and any("auth.forbidden" in e["message"] for e in forbidden)

    until(are_recorded, "the audit has the refused requests")


def test_refused_requests_of_many_callers_make_few_entries() -> None:
    async def flood() -> list[int]:
        stored: list[int] = []

        class Stored:
            async def add_to_audit(self, entries: list[Any]) -> None:
                stored.extend(entry.count for entry in entries)

        refusals = Refusals(Stored())  # type: ignore[arg-type]  # all that Refusals calls
        for number in range(1000):
            refusals.add(Actor(None, f"2001:db8::{number:x}"), "GET", "auth.unauthorized")
        await refusals.close()
        return stored

    counts = asyncio.run(flood())
    assert len(counts) <= MAX_KINDS + 1
    assert sum(counts) == 1000


def test_the_audit_needs_the_scope_deploy_and_is_paged(
    secured: tuple[Operator, dict[str, str]],
) -> None:
    running, tokens = secured
    for scope in ("read", "submit"):
        assert get(running, "/-/audit", tokens[scope]).status_code == 403
    assert running.http.get(f"{running.url}/-/audit", params={"limit": 0}).status_code == 400
    every = audit(running, limit=1000)
    assert len(every) > 3
    paged: list[dict[str, Any]] = []
    cursor = None
    while True:
        params = {"limit": 2} if cursor is None else {"limit": 2, "cursor": cursor}
        page = running.http.get(f"{running.url}/-/audit", params=params).json()
        paged += page["entries"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert paged[-len(every) :] == every


def test_the_command_shows_the_audit(
    secured: tuple[Operator, dict[str, str]], tmp_path: Path
) -> None:
    running, tokens = secured
    variables: dict[str, Any] = {"CORTEX_CLI_CONFIG_DIR": str(tmp_path)}
    variables["CORTEX_TOKEN"] = tokens["deploy"]
    cortex("env", "configure", "here", "--operator-endpoint", running.url, **variables)
    shown = cortex("audit", "--limit", "1000", **variables)
    assert "deploy" in shown
    assert "create_token" in shown
    assert '"action": "deploy"' in cortex("audit", "-o", "json", "--limit", "1000", **variables)
    variables["CORTEX_TOKEN"] = tokens["read"]
    assert "needs 'deploy'" in cortex("audit", code=1, **variables)


def test_an_operator_without_tokens_has_an_audit(shared_operator: Operator) -> None:
    shared_operator.deployed(probe_yaml("anybody"), {"probe.py": PROBE})
    [entry] = [e for e in audit(shared_operator) if e["api_name"] == "anybody"]
    assert (entry["action"], entry["by"], entry["address"]) == ("deploy", None, "127.0.0.1")


def test_old_audit_entries_are_removed(tmp_path: Path) -> None:
    second = str(1 / 86_400)
    with operator(tmp_path, "--keep-audit", second) as running:
        running.deployed(probe_yaml(), {"probe.py": PROBE})
        until(lambda: audit(running) == [], "the audit is empty")


@pytest.mark.parametrize("how", ["a followed log", "a long poll"])
def test_open_answers_end_when_their_token_is_revoked(
    secured: tuple[Operator, dict[str, str]], how: str
) -> None:
    running, _ = secured
    name = how.replace(" ", "-")
    secret = token(running.data_dir, name, "read")
    other = token(running.data_dir, f"{name}-2", "read")
    endpoint = f"{running.url}/probe"
    submitted = running.submit(endpoint, config={"do": "sleep", "s": 300})
    running.await_log(endpoint, submitted, "asleep")
    job = submitted["job_id"]
    headers = {"Authorization": f"Bearer {secret}"}
    try:
        if how == "a long poll":
            with httpx.Client(timeout=60) as client:
                request = client.build_request(
                    "GET", f"{endpoint}/{job}", params={"wait": 50}, headers=headers
                )
                answers: list[httpx.Response] = []
                asking = threading.Thread(target=lambda: answers.append(client.send(request)))
                before = connections(running)
                asking.start()
                until(lambda: connections(running) > before, "the poll has arrived")
                cortex("token", "revoke", name, "--data-dir", str(running.data_dir))
                asking.join(30)
                assert [a.status_code for a in answers] == [401]
        else:
            events = {**headers, "Accept": "text/event-stream"}
            other_events = {"Authorization": f"Bearer {other}", "Accept": "text/event-stream"}
            url = f"{endpoint}/{job}/logs"
            with (
                httpx.stream("GET", url, headers=other_events, timeout=60) as other_answer,
                httpx.stream("GET", url, headers=events, timeout=60) as answer,
            ):
                pieces, other_pieces = answer.iter_text(), other_answer.iter_text()
                assert "asleep" in next(pieces) + next(other_pieces)
                cortex("token", "revoke", name, "--data-dir", str(running.data_dir))
                with pytest.raises(httpx.RemoteProtocolError):
                    for _ in pieces:
                        pass
                # The log that another token follows continues to its end.
                running.delete(endpoint, submitted)
                assert "event: end" in "".join(other_pieces)
        assert get(running, "/probe", secret).status_code == 401
    finally:
        running.delete(endpoint, submitted)


def connections(running: Operator) -> int:
    """The number of connections to the operator."""
    port = f":{int(running.url.rsplit(':', 1)[1]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(1 for fields in lines if fields[1].endswith(port) and fields[3] == "01")


def test_the_data_folder_is_closed_to_other_users(shared_operator: Operator) -> None:
    for name in ("projects", "environments", "jobs", "locks", "archived"):
        mode = stat.S_IMODE((shared_operator.data_dir / name).stat().st_mode)
        assert mode & 0o077 == 0, (name, oct(mode))


def test_metric_series_of_a_deleted_api_are_removed(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(probe_yaml("counted"), {"probe.py": PROBE})
    shared_operator.run(endpoint)
    running = shared_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    shared_operator.await_log(endpoint, running, "asleep")

    def series() -> str:
        return shared_operator.http.get(f"{shared_operator.url}/metrics").text

    until(lambda: 'cortex_jobs_ended_total{api="counted"' in series(), "the end is counted")
    shared_operator.http.delete(f"{shared_operator.url}/-/apis/counted")
    until(lambda: 'api="counted"' not in series(), "its series are removed")
    assert "cortex_operator_info" in series()


def test_a_store_of_an_older_version_gets_an_audit(tmp_path: Path) -> None:
    with operator(tmp_path) as running:
        running.deployed(probe_yaml(), {"probe.py": PROBE})
    with closing(sqlite3.connect(tmp_path / "data" / "operator.db")) as database, database:
        database.execute("DROP TABLE audit")
        database.execute("UPDATE alembic_version SET version_num = '0007'")
    with operator(tmp_path) as running:
        assert audit(running) == []
        running.deployed(probe_yaml("more"), {"probe.py": PROBE})
        assert [entry["api_name"] for entry in audit(running)] == ["more"]
