"""`Client`: the blocking client, with a method for each operation of an operator.

Programs and the command-line interface use it. Its methods return the operator's JSON unchanged
(see `cortex.sdk.types`), and raise a `cortex.CortexError`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cortex.sdk import calls, deploys, logs
from cortex.sdk.endpoint import EndpointHolder
from cortex.sdk.environments import in_task
from cortex.sdk.statements import is_statement

if TYPE_CHECKING:
    from typing import Self

    from pydantic import JsonValue

    from cortex.sdk.endpoint import Endpoint
    from cortex.sdk.task_project import Task
    from cortex.sdk.transport import Transport
    from cortex.sdk.transport_plain import PlainTransport
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


class Client(EndpointHolder):
    """A client of one operator. Threads may share it.

    `cortex.client()` makes one. It has a pool of connections: close it, or use it in a `with`
    block. `AsyncClient` is its twin for asyncio.

    Every method that sends a request raises a `CortexError` for each failure. Beside the errors
    that its docstring lists, these are `OperatorUnreachable`, `Unauthorized`, `Forbidden`, and the
    other errors of `cortex.errors` that an operator answers with.
    """

    def __init__(self, operator_endpoint: str, *, name: str = "", token: str | None = None) -> None:
        super().__init__(operator_endpoint, name=name, token=token)
        self._transport = _new_transport(self._endpoint)
        # Closes the sockets of a client that its program has not closed.
        self._finalizer = weakref.finalize(self, self._transport.close)

    def close(self) -> None:
        """Close the connections. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def info(self) -> dict[str, JsonValue]:
        """Get the operator's version and configuration.

        Returns:
            The operator's JSON.
        """
        return self._transport.run(calls.get_object("/-/info"))

    def cluster_info(self) -> dict[str, JsonValue]:
        """List the machines that run jobs, with the free capacity of each.

        Returns:
            The operator's JSON.
        """
        return self._transport.run(calls.get_object("/-/cluster"))

    def audit(self, limit: int | None = None, cursor: int | None = None) -> AuditPage:
        """Get a page of the audit log, newest first.

        The audit log records deploys, deletions, stops, new and revoked tokens, and refused
        requests.

        Args:
            limit: the number of entries; by default the operator's.
            cursor: `next_cursor` of the previous page; by default the first page.

        Raises:
            Forbidden: the token lacks the scope `deploy`.
        """
        return self._transport.run(calls.audit(limit, cursor))

    def create_api(
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

        Args:
            api_spec: an entry of a cortex.yaml as a dict, or a list of entries.
            task: a function `task(config)`, or a class with `__call__(self, config)`. The client
                sends it by value, together with the code that it uses from modules of your own. It
                runs on this version of Python.
            requirements: with `task`, the installed packages that it uses, as lines of a
                requirements.txt.
            project_dir: a folder, to which `definition.path` is relative. The client does not write
                to it, and ignores a cortex.yaml in it.
            force: whether to replace an API whose deployed version differs.
            conda_packages: with `task`, lines of a conda-packages.txt.
            wait: accepted for programs written for Cortex, and ignored: an API accepts jobs as soon
                as it is deployed.

        Returns:
            The result of each API.

        Raises:
            InvalidRequest: the arguments contradict each other.
            InvalidSpec: `api_spec` has mistakes.
            InvalidProject: the task or the folder cannot be sent.
            CortexError: an API was not deployed.
        """
        packages = deploys.Packages(requirements or (), conda_packages or ())
        with deploys.temporary_archive() as archive:
            upload = deploys.upload_of_spec(
                archive, api_spec, task, packages, project_dir, force=force
            )
            return self._transport.run(calls.create_api(upload))

    def deploy(
        self,
        file: str | Path | Mapping[str, object],
        force: bool = True,
        *,
        project_dir: str | Path | None = None,
        wait: bool = False,
    ) -> list[DeployResult]:
        """Deploy every API of a cortex.yaml, with the project in its folder.

        Args:
            file: the path of the cortex.yaml; or, as in Cortex's client, an entry of one as a dict.
            force: whether to replace an API whose deployed version differs.
            project_dir: with a dict, its project folder.
            wait: accepted for programs written for Cortex, and ignored: an API accepts jobs as soon
                as it is deployed.

        Returns:
            The result of each API. For a file, an API that was not deployed has an `error`.

        Raises:
            InvalidRequest: `project_dir` was given with a file.
            InvalidSpec: the file cannot be read, or has mistakes.
            InvalidProject: the folder cannot be sent.
            CortexError: the API of a dict was not deployed.
        """
        if isinstance(file, Mapping):
            return self.create_api(file, project_dir=project_dir, force=force)
        deploys.check_no_project_dir(project_dir)
        with deploys.temporary_archive() as archive:
            upload = deploys.upload_of_file(archive, file, force=force)
            return self._transport.run(calls.deploy(upload))

    def list_apis(self) -> list[ApiView]:
        """List the deployed APIs.

        Returns:
            The spec, endpoint, jobs and versions of each.
        """
        return self._transport.run(calls.list_apis())

    def get_api(self, api_name: str) -> ApiView:
        """Get a deployed API.

        Returns:
            Its spec, endpoint, jobs and versions.

        Raises:
            NotFound: there is no such API.
        """
        return self._transport.run(calls.get_api(api_name))

    def delete_api(self, api_name: str, keep_cache: bool = False) -> Message:
        """Delete an API. The operator stops its jobs in progress.

        Args:
            api_name: the API.
            keep_cache: accepted for programs written for Cortex, and ignored: nothing is cached.

        Raises:
            NotFound: there is no such API.
        """
        return self._transport.run(calls.delete_api(api_name))

    def submit_job(
        self,
        api_name: str,
        config: Mapping[str, JsonValue] | None = None,
        timeout: int | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> SubmittedJob:
        """Submit a job.

        While the response is lost, the client repeats the submit for a minute. All attempts have
        the same idempotency key and make one job.

        Args:
            api_name: the API to run.
            config: overrides the API's own config, recursively.
            timeout: seconds from now after which the operator terminates the job.
            idempotency_key: a later submit with the same key and arguments returns the same job; by
                default a new random key.

        Raises:
            InvalidRequest: the config cannot be written as JSON, or the key is invalid.
            NotFound: there is no such API.
            Conflict: an earlier submit had the same key and other arguments.
            OverLimit: too many jobs of the API wait.
            OperatorUnreachable: the job was not submitted; or its state is unknown, and the message
                names the idempotency key for another attempt.
        """
        return self._transport.run(calls.submit_job(api_name, config, timeout, idempotency_key))

    def get_job(self, api_name: str, job_id: str, wait: float | None = None) -> JobView:
        """Get a job, at once or after it has ended.

        Args:
            api_name: the API of the job.
            job_id: the job.
            wait: seconds to wait for the job's end. An operator may restart meanwhile. By default
                the method returns at once.

        Returns:
            The job, ended or not: after `wait` seconds it may still be in progress.

        Raises:
            NotFound: there is no such job.
        """
        return self._transport.run(calls.get_job(api_name, job_id, wait))

    def list_jobs(
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
        return self._transport.run(calls.list_jobs(api_name, status, limit, cursor))

    def newest_job(self, api_name: str) -> ListedJob:
        """Get the newest job of an API.

        Raises:
            NotFound: there is no such API, or it has no jobs.
        """
        return self._transport.run(calls.newest_job(api_name))

    def stop_job(self, api_name: str, job_id: str, keep_cache: bool = False) -> Message:
        """Stop a job. From now on its status is `status_stopped`.

        Args:
            api_name: the API of the job.
            job_id: the job.
            keep_cache: accepted for programs written for Cortex, and ignored: nothing is cached.

        Raises:
            NotFound: there is no such job.
            Conflict: the job has ended already.
        """
        return self._transport.run(calls.stop_job(api_name, job_id))

    def read_job_logs(self, api_name: str, job_id: str) -> Iterator[str]:
        """Read the log of a job as written up to now.

        Returns:
            The text in pieces.

        Raises:
            NotFound: there is no such job. The iteration raises it.
        """
        with self._transport.stream(calls.read_log(api_name, job_id), calls.TEXT) as response:
            yield from response.iter_text()

    def stream_job_logs(self, api_name: str, job_id: str) -> Iterator[str]:
        """Follow the log of a job from its beginning until the job has ended.

        The client reconnects after a broken connection, and the text continues where it stopped.

        As in Cortex's client, a call that is a statement of its own prints the text as the job
        writes it. To pass the result on or to iterate over it prints nothing.

        Returns:
            The text in pieces.

        Raises:
            NotFound: there is no such job. The iteration raises it.
            OperatorUnreachable: the operator stayed away. The iteration raises it.
        """
        text = self._follow_log(api_name, job_id)
        if not is_statement(sys._getframe(1)):
            return text
        return _print_all(text)

    def stream_api_logs(self, api_name: str) -> Iterator[str]:
        """Follow the log of an API's newest job; see `stream_job_logs`.

        Returns:
            The text in pieces.

        Raises:
            NotFound: there is no such API, or it has no jobs.
            OperatorUnreachable: the operator stayed away.
        """
        text = self._follow_log(api_name, self.newest_job(api_name)["job_id"])
        if not is_statement(sys._getframe(1)):
            return text
        return _print_all(text)

    def _follow_log(self, api_name: str, job_id: str) -> Iterator[str]:

        @contextmanager
        def connect(last_event_id: str | None) -> Iterator[Iterable[bytes]]:
            request = calls.follow_log(api_name, job_id, last_event_id)
            with self._transport.stream(request, calls.EVENTS) as response:
                yield response.iter_bytes()

        return logs.follow(connect)


def _print_all(text: Iterator[str]) -> Iterator[str]:
    for piece in text:
        sys.stdout.write(piece)
        sys.stdout.flush()
    return iter(())


def _new_transport(endpoint: Endpoint) -> Transport | PlainTransport:
    if in_task():
        from cortex.sdk.transport_plain import PlainTransport

        return PlainTransport(endpoint)
    from cortex.sdk.transport import Transport

    return Transport(endpoint)
