"""`--config` of a submit: JSON from the command line, or from a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cortex.cli.options import BadValue

if TYPE_CHECKING:
    from cortex.spec.job import Json

_MAX_BYTES = 10 << 20  # as the operator takes
_UTF_16_AND_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def read(given: str) -> Json:
    """The config of a job.

    Args:
        given: JSON, or @ and the name of a file that holds it.

    Raises:
        BadValue: it is no JSON object, or the file cannot be read.
    """
    try:
        text = _text(given[1:]) if given.startswith("@") else given
        config: Json = json.loads(
            text.removeprefix("\ufeff"),
            parse_constant=_refuse,
            parse_int=_integer,
            parse_float=_float,
        )
    except RecursionError as error:
        raise _mistake("it is nested too deeply; the operator takes 250 levels") from error
    except json.JSONDecodeError as error:
        raise _mistake(f"it is no JSON: {error}") from error
    except ValueError as error:
        raise _mistake(str(error)) from error
    if not isinstance(config, dict):
        raise _mistake("it must be a JSON object, as in '{\"C\": 0.5}'")
    return config


def _text(name: str) -> str:
    if not name:
        raise ValueError("the name of a file is missing after @")
    data = _bytes(name)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{name} is over {_MAX_BYTES >> 20} MiB, the most that an operator takes")
    # Without a mark, every second byte of it is zero.
    if data.startswith(_UTF_16_AND_32) or b"\0" in data[:4]:
        raise ValueError(f"{name} is text in UTF-16 or UTF-32; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not text in UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{name} is empty; a config without fields is {{}}")
    return text


def _bytes(name: str) -> bytes:
    try:
        with Path(name).expanduser().open("rb") as file:
            return file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except (RuntimeError, MemoryError) as error:  # no home folder for ~
        raise ValueError(f"{name} cannot be read: {error}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it is no JSON: {constant} is no number there")


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:
        raise ValueError(f"a number has {len(digits)} digits, which is too long") from error


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return number


def _mistake(message: str) -> BadValue:
    return BadValue(f"--config: {message}")
