"""The only validation of data about a job, for all its sources: the outcome file, the records in
the job's folder, messages through a socket, reports of another node. A job can forge all of these.

An impossible value makes the whole message invalid. A result that cannot be stored is dropped, and
the message says why; texts are cut to one line that can be stored; invalid metrics are dropped.
Data that passes can be stored in any database and shown as strict JSON.
"""

from __future__ import annotations

import json
import sys
import time

from cortex.worker import json_encoder, standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cortex.worker.messages import ExitRecord, LogCut, Outcome, Reply, StartRecord

globals()["__builtins__"] = standard.BUILTINS

MAX_RESULT = 1 << 20
MAX_LEVELS = 250
"""The limit of a config also: at a somewhat deeper nesting, JSON parsers run out of stack."""
MAX_DIGITS = 4300
MAX_MEASURES = 1 << 17
MAX_OUTCOME = MAX_RESULT + MAX_MEASURES + (1 << 16)
MAX_EXIT_RECORD = MAX_OUTCOME + (1 << 17)
"""Bytes of an exit record: the outcome, hints and a message."""
MAX_MESSAGE = 500
MAX_HINTS, MAX_HINT = 20, 1000
MAX_SERIES, MAX_NAME, MAX_TAGS = 100, 500, 50
MAX_ID = 64
MAX_FILE = 1 << 60
"""No log gets this long. The sum of the logs of several attempts does not overflow either."""
ENDINGS = frozenset({"exited", "out_of_memory", "timed_out", "stopped", "lost"})
NOT_KEPT = "the task's return value was not kept"

_MAX_INT, _MAX_LONG = (1 << 31) - 1, (1 << 63) - 1
_MAX_CODE, _MAX_SIGNAL, _MAX_ERRNO = 255, 64, 4095
_MAX_GPUS = 1024
_AHEAD_NS = 86_400 * 10**9
"""How far the clock of another machine may be ahead of this one's."""
_MAX_LOAD_S = 1e6
_NINES, _AS_NINES = b"9" * (MAX_DIGITS + 1), bytes.maketrans(b"012345678", b"999999999")
_VALUES = {"counter": 1, "gauge": 1, "summary": 2}
_FINITE = 1.7976931348623157e308
_encode = json_encoder.encoder(allow_nan=False)
_loads, _now_ns = json.loads, time.time_ns
_modules, _JSON = sys.modules, {"json": json, "json.decoder": json.decoder}


class Invalid(ValueError):
    """A value is impossible or cannot be stored. The message names the field, the value, and what
    is allowed."""


def decode(data: str | bytes, parse_int: Callable[[str], object] | None = None) -> object:
    """Decode JSON as `json.loads` does, also where a user's own `json` has replaced Python's.

    CPython's decoder gets its exception by the name `json.decoder`: 3.11 from `sys.modules`, 3.13
    by an import, which would run the user's file in this process.

    Raises:
        ValueError: the data is not JSON.
    """
    if _modules.get("json.decoder") is json.decoder:
        return _loads(data, parse_int=parse_int)
    theirs = {name: _modules[name] for name in _JSON if name in _modules}
    _modules.update(_JSON)
    try:
        return _loads(data, parse_int=parse_int)
    finally:
        # A user's module keeps its position, by which `interpreter_exit` finds the job's own.
        for name in _JSON:
            if name in theirs:
                _modules[name] = theirs[name]
            else:
                del _modules[name]


def start_record(record: StartRecord) -> None:
    """Check a start record.

    Raises:
        Invalid: a field is impossible.
    """
    _check_identity(record.job_id, record.attempt)
    _check_whole("v", record.v, 0, _MAX_INT)
    _check_flag("fenced", record.fenced)
    _check_whole("pid", record.pid, 0, _MAX_INT)
    _check_whole("ticks", record.ticks, 0, _MAX_LONG)
    _check_whole("start_ns", record.start_ns, 0, _MAX_LONG)
    record.start_ns = _at_most_now(record.start_ns)
    record.boot = _checked_text("boot", record.boot, MAX_ID)
    for gpu in _checked_list("gpus", record.gpus, _MAX_GPUS):
        _check_whole("gpus", gpu, 0, _MAX_INT)


