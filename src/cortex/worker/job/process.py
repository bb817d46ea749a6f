"""The process of one job, from its fork to the user's command or Task: session, signals, control
group, files and environment. If there is time, the process is forked ahead and waits for its job;
then most of its setup is done before the job comes.

Copy-on-write budget: each object that the process touches for the first time is a page that the
kernel copies. Therefore everything is passed as arguments, functions are bound to names of this
module at import (an attribute is found through tables, and its name is reference-counted), and the
parent sets the signals before the fork (`Signals.set_job_defaults`).
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

    OrderSocket = socket.socket | None
    Identity = tuple[int, int]  # device and inode
    Variables = list[tuple[bytes, bytes]]
    # Environment variables, the job id as `Station.environ_slot` shows it, the content of job.json.
    JobData = tuple[Variables, bytes, dict[str, object]]
    # With the descriptors of log, outcome file and control group, and the outcome file's identity.
    Assignment = tuple[JobData, int, int, int, Identity]

globals()["__builtins__"] = standard.BUILTINS

NOT_FOUND = 127
NOT_RUNNABLE = 126
_WARM_UP_RUNS = 20  # by the eighth run, CPython has specialized each instruction
_WARM_UP_VARIABLE = b"CORTEX_REHEARSED"
_SIGKILL, _SETMASK, _sigmask = signal.SIGKILL, signal.SIG_SETMASK, signal.pthread_sigmask
_prctl, _loads = libc.prctl, marshal.loads


class Job:
    """A job's order and the descriptors of its files: log, outcome file, and the file that puts a
    process into the job's control group."""

    __slots__ = ("join_fd", "log", "order", "outcome")

    def __init__(self, order: Order, log: int, outcome: int) -> None:
        self.order = order
        self.log = log
        self.outcome = outcome
        self.join_fd = -1  # none


class Preforked:
    """The supervisor's handle of a process that was forked ahead and waits for its job."""

    __slots__ = ("_sock", "pid")

    def __init__(self, station: Station) -> None:
        self._sock, theirs = syscalls.socketpair()
        self.pid = _fork(station, (self._sock.fileno(),), None, theirs)
        theirs.close()

    def send_order(self, order: Order) -> None:
        """Send the data of the job. From then on, the process can run no other job."""
        with contextlib.suppress(OSError):  # the process is dead, as `start_job` will find
            # Not the engine's JSON: the pages that reading it takes would be copied in each job.
            wire.send(self._sock, marshal.dumps(_job_data(order)))

    def start_job(self, job: Job) -> None:
        """Start the job whose order was sent.

        Raises:
            OSError: the process is dead. The job has not begun; the process has been reaped.
        """
        try:
            files = (job.log, job.outcome)
            wire.send(self._sock, wire.GO, files if job.join_fd < 0 else (*files, job.join_fd))
        except OSError:
            self.kill()
            raise
        self._sock.close()

    def kill(self) -> None:
        """Kill and reap the process, which gets no job."""
        self._sock.close()
        os.kill(self.pid, signal.SIGKILL)  # it would exit by itself, unless something stopped it
        os.waitpid(self.pid, 0)


def warm_up(setup: Setup, path: str) -> None:
    """Run, before any fork, the code that each job's process runs; leave no trace that a program
    can observe.

    CPython writes to byte code that runs for the first time, and looks a library's function up at
    its first call. Without this, that would copy pages in each job's process anew.
    """
    devnull = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    write_outcome = _outcome_writer(devnull, _identity(devnull))
    with open(devnull, "w", encoding="utf-8") as stream:
        for _ in range(_WARM_UP_RUNS):
            _set_environment(([(_WARM_UP_VARIABLE, b"1")], b"", {}), None)
            del environb[_WARM_UP_VARIABLE]
            getppid()
            task.warm_up(setup, path, write_outcome)
            print(time.time_ns(), file=stream, flush=True)


def outcome_file() -> int:
    """Make a new outcome file; its descriptor. It lies in memory and has no size limit, so that
    writing it never blocks."""
    return os.memfd_create("outcome")


def start(station: Station, job: Job, fds: tuple[int, ...]) -> int:
    """Fork a process that runs a job at once; its pid. `Station.refresh_compiled` was called just
    before.

    Args:
        fds: descriptors that the process must close, in addition to `Station.private_fds`.
    """
    work = (_job_data(job.order), job.log, job.outcome, job.join_fd, _identity(job.outcome))
    return _fork(station, fds, work, None)


