"""The documentation agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cortex import errors
from cortex.operator.dispatch.live_jobs import LiveJob
from cortex.operator.metrics import Metrics
from cortex.projects.requirements import MIN_PYTHON
from cortex.spec import python_variables
from cortex.spec.job import JobRecord, JobSpec
from cortex.spec.lifecycle import State, Status, Wanted
from cortex.spec.python_variables import refusal

ROOT = Path(__file__).parents[2]
SPEC = JobSpec(job_id="1", api_name="a", api_id="1", config="{}", created_ns=1)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_has_a_target(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_path_that_a_page_for_contributors_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`([\w./-]+/|[\w./-]+\.(?:py|md|toml|yaml))`", text)
    paths = {path for path in named if path not in ("cortex.yaml", "src/")}
    assert len(paths) > 15
    roots = [ROOT, ROOT / "src", ROOT / "src" / "cortex"]
    missing = {path for path in paths if not any((root / path).exists() for root in roots)}
    assert missing == set()


def test_every_status_and_error_is_documented() -> None:
    text = (ROOT / "docs" / "http.md").read_text()
    served = [
        c.kind
        for c in errors._tree(errors.CortexError)
        if not c.kind.startswith(("client.", "operator.", "internal"))
    ]
    for word in [*Status, *served]:
        assert f"`{word}`" in text, word


def test_the_docstring_of_the_errors_shows_the_whole_tree() -> None:
    def lines(error: type[errors.CortexError], depth: int = 0) -> list[str]:
        children = [c for c in error.__subclasses__() if c.__module__ == errors.__name__]
        below = [line for child in children for line in lines(child, depth + 1)]
        return [f"{'  ' * depth}- {error.__name__}", *below]

    shown = [line for line in (errors.__doc__ or "").splitlines() if line.lstrip().startswith("- ")]
    assert shown == lines(errors.CortexError)


def test_every_metric_is_documented_and_no_other() -> None:
    record = JobRecord(1, SPEC, State.WAITING, Wanted.RUN, attempt=0, handle=None)
    live = [LiveJob(record, lambda _: None)]
    text = Metrics().text("local", live, []).decode()
    exported = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE cortex")}
    page = (ROOT / "docs" / "monitoring.md").read_text()
    table = page[page.index("| metric |") : page.index("Scrape each")]
    assert set(re.findall(r"`(cortex_\w+)`", table)) == exported


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_every_promise_names_a_test_that_exists(page: str) -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs" / page).read_text())
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), test


def test_every_variable_that_a_deploy_refuses_is_documented() -> None:
    text = (ROOT / "docs" / "guide.md").read_text()
    table = text[
        text.index("### Variables of Python's own") : text.index("### What a deploy checks")
    ]
    by_treatment: dict[str, set[str]] = {}
    for names, treatment in re.findall(r"^\| (`PYTHON[^|]*) \| ([^|]*) \|", table, re.MULTILINE):
        by_treatment.setdefault(treatment, set()).update(re.findall(r"`(\w+)`", names))
    refused = {name for name in by_treatment["refused"] if refusal(name, "1") is not None}
    assert refused == by_treatment["refused"] == set(python_variables._REFUSED)
    checked = {*python_variables._VALUES, "PYTHONIOENCODING"}
    assert checked <= by_treatment["honoured"]
    others = (by_treatment["honoured"] | by_treatment["no effect"]) - checked
    assert {name for name in others if refusal(name, "odd") is not None} == set()


def test_every_variable_of_pythons_own_help_is_documented() -> None:
    text = (ROOT / "docs" / "guide.md").read_text()
    command = [sys.executable, "--help-env"]
    help_text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = re.findall(r"^(PYTHON\w+)", help_text, re.MULTILINE)
    assert len(names) > 20
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_minimum_python_is_documented() -> None:
    assert f"Jobs run on Python {MIN_PYTHON} or later" in (ROOT / "docs" / "guide.md").read_text()
