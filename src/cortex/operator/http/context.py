"""The parts of an operator that its routes use. The app makes one `Context`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from fastapi import Request
from starlette.responses import Response
from starlette.types import Scope

from cortex.engines.base import Engine
from cortex.errors import NoLeader, NotFound
from cortex.joblog.watch import FileWatch
from cortex.operator.config.settings import Settings
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.versions import Versions
from cortex.operator.dispatch.jobs import Jobs
from cortex.operator.ha.forwarding import LeaderProxy
from cortex.operator.http.body_reader import BodyReader
from cortex.operator.http.views import Renderer
from cortex.operator.logs.archive import Archive
from cortex.operator.metrics import Metrics
from cortex.spec.api import ApiSpec
from cortex.spec.audit import Actor
from cortex.spec.job import JobRecord
from cortex.store import Store


@dataclass
class Context:
    """The parts of one operator that its routes use.

    Attributes:
        leader: forwards requests to the leader, if another operator is the leader.
        archive: logs in the object store; None if no object store is configured.
        bodies: reads the bodies of submits.
    """

    settings: Settings
    store: Store
    jobs: Jobs
    catalogue: Catalogue
    versions: Versions
    renderer: Renderer
    watcher: FileWatch
    leader: LeaderProxy
    archive: Archive | None = None
    metrics: Metrics = field(default_factory=Metrics)
    bodies: BodyReader = field(default_factory=BodyReader)

    async def api_at(self, endpoint: str) -> str:
        """The name of the API at an endpoint.

        Raises:
            NotFound: no API is deployed there.
        """
        name = self.catalogue.name_at(endpoint)
        if name is None and await self.catalogue.refresh_if_others_deploy():
            name = self.catalogue.name_at(endpoint)
        if name is None:
            raise NotFound(f"there is no API at /{endpoint}; `cortex get` lists all endpoints")
        return name

    async def check_api(self, name: str) -> None:
        """Check that an API is deployed.

        Raises:
            NotFound: no API of this name is deployed.
        """
        if self.catalogue.find(name) is None:
            await self.catalogue.refresh_if_others_deploy()
        if self.catalogue.find(name) is None:
            raise NotFound(f"there is no API {name!r}; `cortex get` lists all")

    async def job_at(self, endpoint: str, job_id: str) -> JobRecord:
        """A job of the API at an endpoint. Jobs stay at their endpoint when the API is deleted.

        Raises:
            NotFound: there is no such job.
        """
        record = await self.jobs.record(job_id)
        if record is not None:
            spec = await self.versions.spec(record.spec.api_id)
            if self._is_at(endpoint, record, spec):
                return record
            if await self.catalogue.refresh_if_others_deploy() and self._is_at(
                endpoint, record, spec
            ):
                return record
        raise NotFound(
            f"there is no job {job_id!r} at /{endpoint}; `cortex get` lists APIs and jobs"
        )

    async def job_of(self, name: str, job_id: str) -> JobRecord:
        """A job of an API, by the API's name.

        Raises:
            NotFound: there is no such job.
        """
        record = await self.jobs.record(job_id)
        if record is None or record.spec.api_name != name:
            raise NotFound(f"the API {name!r} has no job {job_id!r}; see `cortex get {name}`")
        return record

    async def forwarded(self, request: Request, or_status: int | None = None) -> Response | None:
        """The leader's response; None if this operator is the leader or cannot reach the leader.

        Args:
            or_status: an error status whose response is also returned; responses with other errors
                are not.
        """
        return None if self.jobs.is_leader else await self.leader.forward(request, or_status)

    async def forwarded_or_fail(self, request: Request) -> Response | None:
        """The leader's response; None if this operator is the leader.

        Raises:
            NoLeader: no leader can be reached right now.
        """
        response = await self.forwarded(request)
        if response is None and not self.jobs.is_leader:  # it may have become the leader meanwhile
            raise NoLeader("no leader right now, and only the leader can answer this; retry")
        return response

    def engine(self) -> Engine:
        """The leader's engine.

        Raises:
            NoLeader: this operator is no longer the leader.
        """
        if (engine := self.jobs.engine) is None:
            raise NoLeader("this operator is no longer the leader; retry")
        return engine

    def _is_at(self, endpoint: str, record: JobRecord, spec: ApiSpec) -> bool:
        name = self.catalogue.name_at(endpoint)
        return record.spec.api_name == name or (spec.networking.endpoint == endpoint and not name)


def client_address(scope: Scope) -> str | None:
    """The address of a request's client, if the server knows it."""
    client = scope.get("client")
    return None if client is None else client[0]


def actor(request: Request) -> Actor:
    """The sender of a request, for the audit."""
    return Actor(request.scope.get("token"), client_address(request.scope))


def context(request: Request) -> Context:
    """The context of the operator that received a request."""
    return cast(Context, request.app.state.context)
