"""What each client sends to an operator, returns and raises."""

from __future__ import annotations

import io
import json
import pickle
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any, NoReturn

import pytest

from client_variants import Connect
from cortex.errors import (
    Conflict,
    CortexError,
    InvalidProject,
    InvalidRequest,
    InvalidSpec,
    NotFound,
    OperatorUnreachable,
)
from operator_stub import (
    LOST,
    RUNNING,
    SUBMITTED,
    SUCCEEDED,
    VIEW,
    Answer,
    OperatorStub,
    Request,
    answer,
    job_view,
)

DEPLOYED = [{"api": VIEW, "message": "created iris", "error": ""}]
PAGE: dict[str, Any] = {"job_statuses": [RUNNING], "next_cursor": 3}
SUBMIT = "POST /-/apis/iris/jobs"
FULL = answer({"kind": "storage.unavailable", "message": "the disk is full"}, 503)
YAML = "- name: iris\n  kind: TaskAPI\n  definition: {path: iris.py}\n"


def parts(request: Request) -> dict[str, Message]:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    whole = message_from_bytes(head + request.body)
    payload = whole.get_payload()
    assert isinstance(payload, list)
    messages = [part for part in payload if isinstance(part, Message)]
    assert len(messages) == len(payload)
    return {str(p.get_param("name", header="Content-Disposition")): p for p in messages}


