"""A Python environment per content of requirements: built once by uv, cached on disk, shared.

Which environment a project gets is decided here, and when one is built or removed; `building` makes it, in
`<root>/<hash>`. Called by versions and retention of the operator, and by the agents on a cluster's nodes.

What an environment held when a project's was first built is kept with the project, as its lock file: it
is the same when it is built again, here or elsewhere.
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

from cortex.projects import builder, lockfiles
from cortex.projects.build_rules import DEFAULT_RULES, BuildRules
from cortex.projects.builder import EnvironmentFailed
from cortex.projects.repository import Projects
from cortex.projects.requirements import Requirements, read_requirements
from cortex.spec.api import DEFAULT_DEPENDENCIES, Dependencies
from cortex.spec.times import new_id
from cortex.system.account import Account
from cortex.system.background import in_thread
from cortex.system.folders import remove

_MOST_QUICK = 2
_MOST_BUILDS = 8
_QUICK_S = 60.0
"""After which a build is a slow one, and makes room for another."""
_GONE = ".gone-"


@dataclass
class _Build:
    task: asyncio.Task[Path]
    waiters: int = 0


class Environments:
    """The environments below one folder, which one operator owns."""

    def __init__(
        self,
        root: Path,
        account: Account | None = None,
        projects: Projects | None = None,
        rules: BuildRules = DEFAULT_RULES,
    ) -> None:
        """`projects` keeps the lock files, if any are."""
        self.rules = rules
        """Of the builds that begin from now on."""
        self._root = root.absolute()
        self._account = account
        self._projects = projects
        self._builds: dict[str, _Build] = {}
        self._asked_for: set[str] = set()
        self._lock = threading.Lock()
        self._all_builds = asyncio.Semaphore(_MOST_BUILDS)
        self._quick_builds = asyncio.Semaphore(_MOST_QUICK)

    def open(self) -> None:
        """End the builds that another operator has left, before this one builds. Blocking."""
        builder.end_leftovers(self._root)

    def identify(self, project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES) -> str:
        """SHA-256 over all that decides what the environment of a project holds, which is in a folder
        under its id.

        Args:
            dependencies: which of the project's files say what is installed.
        """
        wanted = read_requirements(project, dependencies)
        content = {
            "python": wanted.python_to_find or [sys.version, builder.own_python()],
            "platform": [sysconfig.get_platform(), *platform.libc_ver()],
            "lines": wanted.lines,
            # The id that it is kept under: what jobs write there, as Python does, is not installed.
            "project": project.name if wanted.is_local else "",
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def ready(
        self, project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES
    ) -> Path | None:
        """The interpreter of the project's environment, if it has been built."""
        return self._ready(self._choose(project, dependencies)[0])

    async def build(
        self,
        project: Path,
        dependencies: Dependencies = DEFAULT_DEPENDENCIES,
        joined: Callable[[], None] = lambda: None,
    ) -> Path:
        """The interpreter of the project's environment, built if it has not been.

        Callers that want the same one share one build; it goes on as long as one of them waits.

        Args:
            joined: called when this caller has begun to wait for a build.

        Raises:
            EnvironmentFailed: it cannot be built; the next call tries again.
            StorageUnavailable: what it has to hold cannot be told now.
        """
        wanted = await in_thread(read_requirements, project, dependencies)
        if wanted.mistakes:  # also where it was built: a Python that is too old for jobs could be
            told = "\n".join(wanted.mistakes)
            raise EnvironmentFailed(wanted.mistakes[0], f"{told}\n")
        identity, lock = await in_thread(self._choose, project, dependencies)
        with self._lock:
            self._asked_for.add(identity)
            found = self._ready(identity)
        if found is not None:
            return found
        build = self._builds.get(identity)
        if build is None:
            work = self._build(identity, project, wanted, lock)
            task = asyncio.create_task(work, name=f"build {identity}")
            build = self._builds[identity] = _Build(task)
            task.add_done_callback(lambda done: self._forget(identity, done))
        build.waiters += 1
        joined()
        try:
            return await asyncio.shield(build.task)
        finally:
            build.waiters -= 1
            if build.waiters == 0 and not build.task.done():
                # Forgotten at once: who comes now must not join a build that is being ended.
                self._builds.pop(identity, None)
                build.task.cancel()
                await asyncio.gather(build.task, return_exceptions=True)

    def keep_lock(self, project: Path, dependencies: Dependencies = DEFAULT_DEPENDENCIES) -> None:
        """Keep with the project what its environment holds, once it is built. Blocking.

        Raises:
            StorageUnavailable: it is not kept yet.
        """
        wanted = read_requirements(project, dependencies)
        python = self.ready(project, dependencies)
        if self._projects is None or python is None or not lockfiles.apply_to(wanted):
            return
        self._projects.keep_first_lock(project.name, lockfiles.name(wanted), lockfiles.held(python))

    def remove_all_but(
        self,
        wanted: Iterable[tuple[Path, Dependencies]],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Remove the environments that none of these projects wants, in which no process runs, and that
        are neither being built nor were asked for since this was called last: their projects may have
        come after the list.

        Args:
            is_over: asked before each; whether the others are left.
        """
        for leftover in self._root.glob(f"{_GONE}*"):
            remove(leftover)
        with self._lock:
            before, self._asked_for = self._asked_for, set()
        used = {each for version in wanted for each in self._identities(*version)} | before
        # An operator that came with another Python wants others for the jobs that it has found running.
        kept = {self._folder(identity) for identity in used} | _in_use(self._root)
        for folder in self._root.iterdir():
            if is_over():
                return
            gone = folder.with_name(f"{_GONE}{folder.name}-{new_id()}")
            with self._lock:
                busy = {self._folder(each) for each in (*self._asked_for, *self._builds)}
                if folder in kept | busy or folder.name.startswith("."):
                    continue
                # At one stroke: no half of it counts as whole, and one that is built now is another.
                folder.rename(gone)
            remove(gone)

    def _choose(self, project: Path, dependencies: Dependencies) -> tuple[str, str | None]:
        """The environment that a project gets, and the lock that it is built by, if any: one that was
        built without and holds the same is as good."""
        plain = self.identify(project, dependencies)
        wanted = read_requirements(project, dependencies)
        if self._projects is None or not lockfiles.apply_to(wanted):
            return plain, None
        lock = self._projects.lock(project.name, lockfiles.name(wanted))
        built = self._ready(plain)
        if lock is None or (built is not None and lockfiles.held(built) == lock):
            return plain, None
        return lockfiles.locked(plain, lock), lock

    def _identities(self, project: Path, dependencies: Dependencies) -> set[str]:
        plain = self.identify(project, dependencies)
        lock = None
        if self._projects is not None:
            name = lockfiles.name(read_requirements(project, dependencies))
            lock = self._projects.lock_here(project.name, name)
        return {plain} if lock is None else {plain, lockfiles.locked(plain, lock)}

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
        return builder.ready(self._folder(identity))

    async def _build(
        self, identity: str, project: Path, wanted: Requirements, lock: str | None
    ) -> Path:
        folder = self._folder(identity)
        async with self._place(wanted):
            return await builder.build(wanted, project, folder, self._account, lock, self.rules)

    @asynccontextmanager
    async def _place(self, wanted: Requirements) -> AsyncIterator[None]:
        """Two build at once, first come, first served. One that takes long, or never ends, does not count among them
        for more than a minute."""
        if not wanted.arguments and wanted.python_to_find is None:
            yield  # nothing is installed: it is a moment's work
            return
        async with self._all_builds:
            await self._quick_builds.acquire()
            is_counted = True

            def make_room() -> None:
                nonlocal is_counted
                if is_counted:
                    is_counted = False
                    self._quick_builds.release()

            timer = asyncio.get_running_loop().call_later(_QUICK_S, make_room)
            try:
                yield
            finally:
                timer.cancel()
                make_room()


def _in_use(root: Path) -> set[Path]:
    """The folders below one whose interpreter a process was started with."""
    found = set()
    above = os.fsencode(root) + b"/"
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            program = command.read_bytes().partition(b"\0")[0]
            if program.startswith(above):
                found.add(root / os.fsdecode(program.removeprefix(above)).partition("/")[0])
    return found
