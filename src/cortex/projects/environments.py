"""A Python environment for each content of requirements: built once by uv, cached on disk, shared
by projects.

This module decides which environment a project gets, when to build one and when to remove one;
`builder` builds it in `<root>/<hash>`. Called by the operator's versions and retention, and by the
agents on a cluster's nodes.

The versions that a project's first environment contains are stored with the project, as its lock
file: a later build, on this machine or another, installs the same versions.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import sys
import sysconfig
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cortex.projects import builder, lockfiles, trash
from cortex.projects.build_rules import DEFAULT_RULES, BuildRules
from cortex.projects.builder import EnvironmentFailed
from cortex.projects.repository import Projects
from cortex.projects.requirements import Requirements, read_requirements
from cortex.spec.api import DEFAULT_DEPENDENCIES, Dependencies
from cortex.system.account import Account
from cortex.system.background import in_thread
from cortex.system.folders import remove

_MAX_QUICK_BUILDS = 2
_MAX_BUILDS = 8
_QUICK_BUILD_S = 60.0
"""A build that has taken longer counts as slow, and another may start."""


@dataclass
class _Build:
    task: asyncio.Task[Path]
    waiters: int = 0


class Environments:
    """The environments in one folder, which belongs to one operator."""

    def __init__(
        self,
        root: Path,
        account: Account | None = None,
        projects: Projects | None = None,
        rules: BuildRules = DEFAULT_RULES,
    ) -> None:
        """
        Args:
            projects: stores the lock files; without it there are none.
        """
        self.rules = rules
        """The rules for builds that start from now on."""
        self._root = root.absolute()
        self._account = account
        self._projects = projects
        self._builds: dict[str, _Build] = {}
        self._recently_requested: set[str] = set()
        self._lock = threading.Lock()
        self._all_builds = asyncio.Semaphore(_MAX_BUILDS)
        self._quick_builds = asyncio.Semaphore(_MAX_QUICK_BUILDS)

    def end_leftover_builds(self) -> None:
        """End the builds that an earlier operator has left. Blocking; to be called before the first
        build."""
        builder.end_leftovers(self._root)

    def identify(self, project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES) -> str:
        """The identity of a project's environment: SHA-256 over all that decides what it contains.

        Args:
            project: a folder that is named after the project's id.
            dependencies: the project's files that list the requirements.
        """
        requirements = read_requirements(project, dependencies)
        content = {
            "python": requirements.python_to_find or [sys.version, builder.own_python()],
            "platform": [sysconfig.get_platform(), *platform.libc_ver()],
            "lines": requirements.lines,
            # The id and not a hash of the files: what jobs write there, such as byte code, is not
            # installed.
            "project": project.name if requirements.is_local else "",
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def built_python(
        self, project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES
    ) -> Path | None:
        """The interpreter of the project's environment; None if it has not been built."""
        return self._built_python(self._choose(project, dependencies)[0])

    async def build(
        self,
        project: Path,
        dependencies: Dependencies = DEFAULT_DEPENDENCIES,
        on_waiting: Callable[[], None] = lambda: None,
    ) -> Path:
        """Build the project's environment unless it has been built.

        Callers that need the same environment share one build. It is cancelled when the last of
        them is.

        Args:
            on_waiting: called when this caller begins to wait for a build.

        Returns:
            The environment's interpreter.

        Raises:
            EnvironmentFailed: it cannot be built; the next call tries again.
            StorageUnavailable: the project's lock file cannot be read now.
        """
        requirements = await in_thread(read_requirements, project, dependencies)
        # Even if it has been built: an earlier version of Cortex accepted a Python that is too old
        # for jobs.
        if requirements.errors:
            output = "".join(f"{error}\n" for error in requirements.errors)
            raise EnvironmentFailed(requirements.errors[0], output)
        identity, lock = await in_thread(self._choose, project, dependencies)
        with self._lock:
            self._recently_requested.add(identity)
            python = self._built_python(identity)
        if python is not None:
            return python
        build = self._builds.get(identity)
        if build is None:
            work = self._build(identity, project, requirements, lock)
            task = asyncio.create_task(work, name=f"build {identity}")
            build = self._builds[identity] = _Build(task)
            task.add_done_callback(lambda done: self._build_done(identity, done))
        build.waiters += 1
        on_waiting()
        try:
            return await asyncio.shield(build.task)
        finally:
            build.waiters -= 1
            if build.waiters == 0 and not build.task.done():
                # Removed before it ends: a new caller must not join a build that is being
                # cancelled.
                self._builds.pop(identity, None)
                build.task.cancel()
                await asyncio.gather(build.task, return_exceptions=True)

    def pin_versions(
        self, project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES
    ) -> None:
        """Store the versions in the project's built environment as its lock file, unless it has
        one. Blocking.

        Raises:
            StorageUnavailable: the lock file is not stored.
        """
        requirements = read_requirements(project, dependencies)
        python = self.built_python(project, dependencies)
        if self._projects is None or python is None or not lockfiles.apply_to(requirements):
            return
        self._projects.save_lockfile_if_absent(
            project.name, lockfiles.file_name(requirements), lockfiles.installed_versions(python)
        )

    def remove_unused(
        self,
        used: Iterable[tuple[Path, Dependencies]],
        is_closing: Callable[[], bool] = lambda: False,
    ) -> None:
        """Remove the environments that no project needs and no process uses. Blocking.

        An environment also stays while it is being built, and if it was requested since the
        previous call: its project may have been deployed after `used` was listed.

        Args:
            used: the projects, each with the files that list its requirements.
            is_closing: asked before each environment; True ends the removal.
        """
        for leftover in trash.trashed_folders(self._root):
            remove(leftover)
        with self._lock:
            requested, self._recently_requested = self._recently_requested, set()
        needed = {each for version in used for each in self._identities(*version)} | requested
        # After an upgrade of Python the operator identifies other environments, and the jobs that
        # it has recovered still run in the earlier ones.
        kept = {self._folder(identity) for identity in needed} | _in_use(self._root)
        for folder in self._root.iterdir():
            if is_closing():
                return
            with self._lock:
                busy = {self._folder(each) for each in (*self._recently_requested, *self._builds)}
                if folder in kept | busy or folder.name.startswith("."):
                    continue
                # An atomic rename: no half-deleted environment is taken for a built one, and a
                # build that starts now gets a folder of its own.
                trashed = trash.move(folder)
            remove(trashed)

    def _choose(self, project: Path, dependencies: Dependencies) -> tuple[str, str | None]:
        """The identity of a project's environment, and the content of the lock file to build it
        with, if any. An environment that was built without the lock file and contains the same
        versions will do."""
        unlocked = self.identify(project, dependencies)
        requirements = read_requirements(project, dependencies)
        if self._projects is None or not lockfiles.apply_to(requirements):
            return unlocked, None
        lock = self._projects.lockfile(project.name, lockfiles.file_name(requirements))
        built = self._built_python(unlocked)
        if lock is None or (built is not None and lockfiles.installed_versions(built) == lock):
            return unlocked, None
        return lockfiles.locked_identity(unlocked, lock), lock

    def _identities(self, project: Path, dependencies: Dependencies) -> set[str]:
        """The identities of a project's environment, without and with its lock file."""
        unlocked = self.identify(project, dependencies)
        lock = None
        if self._projects is not None:
            name = lockfiles.file_name(read_requirements(project, dependencies))
            lock = self._projects.local_lockfile(project.name, name)
        return {unlocked} if lock is None else {unlocked, lockfiles.locked_identity(unlocked, lock)}

    def _build_done(self, identity: str, done: asyncio.Task[Path]) -> None:
        build = self._builds.get(identity)
        if build is not None and build.task is done:
            del self._builds[identity]
        if not done.cancelled():
            done.exception()  # retrieved, even if the last waiter was cancelled just before

    def _folder(self, identity: str) -> Path:
        # Short: the path is in the first line of every script of the environment.
        return self._root / identity[:20]

    def _built_python(self, identity: str) -> Path | None:
        return builder.built_python(self._folder(identity))

    async def _build(
        self, identity: str, project: Path, requirements: Requirements, lock: str | None
    ) -> Path:
        folder = self._folder(identity)
        async with self._build_slot(requirements):
            return await builder.build_environment(
                requirements, project, folder, self._account, lock, self.rules
            )

    @asynccontextmanager
    async def _build_slot(self, requirements: Requirements) -> AsyncIterator[None]:
        """Wait until this build may run: at most two quick builds run at a time, in order of
        arrival. A build that has run for a minute no longer counts, so that a build that hangs does
        not block the others."""
        if not requirements.arguments and requirements.python_to_find is None:
            yield  # nothing to install, which takes a moment
            return
        async with self._all_builds:
            await self._quick_builds.acquire()
            is_counted = True

            def stop_counting() -> None:
                nonlocal is_counted
                if is_counted:
                    is_counted = False
                    self._quick_builds.release()

            timer = asyncio.get_running_loop().call_later(_QUICK_BUILD_S, stop_counting)
            try:
                yield
            finally:
                timer.cancel()
                stop_counting()


def _in_use(root: Path) -> set[Path]:
    """The environments in a folder whose interpreter some process was started with."""
    found = set()
    prefix = os.fsencode(root) + b"/"
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has exited
            program = command.read_bytes().partition(b"\0")[0]
            if program.startswith(prefix):
                found.add(root / os.fsdecode(program.removeprefix(prefix)).partition("/")[0])
    return found
