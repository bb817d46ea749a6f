"""Waiting jobs whose version is not ready. Each version is made ready once for all its jobs. Used
by the dispatcher alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from cortex.engines.base import Version
from cortex.errors import StorageUnavailable
from cortex.operator.deploy.versions import VersionBlocked, Versions, VersionUnusable
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.system.background import Background

log = structlog.get_logger()

_INTERNAL_ERROR = "an error of the operator; its log has the details"


VersionResult = Version | VersionBlocked | VersionUnusable


@dataclass
class _Group:
    """The jobs of one version, by their ids, and the task that makes the version ready."""

    jobs: dict[str, LiveJob] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class AwaitedVersions:
    """All methods are called on the event loop."""

    def __init__(
        self,
        versions: Versions,
        background: Background,
        on_result: Callable[[list[LiveJob], VersionResult], None],
    ) -> None:
        """
        Args:
            on_result: called once for each version that was awaited, with the jobs that still wait.
        """
        self._versions = versions
        self._background = background
        self._on_result = on_result
        self._groups: dict[str, _Group] = {}

    def add(self, live: LiveJob) -> None:
        """A job waits for its version."""
        api_id = live.record.spec.api_id
        group = self._groups.get(api_id)
        if group is None:  # one task for all of its jobs, of which there may be very many
            group = self._groups[api_id] = _Group()
            self._background.run(self._make_ready(api_id, group))
        group.jobs[live.job_id] = live

    def discard(self, live: LiveJob) -> None:
        """A job waits no longer. A version that no job waits for is given up."""
        api_id = live.record.spec.api_id
        group = self._groups.get(api_id)
        if group is None or group.jobs.pop(live.job_id, None) is None or group.jobs:
            return
        del self._groups[api_id]
        if group.task is not None:
            group.task.cancel()

    async def _make_ready(self, api_id: str, group: _Group) -> None:
        group.task = asyncio.current_task()
        if not group.jobs:
            return
        result: VersionResult
        try:
            result = await self._versions.make_ready(api_id)
        except (VersionBlocked, StorageUnavailable) as error:
            result = VersionBlocked(str(error))
        except VersionUnusable as error:
            result = error
        except Exception as error:  # the jobs would otherwise wait forever
            log.error("a version could not be made ready", api_id=api_id, exc_info=error)
            result = VersionUnusable(_INTERNAL_ERROR, None)
        self._on_result(list(self._groups.pop(api_id).jobs.values()), result)
