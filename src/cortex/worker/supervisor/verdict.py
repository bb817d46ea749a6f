"""Decides how a job ended, and makes its exit record. `supervisor.watch` calls this when no process
of the job is left, with the evidence that it has collected.
"""

from __future__ import annotations

import os
import time

from cortex.worker import checks, files, syscalls
from cortex.worker.messages import ExitRecord, Outcome, shorten, size
from cortex.worker.supervisor import logfile
from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cortex.worker.cgroups import JobCgroup
    from cortex.worker.messages import Order

EXITED, OUT_OF_MEMORY, TIMED_OUT, STOPPED, LOST = (
    "exited",
    "out_of_memory",
    "timed_out",
    "stopped",
    "lost",
)
# The kernel maps memory for the size of a read that is asked for, not for the size of the file.
_FIRST_READ_BYTES = 4096
_MAX_NAMES = 5


class Evidence:
    """What the supervisor knows of a job when no process of the job is left."""

    __slots__ = (
        "cgroup",
        "end_ns",
        "folder",
        "leftovers",
        "log_start",
        "order",
        "outcome",
        "refused",
        "start_ns",
        "wait_status",
    )

    def __init__(
        self,
        order: Order,
        cgroup: JobCgroup,
        *,
        wait_status: int | None,
        start_ns: int,
        end_ns: int,
        outcome: int | None,
        folder: int,
        log_start: int,
        leftovers: list[str],
        refused: dict[str, str],
    ) -> None:
        self.order = order
        self.cgroup = cgroup  # its memory events are read only where they decide something
        self.wait_status = wait_status  # as `waitpid` has it; None if the job has no process
        self.start_ns = start_ns
        self.end_ns = end_ns  # 0: unknown
        self.outcome = outcome  # descriptor of the outcome file; None if there is none
        self.folder = folder  # descriptor of the job's folder
        self.log_start = log_start  # size of the log before this attempt
        self.leftovers = leftovers  # names of the programs that the job had left running
        self.refused = refused  # modules that are not imported ahead, with the reasons


def judge(evidence: Evidence, ending: str) -> ExitRecord:
    """The exit record of a job.

    Args:
        ending: what ended the run: `EXITED`, `OUT_OF_MEMORY`, `TIMED_OUT` or `STOPPED`.
    """
    status = evidence.wait_status
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    outcome = _read_outcome(evidence, code)
    if outcome.lost:
        return lost(evidence, outcome.message)
    if ending == EXITED and evidence.cgroup.oom_killed():
        ending = OUT_OF_MEMORY
    if ending != EXITED:
        return _record(evidence, ending, _message(evidence, ending), code)
    if code == 0:
        message = outcome.message or _leftovers_message(evidence)
        return _record(evidence, EXITED, message, code, outcome)
    words = f"killed by {syscalls.signal_name(-code)}" if code < 0 else f"exit code {code}"
    if outcome.message:
        message = outcome.message if code > 0 else f"{words}: {outcome.message}"
        return _record(evidence, EXITED, message, code, outcome)
    last = _last_line(evidence)
    return _record(evidence, EXITED, f"{words}: {last}" if last else words, code)


def lost(evidence: Evidence, why: str | None) -> ExitRecord:
    """The exit record of a job that failed by a fault of the platform."""
    return _record(evidence, LOST, why, -signal.SIGKILL)


def _message(evidence: Evidence, ending: str) -> str:
    """Why the supervisor or the kernel ended the job."""
    if ending == TIMED_OUT:
        return f"timeout of {evidence.order.timeout} s passed"
    if ending == STOPPED:
        return "stopped"
    if evidence.cgroup.oom_killed() and not evidence.cgroup.limit_was_hit():
        return "killed because the machine ran out of memory"
    return f"exceeded its memory limit of {size(evidence.order.mem or 0)}"


def _leftovers_message(evidence: Evidence) -> str | None:
    if not evidence.leftovers:
        return None
    more = len(evidence.leftovers) - _MAX_NAMES
    names = ", ".join(evidence.leftovers[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
    return (
        f"it had left processes running, which were killed: {names}. "
        "A job has to wait for those that it needs"
    )


def _record(
    evidence: Evidence,
    ending: str,
    message: str | None,
    code: int,
    outcome: Outcome | None = None,
) -> ExitRecord:
    return ExitRecord(
        job_id=evidence.order.job_id,
        attempt=evidence.order.attempt,
        ending=ending,
        exit_code=code,
        start_ns=evidence.start_ns,
        end_ns=max(evidence.start_ns, evidence.end_ns or time.time_ns()),
        message=None if message is None else shorten(message),
        result=outcome.result if outcome else None,
        has_result=outcome.has_result if outcome else False,
        hints=_hints(evidence, outcome),
        measures=outcome.measures if outcome and isinstance(outcome.measures, list) else None,
    )


def _hints(evidence: Evidence, outcome: Outcome | None) -> list[str]:
    """What the users of the version should know, as sentences."""
    refused = evidence.refused.items()
    hints = [f"{name} is not imported ahead: {why}" for name, why in refused]
    loading = outcome.loading if outcome else None
    if loading is not None:
        took_s, names = loading
        if isinstance(took_s, float) and isinstance(names, list):
            listed = ", ".join(map(str, names))
            hints.append(
                f"each job spends {took_s:.1f} s importing {listed}: `preload: [{listed}]` in the "
                "definition of cortex.yaml would spare it that; what it changes is in the guide"
            )
    return hints[: checks.MAX_HINTS]


def _read_outcome(evidence: Evidence, code: int) -> Outcome:
    """What the job's process has written of its end. A job can write anything there."""
    fd = evidence.outcome
    data = b"" if fd is None else os.pread(fd, _FIRST_READ_BYTES, 0)
    if len(data) == _FIRST_READ_BYTES and fd is not None:
        data = os.pread(fd, checks.MAX_OUTCOME + 1, 0)
    try:
        if len(data) > checks.MAX_OUTCOME:
            raise checks.Invalid(f"it takes over {checks.MAX_OUTCOME} bytes")
        return Outcome.loads(data) if data else Outcome()
    except checks.Invalid as error:
        if code != 0:
            return Outcome()  # killed while it wrote
        return Outcome(message=f"{checks.NOT_KEPT}: the outcome file is not valid: {error}")


def _last_line(evidence: Evidence) -> str:
    """The last line of the job's log, or the line in which faulthandler names a fatal error."""
    data = files.tail(evidence.folder, logfile.NAME, evidence.log_start)
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error: ")]
    return (fatal or lines)[-1] if lines else ""
