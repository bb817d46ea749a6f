"""The fork server of one deployed version: an interpreter of its environment that is warm, and forks
a supervisor for each job. The local engine starts it as `python -I forkserver.py <socket fd>`, with
the version (`messages.Setup`) on its standard input, and talks to it through the inherited socket.

It ends when the socket does; the supervisors that it forked go on.
"""

from __future__ import annotations

import sys

STARTUP = frozenset(sys.modules)  # what a plain interpreter has loaded

import ctypes  # noqa: E402
import gc  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import select  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402

MOST_MESSAGE = 1 << 16
NOT_FORKABLE = 3


def main() -> None:
    slot = _job_id_slot()
    data = sys.stdin.buffer.read()
    _register_package(json.loads(data)["package"])
    from cortex.worker import messages, orphans, preload, supervisor, task

    setup = messages.Setup.loads(data)
    os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), 0)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    if setup.path is not None:
        roots = [*task.user_roots(setup), os.path.dirname(setup.path)]
        if setup.preload:
            before = _open_files()
            preload.preload(setup.path, roots)
            _refuse_if_not_forkable(before)
        preload.forget_shadowed(roots, STARTUP)
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
        for fd, _ in poller.poll():
            if fd == wake:
                os.read(wake, 512)
                children.reap()
                continue
            order = sock.recv(MOST_MESSAGE)
            if not order:
                return
            pid = _start(sock, messages, supervisor, setup, order, slot)
            if pid > 0:
                children.supervisors.add(pid)


def _start(sock, messages, supervisor, setup, data, slot) -> int:  # type: ignore[no-untyped-def]  # modules that exist only after _register_package
    order = messages.Order.loads(data)
    start_ns = time.time_ns()
    # A stop may come as soon as the pidfd is sent: it waits until the supervisor can take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    reply = messages.Reply(job_id=order.job_id, attempt=order.attempt, start_ns=start_ns)
    try:
        pid = os.fork()
    except OSError as error:
        pid = -1
        reply.error = f"the machine could not fork: {error.strerror}"
    if pid == 0:
        supervisor.run(setup, order, start_ns, slot, sock.fileno())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
    if pid < 0:
        sock.send(reply.dumps())
        return pid
    # Nobody else reaps, so the pid cannot be anybody else's yet.
    pidfd = os.pidfd_open(pid)
    reply.pid = pid
    socket.send_fds(sock, [reply.dumps()], [pidfd])
    os.close(pidfd)
    return pid


def _register_package(folder: str) -> None:
    """Make `cortex` importable without the site-packages that it lies in: those are the
    operator's, and this is the user's environment."""
    spec = importlib.util.spec_from_file_location(
        "cortex", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no package cortex in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cortex"] = module
    spec.loader.exec_module(module)


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
    if threading.active_count() > 1 or _open_files() != before:
        sys.stderr.write("an imported module started threads or opened files\n")
        sys.stderr.flush()
        os._exit(NOT_FORKABLE)


def _wake_on_children() -> int:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read


if __name__ == "__main__":
    main()
    os._exit(0)  # no exit handlers of what was preloaded
