"""The supervisor of one build, a process of its own: `python -I -S build_supervisor.py PLAN`.
Started by `builder`.

Its standard input is a pipe from the operator. When the operator closes the pipe or exits, the
supervisor ends the build with every process that the steps have started, including those that left
their sessions, cleared their environment or ignore signals: a process whose parent has exited
becomes a child of the supervisor.

For builds as another user the supervisor has the operator's rights, so that the build cannot signal
it. It touches no path that this user may change: each step is a child process, which becomes the
user first.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress

if __name__ == "__main__":  # -S leaves out site-packages, where this package may be installed
    _cortex = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.append(os.path.dirname(_cortex))

from cortex.worker import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_END_TIMEOUT_S = 5.0
"""After so long without an exit, the processes that remain are abandoned: a disk that does not
answer keeps them from exiting."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_DEFAULT = (*_IGNORED, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD)


def main(plan: dict[str, Any]) -> None:
    report: int = plan["report"]
    os.set_inheritable(report, False)
    processes.prctl(processes.PR_SET_NO_NEW_PRIVS, 1)
    processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
    for ignored in _IGNORED:  # the operator ends builds; a service manager ends the operator
        signal.signal(ignored, signal.SIG_IGN)
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(wakeup_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_end)
    try:
        for number, step in enumerate(plan["steps"]):
            os.write(report, f"{number}\n".encode())
            status = _wait(_start(plan, step), wakeup)
            if status != 0:
                break
        _end_all()
        if status is not None:
            _wait(_start(plan, {"remove": plan["temporary"]}), wakeup)
            os.write(report, f"{number} {status}\n".encode())
    finally:
        _end_all()


def _wait(step: int, wakeup: int) -> int | None:
    """Wait for a step.

    Args:
        step: its pid.
        wakeup: a pipe that becomes readable when a child exits.

    Returns:
        Its exit code as in `subprocess`; None if the operator has closed the pipe.
    """
    poller = select.poll()
    poller.register(sys.stdin.fileno(), select.POLLIN)
    poller.register(wakeup, select.POLLIN)
    while True:
        code = None
        with suppress(ChildProcessError):
            while (exited := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if exited[0] == step:
                    code = os.waitstatus_to_exitcode(exited[1])
        if code is not None:
            return code
        if any(fd != wakeup for fd, _ in poller.poll()):
            return None
        with suppress(BlockingIOError):
            os.read(wakeup, 4096)


def _start(plan: dict[str, Any], step: dict[str, Any]) -> int:
    """The pid of a new process that runs the step."""
    pid = os.fork()
    return pid or _run_step(plan, step)


def _run_step(plan: dict[str, Any], step: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _DEFAULT:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        processes.close_all_but({0, 1, 2})
        if plan["user"] is not None:
            os.setgroups(plan["groups"])
            os.setresgid(*[plan["group"]] * 3)
            os.setresuid(*[plan["user"]] * 3)
        # After the change of user, which resets this setting.
        processes.prctl(processes.PR_SET_PDEATHSIG, signal.SIGKILL)
        # From here on the process has the rights of the user whose folders it works in.
        if "copy" in step:
            os.mkdir(plan["temporary"], 0o700)
            if step["copy"] is not None:
                import shutil

                project, source = step["copy"]
                shutil.copytree(project, source, symlinks=True)
        elif "remove" in step:
            _remove(step["remove"])
        else:
            os.chdir(step["folder"])
            os.execv(step["command"][0], step["command"])
        code = 0
    except BaseException as error:
        with suppress(OSError):
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def _remove(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def _end_all() -> None:
    """End every process below this one, and collect them."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while time.monotonic() < deadline:
        processes.kill_all(lambda: processes.walk(os.getpid()))
        try:
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                deadline = time.monotonic() + _END_TIMEOUT_S
        except ChildProcessError:
            return
        time.sleep(0.002)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
