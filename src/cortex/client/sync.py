"""`Client`: everything that can be asked of an operator, each as one method.

The command uses it, and so do programs. What it returns is the operator's JSON as it came (see
`cortex.client.types`); what it raises is a `cortex.CortexError`.
"""

from __future__ import annotations

import io
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from cortex.client import logs, submission
from cortex.client.again import until_answered
from cortex.client.environments import checked_endpoint, checked_token
from cortex.client.transport import ANSWER_S, Transport, segment
from cortex.errors import CortexError, InvalidProject, InvalidRequest, InvalidSpec

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.client.task_project import Task
    from cortex.client.types import (
        ApiView,
        DeployResult,
        JobPage,
        JobView,
        Message,
        SubmittedJob,
    )

ApiSpecs = Mapping[str, object] | Sequence[Mapping[str, object]]

_UPLOAD_ANSWER_S = 300.0
_WAIT_SLICE_S = 20.0
_SPEC_FILE = "api_spec.yaml"


class Client:
    """A client of one operator. It keeps connections: close it, or use it in a `with` block.

    Get one with `cortex.client()`. It may be shared by threads.
    """

    def __init__(self, operator_endpoint: str, *, name: str = "", token: str | None = None) -> None:
        token = None if token is None else checked_token(token)
        self._operator = Transport(checked_endpoint(operator_endpoint), name, token)
        # A program that forgets to close it leaves no open sockets behind.
        self._finalizer = weakref.finalize(self, self._operator.close)

    @property
    def name(self) -> str:
        """The environment's name; empty when it was made without one."""
        return self._operator.name

    @property
    def operator_endpoint(self) -> str:
        """The operator's URL."""
        return self._operator.endpoint

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

    def __repr__(self) -> str:
        return f"Client({self.operator_endpoint!r}, name={self.name!r})"

    def info(self) -> dict[str, JsonValue]:
        """The operator's version and how it is set up."""
        return cast("dict[str, JsonValue]", self._operator.call("GET", "/-/info"))

    def cluster_info(self) -> dict[str, JsonValue]:
        """The machines that jobs run on, and what is free on each."""
        return cast("dict[str, JsonValue]", self._operator.call("GET", "/-/cluster"))

    def create_api(
        self,
        api_spec: ApiSpecs,
        task: Task | None = None,
        requirements: Sequence[str] = (),
        project_dir: str | Path | None = None,
        force: bool = True,
    ) -> list[DeployResult]:
        """Deploy what `api_spec` describes (an entry of a cortex.yaml as a dict, or a list of them).

        Give exactly one of `task` and `project_dir`:

        - `task`: a function `task(config)`, or a class with `__call__(self, config)`. It is sent by
          value together with what it uses of your own modules; what it uses of installed packages
          belongs into `requirements`, lines as in a requirements.txt. It runs on this version of
          Python.
        - `project_dir`: a folder, to which `definition.path` is relative. Nothing is written to it;
          a cortex.yaml in it is not read.

        With `force=False`, an API that is deployed already is not replaced by a different version.
        """
        if (task is None) == (project_dir is None):
            raise InvalidRequest("create_api needs exactly one of task= and project_dir=")
        if task is not None:
            from cortex.client.task_project import MODULE, project_of

            text = _as_yaml([_with_path(api_spec, MODULE)])
            _check_spec(text, _SPEC_FILE)
            with project_of(task, requirements) as project:
                return _all_deployed(self._deploy(text.encode(), _SPEC_FILE, project, force=force))
        if requirements:
            raise InvalidRequest(
                "requirements= goes with task=; for project_dir=, write requirements.txt in the folder"
            )
        folder = Path(cast("str | Path", project_dir)).expanduser()
        if not folder.is_dir():
            raise InvalidProject(f"project_dir {str(folder)!r} is not a folder")
        text = _as_yaml([api_spec] if isinstance(api_spec, Mapping) else list(api_spec))
        _check_spec(text, _SPEC_FILE)
        return _all_deployed(self._deploy(text.encode(), _SPEC_FILE, folder, force=force))

    def deploy(self, file: str | Path, force: bool = True) -> list[DeployResult]:
        """Deploy every API of a cortex.yaml with the project in its folder, one result for each."""
        file = Path(file).expanduser()
        try:
            config = file.read_bytes()
            text = config.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidSpec(f"{file}: it is not text in UTF-8 ({error})") from error
        except OSError as error:
            raise InvalidSpec(
                f"{file} cannot be read ({error.strerror}); name the file that describes "
                "the APIs: `cortex deploy FILE`"
            ) from error
        _check_spec(text, str(file))
        return self._deploy(config, file.name, file.resolve().parent, force=force)

    def list_apis(self) -> list[ApiView]:
        """Every deployed API."""
        return cast("list[ApiView]", self._operator.call("GET", "/-/apis"))

    def get_api(self, api_name: str) -> ApiView:
        """One deployed API: its spec, endpoint, jobs and versions."""
        answer = self._operator.call("GET", f"/-/apis/{segment(api_name)}")
        return cast("list[ApiView]", answer)[0]

    def delete_api(self, api_name: str) -> Message:
        """Delete an API; its running jobs end as stopped."""
        return cast("Message", self._operator.call("DELETE", f"/-/apis/{segment(api_name)}"))

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
        content = submission.body(config, timeout)
        path = f"/-/apis/{segment(api_name)}/jobs"
        answer = submission.submitted(self._operator, path, content, idempotency_key)
        return cast("SubmittedJob", answer)

    def get_job(self, api_name: str, job_id: str, wait: float | None = None) -> JobView:
        """A job's status. With `wait`, as soon as it has ended, or after that many seconds, over which an
        operator may go and come back."""
        deadline = time.monotonic() + (wait or 0.0)
        path = _job_path(api_name, job_id)

        def ask() -> JsonValue:
            left_s = min(_WAIT_SLICE_S, max(0.0, deadline - time.monotonic()))
            params = {"wait": round(left_s, 3)} if left_s else None
            return self._operator.call("GET", path, params=params, answer_s=ANSWER_S + left_s)

        while True:
            job = cast("JobView", until_answered(ask, deadline))
            if "end_time" in job["job_status"] or time.monotonic() >= deadline:
                return job

    def list_jobs(
        self,
        api_name: str,
        status: str | None = None,
        limit: int | None = None,
        cursor: int | None = None,
    ) -> JobPage:
        """A page of the API's jobs, newest first: those of one status only, `limit` of them, and the
        page after the one whose `next_cursor` is given as `cursor`."""
        asked = {"status": status, "limit": limit, "cursor": cursor}
        params = {name: value for name, value in asked.items() if value is not None}
        path = f"/-/apis/{segment(api_name)}/jobs"
        return cast("JobPage", self._operator.call("GET", path, params=params))

    def stop_job(self, api_name: str, job_id: str) -> Message:
        """Stop a job. From then on its status is `status_stopped`."""
        return cast("Message", self._operator.call("DELETE", _job_path(api_name, job_id)))

    def stream_job_logs(self, api_name: str, job_id: str) -> Iterator[str]:
        """The job's log as text, from its beginning and as it is written, until the job has ended.

        A connection that breaks is made again, and the log goes on where it had stopped.
        """
        path = f"{_job_path(api_name, job_id)}/logs"

        def connect(last_event_id: str | None) -> AbstractContextManager[Iterable[bytes]]:
            return self._operator.events(path, last_event_id)

        return logs.follow(connect)

    def _deploy(
        self, config: bytes, filename: str, project: Path, *, force: bool
    ) -> list[DeployResult]:
        from cortex.projects.pack import pack

        with tempfile.TemporaryFile(prefix="cortex-project-") as packed:
            pack(project, packed)
            packed.seek(0)
            answer = self._operator.call(
                "POST",
                "/-/apis",
                data={"force": "true" if force else "false"},
                files={
                    "config": (filename, config, "application/yaml"),
                    "project": ("project.tar.gz", packed, "application/gzip"),
                },
                answer_s=_UPLOAD_ANSWER_S,
            )
        return cast("list[DeployResult]", answer)


