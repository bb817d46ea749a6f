"""A project's `.env`: environment variables for its jobs. Called by `check` and by the operator's
versions.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from dotenv.parser import Binding, parse_stream

from cortex.errors import InvalidProject
from cortex.spec import python_variables
from cortex.spec.yaml_fields import ENV_NAME, RESERVED_ENV

FILE = ".env"


def read_variables(project: Path) -> dict[str, str]:
    """The variables of `.env`. Their values are literal: `$NAME` in a value is not expanded.

    Raises:
        InvalidProject: the file is not text.
    """
    bindings = _bindings(project)
    return {b.key: b.value for b in bindings if b.key is not None and b.value is not None}


def check_variables(project: Path, *, has_path: bool = False) -> list[str]:
    """The errors in `.env`, each with its line.

    Args:
        has_path: whether jobs run a Python file, which does not support all of Python's own
            variables.
    """
    try:
        bindings = _bindings(project)
        return [error for binding in bindings for error in _errors(binding, has_path=has_path)]
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


def _errors(binding: Binding, *, has_path: bool) -> Iterator[str]:
    # A binding starts with the blank lines before it.
    text = binding.original.string
    blank = text[: len(text) - len(text.lstrip())].count("\n")
    position = f"{FILE}:{binding.original.line + blank}"
    if binding.error:
        # The value may be a secret, so the message does not contain it.
        yield f"{position}: cannot be read; allowed: NAME=value, one per line"
    elif binding.key is None:
        return
    elif binding.value is None:
        # The line may be part of a secret of several lines, such as a key in PEM, so it is not
        # shown either.
        yield f"{position}: is not NAME=value; put a value of several lines in quotes"
    elif not ENV_NAME.fullmatch(binding.key):
        allowed = "letters, digits and _, the first not a digit"
        yield f'{position}: found the name "{binding.key[:60]}"; allowed: {allowed}'
    elif binding.key.startswith(RESERVED_ENV):
        reserved = f"names that start with {RESERVED_ENV} are reserved; choose another"
        yield f"{position}: {binding.key}: {reserved}"
    elif "\0" in binding.value:
        yield f"{position}: {binding.key}: the value contains a NUL character; remove it"
    elif has_path and (refusal := python_variables.refusal(binding.key, binding.value)):
        yield f"{position}: {binding.key}: {refusal}"
