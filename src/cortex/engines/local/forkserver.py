"""One fork server, seen from the operator: its process and its socket. Called by `forkservers`."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import IO, Protocol

import cortex
from cortex.engines.base import Version
from cortex.worker import forkserver
from cortex.worker.messages import JOB_ID_ROOM, Order, Reply, Setup, shorten

READY_S = 60.0
_SCRIPT = str(Path(forkserver.__file__).absolute())
_PASSED_ON = [
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
]


def environment(version: Version) -> dict[str, str]:
    """What a worker of this version finds in its environment, whichever job it runs."""
    folder = version.python.parent
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    env["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    if (folder.parent / "pyvenv.cfg").exists():
        env["VIRTUAL_ENV"] = str(folder.parent)
    return {
        **env,
        **version.env,
        "CORTEX_API_NAME": version.api.name,
        "CORTEX_LOG_LEVEL": version.api.definition.log_level,
        "PYTHONUNBUFFERED": "1",
    }


class _Said(Protocol):
    def __call__(self, server: ForkServer, reply: Reply, pidfd: int) -> None: ...


class _Died(Protocol):
    def __call__(self, server: ForkServer) -> None: ...


class ForkServer:
    """One process and its socket. Orders wait here until it is ready."""

    def __init__(self, version: Version, *, preload: bool, said: _Said, died: _Died) -> None:
        self.version = version
        self.preload = preload
        self.ready = False
        self.retired = False
        self.orders: dict[str, Order] = {}  # not answered yet, by job
        self._said = said
        self._died = died
        self._outbox: deque[Order] = deque()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        self._words = ""
        self._spawned = asyncio.Event()
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._hurried = False
        self._ending: asyncio.Task[None] | None = None

    @property
    def was_killed(self) -> bool:
        """Whether somebody else ended it: that says nothing about its environment. Known once it
        has died."""
        code = None if self._process is None else self._process.returncode
        return code == -signal.SIGKILL and not self._hurried

    def order(self, order: Order) -> None:
        self.orders[order.job_id] = order
        self._outbox.append(order)
        self._flush()

    def withdraw(self, job_id: str) -> bool:
        order = self.orders.get(job_id)
        if order is None or order not in self._outbox:
            return False
        self._outbox.remove(order)
        del self.orders[job_id]
        return True

    def last_words(self) -> str:
        return shorten(self._words) or "it said nothing"

    async def spawn(self, import_dir: Path) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._words, self.preload = str(error), False
            self._spawned.set()
            self._died(self)
            return
        ours.setblocking(False)
        self._socket = ours
        try:
            self._process = await asyncio.to_thread(self._popen, theirs, import_dir)
        except OSError as error:
            self._words = str(error)
            self.preload = False  # it would fail again
        finally:
            theirs.close()
            self._spawned.set()
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(READY_S, self._hurry) if self.preload else None
        loop.add_reader(ours, self._read)

    async def close(self) -> None:
        """Its process ends by itself when the socket does; wait for that."""
        if self._closed:
            return
        self._closed = True
        await self._spawned.wait()
        if self._timer is not None:
            self._timer.cancel()
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
            self._socket.close()
        if self._process is not None:
            if not self.ready:
                self._process.kill()  # it may be in a long import, and holds nothing yet
            await asyncio.to_thread(_wait, self._process)
        self._errors.close()

    def _popen(self, theirs: socket.socket, import_dir: Path) -> subprocess.Popen[bytes]:
        env = environment(self.version)
        definition = self.version.api.definition
        project = self.version.project.absolute()
        setup = Setup(
            package=str(Path(cortex.__file__).parent),
            import_dir=str(import_dir),
            project=str(project),
            python_path=str(project / definition.python_path) if definition.python_path else None,
            path=str(project / definition.path) if definition.path else None,
            command=definition.command,
            env=env,
            preload=self.preload,
        )
        with tempfile.TemporaryFile() as stdin:
            stdin.write(setup.dumps())
            stdin.seek(0)
            return subprocess.Popen(
                [str(self.version.python), "-I", _SCRIPT, str(theirs.fileno())],
                stdin=stdin,
                stdout=self._errors,
                stderr=self._errors,
                env={**env, "CORTEX_JOB_ID": "-" * JOB_ID_ROOM},
                cwd=project,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def _read(self) -> None:
        assert self._socket is not None
        while not self._closed:
            try:
                data, fds = _receive(self._socket)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self._on_end()
                return
            reply = Reply.loads(data)
            if reply.job_id is None:
                self.ready = True
                if self._timer is not None:
                    self._timer.cancel()
                self._flush()
            elif not reply.recorded:
                self.orders.pop(reply.job_id, None)
            self._said(self, reply, fds[0] if fds else -1)

    def _on_end(self) -> None:
        assert self._socket is not None
        asyncio.get_running_loop().remove_reader(self._socket)
        with contextlib.suppress(OSError):
            end = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, end - 2000))
            text = self._errors.read().decode("utf-8", "replace").strip()
            self._words = self._words or text[-400:]
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(_wait, self._process)
        if not self._closed:
            self._died(self)

    def _flush(self) -> None:
        if not self.ready or self._closed or self._socket is None:
            return
        loop = asyncio.get_running_loop()
        while self._outbox:
            try:
                self._socket.send(self._outbox[0].dumps())
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except OSError:
                break  # it has died: the reader sees that
            self._outbox.popleft()
        loop.remove_writer(self._socket)

    def _hurry(self) -> None:
        """An import that hangs must not hold up jobs that may not even need it."""
        if self._process is not None and not self.ready:
            self._hurried = True
            self._process.send_signal(signal.SIGKILL)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    # Descriptors that arrive would else be inherited by whatever the operator starts.
    data, ancillary, _, _ = sock.recvmsg(forkserver.MOST_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
