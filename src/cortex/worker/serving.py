"""A supervising process: forked by the fork server, independent of it from then on, it takes orders one
after another through a socket of its own, and watches over one job at a time (`supervisor`).

To be forked once and used for many jobs takes the dearest part of a start, the copying of pages, out of
each of them. Jobs are no nearer to one another for it: what they run in is forked for each from here,
where no code of a user's has run. It ends when its socket does, but not before the job that it has.
"""

from __future__ import annotations

import os

from cortex.worker import processes, supervisor, wire
from cortex.worker.bare import signal
from cortex.worker.bench import Bench

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

    from cortex.worker import task
    from cortex.worker.messages import Order, Setup


def serve(setup: Setup, sock: socket.socket, slot: int, found: task.Found | None) -> NoReturn:
    """Never returns: it would return into the fork server, which looks for what is left of a job when
    this ends with anything but 0.

    Args:
        found: the task's module, as the fork server has compiled it.
    """
    code = 1
    try:
        os.setsid()
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        signals = Signals()
        processes.close_all_but({0, 1, 2, signals.wake, signals.wake_write, sock.fileno()})
        bench = Bench(setup, signals, sock, slot, found)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a SIGTERM held back arrives here
        while (order := _next(bench)) is not None:
            watch = supervisor.Supervisor(bench, order)
            if not watch.run():
                code = int(not watch.alone)
                break
        else:
            code = 0
        bench.close()
    finally:
        os._exit(code)


class Signals:
    """The signals of this process: they wake a poll, and SIGTERM means stop. Those of the others are as at
    a start: the fork server has seen to it."""

    def __init__(self) -> None:
        self.stop = False
        self.wake, self.wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_stop)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)

    def _on_stop(self, *_: object) -> None:
        self.stop = True


def _next(bench: Bench) -> Order | None:
    """The next order; None when there is none to come."""
    while (data := bench.hear()) == wire.READY:
        bench.get_ready()
    return bench.take(data) if data else None