def content(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    return payload


def unpacked(request: Request, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(content(parts(request)["project"]))) as tar:
        # Python 3.11.2, which is Debian 12's, has no filters.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        tar.extractall(folder)
    return folder


def on_pause(monkeypatch: pytest.MonkeyPatch, act: Callable[[float], object]) -> None:
    """Call `act` instead of each pause of a client."""

    async def pause(seconds: float) -> None:
        act(seconds)

    for module in ("transport", "transport_plain"):
        monkeypatch.setattr(f"cortex.sdk.{module}.sleep", act)
    monkeypatch.setattr("cortex.sdk.transport_async.asyncio.sleep", pause)


@contextmanager
def refusing() -> Iterator[int]:
    """A port that refuses connections, and that only a stub can take."""
    with socket.socket() as taken:
        # With this option a stub can listen on the port. `taken` does not listen, and the kernel
        # refuses connections.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_the_operators_answer_is_returned_unchanged(connect: Connect) -> None:
    answers: dict[str, Answer | list[Answer]] = {
        "GET /-/apis": answer([VIEW]),
        "GET /-/apis/iris": answer([VIEW]),
        "DELETE /-/apis/iris": answer({"message": "deleted iris"}),
        "POST /-/apis/iris/jobs": answer(SUBMITTED),
        "GET /-/apis/iris/jobs": answer(PAGE),
        "GET /-/apis/iris/jobs?status=status_running&limit=1&cursor=7": answer(PAGE),
        "GET /-/apis/iris/jobs/j1": answer(job_view(RUNNING)),
        "DELETE /-/apis/iris/jobs/j1": answer({"message": "stopped job j1"}),
        "GET /-/info": answer({"version": "1"}),
        "GET /-/cluster": answer({"nodes": []}),
    }
    with OperatorStub(answers) as stub, connect(stub.url) as client:
        assert client.list_apis() == [VIEW]
        assert client.get_api("iris") == VIEW
        assert client.get_job("iris", "j1") == job_view(RUNNING)
        assert client.list_jobs("iris") == PAGE
        assert client.list_jobs("iris", "status_running", limit=1, cursor=7) == PAGE
        assert client.submit_job("iris") == SUBMITTED
        assert client.submit_job("iris", {"C": 1}, timeout=5) == SUBMITTED
        assert client.stop_job("iris", "j1") == {"message": "stopped job j1"}
        assert client.delete_api("iris") == {"message": "deleted iris"}
        assert client.info() == {"version": "1"}
        assert client.cluster_info() == {"nodes": []}
    bodies = [json.loads(r.body) for r in stub.requests if r.method == "POST"]
    assert bodies == [{}, {"config": {"C": 1}, "timeout": 5}]


@pytest.mark.parametrize(
    "config",
    [{"C": object()}, {"C": float("nan")}, {"C": {1, 2}}, [1], "C"],
    ids=["object", "nan", "set", "list", "text"],
)
def test_a_config_that_is_no_json_is_not_sent(connect: Connect, config) -> None:  # type: ignore[no-untyped-def]
    with (
        OperatorStub({}) as stub,
        connect(stub.url) as client,
        pytest.raises(InvalidRequest, match="config"),
    ):
        client.submit_job("iris", config)
    assert not stub.requests


def test_a_wait_is_a_series_of_long_polls_until_the_job_has_ended(connect: Connect) -> None:
    path = "/-/apis/iris/jobs/j1?wait=20.0"
    with (
        OperatorStub(
            {f"GET {path}": [answer(job_view(RUNNING)), answer(job_view(SUCCEEDED))]}
        ) as stub,
        connect(stub.url) as client,
    ):
        job = client.get_job("iris", "j1", wait=3600)
    assert job["job_status"]["status"] == "status_succeeded"
    assert [r.path for r in stub.requests] == [path, path]


def test_a_wait_continues_after_temporary_failures(connect: Connect) -> None:
    path = "GET /-/apis/iris/jobs/j1?wait=20.0"
    outages = [LOST, FULL, Answer(502, (b"bad",), "text/plain")]
    with (
        OperatorStub(
            {path: [*outages, answer(job_view(RUNNING)), LOST, answer(job_view(SUCCEEDED))]}
        ) as stub,
        connect(stub.url) as client,
    ):
        assert client.get_job("iris", "j1", wait=3600) == job_view(SUCCEEDED)
    assert len(stub.requests) == 6


def test_a_wait_continues_after_refused_connections(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = OperatorStub({"GET /-/apis/iris/jobs/j1?wait=20.0": answer(job_view(SUCCEEDED))})
    with ExitStack() as stack:
        stub.port = stack.enter_context(refusing())
        on_pause(monkeypatch, lambda _: stack.enter_context(stub))
        client = stack.enter_context(connect(f"http://127.0.0.1:{stub.port}"))
        assert client.get_job("iris", "j1", wait=3600) == job_view(SUCCEEDED)
    assert len(stub.requests) == 1


def test_pauses_double_up_to_two_seconds(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    on_pause(monkeypatch, paused.append)
    path = "GET /-/apis/iris/jobs/j1?wait=20.0"
    with (
        OperatorStub({path: [FULL] * 7 + [answer(job_view(SUCCEEDED))]}) as stub,
        connect(stub.url) as client,
    ):
        client.get_job("iris", "j1", wait=3600)
    assert paused == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_a_failure_that_lasts_until_the_deadline_of_a_wait_is_raised(connect: Connect) -> None:
    with (
        refusing() as port,
        connect(f"http://127.0.0.1:{port}") as client,
        pytest.raises(OperatorUnreachable, match="no operator answers"),
    ):
        client.get_job("iris", "j1", wait=0.3)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """The seconds that clients have paused. Their clock counts pauses alone."""
    paused_s = 0.0

    def pause(seconds: float) -> None:
        nonlocal paused_s
        paused_s += seconds

    on_pause(monkeypatch, pause)
    for module in ("calls", "exchange"):
        monkeypatch.setattr(f"cortex.sdk.{module}.monotonic", lambda: paused_s)
    return lambda: paused_s


@pytest.mark.parametrize("resolves", [True, False])
def test_a_wait_is_short_if_no_operator_has_ever_answered(
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    slept: Callable[[], float],
    resolves: bool,
) -> None:
    def resolve(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "name does not resolve")

    with refusing() as port:
        url = f"http://127.0.0.1:{port}"
        if not resolves:
            monkeypatch.setattr(socket, "getaddrinfo", resolve)
            url = "http://mistyped.invalid:8888"
        with (
            connect(url) as client,
            pytest.raises(OperatorUnreachable, match=r"no operator answers .*cortex env configure"),
        ):
            client.get_job("iris", "j1", wait=60)
    assert 1 < slept() < 10


def test_a_wait_for_an_operator_that_has_answered_lasts_its_whole_time(
    connect: Connect, slept: Callable[[], float]
) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(refusing())
        with OperatorStub({"GET /-/info": answer({})}, port=port) as stub:
            client = stack.enter_context(connect(stub.url))
            client.info()
        with pytest.raises(OperatorUnreachable, match="no operator answers"):
            client.get_job("iris", "j1", wait=60)
    assert slept() == pytest.approx(60)


@pytest.mark.parametrize(
    ("first", "wait"),
    [(LOST, None), (FULL, None), (answer({}, 500), 3600), (answer({}, 404), 3600)],
)
def test_a_status_is_requested_once_without_a_wait_or_after_a_permanent_failure(
    connect: Connect, first: Answer, wait: float | None
) -> None:
    path = "GET /-/apis/iris/jobs/j1" + ("" if wait is None else "?wait=20.0")
    with (
        OperatorStub({path: [first, answer(job_view(SUCCEEDED))]}) as stub,
        connect(stub.url) as client,
        pytest.raises(CortexError),
    ):
        client.get_job("iris", "j1", wait=wait)
    assert len(stub.requests) == 1


def test_a_submit_whose_answer_was_lost_is_repeated_unchanged(connect: Connect) -> None:
    bad = Answer(502, (b"bad",), "text/plain")
    with (
        OperatorStub({SUBMIT: [LOST, FULL, LOST, bad, answer(SUBMITTED)]}) as stub,
        connect(stub.url) as c,
    ):
        assert c.submit_job("iris", {"C": 0.5, "ü": "\ud800"}, timeout=60) == SUBMITTED
        c.submit_job("iris")
    *repeated, other = stub.requests
    assert len(repeated) == 5
    (body,) = {request.body for request in repeated}
    assert json.loads(body) == {"config": {"C": 0.5, "ü": "\ud800"}, "timeout": 60}
    (key,) = {request.headers["idempotency-key"] for request in repeated}
    assert len(key) == 32
    assert other.headers["idempotency-key"] != key
    assert {request.headers["content-type"] for request in repeated} == {"application/json"}


def test_the_callers_idempotency_key_is_sent(connect: Connect) -> None:
    with OperatorStub({SUBMIT: [LOST, answer(SUBMITTED)]}) as stub, connect(stub.url) as client:
        client.submit_job("iris", idempotency_key="order 17")
    assert [r.headers["idempotency-key"] for r in stub.requests] == ["order 17"] * 2


@pytest.mark.parametrize("key", ["", "k" * 256, "a\nb", " a", "ä"])
def test_an_idempotency_key_that_no_header_can_carry_is_refused(connect: Connect, key: str) -> None:
    with (
        OperatorStub({}) as stub,
        connect(stub.url) as client,
        pytest.raises(InvalidRequest, match="idempotency key"),
    ):
        client.submit_job("iris", idempotency_key=key)
    assert not stub.requests


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("status", [404, 409, 429, 500])
def test_a_refused_submit_is_not_repeated(connect: Connect, lost: int, status: int) -> None:
    with (
        OperatorStub(
            {SUBMIT: [LOST] * lost + [answer({"kind": "k", "message": "no"}, status)]}
        ) as stub,
        connect(stub.url) as client,
        pytest.raises(CortexError, match=r"^no$"),
    ):
        client.submit_job("iris")
    assert len(stub.requests) == lost + 1


@pytest.mark.parametrize("first", [FULL, Answer(502, (b"bad",), "text/plain")])
def test_an_answer_to_the_first_submit_is_final(connect: Connect, first: Answer) -> None:
    with OperatorStub({SUBMIT: [first, answer(SUBMITTED)]}) as stub, connect(stub.url) as client:
        with pytest.raises(CortexError) as caught:
            client.submit_job("iris")
        assert caught.value.http_status == 503
    assert len(stub.requests) == 1


def test_a_submit_that_could_not_be_sent_raises_at_once(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_pause(monkeypatch, lambda seconds: pytest.fail(f"the client pauses for {seconds} s"))
    with (
        refusing() as port,
        connect(f"http://127.0.0.1:{port}") as client,
        pytest.raises(OperatorUnreachable, match="no operator answers"),
    ):
        client.submit_job("iris")
    with OperatorStub() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with (
            connect("https://operator.example") as client,
            pytest.raises(OperatorUnreachable, match="no operator answers"),
        ):
            client.submit_job("iris")


def test_the_error_of_an_unanswered_submit_contains_its_key(
    connect: Connect, slept: Callable[[], float]
) -> None:
    with OperatorStub({SUBMIT: LOST}) as stub, connect(stub.url) as client:
        with pytest.raises(OperatorUnreachable, match="not known whether") as caught:
            client.submit_job("iris")
        assert slept() == pytest.approx(60)
        assert len(stub.requests) > 2
        (key,) = {request.headers["idempotency-key"] for request in stub.requests}
        assert key in caught.value.message


def test_a_request_that_is_accepted_and_not_answered_in_time_is_unanswered(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.sdk.calls.RESPONSE_TIMEOUT_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        connect(f"http://127.0.0.1:{mute.getsockname()[1]}") as client,
        pytest.raises(OperatorUnreachable, match="within") as caught,
    ):
        client.get_job("iris", "j1")
    assert caught.value.is_unanswered


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_no_name_leads_to_another_path(connect: Connect, name: str) -> None:
    with (
        connect("http://127.0.0.1:9") as client,
        pytest.raises(NotFound),
    ):
        client.delete_api(name)
    with connect("http://127.0.0.1:9") as client, pytest.raises(NotFound):
        client.stop_job("iris", name)


def test_an_endpoint_can_have_a_path_and_names_are_escaped(connect: Connect) -> None:
    with (
        OperatorStub({"GET /proxied/-/apis/a%2Fb%3F": answer([VIEW])}) as stub,
        connect(f"{stub.url}/proxied/") as client,
    ):
        assert client.get_api("a/b?") == VIEW


def test_an_error_of_the_operator_is_raised_as_its_class(connect: Connect) -> None:
    body = {"kind": "conflict", "message": "it has finished"}
    with (
        OperatorStub({"DELETE /-/apis/iris/jobs/j1": answer(body, 409)}) as stub,
        connect(stub.url) as c,
        pytest.raises(Conflict, match="it has finished"),
    ):
        c.stop_job("iris", "j1")


@pytest.mark.parametrize(
    "response",
    [
        Answer(200, (b"<html>",), "text/html"),
        Answer(404, (b"<html>",), "text/html"),
        Answer(500, (b"[]",)),
        Answer(302),
    ],
)
def test_a_server_that_is_no_operator_is_reported(connect: Connect, response: Answer) -> None:
    with (
        OperatorStub({"GET /-/apis": response}) as stub,
        connect(stub.url) as client,
        pytest.raises(CortexError, match="not as a Cortex operator does"),
    ):
        client.list_apis()


def test_the_error_for_a_silent_operator_says_what_to_do(connect: Connect) -> None:
    with refusing() as port:
        url = f"http://127.0.0.1:{port}"
        with (
            connect(url, name="prod") as client,
            pytest.raises(OperatorUnreachable) as caught,
        ):
            client.list_apis()
    for words in (url, "'prod'", "cortex serve", "cortex env configure prod"):
        assert words in caught.value.message


def test_a_gateway_without_its_operator_is_unreachable(connect: Connect) -> None:
    with (
        OperatorStub({"GET /-/apis": Answer(502, (b"bad",), "text/plain")}) as stub,
        connect(stub.url) as client,
        pytest.raises(OperatorUnreachable, match="502"),
    ):
        client.list_apis()


def test_a_deploy_sends_the_file_and_the_folder_around_it(connect: Connect, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "iris.py").write_text("def task(config): ...\n")
    file = project / ".hidden.yaml"
    file.write_text(YAML)
    with OperatorStub({"POST /-/apis": answer(DEPLOYED)}) as stub, connect(stub.url) as client:
        assert client.deploy(file) == DEPLOYED
        client.deploy(file, force=False)
    first, second = (parts(r) for r in stub.requests)
    assert content(first["config"]).decode() == YAML
    assert first["config"].get_filename() == ".hidden.yaml"
    assert (content(first["force"]), content(second["force"])) == (b"true", b"false")
    assert (unpacked(stub.requests[0], tmp_path / "out") / "iris.py").exists()


def test_files_left_out_of_an_upload_are_a_warning(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/pyvenv.cfg").touch()
    (tmp_path / "cortex.yaml").write_text(YAML)
    warned = [{**DEPLOYED[0], "message": "created iris\nwarning: old", "warnings": ["old"]}]
    for sent in (DEPLOYED, warned):
        with OperatorStub({"POST /-/apis": answer(sent)}) as stub, connect(stub.url) as client:
            (done,) = client.deploy(tmp_path / "cortex.yaml")
        *before, warning = done["warnings"]
        assert warning.startswith("left out of the upload: venv/ (a virtual environment); if jobs")
        assert before == sent[0].get("warnings", [])
        assert done["message"] == f"{sent[0]['message']}\nwarning: {warning}"


def test_a_missing_or_invalid_file_is_not_sent(connect: Connect, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("- name: iris\n  kind: TaskAPI\n  definition: {pth: iris.py}\n")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe")
    with OperatorStub() as stub, connect(stub.url) as client:
        for file, words in (
            (wrong, "pth"),
            (binary, "UTF-8"),
            (tmp_path / "none.yaml", "cannot be read"),
        ):
            with pytest.raises(InvalidSpec, match=words):
                client.deploy(file)
    assert stub.requests == []


SPEC = {"name": "double", "kind": "TaskAPI", "definition": {"config": {"x": 1e-05, "y": "yes"}}}


def by_three(number: int) -> int:
    return number * 3


class Tripler:
    def __init__(self, by: int = 3) -> None:
        self.by = by

    def __call__(self, config: dict[str, int]) -> int:
        return by_three(config["x"])


def run_in_another_process(project: Path, expression: str) -> str:
    code = f"import task; print({expression})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_class_runs_on_machines_without_its_module(connect: Connect, tmp_path: Path) -> None:
    with OperatorStub({"POST /-/apis": answer(DEPLOYED)}) as stub, connect(stub.url) as client:
        assert client.create_api(SPEC, task=Tripler, requirements=["six"]) == DEPLOYED
    project = unpacked(stub.requests[0], tmp_path)
    assert run_in_another_process(project, "task.Task()({'x': 7})") == "21"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (project / "conda-packages.txt").read_text() == f"python={version}\n"
    assert (project / "requirements.txt").read_text().startswith("six\ncloudpickle==")
    from cortex.spec.cortex_yaml import read_apis

    config = content(parts(stub.requests[0])["config"]).decode()
    [api] = read_apis(config, "sent")
    assert api.definition.path == "task.py"
    assert api.definition.config == {"x": 1e-05, "y": "yes"}


def test_a_closure_runs_in_another_process(connect: Connect, tmp_path: Path) -> None:
    factor = 4
    with OperatorStub({"POST /-/apis": answer(DEPLOYED)}) as stub, connect(stub.url) as client:
        client.create_api(SPEC, task=lambda config: factor * by_three(config["x"]))
    project = unpacked(stub.requests[0], tmp_path)
    assert run_in_another_process(project, "task.task({'x': 2})") == "24"


def test_pickling_by_value_ends_with_the_call(connect: Connect) -> None:
    with OperatorStub({"POST /-/apis": answer(DEPLOYED)}) as stub, connect(stub.url) as client:
        client.create_api(SPEC, task=Tripler)
    import cloudpickle  # type: ignore[import-untyped]  # it ships no types

    assert cloudpickle.list_registry_pickle_by_value() == set()
    assert len(pickle.dumps(Tripler)) < 200


class NoCall:
    pass


class NeedsArguments:
    def __init__(self, needed: int) -> None: ...

    def __call__(self, config: object) -> None: ...


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (NoCall, "no method __call__"),
        (NeedsArguments, "needs arguments"),
        (lambda: None, "must take one argument"),
        (3, "it must be a function"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_anything_is_sent(
    connect: Connect, task: Any, words: str
) -> None:
    with (
        OperatorStub({"POST /-/apis": answer(DEPLOYED)}) as stub,
        connect(stub.url) as client,
        pytest.raises(InvalidProject, match=words),
    ):
        client.create_api(SPEC, task=task)
    assert stub.requests == []


def test_a_task_with_an_open_file_is_refused(connect: Connect, tmp_path: Path) -> None:
    with (
        (tmp_path / "open").open("w") as open_file,
        connect("http://127.0.0.1:9") as client,
        pytest.raises(InvalidProject, match="cannot be sent to another process"),
    ):
        client.create_api(SPEC, task=lambda config: open_file.write("x"))


def test_a_folder_is_sent_and_not_changed(connect: Connect, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "iris.py").write_text("def task(config): ...\n")
    spec = {"name": "iris", "kind": "TaskAPI", "definition": {"path": "iris.py"}}
    with OperatorStub({"POST /-/apis": answer(DEPLOYED)}) as stub, connect(stub.url) as client:
        client.create_api([spec, {**spec, "name": "again"}], project_dir=str(project))
    assert [p.name for p in project.iterdir()] == ["iris.py"]
    assert b"again" in content(parts(stub.requests[0])["config"])
    assert (unpacked(stub.requests[0], tmp_path / "out") / "iris.py").exists()


def test_create_api_takes_exactly_one_source(connect: Connect, tmp_path: Path) -> None:
    with connect("http://127.0.0.1:9") as client:
        both: dict[str, Any] = {"task": Tripler, "project_dir": tmp_path}
        for arguments in ({}, both):
            with pytest.raises(InvalidRequest, match="exactly one of"):
                client.create_api(SPEC, **arguments)
        with pytest.raises(InvalidRequest, match="goes with task="):
            client.create_api(SPEC, project_dir=tmp_path, requirements=["six"])
        with pytest.raises(InvalidRequest, match=r"definition\.command"):
            client.create_api({**SPEC, "definition": {"command": ["x"]}}, task=Tripler)
        with pytest.raises(InvalidRequest, match="has 2"):
            client.create_api([SPEC, SPEC], task=Tripler)
        with pytest.raises(InvalidProject, match="is not a folder"):
            client.create_api(SPEC, project_dir=tmp_path / "none")
        with pytest.raises(InvalidProject, match="must be a list of strings"):
            client.create_api(SPEC, task=Tripler, requirements="six")
        with pytest.raises(InvalidSpec, match="as JSON"):
            client.create_api({**SPEC, "definition": {"config": {"x": object()}}}, task=Tripler)


def test_create_api_takes_the_arguments_that_cortexs_does(connect: Connect, tmp_path: Path) -> None:
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = [f"conda-forge::python={own}.7", "pip=19.*"]
    with OperatorStub({"POST /-/apis": answer(DEPLOYED)}) as stub, connect(stub.url) as client:
        client.create_api(
            api_spec=SPEC,
            task=Tripler,
            requirements=None,
            conda_packages=packages,
            force=True,
            wait=True,
        )
        client.create_api(SPEC, task=Tripler, conda_packages=["pip=24"])
        with pytest.raises(InvalidProject, match=r"asks for 'python=2\.7'.*no other version runs"):
            client.create_api(SPEC, task=Tripler, conda_packages=["python=2.7"])
        with pytest.raises(InvalidProject, match="conda_packages is 'pip=24'"):
            client.create_api(SPEC, task=Tripler, conda_packages="pip=24")
        with pytest.raises(InvalidRequest, match=r"conda_packages= goes .* conda-packages\.txt"):
            client.create_api(SPEC, project_dir=tmp_path, conda_packages=["pip=24"])
    lines = [
        (unpacked(request, tmp_path / str(number)) / "conda-packages.txt").read_text().split("\n")
        for number, request in enumerate(stub.requests)
    ]
    assert lines == [[*packages, ""], [f"python={own}", "pip=24", ""]]


def test_deploy_and_delete_take_the_arguments_that_cortexs_do(
    connect: Connect, tmp_path: Path
) -> None:
    (tmp_path / "iris.py").write_text("def task(config): ...\n")
    spec = {"name": "iris", "kind": "TaskAPI", "definition": {"path": "iris.py"}}
    (tmp_path / "cortex.yaml").write_text(json.dumps([spec]))
    deleted, stopped = {"message": "deleted iris"}, {"message": "stopped job j1"}
    answers: dict[str, Answer | list[Answer]] = {
        "POST /-/apis": answer(DEPLOYED),
        "DELETE /-/apis/iris": answer(deleted),
        "DELETE /-/apis/iris/jobs/j1": answer(stopped),
    }
    with OperatorStub(answers) as stub, connect(stub.url) as client:
        assert client.deploy(spec, project_dir=tmp_path, wait=True) == DEPLOYED
        assert client.deploy(tmp_path / "cortex.yaml", wait=True) == DEPLOYED
        assert client.stop_job("iris", "j1", keep_cache=True) == stopped
        assert client.delete_api("iris", keep_cache=True) == deleted
        with pytest.raises(InvalidRequest, match="project_dir= goes with a dict"):
            client.deploy(tmp_path / "cortex.yaml", project_dir=tmp_path)
        with pytest.raises(InvalidRequest, match="exactly one of"):
            client.deploy(spec)
    assert len(stub.requests) == 4


@pytest.mark.parametrize(
    "config", [{1: "x"}, {"x": {None: 1}}, {"x": float("nan")}, {"x": [{2: 3}]}, {"x": {1, 2}}]
)
def test_a_spec_that_is_no_json_is_not_sent(connect: Connect, config: Any, tmp_path: Path) -> None:
    spec = {**SPEC, "definition": {"path": "iris.py", "config": config}}
    with (
        OperatorStub({}) as stub,
        connect(stub.url) as client,
        pytest.raises(InvalidSpec, match="api_spec cannot be written as JSON"),
    ):
        client.create_api(spec, project_dir=tmp_path)
    assert stub.requests == []


def test_the_newest_job_is_the_first_of_the_list(connect: Connect) -> None:
    with (
        OperatorStub({"GET /-/apis/iris/jobs?limit=1": answer(PAGE)}) as stub,
        connect(stub.url) as client,
    ):
        assert client.newest_job("iris") == PAGE["job_statuses"][0]


def test_a_result_with_an_error_raises_it(connect: Connect) -> None:
    failed = [{"api": None, "message": "", "error": "iris: the endpoint is taken"}]
    with (
        OperatorStub({"POST /-/apis": answer(failed)}) as stub,
        connect(stub.url) as client,
        pytest.raises(CortexError, match="endpoint is taken"),
    ):
        client.create_api(SPEC, task=Tripler)
