"""The body of a submit, checked: what is wrong with it, in words, or what it says. Small ones are read on the event
loop, large ones in a process of their own; see `body_reader`.
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

_PARTS = ("query", "path", "header", "body")  # of a request, as the framework names them
_TOO_DEEP = {"recursion_loop", "recursion_depth_exceeded"}
_MAX_MISTAKES = 10  # are told: a large body may have a million


@dataclass(frozen=True, slots=True)
class Submitted:
    """What a body says."""

    timeout: int | None
    config: str
    """As JSON text in ASCII."""
    digest: str | None = None
    """The same for bodies that say the same; where it was asked for."""


def parse(body: bytes, *, form_type: str | None, hashed: bool) -> Submitted:
    """What a body says.

    Args:
        form_type: the Content-Type, where the body may be a form.
        hashed: whether to make a digest of it.

    Raises:
        UnsupportedMediaType: it is a form.
        InvalidRequest: it is not the JSON that the contract allows.
    """
    if not body.strip():
        raise InvalidRequest("the body is empty; send {} to submit a job with the API's defaults")
    try:
        # As json.loads does, which makes a decoder at each call.
        content = _JSON.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except RecursionError as error:
        raise InvalidRequest("the body is not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        if form_type is not None and body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"["):
            raise not_json(form_type) from error
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRequest(
            f"the body has to be a JSON object such as {{}}; found {_shown(content)}"
        )
    try:
        submission = Submission.model_validate(content)
    except ValidationError as error:
        allowed = ", ".join(Submission.model_fields)
        found = error.errors()
        if any(e["type"] in _TOO_DEEP for e in found):
            raise InvalidRequest("config: nested over 250 levels deep") from error
        mistakes = "; ".join(wrong(e) for e in found[:_MAX_MISTAKES])
        raise InvalidRequest(f"{mistakes} (fields: {allowed})") from error
    digest = _digest(content) if hashed else None
    return Submitted(submission.timeout, encode(submission.config or {}), digest)


def wrong(error: ErrorDetails) -> str:
    """A mistake in words."""
    where = ".".join(str(part) for part in error["loc"] if part not in _PARTS)
    what = error["msg"].removeprefix("Value error, ")
    return f"{where or 'the body'}: {what}; found {_shown(error.get('input'))}"


def not_json(content_type: str | None) -> UnsupportedMediaType:
    """The refusal of a Content-Type."""
    return UnsupportedMediaType(
        f"the Content-Type {content_type!r} is not JSON; send the header 'Content-Type: application/json'"
    )


def _shown(found: object) -> str:
    try:
        return json.dumps(found, default=str)[:100]
    except RecursionError:  # it could be read, from a less deep stack than this
        return "something that is nested too deeply"


def _digest(content: object) -> str:
    same = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(same.encode()).hexdigest()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
