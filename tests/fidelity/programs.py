"""Makes the rows of the tables of programs."""

from __future__ import annotations

from typing import Any

import pytest

from fidelity.harness import Program


def program(name: str, code: str, **about: Any) -> Any:
    """A row of a table: a parameter of a test, with the program's name for its id."""
    return pytest.param(Program(name, code, **about), id=name)
