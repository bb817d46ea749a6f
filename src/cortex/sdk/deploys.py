"""What a deploy sends: the file that describes the APIs, and the project, packed. For either client; the one of
asyncio has it done in a thread.

The functions pack into a file that is theirs to write, and return what sends it.
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

_UPLOAD_ANSWER_S = 300.0
_SPEC_FILE = "api_spec.yaml"


@dataclass(frozen=True)
class Upload:
    """The request of a deploy, and in words what of the project was left out of it."""

    request: Request
    left_out: str | None


@dataclass(frozen=True)
class Packages:
    """What a task that is sent by value wants installed: lines of a requirements.txt and of a
    conda-packages.txt."""

    pip: Sequence[str] = ()
    conda: Sequence[str] = ()


def check_alone(project_dir: str | Path | None) -> None:
    """Refuse a project's folder beside a file, which lies in its own.

    Raises:
        InvalidRequest: one was given.
    """
    if project_dir is not None:
        raise InvalidRequest(
            "project_dir= goes with a dict; a file is deployed with the folder that it lies in"
        )


def room() -> IO[bytes]:
    """A temporary file to pack into, which is gone once it is closed."""
    return tempfile.TemporaryFile(prefix="cortex-project-")


def of_api_spec(
    packed: IO[bytes],
    api_spec: ApiSpecs,
    task: Task | None,
    packages: Packages,
    project_dir: str | Path | None,
    *,
    force: bool,
) -> Upload:
    """What `create_api` sends.

    Raises:
        CortexError: the arguments, the spec or the project have mistakes.
    """
    if (task is None) == (project_dir is None):
        raise InvalidRequest("create_api needs exactly one of task= and project_dir=")
    if task is not None:
        with _packages("to deploy a function from a task"):
            from cortex.sdk.task_project import MODULE, project_of

        text = _as_yaml([_with_path(api_spec, MODULE)])
        _check_spec(text, _SPEC_FILE)
        with project_of(task, packages.pip, packages.conda) as project:
            return _upload(packed, text.encode(), _SPEC_FILE, project, force=force)
    for given, file in ((packages.pip, "requirements"), (packages.conda, "conda_packages")):
        if given:
            raise InvalidRequest(
                f"{file}= goes with task=; for project_dir=, write {file.replace('_', '-')}.txt in the "
                "folder"
            )
    folder = Path(cast("str | Path", project_dir)).expanduser()
    if not folder.is_dir():
        raise InvalidProject(f"project_dir {str(folder)!r} is not a folder")
    text = _as_yaml([api_spec] if isinstance(api_spec, Mapping) else list(api_spec))
    _check_spec(text, _SPEC_FILE)
    return _upload(packed, text.encode(), _SPEC_FILE, folder, force=force)


def apis_of_file(file: Path) -> list[Api]:
    """The APIs that a file describes.

    Raises:
        InvalidSpec: it cannot be read, or has mistakes.
    """
    from cortex.spec.cortex_yaml import read_apis

    return read_apis(_read(file)[1], str(file))


def of_file(packed: IO[bytes], file: str | Path, *, force: bool) -> Upload:
    """What `deploy` sends.

    Raises:
        CortexError: the file or the project have mistakes.
    """
    file = Path(file).expanduser()
    config, text = _read(file)
    _check_spec(text, str(file))
    return _upload(packed, config, file.name, file.resolve().parent, force=force)


def _read(file: Path) -> tuple[bytes, str]:
    try:
        config = file.read_bytes()
        return config, config.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"{file}: it is not text in UTF-8 ({error})") from error
    except OSError as error:
        raise InvalidSpec(
            f"{file} cannot be read ({error.strerror}); name the file that describes "
            "the APIs: `cortex deploy FILE`"
        ) from error


def _upload(
    packed: IO[bytes], config: bytes, filename: str, project: Path, *, force: bool
) -> Upload:
    with _packages("to deploy from a task"):
        from cortex.projects.pack import pack

    summary = pack(project, packed)
    packed.seek(0)
    request = Request(
        "POST",
        "/-/apis",
        data={"force": "true" if force else "false"},
        files={
            "config": (filename, config, "application/yaml"),
            "project": ("project.tar.gz", packed, "application/gzip"),
        },
        answer_s=_UPLOAD_ANSWER_S,
    )
    return Upload(request, summary.left_out)


def _check_spec(text: str, filename: str) -> None:
    if in_task():
        return  # what reads YAML need not be there, and the operator checks it all the same
    from cortex.spec.cortex_yaml import read_apis

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
    """The entries as JSON, which is YAML."""
    try:
        return json.dumps(_plain(entries, ()), indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidSpec(f"api_spec holds something that is no JSON: {error}") from error


def _plain(value: object, path: tuple[object, ...]) -> object:
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            place = ".".join(map(str, path))
            raise TypeError(f"the key {odd[0]!r} in {place or 'an entry'}, which is no string")
        return {key: _plain(below, (*path, key)) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(below, path) for below in value]
    return value


@contextmanager
def _packages(purpose: str) -> Iterator[None]:
    """An import of packages that this one depends on, and which the environment of a task need not have."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CortexError(
            f"{purpose}, the package {error.name} is needed, and this environment does not have it: add "
            f"{error.name} to requirements.txt",
            kind="client.package_missing",
        ) from error
