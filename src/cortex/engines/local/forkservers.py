"""The operator's side of fork servers: one warm interpreter per deployed version, started when a job
needs it. Called by the local engine alone; everything here runs on its event loop.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections import OrderedDict, deque
from collections.abc import Coroutine
from pathlib import Path
from typing import IO, Protocol

import cortex
from cortex.engines.base import Version
from cortex.worker import forkserver
from cortex.worker.messages import JOB_ID_ROOM, Order, Reply, Setup, shorten

MOST_IDLE = 8
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


class Listener(Protocol):
    """Who gives the orders."""

    def forked(self, reply: Reply, pidfd: int) -> None:
        """A supervisor was forked; the pidfd is the listener's to close."""

    def not_forked(self, job_id: str, reason: str) -> None:
        """The order could not be carried out, and never will be."""

    def unanswered(self, job_id: str) -> None:
        """The fork server died with the order: it may have been carried out, or not."""


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


class ForkServers:
    """All fork servers of an engine, the most recently used ones last."""

    def __init__(self, listener: Listener, import_dir: Path) -> None:
        self._listener = listener
        self._import_dir = import_dir
        self._servers: OrderedDict[str, _ForkServer] = OrderedDict()
        self._plain: set[str] = set()  # versions that cannot be preloaded
        self._all: set[_ForkServer] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def order(self, version: Version, order: Order) -> None:
        self._of(version).order(order)
        self._trim()

    def warm(self, version: Version) -> None:
        self._of(version)
        self._trim()

    def withdraw(self, version: Version, job_id: str) -> bool:
        """Take back an order that no fork server has read; False if one may have."""
        server = self._servers.get(version.api.api_id)
        return server is not None and server.withdraw(job_id)

    def forget(self, api_id: str) -> None:
        server = self._servers.get(api_id)
        if server is not None:
            self._retire(server)

    async def close(self) -> None:
        self._servers.clear()
        for server in list(self._all):
            self._end(server)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _of(self, version: Version) -> _ForkServer:
        api_id = version.api.api_id
        server = self._servers.get(api_id)
        if server is not None and server.version != version:
            self._retire(server)
            server = None
        if server is None:
            server = self._spawn(version, preload=api_id not in self._plain)
        self._servers.move_to_end(api_id)
        return server

    def _spawn(self, version: Version, *, preload: bool) -> _ForkServer:
        server = _ForkServer(version, preload=preload, said=self._said, died=self._died)
        self._servers[version.api.api_id] = server
        self._all.add(server)
        self._run(server.spawn(self._import_dir))
        return server

    def _said(self, server: _ForkServer, reply: Reply, pidfd: int) -> None:
        if reply.job_id is None:
            return
        if reply.error is None:
            self._listener.forked(reply, pidfd)
        else:
            self._listener.not_forked(reply.job_id, reply.error)
        if server.retired and not server.orders:
            self._end(server)
        self._trim()

    def _died(self, server: _ForkServer) -> None:
        api_id = server.version.api.api_id
        if self._servers.get(api_id) is server:
            del self._servers[api_id]
        orders = list(server.orders.values())
        self._end(server)
        if server.ready:
            for order in orders:
                self._listener.unanswered(order.job_id)
        elif server.preload:
            # It reads no order before it is ready: none of these has been carried out.
            self._plain.add(api_id)
            for order in orders:
                self.order(server.version, order)
        else:
            reason = f"the environment's Python could not start: {server.last_words()}"
            for order in orders:
                self._listener.not_forked(order.job_id, reason)

    def _trim(self) -> None:
        idle = [server for server in self._servers.values() if not server.orders]
        for server in idle[: max(0, len(idle) - MOST_IDLE)]:
            self._retire(server)

    def _retire(self, server: _ForkServer) -> None:
        """It gets no more orders, and ends when those it has are answered."""
        self._servers.pop(server.version.api.api_id, None)
        server.retired = True
        if not server.orders:
            self._end(server)

    def _end(self, server: _ForkServer) -> None:
        self._all.discard(server)
        self._run(server.close())

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Said(Protocol):
    def __call__(self, server: _ForkServer, reply: Reply, pidfd: int) -> None: ...


class _Died(Protocol):
    def __call__(self, server: _ForkServer) -> None: ...


class _ForkServer:
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
            else:
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
