"""A forked process becomes a job's: its own session, groups, signals, files and environment; then the
user's command or Task. Where there is time it is forked ahead and waits for its job, so that most of that
is done by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys

from cortex.worker import bare, cgroups, task, wire
from cortex.worker.bare import signal
from cortex.worker.messages import JOB_ID_ROOM, Order, Outcome
from cortex.worker.processes import PR_SET_PDEATHSIG, prctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import NoReturn

    from cortex.worker.bench import Bench
    from cortex.worker.messages import Setup

NOT_FOUND = 127
NOT_RUNNABLE = 126
HELD_BACK = (signal.SIGTERM, signal.SIGCHLD)


class Job:
    """What a process has to do, and the files that it writes: its log, and its outcome."""

    __slots__ = ("log", "order", "outcome")

    def __init__(self, order: Order, log: int, outcome: int) -> None:
        self.order = order
        self.log = log
        self.outcome = outcome


class Worker:
    """The process of one job, which has not begun, as its supervisor sees it."""

    __slots__ = ("_sock", "pid")

    def __init__(self, bench: Bench) -> None:
        self._sock, theirs = bare.socketpair()
        self.pid = _fork(bench, (self._sock.fileno(),), lambda: _await(theirs, bench.slot))
        theirs.close()

    def announce(self, order: bytes) -> None:
        """Tell it what its job will be. From then on it is of no use for any other."""
        with contextlib.suppress(OSError):  # it is gone, as `begin` will find
            wire.send(self._sock, order)

    def begin(self, job: Job) -> None:
        """Let it run the job that was announced.

        Raises:
            OSError: it is gone. It never began, and is reaped.
        """
        try:
            wire.send(self._sock, wire.GO, (job.log, job.outcome))
        except OSError:
            self.dismiss()
            raise
        self._sock.close()

    def dismiss(self) -> None:
        """It never gets a job."""
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)  # it would end by itself, unless somebody has stopped it
        os.waitpid(self.pid, 0)


def start(bench: Bench, job: Job, others: tuple[int, ...]) -> int:
    """Fork a process that runs a job at once; its pid.

    Args:
        others: file descriptors that it must not keep, beside those of the bench.
    """

    def get() -> Job:
        _get_ready(job.order, bench.slot)
        return job

    return _fork(bench, others, get)


def _fork(bench: Bench, others: tuple[int, ...], get: Callable[[], Job | None]) -> int:
    parent = os.getpid()
    # Held back so that a stop finds the child with the default action, not with our handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    pid = os.fork()
    if pid == 0:
        _run(bench, parent, (*bench.files, *others), get)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return pid


def _await(sock: socket.socket, slot: int) -> Job | None:
    data, _ = wire.receive(sock)
    if not data:
        return None
    order = Order.loads(data)
    _get_ready(order, slot)
    data, fds = wire.receive(sock, 2)
    sock.close()
    return Job(order, *fds) if data else None


def _run(
    bench: Bench, supervisor: int, others: tuple[int, ...], get: Callable[[], Job | None]
) -> NoReturn:
    """The forked process, all its life."""
    setup = bench.setup
    code, outcome = 1, -1
    try:
        failed = _become(setup, supervisor, others)
        job = get()
        if job is None:  # and never will be
            os._exit(0)
        outcome = job.outcome
        if failed is not None:
            raise failed
        _begin(job)
        # Last: a stop that came meanwhile ends the process now, by the default action.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if setup.command is not None:
            code = _execute(setup.command)
        elif setup.path is not None:
            config = job.order.job["config"]
            code = task.run(setup, setup.path, bench.found, config, _teller(outcome))
    except BaseException as error:  # noqa: BLE001, RUF100  # the platform's own: it fails the job
        lost = Outcome(lost=True, message=f"the worker could not be set up: {error}")
        _tell(outcome, lost.dumps())
    finally:
        os._exit(code)


def _become(setup: Setup, supervisor: int, others: tuple[int, ...]) -> Exception | None:
    """What can be done before there is a job; what went wrong with it is told when there is one."""
    try:
        os.setsid()
        # Without it a killed supervisor would leave the job running unseen.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        _reset_signals(for_python=setup.command is None)
        for fd in others:
            os.close(fd)
        os.chdir(setup.project)
    except Exception as error:  # noqa: BLE001, RUF100
        return error
    return None


def _get_ready(order: Order, slot: int) -> None:
    os.environ.update(environment(order))
    _mark(order.job_id, slot)


def _begin(job: Job) -> None:
    cgroups.Groups(job.order).join()
    os.dup2(job.log, 1)  # and from 0 nothing can be read, since the fork server
    os.dup2(job.log, 2)
    os.close(job.log)


def environment(order: Order) -> dict[str, str]:
    """What a job finds in its environment beside what all of its version do."""
    env = {
        "CORTEX_JOB_SPEC": f"{order.folder}/job.json",
        "CORTEX_JOB_ID": order.job_id,
        "CORTEX_JOB_DIR": f"{order.folder}/files",
        "CORTEX_ATTEMPT": str(order.losses + 1),
    }
    if order.visible_gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = order.visible_gpus
    return env


def _reset_signals(*, for_python: bool) -> None:
    """Undo what the supervising process has set, which had begun from the defaults."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if for_python:  # as an interpreter sets itself up
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _mark(job_id: str, slot: int) -> None:
    """Write the job's id where /proc/<pid>/environ shows it. That block is the fork server's own
    from its exec, and is inherited by what a Task forks: so that each of them can be found after
    the supervisor was killed."""
    if slot:
        ctypes.memset(slot, 0, JOB_ID_ROOM)
        value = job_id.encode()[:JOB_ID_ROOM]
        ctypes.memmove(slot, value, len(value))


def _teller(outcome: int) -> task.Tell:
    """What a task has to say of itself, once."""
    own, made = os.getpid(), os.fstat(outcome)

    def tell(data: bytes) -> None:
        if os.getpid() != own:
            return  # the task has forked by hand, and what becomes of that is its own affair
        if not os.path.samestat(os.fstat(outcome), made):
            raise OSError(errno.EBADF, "something of the task's own has the number of the file")
        _tell(outcome, data)

    return tell


def _tell(outcome: int, data: bytes) -> None:
    while data:
        data = data[os.write(outcome, data) :]


def _execute(command: list[str]) -> int:
    program = command[0]
    try:
        os.execvp(program, command)
    except OSError as error:
        is_sought = "/" not in program and error.errno == errno.ENOENT
        why = "it is not on PATH" if is_sought else error.strerror or str(error)
        sys.stderr.write(f"cortex: cannot run {program!r}: {why}\n")
        sys.stderr.flush()
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return NOT_FOUND if missing else NOT_RUNNABLE
