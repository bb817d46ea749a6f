"""Deploying and deleting APIs: from an uploaded project to a version that takes jobs."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import structlog

from cortex.errors import Conflict
from cortex.operator.context import Context
from cortex.operator.versions import Unusable
from cortex.projects.check import check_files
from cortex.projects.unpack import project_id, unpack
from cortex.spec.api import Api, ApiSpec
from cortex.spec.times import new_id, now_ns, rfc3339
from cortex.spec.yaml import read_apis
from cortex.store import Deployment

log = structlog.get_logger()

_INCOMING = ".incoming-"


class Deployer:
    """Deploys and deletes, one at a time."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._lock = asyncio.Lock()
        self._warming: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Clear what a deploy that was cut off left, and warm what is deployed."""
        for leftover in self._ctx.settings.projects.glob(f"{_INCOMING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for deployment in await self._ctx.store.deployments():
            self._warm(deployment.spec.api_id)

    async def close(self) -> None:
        """Give up warming."""
        for task in self._warming:
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)

    async def deploy(
        self, *, file: str, text: str, archive: BinaryIO, replace: bool
    ) -> list[tuple[Deployment, str]]:
        """Deploy every API of a `cortex.yaml`, all or none.

        Args:
            file: the name of the YAML file, for messages; it is left out of the project.
            archive: the project, as `projects.pack` writes it.
            replace: whether an API that is deployed may get a new version.

        Returns:
            Each API as it is deployed now, and what was done: "created x", "updated x", "x is
            unchanged".

        Raises:
            InvalidSpec, InvalidProject: with every mistake; nothing was deployed.
            Conflict: an endpoint is taken, or an API would be replaced against `replace`.
        """
        apis = await asyncio.to_thread(read_apis, text, file)
        async with self._lock:
            project = await asyncio.to_thread(self._take_in, apis, file, text, archive)
            current = {d.name: d for d in await self._ctx.store.deployments()}
            done: list[tuple[Deployment, str]] = []
            for api in apis:
                before = current.get(api.name)
                if before is not None and _same(before.spec, api, project):
                    done.append((before, f"{api.name} is unchanged"))
                    continue
                if before is not None and not replace:
                    raise Conflict(
                        f"the API {api.name!r} is deployed as another version; force the deploy "
                        "to replace it"
                    )
                spec = _new_version(api, project)
                verb = "created" if before is None else "updated"
                deployment = Deployment(api.name, api.networking.endpoint, spec)
                done.append((deployment, f"{verb} {api.name}"))
            changed = [d.spec for d, _ in done if current.get(d.name) is not d]
            if changed:
                await self._ctx.store.deploy(changed)
                await self._ctx.refresh_endpoints()
        for spec in changed:
            log.info("deployed", api=spec.name, api_id=spec.api_id)
            if spec.name in current:
                self._ctx.engine.forget(current[spec.name].spec.api_id)
            self._warm(spec.api_id)
        return done

    async def undeploy(self, name: str) -> int:
        """Delete an API and stop its jobs; how many there were.

        Raises:
            NotFound: it is not deployed.
        """
        async with self._lock:
            versions = await self._ctx.store.versions(name)
            stopped = await self._ctx.store.undeploy(name, f"the API {name} was deleted")
            await self._ctx.refresh_endpoints()
            for job in stopped:
                self._ctx.dispatcher.stopped(job)
            for spec in versions:
                self._ctx.engine.forget(spec.api_id)
        log.info("deleted", api=name, stopped_jobs=len(stopped))
        return len(stopped)

    def _take_in(self, apis: list[Api], file: str, text: str, archive: BinaryIO) -> str:
        """Unpack and check a project, and keep it under its id."""
        projects = self._ctx.settings.projects
        incoming = projects / f"{_INCOMING}{new_id()}"
        try:
            unpack(archive, incoming)
            # A comment there, or another API's entry, is no change of this API.
            (incoming / file).unlink(missing_ok=True)
            check_files(apis, incoming, file, text)
            identity = project_id(incoming)
            if not (projects / identity).exists():
                # An acknowledged deploy survives power loss; of thousands of small files that is
                # cheaper at one stroke than one by one.
                os.sync()
                incoming.rename(projects / identity)
            return identity
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _warm(self, api_id: str) -> None:
        task = asyncio.create_task(self._prepare(api_id), name=f"warm {api_id}")
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    async def _prepare(self, api_id: str) -> None:
        try:
            version = await self._ctx.versions.prepare(api_id)
            async with self._lock:  # an API that is deleted meanwhile keeps nothing warm
                current = await self._ctx.store.deployments()
                if any(deployment.spec.api_id == api_id for deployment in current):
                    self._ctx.engine.warm(version)
        except Unusable as error:  # its jobs will say so, each in its own log
            log.warning("not ready for jobs", api_id=api_id, reason=error.reason)


def _same(spec: ApiSpec, api: Api, project: str) -> bool:
    return (
        spec.project_id == project and Api(**spec.model_dump(include=set(Api.model_fields))) == api
    )


def _new_version(api: Api, project: str) -> ApiSpec:
    return ApiSpec(
        **api.model_dump(), api_id=new_id(), project_id=project, last_updated=rfc3339(now_ns())
    )


def safe_name(filename: str | None) -> str:
    """The last part of an uploaded file's name, which a client chose."""
    return Path(filename or "").name or "cortex.yaml"
