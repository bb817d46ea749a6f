"""Reads a `cortex.yaml`: its APIs, or every mistake in it, each with its line. Pure, no I/O.

The client reads the file before an upload, and the operator again afterwards. `spec.api` declares
the fields, each with its check (`yaml_fields`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from cortex.errors import InvalidSpec
from cortex.spec import python_variables
from cortex.spec.api import MASK, Api
from cortex.spec.yaml_fields import Check, Written
from cortex.spec.yaml_lines import (
    Mistake,
    NotJson,
    Report,
    Value,
    did_you_mean,
    in_file,
    join,
    quoted,
    read_nodes,
    shortened,
)

FieldLines = dict[tuple[int | str, ...], int]


def read_apis(text: str, file: str) -> list[Api]:
    """The APIs of a `cortex.yaml`, in its order.

    Raises:
        InvalidSpec: the text has mistakes; the message lists all of them, with `file` and line.
    """
    root, mistakes = read_nodes(text)
    report = Report(mistakes)
    entries = _entries(root, report) if root is not None or not mistakes else []
    if report.mistakes:
        raise invalid_spec(file, report.mistakes)
    return [Api.model_validate(entry) for entry in entries]


def submitted_entries(text: str) -> list[dict[str, JsonValue]]:
    """The entries of a correct `cortex.yaml` as written, with the values of `env` masked."""
    root, _ = read_nodes(text)
    found = _as_written(root) if root is not None else []
    assert isinstance(found, list), "the text has mistakes"
    entries = [entry for entry in found if isinstance(entry, dict)]
    for entry in entries:
        definition = entry.get("definition")
        if isinstance(definition, dict) and isinstance(env := definition.get("env"), dict):
            definition["env"] = dict.fromkeys(env, MASK)
    return entries


def field_lines(text: str) -> FieldLines:
    """The line of every field of a `cortex.yaml`, by paths such as `(0, "definition", "path")`."""
    root, _ = read_nodes(text)
    lines: FieldLines = {}
    pending: list[tuple[tuple[int | str, ...], Value]] = [] if root is None else [((), root)]
    while pending:
        path, value = pending.pop()
        lines[path] = value.line
        if isinstance(value.data, dict):
            pending += [((*path, key), below) for key, below in value.data.items()]
        elif isinstance(value.data, list):
            pending += [((*path, index), below) for index, below in enumerate(value.data)]
    return lines


def invalid_spec(file: str, mistakes: Iterable[Mistake], others: Iterable[str] = ()) -> InvalidSpec:
    """The error that lists the mistakes in a `cortex.yaml` by line, then those in other files."""
    return InvalidSpec("\n".join(dict.fromkeys([*in_file(file, mistakes), *others])))


def _entries(root: Value | None, report: Report) -> list[dict[str, object]]:
    expected = "a list of APIs, each starting with - name:"
    if root is None or root.data is None or root.data == []:
        report.add(root.line if root else 1, "", f"no API found; allowed: {expected}")
        return []
    if not isinstance(root.data, list):
        report.add_wrong_value(root, "", expected)
        return []
    first_lines: dict[tuple[str, str], int] = {}
    return [_entry(value, first_lines, report) for value in root.data]


def _entry(
    value: Value, first_lines: dict[tuple[str, str], int], report: Report
) -> dict[str, object]:
    entry = _API(value, "", report)
    if not isinstance(entry, dict):
        return {}
    name = entry.get("name")
    networking = {"endpoint": name, **(entry.get("networking") or {})}
    if isinstance(definition := entry.get("definition"), dict):
        _check_runner(value, definition, report)
    is_new = _is_unique(value, "name", name, first_lines, report)
    if is_new or networking["endpoint"] != name:
        _is_unique(value, "networking.endpoint", networking["endpoint"], first_lines, report)
    return {**entry, "networking": networking}


def _check_runner(value: Value, definition: Mapping[str, object], report: Report) -> None:
    """Check that there is either a Python file or a command, and the fields that suit only one."""
    given = [key for key in ("path", "command") if key in definition]
    if len(given) != 1:
        where = "definition"
        line = _line_of(value, f"{where}.{given[-1]}" if given else where)
        found = " and ".join(given) if given else "neither"
        report.add(line, where, f"found {found}; allowed: exactly one of path and command")
    if definition.get("command") is not None:
        where = "definition.preload"
        if "preload" in definition:
            report.add(
                _line_of(value, where),
                where,
                "allowed only with path: the program of a command imports by itself; remove it",
            )
        return
    variables = definition.get("env")
    for name, content in variables.items() if isinstance(variables, dict) else ():
        where = f"definition.env.{name}"
        refusal = python_variables.refusal(name, content) if isinstance(content, str) else None
        if refusal is not None:
            report.add(_line_of(value, where), where, refusal)


def _is_unique(
    value: Value, where: str, found: object, first_lines: dict[tuple[str, str], int], report: Report
) -> bool:
    if not isinstance(found, str):
        return True
    line = _line_of(value, where)
    if (where, found) not in first_lines:
        first_lines[where, found] = line
        return True
    first = first_lines[where, found]
    report.add(line, where, f"{quoted(found)} is already used by the API on line {first}")
    return False


def _line_of(value: Value, where: str) -> int:
    for key in where.split("."):
        if not isinstance(value.data, dict) or key not in value.data:
            break
        value = value.data[key]
    return value.line


def _as_written(value: Value) -> JsonValue:
    if isinstance(value.data, dict):
        return {key: _as_written(below) for key, below in value.data.items()}
    if isinstance(value.data, list):
        return [_as_written(each) for each in value.data]
    assert not isinstance(value.data, NotJson), "the text has mistakes"
    return value.data


@dataclass(frozen=True)
class _Field:
    """A field as a `cortex.yaml` writes it."""

    name: str
    """The name in the model."""
    check: Check
    is_required: bool


def _fields(model: type[BaseModel]) -> dict[str, _Field]:
    """The fields of a model of `spec.api`, by their names in a `cortex.yaml`."""
    found: dict[str, _Field] = {}
    for name, field in model.model_fields.items():
        written = next((each for each in field.metadata if isinstance(each, Written)), Written())
        section = _section(field)
        check = written.check if section is None else _object(_fields(section))
        assert check is not None, f"{model.__name__}.{name} has no check"
        found[written.name or name] = _Field(name, check, written.is_required)
    return found


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is an object with fields of its own."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _object(known: Mapping[str, _Field]) -> Check:
    """The check for an object; the result has the names of the model."""

    def check(value: Value, where: str, report: Report) -> object:
        if not isinstance(value.data, dict):
            report.add_wrong_value(value, where, f"an object with the fields {', '.join(known)}")
            return None
        parsed: dict[str, object] = {}
        for key, below in value.data.items():
            name = join(where, shortened(key))
            field = known.get(key)
            if field is None:
                report.add(below.line, name, _unknown(key, where, known))
            elif below.data is not None or field.is_required:
                parsed[field.name] = field.check(below, name, report)
        for key, field in known.items():
            if field.is_required and key not in value.data:
                report.add(value.line, join(where, key), "missing; it is required")
        return parsed

    return check


def _unknown(key: str, where: str, known: Mapping[str, _Field]) -> str:
    instead = _CORTEX.get(join(where, key))
    if instead is not None:
        return f"this field of Cortex is not supported; {instead}"
    hint = _other_section(key, where) or did_you_mean(key, known)
    return f"unknown field; allowed: {', '.join(known)}{hint}"


def _other_section(key: str, where: str) -> str:
    found = [f"{section}.{key}" for section, known in _SECTIONS.items() if key in known]
    return f'; did you mean "{found[0]}"?' if found and found[0] != join(where, key) else ""


_API = _object(_fields(Api))
_SECTIONS = {
    name: _fields(section)
    for name, field in Api.model_fields.items()
    if (section := _section(field)) is not None
}

_NO_IMAGE = (
    "jobs run directly on the machine, not in containers: list the packages in requirements.txt, "
    "or start the image with definition.command, such as [podman, run, --rm, IMAGE]"
)
_NO_SHM = "all jobs share the machine's /dev/shm, which has no limit per job: remove it"
_NO_INF = "Inferentia chips are not supported: use compute.gpu, or remove it"
_NO_NODE_GROUPS = "choose nodes by labels with compute.node_labels, such as {group: [a, b]}"
_NO_SERVING = "it is for APIs that serve requests, but a TaskAPI runs jobs: remove it"
# Fields of a TaskAPI from v0.27 to v0.42, and fields that users copy from other kinds.
_CORTEX = {
    "pod": (
        "write the container's command and args as definition.command, its env as definition.env, "
        "its compute as compute; its image is not used"
    ),
    "image": _NO_IMAGE,
    "node_groups": _NO_NODE_GROUPS,
    "shm_size": _NO_SHM,
    "predictor": "use definition: {path: FILE.py}",
    "handler": "use definition: {path: FILE.py}",
    "apis": _NO_SERVING,
    "autoscaling": "limits.max_running sets how many jobs run at once; remove it",
    "update_strategy": _NO_SERVING,
    "monitoring": "GET /metrics has the metrics of all APIs; remove it",
    "definition.image": _NO_IMAGE,
    "definition.shm_size": _NO_SHM,
    "definition.processes_per_replica": _NO_SERVING,
    "definition.threads_per_process": _NO_SERVING,
    "compute.inf": _NO_INF,
    "compute.node_groups": _NO_NODE_GROUPS,
    "compute.shm": _NO_SHM,
    "compute.shm_size": _NO_SHM,
    "networking.api_gateway": "the operator itself serves the endpoint; remove it",
    "networking.local_port": "`cortex serve --port` sets the port for all APIs; remove it",
}
