"""The check of a job's records and messages: every database can store a record that passes it, and
it can be shown as strict JSON."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from cortex.engines.base import Ending
from cortex.worker import checks
from cortex.worker.checks import Invalid
from cortex.worker.messages import ExitRecord, LogCut, Outcome, Reply, StartRecord

NOW = time.time_ns()
LARGE = 1 << 63
END: dict[str, Any] = {
    "v": 1,
    "job_id": "0123456789abcdefgh",
    "attempt": 1,
    "ending": "exited",
    "exit_code": 0,
    "start_ns": NOW - 10**9,
    "end_ns": NOW,
    "message": "words",
    "result": {"loss": 0.5, "steps": [1, 2, {"ü": None}]},
    "has_result": True,
    "hints": ["pandas takes long"],
    "measures": [["gauge", "loss", [["model", "a"]], [0.5]], ["summary", "t", [], [2.0, 3.5]]],
}
START: dict[str, Any] = {
    "v": 1,
    "job_id": END["job_id"],
    "attempt": 1,
    "fenced": False,
    "pid": 4711,
    "ticks": 99,
    "boot": "2a579ea6-2db2-41ee-b0ed-252ef4d1d132",
    "start_ns": NOW,
    "gpus": [0, 1],
}
REPLY: dict[str, Any] = {
    "job_id": END["job_id"],
    "attempt": 1,
    "ended": True,
    "record": END,
    "start_ns": NOW,
}
OUTCOME: dict[str, Any] = {
    "message": None,
    "result": [1],
    "has_result": True,
    "lost": False,
    "loading": [2.5, ["pandas"]],
    "measures": END["measures"],
}
CUT: dict[str, Any] = {"start": 1, "end": 3, "limit": 4096}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "end": (ExitRecord, END),
    "start": (StartRecord, START),
    "reply": (Reply, REPLY),
    "outcome": (Outcome, OUTCOME),
    "cut": (LogCut, CUT),
}


def loaded(kind: str, **changed: object) -> Any:
    made, fields = KINDS[kind]
    return made.loads(json.dumps({**fields, **changed}).encode())


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_message_is_accepted_unchanged(kind: str) -> None:
    made, fields = KINDS[kind]
    found = loaded(kind)
    values = {name: getattr(found, name) for name in fields}
    assert json.loads(json.dumps(values)) == {
        **fields,
        **({"record": made.from_fields(fields).record} if kind == "reply" else {}),
    }


WRONG = [
    ("end", {"ending": "over"}), ("end", {"ending": ["exited"]}), ("end", {"ending": None}),
    ("end", {"exit_code": 256}), ("end", {"exit_code": -65}), ("end", {"exit_code": True}),
    ("end", {"exit_code": "0"}), ("end", {"exit_code": 0.0}),
    ("end", {"start_ns": "x"}), ("end", {"start_ns": None}), ("end", {"start_ns": -1}),
    ("end", {"start_ns": LARGE}), ("end", {"end_ns": END["start_ns"] - 1}), ("end", {"end_ns": LARGE}),
    ("end", {"message": 1}), ("end", {"message": ["a"]}), ("end", {"has_result": 1}),
    ("end", {"hints": "a"}), ("end", {"hints": [1]}), ("end", {"attempt": -1}),
    ("end", {"attempt": True}), ("end", {"job_id": 3}), ("end", {"job_id": "x" * 65}),
    ("start", {"pid": "1"}), ("start", {"pid": -1}), ("start", {"pid": 1 << 31}),
    ("start", {"ticks": LARGE}), ("start", {"fenced": 1}), ("start", {"boot": 1}),
    ("start", {"gpus": {"a": 1}}), ("start", {"gpus": [True]}),
    ("start", {"gpus": [*range(2000)]}),
    ("reply", {"record": {**END, "end_ns": "x"}}), ("reply", {"record": [1]}),
    ("reply", {"ended": "yes"}), ("reply", {"recorded": None}), ("reply", {"pid": -1}),
    ("reply", {"errno": "ENOSPC"}), ("reply", {"error": 1}), ("reply", {"importing": {}}),
    ("reply", {"job_id": 1}), ("reply", {"refused": False}),
    ("outcome", {"lost": "yes"}), ("outcome", {"has_result": None}), ("outcome", {"message": 1}),
    ("cut", {"start": 3}), ("cut", {"start": -1}), ("cut", {"end": 1e3}), ("cut", {"end": 1 << 62}),
    ("cut", {"limit": "1Mi"}), ("cut", {"limit": None}), ("cut", {"start": True}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changed"), WRONG)
def test_an_invalid_value_is_refused_and_its_field_is_named(
    kind: str, changed: dict[str, object]
) -> None:
    with pytest.raises(Invalid) as caught:
        loaded(kind, **changed)
    words = str(caught.value)
    name = next(iter(changed))
    assert (name if name != "record" else "e") in words or kind == "cut"
    assert len(words) < 400
    words.encode()


NOT_OBJECTS = [
    b"", b"{", b"[]", b"1", b"null", b'"ending"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"\0",
    b'{"ending": ' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("data", NOT_OBJECTS, ids=range(len(NOT_OBJECTS)))
@pytest.mark.parametrize("kind", KINDS)
def test_anything_but_a_json_object_is_refused(kind: str, data: bytes) -> None:
    with pytest.raises(Invalid):
        KINDS[kind][0].loads(data)


@pytest.mark.parametrize("data", [b"{}", b'{"v": 1}'])
@pytest.mark.parametrize("kind", ["end", "cut"])
def test_a_missing_field_is_refused(kind: str, data: bytes) -> None:
    with pytest.raises(Invalid, match="lacks a field"):
        KINDS[kind][0].loads(data)


def nested(levels: int) -> object:
    value: object = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


INVALID_RESULTS = {
    "NaN": "it is not JSON",
    "Infinity": "it is not JSON",
    "[1e999]": "it is not JSON",
    '{"a": -1e999}': "it is not JSON",
    json.dumps(nested(251)): "nested over 250 levels",
    json.dumps(
        "x" * (1 << 20)
    ): "1 MiB (1048578 bytes), more than the limit of 1 MiB (1048576 bytes)",
    json.dumps("x" * (3 << 20)): "it takes 3 MiB (3145730 bytes), more than the limit",
    json.dumps("é" * 200_000, ensure_ascii=False): "1200002 bytes",
}


@pytest.mark.parametrize("text", INVALID_RESULTS, ids=range(len(INVALID_RESULTS)))
@pytest.mark.parametrize("kind", ["end", "outcome"])
def test_a_result_that_cannot_be_stored_is_left_out_and_the_rest_is_accepted(
    kind: str, text: str
) -> None:
    made, fields = KINDS[kind]
    own = json.dumps({**fields, "message": None}).replace(json.dumps(fields["result"]), text)
    record = made.loads(own.encode())
    assert (record.has_result, record.result) == (False, None)
    assert record.message.startswith("the task's return value was not kept: ")
    assert INVALID_RESULTS[text] in record.message
    assert record.measures == fields["measures"]


def test_a_deep_result_a_huge_number_and_odd_text_are_accepted() -> None:
    assert loaded("end", result=nested(250)).result == nested(250)
    assert loaded("end", result=10**4200).result == 10**4200
    assert loaded("end", result="\ud800\0").result == "\ud800\0"


def test_a_time_in_the_future_is_now() -> None:
    """A clock that is set back by years must not lose the jobs that ran before."""
    found = loaded("end", start_ns=LARGE - 2, end_ns=LARGE - 1)
    assert NOW <= found.start_ns <= found.end_ns <= time.time_ns()
    assert NOW <= loaded("start", start_ns=LARGE - 1).start_ns <= time.time_ns()
    assert loaded("end", end_ns=NOW + 3600 * 10**9).end_ns == NOW + 3600 * 10**9


def test_texts_become_one_line_that_can_be_stored() -> None:
    found = loaded("end", message="a\n\ud800 " + "x" * 7_000_000, hints=["\udcff"] * 100)
    assert found.message.startswith("a \\ud800 xxx")
    assert len(found.message) == checks.MAX_MESSAGE
    assert found.hints == ["\\udcff"] * checks.MAX_HINTS
    assert loaded("reply", record=None, ended=False, error="\ud800").error == "\\ud800"


def test_invalid_metrics_are_left_out() -> None:
    sound = ["counter", "steps", [["model", "a"]], [1]]
    odd = [
        1, [], ["counter", "a", [], ["1"]], ["gauge", "a", [], [float("nan")]],
        ["gauge", "a", [], [10**400]], ["gauge", "a", [], [True]], ["gauge", "a", [], [1, 2]],
        ["other", "a", [], [1]], [["gauge"], "a", [], [1]], ["gauge", 1, [], [1]],
        ["gauge", "a", {}, [1]], ["gauge", "a", [["b", 1]], [1]], ["gauge", "a", [["b"]], [1]],
        ["gauge", "a", [["b", "c"]] * 51, [1]], ["summary", "a", [], [1]],
    ]  # fmt: skip
    assert loaded("end", measures=[*odd, sound]).measures == [sound]
    assert loaded("outcome", measures={"a": 1}).measures == []
    assert len(loaded("end", measures=[sound] * 1000).measures) == checks.MAX_SERIES
    odd_names = loaded(
        "end", measures=[["gauge", "\ud800" * 9, [["x" * 10**6, "y\n"]], [1]]]
    ).measures
    ((_, name, ((key, value),), _),) = odd_names
    assert (name, len(key), value) == ("\\ud800" * 9, checks.MAX_NAME, "y")
    many = [["gauge", "n" * 500, [["k" * 500, "v" * 500]] * 50, [1]]] * 100
    assert len(json.dumps(loaded("end", measures=many).measures)) < 2 * checks.MAX_MEASURES


@pytest.mark.parametrize(
    "loading", [1, [1, []], [float("inf"), ["a"]], [1.0, ["a"] * 21], [1.0, [2]], ["x", ["a"]]]
)
def test_an_invalid_import_time_is_left_out(loading: object) -> None:
    assert loaded("outcome", loading=loading).loading is None


def test_the_endings_are_those_of_engines() -> None:
    assert {"lost", *Ending} == checks.ENDINGS


# Values for any place of a record.
ODD: list[Callable[[random.Random], object]] = [
    lambda _: None,
    lambda rng: rng.random() < 0.5,
    lambda rng: rng.choice([0, 1, -1, 255, 256, -64, -65, 1 << 31, 1 << 63, 10**30, 10**4299, -(1 << 63)]),
    lambda rng: rng.choice([0.5, 1e308, float("nan"), float("inf"), float("-inf"), -0.0]),
    lambda rng: rng.choice(["", "x", "\0", "\ud800", "é", "exited", "lost", "a\nb", "NaN", "x" * 600, "\U0001f600"]),
    lambda rng: rng.choice([[], {}, [[]], {"": []}, [None] * 30, nested(300), nested(260), {"\ud800": "\0"}]),
    lambda rng: rng.choice(list(END.values())),
    lambda rng: rng.choice([["gauge", "a", [["\udc00", "\0"]], [1e308]], ["counter", "", [], [10**400]]]),
]  # fmt: skip


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy with an odd value in one place."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(rng, value[at]), *value[at + 1 :]]
    return rng.choice(ODD)(rng)


def garbled(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    cut = rng.randrange(len(data))
    return rng.choice(
        [data[:at], data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], data[at:], data[:at] + data[cut:], data * 2]
    )  # fmt: skip


def check_strict(value: object) -> None:
    """Check that the value can be shown, and be stored as the store encodes it."""
    text = json.dumps(value, allow_nan=False)
    assert json.loads(text.encode()) == json.loads(json.dumps(value))
    assert "\0" not in text  # PostgreSQL's text type stores every other character


@pytest.mark.parametrize("kind", KINDS)
def test_any_record_is_refused_or_can_be_stored_and_shown(kind: str) -> None:
    rng = random.Random(f"checks {kind}")
    made, fields = KINDS[kind]
    refused = accepted = 0
    for number in range(3000):
        value = fields
        for _ in range(rng.randrange(1, 4)):
            value = mutated(rng, value)
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if number % 5 == 0 and data:
            data = garbled(rng, data)
        try:
            found = made.loads(data)
        except Invalid as error:
            refused += 1
            str(error).encode()
            continue
        accepted += 1
        check_strict({name: getattr(found, name) for name in made.__slots__})
        if kind == "end":
            check_end(found)
        if kind == "reply" and found.record is not None:
            check_end(ExitRecord(**found.record))
    assert refused > 300
    assert accepted > 20


def check_end(found: ExitRecord) -> None:
    assert 0 <= found.start_ns <= found.end_ns <= time.time_ns() + 86_400 * 10**9
    assert -64 <= found.exit_code <= 255
    assert found.ending in checks.ENDINGS
    for text in [found.message or "", *found.hints]:
        text.encode()
        assert len(text) <= checks.MAX_HINT
    assert len(found.dumps()) <= checks.MAX_EXIT_RECORD
    assert len(json.dumps(found.result)) <= checks.MAX_RESULT
