"""Checks a command whose program or script is a file of the project. Called by `check`.

The results are warnings: only the job's machine decides whether a program runs.
"""

from __future__ import annotations

import os
import posixpath
import shutil
from collections.abc import Iterator
from pathlib import Path

from cortex.spec.yaml_lines import quoted
from cortex.worker.job import exec_errors

_SHELLS = {"sh", "bash", "dash", "ksh", "zsh"}
_MAX_SCRIPT_BYTES = 1 << 20
_MAX_NAME_BYTES = 255


def command_warnings(project: Path, command: list[str]) -> Iterator[str]:
    """The reasons why a command would probably fail to start."""
    program = command[0]
    file = _inside(project, program)
    if "/" not in program:
        is_in_project = file is not None and file.is_file()
        if (is_in_project or len(program.split()) > 1) and shutil.which(program) is None:
            yield _warning(program, exec_errors.not_found(program, is_in_project))
    elif file is not None:
        exists = file.exists()
        reason = (
            exec_errors.file_problem(str(file))
            if exists
            else exec_errors.not_found(program, exists)
        )
        if reason is not None:
            yield _warning(program, reason)
    if program.rpartition("/")[2] in _SHELLS:
        yield from _script_warnings(project, command[1:])


def _script_warnings(project: Path, arguments: list[str]) -> Iterator[str]:
    """The warnings about the script that a shell gets as its first argument."""
    name = next((each for each in arguments if not each.startswith(("-", "+"))), None)
    file = None if name is None or "-c" in arguments else _inside(project, name)
    if (
        name is None
        or file is None
        or not file.is_file()
        or file.stat().st_size > _MAX_SCRIPT_BYTES
    ):
        return
    if b"\r\n" in file.read_bytes():
        yield (
            f"definition.command: {quoted(name)} has Windows line endings, which a shell reads "
            f"as part of each command; save it with Unix line endings, as dos2unix {name} does"
        )


def _inside(project: Path, name: str) -> Path | None:
    """A path in the project; None for a path outside, and for a name that is too long for a
    file."""
    normal = posixpath.normpath(name)
    is_too_long = len(os.fsencode(name)) > _MAX_NAME_BYTES
    return None if is_too_long or normal.startswith(("/", "..")) else project / normal


def _warning(program: str, reason: str) -> str:
    return f"definition.command: {quoted(program)} would not run: {reason}"
