"""What became of a job, as its exit record tells it. Called by the job's supervisor, when nothing of the job
runs any more, with what it has seen.
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
    from cortex.worker.supervisor.watch import Supervisor

EXITED, OUT_OF_MEMORY, TIMED_OUT, STOPPED, LOST = (
    "exited",
    "out_of_memory",
    "timed_out",
    "stopped",
    "lost",
)
_FEW = 4096  # of as many bytes the kernel has to map as are asked for, not as there are
_MAX_NAMES = 5


def judge(seen: Supervisor, ending: str) -> ExitRecord:
    """The record of a run that was ended by this."""
    code = -signal.SIGKILL if seen.status is None else os.waitstatus_to_exitcode(seen.status)
    said = _outcome(seen, code)
    if said.lost:
        return lost(seen, said.message)
    if ending == EXITED and seen.group.oom_killed():
        ending = OUT_OF_MEMORY
    if ending != EXITED:
        return _record(seen, ending, _why(seen, ending), code)
    if code == 0:
        return _record(seen, EXITED, said.message or _left(seen), code, said)
    words = f"killed by {syscalls.signal_name(-code)}" if code < 0 else f"exit code {code}"
    if said.message:
        message = said.message if code > 0 else f"{words}: {said.message}"
        return _record(seen, EXITED, message, code, said)
    last = _last_line(seen)
    return _record(seen, EXITED, f"{words}: {last}" if last else words, code)


def lost(seen: Supervisor, why: str | None) -> ExitRecord:
    """The record of a run that failed by the platform's own doing."""
    return _record(seen, LOST, why, -signal.SIGKILL)


def _why(seen: Supervisor, ending: str) -> str:
    if ending == TIMED_OUT:
        return f"timeout of {seen.order.timeout} s passed"
    if ending == STOPPED:
        return "stopped"
    if seen.group.oom_killed() and not seen.group.limit_was_hit():
        return "killed because the machine ran out of memory"
    return f"exceeded its memory limit of {size(seen.order.mem or 0)}"


def _left(seen: Supervisor) -> str | None:
    if not seen.left:
        return None
    more = len(seen.left) - _MAX_NAMES
    names = ", ".join(seen.left[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"it had left processes running, which were killed: {names}. A job has to wait for those that it needs"


def _record(
    seen: Supervisor, ending: str, message: str | None, code: int, said: Outcome | None = None
) -> ExitRecord:
    return ExitRecord(
        job_id=seen.order.job_id,
        attempt=seen.order.attempt,
        ending=ending,
        exit_code=code,
        start_ns=seen.start_ns,
        end_ns=max(seen.start_ns, seen.end_ns or time.time_ns()),
        message=None if message is None else shorten(message),
        result=said.result if said else None,
        has_result=said.has_result if said else False,
        hints=_hints(seen, said),
        measures=said.measures if said and isinstance(said.measures, list) else None,
    )


def _hints(seen: Supervisor, said: Outcome | None) -> list[str]:
    """What the users of the version should know, in words."""
    refused = seen.bench.setup.refused.items()
    hints = [f"{name} is not imported ahead: {why}" for name, why in refused]
    loading = said.loading if said else None
    if loading is not None:
        took_s, names = loading
        if isinstance(took_s, float) and isinstance(names, list):
            listed = ", ".join(map(str, names))
            hints.append(
                f"each job spends {took_s:.1f} s importing {listed}: `preload: [{listed}]` in the definition "
                "of cortex.yaml would spare it that; what it changes is in the guide"
            )
    return hints[: checks.MOST_HINTS]


def _outcome(seen: Supervisor, code: int) -> Outcome:
    said = b"" if seen.job is None else os.pread(seen.job.outcome, _FEW, 0)
    if len(said) == _FEW and seen.job is not None:
        said = os.pread(seen.job.outcome, checks.MOST_OUTCOME + 1, 0)
    try:
        if len(said) > checks.MOST_OUTCOME:
            raise checks.Invalid(f"it takes over {checks.MOST_OUTCOME} bytes")
        return Outcome.loads(said) if said else Outcome()
    except checks.Invalid as error:
        if code != 0:
            return Outcome()  # killed while it wrote
        return Outcome(message=f"{checks.NOT_KEPT}: what it says of its end is not valid: {error}")


def _last_line(seen: Supervisor) -> str:
    text = files.tail(seen.folder, logfile.NAME, seen.log_start).decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal Python error: ")]  # faulthandler's
    return (fatal or lines)[-1] if lines else ""
