"""The fork server: a warm interpreter in the environment of one version. It forks a supervising
process (`supervisor.main`) at each request of the engine. Run by `forkserver.main`.

The fork server exits when the engine closes the socket; its supervising processes go on.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import resource
import select
import sys

from cortex.worker import messages, processes, syscalls, workspace
from cortex.worker.forkserver import orphans, preload
from cortex.worker.job import process, task
from cortex.worker.supervisor import main
from cortex.worker.syscalls import signal, socket

NOT_FORKABLE = 3
# Handlers of fault signals may be faulthandler's, which the user's environment can enable.
_FAULTS = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
_UNTOUCHED = {signal.SIGKILL, signal.SIGSTOP, *_FAULTS}


def serve(data: bytes, fd: int, startup: frozenset[str]) -> None:
    """Serve requests until the engine closes the socket.

    Args:
        data: a `messages.Setup`, encoded.
        fd: the descriptor of the socket.
        startup: the modules that a plain interpreter has loaded.
    """
    orphans.mark()
    environ_slot = _find_environ_slot()
    setup = messages.Setup.loads(data)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (setup.open_files, hard_limit))
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    _reset_signals()
    compiled = None
    if setup.path is not None:
        # The engine has hidden it from this Python: its modules could shadow those of this process.
        if "PYTHONPATH" in setup.env:
            os.environ["PYTHONPATH"] = setup.env["PYTHONPATH"]
        task.prepare_interpreter(
            setup, setup.path, *_import_ahead(setup, setup.path, sock, startup)
        )
        compiled = task.compile_task(setup, setup.path, None)
        if compiled is not None:
            process.warm_up(setup, setup.path)
    else:
        task.raise_digits()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # a collection in a job would copy the pages of all shared objects
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
            if not sock.recv(messages.MAX_MESSAGE):
                return
            pid = _fork(sock, setup, environ_slot, compiled)
            if pid > 0:
                children.supervisors.add(pid)


def _fork(
    sock: socket.socket,
    setup: messages.Setup,
    environ_slot: memoryview | None,
    compiled: task.CompiledTask | None,
) -> int:
    reply = messages.Reply()
    # A stop may come as soon as the pidfd is sent. It stays pending until the process handles it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    try:
        ours, theirs = syscalls.socketpair()
        try:
            pid = os.fork()
            if pid == 0:
                main.serve(setup, theirs, environ_slot, compiled)
            # Only this process reaps its children: the pid cannot have been reused yet.
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


def _find_environ_slot() -> memoryview | None:
    """The memory that the engine has reserved for a job's id in the initial environment block."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    address: int | None = getenv(b"CORTEX_JOB_ID")
    for name in ("CORTEX_JOB_ID", messages.JOBS_FOLDER):
        os.environ.pop(name, None)
    if address is None:
        return None
    slot = (ctypes.c_char * messages.JOB_ID_ROOM).from_address(address)
    return memoryview(slot).cast("B")


def _import_ahead(
    setup: messages.Setup, path: str, sock: socket.socket, startup: frozenset[str]
) -> tuple[bytes, list[object]]:
    """Import the modules of `definition.preload`. If one must not be imported ahead, report it and
    exit: the engine starts a new fork server without this module.

    Returns:
        what the modules have printed, and the random generators that each job has to seed.
    """
    roots = task.user_roots(setup)
    watch = preload.ImportWatch(setup.project) if setup.preload else None
    preload.forget_shadowed([*roots, os.path.dirname(path)], startup)
    if watch is None:
        return b"", []
    sys.path[0:0] = roots
    try:
        output = preload.preload(setup.preload, watch, lambda name: _report(sock, importing=name))
    except preload.Refused as refused:
        _report(sock, refused=messages.shorten(str(refused)))
        atexit._run_exitfuncs()  # removes what the modules have made outside this process
        sys.stderr.flush()
        # On a node of a cluster, no process inherits what the modules have started.
        processes.kill_all(lambda: processes.walk(os.getpid()))
        os._exit(NOT_FORKABLE)
    watch.close()
    for root in roots:
        sys.path.remove(root)  # each job adds them itself
    return output, watch.generators


def _report(
    sock: socket.socket, *, importing: str | None = None, refused: str | None = None
) -> None:
    sock.send(messages.Reply(importing=importing, refused=refused).dumps())


def _reset_signals() -> None:
    """Set the signal dispositions with which a shell starts an interpreter."""
    for number in signal.valid_signals() - _UNTOUCHED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def _wake_on_children() -> int:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read
