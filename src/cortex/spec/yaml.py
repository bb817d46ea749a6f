"""A `cortex.yaml` read: its APIs, or every mistake in it, each with its line. Pure, no I/O.

The client reads it before an upload and the operator again after one. What is allowed stands in
the tables at the end, one check per field.
"""

from __future__ import annotations

import difflib
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from cortex.errors import InvalidSpec
from cortex.spec.api import RESERVED_ENDPOINTS, Api
from cortex.spec.quantities import near_size, read_bytes, read_cpu_m
from cortex.spec.yaml_nodes import Mistake, Odd, Value, join, quoted, read_nodes, shortened

FieldLines = dict[tuple[int | str, ...], int]

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED_ENV = "CORTEX_"
LEAST_MEM = 16 << 20
_MOST_GPUS = 1000

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_ENDPOINT = re.compile(r"/?([A-Za-z0-9][A-Za-z0-9_.-]{0,252})")


def read_apis(text: str, file: str) -> list[Api]:
    """The APIs of a `cortex.yaml`, in its order.

    Raises:
        InvalidSpec: the text has mistakes; the message lists every one, with `file` and its line.
    """
    root, mistakes = read_nodes(text)
    report = _Report(mistakes)
    entries = _entries(root, report) if root is not None or not mistakes else []
    if report.mistakes:
        raise invalid_spec(file, report.mistakes)
    return [Api.model_validate(entry) for entry in entries]


def field_lines(text: str) -> FieldLines:
    """The line of every field of a `cortex.yaml`, as `(0, "definition", "path")` names it."""
    root, _ = read_nodes(text)
    found: FieldLines = {}
    waiting: list[tuple[tuple[int | str, ...], Value]] = [] if root is None else [((), root)]
    while waiting:
        path, value = waiting.pop()
        found[path] = value.line
        if isinstance(value.data, dict):
            waiting += [((*path, key), below) for key, below in value.data.items()]
        elif isinstance(value.data, list):
            waiting += [((*path, index), below) for index, below in enumerate(value.data)]
    return found


def invalid_spec(file: str, mistakes: Iterable[Mistake], others: Iterable[str] = ()) -> InvalidSpec:
    """The error that lists mistakes in a `cortex.yaml` by line, then those in other files."""
    ordered = sorted(mistakes, key=lambda mistake: mistake.line)
    lines = [f"{file}:{mistake.line}: {mistake.text}" for mistake in ordered]
    return InvalidSpec("\n".join(dict.fromkeys([*lines, *others])))


def did_you_mean(found: str, candidates: Iterable[str]) -> str:
    """`; did you mean "definition"?`, or nothing where no candidate is near."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(found[:200].lower(), by_lower, n=1)
    return f"; did you mean {quoted(by_lower[near[0]])}?" if near else ""


class _Report:
    """Takes the mistakes as the checks find them."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self.mistakes = list(mistakes)

    def add(self, line: int, where: str, text: str) -> None:
        self.mistakes.append(Mistake(line, f"{where}: {text}" if where else text))

    def wrong(self, value: Value, where: str, allowed: str, hint: str = "") -> None:
        self.add(value.line, where, f"found {value.shown()}; allowed: {allowed}{hint}")


# A check returns what the spec holds, or None once it has reported.
_Check = Callable[[Value, str, _Report], object]


@dataclass(frozen=True)
class _Field:
    check: _Check
    is_required: bool = False


def _entries(root: Value | None, report: _Report) -> list[dict[str, object]]:
    listed = "a list of APIs, each of which starts with - name:"
    if root is None or root.data is None or root.data == []:
        report.add(root.line if root else 1, "", f"holds no API; allowed: {listed}")
        return []
    if not isinstance(root.data, list):
        report.wrong(root, "", listed)
        return []
    seen: dict[tuple[str, str], int] = {}
    return [_entry(value, seen, report) for value in root.data]


def _entry(value: Value, seen: dict[tuple[str, str], int], report: _Report) -> dict[str, object]:
    entry = _API(value, "", report)
    if not isinstance(entry, dict):
        return {}
    name = entry.get("name")
    networking = {"endpoint": name, **(entry.get("networking") or {})}
    compute = dict(entry.get("compute") or {})
    if "cpu" in compute:
        compute["cpu_m"] = compute.pop("cpu")
    is_new = _is_unique(value, "name", name, seen, report)
    if is_new or networking["endpoint"] != name:
        _is_unique(value, "networking.endpoint", networking["endpoint"], seen, report)
    return {**entry, "networking": networking, "compute": compute}


