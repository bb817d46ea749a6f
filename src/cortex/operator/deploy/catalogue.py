"""The catalogue: what is deployed now. One map, and one method that changes it.

The routes find endpoints in it, the dispatcher the current version and the limit of an API, and the
leader warms the versions in it. Where other operators also deploy, each operator reads it again
when the store notifies of a change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cortex.spec.api import ApiSpec, Compute
from cortex.store import Store


@dataclass(frozen=True, slots=True)
class DeployedApi:
    """An API that is deployed now.

    Attributes:
        api_id: the id of its current version.
        max_running: its `limits.max_running`.
        compute: what each of its jobs takes.
    """

    name: str
    endpoint: str
    api_id: str
    max_running: int | None
    compute: Compute

    @classmethod
    def of(cls, spec: ApiSpec) -> DeployedApi:
        return cls(
            spec.name,
            spec.networking.endpoint,
            spec.api_id,
            spec.limits.max_running,
            spec.compute,
        )


class CatalogueListener(Protocol):
    """Notified of each change, on the event loop."""

    def api_deployed(self, api: DeployedApi, before: DeployedApi | None) -> None:
        """An API has another version than `before`; None where it was not deployed before."""

    def api_removed(self, name: str, api_ids: Collection[str]) -> None:
        """An API is deployed no longer; these are versions of it."""


class Catalogue:
    """One for each operator. All methods are called on the event loop."""

    def __init__(self, store: Store, *, others_deploy: bool) -> None:
        """
        Args:
            others_deploy: whether other operators may deploy to the same store.
        """
        self._store = store
        self._reading = asyncio.Lock()
        self._others_deploy = others_deploy
        self._apis: dict[str, DeployedApi] = {}
        self._at: dict[str, str] = {}
        self._listeners: list[CatalogueListener] = []

    def find(self, name: str) -> DeployedApi | None:
        """The API of this name, if it is deployed."""
        return self._apis.get(name)

    def all(self) -> list[DeployedApi]:
        return list(self._apis.values())

    def name_at(self, endpoint: str) -> str | None:
        """The name of the API at this endpoint, if one is deployed there."""
        return self._at.get(endpoint)

    async def refresh_if_others_deploy(self) -> bool:
        """Read the store again where another operator may have deployed a moment ago.

        Returns:
            Whether the catalogue was read.

        Raises:
            StorageUnavailable: the store cannot be read now.
        """
        if self._others_deploy:
            await self.refresh()
        return self._others_deploy

    async def refresh(self) -> None:
        """Read the store.

        Raises:
            StorageUnavailable: it cannot be read now.
        """
        async with self._reading:  # otherwise a slow read could overwrite the result of a later one
            specs = [deployment.spec for deployment in await self._store.deployments()]
            self._replace(specs)

    def _replace(self, specs: list[ApiSpec]) -> None:
        names = {spec.name for spec in specs}
        removed = {name: {api.api_id} for name, api in self._apis.items() if name not in names}
        self.change(specs, removed)

    def change(
        self, deployed: Iterable[ApiSpec] = (), removed: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """Change what is deployed now, and notify the listeners of each difference.

        Args:
            deployed: the current versions of APIs.
            removed: the ids of versions, by the names of APIs that were deleted.
        """
        removed = removed or {}
        changed = []
        for name in removed:
            self._apis.pop(name, None)
        for spec in deployed:
            # It goes last: it may have the endpoint of an API that another operator has deleted.
            api, before = DeployedApi.of(spec), self._apis.pop(spec.name, None)
            self._apis[api.name] = api
            if api != before:
                changed.append((api, before))
        self._at = {api.endpoint: api.name for api in self._apis.values()}
        for name, api_ids in removed.items():
            for listener in self._listeners:
                listener.api_removed(name, api_ids)
        for api, before in changed:
            for listener in self._listeners:
                listener.api_deployed(api, before)

    def subscribe(self, listener: CatalogueListener) -> None:
        """Notify a listener from now on."""
        self._listeners.append(listener)

    def unsubscribe(self, listener: CatalogueListener) -> None:
        """Notify a listener no longer; nothing happens where it is not subscribed."""
        if listener in self._listeners:
            self._listeners.remove(listener)