def exit_record(record: ExitRecord) -> None:
    """Check an exit record.

    Raises:
        Invalid: a field is impossible.
    """
    _check_identity(record.job_id, record.attempt)
    _check_whole("v", record.v, 0, _MAX_INT)
    if not isinstance(record.ending, str) or record.ending not in ENDINGS:
        raise _invalid("ending", record.ending, f"one of {', '.join(sorted(ENDINGS))}")
    _check_whole("exit_code", record.exit_code, -_MAX_SIGNAL, _MAX_CODE)
    _check_whole("start_ns", record.start_ns, 0, _MAX_LONG)
    _check_whole("end_ns", record.end_ns, record.start_ns, _MAX_LONG)
    record.start_ns, record.end_ns = _at_most_now(record.start_ns), _at_most_now(record.end_ns)
    record.message = _optional_text("message", record.message)
    hints = _checked_list("hints", record.hints, _MAX_INT)[:MAX_HINTS]
    record.hints = [_checked_text("hints", each, MAX_HINT) for each in hints]
    _check_result(record)
    record.measures = valid_measures(record.measures)


def reply(message: Reply) -> None:
    """Check a report of a fork server or a supervising process, except its exit record.

    Raises:
        Invalid: a field is impossible.
    """
    _check_identity("" if message.job_id is None else message.job_id, message.attempt)
    _check_flag("recorded", message.recorded)
    _check_flag("ended", message.ended)
    _check_whole("pid", message.pid, 0, _MAX_INT)
    _check_whole("errno", message.errno, 0, _MAX_ERRNO)
    _check_whole("start_ns", message.start_ns, 0, _MAX_LONG)
    message.start_ns = _at_most_now(message.start_ns)
    message.error = _optional_text("error", message.error)
    message.importing = _optional_text("importing", message.importing)
    message.refused = _optional_text("refused", message.refused)


def log_cut(record: LogCut) -> None:
    """Check the removed part of a log.

    Raises:
        Invalid: a field is impossible.
    """
    _check_whole("start", record.start, 0, MAX_FILE)
    _check_whole("end", record.end, 0, MAX_FILE)
    _check_whole("limit", record.limit, 0, MAX_FILE)
    if record.start >= record.end:
        raise _invalid("end", record.end, f"after the start, which is {record.start}")


def outcome(content: Outcome) -> None:
    """Check the content of an outcome file.

    Raises:
        Invalid: a field is impossible.
    """
    _check_flag("lost", content.lost)
    content.message = _optional_text("message", content.message)
    _check_result(content)
    content.measures = valid_measures(content.measures)
    content.loading = _valid_import_times(content.loading)


def why_no_result(data: bytes, value: object = None) -> str | None:
    """Why this JSON cannot be a result; None if it can.

    Args:
        value: the decoded JSON, if it is known.
    """
    if len(data) > MAX_RESULT:
        return (
            f"it takes {size(len(data))} ({len(data)} bytes), more than the limit of "
            f"{size(MAX_RESULT)} ({MAX_RESULT} bytes)"
        )
    may_be_deep = data.count(b"[") + data.count(b"{") > MAX_LEVELS
    if may_be_deep and _is_deep(decode(data) if value is None else value):
        return f"it is nested over {MAX_LEVELS} levels deep"
    if len(data) > MAX_DIGITS and _has_long_number(data):
        return f"it has a number of over {MAX_DIGITS} digits"
    return None


def why_no_result_value(value: object) -> str | None:
    """Why this value cannot be a result; None if it can. It was decoded from JSON, or from an
    extension of JSON."""
    try:
        data = _encode(value).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return f"it is not JSON: {shorten(str(error))}"
    return why_no_result(data, value)


def valid_measures(reported: object) -> list[object]:
    """The valid series among the metrics that a task reports."""
    found: list[object] = []
    if not reported or not isinstance(reported, list):
        return found
    left = MAX_MEASURES
    for each in reported[:MAX_SERIES]:
        series = _valid_series(each)
        if series is not None:
            left -= len(_encode(series))
            if left < 0:
                break
            found.append(series)
    return found


