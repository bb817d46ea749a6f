"""Python's own environment variables, as `definition.env` and `.env` may set them for a `path`.

The fork server starts with them, and each job is forked from it. Called by `spec.cortex_yaml` and
`projects.check`. A `command` gets all of them as written. docs/guide.md has the table.
"""

from __future__ import annotations

import re

from cortex.spec.yaml_lines import quoted

_REFUSED = {
    "PYTHONEXECUTABLE": (
        "it changes sys.executable, the program that multiprocessing starts; remove it"
    ),
    "PYTHONHOME": (
        "it changes the path of the standard library, so the environment's Python would not start; "
        "choose a Python version with python=… in conda-packages.txt"
    ),
    "PYTHONINSPECT": "it opens a prompt at the program's end, but jobs have no terminal; remove it",
    "PYTHONPLATLIBDIR": (
        "it changes the folder that packages are imported from; use PYTHONPATH or "
        "definition.python_path"
    ),
}
# Python does not start with any other value; it ignores an empty value.
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
    "PYTHONTRACEMALLOC": ("", range(1 << 16), "a number of frames, at most 65535"),
    "PYTHONUTF8": ("[01]", range(0), "0 or 1"),
    "PYTHON_CPU_COUNT": ("default", range(1, 1 << 31), "default, or a whole number of 1 or more"),
    "PYTHON_FROZEN_MODULES": ("on|off", range(0), "on or off"),
    "PYTHON_GIL": ("1", range(0), "1 (0 needs a free-threaded build of Python)"),
}


def refusal(name: str, value: str) -> str | None:
    """Why a job of a Python file cannot have this variable with this value; None if it can."""
    if name in _REFUSED:
        return f"allowed only with a command, not with a path: {_REFUSED[name]}"
    if name == "PYTHONIOENCODING":
        allowed = "ENCODING, ENCODING:ERRORS or :ERRORS, such as utf-8:replace"
        is_allowed = _is_encoding(value.partition(":")[0])
    elif name in _VALUES:
        pattern, numbers, allowed = _VALUES[name]
        is_number = re.fullmatch(r"\d{1,10}", value, re.ASCII) and int(value) in numbers
        is_allowed = bool(is_number or re.fullmatch(pattern, value))
    else:
        return None
    return None if is_allowed or not value else f"found {quoted(value)}; allowed: {allowed}"


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name or "utf-8")
    except (LookupError, ValueError):
        return False
    return True