def _job_path(api_name: str, job_id: str) -> str:
    return f"/-/apis/{segment(api_name)}/jobs/{segment(job_id)}"


def _check_spec(text: str, filename: str) -> None:
    from cortex.spec.yaml import read_apis

    read_apis(text, filename)


def _with_path(api_spec: ApiSpecs, path: str) -> Mapping[str, object]:
    entries = [api_spec] if isinstance(api_spec, Mapping) else list(api_spec)
    if len(entries) != 1:
        raise InvalidRequest(f"task= is for one API, and api_spec has {len(entries)}")
    definition = entries[0].get("definition", {})
    if not isinstance(definition, Mapping):
        raise InvalidSpec(f"definition is {definition!r}; it must be a dict")
    given = sorted({"path", "command"} & set(definition))
    if given:
        raise InvalidRequest(f"task= says what runs, and so does definition.{given[0]}: give one")
    return {**entries[0], "definition": {**definition, "path": path}}


def _as_yaml(entries: Sequence[Mapping[str, object]]) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # wrongly inferred
    out = io.StringIO()
    try:
        yaml.dump(_plain(entries), out)
    except YAMLError as error:
        raise InvalidSpec(f"api_spec holds something that is no JSON: {error}") from error
    return out.getvalue()


def _plain(value: object) -> object:
    """Only lists and dicts, which are what a YAML file holds; each on its own, as it has no anchors."""
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return value


def _all_deployed(results: list[DeployResult]) -> list[DeployResult]:
    errors = [result["error"] for result in results if result["error"]]
    if errors:
        raise CortexError("\n".join(errors), kind="deploy.failed")
    return results
