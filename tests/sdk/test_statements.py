"""A call that streams a log prints it where the call is a statement; elsewhere it returns an
iterator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cortex.errors import NotFound
from cortex.sdk import Client
from operator_stub import RUNNING, Answer, OperatorStub, answer, events

LOG = b'event: log\nid: 5\ndata: "a\\nb"\n\nevent: log\nid: 9\ndata: "c\\n"\n\nevent: end\ndata: {}\n\n'
JOB = str(RUNNING["job_id"])


@pytest.fixture
def client() -> Iterator[Client]:
    answers: dict[str, Answer | list[Answer]] = {
        "GET /-/apis/iris/jobs?limit=1": answer({"job_statuses": [RUNNING], "next_cursor": None}),
        f"GET /-/apis/iris/jobs/{JOB}/logs": events(LOG),
    }
    with OperatorStub(answers) as stub, Client(stub.url) as made:
        yield made


def test_a_statement_prints_the_log(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.stream_job_logs("iris", JOB)
    assert capsys.readouterr().out == "a\nbc\n"
    client.stream_job_logs(api_name="iris", job_id=JOB)
    client.stream_api_logs("iris")
    assert capsys.readouterr().out == "a\nbc\n" * 2
    with pytest.raises(NotFound):
        client.stream_job_logs("iris", "nope")


@pytest.mark.parametrize("mode", ["exec", "single"])
@pytest.mark.parametrize(
    "statement",
    [
        "client.stream_job_logs('iris', job)",
        "if client: client.stream_api_logs('iris')",
        "for _ in [1]: client.stream_job_logs('iris', job)",
        "(lambda: [client.stream_api_logs('iris'), None])() and client.stream_api_logs('iris')",
    ],
)
def test_a_statement_prints_in_programs_and_in_interactive_interpreters(
    statement: str, mode: str, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(f"{statement}\n", "<input>", mode), {"client": client, "job": JOB})
    # An interactive interpreter also shows the iterator that the call returns.
    assert capsys.readouterr().out.replace("<list_iterator", "").startswith("a\nbc\n")


def test_a_result_that_is_used_is_not_printed(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    def passed_on() -> Iterator[str]:
        return client.stream_job_logs("iris", JOB)

    result = client.stream_job_logs("iris", JOB)
    assert "".join(result) == "a\nbc\n"
    assert list(client.stream_api_logs("iris")) == ["a\nb", "c\n"]
    assert list(passed_on()) == ["a\nb", "c\n"]
    for text in client.stream_job_logs("iris", JOB):
        assert text == "a\nb"
        break
    passed_on()
    assert capsys.readouterr().out == ""
