"""The one check of what is told of a job, whichever way it comes: the outcome that its process writes, the records in
its folder, what is said through a socket, what another node tells. A job can write all of these itself.

What is wrong with the facts makes the whole of it invalid. A result that cannot be kept is left out, and the message
says why; texts are cut to a line that can be stored; counts and measures that are none are left out. So what passes
can be stored in any database and shown as strict JSON.
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

MOST_RESULT = 1 << 20
MOST_LEVELS = 250
"""As many as a config may have: whoever reads a result comes to the end of its stack at some more."""
MOST_DIGITS = 4300
MOST_MEASURES = 1 << 17
MOST_OUTCOME = MOST_RESULT + MOST_MEASURES + (1 << 16)
MOST_END = MOST_OUTCOME + (1 << 17)
"""Bytes of an exit record, which has hints and a message beside what the outcome has."""
MOST_MESSAGE = 500
MOST_HINTS, MOST_HINT = 20, 1000
MOST_SERIES, MOST_NAME, MOST_TAGS = 100, 500, 50
MOST_ID = 64
MOST_FILE = 1 << 60
"""No log gets as long, nor beyond it when the logs of several attempts become one."""
ENDINGS = frozenset({"exited", "out_of_memory", "timed_out", "stopped", "lost"})
NOT_KEPT = "the task's return value was not kept"

_MOST_INT, _MOST_LONG = (1 << 31) - 1, (1 << 63) - 1
_MOST_CODE, _MOST_SIGNAL, _MOST_ERRNO = 255, 64, 4095
_MOST_GPUS = 1024
_AHEAD_NS = 86_400 * 10**9
"""How far another machine's clock may be ahead of this one's."""
_MOST_LOAD_S = 1e6
_NINES, _AS_NINES = b"9" * (MOST_DIGITS + 1), bytes.maketrans(b"012345678", b"999999999")
_VALUES = {"counter": 1, "gauge": 1, "summary": 2}
_FINITE = 1.7976931348623157e308
_encode = json_encoder.encoder(allow_nan=False)
_loads, _now_ns = json.loads, time.time_ns
_modules, _JSON = sys.modules, {"json": json, "json.decoder": json.decoder}


class Invalid(ValueError):
    """It cannot be true, or be stored; the message names the field, what is there, and what can be."""


def decode(data: str | bytes, parse_int: Callable[[str], object] | None = None) -> object:
    """Decode JSON as `json.loads` does, also where a user's own `json` has replaced Python's.

    CPython's decoder gets its exception by the name `json.decoder`: 3.11 from `sys.modules`, 3.13 by an
    import, which would run the user's file in this process.

    Raises:
        ValueError: it is no JSON.
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


def start(record: StartRecord) -> None:
    """Check a start record.

    Raises:
        Invalid: it is none.
    """
    _of(record.job_id, record.attempt)
    _whole("v", record.v, 0, _MOST_INT)
    _flag("fenced", record.fenced)
    _whole("pid", record.pid, 0, _MOST_INT)
    _whole("ticks", record.ticks, 0, _MOST_LONG)
    _whole("start_ns", record.start_ns, 0, _MOST_LONG)
    record.start_ns = _past(record.start_ns)
    record.boot = _text("boot", record.boot, MOST_ID)
    for gpu in _list("gpus", record.gpus, _MOST_GPUS):
        _whole("gpus", gpu, 0, _MOST_INT)


def end(record: ExitRecord) -> None:
    """Check an exit record.

    Raises:
        Invalid: it is none.
    """
    _of(record.job_id, record.attempt)
    _whole("v", record.v, 0, _MOST_INT)
    if not isinstance(record.ending, str) or record.ending not in ENDINGS:
        raise _invalid("ending", record.ending, f"one of {', '.join(sorted(ENDINGS))}")
    _whole("exit_code", record.exit_code, -_MOST_SIGNAL, _MOST_CODE)
    _whole("start_ns", record.start_ns, 0, _MOST_LONG)
    _whole("end_ns", record.end_ns, record.start_ns, _MOST_LONG)
    record.start_ns, record.end_ns = _past(record.start_ns), _past(record.end_ns)
    record.message = _words("message", record.message)
    hints = _list("hints", record.hints, _MOST_INT)[:MOST_HINTS]
    record.hints = [_text("hints", each, MOST_HINT) for each in hints]
    _result(record)
    record.measures = measures(record.measures)


def reply(said: Reply) -> None:
    """Check what a fork server or a supervising process says, but for its record.

    Raises:
        Invalid: it says nothing that can be.
    """
    _of("" if said.job_id is None else said.job_id, said.attempt)
    _flag("recorded", said.recorded)
    _flag("ended", said.ended)
    _whole("pid", said.pid, 0, _MOST_INT)
    _whole("errno", said.errno, 0, _MOST_ERRNO)
    _whole("start_ns", said.start_ns, 0, _MOST_LONG)
    said.start_ns = _past(said.start_ns)
    said.error = _words("error", said.error)
    said.importing = _words("importing", said.importing)
    said.refused = _words("refused", said.refused)


def cut(record: LogCut) -> None:
    """Check what a log has lost.

    Raises:
        Invalid: it cannot be that.
    """
    _whole("start", record.start, 0, MOST_FILE)
    _whole("end", record.end, 0, MOST_FILE)
    _whole("limit", record.limit, 0, MOST_FILE)
    if record.start >= record.end:
        raise _invalid("end", record.end, f"after the start, which is {record.start}")


