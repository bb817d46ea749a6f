"""Makes the request of a deploy: the file that describes the APIs, and the packed project.

`Client` calls it directly and `AsyncClient` in a thread. The functions pack the project into an
archive that the caller opens and closes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from cortex.errors import CortexError, InvalidProject, InvalidRequest, InvalidSpec
from cortex.sdk.environments import in_task
from cortex.sdk.exchange import Request

if TYPE_CHECKING:
    from cortex.sdk.task_project import Task
    from cortex.spec.api import Api

    ApiSpecs = Mapping[str, object] | Sequence[Mapping[str, object]]

_UPLOAD_TIMEOUT_S = 300.0
_SPEC_FILE = "api_spec.yaml"


@dataclass(frozen=True)
class Upload:
    """The request of a deploy, and a description of the files that it leaves out."""

    request: Request
    left_out: str | None


@dataclass(frozen=True)
class Packages:
    """The packages of a task that is sent by value.

    The lines of a requirements.txt, and those of a conda-packages.txt.
    """

    pip: Sequence[str] = ()
    conda: Sequence[str] = ()


def check_no_project_dir(project_dir: str | Path | None) -> None:
    """Refuse a project folder for a file, whose project is its own folder.

    Raises:
        InvalidRequest: a project folder was given.
    """
    if project_dir is not None:
        raise InvalidRequest(
            "project_dir= goes with a dict; the project of a file is the folder that contains it"
        )


def temporary_archive() -> IO[bytes]:
    """A temporary file for the packed project, which closing it deletes."""
    return tempfile.TemporaryFile(prefix="cortex-project-")


def upload_of_spec(
    archive: IO[bytes],
    api_spec: ApiSpecs,
    task: Task | None,
    packages: Packages,
    project_dir: str | Path | None,
    *,
    force: bool,
) -> Upload:
    """Make the upload of `create_api`.

    Args:
        archive: an empty file, for the packed project.
        api_spec, task, packages, project_dir, force: see `Client.create_api`.

    Raises:
        CortexError: the arguments, the spec or the project have mistakes.
    """
    if (task is None) == (project_dir is None):
        raise InvalidRequest("create_api needs exactly one of task= and project_dir=")
    if task is not None:
        with _required_packages("to deploy a function from a task"):
            from cortex.sdk.task_project import MODULE, project_of

        text = _to_yaml([_with_path(api_spec, MODULE)])
        _check_spec(text, _SPEC_FILE)
        with project_of(task, packages.pip, packages.conda) as project:
            return _new_upload(archive, text.encode(), _SPEC_FILE, project, force=force)
    for lines, argument in ((packages.pip, "requirements"), (packages.conda, "conda_packages")):
        if lines:
            file = f"{argument.replace('_', '-')}.txt"
            raise InvalidRequest(
                f"{argument}= goes with task=; for project_dir=, write {file} in the folder"
            )
    folder = Path(cast("str | Path", project_dir)).expanduser()
    if not folder.is_dir():
        raise InvalidProject(f"project_dir {str(folder)!r} is not a folder")
    text = _to_yaml([api_spec] if isinstance(api_spec, Mapping) else list(api_spec))
    _check_spec(text, _SPEC_FILE)
    return _new_upload(archive, text.encode(), _SPEC_FILE, folder, force=force)


def apis_of_file(file: Path) -> list[Api]:
    """The APIs that a file describes.

    Raises:
        InvalidSpec: the file cannot be read, or has mistakes.
    """
    from cortex.spec.cortex_yaml import read_apis

    return read_apis(_read(file)[1], str(file))


def upload_of_file(archive: IO[bytes], file: str | Path, *, force: bool) -> Upload:
    """Make the upload of `deploy`.

    Args:
        archive: an empty file, for the packed project.
        file, force: see `Client.deploy`.

    Raises:
        CortexError: the file or the project have mistakes.
    """
    file = Path(file).expanduser()
    config, text = _read(file)
    _check_spec(text, str(file))
    return _new_upload(archive, config, file.name, file.resolve().parent, force=force)


def _read(file: Path) -> tuple[bytes, str]:
    try:
        config = file.read_bytes()
        return config, config.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"{file} is not UTF-8 text ({error})") from error
    except OSError as error:
        raise InvalidSpec(
            f"{file} cannot be read ({error.strerror}); give the file that describes the APIs: "
            "`cortex deploy FILE`"
        ) from error


def _new_upload(
    archive: IO[bytes], config: bytes, filename: str, project: Path, *, force: bool
) -> Upload:
    with _required_packages("to deploy from a task"):
        from cortex.projects.pack import pack

    summary = pack(project, archive)
    archive.seek(0)
    request = Request(
        "POST",
        "/-/apis",
        data={"force": "true" if force else "false"},
        files={
            "config": (filename, config, "application/yaml"),
            "project": ("project.tar.gz", archive, "application/gzip"),
        },
        response_timeout_s=_UPLOAD_TIMEOUT_S,
    )
    return Upload(request, summary.left_out)


def _check_spec(text: str, filename: str) -> None:
    if in_task():
        return  # the environment of a task may lack a YAML parser; the operator checks as well
    from cortex.spec.cortex_yaml import read_apis

    read_apis(text, filename)


def _with_path(api_spec: ApiSpecs, path: str) -> Mapping[str, object]:
    entries = [api_spec] if isinstance(api_spec, Mapping) else list(api_spec)
    if len(entries) != 1:
        raise InvalidRequest(f"task= deploys one API, but api_spec has {len(entries)} entries")
    definition = entries[0].get("definition", {})
    if not isinstance(definition, Mapping):
        raise InvalidSpec(f"definition is {definition!r}; it must be a dict")
    given = sorted({"path", "command"} & set(definition))
    if given:
        raise InvalidRequest(
            f"task= and definition.{given[0]} both say what runs; give one of them"
        )
    return {**entries[0], "definition": {**definition, "path": path}}


def _to_yaml(entries: Sequence[Mapping[str, object]]) -> str:
    """The entries as JSON, which is also YAML."""
    try:
        return json.dumps(_to_json(entries, ()), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidSpec(f"api_spec cannot be written as JSON: {error}") from error


def _to_json(value: object, path: tuple[object, ...]) -> object:
    """The value as dicts and lists. Keys must be strings: json.dumps would convert other keys."""
    if isinstance(value, Mapping):
        other_keys = [key for key in value if not isinstance(key, str)]
        if other_keys:
            parent = ".".join(map(str, path)) or "an entry"
            raise TypeError(f"the key {other_keys[0]!r} in {parent} is not a string")
        return {key: _to_json(child, (*path, key)) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(child, path) for child in value]
    return value


@contextmanager
def _required_packages(purpose: str) -> Iterator[None]:
    """Explain the failed import of a package that the environment of a task may lack."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CortexError(
            f"{purpose}, this environment needs the package {error.name}; add {error.name} to "
            "requirements.txt",
            kind="client.package_missing",
        ) from error
