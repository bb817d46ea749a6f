"""Reusable JSON encoders write the same text as `json.dumps`."""

from __future__ import annotations

import json
import json.encoder
import math
from collections import OrderedDict
from enum import IntEnum
from typing import Any

import pytest

from cortex.worker import json_encoder


class Level(IntEnum):
    HIGH = 3


VALUES: dict[str, Any] = {
    "nothing": None,
    "truth": True,
    "a number": -12.5e300,
    "a large number": 1 << 80,
    "text": 'quotes " and \\, \x00, ä, 😀',
    "half a character": "\ud83d",
    "names that are no text": {1: 2, None: 3, 4.5: [True], False: ()},
    "deep": [[[{"a": [{"b": {}}]}]]],
    "of other types": OrderedDict(level=Level.HIGH, many=(1, 2)),
}


@pytest.mark.parametrize("has_c_encoder", [True, False], ids=["C encoder", "Python encoder"])
@pytest.mark.parametrize("name", VALUES)
def test_the_text_is_that_of_json_dumps(
    name: str, has_c_encoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_c_encoder:
        monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    encode = json_encoder.encoder()
    assert [encode(VALUES[name]) for _ in range(2)] == [json.dumps(VALUES[name])] * 2


def test_nan_and_infinity_are_written_or_refused() -> None:
    assert json_encoder.encoder()([math.nan, math.inf]) == "[NaN, Infinity]"
    with pytest.raises(ValueError, match="JSON compliant"):
        json_encoder.encoder(allow_nan=False)([math.nan])


def test_an_encoder_still_works_after_a_refused_value() -> None:
    encode = json_encoder.encoder()
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        encode({"a": [{1}]})
    assert encode({"a": [1]}) == '{"a": [1]}'


def test_a_value_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="Circular reference"):
        json_encoder.encoder(for_one=True)(value)
