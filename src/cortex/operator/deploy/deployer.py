"""Deploying and deleting APIs: from an uploaded project to a version that takes jobs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import structlog

from cortex.errors import Conflict, StorageUnavailable
from cortex.operator.deploy.versions import HeldUp, Unusable
from cortex.operator.http.context import Context
from cortex.projects.check import check_files
from cortex.projects.unpack import unpack
from cortex.spec.api import MASK, Api, ApiSpec
from cortex.spec.audit import Actor
from cortex.spec.cortex_yaml import field_lines, invalid_spec, read_apis, submitted_entries
from cortex.spec.job import Json
from cortex.spec.times import new_id, now_ns, rfc3339
from cortex.spec.yaml_lines import Mistake
from cortex.store import Deployment
from cortex.system.background import Background

log = structlog.get_logger()

_RETRY_S = 10.0
_FAILED = "what follows a deploy failed"
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Deployed:
    """One API of a deploy: as it is deployed now, what was done ("created x", "updated x", "x is unchanged"), and
    what its author should know of the project."""

    deployment: Deployment
    done: str
    warnings: list[str]

    @property
    def message(self) -> str:
        """All of it in words, for clients that show nothing else."""
        return "\n".join([self.done, *(f"warning: {each}" for each in self.warnings)])


class Deployer:
    """Deploys and deletes, one at a time."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._background = Background(_FAILED)
        self._is_driving = False
        self._current: dict[str, str] = {}  # the versions, by API, that the engine was told of
        self._warming: dict[str, asyncio.Task[None]] = {}

    async def open(self) -> None:
        """Warm what is deployed, from now on, and send the store of files what it lacks."""
        self._is_driving = True
        self._background = Background(_FAILED)
        used = {spec.project_id for spec in await self._ctx.store.all_versions()}
        self._background.run(self._send_missing(used), "send missing projects")
        for deployment in await self._ctx.store.deployments():
            self._took_effect(deployment.spec)

    async def close(self) -> None:
        """Give up what goes on in the background."""
        self._is_driving = False
        self._current.clear()
        await self._background.close()

    async def refresh(self) -> None:
        """Something was deployed or deleted, by another operator or by this one: what was read meanwhile
        may be old, and is read again."""
        current = await self._ctx.store.deployments()
        self._ctx.endpoints = {each.endpoint: each.name for each in current}
        if not self._is_driving:
            return
        for name in self._current.keys() - {each.name for each in current}:
            self._forget(self._current.pop(name))
        for each in current:
            self._took_effect(each.spec)

    async def deploy(
        self, *, file: str, text: str, archive: BinaryIO, replace: bool, actor: Actor
    ) -> list[Deployed]:
        """Deploy every API of a `cortex.yaml`, all or none.

        Args:
            file: the name of the YAML file, for messages; it is left out of the project.
            archive: the project, as `projects.pack` writes it.
            replace: whether an API that is deployed may get a new version.
            actor: who deploys.

        Returns:
            Each API, in the order of the file. A warning stands with the first API that it is about.

        Raises:
            InvalidSpec, InvalidProject: with every mistake; nothing was deployed.
            Conflict: an endpoint is taken, or an API would be replaced against `replace`.
        """
        apis = await asyncio.to_thread(read_apis, text, file)
        _check_masks(apis, file, text)
        submitted = await asyncio.to_thread(submitted_entries, text)
        async with self._ctx.deploying:
            project, warnings = await asyncio.to_thread(self._take_in, apis, file, text, archive)
            current = {d.name: d for d in await self._ctx.store.deployments()}
            done: list[tuple[Deployment, str]] = []
            for api, entry in zip(apis, submitted, strict=True):
                before = current.get(api.name)
                if before is not None and _same(before.spec, api, project):
                    done.append((before, f"{api.name} is unchanged"))
                    continue
                if before is not None and not replace:
                    raise Conflict(
                        f"the API {api.name!r} is deployed as another version; force the deploy "
                        "to replace it"
                    )
                spec = _new_version(api, project, entry)
                verb = "created" if before is None else "updated"
                deployment = Deployment(api.name, api.networking.endpoint, spec)
                done.append((deployment, f"{verb} {api.name}"))
            changed = [d.spec for d, _ in done if current.get(d.name) is not d]
            if changed:
                await self._ctx.store.deploy(changed, actor)
                for spec in changed:
                    self._ctx.deployed(spec.name, spec.networking.endpoint)
        for spec in changed:
            log.info("deployed", api=spec.name, api_id=spec.api_id)
            self._took_effect(spec)
        return [Deployed(*each, told) for each, told in zip(done, warnings, strict=True)]

    async def undeploy(self, name: str, actor: Actor) -> int:
        """Delete an API and stop its jobs; how many there were.

        Raises:
            NotFound: it is not deployed.
        """
        async with self._ctx.deploying:
            versions = await self._ctx.store.versions(name)
            stopped = await self._ctx.store.undeploy(name, f"the API {name} was deleted", actor)
            self._ctx.undeployed(name)
            for job in reversed(stopped):  # so that those before one do not try to start meanwhile
                self._ctx.jobs.stopped(job)
            self._current.pop(name, None)
            for spec in versions:
                self._forget(spec.api_id)
        log.info("deleted", api=name, stopped_jobs=len(stopped))
        return len(stopped)

    def _take_in(
        self, apis: list[Api], file: str, text: str, archive: BinaryIO
    ) -> tuple[str, list[list[str]]]:
        """Unpack and check a project, and keep it under its id; that, and the warnings of each API."""
        with self._ctx.projects.incoming() as incoming:
            unpack(archive, incoming)
            # A comment there, or another API's entry, is no change of this API.
            with suppress(IsADirectoryError):
                (incoming / file).unlink(missing_ok=True)
            warnings = _each_once(check_files(apis, incoming, file, text))
            return self._ctx.projects.take_in(incoming), warnings

    async def _send_missing(self, used: set[str]) -> None:
        while True:
            try:
                await asyncio.to_thread(self._ctx.projects.send_missing, used)
            except (StorageUnavailable, OSError) as error:
                log.warning("projects are still to be sent", error=str(error))
                await asyncio.sleep(_RETRY_S)
            else:
                return

    def _took_effect(self, spec: ApiSpec) -> None:
        before = self._current.get(spec.name)
        if not self._is_driving or before == spec.api_id:
            return
        self._current[spec.name] = spec.api_id
        self._ctx.jobs.deployed(spec)
        if before is not None:
            self._ctx.engine.forget(versions=[before])
        self._background.run(self._prepare(spec.api_id), f"warm {spec.api_id}")
        if before is not None:
            self._background.run(self._supersede(before, spec.api_id), f"supersede {before}")

    def _forget(self, api_id: str) -> None:
        self._ctx.engine.forget(versions=[api_id])
        self._stop_warming(api_id)

    def _stop_warming(self, api_id: str) -> None:
        """A build that is under way for this alone, and for no job, ends."""
        if (warming := self._warming.pop(api_id, None)) is not None:
            warming.cancel()

    async def _supersede(self, before: str, after: str) -> None:
        # Of the same requirements, the one goes on with the build of the other.
        await self._ctx.versions.joined(after)
        self._stop_warming(before)

    async def _prepare(self, api_id: str) -> None:
        warming = asyncio.current_task()
        if warming is None or api_id not in self._current.values():
            return
        self._warming[api_id] = warming
        try:
            version = await self._ctx.versions.prepare(api_id)
            async with self._ctx.deploying:  # an API that is deleted meanwhile keeps nothing warm
                current = await self._ctx.store.deployments()
                if any(deployment.spec.api_id == api_id for deployment in current):
                    self._ctx.engine.warm(version)
        except Unusable as error:  # its jobs will say so, each in its own log
            log.warning("not ready for jobs", api_id=api_id, reason=error.reason)
        except (HeldUp, StorageUnavailable) as error:  # the first job asks again
            log.warning("not ready for jobs yet", api_id=api_id, reason=str(error))
        finally:
            self._warming.pop(api_id, None)


