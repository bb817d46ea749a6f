"""Parses and checks the body of a submit.

`body_reader` parses small bodies on the event loop and large ones in a separate process.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cortex.errors import InvalidRequest, UnsupportedMediaType
from cortex.spec.job import Submission, encode

_REQUEST_PARTS = ("query", "path", "header", "body")  # as the framework names them in locations
_TOO_DEEP = {"recursion_loop", "recursion_depth_exceeded"}
_MAX_MISTAKES = 10  # a large body may have a million


@dataclass(frozen=True, slots=True)
class ParsedSubmission:
    """The body of a submit, parsed and checked."""

    timeout: int | None
    config: str
    """JSON text in ASCII."""
    digest: str | None = None
    """Equal for bodies with equal content, whatever their formatting. None unless requested."""


def parse_submission(body: bytes, *, form_type: str | None, with_digest: bool) -> ParsedSubmission:
    """Parse and check the body of a submit.

    Args:
        form_type: the Content-Type, if it is that of a form. The body may still be JSON.
        with_digest: whether to compute the digest.

    Raises:
        UnsupportedMediaType: the body is a form.
        InvalidRequest: the body is not the JSON that the contract allows.
    """
    if not body.strip():
        raise InvalidRequest("the body is empty; send {} to submit a job with the API's defaults")
    try:
        # Equivalent to json.loads, which makes a new decoder at each call.
        content = _JSON.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except RecursionError as error:
        raise InvalidRequest("the body cannot be read: its JSON is nested too deeply") from error
    except ValueError as error:
        if form_type is not None and body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"["):
            raise unsupported_type(form_type) from error
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(
            f"the body has to be a JSON object such as {{}}; found {_excerpt(content)}"
        )
    try:
        submission = Submission.model_validate(content)
    except ValidationError as error:
        allowed = ", ".join(Submission.model_fields)
        mistakes = error.errors()
        if any(e["type"] in _TOO_DEEP for e in mistakes):
            raise InvalidRequest("config: nested over 250 levels deep") from error
        listed = "; ".join(describe_mistake(e) for e in mistakes[:_MAX_MISTAKES])
        raise InvalidRequest(f"{listed} (fields: {allowed})") from error
    digest = _digest(content) if with_digest else None
    return ParsedSubmission(submission.timeout, encode(submission.config or {}), digest)


def describe_mistake(error: ErrorDetails) -> str:
    """A mistake that pydantic found, as a message: the field, the problem and the value."""
    field = ".".join(str(part) for part in error["loc"] if part not in _REQUEST_PARTS)
    problem = error["msg"].removeprefix("Value error, ")
    return f"{field or 'the body'}: {problem}; found {_excerpt(error.get('input'))}"


def unsupported_type(content_type: str | None) -> UnsupportedMediaType:
    """The error for a Content-Type that is not JSON."""
    return UnsupportedMediaType(
        f"the Content-Type {content_type!r} is not JSON; send the header 'Content-Type: "
        "application/json'"
    )


def _excerpt(value: object) -> str:
    try:
        return json.dumps(value, default=str)[:100]
    except RecursionError:  # the parser had more stack left than `dumps` has here
        return "a value that is nested too deeply"


def _digest(content: object) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