def _is_unique(
    value: Value, where: str, found: object, seen: dict[tuple[str, str], int], report: _Report
) -> bool:
    if not isinstance(found, str):
        return True
    line = _line_of(value, where)
    if (where, found) not in seen:
        seen[where, found] = line
        return True
    first = seen[where, found]
    report.add(line, where, f"{quoted(found)} is taken by the API on line {first}")
    return False


def _line_of(value: Value, where: str) -> int:
    for key in where.split("."):
        if not isinstance(value.data, dict) or key not in value.data:
            break
        value = value.data[key]
    return value.line


def _object(fields: Mapping[str, _Field], *, one_of: tuple[str, ...] = ()) -> _Check:
    def check(value: Value, where: str, report: _Report) -> object:
        if not isinstance(value.data, dict):
            report.wrong(value, where, f"an object with the fields {', '.join(fields)}")
            return None
        parsed: dict[str, object] = {}
        for key, below in value.data.items():
            name = join(where, shortened(key))
            if key not in fields:
                hint = _elsewhere(key, where) or did_you_mean(key, fields)
                allowed = f"unknown field; allowed: {', '.join(fields)}"
                report.add(below.line, name, allowed + hint)
            elif below.data is not None or fields[key].is_required:
                parsed[key] = fields[key].check(below, name, report)
        for key, field in fields.items():
            if field.is_required and key not in value.data:
                report.add(value.line, join(where, key), "missing; it is required")
        given = [key for key in one_of if key in parsed]
        if one_of and len(given) != 1:
            line = value.data[given[-1]].line if given else value.line
            found = " and ".join(given) if given else "neither"
            report.add(
                line, where, f"found {found}; allowed: exactly one of {' and '.join(one_of)}"
            )
        return parsed

    return check


def _elsewhere(key: str, where: str) -> str:
    places = [f"{section}.{key}" for section, fields in _SECTIONS.items() if key in fields]
    return f'; did you mean "{places[0]}"?' if places and places[0] != join(where, key) else ""


def _text(value: Value, where: str, report: _Report, allowed: str) -> str | None:
    if isinstance(value.data, str) and value.data and "\0" not in value.data:
        return value.data
    report.wrong(value, where, allowed)
    return None


def _name(value: Value, where: str, report: _Report) -> object:
    allowed = (
        "at most 63 lower-case letters, digits and hyphens, the first a letter, "
        "the last a letter or a digit"
    )
    if not isinstance(value.data, str) or not _NAME.fullmatch(value.data):
        wanted = re.sub(r"[^a-z0-9]+", "-", str(value.data).lower())[:63].strip("-")
        is_near = isinstance(value.data, str) and _NAME.fullmatch(wanted)
        report.wrong(value, where, allowed, f"; did you mean {quoted(wanted)}?" if is_near else "")
        return None
    if value.data in RESERVED_ENDPOINTS:
        report.add(value.line, where, f"{quoted(value.data)} is reserved; choose another name")
        return None
    return value.data


def _one_word(words: tuple[str, ...], note: str = "") -> _Check:
    allowed = ", ".join(words) + note

    def check(value: Value, where: str, report: _Report) -> object:
        if isinstance(value.data, str) and value.data in words:
            return value.data
        hint = did_you_mean(value.data, words) if isinstance(value.data, str) else ""
        report.wrong(value, where, allowed, hint)
        return None

    return check


def _project_path(what: str) -> _Check:
    def check(value: Value, where: str, report: _Report) -> object:
        allowed = f"{what}, relative to this file and inside its folder"
        path = _text(value, where, report, allowed)
        if path is None:
            return None
        normal = posixpath.normpath(path)
        if normal.startswith("/") or normal.split("/")[0] == "..":
            report.wrong(value, where, allowed)
            return None
        return path

    return check


def _command(value: Value, where: str, report: _Report) -> object:
    allowed = 'a list of strings, such as ["python", "train.py"]'
    if not isinstance(value.data, list) or not value.data:
        report.wrong(value, where, allowed)
        return None
    return [
        _text(part, f"{where}[{index}]", report, "a string that is not empty; put it in quotes")
        for index, part in enumerate(value.data)
    ]


