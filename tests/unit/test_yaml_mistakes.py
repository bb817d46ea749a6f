"""Every kind of mistake at every level of a `cortex.yaml` and of an operator's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from cortex.errors import InvalidSpec, StartupError
from cortex.operator.config.sources import load
from cortex.spec.api import Api, Compute, Definition
from cortex.spec.cortex_yaml import read_apis

SECTIONS = {
    "definition": "path, command, config, python_path, env, log_level, preload, dependencies",
    "definition.dependencies": "pip, conda, shell",
    "networking": "endpoint",
    "compute": "cpu, mem, gpu, node_labels",
    "limits": "max_running, max_waiting, log, checkpoint",
}
# One value of each kind, with its description in a message.
KINDS = {
    "number": ("-7.5", "-7.5"),
    "string": ('"a b"', '"a b"'),
    "boolean": ("true", "true"),
    "list": ("[{}]", "a list"),
    "object": ("{a: 1}", "an object"),
    "date": ("2020-01-01", "a date (2020-01-01)"),
    "tag": ("!x y", "a tag (!x)"),
}
# The kinds that each field may have.
FIELDS = {
    "name": {"string"},
    "kind": {"string"},
    "definition.path": {"string"},
    "definition.command": {"list"},
    "definition.config": {"object"},
    "definition.python_path": {"string"},
    "definition.log_level": {"string"},
    "definition.preload": {"list"},
    "definition.dependencies.pip": {"string"},
    "definition.dependencies.conda": {"string"},
    "definition.dependencies.shell": {"string"},
    "networking.endpoint": {"string"},
    "compute.cpu": {"number", "string"},
    "compute.mem": {"number", "string"},
    "compute.gpu": {"number"},
    "compute.node_labels": {"object"},
    "limits.max_running": {"number"},
    "limits.max_waiting": {"number"},
    "limits.log": {"number", "string"},
    "limits.checkpoint": {"number", "string"},
    "retries": {"number"},
}
CORRECT = {"name": "iris", "kind": "TaskAPI", "definition": "{path: a.py}"}
HUGE = ["1e30", "9" * 30, "9" * 5000, "1e400", "0x" + "f" * 40]


def mistakes_in_spec(text: str) -> list[str]:
    with pytest.raises(InvalidSpec) as raised:
        read_apis(text, "f")
    return [line.removeprefix("f:") for line in raised.value.message.split("\n")]


def api(field: str, value: str) -> str:
    """A `cortex.yaml` whose last line has this field; its other fields are correct."""
    *sections, name = field.split(".")
    top = field.partition(".")[0]
    lines = [f"  {key}: {content}" for key, content in CORRECT.items() if key != top]
    for depth, section in enumerate(sections, 1):
        lines.append("  " * depth + f"{section}:")
        if section == "definition" and name not in ("path", "command"):
            lines.append("    path: a.py")
    lines.append("  " * (len(sections) + 1) + f"{name}: {value}")
    return "-" + "\n".join(lines)[1:] + "\n"


def last_line(text: str) -> int:
    return text.count("\n")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "object"])
@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_of_another_type_is_reported_with_its_fields(section: str, kind: str) -> None:
    value, shown = KINDS[kind]
    text = api(section, value)
    assert mistakes_in_spec(text) == [
        f"{last_line(text)}: {section}: found {shown}; "
        f"allowed: an object with the fields {SECTIONS[section]}"
    ]


@pytest.mark.parametrize(
    ("field", "kind"),
    [(field, kind) for field in FIELDS for kind in KINDS if kind not in FIELDS[field]],
)
def test_a_value_of_another_type_is_reported_with_its_line_and_what_is_allowed(
    field: str, kind: str
) -> None:
    value, shown = KINDS[kind]
    text = api(field, value)
    (line,) = mistakes_in_spec(text)
    assert line.startswith(f"{last_line(text)}: {field}: found {shown}; allowed: ")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "object"])
def test_an_env_of_another_type_is_reported_without_its_value(kind: str) -> None:
    value, shown = KINDS[kind]
    text = api("definition.env", value)
    described = {"number": "a number", "string": "a string"}.get(kind, shown.partition(" (")[0])
    assert mistakes_in_spec(text) == [
        f"{last_line(text)}: definition.env: found {described}; "
        "allowed: an object of names and strings"
    ]


@pytest.mark.parametrize("null", ["", "~", "null"])
@pytest.mark.parametrize("field", [*FIELDS, *SECTIONS, "definition.env"])
def test_null_is_the_default_but_not_for_a_required_field(field: str, null: str) -> None:
    text = api(field, null)
    if field in ("name", "kind", "definition"):
        (line,) = mistakes_in_spec(text)
        assert line.startswith(f"{last_line(text)}: {field}: found nothing; allowed: ")
    elif field in ("definition.path", "definition.command"):
        (line,) = mistakes_in_spec(text)
        assert line.endswith("definition: found neither; allowed: exactly one of path and command")
    else:
        assert read_apis(text, "f") == read_apis(api("retries", "0"), "f")


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("knid", "kind"),
        ("Limits", "limits"),
        ("definition.pyton_path", "python_path"),
        ("definition.dependencies.conad", "conda"),
        ("networking.endpoints", "endpoint"),
        ("compute.memory", "mem"),
        ("compute.cpu_m", "cpu"),
        ("limits.max-running", "max_running"),
        ("definition.cpu", "compute.cpu"),
        ("compute.path", "definition.path"),
        ("limits.endpoint", "networking.endpoint"),
        ("networking.zzz", ""),
    ],
)
def test_an_unknown_field_is_reported_with_the_nearest_one(field: str, hint: str) -> None:
    text = api(field, "1")
    section, _, _ = field.rpartition(".")
    allowed = SECTIONS.get(section, "name, kind, definition, networking, compute, limits, retries")
    end = f'; did you mean "{hint}"?' if hint else ""
    assert mistakes_in_spec(text) == [
        f"{last_line(text)}: {field}: unknown field; allowed: {allowed}{end}"
    ]


@pytest.mark.parametrize("field", [*FIELDS, *SECTIONS, "definition.env.A", "compute.node_labels.z"])
def test_a_duplicate_key_is_reported_with_both_lines(field: str) -> None:
    text = api(field, "1")
    line = text.splitlines()[-1].replace("- ", "  ")
    last = last_line(text)
    found = mistakes_in_spec(f"{text}{line}\n")
    assert f"{last + 1}: {field}: given twice, first on line {last}" in found


def test_a_duplicate_key_hides_no_other_mistake() -> None:
    text = api("retries", "x") + "  retries: 1\n  limits: {log: 1}\n"
    assert mistakes_in_spec(text) == [
        '4: retries: found "x"; allowed: a whole number, 0 or more',
        "5: retries: given twice, first on line 4",
        "6: limits.log: found 1; allowed: at least 64Ki",
    ]


def test_a_mistake_behind_an_anchor_is_reported_once_where_it_is_written() -> None:
    text = """\
