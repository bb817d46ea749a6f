"""Runs the `cortex` command in a new process, forked from a process that has loaded the program.

Loading the program takes one core for a second, and the tests run the command hundreds of times.
The forked process gets its own arguments, environment, folder and descriptors, as if it had been
executed. Tests of earlier steps, such as the installed script, execute the real command.
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
_PRELOADED = (
    "alembic.command",
    "cortex.sdk",
    "cortex.operator.app",
    "cortex.operator.ha.peers",
    "psycopg",
    "s3fs",
    "uvloop",
)


class Program:
    """A running command, with the methods of `subprocess.Popen`."""

    def __init__(self, pid: int, exit_pipe: int) -> None:
        self.pid = pid
        self._exit_pipe = exit_pipe
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while the command runs."""
        return self._exit_code(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit of the command; its exit code.

        Raises:
            subprocess.TimeoutExpired: the command still runs.
        """
        code = self._exit_code(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"cortex, pid {self.pid}", timeout or 0)
        return code

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _exit_code(self, timeout_s: float | None) -> int | None:
        if self._code is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._exit_pipe, selectors.EVENT_READ)
                if not selector.select(timeout_s):
                    return None
            code = os.read(self._exit_pipe, 16)
            assert code, "the process with the loaded program has exited"
            os.close(self._exit_pipe)
            self._code = int(code)
        return self._code


def start(
    *arguments: str,
    stdin: int,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Program:
    """Start the command, and return at once."""
    request = {
        "arguments": arguments,
        "environment": dict(os.environ if env is None else env),
        "folder": str(Path.cwd() if cwd is None else cwd),
    }
    exit_pipe, write_end = os.pipe()
    try:
        pid = _parent().fork(request, [stdin, stdout, stderr, write_end])
    finally:
        os.close(write_end)
    return Program(pid, exit_pipe)


def run(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    answer: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run the command until it exits.

    Args:
        answer: the standard input of the command.
    """
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
    """The process with the loaded program. Each test process has one."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(number)], pass_fds=[number], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], descriptors: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
            pid = self._control.recv(64)
        assert pid, "the process with the loaded program has exited"
        return int(pid)

    def end(self) -> None:
        """Close the socket, and wait until the process has exited."""
        self._control.close()
        self._process.wait(_WAIT_TIMEOUT_S)


@cache
def _parent() -> _Parent:
    made = _Parent()
    atexit.register(made.end)
    return made


# The following runs in the process with the loaded program.


def _main() -> None:
    del sys.path[0]  # the tests' folder: an executed program would not have it
    from cortex.cli.main import main

    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        sys.argv = ["cortex", *request["arguments"]]
        main()


def _serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request.

    Returns the request in a forked process, and None in this process after the caller closed the
    socket.
    """
    running: dict[int, tuple[int, int]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != control.fileno():
                    selector.unregister(key.fd)
                    _report_exit(key.fd, *running.pop(key.fd))
                    continue
                message, descriptors, _, _ = socket.recv_fds(control, 1024 * 1024, 4)
                if not message:
                    return None
                request: dict[str, Any] = json.loads(message)
                pid = os.fork()
                if pid == 0:
                    _become(request, descriptors[:3])
                    return request
                for each in descriptors[:3]:
                    os.close(each)
                process = os.pidfd_open(pid)
                running[process] = (pid, descriptors[3])
                selector.register(process, selectors.EVENT_READ)
                control.send(str(pid).encode())


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    for number, each in enumerate(descriptors):
        os.dup2(each, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])


def _report_exit(process: int, pid: int, exit_pipe: int) -> None:
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # the caller has closed its end
        os.write(exit_pipe, str(os.waitstatus_to_exitcode(status)).encode())
    os.close(exit_pipe)
    os.close(process)


if __name__ == "__main__":
    _main()
