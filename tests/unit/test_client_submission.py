"""The body of a submit."""

from __future__ import annotations

import json
from _collections_abc import dict_items

import pytest

from cortex.errors import InvalidRequest
from cortex.sdk.exchange import submit_body


def test_a_config_is_encoded_once() -> None:
    encodings = 0

    class Large(dict[str, int]):
        def items(self) -> dict_items[str, int]:
            nonlocal encodings
            encodings += 1
            return super().items()

    body = submit_body({"large": Large(x=1)}, 3)  # type: ignore[dict-item]  # a subclass of dict
    assert json.loads(body) == {"config": {"large": {"x": 1}}, "timeout": 3}
    assert encodings == 1


@pytest.mark.parametrize(
    ("config", "timeout", "body"),
    [
        (None, None, b"{}"),
        ({}, None, b'{"config":{}}'),
        (None, 1, b'{"timeout":1}'),
        ({"ä": [1, "\ud800"]}, 1, b'{"config":{"\xc3\xa4":[1,"\xed\xa0\x80"]},"timeout":1}'),
    ],
)
def test_the_body_is_the_shortest_json(
    config: dict[str, object] | None, timeout: int | None, body: bytes
) -> None:
    assert submit_body(config, timeout) == body  # type: ignore[arg-type]  # it is JSON


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"", {(1,): 1}])
def test_a_config_that_json_cannot_express_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="config cannot be written as JSON"):
        submit_body({"x": value}, None)  # type: ignore[dict-item]  # invalid on purpose
