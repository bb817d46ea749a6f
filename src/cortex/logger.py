"""Structured logs for tasks: `from cortex.logger import logger`.

The logger writes one line of strict JSON per record to standard output, which is the log inside a
job. It also works outside a job. No value in a record can make it fail. Standard library alone: it
runs in the user's environment.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_LEVELS = 100
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OURS = frozenset({
    "timestamp", "level", "message", "api_name", "job_id", "exc_info", "stack_info", "logging_error"
})  # fmt: skip


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": _rfc3339(record.created),
            "level": record.levelname.lower(),
            **_message(record),
            # Read for each record: a fork server imports this module once for many jobs.
            "api_name": os.environ.get("CORTEX_API_NAME"),
            "job_id": os.environ.get("CORTEX_JOB_ID"),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD:
                line[f"extra_{key}" if key in _OURS else key] = value
        if record.exc_info:
            line["exc_info"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack_info"] = record.stack_info
        plain = {_key(key): _plain(value) for key, value in line.items()}
        return json.dumps(plain, allow_nan=False)


class _Stdout(logging.Handler):
    """Writes to the standard output of the moment, not of the import."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001, RUF100  # logging must not fail a task
            line = _minimal_line(record, error)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.write(f"{line}\n")
                stream.flush()
            except Exception:  # noqa: BLE001, RUF100  # the task has closed stdout: stderr is the same log
                continue
            return


def _message(record: logging.LogRecord) -> dict[str, object]:
    try:
        return {"message": record.getMessage()}
    except Exception as error:  # noqa: BLE001, RUF100  # arguments that do not fit, a __str__ that raises
        return {
            "message": _to_str(record.msg),
            "args": record.args,
            "logging_error": f"{type(error).__name__}: {_to_str(error)}",
        }


def _minimal_line(record: logging.LogRecord, error: Exception) -> str:
    return json.dumps(
        {
            "timestamp": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "message": _text(_to_str(record.msg)),
            "logging_error": _text(f"{type(error).__name__}: {_to_str(error)}"),
        }
    )


def _plain(value: object, above: tuple[int, ...] = ()) -> object:
    """A value as strict JSON allows it. A value that JSON cannot express becomes a string.

    Args:
        above: the ids of the containers around this value.
    """
    try:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return _container(value, above)
        for kind, convert in _CONVERSIONS:
            if isinstance(value, kind):
                return convert(value)
        # A scalar of numpy, or of a library with the same interface.
        if getattr(value, "ndim", None) == 0:
            return _plain(value.item(), above)  # type: ignore[attr-defined]  # without `item`, its str is used
    except Exception:  # noqa: BLE001, RUF100  # it runs code of the user
        pass
    return _text(_to_str(value))


def _container(
    value: dict[object, object]
    | list[object]
    | tuple[object, ...]
    | set[object]
    | frozenset[object],
    above: tuple[int, ...],
) -> object:
    if id(value) in above or len(above) == MAX_LEVELS:
        return "..."
    inside = (*above, id(value))
    if isinstance(value, dict):
        return {_key(key): _plain(below, inside) for key, below in list(value.items())}
    return [_plain(below, inside) for below in list(value)]


def _key(key: object) -> str:
    if key is None or isinstance(key, (str, bool, int, float)):
        plain = _plain(key)
        return plain if isinstance(plain, str) else json.dumps(plain)
    return _text(_to_str(key))


def _text(text: str) -> str:
    """Escape lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def _integer(value: int) -> object:
    try:
        int.__repr__(value)
    except ValueError:  # more digits than `sys.set_int_max_str_digits` allows
        return hex(value)
    return int(value)


def _float(value: float) -> object:
    return _NO_NUMBERS.get(float.__repr__(value), float(value))


def _bytes(value: bytes | bytearray) -> str:
    return value.decode("utf-8", "backslashreplace")


_NO_NUMBERS: dict[str, object] = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_CONVERSIONS: tuple[tuple[Any, Callable[[Any], object]], ...] = (
    (str, _text),
    (int, _integer),
    (float, _float),
    ((bytes, bytearray), _bytes),
)


def _to_str(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001, RUF100  # a __str__ of the user
        return f"<{type(value).__name__}, which cannot be shown>"


def _rfc3339(seconds: float) -> str:
    micros = round(seconds * 1_000_000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(micros // 1_000_000))
    return f"{whole}.{micros % 1_000_000:06d}Z"


def _configure() -> logging.Logger:
    found = logging.getLogger("cortex")
    found.propagate = False
    level = logging.getLevelName(os.environ.get("CORTEX_LOG_LEVEL", "info").upper())
    found.setLevel(level if isinstance(level, int) else logging.INFO)
    if not any(isinstance(h, _Stdout) for h in found.handlers):
        handler = _Stdout()
        handler.setFormatter(_JsonLines())
        found.addHandler(handler)
        _accept_any_extra(found)
    return found


def _accept_any_extra(found: logging.Logger) -> None:
    """Accept any `extra`. Python's own loggers raise a KeyError if `extra` has a key that is an
    attribute of the record, such as `name` or `args`."""
    made = found.makeRecord

    def make_record(*arguments: Any, extra: object = None, **named: Any) -> logging.LogRecord:
        # `Logger._log` passes extra as the ninth argument.
        given = list(arguments)
        if len(given) > 8:
            extra = given[8]
            given[8] = None
        record = made(*given, **named)
        fields = extra if isinstance(extra, dict) else {} if extra is None else {"extra": extra}
        for key, value in fields.items():
            vars(record)[f"extra_{key}" if key in _STANDARD else key] = value
        return record

    found.makeRecord = make_record  # type: ignore[method-assign]  # of this one logger


logger = _configure()
