"""The leader's parts: opened when this operator becomes the leader, closed when it stops leading.
Jobs go on in between. An operator that is alone on its store leads from its start to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from cortex.engines.base import Engine
from cortex.operator.config.settings import Settings
from cortex.operator.data_folder import give_up_lost_jobs
from cortex.operator.deploy.catalogue import Catalogue
from cortex.operator.deploy.versions import Versions
from cortex.operator.deploy.warming import Warmer
from cortex.operator.dispatch.dispatcher import Dispatcher
from cortex.operator.dispatch.jobs import Jobs
from cortex.operator.logs.archive import Archive
from cortex.operator.metrics import Metrics
from cortex.operator.retention import Retention
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.store import Store
from cortex.system.background import in_thread

if TYPE_CHECKING:
    from cortex.operator.checkpoints import Checkpoints


class Leadership:
    """A `store.LeaderCallbacks`."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        jobs: Jobs,
        catalogue: Catalogue,
        versions: Versions,
        projects: Projects,
        environments: Environments,
        archive: Archive | None,
        checkpoints: Checkpoints | None,
        metrics: Metrics,
        *,
        new_engine: Callable[[], Engine],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """
        Args:
            new_engine: makes the engine of a term; an engine is opened and closed once.
            on_failure: called when this operator has become the leader and cannot lead: it has to
                end.
        """
        self._settings = settings
        self._store = store
        self._jobs = jobs
        self._catalogue = catalogue
        self._versions = versions
        self._projects = projects
        self._environments = environments
        self._archive = archive
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._new_engine = new_engine
        self._opened = AsyncExitStack()
        self.on_failure = on_failure

    async def lead(self) -> None:
        """Open the parts of a leader, in order.

        Raises:
            StartupError: the engine cannot be used; the message says why.
        """
        archive = self._archive
        self._versions.reset()
        await self._catalogue.refresh()
        async with AsyncExitStack() as stack:
            engine = self._new_engine()
            dispatcher = Dispatcher(
                self._store,
                engine,
                self._versions,
                self._catalogue,
                self._settings.job_folders,
                on_change=self._metrics.on_job_changed,
                on_finished=None if archive is None else archive.finished,
                on_measures=self._metrics.add_task_metrics,
            )
            self._jobs.begin_term(dispatcher)
            stack.push_async_callback(engine.close)
            await give_up_lost_jobs(self._settings, self._store)
            await engine.open(dispatcher.observe)
            if archive is not None:
                stack.push_async_callback(archive.close)
            stack.push_async_callback(dispatcher.close)
            await in_thread(self._environments.end_leftover_builds)
            await dispatcher.open()
            if archive is not None:
                await archive.open(dispatcher)
            warmer = Warmer(self._store, engine, self._catalogue, self._versions, self._projects)
            stack.push_async_callback(warmer.close)
            await warmer.open()
            retention = Retention(
                self._settings,
                self._store,
                engine,
                self._versions,
                self._projects,
                self._environments,
                archive,
                self._checkpoints,
            )
            stack.push_async_callback(retention.close)
            await retention.open()
            self._opened = stack.pop_all()
        self._jobs.dispatch_with(dispatcher)

    async def step_down(self) -> None:
        """Close the parts of a leader. Nothing happens where this operator is not the leader."""
        self._jobs.end_term()
        if self._archive is not None:
            self._archive.end_term()
        opened, self._opened = self._opened, AsyncExitStack()
        await opened.aclose()
