"""The output and exit code of each command. The commands run in this process, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cortex.cli import serve
from cortex.cli.main import run
from cortex.sdk import environments
from operator_harness import FINAL
from operator_stub import (
    LOST,
    RUNNING,
    SUBMITTED,
    SUCCEEDED,
    VIEW,
    Answer,
    OperatorStub,
    answer,
    events,
    job_view,
)

JOB = str(SUBMITTED["job_id"])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORTEX_CLI_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    return tmp_path


@pytest.fixture
def stub() -> Iterator[OperatorStub]:
    with OperatorStub(
        {
            "GET /-/apis": answer([VIEW]),
            "GET /-/apis/iris": answer([VIEW]),
            "DELETE /-/apis/iris": answer({"message": "deleted iris"}),
            "POST /-/apis/iris/jobs": answer(SUBMITTED),
            f"GET /-/apis/iris/jobs/{JOB}": answer(job_view(SUCCEEDED)),
            "GET /-/apis/iris/jobs/waiting": answer(job_view(RUNNING)),
            f"DELETE /-/apis/iris/jobs/{JOB}": answer({"message": f"stopped job {JOB}"}),
        }
    ) as started:
        environments.configure("here", started.url)
        yield started


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("get -o json", [VIEW]),
        ("get --output json -e here", [VIEW]),
        ("get -o json iris", [VIEW]),
        ("get iris --env here --output json", [VIEW]),
        (f"get iris {JOB} -o json", job_view(SUCCEEDED)),
        (f"get -o json -e here iris {JOB}", job_view(SUCCEEDED)),
        ("submit iris -o json", SUBMITTED),
        ("delete iris -f -o json", {"message": "deleted iris"}),
        ("delete --force iris -o json", {"message": "deleted iris"}),
        ("delete -y -o json iris", {"message": "deleted iris"}),
        (f"delete iris {JOB} -o json", {"message": f"stopped job {JOB}"}),
    ],
)
def test_json_is_the_operators_answer_and_nothing_else(
    command: str, expected: object, stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.split()) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == expected
    assert printed.err == ""


@pytest.mark.parametrize("command", ["get", "get iris", f"get iris {JOB}", "env list"])
def test_piped_tables_have_no_colours_and_are_not_truncated(
    command: str, stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command.split()) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "…" not in out
    if "iris" in command:
        assert JOB in out
    if command == "get":
        heading, row = out.splitlines()
        assert heading.split("  ")[0] == "env"
        assert row.split()[:5] == ["here", "iris", "TaskAPI", "http://127.0.0.1:8888/iris", "1"]


def test_a_job_is_shown_with_its_status_in_words(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["get", "iris", JOB]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["status"].strip() == "succeeded"
    assert lines["duration"].strip() == "1m2s"
    assert lines["config"].strip() == '{"C": 0.5}'
    assert lines["result"].strip() == '{"accuracy": 0.9, "note": "[bold]größer"}'
    assert lines["endpoint"].strip().endswith(JOB)


def test_a_waiting_job_is_shown_with_the_reason(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["get", "iris", "waiting"]) == 0
    out = capsys.readouterr().out
    assert "running (waiting)" in out
    assert "needs 32 GiB, 31 GiB free" in out


def test_control_characters_of_a_job_do_not_reach_the_terminal(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    nasty = {**SUCCEEDED, "status": "status_worker_error", "message": "\x1b]0;owned\x07 [red]x"}
    stub.answers[f"GET /-/apis/iris/jobs/{JOB}"] = answer(job_view(nasty))
    assert run(["get", "iris", JOB]) == 0
    out = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07 [red]x" in out
    assert "\x1b" not in out


def test_watching_a_job_ends_when_the_job_ends(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["get", "iris", JOB, "--watch"]) == 0
    assert "succeeded" in capsys.readouterr().out
    assert run(["get", "-w", "-o", "json"]) == 2


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command pauses neither in a wait nor between two polls."""
    monkeypatch.setattr("cortex.cli.jobs._LONG_POLL_S", 0)
    monkeypatch.setattr("cortex.cli.get._POLL_INTERVAL_S", 0)
    monkeypatch.setattr("cortex.cli.waiting._RETRY_DELAY_S", 0)


