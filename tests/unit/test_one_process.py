"""A test in this folder that starts a process or a server fails (`conftest.py`)."""

from __future__ import annotations

import socket
import sys
from threading import Thread

import pytest

fails = pytest.mark.xfail(raises=pytest.fail.Exception, strict=True)


@fails
@pytest.mark.parametrize("event", ["subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"])
def test_a_test_that_starts_a_process_fails(event: str) -> None:
    sys.audit(event)


@fails
def test_a_test_whose_thread_starts_a_process_fails() -> None:
    thread = Thread(target=sys.audit, args=("subprocess.Popen",))
    thread.start()
    thread.join()


@pytest.fixture
def process() -> None:
    sys.audit("os.fork")


@fails
@pytest.mark.usefixtures("process")
def test_a_test_whose_fixture_starts_a_process_fails() -> None:
    pass


@fails
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_test_that_starts_a_server_fails(family: socket.AddressFamily) -> None:
    with socket.socket(family) as server:
        sys.audit("socket.bind", server, ("localhost", 0))


def test_a_socket_that_is_an_odd_file_is_allowed() -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        sys.audit("socket.bind", bound, "name")
