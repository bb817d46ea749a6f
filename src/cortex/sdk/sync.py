"""`Client`: everything that can be asked of an operator, each as one method.

The command uses it, and so do programs. What it returns is the operator's JSON as it came (see
`cortex.sdk.types`); what it raises is a `cortex.CortexError`.
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
from cortex.sdk.base import OfOperator
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


class Client(OfOperator):
    """A client of one operator. It keeps connections: close it, or use it in a `with` block.

    Get one with `cortex.client()`. It may be shared by threads. `AsyncClient` is its twin for asyncio.
    """

    def __init__(self, operator_endpoint: str, *, name: str = "", token: str | None = None) -> None:
        super().__init__(operator_endpoint, name=name, token=token)
        self._operator = _transport(self._endpoint)
        # A program that forgets to close it leaves no open sockets behind.
        self._finalizer = weakref.finalize(self, self._operator.close)

    def close(self) -> None:
        """Close its connections."""
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
        """The operator's version and how it is set up."""
        return self._operator.run(calls.told("/-/info"))

    def cluster_info(self) -> dict[str, JsonValue]:
        """The machines that jobs run on, and what is free on each."""
        return self._operator.run(calls.told("/-/cluster"))

    def audit(self, limit: int | None = None, cursor: int | None = None) -> AuditPage:
        """A page of the audit, newest first: who deployed, deleted, stopped, made and revoked tokens,
        and which requests were refused. It needs a token of the scope `deploy`."""
        return self._operator.run(calls.audit(limit, cursor))

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
        """Deploy what `api_spec` describes (an entry of a cortex.yaml as a dict, or a list of them).

        Give exactly one of `task` and `project_dir`:

        - `task`: a function `task(config)`, or a class with `__call__(self, config)`. It is sent by
          value together with what it uses of your own modules; what it uses of installed packages
          belongs into `requirements`, lines as in a requirements.txt, and `conda_packages`, lines
          as in a conda-packages.txt. It runs on this version of Python.
        - `project_dir`: a folder, to which `definition.path` is relative. Nothing is written to it;
          a cortex.yaml in it is not read.

        With `force=False`, an API that is deployed already is not replaced by a different version.
        `wait` is there for programs written for Cortex: an API takes jobs as soon as it is deployed.
        """
        packages = deploys.Packages(requirements or (), conda_packages or ())
        with deploys.room() as packed:
            upload = deploys.of_api_spec(packed, api_spec, task, packages, project_dir, force=force)
            return self._operator.run(calls.create_api(upload))

    def deploy(
        self,
        file: str | Path | Mapping[str, object],
        force: bool = True,
        *,
        project_dir: str | Path | None = None,
        wait: bool = False,
    ) -> list[DeployResult]:
        """Deploy every API of a cortex.yaml with the project in its folder, one result for each.

        In place of the file, an entry of it as a dict with its `project_dir`, as Cortex's client takes it.
        `wait` is there for programs written for Cortex: an API takes jobs as soon as it is deployed.
        """
        if isinstance(file, Mapping):
            return self.create_api(file, project_dir=project_dir, force=force)
        deploys.check_alone(project_dir)
        with deploys.room() as packed:
            upload = deploys.of_file(packed, file, force=force)
            return self._operator.run(calls.deploy(upload))

    def list_apis(self) -> list[ApiView]:
        """Every deployed API."""
        return self._operator.run(calls.list_apis())

    def get_api(self, api_name: str) -> ApiView:
        """One deployed API: its spec, endpoint, jobs and versions."""
        return self._operator.run(calls.get_api(api_name))

    def delete_api(self, api_name: str, keep_cache: bool = False) -> Message:
        """Delete an API; its running jobs end as stopped. `keep_cache` is there for programs written for
        Cortex: nothing is cached."""
        return self._operator.run(calls.delete_api(api_name))

    def submit_job(
        self,
        api_name: str,
        config: Mapping[str, JsonValue] | None = None,
        timeout: int | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> SubmittedJob:
        """Submit a job: `config` overrides the API's own, `timeout` is seconds from now.

        A submit with an `idempotency_key` may be repeated: the same key and arguments give the same job.
        Each submit has one, if need be of its own making. One whose answer was lost is sent again with it
        for a minute; if there is no answer then, the error tells the key.
        """
        return self._operator.run(calls.submit_job(api_name, config, timeout, idempotency_key))

    def get_job(self, api_name: str, job_id: str, wait: float | None = None) -> JobView:
        """A job's status. With `wait`, as soon as it has ended, or after that many seconds, over which an
        operator may go and come back."""
        return self._operator.run(calls.get_job(api_name, job_id, wait))

    def list_jobs(
        self,
        api_name: str,
        status: str | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> JobPage:
        """A page of the API's jobs, newest first: those of one status only, `limit` of them, and the
        page after the one whose `next_cursor` is given as `cursor`."""
        return self._operator.run(calls.list_jobs(api_name, status, limit, cursor))

    def newest_job(self, api_name: str) -> ListedJob:
        """The newest job of an API."""
        return self._operator.run(calls.newest_job(api_name))

    def stop_job(self, api_name: str, job_id: str, keep_cache: bool = False) -> Message:
        """Stop a job. From then on its status is `status_stopped`. `keep_cache` is there for programs written
        for Cortex: nothing is cached."""
        return self._operator.run(calls.stop_job(api_name, job_id))

    def read_job_logs(self, api_name: str, job_id: str) -> Iterator[str]:
        """The job's log as text, from its beginning as far as it is written by now."""
        with self._operator.stream(calls.log(api_name, job_id), calls.TEXT) as answer:
            yield from answer.iter_text()

    def stream_job_logs(self, api_name: str, job_id: str) -> Iterator[str]:
        """The job's log as text, from its beginning and as it is written, until the job has ended.

        A connection that breaks is made again, and the log goes on where it had stopped.

        A call whose result is dropped, as a statement of its own, prints the text as it is written, as
        Cortex's client does. (Iterate over the result for anything else; to pass it on prints nothing.)
        """
        text = self._followed(api_name, job_id)
        if not is_statement(sys._getframe(1)):
            return text
        return _printed(text)

    def stream_api_logs(self, api_name: str) -> Iterator[str]:
        """The log of the newest job of an API, as `stream_job_logs` has it."""
        text = self._followed(api_name, self.newest_job(api_name)["job_id"])
        if not is_statement(sys._getframe(1)):
            return text
        return _printed(text)

    def _followed(self, api_name: str, job_id: str) -> Iterator[str]:

        @contextmanager
        def connect(last_event_id: str | None) -> Iterator[Iterable[bytes]]:
            request = calls.followed_log(api_name, job_id, last_event_id)
            with self._operator.stream(request, calls.EVENTS) as answer:
                yield answer.iter_bytes()

        return logs.follow(connect)


def _printed(text: Iterator[str]) -> Iterator[str]:
    for piece in text:
        sys.stdout.write(piece)
        sys.stdout.flush()
    return iter(())


def _transport(endpoint: Endpoint) -> Transport | PlainTransport:
    if in_task():
        from cortex.sdk.transport_plain import PlainTransport

        return PlainTransport(endpoint)
    from cortex.sdk.transport import Transport

    return Transport(endpoint)
