"""The command in a process of its own: signals, pipes, closed streams, loaded modules."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import preloaded_cli
from cortex import __version__
from operator_harness import WAIT_TIMEOUT_S
from operator_stub import (
    SUBMITTED,
    SUCCEEDED,
    VIEW,
    Answer,
    OperatorStub,
    answer,
    events,
    job_view,
)

CORTEX = [sys.executable, "-m", "cortex.cli.main"]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(tmp_path)}


def configure(url: str, env: dict[str, str]) -> None:
    subprocess.run(
        [*CORTEX, "env", "configure", "here", "--operator-endpoint", url],
        env=env,
        check=True,
        capture_output=True,
    )


def start(env: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
    """Start the command."""
    return subprocess.Popen(
        [*CORTEX, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_version(env: dict[str, str]) -> None:
    for words in (["version"], ["--version"]):
        done = subprocess.run([*CORTEX, *words], env=env, check=True, capture_output=True)
        assert done.stdout.decode().strip() == __version__


def test_help_loads_neither_the_operator_nor_the_client(env: dict[str, str]) -> None:
    code = (
        "import sys; from cortex.cli.main import run; run(['--help']);"
        "heavy = {'cortex.operator', 'httpx', 'sqlalchemy', 'fastapi', 'pydantic', 'rich'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_command_loads_no_module_that_it_does_not_need(env: dict[str, str]) -> None:
    code = (
        "import sys; from cortex.cli.main import run; run(['get', '-o', 'json']);"
        "heavy = {'cortex.operator', 'asyncio', 'rich', 'click', 'pygments'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    with OperatorStub({"GET /-/apis": answer([VIEW])}) as stub:
        configure(stub.url, env)
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, check=False
        )
    assert done.returncode == 0, done.stderr.decode()


def test_a_reader_that_closes_the_pipe_is_no_error(env: dict[str, str]) -> None:
    with OperatorStub({"GET /-/apis": answer([VIEW] * 500)}) as stub:
        configure(stub.url, env)
        with start(env, "get", "-o", "json") as process:
            assert process.stdout and process.stderr
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""


JOB = str(SUBMITTED["job_id"])
COMMANDS = [
    "--help",
    "version",
    "env list",
    "env list -o json",
    "get",
    "get iris",
    f"get iris {JOB} -o json",
    "submit iris -o json",
    "submit iris --wait --config {}",
    "logs iris j1",
    "delete iris --force",
    f"delete iris {JOB} -o json",
    "serve --show-config",
]


@pytest.fixture
def operator(env: dict[str, str]) -> Iterator[OperatorStub]:
    path = f"/-/apis/iris/jobs/{JOB}"
    with OperatorStub(
        {
            "GET /-/apis": answer([VIEW]),
            "GET /-/apis/iris": answer([VIEW]),
            "DELETE /-/apis/iris": answer({"message": "deleted iris"}),
            "POST /-/apis/iris/jobs": answer(SUBMITTED),
            f"GET {path}": answer(job_view(SUCCEEDED)),
            f"GET {path}?wait=20.0": answer(job_view(SUCCEEDED)),
            f"DELETE {path}": answer({"message": f"stopped job {JOB}"}),
            "GET /-/apis/iris/jobs/j1/logs": events(
                b'event: log\nid: 2\ndata: "x\\n"\n\nevent: end\ndata: {}\n\n'
            ),
        }
    ) as stub:
        configure(stub.url, env)
        yield stub


def redirected(command: str, to: str, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Run the command with redirections of the shell."""
    shell = ["sh", "-c", f'exec "$@" {to}', "sh", *CORTEX, *shlex.split(command)]
    return subprocess.run(shell, env=env, capture_output=True, check=False, timeout=WAIT_TIMEOUT_S)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("command", COMMANDS)