- name: a
  kind: TaskAPI
  definition: &d
    path: a.py
    log_level: loud
  compute: &c {gpu: x}
- {name: b, kind: TaskAPI, definition: *d, compute: *c}
- name: c
  kind: TaskAPI
  definition: {<<: *d, python_path: 5}
"""
    assert mistakes_in_spec(text) == [
        '5: definition.log_level: found "loud"; allowed: debug, info, warning, error',
        '6: compute.gpu: found "x"; allowed: a whole number, 0 or more',
        "10: definition.python_path: found 5; allowed: a folder, relative to this file and inside "
        "its folder",
    ]


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize(
    "field",
    ["retries", "limits.max_running", "limits.max_waiting", "limits.log", "compute.cpu",
     "compute.mem", "compute.gpu", "name", "definition.path", "definition.log_level"],
)  # fmt: skip
def test_a_huge_number_is_reported_in_a_short_line(field: str, number: str) -> None:
    text = api(field, number)
    (line,) = mistakes_in_spec(text)
    assert line.startswith(f"{last_line(text)}: {field}: found ")
    assert len(line) < 250


def test_a_stored_spec_is_read_although_the_rules_for_new_ones_refuse_it() -> None:
    stored = """{
        "name": "Iris", "kind": "TaskAPI", "networking": {"endpoint": "healthz"},
        "definition": {"path": "/a.py", "command": ["x"], "env": {"CORTEX_X": "1"}},
        "compute": {"cpu_m": 0, "mem": 1, "gpu": 5000}, "limits": {"log": 1}, "retries": -1
    }"""
    spec = Api.model_validate_json(stored)
    assert spec.compute == Compute(cpu_m=0, mem=1, gpu=5000)
    assert spec.definition == Definition(path="/a.py", command=["x"], env={"CORTEX_X": "1"})


def mistakes_in_configuration(folder: Path, text: str) -> Sequence[str]:
    """The mistakes without the file's name."""
    file = folder / "operator.yaml"
    file.write_text(text)
    with pytest.raises(StartupError) as raised:
        load({}, file, {})
    first, *lines = raised.value.message.splitlines()
    assert first == "the configuration has mistakes:"
    return [line.removeprefix(f"{file}:") for line in lines]