def _fork(
    station: Station, fds: tuple[int, ...], work: Assignment | None, orders: OrderSocket
) -> int:
    """Fork a process that does this work, or the work that comes through the socket."""
    setup, compiled, slot = station.setup, station.compiled, station.environ_slot
    project, path = setup.project, setup.path
    supervisor, inherited = getpid(), (*station.private_fds, *fds)
    station.signals.set_job_defaults()
    # The collections at the job's end then see only its own objects, and copy no page of others.
    freeze()
    if compiled is not None:
        compiled.make_module()
    try:
        pid = fork()
        if pid == 0:
            _run(setup, project, path, compiled, slot, supervisor, inherited, work, orders)
    finally:
        station.signals.restore_own_handlers()
    return pid


def _run(
    setup: Setup,
    project: str,
    path: str | None,
    compiled: task.CompiledTask | None,
    slot: memoryview | None,
    supervisor: int,
    inherited: tuple[int, ...],
    work: Assignment | None,
    orders: OrderSocket,
) -> NoReturn:
    """The whole life of the forked process."""
    code, outcome = 1, -1
    try:
        failed = _leave_supervisor(supervisor, inherited)
        if work is not None:
            data, log, outcome, join_fd, identity = work
            _set_environment(data, slot)
        elif orders is not None:
            data, log, outcome, join_fd = _await_job(orders, slot)
            identity = _identity(outcome)
            compiled = task.if_unchanged(compiled, path)
        if failed is not None:
            raise failed
        chdir(project)  # not ahead of the job: the folder may be missing for a while
        _, _, job = data
        if join_fd >= 0:
            write(join_fd, b"0")
            close(join_fd)
        dup2(log, 1)  # standard input is /dev/null since the fork server
        dup2(log, 2)
        close(log)
        # Last: a stop that came meanwhile ends the process now, by the default action.
        _sigmask(_SETMASK, ())
        if path is not None:
            task.run(setup, path, compiled, job, _outcome_writer(outcome, identity))
        elif setup.command is not None:
            code = _execute(setup.command)
    except BaseException as error:  # noqa: BLE001, RUF100  # a platform fault: the job is lost
        lost = Outcome(lost=True, message=f"the worker could not be set up: {error}")
        _write_all(outcome, lost.dumps())
    finally:
        _exit(code)


def _leave_supervisor(supervisor: int, inherited: tuple[int, ...]) -> Exception | None:
    """Do the setup that needs no job; the error if that failed. The caller raises it when it has a
    job, for which it can be reported."""
    try:
        setsid()
        # Without it, the job would go on unsupervised after its supervisor was killed.
        if _prctl(PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG failed")
        if getppid() != supervisor:
            _exit(1)
        for fd in inherited:
            close(fd)
    except Exception as error:  # noqa: BLE001, RUF100
        return error
    return None


def _await_job(orders: socket.socket, slot: memoryview | None) -> tuple[JobData, int, int, int]:
    """Wait for a job and for its start: its data, and the descriptors of log, outcome file and
    control group. Exits if the supervisor closes the socket."""
    message, _ = wire.receive(orders)
    if not message:
        _exit(0)
    data = _loads(message)
    _set_environment(data, slot)
    message, fds = wire.receive(orders, 3)
    if not message:
        _exit(0)
    orders.close()
    log, outcome, *others = fds
    return data, log, outcome, others[0] if others else -1


def _job_data(order: Order) -> JobData:
    variables = [(os.fsencode(k), os.fsencode(v)) for k, v in environment(order).items()]
    mark = order.job_id.encode()[:JOB_ID_ROOM].ljust(JOB_ID_ROOM, b"\0")
    return variables, mark, order.job


def _set_environment(data: JobData, slot: memoryview | None) -> None:
    variables, mark, _ = data
    for name, value in variables:
        environb[name] = value
    if slot is not None:
        # /proc/<pid>/environ shows the environment block that the fork server got at its exec.
        # Processes that a Task forks inherit the block: with the job's id in it, each of them can
        # be found after the supervisor was killed.
        slot[:] = mark


def environment(order: Order) -> dict[str, str]:
    """The environment variables of one job, without those that all jobs of its version have."""
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


def _outcome_writer(outcome: int, identity: Identity) -> task.WriteOutcome:
    """The function with which a task writes its outcome, once."""
    own = getpid()

    def write_outcome(data: bytes) -> None:
        if getpid() != own:
            return  # a process that the task has forked by itself: it has no outcome
        if _identity(outcome) != identity:
            raise OSError(errno.EBADF, "the task has opened another file with this descriptor")
        _write_all(outcome, data)

    return write_outcome


def _write_all(outcome: int, data: bytes) -> None:
    while data:
        data = data[write(outcome, data) :]


def _execute(command: list[str]) -> int:
    """Replace this process by the user's program; the exit code if that failed."""
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
