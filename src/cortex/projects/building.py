"""One environment in a folder of its own: uv makes it, as the user that jobs run as. Called by
`environments`.

    <folder>/<attempt>/venv    what one build made
    <folder>/<attempt>.log     what was said while it did
    <folder>/<attempt>.lock    the versions that it had to take
    <folder>/ready             the attempt that is complete; written last

Each attempt has a folder of its own: a uv that outlived a killed operator, and still writes, cannot
spoil the attempt that followed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import uv

from cortex.account import Account, identity
from cortex.background import in_thread
from cortex.projects import locks
from cortex.projects.requirements import Requirements
from cortex.removal import remove
from cortex.spec.times import new_id

NOT_BUILT = "the environment could not be built; the job's log has the resolver's words"

_MOST_OUTPUT = 256 << 10
_DISK_FULL = ("os error 28", "No space left on device")  # as uv and as what it runs says it
_MARKER = "ready"
_LOG = ".log"
_BESIDE = (_LOG, locks.SUFFIX, f".{_MARKER}")
# They would make uv or a build see the operator's own environment, or contradict --python.
_NOT_INHERITED = {
    "CONDA_PREFIX",
    "PGPASSFILE",  # a build is the user's code: the store and its password are not for it
    "PGPASSWORD",
    "PYTHONHOME",
    "PYTHONPATH",
    "UV_PYTHON",
    "UV_SYSTEM_PYTHON",
    "VIRTUAL_ENV",
}
# A build is the user's code: how the operator is set up and reaches its files is not for it.
_OPERATORS_OWN = ("AWS_", "CORTEX_", "FSSPEC_")


class EnvironmentFailed(Exception):
    """An environment could not be built.

    Attributes:
        output: the resolver's words, all of them.
    """

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output

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
    python = _interpreter(folder / attempt)
    return python if attempt and python.exists() else None


async def build(
    wanted: Requirements, project: Path, folder: Path, account: Account | None, lock: str | None
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
            attempt.with_suffix(locks.SUFFIX).write_text(lock, "utf-8")
        await _install(wanted, project, attempt, account)
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


def _start_attempt(folder: Path, attempt: Path, account: Account | None) -> None:
    """Clear what earlier attempts left: none of them is in use, or this one would not be made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).unlink(missing_ok=True)
    for leftover in folder.iterdir():
        if leftover.suffix in _BESIDE:
            leftover.unlink()
        else:
            remove(leftover)
    attempt.mkdir()
    if account is not None:
        account.own(attempt)
        cache = _cache(attempt)
        cache.mkdir(exist_ok=True)
        account.own(cache)


def _discard(attempt: Path) -> None:
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
    if not _interpreter(attempt).exists():
        # It was given up meanwhile, or another operator cleared it away: the marker is the next one's.
        raise FileNotFoundError(errno.ENOENT, "the environment is gone", str(attempt))
    written.rename(folder / _MARKER)


async def _install(
    wanted: Requirements, project: Path, attempt: Path, account: Account | None
) -> None:
    source = project
    if wanted.is_local:
        # A build writes into its source, and an editable install needs it for good.
        source = attempt / "source"
        await in_thread(_copy, project, source, account)
    python = wanted.python_for_uv or own_python()
    venv = attempt / "venv"
    uv_here = partial(_uv, attempt, source, account)
    await uv_here("venv", "--no-project", "--python", python, str(venv))
    if wanted.arguments:
        into = str(_interpreter(attempt))
        lock = attempt.with_suffix(locks.SUFFIX)
        by = ["--constraint", str(lock)] if lock.exists() else []
        await uv_here("pip", "install", "--python", into, *by, *wanted.arguments)


def _copy(project: Path, source: Path, account: Account | None) -> None:
    shutil.copytree(project, source, symlinks=True)
    if account is not None:
        for path in (source, *source.rglob("*")):
            account.own(path)


async def _uv(attempt: Path, cwd: Path, account: Account | None, *arguments: str) -> None:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_OPERATORS_OWN)
    }
    if account is not None:
        env |= {**account.variables, "UV_CACHE_DIR": str(_cache(attempt))}
    log = attempt.with_suffix(_LOG)
    with log.open("ab") as output:
        # Not the loop's own: uvloop's cannot start a process as another user.
        process = subprocess.Popen(  # noqa: ASYNC220  # it is waited for without blocking
            [uv.find_uv_bin(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env={**env, "NO_COLOR": "1", "UV_NO_PROGRESS": "1"},
            start_new_session=True,
            **identity(account),
        )
    ended = asyncio.ensure_future(_ended(process))
    try:
        code = await asyncio.shield(ended)
    finally:
        if not ended.done():
            # Its session is its process group: what uv has started ends with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(ended)
    if code != 0:
        shown = " ".join(arguments[:2] if arguments[0] == "pip" else arguments[:1])
        ending = f"exit code {code}" if code > 0 else f"signal {-code}"
        words = log.read_bytes()[-_MOST_OUTPUT:].decode("utf-8", "replace")
        raise EnvironmentFailed(f"uv {shown} failed ({ending})", words)


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
