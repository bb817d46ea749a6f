"""The operator's link to Ray's driver process, with a process that stands for the driver."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading

import pytest
from structlog.testing import capture_logs

from cortex.engines.ray.link import Link, LinkError, NotSent


def test_a_link_that_is_cancelled_while_its_process_starts_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started, go_on = threading.Event(), threading.Event()
    started_processes: list[subprocess.Popen[bytes]] = []

    def popen(_: Link, theirs: socket.socket) -> subprocess.Popen[bytes]:
        code = f"import socket; socket.socket(fileno={theirs.fileno()}).recv(1)"
        started_processes.append(
            subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
        )
        started.set()
        assert go_on.wait(60)
        return started_processes[0]

    monkeypatch.setattr(Link, "_popen", popen)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as head:
            link = Link(f"127.0.0.1:{head.getsockname()[1]}", "namespace", None)
            opening = asyncio.create_task(link.open(60))
            assert await asyncio.to_thread(started.wait, 60)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            go_on.set()
            assert await asyncio.to_thread(started_processes[0].wait, 60) is not None

    try:
        asyncio.run(main())
    finally:
        go_on.set()
        started_processes[0].kill()
        started_processes[0].wait()


DRIVER = """
import pickle, socket, struct, sys
from cortex.engines.ray.link import HEAD, Answer
sock = socket.socket(fileno={fd})

def send(number, answer):
    data = pickle.dumps(answer)
    sock.sendall(HEAD.pack(len(data), number) + data)

def receive(length):
    data = b""
    while len(data) < length:
        data += sock.recv(length - len(data))
    return data

send(0, Answer())
for _ in range(3):
    length, number = HEAD.unpack(receive(HEAD.size))
    receive(length)
    send(number, Answer(unreachable="a sentence", detail="rpc_code: 14"))
length, number = HEAD.unpack(receive(HEAD.size))
print("[2026-11-29 16:32:31,811 E 1 2] rpc_client.h:204: Failed to connect to GCS within 60 "
      "seconds. GCS may have been killed.\\n*** SIGABRT ***", flush=True)
"""


def test_errors_are_sentences_and_the_log_has_the_whole_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def popen(self: Link, theirs: socket.socket) -> subprocess.Popen[bytes]:
        code = DRIVER.replace("{fd}", str(theirs.fileno()))
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=self._output)

    monkeypatch.setattr(Link, "_popen", popen)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as head:
            link = Link(f"127.0.0.1:{head.getsockname()[1]}", "namespace", None)
            await link.open(60)
            for node in ("a", "a", "b"):
                with pytest.raises(LinkError) as raised:
                    await link.call("call_agent", node, timeout_s=60)
                assert str(raised.value) == "a sentence"
            with pytest.raises(LinkError) as raised:
                await link.call("node_states", timeout_s=60)
            assert str(raised.value) == (
                "the link to the Ray cluster broke: the head of the Ray cluster did not answer for "
                "60 s"
            )
            with pytest.raises(NotSent, match="did not answer for 60 s"):  # says why it is closed
                await link.call("node_states", timeout_s=60)
            await link.close()

    with capture_logs() as logs:
        asyncio.run(main())
    failures = [entry for entry in logs if entry["event"] == "ray reports a failure"]
    assert [entry["about"] for entry in failures] == ["a", "b"]  # a repeated failure is logged once
    assert {entry["detail"] for entry in failures} == {"rpc_code: 14"}
    [ended] = [entry for entry in logs if "has ended" in entry["event"]]
    assert "rpc_client.h:204" in ended["output"]
    assert "SIGABRT" in ended["output"]
