"""Libraries that a fork server imports ahead, since definition.preload names them. What a library makes at its import is
checked: it is either harmless for the jobs, or not imported ahead; in both cases a job comes to what plain Python does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fidelity.harness import Program, Runner
from fidelity.test_imports import ORDER
from fidelity.test_made_at_import import MADE_AT_IMPORT

CHANGED = {
    # What a user changes by asking for it: the modules are imported before the first line of the task's file.
    "environment-before-an-import",
    "environment-by-setdefault-in-another-module",
    "environment-by-putenv",
    "vendored-before-installed",
    "path-replaced",
    "module-forbidden",
    "standard-module-patched-before",
    "conditional",
    "for-type-checkers",
    "in-the-task",
    "lazy-loader",
    "warnings-at-import",
    # What a module keeps of the process that imports it, and nobody can see from outside.
    "own-package-installed-for-development",
    "package-that-makes-an-id",
    "process-id-of-a-library",
    "fork-hooks",
}


def preloaded(rows: list[Any]) -> list[Any]:
    """The programs of another table, with all their libraries imported ahead, and two jobs for each."""
    found = []
    for row in rows:
        program: Program = row.values[0]
        names = tuple(
            dict.fromkeys(name.partition("/")[0].removesuffix(".py") for name in program.libraries)
        )
        if names and program.name not in CHANGED:
            changed = replace(program, preload=names, jobs=max(2, program.jobs))
            found.append(pytest.param(changed, id=program.name))
    return found


@pytest.mark.parametrize("program", preloaded([*ORDER, *MADE_AT_IMPORT]))
def test_a_library_imported_ahead(program: Program, runner: Runner) -> None:
    runner.check(program)
