"""What the routes work with, made once by the app."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from fastapi import Request

from cortex.engines.base import Engine
from cortex.errors import NotFound
from cortex.operator.dispatcher import Dispatcher
from cortex.operator.logs import LogWatcher
from cortex.operator.render import Renderer
from cortex.operator.settings import Settings
from cortex.operator.versions import Versions
from cortex.store import Store


@dataclass
class Context:
    """One operator's parts."""

    settings: Settings
    store: Store
    engine: Engine
    versions: Versions
    dispatcher: Dispatcher
    renderer: Renderer
    watcher: LogWatcher
    endpoints: dict[str, str] = field(default_factory=dict)
    """The name of the API at each endpoint that is deployed now."""

    def api_at(self, endpoint: str) -> str:
        """The name of the API at an endpoint.

        Raises:
            NotFound: none is deployed there.
        """
        name = self.endpoints.get(endpoint)
        if name is None:
            raise NotFound(f"there is no API at /{endpoint}; `cortex get` lists all endpoints")
        return name

    async def refresh_endpoints(self) -> None:
        """Read the deployed endpoints again, after a change."""
        deployments = await self.store.deployments()
        self.endpoints = {deployment.endpoint: deployment.name for deployment in deployments}


def context(request: Request) -> Context:
    """The parts of the operator that a request came to."""
    return cast(Context, request.app.state.context)
