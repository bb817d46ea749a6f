"""Libraries that `definition.preload` names, and that a fork server imports ahead.

The fork server checks the side effects of each import. A library is either harmless for the
jobs, or not imported ahead: in both cases a job agrees with plain Python.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fidelity.harness import Program, Runner
from fidelity.test_import_side_effects import SIDE_EFFECTS
from fidelity.test_imports import ORDER

CHANGED = {
    # The user's choice changes these: the modules are imported before the first line of the task's
    # file.
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
    # The modules store facts about the importing process, which the fork server cannot detect.
    "own-package-installed-for-development",
    "package-that-makes-an-id",
    "process-id-of-a-library",
    "fork-hooks",
}


def preloaded(rows: list[Any]) -> list[Any]:
    """The programs of another table, with all their libraries imported ahead, and two jobs each."""
    changed_rows = []
    for row in rows:
        program: Program = row.values[0]
        names = tuple(
            dict.fromkeys(name.partition("/")[0].removesuffix(".py") for name in program.libraries)
        )
        if names and program.name not in CHANGED:
            changed = replace(program, preload=names, jobs=max(2, program.jobs))
            changed_rows.append(pytest.param(changed, id=program.name))
    return changed_rows


@pytest.mark.parametrize("program", preloaded([*ORDER, *SIDE_EFFECTS]))
def test_preloaded_libraries_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