def test_the_mistakes_in_a_configuration_are_in_the_order_of_its_lines(tmp_path: Path) -> None:
    text = "grace: -1\nprot: 1\nport: 1\nport: 2\nhost: true\n"
    assert mistakes_in_configuration(tmp_path, text) == [
        "1: grace: should be greater than or equal to 0; found -1",
        '2: prot: unknown setting; did you mean "port"?',
        "4: port: given twice, first on line 3",
        "5: host: should be a valid string; found true",
    ]


def test_a_mistake_in_a_list_of_a_configuration_has_the_line_of_its_element(
    tmp_path: Path,
) -> None:
    text = "allow_origin: [a, 1]\nbuild_env:\n  - FINE\n  - not fine\n  -\n    - nested\n"
    assert mistakes_in_configuration(tmp_path, text) == [
        "1: allow_origin[1]: should be a valid string; found 1",
        "4: build_env[1]: not the name of a variable; use letters, digits and _, the first not a "
        'digit; found "not fine"',
        "6: build_env[2]: should be a valid string; found a list",
    ]
    (line,) = mistakes_in_configuration(tmp_path, "build_env: FINE, 1a\n")
    assert line.startswith("1: build_env: not the name of a variable; ")
    assert line.endswith("; found '1a'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("store:postgresql://u:s3cret@h/d\n", "1: found a string; allowed: settings by name"),
        ("- store: s3cret\n", "1: found a list; allowed: settings by name"),
        ("{store:postgresql://u:s3cret@h/d, port: 1}\n", "1: store…: unknown setting"),
        ("{store=s3cret: 1}\n", "1: store…: unknown setting"),
        ("store: {s3cret: 1}\n", "1: store: should be a valid string"),
        ("store: [s3cret]\n", "1: store: should be a valid string"),
        ("files: !s3cret x\n", "1: files: should be a valid string"),
    ],
)
def test_no_mistake_in_a_configuration_shows_a_password(
    tmp_path: Path, text: str, message: str
) -> None:
    (line,) = mistakes_in_configuration(tmp_path, text)
    assert line.startswith(message)
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("port: 1e30", "1e+30"),
        ("port: 0x" + "f" * 40, str(int("f" * 40, 16))),
        ("gpu: 1e400", "inf"),
        ("lease: " + "9" * 5000, "an invalid number (" + "9" * 59 + "…)"),
        ("keep_jobs: -1e30", "-1e+30"),
        ("mem: " + "9" * 30, "9" * 30),
        ("max_waiting_bytes: 1e99", "1e+99"),
    ],
)
def test_a_huge_number_in_a_configuration_is_reported_in_a_short_line(
    tmp_path: Path, text: str, shown: str
) -> None:
    (line,) = mistakes_in_configuration(tmp_path, text)
    assert line.startswith(f"1: {text.partition(':')[0]}: ")
    assert line.endswith(f"; found {shown}")
