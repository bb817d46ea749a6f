"""What only a process of its own shows: signals, pipes, what is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from client_stub import SUBMITTED, VIEW, Answer, Stub, answer, events

from cortex import __version__
from support import PATIENCE_S

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


def started(env: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
    """The command, as it runs."""
    return subprocess.Popen(
        [*CORTEX, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_version(env: dict[str, str]) -> None:
    for words in (["version"], ["--version"]):
        done = subprocess.run([*CORTEX, *words], env=env, check=True, capture_output=True)
        assert done.stdout.decode().strip() == __version__


def test_help_loads_neither_operator_nor_client(env: dict[str, str]) -> None:
    code = (
        "import sys; from cortex.cli.main import run; run(['--help']);"
        "heavy = {'cortex.operator', 'httpx', 'sqlalchemy', 'fastapi', 'pydantic', 'rich'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_command_loads_what_it_needs_and_no_more(env: dict[str, str]) -> None:
    code = (
        "import sys; from cortex.cli.main import run; run(['get', '-o', 'json']);"
        "heavy = {'cortex.operator', 'asyncio', 'rich', 'click', 'pygments'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    with Stub({"GET /-/apis": answer([VIEW])}) as stub:
        configure(stub.url, env)
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, check=False
        )
    assert done.returncode == 0, done.stderr.decode()


def test_a_reader_that_goes_away_is_no_error(env: dict[str, str]) -> None:
    with Stub({"GET /-/apis": answer([VIEW] * 500)}) as stub:
        configure(stub.url, env)
        with started(env, "get", "-o", "json") as process:
            assert process.stdout and process.stderr
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""


def test_control_c_ends_a_command_quietly(env: dict[str, str]) -> None:
    first = b'event: log\nid: 2\ndata: "x\\n"\n\n'
    # Each answer ends after one line: the command reads it, and comes again until it is stopped.
    with Stub({"GET /-/apis/iris/jobs/j1/logs": events(first)}) as stub:
        configure(stub.url, env)
        with started(env, "logs", "iris", "j1") as process:
            assert process.stdout and process.stderr
            assert process.stdout.readline() == b"x\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == b""


def test_control_c_ends_a_wait_and_not_the_job(env: dict[str, str]) -> None:
    job = str(SUBMITTED["job_id"])
    asked, ended = threading.Event(), threading.Event()

    def nothing_yet() -> Iterator[bytes]:
        asked.set()
        ended.wait(PATIENCE_S)
        yield from ()

    answers: dict[str, Answer | list[Answer]] = {
        "POST /-/apis/iris/jobs": answer(SUBMITTED),
        f"GET /-/apis/iris/jobs/{job}?wait=20.0": Answer(200, nothing_yet()),
    }
    with Stub(answers) as stub:
        configure(stub.url, env)
        with started(env, "submit", "iris", "--wait") as process:
            assert process.stderr
            try:
                assert asked.wait(PATIENCE_S)
                process.send_signal(signal.SIGINT)
                assert process.wait(PATIENCE_S) == 130
            finally:
                ended.set()
            (told,) = process.stderr.read().decode().splitlines()
            assert f"cortex get iris {job}" in told
        assert [r.method for r in stub.requests] == ["POST", "GET"]
