"""The `cortex` command, each time in a process of its own, which is forked from one that has loaded the
program already: to load it takes a core a second, and the tests run it hundreds of times.

What a process sees is what it would see if it was executed: its arguments, environment, folder and
descriptors. Tests of what comes before that, such as the installed script, execute it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

_WAIT_TIMEOUT_S = 180
_LONG_TO_LOAD = (
    "alembic.command",
    "cortex.sdk",
    "cortex.operator.app",
    "cortex.operator.ha.peers",
    "psycopg",
    "s3fs",
    "uvloop",
)


class Program:
    """One that runs, as `subprocess.Popen` shows it."""

    def __init__(self, pid: int, end: int) -> None:
        self.pid = pid
        self._end = end
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"cortex, pid {self.pid}", timeout or 0)
        return code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _ended(self, within_s: float | None) -> int | None:
        if self._code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._end, selectors.EVENT_READ)
                if not selector.select(within_s):
                    return None
            told = os.read(self._end, 16)
            assert told, "the process that had loaded the program is gone"
            os.close(self._end)
            self._code = int(told)
        return self._code


def start(
    *arguments: str,
    stdin: int,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Program:
    """Run the command, beside the caller."""
    asked = {
        "arguments": arguments,
        "environment": dict(os.environ if env is None else env),
        "folder": str(Path.cwd() if cwd is None else cwd),
    }
    end, told = os.pipe()
    try:
        pid = _parent().ask(asked, [stdin, stdout, stderr, told])
    finally:
        os.close(told)
    return Program(pid, end)


def run(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    answer: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with its standard input."""
    with (
        tempfile.TemporaryFile() as read,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        read.write(answer.encode())
        read.seek(0)
        program = start(
            *arguments,
            stdin=read.fileno(), stdout=out.fileno(), stderr=err.fileno(), env=env, cwd=cwd,
        )  # fmt: skip
        try:
            code = program.wait(_WAIT_TIMEOUT_S)
        finally:
            program.kill()
        return subprocess.CompletedProcess(["cortex", *arguments], code, _text(out), _text(err))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


class _Parent:
    """The process that has loaded the program, one for each test process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(number)], pass_fds=[number], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._turn = threading.Lock()

    def ask(self, asked: dict[str, Any], descriptors: list[int]) -> int:
        with self._turn:
            socket.send_fds(self._control, [json.dumps(asked).encode()], descriptors)
            told = self._control.recv(64)
        assert told, "the process that was to load the program is gone"
        return int(told)

    def end(self) -> None:
        """Let it end."""
        self._control.close()
        self._process.wait(_WAIT_TIMEOUT_S)


@cache
def _parent() -> _Parent:
    made = _Parent()
    atexit.register(made.end)
    return made


# In that process


def _main() -> None:
    del sys.path[0]  # the tests' folder, which the program does not see
    from cortex.cli.main import main

    for name in _LONG_TO_LOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        sys.argv = ["cortex", *asked["arguments"]]
        main()


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork until nobody asks any more; in the process that was forked, what was asked."""
    running: dict[int, tuple[int, int]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != control.fileno():
                    selector.unregister(key.fd)
                    _tell_end(key.fd, *running.pop(key.fd))
                    continue
                message, descriptors, _, _ = socket.recv_fds(control, 1024 * 1024, 4)
                if not message:
                    return None
                asked: dict[str, Any] = json.loads(message)
                pid = os.fork()
                if pid == 0:
                    _become(asked, descriptors[:3])
                    return asked
                for each in descriptors[:3]:
                    os.close(each)
                process = os.pidfd_open(pid)
                running[process] = (pid, descriptors[3])
                selector.register(process, selectors.EVENT_READ)
                control.send(str(pid).encode())


def _become(asked: dict[str, Any], descriptors: list[int]) -> None:
    for number, each in enumerate(descriptors):
        os.dup2(each, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])


def _tell_end(process: int, pid: int, told: int) -> None:
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        os.write(told, str(os.waitstatus_to_exitcode(status)).encode())
    os.close(told)
    os.close(process)


if __name__ == "__main__":
    _main()
