"""Checks that hold for the answer to any request."""

from __future__ import annotations

import json
import re

from cortex import errors
from fuzz.raw_http import Answer

KINDS = {
    each.kind: each.http_status
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, errors.CortexError)
}
_REQUIRED_HEADERS = {405: "allow", 429: "retry-after"}
ALLOWED = {200, 206, 400, 401, 403, 404, 405, 408, 409, 413, 415, 416, 421, 429}
_INTERNALS = re.compile(
    rb"Traceback \(most recent|site-packages|/usr/lib/python|/src/cortex/|\.py\\?\", line|<html|<!doctype",
    re.IGNORECASE,
)


def violation(answer: Answer, method: str, private: bytes) -> str | None:
    """The rule that an answer breaks, if any.

    Args:
        private: the operator's folder, which no answer shows.
    """
    if not answer.status:
        return f"no answer ({answer.broken})"
    if method == "OPTIONS" and answer.status == 204:
        return "an empty answer with a body" if answer.body else None
    if answer.status not in ALLOWED:
        return f"status {answer.status}"
    if _INTERNALS.search(answer.body) or private in answer.body:
        return "it shows internals of the operator"
    if method == "HEAD":
        return "a body to HEAD" if answer.body else None
    return _content_violation(answer) if answer.status < 400 else _error_violation(answer)


def _content_violation(answer: Answer) -> str | None:
    media_type = answer.headers.get("content-type", "")
    if media_type.startswith(("text/plain", "text/event-stream", "text/html")):
        return None
    if media_type != "application/json":
        return f"an answer as {media_type!r}"
    return _not_json(answer.body)


def _error_violation(answer: Answer) -> str | None:
    media_type = answer.headers.get("content-type", "")
    fault = _not_json(answer.body) if media_type == "application/json" else f"as {media_type!r}"
    if fault is not None:
        return f"an error that is {fault}"
    error = json.loads(answer.body)
    if not isinstance(error, dict) or error.keys() != {"kind", "message"}:
        return "an error that is not {kind, message}"
    if KINDS.get(error["kind"]) != answer.status:
        return f"the kind {error['kind']!r} with status {answer.status}"
    if not isinstance(error["message"], str) or not error["message"].strip():
        return "an error without a message"
    needed = _REQUIRED_HEADERS.get(answer.status)
    return None if needed is None or answer.headers.get(needed) else f"no header {needed}"


def _not_json(body: bytes) -> str | None:
    def constant(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(body, parse_constant=constant)
    except ValueError as error:
        return f"not JSON: {error}"
    return None
