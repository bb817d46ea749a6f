"""Supervises one job from its start to its end. Only this module decides how a job ended.

Runs in a supervising process (`supervisor.main`), which depends on no other process. The supervisor
creates the start record (the fence), takes the job's control group from the engine, starts the
job's process, enforces deadline and memory limit, handles SIGTERM as "stop the job", leaves no
process behind, writes the exit record, and reports both records to the engine if there is one.
"""

from __future__ import annotations

import contextlib
import os
import time

from cortex.worker import cgroups, checks, files, processes, wire
from cortex.worker.job import process
from cortex.worker.messages import (
    MAX_INLINE_RECORD,
    Reply,
    StartRecord,
    encode,
)
from cortex.worker.supervisor import logfile, verdict
from cortex.worker.supervisor.verdict import EXITED, LOST, OUT_OF_MEMORY, STOPPED, TIMED_OUT
from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cortex.worker.messages import ExitRecord, Order
    from cortex.worker.supervisor.station import Station

POLL_INTERVAL_S = 0.05
KILL_TIMEOUT_S = 5.0
LEFTOVER_TIMEOUT_S = 1.0
"""Grace for processes that outlive the job's first one: a program that reads from the job finds the
end of its input now, and writes what it still has."""
TRACKER_TIMEOUT_S = 10.0
"""Time for a resource tracker to remove what its job has left."""
FORK_RETRY_DELAY_S = 0.2
MAX_COUNTED_ROUND_S = 0.1
MAX_RETRY_DELAY_S = 5.0
START_REPORT_DELAY_S = 0.01
"""The start of a shorter job is not reported: the report of its end says when it started."""


