"""The shapes of answers, and the changes that break a client: a field is removed or gets another
type. `contract/test_snapshot.py` compares the operator's answers with its checked-in shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Shape = dict[str, str]

# The HTTP server sets these.
_IGNORED_HEADERS = {"date", "server", "connection", "content-length", "transfer-encoding"}
_PROSE = {"title", "description", "summary", "operationId", "tags"}
# The keys of these objects in an OpenAPI document are names, which may equal a word of _PROSE.
_NAMED = {"properties", "paths", "schemas", "headers", "content", "responses", "$defs"}


def shape(value: Any) -> Shape:
    """The types of a JSON value by path, such as `$.capacity.cpu`: `number`. The elements of a list
    share the path `$[]`, which may have several types, such as `null|string`."""
    types: dict[str, set[str]] = {}
    for path, name in _types(value, "$"):
        types.setdefault(path, set()).add(name)
    return {path: "|".join(sorted(names)) for path, names in sorted(types.items())}


def _types(value: Any, path: str) -> Iterator[tuple[str, str]]:
    match value:
        case None:
            yield path, "null"
        case bool():
            yield path, "boolean"
        case int():
            yield path, "integer"
        case float():
            yield path, "number"
        case str():
            yield path, "string"
        case dict():
            yield path, "object"
            for key, each in value.items():
                yield from _types(each, f"{path}.{key}")
        case list():
            yield path, "array"
            for each in value:
                yield from _types(each, f"{path}[]")
        case _:
            raise TypeError(f"not JSON: {value!r}")


def shape_of_answer(answer: httpx.Response) -> dict[str, Any]:
    """Status, headers and body of an answer."""
    kind = answer.headers.get("content-type", "")
    headers = sorted({name.lower() for name in answer.headers} - _IGNORED_HEADERS)
    found: dict[str, Any] = {"status": answer.status_code, "headers": headers, "type": kind}
    if kind == "application/json" and answer.content:
        found["body"] = shape(answer.json())
    elif kind.startswith("text/event-stream"):
        found["events"] = _events(answer.text)
    elif answer.request.url.path == "/metrics":
        found["metrics"] = _metrics(answer.text)
    return found


def _events(text: str) -> dict[str, Shape]:
    shapes = {}
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        data = shape(json.loads(fields.pop("data")))
        shapes[fields["event"]] = {**dict.fromkeys(sorted(fields), "field"), **data}
    return shapes


def _metrics(text: str) -> dict[str, str]:
    """Each family with its type and its labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        labels = sorted({label for sample in family.samples for label in sample.labels})
        found[family.name] = f"{family.type} {' '.join(labels)}".strip()
    return found


def openapi(document: Any) -> Any:
    """The paths of an OpenAPI document without prose; parameters by name, components inlined."""
    paths = _reduced(document["paths"], document, "paths", ())
    for operations in paths.values():
        for operation in operations.values():
            parameters = operation.get("parameters", [])
            operation["parameters"] = {f"{p['in']}:{p['name']}": p for p in parameters}
    return paths


def _reduced(part: Any, document: Any, key: str, inside: tuple[str, ...]) -> Any:
    if isinstance(part, list):
        return [_reduced(each, document, key, inside) for each in part]
    if not isinstance(part, dict):
        return part
    ref = part.get("$ref", "")
    if ref.startswith("#/components/") and ref not in inside:
        component = reduce(getitem, ref.removeprefix("#/").split("/"), document)
        return _reduced(component, document, key, (*inside, ref))
    return {
        name: _reduced(each, document, name, inside)
        for name, each in part.items()
        if key in _NAMED or name not in _PROSE
    }


def breaking_changes(before: Any, now: Any, at: str = "", *, is_request: bool = False) -> list[str]:
    """The changes that break a client of `before`, one line each.

    Args:
        is_request: whether this part describes a request, where no field may become required.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key, old in before.items():
            where = f"{at} {key}".strip()
            is_sent = is_request or key in {"parameters", "requestBody"}
            if key not in now:
                lines.append(f"{where}: removed")
            elif key == "required" and isinstance(old, list):
                grown, dropped = set(now[key]) - set(old), set(old) - set(now[key])
                lines += [f"{where}: {name} is required now" for name in grown if is_sent]
                lines += [f"{where}: {name} may be missing now" for name in dropped if not is_sent]
            elif key in {"enum", "headers"} and isinstance(old, list):
                lines += [f"{where}: {name} removed" for name in sorted({*old} - {*now[key]})]
            else:
                lines += breaking_changes(old, now[key], where, is_request=is_sent)
        if at.endswith("parameters"):
            added = [key for key in now.keys() - before.keys() if now[key].get("required")]
            lines += [f"{at} {key}: is required now" for key in added]
        elif is_request and "required" not in before and isinstance(now.get("required"), list):
            lines += [f"{at} required: {name} is required now" for name in now["required"]]
        return lines
    return [] if before == now else [f"{at}: was {before!r}, is {now!r}"]
