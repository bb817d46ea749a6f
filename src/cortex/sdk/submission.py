"""A submit: what is sent, and again where its answer was lost. Used by the clients alone."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING

from cortex.errors import CortexError, InvalidRequest, OperatorUnreachable
from cortex.sdk.again import is_passing, until_answered
from cortex.sdk.exchange import Request

if TYPE_CHECKING:
    from pydantic import JsonValue

    from cortex.sdk.exchange import Exchange

_AGAIN_S = 60.0


def body(config: Mapping[str, JsonValue] | None, timeout: int | None) -> bytes:
    """What a submit sends; the same bytes however often.

    Raises:
        InvalidRequest: the config is no JSON.
    """
    fields = []
    if config is not None:
        fields.append(f'"config":{_as_json(config)}')
    if timeout is not None:
        fields.append(f'"timeout":{json.dumps(timeout)}')
    # A lone surrogate goes as it is.
    text = f"{{{','.join(fields)}}}"
    return text.encode("utf-8", "surrogatepass")


def submitted(path: str, content: bytes, key: str | None) -> Exchange[JsonValue]:
    """The operator's answer to a submit, which is one job however often it is sent.

    Raises:
        CortexError: it was not submitted, or, and then the error says so and tells the key, it is not known
            whether it was.
    """
    key = uuid.uuid4().hex if key is None else _checked_key(key)
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    request = Request("POST", path, headers=headers, content=content)
    try:
        return (yield request)
    except OperatorUnreachable as error:
        if not error.is_unanswered:
            raise
    try:
        return (yield from until_answered(lambda: request, monotonic() + _AGAIN_S))
    except CortexError as error:
        if not is_passing(error):
            raise
        raise OperatorUnreachable(
            f"it is not known whether the job was submitted: the answer was lost, and {error.message}\n"
            f"Submit it again with the idempotency key {key}, and there will be one job of it."
        ) from error


def _as_json(config: Mapping[str, JsonValue]) -> str:
    if not isinstance(config, Mapping):
        raise InvalidRequest(f"config is {config!r}; it must be a dict")
    try:
        # As short as the operator's limit of a body reckons with.
        return json.dumps(dict(config), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"config holds something that is no JSON: {error}; send finite numbers, strings, lists, dicts"
        ) from error


def _checked_key(key: str) -> str:
    """One that can be sent, and arrives as it is."""
    if not 0 < len(key) <= 255 or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise InvalidRequest(
            f"{key!r} is no idempotency key: it has 1 to 255 letters, digits and signs of ASCII, and no "
            "spaces around them"
        )
    return key
