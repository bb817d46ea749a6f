"""The life of a fork server: an interpreter of a version's environment that is warm, and forks a
supervising process (`serving`) whenever the engine asks it to through its socket. Run by `forkserver`.

It ends when the socket does; what it forked goes on.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import resource
import select
import sys

from cortex.worker import messages, syscalls, workspace
from cortex.worker.forkserver import orphans, preload
from cortex.worker.job import process, task
from cortex.worker.supervisor import main
from cortex.worker.syscalls import signal, socket

NOT_FORKABLE = 3
# Those of faults may be faulthandler's, which the user's environment has asked for.
_FAULTS = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
_UNTOUCHED = {signal.SIGKILL, signal.SIGSTOP, *_FAULTS}


def serve(data: bytes, fd: int, startup: frozenset[str]) -> None:
    """Until the socket ends.

    Args:
        data: the version, a `messages.Setup`.
        fd: the socket.
        startup: the modules that a plain interpreter has loaded.
    """
    orphans.mark()
    slot = _job_id_slot()
    setup = messages.Setup.loads(data)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (setup.open_files, most))
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    _reset_signals()
    found = None
    if setup.path is not None:
        # Python did not see it: what lies there could shadow what this process needs itself.
        if "PYTHONPATH" in setup.env:
            os.environ["PYTHONPATH"] = setup.env["PYTHONPATH"]
        task.prepare(setup, setup.path, *_import_ahead(setup, setup.path, sock, startup))
        found = task.find(setup, setup.path, None)
        if found is not None:
            process.rehearse(setup, setup.path)
    else:
        task.raise_digits()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # a collection in a job would copy the pages of all that is shared
    wake = _wake_on_children()
    workspace.compile_ahead(setup.project)
    children = orphans.Children()
    sock.send(messages.Reply().dumps())
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(wake, select.POLLIN)
    while True:
        for ready, _ in poller.poll():
            if ready == wake:
                os.read(wake, 512)
                children.reap()
                continue
            if not sock.recv(messages.MOST_MESSAGE):
                return
            pid = _fork(sock, setup, slot, found)
            if pid > 0:
                children.supervisors.add(pid)


def _fork(
    sock: socket.socket,
    setup: messages.Setup,
    slot: memoryview | None,
    found: task.CompiledTask | None,
) -> int:
    reply = messages.Reply()
    # A stop may come as soon as the pidfd is sent: it waits until the process can take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    try:
        ours, theirs = syscalls.socketpair()
        try:
            pid = os.fork()
            if pid == 0:
                main.serve(setup, theirs, slot, found)
            # Nobody else reaps, so the pid cannot be anybody else's yet.
            pidfd = os.pidfd_open(pid)
            reply.pid = pid
            syscalls.send_fds(sock, reply.dumps(), (pidfd, ours.fileno()))
            os.close(pidfd)
            return pid
        finally:
            ours.close()
            theirs.close()
    except OSError as error:
        reply.error = f"the machine could not fork: {error.strerror}"
        reply.errno = error.errno or 0
        sock.send(reply.dumps())
        return -1
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})


def _job_id_slot() -> memoryview | None:
    """The place that the engine left for a job's id in the first environment."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    address: int | None = getenv(b"CORTEX_JOB_ID")
    for name in ("CORTEX_JOB_ID", messages.JOBS_FOLDER):
        os.environ.pop(name, None)
    if address is None:
        return None
    place = (ctypes.c_char * messages.JOB_ID_ROOM).from_address(address)
    return memoryview(place).cast("B")


def _import_ahead(
    setup: messages.Setup, path: str, sock: socket.socket, startup: frozenset[str]
) -> tuple[bytes, list[object]]:
    """Import what the version asks for; what that has printed, and what each job has to seed. Where a module must
    not be imported ahead, say so and end: the engine starts this process again without it."""
    roots = task.user_roots(setup)
    watch = preload.Watch(setup.project) if setup.preload else None
    preload.forget_shadowed([*roots, os.path.dirname(path)], startup)
    if watch is None:
        return b"", []
    sys.path[0:0] = roots
    try:
        words = preload.preload(setup.preload, watch, lambda name: _say(sock, importing=name))
    except preload.Refused as refused:
        _say(sock, refused=messages.shorten(str(refused)))
        atexit._run_exitfuncs()  # what the modules have made outside this process goes with it
        sys.stderr.flush()
        os._exit(NOT_FORKABLE)
    watch.close()
    for root in roots:
        sys.path.remove(root)  # a job puts them there itself
    return words, watch.generators


def _say(sock: socket.socket, *, importing: str | None = None, refused: str | None = None) -> None:
    sock.send(messages.Reply(importing=importing, refused=refused).dumps())


def _reset_signals() -> None:
    """As a shell starts an interpreter with them, whatever the operator was started with."""
    for number in signal.valid_signals() - _UNTOUCHED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _wake_on_children() -> int:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read
