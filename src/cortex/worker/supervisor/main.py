"""A supervising process: forked by the fork server, independent of it from then on, it takes orders one
after another through a socket of its own, and watches over one job at a time (`supervisor`).

To be forked once and used for many jobs takes the dearest part of a start, the copying of pages, out of
each of them. Jobs are no nearer to one another for it: what they run in is forked for each from here,
where no code of a user's has run. It ends when its socket does, but not before the job that it has.
"""

from __future__ import annotations

import os

from cortex.worker import processes, wire
from cortex.worker.supervisor import watch
from cortex.worker.supervisor.station import Station
from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

    from cortex.worker.job import task
    from cortex.worker.messages import Order, Setup

# By names of their own, as in `child`: these are called around each fork, after which each page that is written to is
# one more to copy.
_set, _mask, _set_wakeup = signal.signal, signal.pthread_sigmask, signal.set_wakeup_fd
_TERM, _CHLD, _DEFAULT = signal.SIGTERM, signal.SIGCHLD, signal.SIG_DFL
_BLOCK, _SETMASK = signal.SIG_BLOCK, signal.SIG_SETMASK
_HELD = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)
_OWN = (_TERM, _CHLD)


def serve(
    setup: Setup, sock: socket.socket, slot: memoryview | None, found: task.CompiledTask | None
) -> NoReturn:
    """Never returns: it would return into the fork server, which looks for what is left of a job when
    this ends with anything but 0.

    Args:
        found: the task's module, as the fork server has compiled it.
    """
    code = 1
    try:
        os.setsid()
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        signals = Signals(for_python=setup.command is None)
        processes.close_all_but({0, 1, 2, signals.wake, signals.wake_write, sock.fileno()})
        bench = Station(setup, signals, sock, slot, found)
        bench.prepare_early()
        while (order := _next(bench)) is not None:
            job = watch.Supervisor(bench, order)
            if not job.run():
                code = int(not job.alone)
                break
        else:
            code = 0
        bench.close()
    finally:
        os._exit(code)


class Signals:
    """The signals of this process: they wake a poll, and SIGTERM means stop. Those that a terminal sends are
    held back for good; else all are as a job begins with them, once it has let through what is held."""

    def __init__(self, *, for_python: bool) -> None:
        """
        Args:
            for_python: what is forked stays an interpreter, and is to have the signals of one.
        """
        self.stop = False
        self.wake, self.wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        default, ignored = signal.SIG_DFL, signal.SIG_IGN
        signal.signal(signal.SIGHUP, default)
        signal.signal(signal.SIGINT, signal.default_int_handler if for_python else default)
        signal.signal(signal.SIGPIPE, ignored if for_python else default)
        signal.signal(signal.SIGXFSZ, ignored if for_python else default)
        self.take_back()

    def lend(self) -> None:
        """Have them as a job begins with them, but held back, until `take_back`: what is forked meanwhile
        need not undo what this process has set, which would copy the pages that it takes to do so."""
        _mask(_BLOCK, _OWN)
        _set_wakeup(-1)
        _set(_TERM, _DEFAULT)
        _set(_CHLD, _DEFAULT)

    def take_back(self) -> None:
        """A signal that was held back arrives now."""
        _set(_TERM, self._on_stop)
        _set(_CHLD, _on_child)
        _set_wakeup(self.wake_write, warn_on_full_buffer=False)
        _mask(_SETMASK, _HELD)

    def _on_stop(self, *_: object) -> None:
        self.stop = True


def _on_child(*_: object) -> None:
    """The poll is woken: that is all."""


def _next(bench: Station) -> Order | None:
    """The next order; None when there is none to come."""
    while (data := bench.hear()) == wire.READY:
        bench.get_ready()
    return bench.take(data) if data else None