def shorten(text: str, limit: int = MAX_MESSAGE) -> str:
    """One line of text that can be stored. A file name that is not UTF-8 contains lone surrogates,
    which are escaped as in the streams of a task."""
    line = " ".join(text[: 64 * limit].split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def size(amount: int) -> str:
    """Bytes for people, rounded down: "512 MiB", "31.2 GiB"."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if amount >= unit:
            return f"{amount * 10 // unit / 10:g} {name}"
    return f"{amount} B"


def _check_result(record: ExitRecord | Outcome) -> None:
    _check_flag("has_result", record.has_result)
    if not record.has_result:
        record.result = None
        return
    why = why_no_result_value(record.result)
    if why is not None:
        record.result, record.has_result = None, False
        before = "" if record.message is None else f"{record.message}; "
        record.message = shorten(f"{before}{NOT_KEPT}: {why}")


def _valid_series(reported: object) -> list[object] | None:
    """One series in the format of `metrics.MetricsClient`; None if it is invalid."""
    if not isinstance(reported, list) or len(reported) != 4:
        return None
    kind, name, tags, values = reported
    if not isinstance(kind, str) or not isinstance(name, str) or not isinstance(tags, list):
        return None
    if not isinstance(values, list) or len(values) != _VALUES.get(kind, -1):
        return None
    if len(tags) > MAX_TAGS or not all(map(_is_tag, tags)) or not all(map(_is_finite, values)):
        return None
    found = [[shorten(key, MAX_NAME), shorten(value, MAX_NAME)] for key, value in tags]
    return [kind, shorten(name, MAX_NAME), found, values]


def _is_tag(reported: object) -> bool:
    return (
        isinstance(reported, list)
        and len(reported) == 2
        and all(isinstance(each, str) for each in reported)
    )


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and -_FINITE <= value <= _FINITE  # type: ignore[operator]  # a number, by its type


def _valid_import_times(reported: object) -> list[object] | None:
    if not isinstance(reported, list) or len(reported) != 2:
        return None
    took_s, names = reported
    if not isinstance(took_s, float) or not 0 <= took_s <= _MAX_LOAD_S:
        return None
    if not isinstance(names, list) or len(names) > MAX_HINTS:
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    return [took_s, [shorten(name, MAX_HINT) for name in names]]


def _check_identity(job_id: object, attempt: object) -> None:
    if not isinstance(job_id, str) or len(job_id) > MAX_ID:
        raise _invalid("job_id", job_id, "the id of a job")
    _check_whole("attempt", attempt, 0, _MAX_INT)


def _check_whole(name: str, value: object, minimum: int, maximum: int) -> None:
    if type(value) is not int or not minimum <= value <= maximum:  # True is no number here
        raise _invalid(name, value, f"a whole number from {minimum} to {maximum}")


def _check_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise _invalid(name, value, "true or false")


def _optional_text(name: str, value: object) -> str | None:
    return None if value is None else _checked_text(name, value, MAX_MESSAGE)


def _checked_text(name: str, value: object, maximum: int) -> str:
    if not isinstance(value, str):
        raise _invalid(name, value, "a text")
    return shorten(value, maximum)


def _checked_list(name: str, value: object, maximum: int) -> list[object]:
    if not isinstance(value, list) or len(value) > maximum:
        raise _invalid(name, value, f"a list of at most {maximum}")
    return value


def _at_most_now(ns: int) -> int:
    """Replace a time in the future by the current time: the job has forged it, or the clock was set
    back since. That must not lose a job which has ended."""
    now = _now_ns()
    return ns if ns <= now + _AHEAD_NS else now


def _invalid(name: str, value: object, allowed: str) -> Invalid:
    if isinstance(value, (str, int, float)):
        found = shorten(repr(value[:100] if isinstance(value, str) else value), 100)
    else:
        found = "null" if value is None else f"a {type(value).__name__}"
    return Invalid(f"{name} is {found}; it must be {allowed}")


def _has_long_number(data: bytes) -> bool:
    """Whether there is a number that Python refuses to parse by default."""
    if _NINES not in data.translate(_AS_NINES):
        return False
    lengths = [0]
    decode(data, parse_int=lambda text: lengths.append(len(text.lstrip("-"))))
    return max(lengths) > MAX_DIGITS


def _is_deep(value: object) -> bool:
    nested = [value]
    for _ in range(MAX_LEVELS):
        nested = [
            below
            for each in nested
            if isinstance(each, (dict, list))
            for below in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, (dict, list)) for each in nested)
