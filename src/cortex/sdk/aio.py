"""`AsyncClient`: the client for asyncio, with the methods of `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cortex.sdk import calls, deploys, environments, logs
from cortex.sdk.endpoint import EndpointHolder

try:
    from cortex.sdk.transport_async import AsyncTransport
except ModuleNotFoundError as error:  # a task's environment may lack httpx
    raise ModuleNotFoundError(
        f"cortex.AsyncClient needs the package {error.name}, which this environment lacks; add "
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


class AsyncClient(EndpointHolder):
    """A client of one operator for asyncio. The tasks of one event loop may share it.

    It has the methods of `Client` as coroutines, with the same arguments, results and errors. A
    task that awaits one may be cancelled. The client has a pool of connections: use it in an `async
    with` block, or await `aclose()`.
    """

    def __init__(self, operator_endpoint: str, *, name: str = "", token: str | None = None) -> None:
        super().__init__(operator_endpoint, name=name, token=token)
        self._transport = AsyncTransport(self._endpoint)

    @classmethod
    def of_environment(cls, env: str | None = None) -> Self:
        """Make a client of a configured environment, by the rules of `cortex.client()`.

        Args:
            env: the environment's name; by default the operator of $CORTEX_OPERATOR_ENDPOINT, or
                else the default environment.

        Raises:
            UnknownEnvironment: there is no such environment, or no default.
            CortexError: the environments file, or the environment's proxy or certificates are
                invalid.
        """
        environment = environments.resolve(env)
        token = environments.token_of(environment)
        return cls(environment.operator_endpoint, name=environment.name, token=token)

    async def aclose(self) -> None:
        """Close the connections. A second call does nothing."""
        await self._transport.aclose()

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
        """Get the operator's version and configuration.

        Returns:
            The operator's JSON.
        """
        return await self._transport.run(calls.get_object("/-/info"))

    async def cluster_info(self) -> dict[str, JsonValue]:
        """List the machines that run jobs, with the free capacity of each.

        Returns:
            The operator's JSON.
        """
        return await self._transport.run(calls.get_object("/-/cluster"))

    async def audit(self, limit: int | None = None, cursor: int | None = None) -> AuditPage:
        """Get a page of the audit log, newest first. See `Client.audit`.

        Args:
            limit: the number of entries; by default the operator's.
            cursor: `next_cursor` of the previous page; by default the first page.

        Raises:
            Forbidden: the token lacks the scope `deploy`.
        """
        return await self._transport.run(calls.audit(limit, cursor))

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
        """Deploy the APIs that `api_spec` describes, with either a task or a project folder.

        A thread packs the project. The arguments, results and errors are those of
        `Client.create_api`.
        """
        packages = deploys.Packages(requirements or (), conda_packages or ())
        with deploys.temporary_archive() as archive:
            upload = await asyncio.to_thread(
                deploys.upload_of_spec, archive, api_spec, task, packages, project_dir, force=force
            )
            return await self._transport.run(calls.create_api(upload))

    async def deploy(
        self,
        file: str | Path | Mapping[str, object],
        force: bool = True,
        *,
        project_dir: str | Path | None = None,
        wait: bool = False,
    ) -> list[DeployResult]:
        """Deploy every API of a cortex.yaml, with the project in its folder.

        A thread packs the project. The arguments, results and errors are those of `Client.deploy`.
        """
        if isinstance(file, Mapping):
            return await self.create_api(file, project_dir=project_dir, force=force)
        deploys.check_no_project_dir(project_dir)
        with deploys.temporary_archive() as archive:
            upload = await asyncio.to_thread(deploys.upload_of_file, archive, file, force=force)
            return await self._transport.run(calls.deploy(upload))

    async def list_apis(self) -> list[ApiView]:
        """List the deployed APIs.

        Returns:
            The spec, endpoint, jobs and versions of each.
        """
        return await self._transport.run(calls.list_apis())

    async def get_api(self, api_name: str) -> ApiView:
        """Get a deployed API.

        Returns:
            Its spec, endpoint, jobs and versions.

        Raises:
            NotFound: there is no such API.
        """
        return await self._transport.run(calls.get_api(api_name))

    async def delete_api(self, api_name: str, keep_cache: bool = False) -> Message:
        """Delete an API. The operator stops its jobs in progress.

        Args:
            api_name: the API.
            keep_cache: accepted for programs written for Cortex, and ignored: nothing is cached.

        Raises:
            NotFound: there is no such API.
        """
        return await self._transport.run(calls.delete_api(api_name))

    async def submit_job(
        self,
        api_name: str,
        config: Mapping[str, JsonValue] | None = None,
        timeout: int | None = None,  # noqa: ASYNC109  # the job's
        *,
        idempotency_key: str | None = None,
    ) -> SubmittedJob:
        """Submit a job, and repeat the submit while the response is lost.

        The arguments, results and errors are those of `Client.submit_job`.
        """
        return await self._transport.run(
            calls.submit_job(api_name, config, timeout, idempotency_key)
        )

    async def get_job(self, api_name: str, job_id: str, wait: float | None = None) -> JobView:
        """Get a job, at once or after it has ended. See `Client.get_job`.

        Args:
            api_name: the API of the job.
            job_id: the job.
            wait: seconds to wait for the job's end; by default the method returns at once.

        Returns:
            The job, ended or not: after `wait` seconds it may still be in progress.

        Raises:
            NotFound: there is no such job.
        """
        return await self._transport.run(calls.get_job(api_name, job_id, wait))

    async def list_jobs(
        self,
        api_name: str,
        status: str | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> JobPage:
        """List the jobs of an API, newest first, page by page.

        Args:
            api_name: the API.
            status: list the jobs with this status only.
            limit: the number of jobs in a page; by default the operator's.
            cursor: `next_cursor` of the previous page; by default the first page.

        Raises:
            NotFound: there is no such API.
        """
        return await self._transport.run(calls.list_jobs(api_name, status, limit, cursor))

    async def newest_job(self, api_name: str) -> ListedJob:
        """Get the newest job of an API.

        Raises:
            NotFound: there is no such API, or it has no jobs.
        """
        return await self._transport.run(calls.newest_job(api_name))

    async def stop_job(self, api_name: str, job_id: str, keep_cache: bool = False) -> Message:
        """Stop a job. From now on its status is `status_stopped`.

        Args:
            api_name: the API of the job.
            job_id: the job.
            keep_cache: accepted for programs written for Cortex, and ignored: nothing is cached.

        Raises:
            NotFound: there is no such job.
            Conflict: the job has ended already.
        """
        return await self._transport.run(calls.stop_job(api_name, job_id))

    async def read_job_logs(self, api_name: str, job_id: str) -> AsyncGenerator[str, None]:
        """Read the log of a job as written up to now.

        Returns:
            The text in pieces.

        Raises:
            NotFound: there is no such job. The iteration raises it.
        """
        async with self._transport.stream(calls.read_log(api_name, job_id), calls.TEXT) as response:
            async for text in response.aiter_text():
                yield text

    def stream_job_logs(self, api_name: str, job_id: str) -> AsyncGenerator[str, None]:
        """Follow the log of a job from its beginning until the job has ended.

        The client reconnects after a broken connection, and the text continues where it stopped.

        Returns:
            The text in pieces. To leave the iteration early, close it: `contextlib.aclosing`.

        Raises:
            NotFound: there is no such job. The iteration raises it.
            OperatorUnreachable: the operator stayed away. The iteration raises it.
        """

        @asynccontextmanager
        async def connect(last_event_id: str | None) -> AsyncIterator[AsyncIterable[bytes]]:
            request = calls.follow_log(api_name, job_id, last_event_id)
            async with self._transport.stream(request, calls.EVENTS) as response:
                yield response.aiter_bytes()

        return logs.follow_async(connect, pause=asyncio.sleep)
