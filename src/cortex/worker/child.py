"""A forked process becomes the job's: its own session, groups, signals, files and environment; then
the user's command or Task. Called by the supervisor right after the fork; never returns.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys

from cortex.worker import task
from cortex.worker.files import read
from cortex.worker.messages import JOB_ID_ROOM, Outcome
from cortex.worker.processes import PR_SET_PDEATHSIG, close_all_but, prctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from cortex.worker.cgroups import Groups
    from cortex.worker.messages import Order, Setup

NOT_FOUND = 127
NOT_RUNNABLE = 126


class Files:
    """The file descriptors that a job's process starts from."""

    __slots__ = ("folder", "log", "pipe")

    def __init__(self, *, folder: int, log: int, pipe: int) -> None:
        self.folder = folder
        self.log = log
        self.pipe = pipe


def run(
    setup: Setup, order: Order, groups: Groups, files: Files, supervisor: int, slot: int
) -> NoReturn:
    code = 1
    try:
        config = _become(setup, order, groups, files, supervisor, slot)
        if setup.command is not None:
            code = _execute(setup.command)
        elif setup.path is not None:
            code = task.run(setup, setup.path, config, lambda said: _tell(files.pipe, said))
    except BaseException as error:  # noqa: BLE001, RUF100  # the platform's own: it fails the job
        _tell(files.pipe, Outcome(lost=True, message=f"the worker could not be set up: {error}"))
    finally:
        os._exit(code)


def _become(
    setup: Setup, order: Order, groups: Groups, files: Files, supervisor: int, slot: int
) -> object:
    os.setsid()
    # Without it a killed supervisor would leave the job running unseen.
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)
    groups.join()
    _reset_signals(for_python=setup.command is None)
    # Through the open folder: it may have been moved meanwhile.
    job = read(files.folder, "job.json")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(files.log, 1)
    os.dup2(files.log, 2)
    close_all_but({0, 1, 2, files.pipe})
    _mark(order.job_id, slot)
    os.environ.clear()
    os.environ.update(environment(setup, order))
    os.chdir(setup.project)
    config: object = None
    if setup.path is not None:
        config = json.loads(job or b"{}")["config"]
    # Last: a stop that came meanwhile ends the process now, by the default action.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return config


def environment(setup: Setup, order: Order) -> dict[str, str]:
    env = {
        **setup.env,
        "CORTEX_JOB_SPEC": f"{order.folder}/job.json",
        "CORTEX_JOB_ID": order.job_id,
        "CORTEX_JOB_DIR": f"{order.folder}/files",
    }
    if order.visible_gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = order.visible_gpus
    return env


def _reset_signals(*, for_python: bool) -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    if for_python:  # as an interpreter sets itself up
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _mark(job_id: str, slot: int) -> None:
    """Write the job's id where /proc/<pid>/environ shows it. That block is the fork server's own
    from its exec, and is inherited by what a Task forks: so that each of them can be found after
    the supervisor was killed."""
    if slot:
        ctypes.memset(slot, 0, JOB_ID_ROOM)
        value = job_id.encode()[:JOB_ID_ROOM]
        ctypes.memmove(slot, value, len(value))


def _tell(pipe: int, said: Outcome) -> None:
    data = said.dumps()
    while data:
        data = data[os.write(pipe, data) :]


def _execute(command: list[str]) -> int:
    program = command[0]
    found = shutil.which(program) if "/" not in program else program
    try:
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "it is not on PATH")
        os.execv(found, command)
    except OSError as error:
        why = error.strerror or str(error)
        sys.stderr.write(f"cortex: cannot run {program!r}: {why}\n")
        sys.stderr.flush()
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return NOT_FOUND if missing else NOT_RUNNABLE
