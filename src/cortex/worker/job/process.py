"""A forked process becomes a job's: its own session, groups, files and environment; then the user's command
or Task. Where there is time it is forked ahead and waits for its job, so that most of that is done by then.

Each object that it touches for the first time is a page that the kernel copies: it is told by its arguments
what it needs, calls by names of its own (an attribute is found through tables, and counts its name), and has
its signals set by who forks it (`serving.Signals.lend`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import marshal
import os
import sys
import time
from gc import freeze
from os import _exit, chdir, close, dup2, environb, fork, fstat, getpid, getppid, setsid, write

from cortex.worker import standard, syscalls, wire
from cortex.worker.job import exec_errors, task
from cortex.worker.messages import JOB_ID_ROOM, Outcome
from cortex.worker.processes import PR_SET_PDEATHSIG, libc
from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

    from cortex.worker.messages import Order, Setup
    from cortex.worker.supervisor.station import Station

    Orders = socket.socket | None
    Identity = tuple[int, int]  # device and inode
    Variables = list[tuple[bytes, bytes]]
    # Its variables, its id as `Station.slot` shows it, and the content of job.json.
    Told = tuple[Variables, bytes, dict[str, object]]
    Work = tuple[Told, int, int, int, Identity]

globals()["__builtins__"] = standard.BUILTINS

NOT_FOUND = 127
NOT_RUNNABLE = 126
_REHEARSALS = 20  # by the eighth, CPython knows for each instruction what it is to do
_REHEARSED = b"CORTEX_REHEARSED"
_SIGKILL, _SETMASK, _sigmask = signal.SIGKILL, signal.SIG_SETMASK, signal.pthread_sigmask
_prctl, _loads = libc.prctl, marshal.loads


class Job:
    """What a process has to do, and the files that it writes: its log, its outcome, and what puts it into its
    control group."""

    __slots__ = ("group", "log", "order", "outcome")

    def __init__(self, order: Order, log: int, outcome: int) -> None:
        self.order = order
        self.log = log
        self.outcome = outcome
        self.group = -1  # none


class Worker:
    """The process of one job, which has not begun, as its supervisor sees it."""

    __slots__ = ("_sock", "pid")

    def __init__(self, bench: Station) -> None:
        self._sock, theirs = syscalls.socketpair()
        self.pid = _fork(bench, (self._sock.fileno(),), None, theirs)
        theirs.close()

    def announce(self, order: Order) -> None:
        """Tell it what its job will be. From then on it is of no use for any other."""
        with contextlib.suppress(OSError):  # it is gone, as `begin` will find
            # What it takes to read an order as the engine sends it would be pages of each job's own.
            wire.send(self._sock, marshal.dumps(_told(order)))

    def begin(self, job: Job) -> None:
        """Let it run the job that was announced.

        Raises:
            OSError: it is gone. It never began, and is reaped.
        """
        try:
            files = (job.log, job.outcome)
            wire.send(self._sock, wire.GO, files if job.group < 0 else (*files, job.group))
        except OSError:
            self.dismiss()
            raise
        self._sock.close()

    def dismiss(self) -> None:
        """It never gets a job."""
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)  # it would end by itself, unless somebody has stopped it
        os.waitpid(self.pid, 0)


def rehearse(setup: Setup, path: str) -> None:
    """Do what each job's process does, before one is forked, and leave no trace that a program sees.

    Byte code that has not run yet is written to when it runs, and a library's function is looked up at its first
    call: in each job's process anew, unless that has happened before the fork.
    """
    nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    tell = _teller(nothing, _identity(nothing))
    with open(nothing, "w", encoding="utf-8") as stream:
        for _ in range(_REHEARSALS):
            _get_ready(([(_REHEARSED, b"1")], b"", {}), None)
            del environb[_REHEARSED]
            getppid()
            task.rehearse(setup, path, tell)
            print(time.time_ns(), file=stream, flush=True)


def outcome_file() -> int:
    """A new file for a job's outcome. It is in memory, and of no limited room: whoever writes it waits for
    nobody."""
    return os.memfd_create("outcome")


def start(bench: Station, job: Job, others: tuple[int, ...]) -> int:
    """Fork a process that runs a job at once; its pid. The bench has looked at the task's file just now.

    Args:
        others: file descriptors that it must not keep, beside those of the bench.
    """
    work = (_told(job.order), job.log, job.outcome, job.group, _identity(job.outcome))
    return _fork(bench, others, work, None)


def _fork(bench: Station, others: tuple[int, ...], work: Work | None, orders: Orders) -> int:
    """Fork a process that does this work, or the one that it hears of."""
    setup, found, slot = bench.setup, bench.found, bench.slot
    project, path = setup.project, setup.path
    supervisor, foreign = getpid(), (*bench.files, *others)
    bench.signals.lend()
    freeze()  # what the job's end collects is its own, and copies no page of what was here before
    if found is not None:
        found.renew()
    try:
        pid = fork()
        if pid == 0:
            _run(setup, project, path, found, slot, supervisor, foreign, work, orders)
    finally:
        bench.signals.take_back()
    return pid


def _run(
    setup: Setup,
    project: str,
    path: str | None,
    found: task.CompiledTask | None,
    slot: memoryview | None,
    supervisor: int,
    foreign: tuple[int, ...],
    work: Work | None,
    orders: Orders,
) -> NoReturn:
    """The forked process, all its life."""
    code, outcome = 1, -1
    try:
        failed = _become(supervisor, foreign)
        if work is not None:
            told, log, outcome, group, identity = work
            _get_ready(told, slot)
        elif orders is not None:
            told, log, outcome, group = _await(orders, slot)
            identity = _identity(outcome)
            found = task.still(found, path)
        if failed is not None:
            raise failed
        chdir(project)  # not ahead of the job: the folder may be away for a while
        _, _, job = told
        if group >= 0:
            write(group, b"0")
            close(group)
        dup2(log, 1)  # and from 0 nothing can be read, since the fork server
        dup2(log, 2)
        close(log)
        # Last: a stop that came meanwhile ends the process now, by the default action.
        _sigmask(_SETMASK, ())
        if path is not None:
            task.run(setup, path, found, job, _teller(outcome, identity))
        elif setup.command is not None:
            code = _execute(setup.command)
    except BaseException as error:  # noqa: BLE001, RUF100  # the platform's own: it fails the job
        lost = Outcome(lost=True, message=f"the worker could not be set up: {error}")
        _tell(outcome, lost.dumps())
    finally:
        _exit(code)


def _become(supervisor: int, foreign: tuple[int, ...]) -> Exception | None:
    """What can be done before there is a job; what went wrong with it is told when there is one."""
    try:
        setsid()
        # Without it a killed supervisor would leave the job running unseen.
        if _prctl(PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG failed")
        if getppid() != supervisor:
            _exit(1)
        for fd in foreign:
            close(fd)
    except Exception as error:  # noqa: BLE001, RUF100
        return error
    return None


def _await(orders: socket.socket, slot: memoryview | None) -> tuple[Told, int, int, int]:
    """What the process hears of its job, with the job's files, when that is to begin."""
    data, _ = wire.receive(orders)
    if not data:
        _exit(0)
    told = _loads(data)
    _get_ready(told, slot)
    data, fds = wire.receive(orders, 3)
    if not data:
        _exit(0)
    orders.close()
    log, outcome, *group = fds
    return told, log, outcome, group[0] if group else -1


