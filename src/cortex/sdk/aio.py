"""`AsyncClient`: what `Client` is, for programs of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cortex.sdk import calls, deploys, environments, logs
from cortex.sdk.base import OfOperator

try:
    from cortex.sdk.transport_async import AsyncTransport
except ModuleNotFoundError as error:  # in a task
    raise ModuleNotFoundError(
        f"cortex.AsyncClient needs the package {error.name}, and this environment does not have it: add "
        f"{error.name} to requirements.txt, or use cortex.client()",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from typing import Self

    from pydantic import JsonValue

    from cortex.sdk.task_project import Task
    from cortex.sdk.types import (
        ApiView,
        AuditPage,
        DeployResult,
        JobPage,
        JobView,
        ListedJob,
        Message,
        SubmittedJob,
    )


class AsyncClient(OfOperator):
    """A client of one operator for asyncio: `Client`'s methods, to be awaited, with the same arguments,
    answers and errors.

    It keeps connections: use it in an `async with` block, or await `aclose()`. It may be shared by the
    tasks of one event loop, and what waits in it may be cancelled.
    """

    def __init__(self, operator_endpoint: str, *, name: str = "", token: str | None = None) -> None:
        super().__init__(operator_endpoint, name=name, token=token)
        self._operator = AsyncTransport(self._endpoint)

    @classmethod
    def of_environment(cls, env: str | None = None) -> Self:
        """A client of the named environment, or of the default one, as `cortex.client()` finds it."""
        found = environments.resolve(env)
        return cls(found.operator_endpoint, name=found.name, token=environments.token_of(found))

    async def aclose(self) -> None:
        """Close its connections."""
        await self._operator.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def info(self) -> dict[str, JsonValue]:
        """The operator's version and how it is set up."""
        return await self._operator.run(calls.told("/-/info"))

    async def cluster_info(self) -> dict[str, JsonValue]:
        """The machines that jobs run on, and what is free on each."""
        return await self._operator.run(calls.told("/-/cluster"))

    async def audit(self, limit: int | None = None, cursor: int | None = None) -> AuditPage:
        """A page of the audit, newest first: who deployed, deleted, stopped, made and revoked tokens,
        and which requests were refused. It needs a token of the scope `deploy`."""
        return await self._operator.run(calls.audit(limit, cursor))

    async def create_api(
        self,
        api_spec: deploys.ApiSpecs,
        task: Task | None = None,
        requirements: Sequence[str] | None = None,
        project_dir: str | Path | None = None,
        force: bool = True,
        *,
        conda_packages: Sequence[str] | None = None,
        wait: bool = False,
    ) -> list[DeployResult]:
        """Deploy what `api_spec` describes with a task or a folder; see `Client.create_api`. It is packed
        in a thread."""
        packages = deploys.Packages(requirements or (), conda_packages or ())
        with deploys.room() as packed:
            upload = await asyncio.to_thread(
                deploys.of_api_spec, packed, api_spec, task, packages, project_dir, force=force
            )
            return await self._operator.run(calls.create_api(upload))

    async def deploy(
        self,
        file: str | Path | Mapping[str, object],
        force: bool = True,
        *,
        project_dir: str | Path | None = None,
        wait: bool = False,
    ) -> list[DeployResult]:
        """Deploy every API of a cortex.yaml with the project in its folder, or an entry of one; see
        `Client.deploy`. It is packed in a thread."""
        if isinstance(file, Mapping):
            return await self.create_api(file, project_dir=project_dir, force=force)
        deploys.check_alone(project_dir)
        with deploys.room() as packed:
            upload = await asyncio.to_thread(deploys.of_file, packed, file, force=force)
            return await self._operator.run(calls.deploy(upload))

    async def list_apis(self) -> list[ApiView]:
        """Every deployed API."""
        return await self._operator.run(calls.list_apis())

    async def get_api(self, api_name: str) -> ApiView:
        """One deployed API: its spec, endpoint, jobs and versions."""
        return await self._operator.run(calls.get_api(api_name))

    async def delete_api(self, api_name: str, keep_cache: bool = False) -> Message:
        """Delete an API; its running jobs end as stopped. See `Client.delete_api`."""
        return await self._operator.run(calls.delete_api(api_name))

    async def submit_job(
        self,
        api_name: str,
        config: Mapping[str, JsonValue] | None = None,
        timeout: int | None = None,  # noqa: ASYNC109  # of the job
        *,
        idempotency_key: str | None = None,
    ) -> SubmittedJob:
        """Submit a job, which is one job however often its answer is lost; see `Client.submit_job`."""
        return await self._operator.run(
            calls.submit_job(api_name, config, timeout, idempotency_key)
        )

    async def get_job(self, api_name: str, job_id: str, wait: float | None = None) -> JobView:
        """A job's status; with `wait`, as soon as it has ended, or after that many seconds; see
        `Client.get_job`."""
        return await self._operator.run(calls.get_job(api_name, job_id, wait))

    async def list_jobs(
        self,
        api_name: str,
        status: str | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> JobPage:
        """A page of the API's jobs, newest first; see `Client.list_jobs`."""
        return await self._operator.run(calls.list_jobs(api_name, status, limit, cursor))

    async def newest_job(self, api_name: str) -> ListedJob:
        """The newest job of an API."""
        return await self._operator.run(calls.newest_job(api_name))

    async def stop_job(self, api_name: str, job_id: str, keep_cache: bool = False) -> Message:
        """Stop a job. From then on its status is `status_stopped`. See `Client.stop_job`."""
        return await self._operator.run(calls.stop_job(api_name, job_id))

    async def read_job_logs(self, api_name: str, job_id: str) -> AsyncGenerator[str, None]:
        """The job's log as text, from its beginning as far as it is written by now."""
        async with self._operator.stream(calls.log(api_name, job_id), calls.TEXT) as answer:
            async for text in answer.aiter_text():
                yield text

    def stream_job_logs(self, api_name: str, job_id: str) -> AsyncGenerator[str, None]:
        """The job's log as text, as it is written, until the job has ended; see
        `Client.stream_job_logs`. Who leaves it earlier closes it, as `contextlib.aclosing` does."""

        @asynccontextmanager
        async def connect(last_event_id: str | None) -> AsyncIterator[AsyncIterable[bytes]]:
            request = calls.followed_log(api_name, job_id, last_event_id)
            async with self._operator.stream(request, calls.EVENTS) as answer:
                yield answer.aiter_bytes()

        return logs.follow_async(connect, pause=asyncio.sleep)
