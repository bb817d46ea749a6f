"""Reads the `--config` of `cortex submit`: JSON from the command line or from a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cortex.cli.options import BadValue

if TYPE_CHECKING:
    from cortex.spec.job import Json

_MAX_BYTES = 10 << 20  # the operator's limit
_UTF_16_AND_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def read_config(given: str) -> Json:
    """The config of a job.

    Args:
        given: JSON, or @ and the name of a file that contains it.

    Raises:
        BadValue: it is not a JSON object, or the file cannot be read.
    """
    try:
        text = _text(given[1:]) if given.startswith("@") else given
        config: Json = json.loads(
            text.removeprefix("\ufeff"),
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError as error:
        raise _bad_config("it is nested too deeply; allowed: 250 levels") from error
    except json.JSONDecodeError as error:
        raise _bad_config(f"it is not JSON: {error}") from error
    except ValueError as error:
        raise _bad_config(str(error)) from error
    if not isinstance(config, dict):
        raise _bad_config("it must be a JSON object, as in '{\"C\": 0.5}'")
    return config


def _text(name: str) -> str:
    if not name:
        raise ValueError("the name of a file is missing after @")
    data = _bytes(name)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{name} is over {_MAX_BYTES >> 20} MiB, the limit of the operator")
    # Without a byte order mark, UTF-16 and UTF-32 text of JSON has zero bytes at its start.
    if data.startswith(_UTF_16_AND_32) or b"\0" in data[:4]:
        raise ValueError(f"{name} is text in UTF-16 or UTF-32; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not text in UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            "save it as UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{name} is empty; for a config without fields write {{}}")
    return text


def _bytes(name: str) -> bytes:
    try:
        with Path(name).expanduser().open("rb") as file:
            return file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except (RuntimeError, MemoryError) as error:  # no home folder for ~
        raise ValueError(f"{name} cannot be read: {error}") from error


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"it is not JSON: {constant} is not a number in JSON")


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:
        raise ValueError(f"a number has {len(digits)} digits, which is too many") from error


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return number


def _bad_config(message: str) -> BadValue:
    return BadValue(f"--config: {message}")
