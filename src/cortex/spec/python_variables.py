"""The environment variables of Python's own, as `definition.env` and `.env` may set them for a `path`: the
fork server is started with them, and each job is forked from it. Called by `spec.yaml` and `projects.check`.

A `command` gets all of them as they are written. docs/guide.md has the table.
"""

from __future__ import annotations

import re

from cortex.spec.yaml_lines import quoted

_REFUSED = {
    "PYTHONEXECUTABLE": (
        "it makes sys.executable another program, which multiprocessing would start; remove it"
    ),
    "PYTHONHOME": (
        "it takes the standard library from elsewhere, and the environment's Python would not start; "
        "name the version with python=… in conda-packages.txt"
    ),
    "PYTHONINSPECT": ("it waits at a prompt after the end, and a job has no terminal; remove it"),
    "PYTHONPLATLIBDIR": (
        "it takes packages from another folder than the environment's; use PYTHONPATH or "
        "definition.python_path"
    ),
}
# Python does not start with any other value. An empty value counts as unset.
_VALUES = {
    "PYTHONHASHSEED": ("random", range(1 << 32), "random, or a whole number from 0 to 4294967295"),
    "PYTHONINTMAXSTRDIGITS": (
        "0",
        range(640, 1 << 31),
        "0, or a whole number from 640 to 2147483647",
    ),
    "PYTHONMALLOC": (
        "default|debug|(malloc|pymalloc|mimalloc)(_debug)?",
        range(0),
        "default, debug, malloc, malloc_debug, pymalloc or pymalloc_debug",
    ),
    "PYTHONTRACEMALLOC": ("", range(1 << 16), "a number of frames, 65535 at most"),
    "PYTHONUTF8": ("[01]", range(0), "0 or 1"),
    "PYTHON_CPU_COUNT": ("default", range(1, 1 << 31), "default, or a whole number of 1 or more"),
    "PYTHON_FROZEN_MODULES": ("on|off", range(0), "on or off"),
    "PYTHON_GIL": ("1", range(0), "1 (0 is for a Python that was built without the lock)"),
}


def refusal(name: str, value: str) -> str | None:
    """Why a job that runs a Python file cannot have this variable with this value, or None."""
    if name in _REFUSED:
        return f"possible with a command alone, not with a path: {_REFUSED[name]}"
    if name == "PYTHONIOENCODING":
        allowed = "ENCODING, ENCODING:ERRORS or :ERRORS, such as utf-8:replace"
        is_allowed = _is_encoding(value.partition(":")[0])
    elif name in _VALUES:
        words, numbers, allowed = _VALUES[name]
        is_number = re.fullmatch(r"\d{1,10}", value, re.ASCII) and int(value) in numbers
        is_allowed = bool(is_number or re.fullmatch(words, value))
    else:
        return None
    return None if is_allowed or not value else f"found {quoted(value)}; allowed: {allowed}"


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name or "utf-8")
    except (LookupError, ValueError):
        return False
    return True