class Supervisor:
    """Supervises one job, as the main thread of a supervising process."""

    def __init__(self, station: Station, order: Order) -> None:
        self.station = station
        self.order = order
        self.start_ns = time.time_ns()
        self.folder = files.open_folder(order.folder)
        self.cgroup = cgroups.JobCgroup(order, station.pop_cgroup_fd())
        self.log = logfile.Log(self.folder, order.log_limit)
        self.is_childless = False  # this process has no descendant left
        self.leftovers: list[str] = []  # names of the programs that the job had left running
        self.report_start_at: float | None = None  # None: not to be reported, or reported already
        self.job_pid = 0
        self.wait_status: int | None = None  # of the job's first process
        self.end_ns = 0
        self.job: process.Job | None = None
        self.oom_notified = False
        self.log_start = 0

    def run(self) -> bool:
        """Supervise the job from its start to its end.

        Returns:
            whether this process is in its initial state again, and can take another job.
        """
        failed = self._lay_out_job()
        if self.order.held:
            if self.station.receive() != wire.GO:
                return False
            self.start_ns = time.time_ns()
        try:
            if failed is not None:
                raise failed
            name = f"start.{self.order.attempt}"
            if not self.station.reuse.create_start(self.folder, name, self._start_record()):
                return False
        except OSError as error:
            # No code of the job has run or will run: no other process has this order.
            self._report(error=error.strerror or str(error), errno=error.errno or 0)
            return False
        self.report_start_at = time.monotonic() + START_REPORT_DELAY_S
        try:
            ending = self._supervise()
        except Exception as error:  # noqa: BLE001, RUF100  # the platform's own failure
            # Before `_kill`, which would reap it: then its pid may belong to another process.
            self.station.kill_preforked()
            self._kill()
            record = verdict.lost(self._evidence(), f"the supervisor failed: {error!r}")
        else:
            record = verdict.judge(self._evidence(), ending)
        self._collect_changes()
        self._log_dropped_result(record)
        self.log.enforce_limit()
        data = record.dumps()
        is_last = self.is_childless and record.ending != LOST
        is_written = self._write_exit_record(data, is_last=is_last)
        if not is_written and len(data) > MAX_INLINE_RECORD:
            record.result, record.has_result = None, False
            record.message = "the return value was lost with the folder of the job"
            data = record.dumps()
        inline = record.fields() if len(data) <= MAX_INLINE_RECORD else None
        # If the job never began, the preforked process is still there. The engine accepts no report
        # of an end from a process that has a child.
        self.station.kill_preforked()
        self._report(ended=True, record=inline)
        if not is_written:
            return False
        self.station.remember_record(self.folder, self._exit_name)
        if self.cgroup.oom_event >= 0 and not self.oom_notified:
            self.station.poller.unregister(self.cgroup.oom_event)
        self.cgroup.close()
        for fd in self._job_fds():
            os.close(fd)
        is_childless = self._reap()
        is_clean = is_childless and not self.station.signals.stop and record.ending != LOST
        if not is_clean or not self.station.workspace.is_reusable():
            return False
        self.station.restore_workspace()
        return True

    def _lay_out_job(self) -> OSError | None:
        """Make the files that a job finds and writes; the error if that failed."""
        try:
            self.station.prepare_workspace()
            job = encode(self.order.job).encode()
            self.station.reuse.lay_out(self.folder, self.station.last_folder, job)
            log = logfile.open_to_write(self.folder)
            self.job = process.Job(self.order, log, process.outcome_file())
        except OSError as error:
            return error
        return None

    def _evidence(self) -> verdict.Evidence:
        return verdict.Evidence(
            self.order,
            self.cgroup,
            wait_status=self.wait_status,
            start_ns=self.start_ns,
            end_ns=self.end_ns,
            outcome=None if self.job is None else self.job.outcome,
            folder=self.folder,
            log_start=self.log_start,
            leftovers=self.leftovers,
            refused=self.station.setup.refused,
        )

    def _collect_changes(self) -> None:
        """Move what the job has changed in its current folder into the job's folder."""
        try:
            self.station.workspace.collect_changes(self.folder)
        except OSError as error:
            self._append_to_log(
                f"cortex: not all that the job wrote in its current folder was kept: {error}\n"
            )

    def _log_dropped_result(self, record: ExitRecord) -> None:
        """Say at the end of the log that the task's return value was dropped, and why."""
        message = record.message or ""
        if record.ending != EXITED or not message.startswith(checks.NOT_KEPT):
            return
        output = files.tail(self.folder, logfile.NAME, self.log_start)
        line_end = "" if output.endswith(b"\n") or not output else "\n"
        self._append_to_log(f"{line_end}cortex: {message}\n")

    def _append_to_log(self, text: str) -> None:
        if self.job is not None:
            with contextlib.suppress(OSError):  # a full disk must not prevent the exit record
                os.write(self.job.log, text.encode("utf-8", "backslashreplace"))

    def _job_fds(self) -> list[int]:
        """The descriptors that were opened for this job, without its folder and its cgroup's."""
        return [] if self.job is None else [self.job.log, self.job.outcome]

    def _report_start(self) -> None:
        if self.report_start_at is not None:
            self.report_start_at = None
            self._report(recorded=True)

    def _report(
        self,
        *,
        recorded: bool = False,
        ended: bool = False,
        record: dict[str, object] | None = None,
        error: str | None = None,
        errno: int = 0,
    ) -> None:
        """Report to the engine that a record exists. Never before it does: until then, an operator
        that starts may fence the attempt off. If there is no engine, the report is dropped: the
        next engine reads the records."""
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
            self.station.sock.send(reply.dumps())
        except OSError:
            pass

    def _supervise(self) -> str:
        """Start the job, wait for its end and kill what is left of it.

        Returns:
            what ended the run, as `verdict.judge` takes it.
        """
        if self.station.signals.stop:
            return STOPPED
        if self._is_overdue():
            return TIMED_OUT
        self.cgroup.open_control_files(self.station.poller)
        self._start_job()
        self.cgroup.close_join_fd()
        ending = self._watch()
        if ending in (STOPPED, TIMED_OUT):
            self._terminate()
        elif ending == EXITED:
            ending = self._wait_for_leftovers()
        self._kill()
        return ending

    def _watch(self) -> str:
        """Wait until something ends the run. The first cause counts."""
        while True:
            self._reap()
            if self.wait_status is not None:
                return EXITED
            if self.oom_notified and self.cgroup.oom_killed():
                return OUT_OF_MEMORY
            if self.station.signals.stop:
                return STOPPED
            if self._is_overdue():
                return TIMED_OUT
            if self._exceeds_memory():
                return OUT_OF_MEMORY
            # The eventfd of v1 reports the hit limit a moment before the kernel counts the kill.
            must_poll = self._has_watchdog or self.oom_notified
            self._wait(POLL_INTERVAL_S if must_poll else None, self.order.deadline)

    @property
    def _has_watchdog(self) -> bool:
        return self.order.mem is not None and self.order.memory_kind == "watchdog"

    def _exceeds_memory(self) -> bool:
        """Whether the processes of the job exceed its memory limit, where this process enforces the
        limit instead of a control group."""
        if not self._has_watchdog or self.order.mem is None:
            return False
        pids = list(processes.descendants(os.getpid()))
        return processes.memory(pids, self.order.mem) > self.order.mem

    def _terminate(self) -> None:
        """Send SIGTERM to all processes of the job, and wait for their end for the grace period."""
        until = time.monotonic() + self.order.grace_s
        # Without SIGCONT, a stopped process would not handle the SIGTERM before the SIGKILL.
        processes.send_signals(processes.descendants(os.getpid()), signal.SIGTERM, signal.SIGCONT)
        while not self._reap() and time.monotonic() < until:
            self._wait(None, until)

    def _wait_for_leftovers(self) -> str:
        """Give processes that outlive the job's first one the time to end; note which do not."""
        until = time.monotonic() + LEFTOVER_TIMEOUT_S
        while not self._reap() and not self.station.signals.stop and time.monotonic() < until:
            if self._exceeds_memory():
                return OUT_OF_MEMORY
            self._wait(POLL_INTERVAL_S if self._has_watchdog else None, until)
        if not self.is_childless:
            self.leftovers = processes.programs(os.getpid())
        return EXITED

    def _kill(self) -> None:
        """Kill all processes of the job, daemons included: a subreaper's descendants stay below it.

        Python's resource trackers come last: each ends by itself when its job has ended, and
        removes the shared memory that the job has left.
        """
        if self._reap():
            return
        trackers = processes.trackers(os.getpid())
        if trackers:
            self._sweep(trackers)
            until = time.monotonic() + TRACKER_TIMEOUT_S
            while not self._reap() and time.monotonic() < until:
                self._wait(None, until)
            if self.is_childless:
                return
        self._sweep({})

    def _sweep(self, spared: dict[int, int]) -> None:
        """Kill all descendants except these (pid: start ticks). They are stopped first: a fork bomb
        cannot outrun that."""
        stopped: dict[int, int] = {}
        spent_s = 0.0
        while not self._reap() and spent_s < KILL_TIMEOUT_S:
            begun = time.monotonic()
            known = len(stopped)
            any_left = False
            for pid, ticks in processes.walk(os.getpid()):
                if spared.get(pid) == ticks:
                    continue
                any_left = True
                if stopped.get(pid) != ticks:
                    processes.send_signals({pid: ticks}, signal.SIGSTOP)
                    stopped[pid] = ticks
            if not any_left and spared:
                return
            if len(stopped) == known:
                processes.send_signals(stopped, signal.SIGKILL)
                self._wait(0.02, None)
            # This process may itself have been stopped meanwhile: that time does not count.
            spent_s += min(time.monotonic() - begun, MAX_COUNTED_ROUND_S)

    @property
    def _exit_name(self) -> str:
        return f"exit.{self.order.attempt}"

    def _write_exit_record(self, data: bytes, *, is_last: bool) -> bool:
        """Write the exit record; retry until there is space for it.

        Args:
            is_last: no code of the job will run in its folder any more.

        Returns:
            False if the record cannot be written at all.
        """
        delay_s = 0.1
        has_granted_rights = False
        while True:
            try:
                # A record that an engine has read is as safe as the engine's store. Without an
                # engine, this file is the only copy.
                if not self.station.has_engine():
                    files.replace_durably(self.folder, self._exit_name, data)
                elif is_last:
                    self.station.reuse.write_exit_record(self.folder, self._exit_name, data)
                else:
                    files.replace(self.folder, self._exit_name, data)
            except (FileNotFoundError, IsADirectoryError):
                return False  # the job spoilt its folder, or it was deleted: retrying cannot help
            except PermissionError:
                if has_granted_rights:
                    return False
                has_granted_rights = True
                with contextlib.suppress(OSError):
                    os.fchmod(self.folder, 0o700)
            except OSError:  # a full disk, most likely; the record is worth waiting for
                self._report_start()
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_DELAY_S)
            else:
                return True

    def _start_job(self) -> None:
        """Start the job's process; retry while the system refuses a fork."""
        assert self.job is not None  # `run` has raised the error of `_lay_out_job`
        if self.order.lost is not None:
            words = f"cortex: {self.order.lost}; attempt {self.order.losses + 1} begins\n"
            try:
                os.write(self.job.log, words.encode())
            except OSError:
                pass  # a full disk must not prevent the run
        self.log_start = os.fstat(self.job.log).st_size
        while not (self.station.signals.stop or self._is_overdue()):
            try:
                self._start_process(self.job)
            except BlockingIOError:  # the user's process limit is reached; other processes may end
                self._wait(FORK_RETRY_DELAY_S, self.order.deadline)
            else:
                return

    def _start_process(self, job: process.Job) -> None:
        """Start the job in the preforked process if there is one, else in a new process."""
        job.join_fd = self.cgroup.join_fd
        preforked, self.station.preforked = self.station.preforked, None
        if preforked is not None:
            try:
                preforked.start_job(job)
            except OSError:
                pass  # something has killed it while it waited
            else:
                self.job_pid = preforked.pid
                return
        self.station.refresh_compiled()
        self.job_pid = process.start(self.station, job, (self.folder, *self.cgroup.private_fds))

    def _reap(self) -> bool:
        """Reap the processes that have ended; True when this process has no descendant left."""
        while not self.is_childless:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.is_childless = True
                break
            if pid == 0:
                break
            if pid == self.job_pid:
                self.wait_status = status
                self.end_ns = time.time_ns()
        return self.is_childless

    def _wait(self, max_s: float | None, until: float | None) -> None:
        """Wait for a signal or an OOM event, at most `max_s` and at most until `until`. Check the
        log's size and report the start when these are due."""
        now = time.monotonic()
        if now >= self.log.next_check:
            self.log.enforce_limit()
        if self.report_start_at is not None and now >= self.report_start_at:
            self._report_start()
        timeouts = [self.log.next_check - now]
        if self.report_start_at is not None:
            timeouts.append(self.report_start_at - now)
        if max_s is not None:
            timeouts.append(max_s)
        if until is not None:
            timeouts.append(until - now)
        timeout_ms = max(0.0, min(timeouts) * 1000 + 1)
        for fd, _ in self.station.poller.poll(timeout_ms):
            if fd == self.station.signals.wake:
                os.read(fd, 512)
            elif fd == self.cgroup.oom_event:
                self.oom_notified = True
                self.station.poller.unregister(fd)

    def _start_record(self) -> bytes:
        return StartRecord(
            job_id=self.order.job_id,
            attempt=self.order.attempt,
            pid=os.getpid(),
            ticks=self.station.ticks,
            boot=self.station.boot,
            start_ns=self.start_ns,
            gpus=self.order.gpus,
        ).dumps()

    def _is_overdue(self) -> bool:
        deadline = self.order.deadline
        return deadline is not None and time.monotonic() >= deadline
