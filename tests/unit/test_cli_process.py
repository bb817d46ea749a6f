"""What only a process of its own shows: signals, pipes, what is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from client_stub import VIEW, Stub, answer, events

from cortex import __version__

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


def test_a_reader_that_goes_away_is_no_error(env: dict[str, str]) -> None:
    with Stub({"GET /-/apis": answer([VIEW] * 500)}) as stub:
        configure(stub.url, env)
        with subprocess.Popen(
            [*CORTEX, "get", "-o", "json"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == b""


def test_control_c_ends_a_command_quietly(env: dict[str, str]) -> None:
    first = b'event: log\nid: 2\ndata: "x\\n"\n\n'
    # Each answer ends after one line: the command reads it, and comes again until it is stopped.
    with Stub({"GET /-/apis/iris/jobs/j1/logs": events(first)}) as stub:
        configure(stub.url, env)
        with subprocess.Popen(
            [*CORTEX, "logs", "iris", "j1"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"x\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == b""
