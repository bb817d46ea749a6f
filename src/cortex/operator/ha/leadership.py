"""Driving: what an operator opens to drive its jobs, and closes when it does not any more. Alone on its
store it does so as long as it runs; of several that share one, while it is the one. Opened by the app.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from cortex.engines.base import Engine
from cortex.operator.data_folder_id import give_up_lost
from cortex.operator.deploy.deployer import Deployer
from cortex.operator.dispatch.dispatcher import Dispatcher
from cortex.operator.ha.shared_jobs import SharedJobs
from cortex.operator.http.context import Context
from cortex.operator.retention import Retention
from cortex.projects.environments import Environments
from cortex.system.background import in_thread


@asynccontextmanager
async def driven(
    ctx: Context, dispatcher: Dispatcher, deployer: Deployer, environments: Environments
) -> AsyncIterator[None]:
    """Drive the jobs of the store on the context's engine; jobs go on at the end.

    Raises:
        StartupError: the engine cannot be used; it says why.
    """
    async with AsyncExitStack() as stack:
        stack.push_async_callback(ctx.engine.close)
        await give_up_lost(ctx.settings, ctx.store)
        await ctx.engine.open(dispatcher.observed)
        if ctx.archive is not None:
            stack.push_async_callback(ctx.archive.close)
        stack.push_async_callback(dispatcher.close)
        await in_thread(environments.open)
        await dispatcher.open()
        if ctx.archive is not None:
            await ctx.archive.open(dispatcher)
        stack.push_async_callback(deployer.close)
        await deployer.open()
        retention = Retention(ctx, environments)
        stack.push_async_callback(retention.close)
        await retention.open()
        yield


class Leadership:
    """Of an operator that shares its store: a `store.LeaderCallbacks`."""

    def __init__(
        self,
        ctx: Context,
        jobs: SharedJobs,
        deployer: Deployer,
        environments: Environments,
        *,
        new_engine: Callable[[], Engine],
        failed: Callable[[Exception], None],
    ) -> None:
        self._ctx = ctx
        self._jobs = jobs
        self._deployer = deployer
        self._environments = environments
        self._new_engine = new_engine
        self._open = AsyncExitStack()
        self._has_led = False
        self.failed = failed

    async def drive(self) -> None:
        """See `store.LeaderCallbacks`."""
        ctx = self._ctx
        ctx.versions.start_over()
        if self._has_led:  # an engine that was closed cannot be opened again
            ctx.engine = self._new_engine()
        self._has_led = True
        finished = None if ctx.archive is None else ctx.archive.finished
        dispatcher = Dispatcher(
            ctx.store, ctx.engine, ctx.versions, ctx.settings.job_folders, finished,
            ctx.metrics.changed, ctx.metrics.measured,
        )  # fmt: skip
        self._jobs.driven_by(dispatcher, is_open=False)
        work = driven(ctx, dispatcher, self._deployer, self._environments)
        await self._open.enter_async_context(work)
        self._jobs.driven_by(dispatcher, is_open=True)

    async def step_down(self) -> None:
        """See `store.LeaderCallbacks`."""
        self._jobs.driven_by(None, is_open=False)
        was_open, self._open = self._open, AsyncExitStack()
        await was_open.aclose()
