"""The operator's link to Ray's driver process, with a process that stands for the driver."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading

import pytest

from cortex.engines.ray.link import Link


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
