"""Packing a project as a user to whom its files are closed: root can read every file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from cortex.errors import InvalidProject
from cortex.projects.ignored import IGNORE_FILE
from cortex.projects.pack import pack
from operator_harness import as_unprivileged_owner


def test_an_ignore_file_that_cannot_be_read_is_named() -> None:
    def close_to_all(own: Path) -> None:
        (own / IGNORE_FILE).write_text("x")
        (own / IGNORE_FILE).chmod(0)

    def is_named(own: Path) -> bool:
        with pytest.raises(InvalidProject) as error:
            pack(own, io.BytesIO())
        return error.value.message == f"{own / IGNORE_FILE}: Permission denied"

    assert as_unprivileged_owner(close_to_all, is_named)
