"""Clients that hold connections block neither other clients nor the engine.

An operator without tokens accepts connections from every client.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from cortex.sdk import Client
from operator_harness import PROBE, Operator, operator, probe_yaml, until

DESCRIPTORS = 256
MANY = 400  # more than the descriptors; connections get half of these


@pytest.fixture(scope="module")
def small_operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """An operator with few descriptors. Each running job needs some of them."""
    folder = tmp_path_factory.mktemp("few")
    with operator(folder, command_prefix=["prlimit", f"--nofile={DESCRIPTORS}"]) as running:
        running.deployed(probe_yaml(), {"probe.py": PROBE})
        yield running


@contextlib.contextmanager
def idle_connections(running: Operator, sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections on which a client sends these bytes, and nothing more."""
    parts = urlsplit(running.url)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(MANY):
            client = socket.create_connection((parts.hostname, parts.port), 60)
            stack.callback(client.close)
            client.sendall(sent)
            clients.append(client)
        yield clients


def descriptors(running: Operator) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def check_requests_and_jobs(running: Operator) -> None:
    with Client(running.url) as client:
        jobs = [
            client.submit_job("probe", config={"do": "sleep", "s": 1})["job_id"] for _ in range(10)
        ]
        for job_id in jobs:
            status = client.get_job("probe", job_id, wait=120)["job_status"]
            assert status["status"] == "status_succeeded", status
    assert descriptors(running) < DESCRIPTORS


def is_closed(client: socket.socket) -> bool:
    """Whether the operator has closed the connection, perhaps after an answer."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def await_closed(clients: list[socket.socket]) -> None:
    """Wait until no more connections are open than are allowed."""
    until(
        lambda: sum(not is_closed(each) for each in clients) <= DESCRIPTORS // 2,
        "the operator closes the others",
    )


ATTACKS = {
    "nothing": b"",
    "half-a-header": b"GET /probe HTTP/1.1\r\nHost: localhost\r\nX: ",
    "half-a-body": b"POST /probe HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "half-a-project": b"POST /-/apis HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n",
    "keep-alive": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "unread-answers": b"GET /-/openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
}


@pytest.mark.parametrize("sent", ATTACKS.values(), ids=ATTACKS)
def test_other_clients_work_beside_clients_with_idle_connections(
    small_operator: Operator, sent: bytes
) -> None:
    before = small_operator.log.read_text().count("Too many open files")
    with idle_connections(small_operator, sent) as clients:
        check_requests_and_jobs(small_operator)
        await_closed(clients)
    assert small_operator.log.read_text().count("Too many open files") == before


@pytest.mark.parametrize("is_followed", [True, False], ids=["followed", "polled"])
def test_other_clients_work_beside_clients_that_wait(
    small_operator: Operator, is_followed: bool
) -> None:
    endpoint = f"{small_operator.url}/probe"
    job = small_operator.submit(endpoint, config={"do": "sleep", "s": 300})
    small_operator.await_log(endpoint, job, "asleep")
    path = f"/probe/{job['job_id']}" + ("/logs" if is_followed else "?wait=300")
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    with Client(small_operator.url) as client:
        followed = client.stream_job_logs("probe", job["job_id"])
        assert "asleep" in next(followed)
        with idle_connections(small_operator, head.encode()) as clients:
            check_requests_and_jobs(small_operator)
            await_closed(clients)
            assert small_operator.delete(endpoint, job).status_code == 200
        # The client has resumed the log if the operator closed its connection.
        assert "asleep" not in "".join(followed)
