"""What the routes work with, made once by the app."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

from fastapi import Request
from starlette.responses import Response

from cortex.engines.base import Engine
from cortex.errors import NotFound
from cortex.joblog.watch import FileWatch
from cortex.operator.config.settings import Settings
from cortex.operator.deploy.versions import Versions
from cortex.operator.dispatch.live_job import LiveJob
from cortex.operator.http.answers import Scope
from cortex.operator.http.body_reader import BodyReader
from cortex.operator.http.views import Known, Renderer
from cortex.operator.logs.archive import Archive
from cortex.operator.logs.follow import Followed
from cortex.operator.metrics import Metrics
from cortex.projects.repository import Projects
from cortex.spec.api import ApiSpec
from cortex.spec.audit import Actor
from cortex.spec.job import JobRecord, JobSpec
from cortex.store import DatabaseLock, Outcome, Replay, Store

if TYPE_CHECKING:
    from cortex.operator.ha.forwarding import LeaderProxy


class Jobs(Known, Followed, Protocol):
    """What the routes do with jobs: the dispatcher's methods, where an operator is alone on its store,
    and `SharedJobs` where it is not."""

    async def submit(self, draft: JobSpec, replay: Replay | None) -> JobRecord: ...

    async def stop(self, job_id: str, actor: Actor) -> Outcome: ...

    def live(self) -> list[LiveJob] | None: ...

    def stopped(self, record: JobRecord) -> None: ...

    def deployed(self, spec: ApiSpec) -> None: ...

    def record(self, job_id: str) -> JobRecord | None: ...

    async def next(self, job_id: str, within_s: float) -> JobRecord | None: ...

    def heard(self, record: JobRecord) -> None: ...


@dataclass
class Context:
    """One operator's parts."""

    settings: Settings
    store: Store
    engine: Engine
    versions: Versions
    jobs: Jobs
    renderer: Renderer
    watcher: FileWatch
    projects: Projects
    deploying: DatabaseLock
    """Held by whoever changes which versions there are."""
    relay: LeaderProxy | None = None
    """To the operator that drives, where there may be several."""
    archive: Archive | None = None
    """Where logs outlive this machine, if anywhere."""
    endpoints: dict[str, str] = field(default_factory=dict)
    """The name of the API at each endpoint that is deployed now."""
    metrics: Metrics = field(default_factory=Metrics)
    bodies: BodyReader = field(default_factory=BodyReader)
    """Of submits."""

    async def api_at(self, endpoint: str) -> str:
        """The name of the API at an endpoint.

        Raises:
            NotFound: none is deployed there.
        """
        name = self.endpoints.get(endpoint)
        if name is None and self.store.is_shared:  # it may have been deployed elsewhere just now
            await self.read_endpoints()
            name = self.endpoints.get(endpoint)
        if name is None:
            raise NotFound(f"there is no API at /{endpoint}; `cortex get` lists all endpoints")
        return name

    async def check_api(self, name: str) -> None:
        """Whether an API of this name is deployed.

        Raises:
            NotFound: none is.
        """
        if name not in self.endpoints.values() and self.store.is_shared:
            await self.read_endpoints()  # it may have been deployed elsewhere just now
        if name not in self.endpoints.values():
            raise NotFound(f"there is no API {name!r}; `cortex get` lists all")

    async def job_at(self, endpoint: str, job_id: str) -> JobRecord:
        """A job, where it is reached: its API's endpoint, also after the API was deleted.

        Raises:
            NotFound: there is none.
        """
        record = await self._job(job_id)
        if record is not None:
            spec = await self.versions.spec(record.spec.api_id)
            if self._is_at(endpoint, record, spec):
                return record
            if self.store.is_shared:  # it may have been deployed elsewhere just now
                await self.read_endpoints()
                if self._is_at(endpoint, record, spec):
                    return record
        raise NotFound(
            f"there is no job {job_id!r} at /{endpoint}; `cortex get` lists APIs and jobs"
        )

    async def job_of(self, name: str, job_id: str) -> JobRecord:
        """A job of the API of a name.

        Raises:
            NotFound: there is none.
        """
        record = await self._job(job_id)
        if record is None or record.spec.api_name != name:
            raise NotFound(f"the API {name!r} has no job {job_id!r}; see `cortex get {name}`")
        return record

    async def ask_driver(self, request: Request) -> Response | None:
        """What the operator that drives answers; None where that is this one, or none can be asked."""
        return None if self.relay is None else await self.relay.ask(request)

    async def demand_of_driver(self, request: Request) -> Response | None:
        """What the operator that drives answers; None where that is this one.

        Raises:
            NoDriver: none can be asked now.
        """
        return None if self.relay is None else await self.relay.demand(request)

    def _is_at(self, endpoint: str, record: JobRecord, spec: ApiSpec) -> bool:
        live = self.endpoints.get(endpoint)
        return record.spec.api_name == live or (spec.networking.endpoint == endpoint and not live)

    async def _job(self, job_id: str) -> JobRecord | None:
        # What is in progress is known here, as it was stored last.
        return self.jobs.record(job_id) or await self.store.job(job_id)

    async def read_endpoints(self) -> None:
        """Read the deployed endpoints, once at the start: what is stored after that is known here
        without a read, which could fail; and when another operator may have stored something."""
        deployments = await self.store.deployments()
        self.endpoints = {deployment.endpoint: deployment.name for deployment in deployments}

    def deployed(self, name: str, endpoint: str) -> None:
        """The API is at this endpoint from now on, and at no other."""
        self.undeployed(name)
        self.endpoints[endpoint] = name

    def undeployed(self, name: str) -> None:
        """The API is at no endpoint any more."""
        self.endpoints = {at: each for at, each in self.endpoints.items() if each != name}


def client_address(scope: Scope) -> str | None:
    """The address that a request comes from, as far as the server knows it."""
    client = scope.get("client")
    return None if client is None else client[0]


def actor(request: Request) -> Actor:
    """Who sent a request."""
    return Actor(request.scope.get("token"), client_address(request.scope))


def context(request: Request) -> Context:
    """The parts of the operator that a request came to."""
    return cast(Context, request.app.state.context)
