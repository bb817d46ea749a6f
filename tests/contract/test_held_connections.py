"""Clients that hold connections, of which an operator without tokens takes any, keep nobody else from working:
neither from asking nor the engine from running jobs."""

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
MANY = 400  # more than there are descriptors, or places in half of them


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """An operator with few descriptors; each running job takes some."""
    folder = tmp_path_factory.mktemp("few")
    with operator(folder, within=["prlimit", f"--nofile={DESCRIPTORS}"]) as running:
        running.deployed(probe_yaml(), {"probe.py": PROBE})
        yield running


@contextlib.contextmanager
def held(running: Operator, sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections on which this was sent, and nothing more is."""
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


def assert_all_work(running: Operator) -> None:
    with Client(running.url) as client:
        jobs = [
            client.submit_job("probe", config={"do": "sleep", "s": 1})["job_id"] for _ in range(10)
        ]
        for job_id in jobs:
            told = client.get_job("probe", job_id, wait=120)["job_status"]
            assert told["status"] == "status_succeeded", told
    assert descriptors(running) < DESCRIPTORS


def is_cut(client: socket.socket) -> bool:
    """Whether it has ended, after whatever was answered."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def await_cut(clients: list[socket.socket]) -> None:
    """Only as many as may be are left."""
    until(lambda: sum(not is_cut(each) for each in clients) <= DESCRIPTORS // 2, "they are cut")


ATTACKS = {
    "nothing": b"",
    "half-a-header": b"GET /probe HTTP/1.1\r\nHost: localhost\r\nX: ",
    "half-a-body": b"POST /probe HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "half-a-project": b"POST /-/apis HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n",
    "kept": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "kept-and-unread": b"GET /-/openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
}


@pytest.mark.parametrize("sent", ATTACKS.values(), ids=ATTACKS)
def test_others_work_beside_clients_that_hold_connections(few: Operator, sent: bytes) -> None:
    before = few.log.read_text().count("Too many open files")
    with held(few, sent) as clients:
        assert_all_work(few)
        await_cut(clients)
    assert few.log.read_text().count("Too many open files") == before


@pytest.mark.parametrize("is_followed", [True, False], ids=["followed", "polled"])
def test_others_work_beside_clients_that_wait(few: Operator, is_followed: bool) -> None:
    endpoint = f"{few.url}/probe"
    job = few.submit(endpoint, config={"do": "sleep", "s": 300})
    few.await_log(endpoint, job, "asleep")
    path = f"/probe/{job['job_id']}" + ("/logs" if is_followed else "?wait=300")
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
    with Client(few.url) as client:
        followed = client.stream_job_logs("probe", job["job_id"])
        assert "asleep" in next(followed)
        with held(few, head.encode()) as clients:
            assert_all_work(few)
            await_cut(clients)
            assert few.delete(endpoint, job).status_code == 200
        # Where its own connection was cut it has begun again where it was.
        assert "asleep" not in "".join(followed)
