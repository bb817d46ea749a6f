"""One environment in a folder of its own: uv makes it, as the user that jobs run as. Called by
`environments`.

    <folder>/<attempt>/venv    what one build made
    <folder>/<attempt>.log     what was said while it did
    <folder>/<attempt>.lock    the versions that it had to take
    <folder>/ready             the attempt that is complete; written last

Each attempt has a folder of its own, which is handed over to that user: from then on the operator uses no path
that leads through it. What works in there is the `build_supervisor`'s, which ends a build with all that it has started.
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

NOT_BUILT = "the environment could not be built; the job's log has the resolver's words"

_MOST_OUTPUT = 256 << 10
_MOST_REPORT = 4096
_DISK_FULL = ("os error 28", "No space left on device")  # as uv and as what it runs says it
_MARKER = "ready"
_LOG = ".log"
_BESIDE = (_LOG, lockfiles.SUFFIX, f".{_MARKER}")
_TEMPORARY = "tmp"
_MOST_LINKS = 4  # uv makes `python` one to the interpreter, and the other names to `python`
_END_S = 30.0  # in which a supervisor has ended all of its build, and itself
_MOST_SWEEPS = 100


class EnvironmentFailed(Exception):
    """An environment could not be built.

    Attributes:
        output: the resolver's words, all of them.
        reason: one line, for the message of a job.
    """

    def __init__(self, message: str, output: str, reason: str = NOT_BUILT) -> None:
        super().__init__(message)
        self.output = output
        self.reason = reason

    @property
    def is_for_now(self) -> bool:
        """Whether the disk was full, so that it may be built later."""
        return any(words in self.output for words in _DISK_FULL)


def ready(folder: Path) -> Path | None:
    """The interpreter of the environment that was built in a folder, if one was."""
    try:
        attempt = (folder / _MARKER).read_text("utf-8")
    except FileNotFoundError:
        return None
    return _interpreter(folder / attempt) if attempt and _is_whole(folder / attempt) else None


async def build(
    wanted: Requirements,
    project: Path,
    folder: Path,
    account: Account | None,
    lock: str | None,
    rules: BuildRules,
) -> Path:
    """Build what a project asks for, in a folder where nothing else builds; its interpreter.

    Args:
        lock: the versions that it has to take, if any.

    Raises:
        EnvironmentFailed: it cannot be built.
    """
    attempt = folder / new_id()
    await in_thread(_start_attempt, folder, attempt, account)
    try:
        if lock is not None:
            attempt.with_suffix(lockfiles.SUFFIX).write_text(lock, "utf-8")
        await _install(wanted, project, attempt, account, rules)
        await in_thread(_mark, folder, attempt)
    except BaseException:
        await in_thread(_discard, attempt)
        raise
    return _interpreter(attempt)


def own_python() -> str:
    """The interpreter that environments are made from, where the project asks for no other."""
    # In a virtual environment this is the interpreter that it was made from.
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def _interpreter(attempt: Path) -> Path:
    return attempt / "venv" / "bin" / "python"


def _is_whole(attempt: Path) -> bool:
    """Whether its interpreter is there. Its folders are of the user that builds run as, who may have put links
    there: none is followed but the interpreter's own, to the Python that it was made from."""
    with (
        suppress(OSError),
        beneath.opened(str(attempt.parent), attempt.name, "venv", "bin") as folder,
    ):
        name = "python"
        for _ in range(_MOST_LINKS):
            found = beneath.stat(folder, name)
            if found is None or not stat.S_ISLNK(found.st_mode):
                return found is not None and stat.S_ISREG(found.st_mode)
            name = os.readlink(name, dir_fd=folder)
            if "/" in name:
                return name.startswith("/") and Path(name).exists()
    return False


def _start_attempt(folder: Path, attempt: Path, account: Account | None) -> None:
    """Clear what earlier attempts left: none of them is in use, or this one would not be made."""
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
    """uv's cache for builds that run as another user, who may have no home."""
    return attempt.parent.parent / ".uv"


def _mark(folder: Path, attempt: Path) -> None:
    # The marker must not reach the disk before the thousands of files that it vouches for.
    os.sync()
    # In no folder that the build could write to: it may have put a link there.
    written = attempt.with_suffix(f".{_MARKER}")
    with written.open("w", encoding="utf-8") as file:
        file.write(attempt.name)
        file.flush()
        os.fsync(file.fileno())
    if not _is_whole(attempt):
        # It was given up meanwhile, or another operator cleared it away: the marker is the next one's.
        raise FileNotFoundError(errno.ENOENT, "the environment is gone", str(attempt))
    written.rename(folder / _MARKER)


