"""Builds one environment in a folder of its own, by uv, as the user that jobs run as. Called by
`environments`.

    <folder>/<attempt>/venv    the environment that one attempt has built
    <folder>/<attempt>.log     the output of uv
    <folder>/<attempt>.lock    the versions to install, if the project has a lock file
    <folder>/ready             the name of the complete attempt; written last

Each attempt has a folder of its own, which is given to that user: from then on the operator uses no
path that leads through it. The `build_supervisor` runs what works in there, and ends a build with
all its processes.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import uv

from cortex.projects import build_supervisor, lockfiles
from cortex.projects.build_rules import BuildRules
from cortex.projects.requirements import Requirements
from cortex.spec.times import new_id
from cortex.system.account import Account
from cortex.system.background import in_thread
from cortex.system.folders import remove
from cortex.worker import beneath, processes

NOT_BUILT = "the environment could not be built; see uv's output in the job's log"

_MAX_OUTPUT = 256 << 10
_MAX_REPORT = 4096
# In the output of uv, and of the programs that it runs.
_DISK_FULL = ("os error 28", "No space left on device")
_MARKER = "ready"
_LOG = ".log"
_BESIDE = (_LOG, lockfiles.SUFFIX, f".{_MARKER}")
_TEMPORARY = "tmp"
_MAX_LINKS = 4  # uv links `python` to the interpreter, and the other names to `python`
_END_TIMEOUT_S = 30.0  # for a supervisor to end its build and exit
_MAX_SWEEPS = 100


class EnvironmentFailed(Exception):
    """An environment could not be built.

    Attributes:
        output: the output of uv, for the job's log.
        reason: one line, for the job's message.
    """

    def __init__(self, message: str, output: str, reason: str = NOT_BUILT) -> None:
        super().__init__(message)
        self.output = output
        self.reason = reason

    @property
    def is_temporary(self) -> bool:
        """Whether the disk was full: a later build may succeed."""
        return any(text in self.output for text in _DISK_FULL)


def built_python(folder: Path) -> Path | None:
    """The interpreter of the environment in a folder; None if none was built there."""
    try:
        attempt = (folder / _MARKER).read_text("utf-8")
    except FileNotFoundError:
        return None
    return _interpreter(folder / attempt) if attempt and _is_complete(folder / attempt) else None


async def build_environment(
    requirements: Requirements,
    project: Path,
    folder: Path,
    account: Account | None,
    lock: str | None,
    rules: BuildRules,
) -> Path:
    """Build the environment that a project requires.

    Args:
        folder: the environment's folder, where no other build may run.
        account: the user to build as; None for the operator's own.
        lock: the content of the project's lock file, if it has one.

    Returns:
        The environment's interpreter.

    Raises:
        EnvironmentFailed: it cannot be built.
    """
    attempt = folder / new_id()
    await in_thread(_start_attempt, folder, attempt, account)
    try:
        if lock is not None:
            attempt.with_suffix(lockfiles.SUFFIX).write_text(lock, "utf-8")
        await _install(requirements, project, attempt, account, rules)
        await in_thread(_mark, folder, attempt)
    except BaseException:
        await in_thread(_discard, attempt)
        raise
    return _interpreter(attempt)


def own_python() -> str:
    """The operator's interpreter, which environments use unless the project requests another."""
    # In a virtual environment this is the interpreter that the environment was made from.
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def _interpreter(attempt: Path) -> Path:
    return attempt / "venv" / "bin" / "python"


def _is_complete(attempt: Path) -> bool:
    """Whether the interpreter of an attempt exists. Its folders belong to the user that builds run
    as, who may have made links there. None is followed except the interpreter's own, to the Python
    that it was made from."""
    with (
        suppress(OSError),
        beneath.opened(str(attempt.parent), attempt.name, "venv", "bin") as folder,
    ):
        name = "python"
        for _ in range(_MAX_LINKS):
            info = beneath.stat(folder, name)
            if info is None or not stat.S_ISLNK(info.st_mode):
                return info is not None and stat.S_ISREG(info.st_mode)
            name = os.readlink(name, dir_fd=folder)
            if "/" in name:
                return name.startswith("/") and Path(name).exists()
    return False


def _start_attempt(folder: Path, attempt: Path, account: Account | None) -> None:
    """Make the attempt's folder, after removing earlier attempts: if one of them were in use, this
    one would not be made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).unlink(missing_ok=True)
    for leftover in folder.iterdir():
        if leftover.suffix in _BESIDE:
            leftover.unlink()
        else:
            end_leftovers(leftover)
            remove(leftover)
    attempt.mkdir()
    if account is not None:
        account.own(attempt)
        cache = _cache(attempt)
        cache.mkdir(exist_ok=True)
        account.own(cache)


def _discard(attempt: Path) -> None:
    end_leftovers(attempt)
    remove(attempt)
    for suffix in _BESIDE:
        attempt.with_suffix(suffix).unlink(missing_ok=True)


def _cache(attempt: Path) -> Path:
    """uv's cache for builds as another user, who may have no home."""
    return attempt.parent.parent / ".uv"


def _mark(folder: Path, attempt: Path) -> None:
    # The marker must not reach the disk before the environment's thousands of files.
    os.sync()
    # Written outside of the attempt's folder, where the build may have made a link of that name.
    written = attempt.with_suffix(f".{_MARKER}")
    with written.open("w", encoding="utf-8") as file:
        file.write(attempt.name)
        file.flush()
        os.fsync(file.fileno())
    if not _is_complete(attempt):
        # This attempt was cancelled, or another operator removed it: the marker belongs to a later
        # attempt.
        raise FileNotFoundError(errno.ENOENT, "the environment was removed", str(attempt))
    written.rename(folder / _MARKER)