FULL = answer({"kind": "storage.unavailable", "message": "the disk is full"}, 503)
TWO_OUTAGES = [
    answer(job_view(RUNNING)),
    LOST,
    LOST,
    answer(job_view(RUNNING)),
    FULL,
    answer(job_view(SUCCEEDED)),
]


def check_two_outages(err: str) -> None:
    first, on, back, second, *rest = err.splitlines()
    assert "the connection to the operator" in first
    assert second == "the disk is full"
    assert rest == [on, back]
    assert (on, back) == ("Retrying until the operator answers.", "The operator answers again.")


@pytest.mark.usefixtures("no_pauses")
def test_watching_continues_after_an_outage_of_the_operator(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers[f"GET /-/apis/iris/jobs/{JOB}"] = list(TWO_OUTAGES)
    assert run(["get", "iris", JOB, "--watch"]) == 0
    printed = capsys.readouterr()
    check_two_outages(printed.err)
    statuses = [line.split()[1] for line in printed.out.splitlines() if line[:6] == "status"]
    assert statuses == ["running", "running", "succeeded"]


@pytest.mark.usefixtures("no_pauses")
def test_watching_ends_after_a_permanent_failure_and_if_the_first_poll_fails(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    not_found = answer({"kind": "not_found", "message": "it is gone"}, 404)
    stub.answers["GET /-/apis/iris"] = [answer([VIEW]), not_found]
    assert run(["get", "iris", "--watch"]) == 1
    assert capsys.readouterr().err == "error: it is gone\n"
    stub.answers["GET /-/apis"] = FULL
    assert run(["get", "--watch"]) == 1
    assert capsys.readouterr() == ("", "error: the disk is full\n")


def test_submit_waits_for_the_end_and_shows_it(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.cli.jobs._LONG_POLL_S", 3600)
    path = f"GET /-/apis/iris/jobs/{JOB}"
    ended = stub.answers[path]
    assert isinstance(ended, Answer)
    stub.answers[f"{path}?wait=20.0"] = [answer(job_view(RUNNING)), ended]
    assert run(["get", "iris", JOB]) == 0
    shown = capsys.readouterr().out
    assert run(["submit", "iris", "--wait"]) == 0
    submitted, _, _, _, *status = capsys.readouterr().out.splitlines()
    assert submitted == f"submitted job {JOB}"
    assert status == shown.splitlines()
    assert run(["submit", "iris", "--wait", "-o", "json"]) == 0
    printed = capsys.readouterr()
    assert (json.loads(printed.out), printed.err) == (job_view(SUCCEEDED), "")


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("status", sorted(FINAL - {"status_succeeded"}))
def test_a_wait_for_a_job_without_success_exits_3(
    status: str, stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = job_view({**SUCCEEDED, "status": status})
    stub.answers[f"GET /-/apis/iris/jobs/{JOB}"] = answer(ended)
    assert run(["submit", "iris", "--wait", "-o", "json"]) == 3
    printed = capsys.readouterr()
    assert (json.loads(printed.out), printed.err) == (ended, "")
    assert run(["submit", "iris", "--wait"]) == 3
    assert "\nstatus" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pauses")
def test_a_wait_continues_after_an_outage_of_the_operator(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers[f"GET /-/apis/iris/jobs/{JOB}"] = list(TWO_OUTAGES)
    assert run(["submit", "iris", "--wait", "-o", "json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == job_view(SUCCEEDED)
    check_two_outages(printed.err)


@pytest.mark.usefixtures("no_pauses")
def test_a_wait_that_fails_names_the_job(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    not_found = answer({"kind": "not_found", "message": "it is gone"}, 404)
    stub.answers[f"GET /-/apis/iris/jobs/{JOB}"] = not_found
    assert run(["submit", "iris", "--wait", "-o", "json"]) == 1
    printed = capsys.readouterr()
    note, error = printed.err.splitlines()
    assert f"cortex get iris {JOB}" in note
    assert (printed.out, error) == ("", "error: it is gone")


def test_submit_takes_its_config_inline_or_from_a_file(stub: OperatorStub, folder: Path) -> None:
    (folder / "config.json").write_text('{"C": 2}')
    assert run(["submit", "iris", "--config", '{"C": 1}', "--timeout", "60"]) == 0
    assert run(["submit", "--config", f"@{folder}/config.json", "iris"]) == 0
    assert [json.loads(r.body) for r in stub.requests] == [
        {"config": {"C": 1}, "timeout": 60},
        {"config": {"C": 2}},
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_config_can_begin_with_a_byte_order_mark(
    mark: bytes, stub: OperatorStub, folder: Path
) -> None:
    text = mark + '{"name": "größer"}\r\n'.encode()
    (folder / "config.json").write_bytes(text)
    assert run(["submit", "iris", "--config", f"@{folder}/config.json"]) == 0
    assert run(["submit", "iris", "--config", text.decode()]) == 0
    sent = [json.loads(r.body) for r in stub.requests]
    assert sent == [{"config": {"name": "größer"}}] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16 or UTF-32; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-be"), "UTF-16 or UTF-32; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16 or UTF-32; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-32"), "UTF-16 or UTF-32; save it as UTF-8"),
        ('{"a": "ü"}'.encode("latin-1"), "not text in UTF-8 (byte 7 is 0xfc)"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (b"[1]", "must be a JSON object"),
        (b"{'a': 1}", "it is not JSON"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": "' + b"x" * (10 << 20) + b'"}', "over 10 MiB"),
        (b"\x80\x04\x95\x01", "not text in UTF-8"),
    ],
)
def test_an_invalid_config_file_is_reported_in_one_line(
    content: bytes, words: str, stub: OperatorStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "c.json").write_bytes(content)
    assert run(["submit", "iris", "--config", f"@{folder}/c.json"]) == 2
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert error.startswith("error: --config: ")
    assert words in error
    assert (printed.out, stub.requests) == ("", [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "the name of a file is missing after @"),
        ("{folder}", "Is a directory"),
        ("{folder}/none", "No such file"),
        ("~nobody-of-this-name/c.json", "cannot be read"),
        ("/dev/zero", "over 10 MiB"),
        ("/dev/null", "is empty"),
    ],
)
def test_an_unreadable_config_file_is_reported(
    name: str, words: str, stub: OperatorStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["submit", "iris", "--config", f"@{name.format(folder=folder)}"]) == 2
    assert words in capsys.readouterr().err
    assert stub.requests == []


def test_submit_sends_its_idempotency_key(stub: OperatorStub) -> None:
    assert run(["submit", "iris", "--idempotency-key", "order-17"]) == 0
    assert [r.headers["idempotency-key"] for r in stub.requests] == ["order-17"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["submit", "iris", "--config", "[1]"], "must be a JSON object"),
        (["submit", "iris", "--config", "{"], "it is not JSON"),
        (["submit", "iris", "--config", '{"x": NaN}'], "NaN"),
        (["submit", "iris", "--config", "@/none"], "cannot be read"),
        (["submit", "iris", "--timeout", "0"], "--timeout"),
        (["submit"], "API"),
        (["get", "-o", "xml"], "xml"),
        (["gte"], "gte"),
        (["env", "configure", "x", "--operator-endpoint", "nowhere"], "not an operator's URL"),
        (["env", "configure", "x"], "--operator-endpoint"),
        (["delete", "iris"], "pass --force"),
    ],
)
def test_an_invalid_command_exits_2_and_sends_no_request(
    command: list[str],
    words: str,
    stub: OperatorStub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(command) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
    assert stub.requests == []


def test_an_error_is_one_message_on_stderr(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers["GET /-/apis/nope"] = answer(
        {"kind": "not_found", "message": "there is no API nope"}, 404
    )
    assert run(["get", "nope", "-o", "json"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: there is no API nope\n")
    assert run(["get", "-e", "nowhere"]) == 1
    assert "no environment 'nowhere'" in capsys.readouterr().err


def test_logs_are_printed_unchanged(stub: OperatorStub, capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]no markup[/]\r\n\x1b[31mred\x1b[0m without end"
    stub.answers["GET /-/apis/iris/jobs/j1/logs"] = events(
        f"event: log\nid: 5\ndata: {json.dumps(text)}\n\nevent: end\ndata: {{}}\n\n".encode()
    )
    assert run(["logs", "iris", "j1"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("flag", ["-f", "--follow"])
def test_a_log_is_followed_with_the_usual_flags(
    flag: str, stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers["GET /-/apis/iris/jobs/j1/logs"] = events(
        b'event: log\nid: 5\ndata: "text"\n\nevent: end\ndata: {}\n\n'
    )
    assert run(["logs", flag, "iris", "j1"]) == 0
    assert capsys.readouterr().out == "text"


def test_a_log_is_printed_up_to_its_present_end(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[bold]größer\r\n\x1b[31mred\x1b[0m".encode()
    # The pieces split one character, and the last character is incomplete.
    pieces = (text[:9], text[9:], "ü".encode()[:1])
    stub.answers["GET /-/apis/iris/jobs/j1/logs"] = Answer(200, pieces, "text/plain; charset=utf-8")
    assert run(["logs", "iris", "j1", "--no-follow"]) == 0
    assert capsys.readouterr() == (f"{text.decode()}\ufffd", "")
    assert "text/event-stream" not in stub.requests[-1].headers["accept"]
    assert run(["logs", "iris", "j2", "--no-follow"]) == 1
    assert capsys.readouterr().out == ""


def test_deleting_an_api_asks_on_a_terminal(
    stub: OperatorStub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("n\ny\n"))
    assert run(["delete", "iris", "-o", "json"]) == 1
    printed = capsys.readouterr()
    assert "stop its 1 running job?" in printed.err
    assert printed.out == ""
    assert run(["delete", "iris", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"message": "deleted iris"}


def test_deploy_prints_each_result_and_fails_if_one_failed(
    stub: OperatorStub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [
        {"api": VIEW, "message": "created iris", "error": ""},
        {"api": None, "message": "", "error": "other: its endpoint is taken"},
    ]
    (folder / "task.py").write_text("def task(config): ...\n")
    file = folder / ".cortex-probe.yaml"
    file.write_text("- {name: iris, kind: TaskAPI, definition: {path: task.py}}\n")
    stub.answers["POST /-/apis"] = answer(results[:1])
    assert run(["deploy", str(file)]) == 0
    assert capsys.readouterr().out == "created iris\n  http://127.0.0.1:8888/iris\n"

    stub.answers["POST /-/apis"] = answer(results)
    assert run(["deploy", "-f", "-y", "-o", "json", "--env", "here", str(file)]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == results
    assert printed.err == "error: other: its endpoint is taken\n"


def test_environments_are_configured_without_a_question(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["env", "list", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"default_environment": None, "environments": []}
    assert run(["env", "configure", "a", "--operator-endpoint", "http://a:1"]) == 0
    assert capsys.readouterr().out == "configured a: http://a:1 (the default)\n"
    assert run(["env", "configure", "--operator-endpoint", "http://b:1", "b"]) == 0
    assert capsys.readouterr().out == "configured b: http://b:1\n"
    assert run(["env", "default", "b"]) == 0
    assert run(["env", "delete", "a"]) == 0
    capsys.readouterr()
    assert run(["env", "list", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "default_environment": "b",
        "environments": [{"name": "b", "operator_endpoint": "http://b:1"}],
    }
    assert run(["env", "delete", "zzz"]) == 1


def test_an_operator_continues_if_its_standard_output_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        serve._announce("http://localhost:8888")
        full.write("more")
        full.flush()