async def _install(
    wanted: Requirements,
    project: Path,
    attempt: Path,
    account: Account | None,
    rules: BuildRules,
) -> None:
    # A build writes into its source, and an editable install needs it for good.
    source = attempt / "source" if wanted.is_local else project
    copy = [str(project), str(source)] if wanted.is_local else None
    venv = attempt / "venv"
    python = wanted.python_for_uv or own_python()
    steps = [["venv", "--no-project", "--python", python, str(venv)]]
    if wanted.arguments:
        into = str(_interpreter(attempt))
        lock = attempt.with_suffix(lockfiles.SUFFIX)
        by = ["--constraint", str(lock)] if lock.exists() else []
        steps.append(["pip", "install", "--python", into, *by, *wanted.arguments])
    program = uv.find_uv_bin()
    plan = {
        "temporary": str(attempt / _TEMPORARY),
        "user": None if account is None else account.uid,
        "group": None if account is None else account.gid,
        "groups": None if account is None else account.groups,
        "steps": [
            {"copy": copy},
            *({"folder": str(source), "command": [program, *step]} for step in steps),
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
    """Let a supervisor take the steps of a plan, which have these names."""
    log = attempt.with_suffix(_LOG)
    report, theirs = os.pipe()
    try:
        try:
            held, lifeline = os.pipe()
        except OSError:
            os.close(theirs)
            raise
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(  # noqa: ASYNC220  # it is waited for without blocking
                    [
                        *(own_python(), "-I", "-S", build_supervisor.__file__),
                        json.dumps({**plan, "report": theirs}),
                    ],
                    stdin=held,
                    stdout=output,
                    stderr=output,
                    cwd="/",
                    env=_environment(attempt, account, rules),
                    pass_fds=[theirs],
                    start_new_session=True,
                )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(theirs)
            os.close(held)
        is_late = await _is_late(process, lifeline, rules.timeout_s)
        step, code = _read_report(report)
    finally:
        os.close(report)
    if code == 0:
        return
    words = _tail(log)
    name = names[min(step, len(names) - 1)]
    if is_late:
        raise EnvironmentFailed(
            f"{name} was ended after {rules.timeout_s:g} s",
            f"{words}{name} was ended: it took longer than {rules.timeout_s:g} s\n",
            f"the environment was not built within {rules.timeout_s:g} s, and {name} was ended; the job's log has "
            "its words. Mend what hangs there, or let builds take longer (`cortex serve --build-timeout`)",
        )
    if code is None:
        raise EnvironmentFailed(f"{name} was ended with its supervisor", words)
    ending = f"exit code {code}" if code > 0 else f"signal {-code}"
    raise EnvironmentFailed(f"{name} failed ({ending})", words)


async def _is_late(process: subprocess.Popen[bytes], lifeline: int, timeout_s: float) -> bool:
    """Whether a build takes too long. When this returns or raises, nothing of it is left."""
    ended = asyncio.ensure_future(_ended(process))
    try:
        done, _ = await asyncio.wait([ended], timeout=timeout_s)
        for each in done:  # there may have been no descriptor to wait with
            each.result()
        return not done
    finally:
        os.close(lifeline)
        if not ended.done():
            process.send_signal(signal.SIGCONT)  # a build of the same user may have stopped it
        elif ended.exception() is not None:
            ended = asyncio.ensure_future(in_thread(process.wait))
        done, _ = await asyncio.wait([ended], timeout=_END_S)
        if not done:
            process.kill()
            await asyncio.wait([ended])


def _read_report(report: int) -> tuple[int, int | None]:
    """The last step, and the exit code with which the build ended; None where the supervisor did not come to tell it."""
    os.set_blocking(report, False)
    with suppress(OSError, ValueError, IndexError):
        words = os.read(report, _MOST_REPORT).decode().splitlines()[-1].split()
        return int(words[0]), int(words[1]) if len(words) > 1 else None
    return 0, None


def end_leftovers(below: Path) -> None:
    """End what is left of builds in a folder whose supervisors were killed, with their operator or by the build itself.
    They are known by their temporary folders."""
    for _ in range(_MOST_SWEEPS):
        left = _working_below(below)
        if not left:
            return
        processes.send(left, signal.SIGSTOP)
        started = {
            pid: ticks for root in left for pid, ticks in processes.descendants(root).items()
        }
        processes.send(left | started, signal.SIGKILL)
        time.sleep(0.01)


def _working_below(folder: Path) -> dict[int, int]:
    marked = f"TMPDIR={folder}/".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            words = (process / "environ").read_bytes().split(b"\0")
            about = processes.stat(process.name)
            if about is not None and any(word.startswith(marked) for word in words):
                found[int(process.name)] = about[2]
    return found


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_OUTPUT))
        return file.read(_MOST_OUTPUT).decode("utf-8", "replace")


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit code, once there is one. A build may take long: no thread waits for it."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()
