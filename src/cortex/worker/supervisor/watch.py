"""Watches over one job from start to end, and writes how it ended: the one place that decides so.

Run by a supervising process (`serving`), which depends on no other. It makes the start record (the
fence), has the job's group from the engine, makes its process, enforces deadline and memory, honours SIGTERM as "stop the
job", leaves no process behind, writes the exit record, and tells the engine of both if it is there.
"""

from __future__ import annotations

import contextlib
import os
import time

from cortex.worker import cgroups, files, processes, wire
from cortex.worker.job import process
from cortex.worker.messages import (
    MOST_RECORD,
    Reply,
    StartRecord,
    encode,
)
from cortex.worker.supervisor import logfile, verdict
from cortex.worker.supervisor.verdict import EXITED, LOST, OUT_OF_MEMORY, STOPPED, TIMED_OUT
from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cortex.worker.messages import Order
    from cortex.worker.supervisor.station import Station

WATCH_S = 0.05
KILL_S = 5.0
LEFT_S = 1.0
"""For what a job has left running to end by itself: a program that reads from it finds the end of its input now, and
writes what it still has."""
TRACKER_S = 10.0
"""For a resource tracker to remove what its job has left."""
FORK_AGAIN_S = 0.2
LONGEST_ROUND_S = 0.1
LONGEST_PAUSE_S = 5.0
TELL_START_S = 0.01
"""A job that is over sooner is told of once: its end says when it started."""


