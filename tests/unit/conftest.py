"""The tests in this folder start no process and no server: a test that does fails.

A test that needs one belongs in the folder that CONTRIBUTING.md names for it.
"""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Generator

import pytest

# Audit events of CPython. No event is raised for listen(2): a server is noticed as it binds.
PROCESS_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
# A name of AF_UNIX is allowed: tests make such sockets as odd files, and nothing listens there.
SERVER_FAMILIES = {socket.AF_INET, socket.AF_INET6}


class StartRecorder:
    """Records the processes and servers that a test starts, in each of its threads."""

    def __init__(self) -> None:
        self._is_on = False
        self._starts: list[str] = []
        sys.addaudithook(self._record)  # cannot be removed: it is off between the tests

    def _record(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._is_on and (event in PROCESS_STARTS or _is_server(event, arguments)):
            stack = "".join(traceback.format_stack(limit=8))
            self._starts.append(f"{event} {arguments!r:.200}\n{stack}")

    def watch(self) -> Generator[None, object, object]:
        """Wrap a phase of a test: fail if the phase starts a process or a server."""
        self._starts.clear()
        self._is_on = True
        try:
            result = yield
        finally:
            self._is_on = False
        if self._starts:
            starts = "\n".join(self._starts)
            pytest.fail(
                f"a test in tests/unit starts a process or a server; move it to another folder "
                f"(CONTRIBUTING.md): {starts}",
                pytrace=False,
            )
        return result


def _is_server(event: str, arguments: tuple[object, ...]) -> bool:
    if event != "socket.bind":
        return False
    bound = arguments[0]
    return isinstance(bound, socket.socket) and bound.family in SERVER_FAMILIES


RECORDER = StartRecorder()


# Not the teardown: after the last test it also stops the servers of other folders' fixtures.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    return (yield from RECORDER.watch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    return (yield from RECORDER.watch())
