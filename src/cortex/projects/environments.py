"""A Python environment per content of requirements: built once by uv, cached on disk, shared.

    <root>/<hash>/<attempt>/venv    what one build made
    <root>/<hash>/ready             the attempt that is complete; written last

Each attempt has a folder of its own: a uv that outlived a killed operator, and still writes, cannot
spoil the attempt that followed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uv

from cortex.projects.requirements import (
    Wanted,
    check_requirements,
    read_requirements,
    satisfies,
)
from cortex.projects.unpack import project_id
from cortex.spec.times import new_id

__all__ = ["EnvironmentFailed", "Environments", "check_requirements", "runs_on_own_python"]

_MOST_BUILDS = 2
_MOST_OUTPUT = 256 << 10
_MARKER = "ready"
_LOG = "build.log"
# They would make uv or a build see the operator's own environment, or contradict --python.
_NOT_INHERITED = {
    "CONDA_PREFIX",
    "PYTHONHOME",
    "PYTHONPATH",
    "UV_PYTHON",
    "UV_SYSTEM_PYTHON",
    "VIRTUAL_ENV",
}


class EnvironmentFailed(Exception):
    """An environment could not be built.

    Attributes:
        output: the resolver's words, all of them.
    """

    def __init__(self, message: str, output: str) -> None:
        super().__init__(message)
        self.output = output


@dataclass
class _Build:
    task: asyncio.Task[Path]
    waiters: int = 0


class Environments:
    """The environments below one folder, which one operator owns."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._builds: dict[str, _Build] = {}
        self._slots = asyncio.Semaphore(_MOST_BUILDS)

    def identify(self, project: Path) -> str:
        """SHA-256 over all that decides what the project's environment holds."""
        wanted = read_requirements(project)
        content = {
            "python": _python(wanted) or [sys.version, _own_python()],
            "platform": [sysconfig.get_platform(), *platform.libc_ver()],
            "lines": wanted.lines,
            "project": project_id(project) if wanted.is_local else "",
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def ready(self, project: Path) -> Path | None:
        """The interpreter of the project's environment, if it has been built."""
        return self._ready(self.identify(project))

    async def build(self, project: Path) -> Path:
        """The interpreter of the project's environment, built if it has not been.

        Callers that want the same one share one build; it goes on as long as one of them waits.

        Raises:
            EnvironmentFailed: it cannot be built; the next call tries again.
        """
        identity = await asyncio.to_thread(self.identify, project)
        found = self._ready(identity)
        if found is not None:
            return found
        build = self._builds.get(identity)
        if build is None:
            task = asyncio.create_task(self._build(identity, project), name=f"build {identity}")
            build = self._builds[identity] = _Build(task)
            task.add_done_callback(lambda done: self._forget(identity, done))
        build.waiters += 1
        try:
            return await asyncio.shield(build.task)
        finally:
            build.waiters -= 1
            if build.waiters == 0 and not build.task.done():
                # Forgotten at once: who comes now must not join a build that is being ended.
                self._builds.pop(identity, None)
                build.task.cancel()
                await asyncio.gather(build.task, return_exceptions=True)

    def _forget(self, identity: str, done: asyncio.Task[Path]) -> None:
        build = self._builds.get(identity)
        if build is not None and build.task is done:
            del self._builds[identity]
        if not done.cancelled():
            done.exception()  # seen, also where the last waiter left just before

    def _folder(self, identity: str) -> Path:
        # Short, since the path stands in the first line of every script of the environment.
        return self._root / identity[:20]

    def _ready(self, identity: str) -> Path | None:
        folder = self._folder(identity)
        try:
            attempt = (folder / _MARKER).read_text("utf-8")
        except FileNotFoundError:
            return None
        python = _interpreter(folder / attempt)
        return python if attempt and python.exists() else None

    async def _build(self, identity: str, project: Path) -> Path:
        async with self._slots:
            wanted = await asyncio.to_thread(read_requirements, project)
            if wanted.mistakes:
                told = "\n".join(wanted.mistakes)
                raise EnvironmentFailed(wanted.mistakes[0], f"{told}\n")
            folder = self._folder(identity)
            attempt = folder / new_id()
            await asyncio.to_thread(_start_attempt, folder, attempt)
            try:
                await _install(wanted, project, attempt)
                await asyncio.to_thread(_mark, folder, attempt)
            except BaseException:
                await asyncio.to_thread(shutil.rmtree, attempt, ignore_errors=True)
                raise
            return _interpreter(attempt)


def runs_on_own_python(project: Path) -> bool:
    """Whether the project's Python is of the operator's own version."""
    return _python(read_requirements(project)) is None


def _own_python() -> str:
    # In a virtual environment this is the interpreter that it was made from.
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def _python(wanted: Wanted) -> str | None:
    """The Python that uv has to find, None where the operator's own will do."""
    own = sys.version_info[:3]
    if wanted.python:
        asked = tuple(int(part) for part in wanted.python.split("."))
        return None if own[: len(asked)] == asked else wanted.python
    requires = wanted.requires_python
    return None if not requires or satisfies(own, requires) else requires


def _interpreter(attempt: Path) -> Path:
    return attempt / "venv" / "bin" / "python"


def _start_attempt(folder: Path, attempt: Path) -> None:
    """Clear what earlier attempts left: none of them is in use, or this one would not be made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).unlink(missing_ok=True)
    for leftover in folder.iterdir():
        shutil.rmtree(leftover, ignore_errors=True)
    attempt.mkdir()


def _mark(folder: Path, attempt: Path) -> None:
    # The marker must not reach the disk before the thousands of files that it vouches for.
    os.sync()
    written = attempt / _MARKER
    with written.open("w", encoding="utf-8") as file:
        file.write(attempt.name)
        file.flush()
        os.fsync(file.fileno())
    written.rename(folder / _MARKER)


async def _install(wanted: Wanted, project: Path, attempt: Path) -> None:
    source = project
    if wanted.is_local:
        # A build writes into its source, and an editable install needs it for good.
        source = attempt / "source"
        await asyncio.to_thread(shutil.copytree, project, source, symlinks=True)
    python = _python(wanted) or _own_python()
    venv = attempt / "venv"
    await _uv(attempt, source, "venv", "--no-project", "--python", python, str(venv))
    if wanted.arguments:
        into = str(_interpreter(attempt))
        await _uv(attempt, source, "pip", "install", "--python", into, *wanted.arguments)


async def _uv(attempt: Path, cwd: Path, *arguments: str) -> None:
    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    log = attempt / _LOG
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            uv.find_uv_bin(),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env={**env, "NO_COLOR": "1", "UV_NO_PROGRESS": "1"},
            start_new_session=True,
        )
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            # Its session is its process group: what uv has started ends with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    if code != 0:
        shown = " ".join(arguments[:2] if arguments[0] == "pip" else arguments[:1])
        ending = f"exit code {code}" if code > 0 else f"signal {-code}"
        words = log.read_bytes()[-_MOST_OUTPUT:].decode("utf-8", "replace")
        raise EnvironmentFailed(f"uv {shown} failed ({ending})", words)
