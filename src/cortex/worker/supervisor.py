"""Watches over one job from start to end, and writes how it ended: the one place that decides so.

Forked by the fork server, and independent of it and of the operator from then on. It makes the start
record (the fence), the job's groups and its process, enforces deadline and memory, honours SIGTERM as
"stop the job", leaves no process behind, and writes the exit record.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from cortex.worker import cgroups, child, files, processes
from cortex.worker.messages import ExitRecord, Outcome, Reply, StartRecord, shorten, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from cortex.worker.messages import Order, Setup

EXITED, OUT_OF_MEMORY, TIMED_OUT, STOPPED, LOST = (
    "exited",
    "out_of_memory",
    "timed_out",
    "stopped",
    "lost",
)
WATCH_S = 0.05
KILL_S = 5.0
DISK_TRIES = 60
LONGEST_SLEEP_S = 86_400.0  # poll takes milliseconds as an int of C; who sleeps looks again


def run(setup: Setup, order: Order, start_ns: int, slot: int, engine: int) -> NoReturn:
    """Never returns: it would return into the fork server."""
    try:
        _Supervisor(setup, order, start_ns, slot).run(engine)
    finally:
        os._exit(0)


class _Supervisor:
    def __init__(self, setup: Setup, order: Order, start_ns: int, slot: int) -> None:
        self.setup = setup
        self.order = order
        self.start_ns = start_ns
        self.slot = slot
        self.folder = files.open_folder(order.folder)
        self.groups = cgroups.Groups(order)
        self.poller = select.poll()
        self.stop = False
        self.alone = False  # no descendant is left
        self.worker = 0
        self.status: int | None = None
        self.end_ns = 0
        self.pipe = -1
        self.said = b""
        self.oom_fd: int | None = None
        self.oom_look = False
        self.log_start = 0
        self.wake = self._own_signals()
        self.deadline = self._deadline()

    def run(self, engine: int) -> None:
        os.setsid()
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
        processes.close_all_but({0, 1, 2, self.folder, self.wake, self.wake_write, engine})
        if not files.create(self.folder, f"start.{self.order.attempt}", self._start_record()):
            return
        self._announce(engine)
        try:
            ending = self._supervise()
        except Exception as error:  # noqa: BLE001, RUF100  # the platform's own failure
            self._kill()
            record = self._record(LOST, f"the supervisor failed: {error!r}")
        else:
            record = self._judge(ending)
        self.groups.remove()
        self._write(record)

    def _announce(self, engine: int) -> None:
        """Tell the engine that the job has started: not earlier, for until the record is made an
        operator that comes up may fence the attempt off. It may be gone, and need not know."""
        order = self.order
        reply = Reply(
            job_id=order.job_id, attempt=order.attempt, start_ns=self.start_ns, recorded=True
        )
        with contextlib.suppress(OSError):
            os.write(engine, reply.dumps())
        os.close(engine)

    def _supervise(self) -> str:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a SIGTERM held back arrives here
        if self.stop:
            return STOPPED
        if self._overdue():
            return TIMED_OUT
        self.groups.create()
        self.oom_fd = self.groups.watch(self.poller)
        self._fork()
        ending = self._watch()
        if ending in (STOPPED, TIMED_OUT):
            self._ask_to_end()
        self._kill()
        return ending

    def _watch(self) -> str:
        """Until something ends the run; what came first wins."""
        watchdog = self.order.mem if self.order.memory_kind == "watchdog" else None
        while True:
            self._reap()
            if self.status is not None:
                return EXITED
            if self.oom_look and self.groups.oom_killed():
                return OUT_OF_MEMORY
            if self.stop:
                return STOPPED
            if self._overdue():
                return TIMED_OUT
            if watchdog is not None:
                pids = list(processes.descendants(os.getpid()))
                if processes.memory(pids, watchdog) > watchdog:
                    return OUT_OF_MEMORY
            # The eventfd of v1 tells that the limit is hit, a moment before the kill is counted.
            self._sleep(WATCH_S if watchdog is not None or self.oom_look else None, self.deadline)

    def _ask_to_end(self) -> None:
        """SIGTERM to the whole tree, and the time to save its work."""
        until = time.monotonic() + self.order.grace_s
        # A stopped process would not see the SIGTERM before the SIGKILL.
        processes.send(processes.descendants(os.getpid()), signal.SIGTERM, signal.SIGCONT)
        while not self._reap() and time.monotonic() < until:
            self._sleep(None, until)

    def _kill(self) -> None:
        """End all that is left of the tree, however it was daemonised: a subreaper's descendants
        stay below it. Stopping before killing is what a fork bomb cannot outrun."""
        if self._reap():
            return
        until = time.monotonic() + KILL_S
        if self.groups.kill():
            soon = time.monotonic() + 0.2
            while not self._reap() and time.monotonic() < soon:
                self._sleep(None, soon)
        stopped: dict[int, int] = {}
        while not self._reap() and time.monotonic() < until:
            known = len(stopped)
            for pid, ticks in processes.walk(os.getpid()):
                if stopped.get(pid) != ticks:
                    processes.send({pid: ticks}, signal.SIGSTOP)
                    stopped[pid] = ticks
            if len(stopped) == known:
                processes.send(stopped, signal.SIGKILL)
                self._sleep(0.02, until)

    def _judge(self, ending: str) -> ExitRecord:
        code = -signal.SIGKILL if self.status is None else os.waitstatus_to_exitcode(self.status)
        said = self._outcome()
        if said.lost:
            return self._record(LOST, said.message)
        if ending == EXITED and self.groups.oom_killed():
            ending = OUT_OF_MEMORY
        if ending != EXITED:
            return self._record(ending, self._why(ending), code)
        if code == 0:
            return self._record(EXITED, None, code, said)
        words = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        if code > 0 and said.message:
            return self._record(EXITED, said.message, code)
        last = self._last_line()
        return self._record(EXITED, f"{words}: {last}" if last else words, code)

    def _why(self, ending: str) -> str:
        if ending == TIMED_OUT:
            return f"timeout of {self.order.timeout} s passed"
        if ending == STOPPED:
            return "stopped"
        if self.groups.oom_killed() and not self.groups.limit_was_hit():
            return "killed because the machine ran out of memory"
        return f"exceeded its memory limit of {size(self.order.mem or 0)}"

    def _record(
        self, ending: str, message: str | None, code: int = -9, said: Outcome | None = None
    ) -> ExitRecord:
        return ExitRecord(
            ending=ending,
            exit_code=code,
            start_ns=self.start_ns,
            end_ns=max(self.start_ns, self.end_ns or time.time_ns()),
            message=None if message is None else shorten(message),
            result=said.result if said else None,
            has_result=said.has_result if said else False,
        )

    def _write(self, record: ExitRecord) -> None:
        for _ in range(DISK_TRIES):
            try:
                files.replace(self.folder, f"exit.{self.order.attempt}", record.dumps())
            except OSError:  # a full disk, most likely; the record is worth waiting for
                time.sleep(1)
            else:
                return

    def _fork(self) -> None:
        log = os.open(
            "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=self.folder
        )
        self.log_start = os.fstat(log).st_size
        self.pipe, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write, True)
        parent = os.getpid()
        # Held back so that a stop finds the child with the default action, not with our handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
        self.worker = os.fork()
        if self.worker == 0:
            opened = child.Files(folder=self.folder, log=log, pipe=write)
            child.run(self.setup, self.order, self.groups, opened, parent, self.slot)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.close(log)
        os.close(write)
        self.poller.register(self.pipe, select.POLLIN)

    def _reap(self) -> bool:
        """Collect what has ended; True when nothing is left below."""
        while not self.alone:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.alone = True
                break
            if pid == 0:
                break
            if pid == self.worker:
                self.status = status
                self.end_ns = time.time_ns()
        return self.alone

    def _sleep(self, most_s: float | None, until: float | None) -> None:
        """Until something happens, `most_s` have passed or it is `until`."""
        left = [most_s] if most_s is not None else []
        if until is not None:
            left.append(until - time.monotonic())
        timeout = max(0.0, min(*left, LONGEST_SLEEP_S) * 1000 + 1) if left else None
        for fd, _ in self.poller.poll(timeout):
            if fd == self.wake:
                os.read(fd, 512)
            elif fd == self.pipe:
                self._drain()
            elif fd == self.oom_fd:
                self.oom_look = True
                self.poller.unregister(fd)

    def _drain(self) -> None:
        """The end of the file is not waited for: what the worker forked may hold the pipe open."""
        while True:
            try:
                data = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self.poller.unregister(self.pipe)
                return
            self.said += data

    def _outcome(self) -> Outcome:
        if self.pipe < 0:
            return Outcome()
        with contextlib.suppress(KeyError, OSError):  # its end was seen before
            self._drain()
        try:
            return Outcome.loads(self.said) if self.said else Outcome()
        except (ValueError, TypeError):
            return Outcome()  # killed while it wrote

    def _last_line(self) -> str:
        text = files.tail(self.folder, "log", self.log_start).decode("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def _start_record(self) -> bytes:
        about = processes.stat("self")
        return StartRecord(
            pid=os.getpid(),
            ticks=about[2] if about else 0,
            boot=processes.boot_id(),
            start_ns=self.start_ns,
            cgroups=cgroups.paths(self.order),
            gpus=self.order.gpus,
        ).dumps()

    def _own_signals(self) -> int:
        read, self.wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_stop)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        self.poller.register(read, select.POLLIN)
        return read

    def _on_stop(self, *_: object) -> None:
        self.stop = True

    def _deadline(self) -> float | None:
        if self.order.deadline_ns is None:
            return None
        return time.monotonic() + (self.order.deadline_ns - time.time_ns()) / 1e9

    def _overdue(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
