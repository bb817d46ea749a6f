"""A project's `.env`: the environment variables that its jobs get."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from dotenv.parser import Binding, parse_stream

from cortex.errors import InvalidProject
from cortex.spec import python_variables
from cortex.spec.yaml_fields import ENV_NAME, RESERVED_ENV

FILE = ".env"


def variables(project: Path) -> dict[str, str]:
    """The variables of `.env`, as they are written: `$NAME` in a value is no reference.

    Raises:
        InvalidProject: the file is not text.
    """
    found = _bindings(project)
    return {b.key: b.value for b in found if b.key is not None and b.value is not None}


def check_variables(project: Path, *, has_path: bool = False) -> list[str]:
    """The mistakes in `.env`, each with its line.

    Args:
        has_path: whether jobs run a Python file, which cannot have every variable of Python's own.
    """
    try:
        bindings = _bindings(project)
        return [told for binding in bindings for told in _mistakes(binding, has_path=has_path)]
    except InvalidProject as error:
        return [error.message]


def _bindings(project: Path) -> list[Binding]:
    file = project / FILE
    if not file.is_file():
        return []
    try:
        return list(parse_stream(io.StringIO(file.read_text("utf-8-sig"))))
    except UnicodeDecodeError as error:
        raise InvalidProject(f"{FILE}: not UTF-8 text; save it as UTF-8") from error


def _mistakes(binding: Binding, *, has_path: bool) -> Iterator[str]:
    # A binding begins with the blank lines before it.
    text = binding.original.string
    blank = text[: len(text) - len(text.lstrip())].count("\n")
    place = f"{FILE}:{binding.original.line + blank}"
    if binding.error:
        # The value may be a secret, and is not shown.
        yield f"{place}: cannot be read; allowed: NAME=value, one to a line"
    elif binding.key is None:
        return
    elif binding.value is None:
        # It may be a line of a secret that goes over several, such as a key in PEM, and is not shown.
        yield f"{place}: is no NAME=value; put a value of several lines in quotes"
    elif not ENV_NAME.fullmatch(binding.key):
        allowed = "letters, digits and _, the first not a digit"
        yield f'{place}: found the name "{binding.key[:60]}"; allowed: {allowed}'
    elif binding.key.startswith(RESERVED_ENV):
        yield f"{place}: {binding.key}: names that start with {RESERVED_ENV} are reserved"
    elif "\0" in binding.value:
        yield f"{place}: {binding.key}: holds a NUL character"
    elif has_path and (refusal := python_variables.refusal(binding.key, binding.value)):
        yield f"{place}: {binding.key}: {refusal}"