def _told(order: Order) -> Told:
    variables = [(os.fsencode(k), os.fsencode(v)) for k, v in environment(order).items()]
    mark = order.job_id.encode()[:JOB_ID_ROOM].ljust(JOB_ID_ROOM, b"\0")
    return variables, mark, order.job


def _get_ready(told: Told, slot: memoryview | None) -> None:
    variables, mark, _ = told
    for name, value in variables:
        environb[name] = value
    if slot is not None:
        # Where /proc/<pid>/environ shows it. That block is the fork server's own from its exec, and is
        # inherited by what a Task forks: so each of them can be found after the supervisor was killed.
        slot[:] = mark


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


def _identity(file: int) -> Identity:
    about = fstat(file)
    return about.st_dev, about.st_ino


def _teller(outcome: int, made: Identity) -> task.Tell:
    """What a task has to say of itself, once."""
    own = getpid()

    def tell(data: bytes) -> None:
        if getpid() != own:
            return  # the task has forked by hand, and what becomes of that is its own affair
        if _identity(outcome) != made:
            raise OSError(errno.EBADF, "something of the task's own has the number of the file")
        _tell(outcome, data)

    return tell


def _tell(outcome: int, data: bytes) -> None:
    while data:
        data = data[write(outcome, data) :]


def _execute(command: list[str]) -> int:
    program = command[0]
    try:
        if "/" in program and exec_errors.has_windows_lines(program):
            raise FileNotFoundError(errno.ENOENT, "no such interpreter", program)
        os.execvp(program, command)
    except OSError as error:
        why = exec_errors.why_not(command, error)
        sys.stderr.write(f"cortex: cannot run {program!r}: {why}\n")
        sys.stderr.flush()
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return NOT_FOUND if missing else NOT_RUNNABLE
