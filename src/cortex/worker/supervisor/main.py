"""The main loop of a supervising process. The fork server forks the process, which from then on
does not depend on it. The engine sends orders through the process's own socket; the process
supervises one job at a time (`watch`).

One supervising process serves many jobs, because copying pages is the most expensive part of a
fork. The jobs stay isolated from each other: each runs in a process that is forked from this one,
and no code of a user ever runs in this one. The process exits when its socket is closed, but not
before its current job has ended.
"""

from __future__ import annotations

import os

from cortex.worker import processes, wire
from cortex.worker.supervisor import watch
from cortex.worker.supervisor.signals import Signals
from cortex.worker.supervisor.station import Station

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

    from cortex.worker.job import task
    from cortex.worker.messages import Order, Setup


def serve(
    setup: Setup,
    sock: socket.socket,
    environ_slot: memoryview | None,
    compiled: task.CompiledTask | None,
) -> NoReturn:
    """Run the supervising process. Never returns: the caller is the code of the fork server.

    An exit code other than 0 makes the fork server search for leftover processes of a job.

    Args:
        environ_slot: where the environment block shows the job's id (`messages.JOB_ID_ROOM`).
        compiled: the task's module, as the fork server has compiled it.
    """
    code = 1
    try:
        os.setsid()
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        signals = Signals(for_python=setup.command is None)
        processes.close_all_but({0, 1, 2, signals.wake, signals.wake_write, sock.fileno()})
        station = Station(setup, signals, sock, environ_slot, compiled)
        station.try_prepare_workspace()
        while (order := _next_order(station)) is not None:
            supervisor = watch.Supervisor(station, order)
            if not supervisor.run():
                code = int(not supervisor.is_childless)
                break
        else:
            code = 0
        station.close()
    finally:
        os._exit(code)


def _next_order(station: Station) -> Order | None:
    """Wait for the next order; None when the engine sends no more."""
    while (data := station.receive()) == wire.READY:
        station.prefork()
    return station.load_order(data) if data else None
