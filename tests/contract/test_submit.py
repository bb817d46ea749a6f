"""Submits: POST to an endpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest

from operator_harness import TIME, Operator

FIELDS = {
    "job_id", "api_name", "kind", "workers", "config", "api_id", "timeout", "created_time",
}  # fmt: skip


def post(
    shared_operator: Operator, probe: str, body: bytes | str, **headers: str
) -> tuple[int, Any]:
    sent = {"Content-Type": "application/json", **headers}
    response = shared_operator.http.post(probe, content=body, headers=sent)
    assert response.headers["content-type"] == "application/json"
    return response.status_code, response.json()


def test_an_empty_object_submits_a_job_with_every_field_present(
    shared_operator: Operator, probe: str
) -> None:
    job = shared_operator.submit(probe)
    assert job.keys() >= FIELDS
    assert (job["api_name"], job["kind"], job["workers"]) == ("probe", "TaskAPI", 1)
    assert job["config"] == {}
    assert job["timeout"] is None
    assert TIME.match(job["created_time"])
    deployed = shared_operator.http.get(f"{shared_operator.url}/-/apis/probe").json()[0]["spec"]
    assert job["api_id"] == deployed["api_id"]


def test_null_fields_count_as_absent(shared_operator: Operator, probe: str) -> None:
    job = shared_operator.submit(probe, timeout=None, config=None, workers=1)
    assert (job["config"], job["timeout"]) == ({}, None)


def test_config_is_shown_as_submitted_and_merged_for_the_task(
    shared_operator: Operator, probe: str
) -> None:
    config = {"nested": {"replaced": "yes", "added": [1]}, "new": None}
    job = shared_operator.submit(probe, config=config, timeout=60)
    assert (job["config"], job["timeout"]) == (config, 60)
    done = shared_operator.finished(probe, job)
    assert done["config"] == config
    assert done["result"] == {
        "base": 1,
        "nested": {"kept": True, "replaced": "yes", "added": [1]},
        "new": None,
    }


def test_an_object_in_config_replaces_another_type(shared_operator: Operator, probe: str) -> None:
    done = shared_operator.run(probe, config={"base": {"deep": 1}, "nested": 2})
    assert done["result"] == {"base": {"deep": 1}, "nested": 2}


def test_config_is_returned_unchanged(shared_operator: Operator, probe: str) -> None:
    config = {"big": 2**70, "float": 0.1, "text": "äöü ☃ 𝄞", "lone": "\ud800", "deep": [[[{}]]]}
    status, answer = post(shared_operator, probe, json.dumps({"config": config}))
    assert status == 200
    assert answer["config"] == config
    assert shared_operator.finished(probe, answer)["config"] == config


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("{", "JSON"),
        ("nonsense", "JSON"),
        (b"\xff\xfe", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ('"text"', "object"),
        ('{"timeout": NaN}', "NaN"),
        ('{"config": {"x": Infinity}}', "Infinity"),
        ('{"timeout": 0}', "timeout"),
        ('{"timeout": -1}', "timeout"),
        ('{"timeout": 1.5}', "timeout"),
        ('{"timeout": "60"}', "timeout"),
        ('{"timeout": true}', "timeout"),
        ('{"config": []}', "config"),
        ('{"config": "x"}', "config"),
        ('{"workers": 2}', "workers"),
        ('{"workers": 0}', "workers"),
        ('{"workers": true}', "workers"),
        ('{"workers": null}', "workers"),
        ('{"wokers": 1}', "wokers"),
        ('{"config": {}, "retries": 3}', "retries"),
        ("[" * 100_000, "JSON"),
        ('{"config": {"x": ' + "[" * 300 + "]" * 300 + "}}", "nested over 250 levels deep"),
        ('{"config": {"x": 1e400}}', "config"),
        ('{"config": {"x": ' + "9" * 5000 + "}}", "JSON"),
    ],
)
def test_a_body_that_is_not_a_submission_is_refused_by_name(
    shared_operator: Operator, probe: str, body: bytes | str, named: str
) -> None:
    status, answer = post(shared_operator, probe, body)
    assert status == 400
    assert answer["kind"] == "request.invalid"
    assert named in answer["message"]


@pytest.mark.parametrize("timeout", [10**30, 10**400, 10**4299], ids=["30", "400", "4299"])
def test_a_timeout_of_any_size_is_accepted(
    shared_operator: Operator, probe: str, timeout: int
) -> None:
    job = shared_operator.submit(probe, timeout=timeout)
    assert job["timeout"] == timeout
    assert shared_operator.finished(probe, job)["status"] == "status_succeeded"


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "xml"])
def test_a_content_type_that_is_no_json_is_refused_with_the_header_to_send(
    shared_operator: Operator, probe: str, content_type: str
) -> None:
    status, answer = post(shared_operator, probe, "{}", **{"Content-Type": content_type})
    assert status == 415
    assert "Content-Type: application/json" in answer["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/x+json"])
def test_other_json_content_types_are_accepted(
    shared_operator: Operator, probe: str, content_type: str
) -> None:
    status, _ = post(shared_operator, probe, "{}", **{"Content-Type": content_type})
    assert status == 200


def test_a_content_type_may_be_missing(shared_operator: Operator, probe: str) -> None:
    response = shared_operator.http.post(probe, content=b"{}")
    assert "content-type" not in response.request.headers
    assert response.status_code == 200


def test_a_body_over_10_mib_is_refused(shared_operator: Operator, probe: str) -> None:
    body = json.dumps({"config": {"x": "y" * (10 * 1024 * 1024)}})
    status, answer = post(shared_operator, probe, body)
    assert status == 413
    assert "10 MiB" in answer["message"]


def test_a_chunked_body_over_10_mib_is_refused(shared_operator: Operator, probe: str) -> None:
    def chunks() -> object:
        yield b'{"config": {"x": "'
        for _ in range(11):
            yield b"y" * 1024 * 1024
        yield b'"}}'

    response = shared_operator.http.post(probe, content=chunks())  # type: ignore[arg-type]
    assert response.status_code == 413


def test_a_repeated_key_gives_the_same_job(shared_operator: Operator, probe: str) -> None:
    def send(body: object) -> object:
        return shared_operator.http.post(probe, json=body, headers={"Idempotency-Key": "once"})

    before = set((shared_operator.data_dir / "jobs").iterdir())
    first = send({"config": {"a": 1, "b": 2}}).json()  # type: ignore[attr-defined]
    again = send({"config": {"b": 2, "a": 1}}).json()  # type: ignore[attr-defined]
    assert again == first
    other = send({"config": {"a": 2}})
    assert other.status_code == 409  # type: ignore[attr-defined]
    assert first["job_id"] in other.json()["message"]  # type: ignore[attr-defined]
    shared_operator.finished(probe, first)
    made = {folder.name for folder in set((shared_operator.data_dir / "jobs").iterdir()) - before}
    # A job of another test may start only now.
    names = [
        api["spec"]["name"]
        for api in shared_operator.http.get(f"{shared_operator.url}/-/apis").json()
    ]
    pages = [
        shared_operator.http.get(
            f"{shared_operator.url}/-/apis/{name}/jobs", params={"limit": 1000}
        ).json()
        for name in names
    ]
    assert first["job_id"] in made
    assert made <= {job["job_id"] for page in pages for job in page["job_statuses"]}


def test_an_idempotency_key_has_a_maximum_length(shared_operator: Operator, probe: str) -> None:
    status, answer = post(shared_operator, probe, "{}", **{"Idempotency-Key": "k" * 256})
    assert status == 400
    assert answer["message"].startswith(
        "Idempotency-Key: an Idempotency-Key has 1 to 255 characters"
    )


@pytest.mark.parametrize("form", ['{"a": %s}', "[%s]", '{"timeout": %s}'])
def test_a_body_of_any_depth_is_refused_with_a_message(
    shared_operator: Operator, probe: str, form: str
) -> None:
    for depth in (*range(800, 1000, 7), 5000, 100_000):
        body = form % ("[" * depth + "]" * depth)
        response = shared_operator.http.post(
            probe, content=body, headers={"Content-Type": "application/json"}
        )
        assert (response.status_code, response.json()["kind"]) == (400, "request.invalid"), depth
