"""Deploying and deleting APIs: from an uploaded project to a version that takes jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

import structlog

from cortex.errors import Conflict
from cortex.operator.deploy.catalogue import Catalogue
from cortex.projects.check import check_files
from cortex.projects.repository import Projects
from cortex.projects.unpack import unpack
from cortex.spec.api import MASK, Api, ApiSpec, Compute
from cortex.spec.audit import Actor
from cortex.spec.cortex_yaml import field_lines, invalid_spec, read_apis, submitted_entries
from cortex.spec.job import JobRecord, Json
from cortex.spec.times import new_id, now_ns, rfc3339
from cortex.spec.yaml_lines import Mistake
from cortex.store import Deployment, Store

log = structlog.get_logger()

_MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class Deployed:
    """One API of a deploy.

    Attributes:
        deployment: the API as it is deployed now.
        done: "created x", "updated x" or "x is unchanged".
        warnings: what its author should know about the project, and about the machines.
    """

    deployment: Deployment
    done: str
    warnings: list[str]

    @property
    def message(self) -> str:
        """All of it in words, for clients that show only this."""
        return "\n".join([self.done, *(f"warning: {each}" for each in self.warnings)])


class Deployer:
    """Deploys and deletes, one at a time among all operators. The leader prepares the versions
    that were deployed (`warming`)."""

    def __init__(
        self,
        store: Store,
        projects: Projects,
        catalogue: Catalogue,
        stop_stored: Callable[[JobRecord], None],
        lasting_refusal: Callable[[Compute], str | None],
    ) -> None:
        """
        Args:
            stop_stored: called with each job that the deletion of an API has stopped.
            lasting_refusal: why no machine can ever run a job with this compute, or None.
        """
        self._store = store
        self._projects = projects
        self._catalogue = catalogue
        self._stop_stored = stop_stored
        self._lasting_refusal = lasting_refusal

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
            Each API, in the order of the file. A warning is with the first API that it concerns.

        Raises:
            InvalidSpec, InvalidProject: the error lists every mistake; nothing was deployed.
            Conflict: an endpoint is taken, or an API would be replaced against `replace`.
        """
        apis = await asyncio.to_thread(read_apis, text, file)
        _check_masks(apis, file, text)
        submitted = await asyncio.to_thread(submitted_entries, text)
        async with self._store.deploy_lock:
            project, warnings = await asyncio.to_thread(
                self._store_project, apis, file, text, archive
            )
            current = {d.name: d for d in await self._store.deployments()}
            done: list[tuple[Deployment, str]] = []
            for api, entry in zip(apis, submitted, strict=True):
                before = current.get(api.name)
                if before is not None and _is_unchanged(before.spec, api, project):
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
                await self._store.deploy(changed, actor)
                self._catalogue.change(changed)
        for spec in changed:
            log.info("deployed", api=spec.name, api_id=spec.api_id)
        return [
            Deployed(*each, [*its_warnings, *self._refusals(api)])
            for each, its_warnings, api in zip(done, warnings, apis, strict=True)
        ]

    async def undeploy(self, name: str, actor: Actor) -> int:
        """Delete an API and stop its jobs; how many there were.

        Raises:
            NotFound: it is not deployed.
        """
        async with self._store.deploy_lock:
            versions = await self._store.versions(name)
            stopped = await self._store.undeploy(name, f"the API {name} was deleted", actor)
            # The newest first: the end of a job must not start another that is about to be stopped.
            for job in reversed(stopped):
                self._stop_stored(job)
            self._catalogue.change(removed={name: {spec.api_id for spec in versions}})
        log.info("deleted", api=name, stopped_jobs=len(stopped))
        return len(stopped)

    def _refusals(self, api: Api) -> list[str]:
        """The warning that every submit to an API is refused here, if that is so. The deploy
        succeeds: the machines may be extended, and other APIs of the file can run."""
        refusal = self._lasting_refusal(api.compute)
        return [] if refusal is None else [f"no job of {api.name!r} can run here: {refusal}"]

    def _store_project(
        self, apis: list[Api], file: str, text: str, archive: BinaryIO
    ) -> tuple[str, list[list[str]]]:
        """Unpack a project, check it, and store it; its id, and the warnings of each API."""
        with self._projects.incoming() as incoming:
            unpack(archive, incoming, is_upload=True)
            # Left out: a change of a comment or of another API's entry is no change of this API.
            with suppress(IsADirectoryError):
                (incoming / file).unlink(missing_ok=True)
            warnings = _each_once(check_files(apis, incoming, file, text))
            return self._projects.add_project(incoming), warnings


def _each_once(warnings: list[list[str]]) -> list[list[str]]:
    """The warnings of each API without those of an earlier API."""
    earlier: set[str] = set()
    unique = []
    for its_warnings in warnings:
        unique.append([each for each in its_warnings if each not in earlier])
        earlier.update(its_warnings)
    return unique


def _is_unchanged(spec: ApiSpec, api: Api, project: str) -> bool:
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
    """Refuse values that are masks: a spec that a client read back has lost its secrets."""
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
                    f'definition.env.{name}: found "{MASK}", which answers show instead of the '
                    "value; write the value itself",
                )
                for index, name in masked
            ],
        )


def safe_name(filename: str | None) -> str:
    """The last part of the file name that a client sent; `cortex.yaml` where it is not valid."""
    name = PurePosixPath(filename or "").name
    can_be = name not in {"", ".."} and name.isprintable() and len(name.encode()) <= _MAX_NAME_BYTES
    return name if can_be else "cortex.yaml"
