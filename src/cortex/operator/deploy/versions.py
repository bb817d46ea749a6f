"""Versions as jobs need them: the spec, the project's files, and a built environment.

The dispatcher makes the version of a waiting job ready. The warmer does it after a deploy, so that
the first job finds the environment built and a fork server warm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from cortex.engines.base import Version
from cortex.errors import NotFound, StorageUnavailable
from cortex.operator.deploy.shown_specs import ShownSpec, shown_spec
from cortex.projects.builder import EnvironmentFailed
from cortex.projects.dotenv import check_variables, read_variables
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.spec.api import ApiSpec, Dependencies
from cortex.spec.job import encode
from cortex.store import Store
from cortex.system.background import in_thread, retrying
from cortex.system.oserrors import is_shortage, is_storage

log = structlog.get_logger()

_RETRY_DELAY_S = 5.0


class VersionUnusable(Exception):
    """A version cannot run: its environment could not be built, or its files are gone.

    Attributes:
        reason: one line, for the job's message.
        output: the details, for the job's log; None where there are none.
    """

    def __init__(self, reason: str, output: str | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class VersionBlocked(Exception):
    """A version cannot be made ready now, for example on a full disk. A retry may succeed."""


@dataclass
class _Preparation:
    task: asyncio.Task[Version] | None = None
    waiters: int = 0
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)


class Versions:
    """The versions of which this operator has jobs, each made ready once."""

    def __init__(self, store: Store, projects: Projects, environments: Environments | None) -> None:
        """
        Args:
            environments: None where the engine builds them.
        """
        self._store = store
        self._projects = projects
        self._environments = environments
        self._specs: dict[str, ApiSpec] = {}
        self._shown: dict[str, ShownSpec] = {}
        self._ready: dict[str, Version] = {}
        self._preparing: dict[str, _Preparation] = {}
        self._cancelled: set[asyncio.Task[Version]] = set()
        self._locking: set[asyncio.Task[None]] = set()

    async def spec(self, api_id: str) -> ApiSpec:
        """The spec of a version.

        Raises:
            NotFound: retention has removed the version with its jobs.
        """
        if api_id not in self._specs:
            found = await self._store.version(api_id)
            if found is None:
                raise NotFound(
                    f"the version {api_id} was removed, and all jobs of it: they are kept for a "
                    "time (`cortex serve --keep-jobs`)"
                )
            self._specs[api_id] = found
        return self._specs[api_id]

    async def shown(self, api_id: str) -> ShownSpec:
        """The spec of a version as answers show it.

        Raises:
            NotFound: as `spec` does.
        """
        found = self._shown.get(api_id)
        if found is None:
            spec = await self.spec(api_id)
            text = encode(shown_spec(spec))
            found = self._shown[api_id] = ShownSpec(spec.networking.endpoint, text)
        return found

    def ready(self, api_id: str) -> Version | None:
        """The version, if it can start jobs at once."""
        return self._ready.get(api_id)

    async def make_ready(self, api_id: str) -> Version:
        """Return the version once it can start jobs. Each call retries an environment that failed.
        The work is cancelled once no caller waits for it.

        Raises:
            VersionUnusable: no job of the version can run.
            VersionBlocked: it cannot be made ready now.
            StorageUnavailable: its spec cannot be read now.
        """
        if api_id in self._ready:
            return self._ready[api_id]
        preparation = self._preparing.get(api_id)
        if preparation is None:
            preparation = self._preparing[api_id] = _Preparation()
            work = self._prepare(api_id, preparation.has_begun.set)
            preparation.task = asyncio.create_task(work, name=f"prepare {api_id}")
            preparation.task.add_done_callback(lambda _: self._on_prepared(api_id, preparation))
        assert preparation.task is not None
        preparation.waiters += 1
        try:
            return await asyncio.shield(preparation.task)
        finally:
            preparation.waiters -= 1
            if preparation.waiters == 0 and not preparation.task.done():
                # At once: a later call must not join work that is being cancelled.
                self._preparing.pop(api_id, None)
                preparation.task.cancel()
                self._cancelled.add(preparation.task)
                preparation.task.add_done_callback(self._cancelled.discard)

    async def build_has_begun(self, api_id: str) -> None:
        """Return once the build of a version's environment has begun, or there is nothing to
        build."""
        preparation = self._preparing.get(api_id)
        if preparation is not None:
            await preparation.has_begun.wait()

    async def describe(self, api_id: str) -> Version:
        """The version as far as a job needs it that has already started: nothing is built."""
        spec = await self.spec(api_id)
        return self._ready.get(api_id) or Version(spec, self.project(spec), Path(), {})

    def project(self, spec: ApiSpec) -> Path:
        """The folder of a version's files."""
        return self._projects.folder(spec.project_id)

    def reset(self) -> None:
        """Forget what is ready: another leader may have removed it, and stored more lock files."""
        self._projects.reset_cache()
        self._ready.clear()

    def forget(self, api_id: str) -> None:
        """A version was removed from the store."""
        self._specs.pop(api_id, None)
        self._shown.pop(api_id, None)
        self._ready.pop(api_id, None)

    async def close(self) -> None:
        """Cancel all work."""
        preparing = [each.task for each in self._preparing.values() if each.task is not None]
        tasks = [*preparing, *self._locking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._cancelled, return_exceptions=True)

    def _on_prepared(self, api_id: str, preparation: _Preparation) -> None:
        preparation.has_begun.set()
        if self._preparing.get(api_id) is preparation:
            del self._preparing[api_id]

    async def _prepare(self, api_id: str, on_build_begun: Callable[[], None]) -> Version:
        spec = await self.spec(api_id)
        project, files = self.project(spec), spec.definition.dependencies
        try:
            if not await in_thread(self._projects.ensure_local, spec.project_id):
                raise VersionUnusable(
                    "the project's files are gone from where the operator keeps them; "
                    "deploy it again",
                    f"{project} does not exist\n",
                )
            # Jobs run in this folder and may have changed its `.env`.
            if mistakes := await in_thread(check_variables, project):
                raise VersionUnusable(mistakes[0], "".join(f"{mistake}\n" for mistake in mistakes))
            built = self._environments
            python = Path() if built is None else await built.build(project, files, on_build_begun)
            env = {**read_variables(project), **spec.definition.env}
        except EnvironmentFailed as error:
            if error.is_temporary:
                raise VersionBlocked(
                    "the disk is full, and the environment is still to be built"
                ) from error
            log.warning("environment failed", api=spec.name, api_id=api_id)
            raise VersionUnusable(error.reason, error.output) from error
        except OSError as error:
            if is_storage(error) or is_shortage(error):
                raise VersionBlocked(f"the environment cannot be built now: {error}") from error
            raise VersionUnusable(
                f"the environment could not be built: {error}", f"{error}\n"
            ) from error
        except StorageUnavailable as error:
            raise VersionBlocked(error.message) from error
        self._ready[api_id] = Version(spec, project, python, env)
        if built is not None:
            task = asyncio.create_task(
                self._keep_lock(built, project, files), name=f"lock {api_id}"
            )
            self._locking.add(task)
            task.add_done_callback(self._locking.discard)
        return self._ready[api_id]

    async def _keep_lock(self, built: Environments, project: Path, files: Dependencies) -> None:
        await retrying(
            lambda: in_thread(built.pin_versions, project, files),
            (StorageUnavailable, OSError),
            delay_s=_RETRY_DELAY_S,
            warning="cannot store a lock file yet",
            project=project.name,
        )