def _env(value: Value, where: str, report: _Report) -> object:
    if not isinstance(value.data, dict):
        report.wrong(value, where, "an object of names and strings")
        return None
    for key, below in value.data.items():
        name = join(where, shortened(key))
        if not ENV_NAME.fullmatch(key):
            allowed = "allowed in a name: letters, digits and _, the first not a digit"
            report.add(below.line, where, f"found the name {quoted(key)}; {allowed}")
        elif key.startswith(RESERVED_ENV):
            report.add(below.line, name, f"names that start with {RESERVED_ENV} are reserved")
        if not isinstance(below.data, str):
            report.wrong(below, name, "a string; put it in quotes")
        elif "\0" in below.data:
            report.wrong(below, name, "a string without NUL characters")
    return {key: below.data for key, below in value.data.items()}


def _config(value: Value, where: str, report: _Report) -> object:
    if isinstance(value.data, dict):
        return _json(value, where, report)
    report.wrong(value, where, "an object")
    return None


def _json(value: Value, where: str, report: _Report) -> JsonValue:
    data = value.data
    if isinstance(data, dict):
        return {key: _json(v, join(where, shortened(key)), report) for key, v in data.items()}
    if isinstance(data, list):
        return [_json(v, f"{where}[{index}]", report) for index, v in enumerate(data)]
    if isinstance(data, Odd) or (isinstance(data, float) and not math.isfinite(data)):
        report.wrong(value, where, "what JSON can hold; put it in quotes to make it a string")
        return None
    return data


def _endpoint(value: Value, where: str, report: _Report) -> object:
    matched = _ENDPOINT.fullmatch(value.data) if isinstance(value.data, str) else None
    if matched is None:
        allowed = "one path segment of letters, digits, _ . and -, the first a letter or a digit"
        report.wrong(value, where, allowed)
        return None
    if matched[1] in RESERVED_ENDPOINTS:
        report.add(value.line, where, f"{quoted(matched[1])} is reserved; choose another")
        return None
    return matched[1]


def _cpu(value: Value, where: str, report: _Report) -> object:
    found = read_cpu_m(_number(value))
    if found:
        return found
    report.wrong(value, where, 'cores as a number over 0, or thousandths such as "200m"')
    return None


def _mem(value: Value, where: str, report: _Report) -> object:
    found = read_bytes(_number(value))
    if found is None:
        near = near_size(_number(value))
        hint = f"; did you mean {quoted(near)}?" if near else ""
        report.wrong(value, where, "bytes, or a size such as 512Mi or 1G", hint)
        return None
    if found < LEAST_MEM:
        report.wrong(value, where, "16Mi at least, for no interpreter starts in less")
        return None
    return found


def _number(value: Value) -> str:
    """A number, or what a string says of one; nothing for anything else."""
    if isinstance(value.data, float):
        return f"{value.data:.0f}" if value.data.is_integer() else str(value.data)
    is_one = isinstance(value.data, int | str) and not isinstance(value.data, bool)
    return str(value.data) if is_one else ""


def _gpu(value: Value, where: str, report: _Report) -> object:
    is_integer = isinstance(value.data, int) and not isinstance(value.data, bool)
    if is_integer and isinstance(value.data, int) and 0 <= value.data <= _MOST_GPUS:
        return value.data
    report.wrong(value, where, "a whole number, 0 or more")
    return None


_LEVELS = ("debug", "info", "warning", "error")
_SECTIONS: dict[str, dict[str, _Field]] = {
    "definition": {
        "path": _Field(_project_path("a Python file")),
        "command": _Field(_command),
        "config": _Field(_config),
        "python_path": _Field(_project_path("a folder")),
        "env": _Field(_env),
        "log_level": _Field(_one_word(_LEVELS)),
    },
    "networking": {"endpoint": _Field(_endpoint)},
    "compute": {"cpu": _Field(_cpu), "mem": _Field(_mem), "gpu": _Field(_gpu)},
}
_API = _object(
    {
        "name": _Field(_name, is_required=True),
        "kind": _Field(_one_word(("TaskAPI",), " (no other kind is supported)"), is_required=True),
        "definition": _Field(
            _object(_SECTIONS["definition"], one_of=("path", "command")), is_required=True
        ),
        "networking": _Field(_object(_SECTIONS["networking"])),
        "compute": _Field(_object(_SECTIONS["compute"])),
    }
)
