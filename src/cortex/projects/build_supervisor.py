"""The supervisor of one build, a process of its own: `python -I -S build_supervisor.py PLAN`. Started by `building`.

Its standard input is a pipe from the operator: when that is closed, by the operator or by its end, the build is
over. All that the steps have started then ends with it, also what has left their sessions, cleared its environment
or ignores signals: a process whose parent has ended becomes a child of this one.

Where builds run as another user this process has the operator's rights, so that the build cannot signal it. It touches
no path that this user may change: each step is a child, which becomes the user first.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress

if __name__ == "__main__":  # without site-packages, where this one may lie
    _cortex = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.append(os.path.dirname(_cortex))

from cortex.worker import processes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_GONE_S = 5.0
"""What a disk that does not answer keeps from ending is left behind when nothing else has ended for so long."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_DEFAULT = (*_IGNORED, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD)


def main(plan: dict[str, Any]) -> None:
    report: int = plan["report"]
    os.set_inheritable(report, False)
    processes.prctl(processes.PR_SET_NO_NEW_PRIVS, 1)
    processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
    for ignored in _IGNORED:  # the operator decides, and a service's end is its end
        signal.signal(ignored, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    try:
        for number, step in enumerate(plan["steps"]):
            os.write(report, f"{number}\n".encode())
            status = _wait(_begin(plan, step), woken)
            if status != 0:
                break
        _end_all()
        if status is not None:
            _wait(_begin(plan, {"remove": plan["temporary"]}), woken)
            os.write(report, f"{number} {status}\n".encode())
    finally:
        _end_all()


def _wait(step: int, woken: int) -> int | None:
    """The exit code of a step, as `subprocess` has it; None when the operator has let go of the build."""
    poller = select.poll()
    poller.register(sys.stdin.fileno(), select.POLLIN)
    poller.register(woken, select.POLLIN)
    while True:
        found = None
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] == step:
                    found = os.waitstatus_to_exitcode(ended[1])
        if found is not None:
            return found
        if any(fd != woken for fd, _ in poller.poll()):
            return None
        with suppress(BlockingIOError):
            os.read(woken, 4096)


def _begin(plan: dict[str, Any], step: dict[str, Any]) -> int:
    pid = os.fork()
    return pid or _child(plan, step)


def _child(plan: dict[str, Any], step: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _DEFAULT:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        processes.close_all_but({0, 1, 2})
        if plan["user"] is not None:
            os.setgroups(plan["groups"])
            os.setresgid(*[plan["group"]] * 3)
            os.setresuid(*[plan["user"]] * 3)
        # Once it has become the user: that resets it.
        processes.prctl(processes.PR_SET_PDEATHSIG, signal.SIGKILL)
        # From here on it has the rights of the user, whose folders it works in.
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
    until = time.monotonic() + _GONE_S
    while time.monotonic() < until:
        processes.kill_all(lambda: processes.walk(os.getpid()))
        try:
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                until = time.monotonic() + _GONE_S
        except ChildProcessError:
            return
        time.sleep(0.002)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
