"""The life of a fork server: an interpreter of a version's environment that is warm, and forks a
supervising process (`serving`) whenever the engine asks it to through its socket. Run by `forkserver`.

It ends when the socket does; what it forked goes on.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import sys

from cortex.worker import bare, messages, orphans, preload, serving, task
from cortex.worker.bare import signal, socket

NOT_FORKABLE = 3


def serve(data: bytes, fd: int, startup: frozenset[str]) -> None:
    """Until the socket ends.

    Args:
        data: the version, a `messages.Setup`.
        fd: the socket.
        startup: the modules that a plain interpreter has loaded.
    """
    slot = _job_id_slot()
    setup = messages.Setup.loads(data)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (setup.open_files, most))
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    found = None
    if setup.path is not None:
        roots = [*task.user_roots(setup), os.path.dirname(setup.path)]
        if setup.preload:
            before = _open_files()
            preload.preload(setup.path, roots)
            _refuse_if_not_forkable(before)
        preload.forget_shadowed(roots, startup)
        task.prepare(setup, setup.path)
        found = task.find(setup, setup.path, None)
    _undo_what_modules_did(setup.env)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # a collection in a job would copy the pages of all that is shared
    wake = _wake_on_children()
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


def _fork(sock: socket.socket, setup: messages.Setup, slot: int, found: task.Found | None) -> int:
    reply = messages.Reply()
    # A stop may come as soon as the pidfd is sent: it waits until the process can take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    try:
        ours, theirs = bare.socketpair()
        try:
            pid = os.fork()
            if pid == 0:
                serving.serve(setup, theirs, slot, found)
            # Nobody else reaps, so the pid cannot be anybody else's yet.
            pidfd = os.pidfd_open(pid)
            reply.pid = pid
            bare.send_fds(sock, reply.dumps(), (pidfd, ours.fileno()))
            os.close(pidfd)
            return pid
        finally:
            ours.close()
            theirs.close()
    except OSError as error:
        reply.error = f"the machine could not fork: {error.strerror}"
        sock.send(reply.dumps())
        return -1
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})


def _job_id_slot() -> int:
    """The address of the place that the engine left for a job's id in the first environment."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    slot: int | None = getenv(b"CORTEX_JOB_ID")
    os.environ.pop("CORTEX_JOB_ID", None)
    return slot or 0


def _open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _refuse_if_not_forkable(before: set[str]) -> None:
    """Threads do not survive a fork, and open files would be shared by all jobs: then the engine
    starts this again without preloading."""
    threading = sys.modules.get("threading")
    threads = 1 if threading is None else threading.active_count()
    if threads > 1 or _open_files() != before:
        sys.stderr.write("an imported module started threads or opened files\n")
        sys.stderr.flush()
        os._exit(NOT_FORKABLE)


def _undo_what_modules_did(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _wake_on_children() -> int:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read
