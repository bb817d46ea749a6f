"""CONTRACT.md, Errors: what is refused, how, and never as HTML."""

from __future__ import annotations

import httpx
import pytest

from support import Operator


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert answer.keys() == {"kind", "message"}
    assert "Traceback" not in answer["message"]
    return str(answer["message"])


@pytest.mark.parametrize("path", ["/nothing", "/-/nothing", "/a/b/c/d", "/", "/-/apis/nothing"])
def test_what_is_not_there(shared: Operator, path: str) -> None:
    refused(shared.http.get(shared.url + path), 404)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("job_id", ["nothing", "01m86r4cr7z0cxg55g", "%00", "%ff", "a" * 3000])
def test_an_unknown_job(shared: Operator, probe: str, method: str, job_id: str) -> None:
    refused(shared.http.request(method, f"{probe}/{job_id}"), 404)
    refused(shared.http.request(method, f"{probe}?jobID={job_id}"), 404)


def test_an_unknown_api(shared: Operator) -> None:
    refused(shared.http.post(f"{shared.url}/nothing", json={}), 404)
    refused(shared.http.delete(f"{shared.url}/-/apis/nothing"), 404)


def test_a_job_is_found_only_at_its_own_api(shared: Operator, probe: str) -> None:
    from support import PROBE, probe_yaml

    other = shared.deployed(probe_yaml("other"), {"probe.py": PROBE})
    job = shared.submit(probe)
    refused(shared.http.get(f"{other}/{job['job_id']}"), 404)
    refused(shared.http.delete(f"{other}/{job['job_id']}"), 404)
    refused(shared.http.get(f"{other}/{job['job_id']}/logs"), 404)


@pytest.mark.parametrize(("method", "path"), [("PUT", ""), ("PATCH", ""), ("POST", "/job")])
def test_methods_that_are_not_allowed(shared: Operator, probe: str, method: str, path: str) -> None:
    response = shared.http.request(method, probe + path, json={})
    refused(response, 405)
    assert "GET" in response.headers["allow"]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost"])
def test_a_foreign_origin(shared: Operator, probe: str, origin: str) -> None:
    message = refused(shared.http.post(probe, json={}, headers={"Origin": origin}), 403)
    assert "--allow-origin" in message


def test_the_own_origin(shared: Operator, probe: str) -> None:
    response = shared.http.post(probe, json={}, headers={"Origin": shared.url})
    assert response.status_code == 200


def test_health(shared: Operator) -> None:
    assert shared.http.get(f"{shared.url}/healthz").json() == {"status": "ok"}
    assert shared.http.get(f"{shared.url}/readyz").json() == {"status": "ready"}


def test_info(shared: Operator) -> None:
    info = shared.http.get(f"{shared.url}/-/info").json()
    assert info["engine"] == "local"
    assert info["capacity"]["cpu"] > 0


def test_openapi(shared: Operator) -> None:
    paths = shared.http.get(f"{shared.url}/-/openapi.json").json()["paths"]
    assert {"/{endpoint}", "/{endpoint}/{job_id}", "/-/apis"} <= paths.keys()
