"""A deploy refuses the values of Python's own variables with which Python does not start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cortex.spec.python_variables import refusal


@pytest.mark.parametrize(
    ("name", "refused", "allowed"),
    [
        ("PYTHONHASHSEED", ["x", "-1", "4294967296"], ["random", "0", "007", "4294967295", ""]),
        ("PYTHONINTMAXSTRDIGITS", ["x", "5", "2147483648"], ["0", "640", "2147483647", ""]),
        ("PYTHONIOENCODING", ["x", "rot13"], ["utf-16", "latin-1:replace", ":strict", "utf8:", ""]),
        ("PYTHONMALLOC", ["x", "debug_malloc"], ["debug", "malloc_debug", "pymalloc", ""]),
        ("PYTHONTRACEMALLOC", ["x", "-1", "65536"], ["0", "25", "65535", ""]),
        ("PYTHONUTF8", ["x", "2"], ["0", "1", ""]),
    ],
)
def test_exactly_the_values_with_which_python_does_not_start_are_refused(
    name: str, refused: list[str], allowed: list[str]
) -> None:
    def starts(value: str) -> bool:
        command = [sys.executable, "-c", ""]
        done = subprocess.run(command, check=False, env={name: value}, capture_output=True)
        return done.returncode == 0

    assert [starts(value) for value in refused] == [False] * len(refused)
    assert [starts(value) for value in allowed] == [True] * len(allowed)
    for value in refused:
        assert (refusal(name, value) or "").startswith(f'found "{value}"; allowed: ')
    assert [refusal(name, value) for value in allowed] == [None] * len(allowed)
