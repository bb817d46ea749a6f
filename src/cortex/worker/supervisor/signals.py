"""Signal handling of a supervising process, and of the jobs that it forks."""

from __future__ import annotations

import os

from cortex.worker.syscalls import signal

# Bound to names of this module, as in `job.process`: they are called around each fork, after which
# each page that is written to is one more page to copy.
_set, _mask, _set_wakeup = signal.signal, signal.pthread_sigmask, signal.set_wakeup_fd
_TERM, _CHLD, _DEFAULT = signal.SIGTERM, signal.SIGCHLD, signal.SIG_DFL
_BLOCK, _SETMASK = signal.SIG_BLOCK, signal.SIG_SETMASK
_BLOCKED = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE)
_HANDLED = (_TERM, _CHLD)


class Signals:
    """The signals of this process: SIGTERM and SIGCHLD wake a poll, and SIGTERM also means stop.

    The signals that a terminal sends stay blocked in this process. All other dispositions are those
    that a job starts with; the job only has to unblock its signals.
    """

    def __init__(self, *, for_python: bool) -> None:
        """
        Args:
            for_python: the jobs stay Python interpreters, and get the dispositions of one.
        """
        self.stop = False
        self.wake, self.wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        default, ignored = signal.SIG_DFL, signal.SIG_IGN
        signal.signal(signal.SIGHUP, default)
        signal.signal(signal.SIGINT, signal.default_int_handler if for_python else default)
        signal.signal(signal.SIGPIPE, ignored if for_python else default)
        signal.signal(signal.SIGXFSZ, ignored if for_python else default)
        self.restore_own_handlers()

    def set_job_defaults(self) -> None:
        """Set the dispositions that a job starts with, with the signals blocked, until
        `restore_own_handlers`. A process that is forked in between has nothing to undo: undoing
        would copy the pages that it takes.
        """
        _mask(_BLOCK, _HANDLED)
        _set_wakeup(-1)
        _set(_TERM, _DEFAULT)
        _set(_CHLD, _DEFAULT)

    def restore_own_handlers(self) -> None:
        """Set the handlers of this process. A signal that was blocked meanwhile is delivered."""
        _set(_TERM, self._on_stop)
        _set(_CHLD, _on_child)
        _set_wakeup(self.wake_write, warn_on_full_buffer=False)
        _mask(_SETMASK, _BLOCKED)

    def _on_stop(self, *_: object) -> None:
        self.stop = True


def _on_child(*_: object) -> None:
    """Do nothing: the wakeup descriptor has woken the poll."""
