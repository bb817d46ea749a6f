"""The checks of single fields of a `cortex.yaml`, with the messages for wrong values.

The fields of `spec.api` name their checks, and `spec.cortex_yaml` runs them. `projects.dotenv`
checks names of variables by the same rule.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import JsonValue

from cortex.spec.quantities import near_size, read_bytes, read_cpu_m
from cortex.spec.yaml_lines import (
    NotJson,
    Report,
    Value,
    did_you_mean,
    join,
    quoted,
    shortened,
    shown_name,
)

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RESERVED_ENV = "CORTEX_"
RESERVED_ENDPOINTS = frozenset({"healthz", "readyz", "metrics"})

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# The rules of Ray and Kubernetes.
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL = re.compile(rf"([A-Za-z0-9]([-A-Za-z0-9.]{{0,251}}[A-Za-z0-9])?/)?{_LABEL_VALUE.pattern}")
_ENDPOINT = re.compile(r"/?([A-Za-z0-9][A-Za-z0-9_.-]{0,252})")


Check = Callable[[Value, str, Report], object]
"""Returns the value for the spec, or None after it has reported a mistake."""


@dataclass(frozen=True)
class Written:
    """How a `cortex.yaml` writes a field of `spec.api`."""

    check: Check | None = None
    """None for an object whose fields have checks of their own."""
    name: str | None = None
    """The name in the file, if it differs."""
    is_required: bool = False


def name(value: Value, where: str, report: Report) -> object:
    """Check the name of an API."""
    allowed = (
        "at most 63 lower-case letters, digits and hyphens, the first a letter, "
        "the last a letter or a digit"
    )
    if not isinstance(value.data, str) or not _NAME.fullmatch(value.data):
        near = re.sub(r"[^a-z0-9]+", "-", str(value.data).lower())[:63].strip("-")
        is_near = isinstance(value.data, str) and _NAME.fullmatch(near)
        report.add_wrong_value(
            value, where, allowed, f"; did you mean {quoted(near)}?" if is_near else ""
        )
        return None
    if value.data in RESERVED_ENDPOINTS:
        report.add(value.line, where, f"{quoted(value.data)} is reserved; choose another name")
        return None
    return value.data


def one_word(words: tuple[str, ...], note: str = "") -> Check:
    """The check for one of some words; the message for any other value ends with the note."""
    allowed = ", ".join(words) + note

    def check(value: Value, where: str, report: Report) -> object:
        if isinstance(value.data, str) and value.data in words:
            return value.data
        hint = did_you_mean(value.data, words) if isinstance(value.data, str) else ""
        report.add_wrong_value(value, where, allowed, hint)
        return None

    return check


def project_path(what: str) -> Check:
    """The check for a path inside the project."""

    def check(value: Value, where: str, report: Report) -> object:
        allowed = f"{what}, relative to this file and inside its folder"
        path = _text(value, where, report, allowed)
        if path is None:
            return None
        normal = posixpath.normpath(path)
        if normal.startswith("/") or normal.split("/")[0] == "..":
            report.add_wrong_value(value, where, allowed)
            return None
        return path

    return check


def command(value: Value, where: str, report: Report) -> object:
    """Check a command and its arguments."""
    allowed = 'a list of strings, such as ["python", "train.py"]'
    if not isinstance(value.data, list) or not value.data:
        report.add_wrong_value(value, where, allowed)
        return None
    return [
        _text(part, f"{where}[{index}]", report, "a non-empty string; put it in quotes")
        for index, part in enumerate(value.data)
    ]


def modules(value: Value, where: str, report: Report) -> object:
    """Check a list of names of modules."""
    if not isinstance(value.data, list):
        report.add_wrong_value(value, where, "a list of modules, such as [numpy, sklearn.svm]")
        return None
    for index, part in enumerate(value.data):
        words = part.data.split(".") if isinstance(part.data, str) else [""]
        if not all(word.isidentifier() for word in words):
            report.add_wrong_value(
                part, f"{where}[{index}]", "the name of a module, such as sklearn.svm"
            )
    return [part.data for part in value.data]


def env(value: Value, where: str, report: Report) -> object:
    """Check environment variables. Messages never show their values, which may be secrets."""
    if not isinstance(value.data, dict):
        report.add(
            value.line, where, f"found {value.kind()}; allowed: an object of names and strings"
        )
        return None
    for key, below in value.data.items():
        shown = shown_name(key)
        name = join(where, shown)
        if not ENV_NAME.fullmatch(key):
            allowed = "allowed in a name: letters, digits and _, the first not a digit"
            report.add(below.line, where, f'found the name "{shown}"; {allowed}')
        elif key.startswith(RESERVED_ENV):
            report.add(below.line, name, f"names that start with {RESERVED_ENV} are reserved")
        if not isinstance(below.data, str):
            text = f"found {below.kind()}; allowed: a string; put it in quotes"
            report.add(below.line, name, text)
        elif "\0" in below.data:
            report.add(below.line, name, "contains a NUL character")
    return {key: below.data for key, below in value.data.items()}


def config(value: Value, where: str, report: Report) -> object:
    """Check an object of JSON values."""
    if isinstance(value.data, dict):
        return _json(value, where, report)
    report.add_wrong_value(value, where, "an object")
    return None


def endpoint(value: Value, where: str, report: Report) -> object:
    """Check the path of an API; the result has no leading slash."""
    matched = _ENDPOINT.fullmatch(value.data) if isinstance(value.data, str) else None
    if matched is None:
        allowed = "one path segment of letters, digits, _ . and -, the first a letter or a digit"
        report.add_wrong_value(value, where, allowed)
        return None
    if matched[1] in RESERVED_ENDPOINTS:
        report.add(value.line, where, f"{quoted(matched[1])} is reserved; choose another")
        return None
    return matched[1]


def cpu(value: Value, where: str, report: Report) -> object:
    """Check a number of cores; the result is in thousandths."""
    found = read_cpu_m(_number(value))
    if found:
        return found
    report.add_wrong_value(value, where, 'cores as a number over 0, or thousandths such as "200m"')
    return None


def size(minimum: int, allowed: str) -> Check:
    """The check for a size in bytes of at least `minimum`; `allowed` is for smaller sizes."""

    def check(value: Value, where: str, report: Report) -> object:
        found = read_bytes(_number(value))
        if found is None:
            near = near_size(_number(value))
            hint = f"; did you mean {quoted(near)}?" if near else ""
            report.add_wrong_value(value, where, "bytes, or a size such as 512Mi or 1G", hint)
            return None
        if found < minimum:
            report.add_wrong_value(value, where, allowed)
            return None
        return found

    return check


def labels(value: Value, where: str, report: Report) -> object:
    """Check labels of nodes, each with its allowed values."""
    if not isinstance(value.data, dict):
        report.add_wrong_value(
            value, where, "an object of labels, each with a value or a list of values"
        )
        return None
    found: dict[str, object] = {}
    for key, below in value.data.items():
        name = join(where, shortened(key))
        if not _LABEL.fullmatch(key):
            allowed = "at most 63 letters, digits, - _ and ., optionally after a domain and a /"
            report.add(
                below.line, where, f"found the label {quoted(key)}; allowed in a label: {allowed}"
            )
        values = below.data if isinstance(below.data, list) and below.data else [below]
        for each in values:
            if not isinstance(each.data, str) or not _LABEL_VALUE.fullmatch(each.data):
                allowed = (
                    "at most 63 letters, digits, - _ and ., in quotes if it looks like a number"
                )
                report.add_wrong_value(each, name, f"{allowed}; or a list of such values")
        found[key] = tuple(each.data for each in values)
    return found


def count(minimum: int, maximum: int) -> Check:
    """The check for a whole number from `minimum` to `maximum`."""

    def check(value: Value, where: str, report: Report) -> object:
        is_integer = isinstance(value.data, int) and not isinstance(value.data, bool)
        if is_integer and isinstance(value.data, int) and minimum <= value.data <= maximum:
            return value.data
        report.add_wrong_value(value, where, f"a whole number, {minimum} or more")
        return None

    return check


def _text(value: Value, where: str, report: Report, allowed: str) -> str | None:
    if isinstance(value.data, str) and value.data and "\0" not in value.data:
        return value.data
    report.add_wrong_value(value, where, allowed)
    return None


def _json(value: Value, where: str, report: Report) -> JsonValue:
    data = value.data
    if isinstance(data, dict):
        return {key: _json(v, join(where, shortened(key)), report) for key, v in data.items()}
    if isinstance(data, list):
        return [_json(v, f"{where}[{index}]", report) for index, v in enumerate(data)]
    if isinstance(data, NotJson) or (isinstance(data, float) and not math.isfinite(data)):
        report.add_wrong_value(value, where, "a JSON value; put it in quotes to make it a string")
        return None
    return data


def _number(value: Value) -> str:
    """The text of a number, or a string as it is; empty for any other value."""
    if isinstance(value.data, float):
        return f"{value.data:.0f}" if value.data.is_integer() else str(value.data)
    is_one = isinstance(value.data, int | str) and not isinstance(value.data, bool)
    return str(value.data) if is_one else ""