def outcome(said: Outcome) -> None:
    """Check what a job's process says of itself.

    Raises:
        Invalid: it says nothing that can be.
    """
    _flag("lost", said.lost)
    said.message = _words("message", said.message)
    _result(said)
    said.measures = measures(said.measures)
    said.loading = _loading(said.loading)


def unfit(data: bytes, value: object = None) -> str | None:
    """Why this JSON can be no result; None where it can.

    Args:
        value: what it says, where that is known.
    """
    if len(data) > MOST_RESULT:
        return f"it takes {len(data)} bytes, and {MOST_RESULT} is the most"
    may_be_deep = data.count(b"[") + data.count(b"{") > MOST_LEVELS
    if may_be_deep and _is_deep(decode(data) if value is None else value):
        return f"it is nested over {MOST_LEVELS} levels deep"
    if len(data) > MOST_DIGITS and _has_long_number(data):
        return f"it has a number of over {MOST_DIGITS} digits"
    return None


def unfit_value(value: object) -> str | None:
    """The same of what was read from JSON, or from what passes for it."""
    try:
        data = _encode(value).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return f"it is not JSON: {shorten(str(error))}"
    return unfit(data, value)


def measures(told: object) -> list[object]:
    """Of what a task says that it has counted and measured, what can be that."""
    found: list[object] = []
    if not told or not isinstance(told, list):
        return found
    left = MOST_MEASURES
    for each in told[:MOST_SERIES]:
        series = _series(each)
        if series is not None:
            left -= len(_encode(series))
            if left < 0:
                break
            found.append(series)
    return found


def shorten(text: str, limit: int = MOST_MESSAGE) -> str:
    """One line that can be stored: a name of a file that is not UTF-8 has half characters in it, which are
    written as the streams of a task write them."""
    line = " ".join(text[: 64 * limit].split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _result(record: ExitRecord | Outcome) -> None:
    _flag("has_result", record.has_result)
    if not record.has_result:
        record.result = None
        return
    why = unfit_value(record.result)
    if why is not None:
        record.result, record.has_result = None, False
        before = "" if record.message is None else f"{record.message}; "
        record.message = shorten(f"{before}{NOT_KEPT}: {why}")


def _series(told: object) -> list[object] | None:
    """As `measures.MetricsClient` tells one."""
    if not isinstance(told, list) or len(told) != 4:
        return None
    kind, name, tags, values = told
    if not isinstance(kind, str) or not isinstance(name, str) or not isinstance(tags, list):
        return None
    if not isinstance(values, list) or len(values) != _VALUES.get(kind, -1):
        return None
    if len(tags) > MOST_TAGS or not all(map(_is_tag, tags)) or not all(map(_is_finite, values)):
        return None
    found = [[shorten(key, MOST_NAME), shorten(value, MOST_NAME)] for key, value in tags]
    return [kind, shorten(name, MOST_NAME), found, values]


def _is_tag(told: object) -> bool:
    return isinstance(told, list) and len(told) == 2 and all(isinstance(each, str) for each in told)


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and -_FINITE <= value <= _FINITE  # type: ignore[operator]  # it is a number


def _loading(told: object) -> list[object] | None:
    if not isinstance(told, list) or len(told) != 2:
        return None
    took_s, names = told
    if not isinstance(took_s, float) or not 0 <= took_s <= _MOST_LOAD_S:
        return None
    if not isinstance(names, list) or len(names) > MOST_HINTS:
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    return [took_s, [shorten(name, MOST_HINT) for name in names]]


def _of(job_id: object, attempt: object) -> None:
    if not isinstance(job_id, str) or len(job_id) > MOST_ID:
        raise _invalid("job_id", job_id, "the id of a job")
    _whole("attempt", attempt, 0, _MOST_INT)


def _whole(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:  # True is no number here
        raise _invalid(name, value, f"a whole number from {least} to {most}")


def _flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise _invalid(name, value, "true or false")


def _words(name: str, value: object) -> str | None:
    return None if value is None else _text(name, value, MOST_MESSAGE)


def _text(name: str, value: object, most: int) -> str:
    if not isinstance(value, str):
        raise _invalid(name, value, "a text")
    return shorten(value, most)


def _list(name: str, value: object, most: int) -> list[object]:
    if not isinstance(value, list) or len(value) > most:
        raise _invalid(name, value, f"a list of {most} at the most")
    return value


def _past(ns: int) -> int:
    """What lies in the future is taken for now: the job has said so itself, or the clock was set back since. That
    must not lose a job which has ended."""
    now = _now_ns()
    return ns if ns <= now + _AHEAD_NS else now


def _invalid(name: str, value: object, wanted: str) -> Invalid:
    if isinstance(value, (str, int, float)):
        found = shorten(repr(value[:100] if isinstance(value, str) else value), 100)
    else:
        found = "null" if value is None else f"a {type(value).__name__}"
    return Invalid(f"{name} is {found}, and has to be {wanted}")


def _has_long_number(data: bytes) -> bool:
    """Python reads no such number, unless it is told to."""
    if _NINES not in data.translate(_AS_NINES):
        return False
    lengths = [0]
    decode(data, parse_int=lambda text: lengths.append(len(text.lstrip("-"))))
    return max(lengths) > MOST_DIGITS


def _is_deep(value: object) -> bool:
    held = [value]
    for _ in range(MOST_LEVELS):
        held = [
            below
            for each in held
            if isinstance(each, (dict, list))
            for below in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, (dict, list)) for each in held)
