"""The logger of tasks: one line of strict JSON for each record, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.logger import MAX_LEVELS, logger


class Hostile:
    """An object that cannot be shown: each conversion to text fails."""

    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__

    def __getattr__(self, name: str) -> NoReturn:
        raise OSError(name)


class Scalar:
    """Like a scalar of numpy: not a Python number, but `item()` returns one."""

    ndim = 0

    def __init__(self, value: object) -> None:
        self._value = value

    def item(self) -> object:
        return self._value


class Unreadable(dict[str, object]):
    def items(self) -> NoReturn:
        raise OSError("a remote dictionary")


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def strict(text: str) -> dict[str, Any]:
    """The one record in the output, which must be strict JSON."""
    (line,) = text.splitlines()
    record: dict[str, Any] = json.loads(line, parse_constant=refuse)
    json.dumps(record, ensure_ascii=False).encode("utf-8")
    return record


def nested(levels: int) -> list[object]:
    made: list[object] = []
    for _ in range(levels):
        made = [made]
    return made


CIRCLE: dict[str, object] = {"a": 1}
CIRCLE["again"] = CIRCLE


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (float("nan"), "NaN"),
        ([float("inf"), -float("inf")], ["Infinity", "-Infinity"]),
        (Scalar(0.5), 0.5),
        (Scalar(float("nan")), "NaN"),
        ({(1, 2): "tuple", None: 0, 1.5: 1, float("nan"): 2, True: 3},
         {"(1, 2)": "tuple", "null": 0, "1.5": 1, "NaN": 2, "true": 3}),
        ({3}, [3]),
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        ("\udc80 and text", "\\udc80 and text"),
        (CIRCLE, {"a": 1, "again": "..."}),
        (2**70, 2**70),
        (date(2020, 1, 2), "2020-01-02"),
        (Decimal("1.50"), "1.50"),
        (Path("/data"), "/data"),
        (Hostile(), "<Hostile, which cannot be shown>"),
        ({"kept": 1, "lost": Hostile()}, {"kept": 1, "lost": "<Hostile, which cannot be shown>"}),
        (Unreadable(a=1), "{'a': 1}"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_that_json_cannot_express_is_written_as_text(
    value: object, written: object, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.info("epoch", extra={"value": value, "beside": 1})
    record = strict(capsys.readouterr().out)
    assert record["value"] == written
    assert (record["message"], record["beside"]) == ("epoch", 1)


def test_a_number_with_too_many_digits_for_python_is_written_in_hexadecimal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger.info("epoch", extra={"value": 10**5000})
    assert int(strict(capsys.readouterr().out)["value"], 16) == 10**5000


def test_a_value_nested_too_deeply_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("deep", extra={"value": nested(100_000)})
    out = capsys.readouterr().out
    assert strict(out)["message"] == "deep"
    assert out.count("[") == MAX_LEVELS


EXTRA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.dates()
    | st.text(st.characters(categories=["L", "Zl", "Cc", "Cs"])),
    lambda below: st.lists(below) | st.tuples(below)
    | st.dictionaries(st.none() | st.integers() | st.tuples(st.integers()) | st.text(), below),
)  # fmt: skip


@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.text(), EXTRA), st.text(st.characters(categories=["L", "Cs", "Cc"])))
def test_any_record_is_one_line_of_strict_json(
    capsys: pytest.CaptureFixture[str], extra: dict[str, object], message: str
) -> None:
    # pytest's own handler puts messages into its report, which takes valid text alone.
    handlers, logger.handlers = logger.handlers, logger.handlers[:1]
    try:
        logger.info(message, extra=extra)
    finally:
        logger.handlers = handlers
    assert strict(capsys.readouterr().out)["level"] == "info"


@pytest.mark.parametrize(
    ("arguments", "message", "args", "why"),
    [
        (("%d of %d", "x"), "%d of %d", ["x"], "TypeError"),
        (("%s", 1, 2), "%s", [1, 2], "TypeError"),
        (("100%", 1), "100%", [1], "ValueError"),
        (("%s", Hostile()), "%s", ["<Hostile, which cannot be shown>"], "ValueError: no words"),
        ((Hostile(),), "<Hostile, which cannot be shown>", [], "ValueError: no words"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_message_that_cannot_be_formatted_is_kept_with_its_arguments(
    arguments: tuple[Any, ...],
    message: str,
    args: list[object],
    why: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # pytest's own handler raises what it cannot format.
    monkeypatch.setattr(logger, "handlers", logger.handlers[:1])
    logger.info(*arguments)
    printed = capsys.readouterr()
    record = strict(printed.out)
    assert (record["message"], record["args"]) == (message, args)
    assert why in record["logging_error"]
    assert printed.err == ""


def test_fields_of_the_record_are_not_overwritten_by_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORTEX_JOB_ID", "j1")
    names = ["name", "args", "message", "asctime", "level", "timestamp", "job_id", "exc_info"]
    logger.warning("kept", extra={name: f"theirs {name}" for name in names})
    record = strict(capsys.readouterr().out)
    assert (record["message"], record["level"], record["job_id"]) == ("kept", "warning", "j1")
    assert {name: record[f"extra_{name}"] for name in names} == {
        name: f"theirs {name}" for name in names
    }
    logger.info("kept", extra=["no", "mapping"])  # type: ignore[arg-type]  # what a user may write
    assert strict(capsys.readouterr().out)["extra"] == ["no", "mapping"]


def test_an_exception_is_in_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError(Hostile())
    except KeyError:
        logger.exception("it failed\n%s", "\u2028")
    record = strict(capsys.readouterr().out)
    assert record["level"] == "error"
    assert "KeyError" in record["exc_info"]


def test_a_handler_of_the_user_finds_the_fields_on_the_record() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(message)s %(loss)s %(extra_name)s"))
    logger.addHandler(handler)
    try:
        logger.info("epoch", extra={"loss": 0.5, "name": "n"})
    finally:
        logger.removeHandler(handler)
    assert out.getvalue() == "epoch 0.5 n\n"


def test_a_record_at_the_end_of_the_stack_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    def descend(levels: int) -> None:
        if levels:
            descend(levels - 1)
        else:
            logger.info("deep in the stack", extra={"values": [[1], {"a": 2}]})

    limit = sys.getrecursionlimit()
    written = 0
    for levels in range(limit - 200, limit):
        try:
            descend(levels)
        except RecursionError:
            continue
        written += strict(capsys.readouterr().out)["message"] == "deep in the stack"
    assert written