def test_output_to_a_full_disk_is_an_error_in_one_line(
    command: str, env: dict[str, str], tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full, (tmp_path / "err").open("w+") as err:
        program = preloaded_cli.start(
            *shlex.split(command), stdin=0, stdout=full.fileno(), stderr=err.fileno(), env=env
        )
        assert program.wait(WAIT_TIMEOUT_S) == 1
        err.seek(0)
        assert err.read() == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("command", ["--help", "get", "submit iris -o json"])
def test_a_closed_stdout_is_an_error_in_one_line(command: str, env: dict[str, str]) -> None:
    done = redirected(command, ">&-", env)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"error: standard output cannot be written: Bad file descriptor\n"


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(
    ("command", "code"),
    [("get -o json", 0), ("get nope", 1), ("gte", 2), ("delete iris", 2), ("env configure x", 2)],
)
def test_a_command_with_a_full_stderr_does_the_same(
    command: str, code: int, env: dict[str, str], tmp_path: Path
) -> None:
    whole = preloaded_cli.run(*shlex.split(command), env=env)
    with Path("/dev/full").open("w") as full, (tmp_path / "out").open("w+") as out:
        program = preloaded_cli.start(
            *shlex.split(command), stdin=0, stdout=out.fileno(), stderr=full.fileno(), env=env
        )
        assert program.wait(WAIT_TIMEOUT_S) == whole.returncode == code
        out.seek(0)
        assert out.read() == whole.stdout


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(("command", "code"), [("get nope", 1), ("gte", 2)])
def test_a_command_with_a_closed_stderr_does_the_same(
    command: str, code: int, env: dict[str, str]
) -> None:
    done = redirected(command, "2>&-", env)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_a_command_without_any_stream_does_its_work(
    operator: OperatorStub, env: dict[str, str]
) -> None:
    for command in ("get", f"delete iris {JOB}", "env configure y --operator-endpoint http://y:1"):
        assert redirected(command, "<&- >&- 2>&-", env).returncode == 1
    assert [r.method for r in operator.requests] == ["GET", "DELETE"]
    listed = redirected("env list -o json", "<&-", env)
    names = [each["name"] for each in json.loads(listed.stdout)["environments"]]
    assert (listed.returncode, names) == (0, ["here", "y"])


def test_a_token_is_not_read_from_a_closed_stdin(env: dict[str, str]) -> None:
    done = redirected("env configure z --operator-endpoint http://z:1 --token -", "<&-", env)
    assert done.returncode == 2
    assert b"the token is invalid" in done.stderr


def test_a_non_blocking_pipe_gets_the_whole_output(
    operator: OperatorStub, env: dict[str, str]
) -> None:
    operator.answers["GET /-/apis"] = answer([VIEW] * 500)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with subprocess.Popen([*CORTEX, "get", "-o", "json"], env=env, stdout=write_end) as process:
        os.close(write_end)
        with open(read_end) as out:  # noqa: PTH123  # a descriptor
            assert json.load(out) == [VIEW] * 500
    assert process.returncode == 0


def test_control_c_ends_a_command_quietly(env: dict[str, str]) -> None:
    first = b'event: log\nid: 2\ndata: "x\\n"\n\n'
    # Each answer ends after one line: the command reads it and reconnects until it is stopped.
    with OperatorStub({"GET /-/apis/iris/jobs/j1/logs": events(first)}) as stub:
        configure(stub.url, env)
        with start(env, "logs", "iris", "j1") as process:
            assert process.stdout and process.stderr
            assert process.stdout.readline() == b"x\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == b""


def test_control_c_ends_a_wait_and_not_the_job(env: dict[str, str]) -> None:
    job = str(SUBMITTED["job_id"])
    requested, ended = threading.Event(), threading.Event()

    def nothing_yet() -> Iterator[bytes]:
        requested.set()
        ended.wait(WAIT_TIMEOUT_S)
        yield from ()

    answers: dict[str, Answer | list[Answer]] = {
        "POST /-/apis/iris/jobs": answer(SUBMITTED),
        f"GET /-/apis/iris/jobs/{job}?wait=20.0": Answer(200, nothing_yet()),
    }
    with OperatorStub(answers) as stub:
        configure(stub.url, env)
        with start(env, "submit", "iris", "--wait") as process:
            assert process.stderr
            try:
                assert requested.wait(WAIT_TIMEOUT_S)
                process.send_signal(signal.SIGINT)
                assert process.wait(WAIT_TIMEOUT_S) == 130
            finally:
                ended.set()
            (note,) = process.stderr.read().decode().splitlines()
            assert f"cortex get iris {job}" in note
        assert [r.method for r in stub.requests] == ["POST", "GET"]