async def _install(
    requirements: Requirements,
    project: Path,
    attempt: Path,
    account: Account | None,
    rules: BuildRules,
) -> None:
    # A build writes to its source, and an editable install needs its source permanently.
    source = attempt / "source" if requirements.is_local else project
    copy = [str(project), str(source)] if requirements.is_local else None
    venv = attempt / "venv"
    python = requirements.python_for_uv or own_python()
    commands = [["venv", "--no-project", "--python", python, str(venv)]]
    if requirements.arguments:
        target = str(_interpreter(attempt))
        lock = attempt.with_suffix(lockfiles.SUFFIX)
        constraint = ["--constraint", str(lock)] if lock.exists() else []
        commands.append(
            ["pip", "install", "--python", target, *constraint, *requirements.arguments]
        )
    program = uv.find_uv_bin()
    plan = {
        "temporary": str(attempt / _TEMPORARY),
        "user": None if account is None else account.uid,
        "group": None if account is None else account.gid,
        "groups": None if account is None else account.groups,
        "steps": [
            {"copy": copy},
            *({"folder": str(source), "command": [program, *command]} for command in commands),
        ],
    }
    names = ["the copy of the project", "uv venv", "uv pip install"]
    await _supervise(plan, names, attempt, account, rules)


def _environment(attempt: Path, account: Account | None, rules: BuildRules) -> dict[str, str]:
    env = rules.inherited(os.environ, is_own_user=account is None)
    if account is not None:
        env |= {**account.variables, "UV_CACHE_DIR": str(_cache(attempt))}
    own = {"TMPDIR": str(attempt / _TEMPORARY), "NO_COLOR": "1", "UV_NO_PROGRESS": "1"}
    return env | own


async def _supervise(
    plan: Mapping[str, object],
    names: list[str],
    attempt: Path,
    account: Account | None,
    rules: BuildRules,
) -> None:
    """Run the steps of a plan in a supervisor.

    Args:
        names: the steps' names, for messages.
    """
    log = attempt.with_suffix(_LOG)
    report, report_end = os.pipe()
    try:
        try:
            lifeline_end, lifeline = os.pipe()
        except OSError:
            os.close(report_end)
            raise
        try:
            with log.open("ab") as log_file:
                process = subprocess.Popen(  # noqa: ASYNC220  # `_timed_out` waits for it
                    [
                        *(own_python(), "-I", "-S", build_supervisor.__file__),
                        json.dumps({**plan, "report": report_end}),
                    ],
                    stdin=lifeline_end,
                    stdout=log_file,
                    stderr=log_file,
                    cwd="/",
                    env=_environment(attempt, account, rules),
                    pass_fds=[report_end],
                    start_new_session=True,
                )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(report_end)
            os.close(lifeline_end)
        has_timed_out = await _timed_out(process, lifeline, rules.timeout_s)
        step, code = _read_report(report)
    finally:
        os.close(report)
    if code == 0:
        return
    output = _tail(log)
    name = names[min(step, len(names) - 1)]
    if has_timed_out:
        raise EnvironmentFailed(
            f"{name} timed out after {rules.timeout_s:g} s",
            f"{output}{name} timed out: it took longer than {rules.timeout_s:g} s\n",
            f"the environment was not built within {rules.timeout_s:g} s, so the operator ended "
            f"{name}; see its output in the job's log. Fix what hangs there, or raise the limit "
            "(`cortex serve --build-timeout`)",
        )
    if code is None:
        raise EnvironmentFailed(f"the supervisor of {name} was killed", output)
    ending = f"exit code {code}" if code > 0 else f"signal {-code}"
    raise EnvironmentFailed(f"{name} failed ({ending})", output)


async def _timed_out(process: subprocess.Popen[bytes], lifeline: int, timeout_s: float) -> bool:
    """Wait for a build. When this returns or raises, no process of the build is left.

    Args:
        lifeline: the write end of the supervisor's standard input. Closing it ends the build.

    Returns:
        Whether the build took too long.
    """
    exited = asyncio.ensure_future(_exit_code(process))
    try:
        done, _ = await asyncio.wait([exited], timeout=timeout_s)
        for each in done:  # raises if no descriptor was free to wait with
            each.result()
        return not done
    finally:
        os.close(lifeline)
        if not exited.done():
            process.send_signal(signal.SIGCONT)  # a build as the same user may have stopped it
        elif exited.exception() is not None:
            exited = asyncio.ensure_future(in_thread(process.wait))
        done, _ = await asyncio.wait([exited], timeout=_END_TIMEOUT_S)
        if not done:
            process.kill()
            await asyncio.wait([exited])


def _read_report(report: int) -> tuple[int, int | None]:
    """The supervisor's report: the number of the last step, and the build's exit code. The exit
    code is None if the supervisor was killed before it could report one."""
    os.set_blocking(report, False)
    with suppress(OSError, ValueError, IndexError):
        fields = os.read(report, _MAX_REPORT).decode().splitlines()[-1].split()
        return int(fields[0]), int(fields[1]) if len(fields) > 1 else None
    return 0, None


def end_leftovers(folder: Path) -> None:
    """End the processes of builds in a folder whose supervisors were killed, with the operator or
    by the build itself. Their temporary folders identify them."""
    for _ in range(_MAX_SWEEPS):
        found = processes.with_variable_below("TMPDIR", str(folder))
        if not found:
            return
        processes.send_signals(found, signal.SIGSTOP)
        started = {
            pid: ticks for root in found for pid, ticks in processes.descendants(root).items()
        }
        processes.send_signals(found | started, signal.SIGKILL)
        time.sleep(0.01)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _MAX_OUTPUT))
        return file.read(_MAX_OUTPUT).decode("utf-8", "replace")


async def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process, without a thread: a build may take long."""
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()
