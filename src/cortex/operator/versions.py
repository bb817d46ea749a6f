"""Deployed versions as a worker needs them: the spec, the project's files, a built environment.

The dispatcher asks before it starts a job; a deploy asks ahead, so that the first job finds the
environment built and a fork server warm.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from cortex.engines.base import Version
from cortex.errors import CortexError
from cortex.projects.environments import EnvironmentFailed, Environments
from cortex.projects.variables import variables
from cortex.spec.api import ApiSpec
from cortex.store import Store

log = structlog.get_logger()


class Unusable(Exception):
    """A version cannot run: its environment could not be built, or its files are gone.

    Attributes:
        reason: one line, for the job's message.
        output: all there is to say, for the job's log.
    """

    def __init__(self, reason: str, output: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class Versions:
    """Every version that this operator has been asked for, prepared once."""

    def __init__(self, store: Store, projects: Path, environments: Environments) -> None:
        self._store = store
        self._projects = projects
        self._environments = environments
        self._specs: dict[str, ApiSpec] = {}
        self._ready: dict[str, Version] = {}
        self._preparing: dict[str, asyncio.Task[Version]] = {}

    async def spec(self, api_id: str) -> ApiSpec:
        """The spec of a version that was ever deployed.

        Raises:
            CortexError: the store holds a job of a version that it does not hold.
        """
        if api_id not in self._specs:
            found = await self._store.version(api_id)
            if found is None:
                raise CortexError(f"the version {api_id} is missing from the store")
            self._specs[api_id] = found
        return self._specs[api_id]

    def ready(self, api_id: str) -> Version | None:
        """The version, if it can start jobs at once."""
        return self._ready.get(api_id)

    async def prepare(self, api_id: str) -> Version:
        """The version once it can start jobs. A failed environment is tried again at each call.

        Raises:
            Unusable: it cannot.
        """
        if api_id in self._ready:
            return self._ready[api_id]
        task = self._preparing.get(api_id)
        if task is None:
            task = asyncio.create_task(self._prepare(api_id), name=f"prepare {api_id}")
            self._preparing[api_id] = task
            task.add_done_callback(lambda _: self._preparing.pop(api_id, None))
        return await asyncio.shield(task)

    async def describe(self, api_id: str) -> Version:
        """The version as far as a worker that has already started needs it: nothing is built."""
        spec = await self.spec(api_id)
        return self._ready.get(api_id) or Version(spec, self.project(spec), Path(), {})

    def project(self, spec: ApiSpec) -> Path:
        """The folder of a version's files."""
        return self._projects / spec.project_id

    async def close(self) -> None:
        """Give up what is being prepared."""
        tasks = list(self._preparing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _prepare(self, api_id: str) -> Version:
        spec = await self.spec(api_id)
        project = self.project(spec)
        if not project.is_dir():
            raise Unusable(
                "the project's files are gone from the operator's data folder; deploy it again",
                f"{project} does not exist\n",
            )
        try:
            python = await self._environments.build(project)
            env = {**variables(project), **spec.definition.env}
        except EnvironmentFailed as error:
            log.warning("environment failed", api=spec.name, api_id=api_id)
            raise Unusable(
                "the environment could not be built; the job's log has the resolver's words",
                error.output,
            ) from error
        except OSError as error:
            raise Unusable(f"the environment could not be built: {error}", f"{error}\n") from error
        self._ready[api_id] = Version(spec, project, python, env)
        return self._ready[api_id]