def _each_once(warnings: list[list[str]]) -> list[list[str]]:
    seen: set[str] = set()
    left = []
    for told in warnings:
        left.append([each for each in told if each not in seen])
        seen.update(told)
    return left


def _same(spec: ApiSpec, api: Api, project: str) -> bool:
    return (
        spec.project_id == project and Api(**spec.model_dump(include=set(Api.model_fields))) == api
    )


def _new_version(api: Api, project: str, submitted: Json) -> ApiSpec:
    return ApiSpec(
        **api.model_dump(),
        api_id=new_id(),
        project_id=project,
        last_updated=rfc3339(now_ns()),
        submitted_api_spec=submitted,
    )


def _check_masks(apis: list[Api], file: str, text: str) -> None:
    """Refuse the masks of an answer as values: a spec that was read back has lost its secrets."""
    masked = [
        (index, name)
        for index, api in enumerate(apis)
        for name, value in api.definition.env.items()
        if value == MASK
    ]
    if masked:
        lines = field_lines(text)
        raise invalid_spec(
            file,
            [
                Mistake(
                    lines[index, "definition", "env", name],
                    f'definition.env.{name}: found "{MASK}", which answers show instead of the value; '
                    "write the value itself",
                )
                for index, name in masked
            ],
        )


def safe_name(filename: str | None) -> str:
    """The last part of an uploaded file's name, which a client chose; `cortex.yaml` where no file can
    have it."""
    name = PurePosixPath(filename or "").name
    can_be = name not in {"", ".."} and name.isprintable() and len(name.encode()) <= _LONGEST_NAME
    return name if can_be else "cortex.yaml"