class Supervisor:
    """One job's."""

    def __init__(self, bench: Station, order: Order) -> None:
        self.bench = bench
        self.order = order
        self.start_ns = time.time_ns()
        self.folder = files.open_folder(order.folder)
        self.group = cgroups.Group(order, bench.take_group())
        self.log = logfile.Log(self.folder, order.log_limit)
        self.alone = False  # no descendant is left
        self.left: list[str] = []  # the programs that the job had left running
        self.tell_at: float | None = None  # when to tell of the start, unless it is told
        self.worker = 0
        self.status: int | None = None
        self.end_ns = 0
        self.job: process.Job | None = None
        self.oom_look = False
        self.log_start = 0

    def run(self) -> bool:
        """Do it all; whether this process is as it was before, and may take another job."""
        failed = self._laid_out()
        if self.order.held:
            if self.bench.hear() != wire.GO:
                return False
            self.start_ns = time.time_ns()
        try:
            if failed is not None:
                raise failed
            name = f"start.{self.order.attempt}"
            if not self.bench.reuse.create_start(self.folder, name, self._start_record()):
                return False
        except OSError as error:
            # No code has run, and none is going to: nobody else has this order.
            self._tell(error=error.strerror or str(error), errno=error.errno or 0)
            return False
        self.tell_at = time.monotonic() + TELL_START_S
        try:
            ending = self._supervise()
        except Exception as error:  # noqa: BLE001, RUF100  # the platform's own failure
            self.bench.dismiss()  # before it is killed with the rest, and its pid is another's
            self._kill()
            record = verdict.lost(self, f"the supervisor failed: {error!r}")
        else:
            record = verdict.judge(self, ending)
        self._keep_changes()
        self.log.look()
        data = record.dumps()
        is_last = self.alone and record.ending != LOST
        is_written = self._write(data, is_last=is_last)
        if not is_written and len(data) > MOST_RECORD:
            record.result, record.has_result = None, False
            record.message = "the return value was lost with the folder of the job"
            data = record.dumps()
        told = record.fields() if len(data) <= MOST_RECORD else None
        # It would be there still if the job never began; the engine believes no end of what has a child.
        self.bench.dismiss()
        self._tell(ended=True, record=told)
        if not is_written:
            return False
        self.bench.keep(self.folder, self._exit_name)
        if self.group.event >= 0 and not self.oom_look:
            self.bench.woken.unregister(self.group.event)
        self.group.close()
        for fd in self._files():
            os.close(fd)
        is_alone = self._reap()
        is_fit = is_alone and not self.bench.signals.stop and record.ending != LOST
        if not is_fit or not self.bench.workspace.is_sound():
            return False
        self.bench.restore()
        return True

    def _laid_out(self) -> OSError | None:
        """Make all that a job finds and writes; what went wrong with that."""
        try:
            self.bench.prepare()
            job = encode(self.order.job).encode()
            self.bench.reuse.lay_out(self.folder, self.bench.last_folder, job)
            log = logfile.open_to_write(self.folder)
            self.job = process.Job(self.order, log, process.outcome_file())
        except OSError as error:
            return error
        return None

    def _keep_changes(self) -> None:
        """What the job has changed in its current folder goes into its own."""
        try:
            self.bench.workspace.keep(self.folder)
        except OSError as error:
            words = f"cortex: not all that the job wrote in its current folder was kept: {error}\n"
            if self.job is not None:
                with contextlib.suppress(OSError):
                    os.write(self.job.log, words.encode("utf-8", "backslashreplace"))

    def _files(self) -> list[int]:
        """The open files that are this job's alone, but for its folder and its group's."""
        return [] if self.job is None else [self.job.log, self.job.outcome]

    def _tell_start(self) -> None:
        if self.tell_at is not None:
            self.tell_at = None
            self._tell(recorded=True)

    def _tell(
        self,
        *,
        recorded: bool = False,
        ended: bool = False,
        record: dict[str, object] | None = None,
        error: str | None = None,
        errno: int = 0,
    ) -> None:
        """Tell the engine of a record: not before it is made, for until then an operator that comes
        up may fence the attempt off. It may be gone, and need not know."""
        reply = Reply(
            job_id=self.order.job_id,
            attempt=self.order.attempt,
            start_ns=self.start_ns,
            recorded=recorded,
            ended=ended,
            record=record,
            error=error,
            errno=errno,
        )
        try:
            self.bench.sock.send(reply.dumps())
        except OSError:
            pass

    def _supervise(self) -> str:
        if self.bench.signals.stop:
            return STOPPED
        if self._overdue():
            return TIMED_OUT
        self.group.open(self.bench.woken)
        self._fork()
        self.group.joined()
        ending = self._watch()
        if ending in (STOPPED, TIMED_OUT):
            self._ask_to_end()
        elif ending == EXITED:
            ending = self._wait_for_left()
        self._kill()
        return ending

    def _watch(self) -> str:
        """Until something ends the run; what came first wins."""
        while True:
            self._reap()
            if self.status is not None:
                return EXITED
            if self.oom_look and self.group.oom_killed():
                return OUT_OF_MEMORY
            if self.bench.signals.stop:
                return STOPPED
            if self._overdue():
                return TIMED_OUT
            if self._takes_too_much():
                return OUT_OF_MEMORY
            # The eventfd of v1 tells that the limit is hit, a moment before the kill is counted.
            often = self._has_watchdog or self.oom_look
            self._sleep(WATCH_S if often else None, self.order.deadline)

    @property
    def _has_watchdog(self) -> bool:
        return self.order.mem is not None and self.order.memory_kind == "watchdog"

    def _takes_too_much(self) -> bool:
        """Whether a watchdog, where no control group does it, has to end the tree for its memory."""
        if not self._has_watchdog or self.order.mem is None:
            return False
        pids = list(processes.descendants(os.getpid()))
        return processes.memory(pids, self.order.mem) > self.order.mem

    def _ask_to_end(self) -> None:
        """SIGTERM to the whole tree, and the time to save its work."""
        until = time.monotonic() + self.order.grace_s
        # A stopped process would not see the SIGTERM before the SIGKILL.
        processes.send(processes.descendants(os.getpid()), signal.SIGTERM, signal.SIGCONT)
        while not self._reap() and time.monotonic() < until:
            self._sleep(None, until)

    def _wait_for_left(self) -> str:
        until = time.monotonic() + LEFT_S
        while not self._reap() and not self.bench.signals.stop and time.monotonic() < until:
            if self._takes_too_much():
                return OUT_OF_MEMORY
            self._sleep(WATCH_S if self._has_watchdog else None, until)
        if not self.alone:
            self.left = processes.programs(os.getpid())
        return EXITED

    def _kill(self) -> None:
        """End all that is left of the tree, however it was daemonised: a subreaper's descendants
        stay below it. Python's resource trackers come last: each ends by itself when its job is gone,
        and removes the shared memory that the job has left."""
        if self._reap():
            return
        trackers = processes.trackers(os.getpid())
        if trackers:
            self._sweep(trackers)
            until = time.monotonic() + TRACKER_S
            while not self._reap() and time.monotonic() < until:
                self._sleep(None, until)
            if self.alone:
                return
        self._sweep({})

    def _sweep(self, spared: dict[int, int]) -> None:
        """Kill what lives below, but for these. Stopping before killing is what a fork bomb cannot outrun."""
        stopped: dict[int, int] = {}
        spent_s = 0.0
        while not self._reap() and spent_s < KILL_S:
            begun = time.monotonic()
            known = len(stopped)
            left = False
            for pid, ticks in processes.walk(os.getpid()):
                if spared.get(pid) == ticks:
                    continue
                left = True
                if stopped.get(pid) != ticks:
                    processes.send({pid: ticks}, signal.SIGSTOP)
                    stopped[pid] = ticks
            if not left and spared:
                return
            if len(stopped) == known:
                processes.send(stopped, signal.SIGKILL)
                self._sleep(0.02, None)
            # This process may have been stopped meanwhile, for however long: that is no time spent.
            spent_s += min(time.monotonic() - begun, LONGEST_ROUND_S)

    @property
    def _exit_name(self) -> str:
        return f"exit.{self.order.attempt}"

    def _write(self, data: bytes, *, is_last: bool) -> bool:
        """
        Args:
            is_last: whether no code of the job is going to run in its folder any more.
        """
        pause_s = 0.1
        is_opened_up = False
        while True:
            try:
                # What an engine has read is as safe as its store; without one there is but this.
                if not self.bench.is_heard():
                    files.replace(self.folder, self._exit_name, data)
                elif is_last:
                    self.bench.reuse.put_exit(self.folder, self._exit_name, data)
                else:
                    files.put(self.folder, self._exit_name, data)
            except (FileNotFoundError, IsADirectoryError):
                return False  # the job spoilt its folder, or that was deleted: time heals neither
            except PermissionError:
                if is_opened_up:
                    return False
                is_opened_up = True
                with contextlib.suppress(OSError):
                    os.fchmod(self.folder, 0o700)
            except OSError:  # a full disk, most likely; the record is worth waiting for
                self._tell_start()
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                return True

    def _fork(self) -> None:
        assert self.job is not None  # or it would not have been laid out
        if self.order.lost is not None:
            words = f"cortex: {self.order.lost}; attempt {self.order.losses + 1} begins\n"
            try:
                os.write(self.job.log, words.encode())
            except OSError:
                pass  # a full disk is no reason not to run
        self.log_start = os.fstat(self.job.log).st_size
        while not (self.bench.signals.stop or self._overdue()):
            try:
                self._begin(self.job)
            except BlockingIOError:  # its user has as many processes as it may: others' may end
                self._sleep(FORK_AGAIN_S, self.order.deadline)
            else:
                return

    def _begin(self, job: process.Job) -> None:
        job.group = self.group.join
        waiting, self.bench.worker = self.bench.worker, None
        if waiting is not None:
            try:
                waiting.begin(job)
            except OSError:
                pass  # somebody has killed it while it waited
            else:
                self.worker = waiting.pid
                return
        self.bench.look()
        self.worker = process.start(self.bench, job, (self.folder, *self.group.files))

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
        now = time.monotonic()
        if now >= self.log.due:
            self.log.look()
        if self.tell_at is not None and now >= self.tell_at:
            self._tell_start()
        left = [self.log.due - now]
        if self.tell_at is not None:
            left.append(self.tell_at - now)
        if most_s is not None:
            left.append(most_s)
        if until is not None:
            left.append(until - now)
        timeout = max(0.0, min(left) * 1000 + 1)
        for fd, _ in self.bench.woken.poll(timeout):
            if fd == self.bench.signals.wake:
                os.read(fd, 512)
            elif fd == self.group.event:
                self.oom_look = True
                self.bench.woken.unregister(fd)

    def _start_record(self) -> bytes:
        return StartRecord(
            job_id=self.order.job_id,
            attempt=self.order.attempt,
            pid=os.getpid(),
            ticks=self.bench.ticks,
            boot=self.bench.boot,
            start_ns=self.start_ns,
            gpus=self.order.gpus,
        ).dumps()

    def _overdue(self) -> bool:
        deadline = self.order.deadline
        return deadline is not None and time.monotonic() >= deadline
