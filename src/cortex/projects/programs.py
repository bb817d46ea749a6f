"""The checks of a command whose program or script lies in the project. Called by `check`.

Their results are warnings: only the machine of the job decides whether a program runs.
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
_LARGEST = 1 << 20
_LONGEST = 255


def doubts(project: Path, command: list[str]) -> Iterator[str]:
    """The reasons why a command would probably not run."""
    program = command[0]
    file = _inside(project, program)
    if "/" not in program:
        is_in_project = file is not None and file.is_file()
        if (is_in_project or len(program.split()) > 1) and shutil.which(program) is None:
            yield _told(program, exec_errors.not_found(program, is_in_project))
    elif file is not None:
        is_there = file.exists()
        words = (
            exec_errors.file_problem(str(file))
            if is_there
            else exec_errors.not_found(program, is_there)
        )
        if words is not None:
            yield _told(program, words)
    if program.rpartition("/")[2] in _SHELLS:
        yield from _script(project, command[1:])


def _script(project: Path, arguments: list[str]) -> Iterator[str]:
    """The check of the script that a shell gets as its first argument."""
    name = next((each for each in arguments if not each.startswith(("-", "+"))), None)
    file = None if name is None or "-c" in arguments else _inside(project, name)
    if name is None or file is None or not file.is_file() or file.stat().st_size > _LARGEST:
        return
    if b"\r\n" in file.read_bytes():
        yield (
            f"definition.command: {quoted(name)} has the line ends of Windows, which a shell takes for "
            f"a part of its commands; save it with those of Unix, as dos2unix {name} does"
        )


def _inside(project: Path, name: str) -> Path | None:
    """A path in the project; None for a path outside, and for a name that no file can have."""
    normal = posixpath.normpath(name)
    is_long = len(os.fsencode(name)) > _LONGEST
    return None if is_long or normal.startswith(("/", "..")) else project / normal


def _told(program: str, words: str) -> str:
    return f"definition.command: {quoted(program)} would not run: {words}"
