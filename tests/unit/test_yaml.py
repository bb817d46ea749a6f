"""`read_apis`: what a cortex.yaml may contain, and every mistake with its line."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.errors import InvalidSpec
from cortex.spec.api import Api, Compute, Definition, Dependencies, Limits, Networking
from cortex.spec.cortex_yaml import field_lines, read_apis
from cortex.spec.python_variables import refusal

MINIMAL = "- name: iris\n  kind: TaskAPI\n  definition: {path: iris.py}\n"
FULL = """\
- name: iris
  kind: TaskAPI
  definition:
    path: src/iris.py
    config: {C: 0.5, layers: [1, {a: null}], on: true}
    python_path: src
    env: {MODE: fast, EMPTY: ""}
    log_level: debug
    preload: [numpy, sklearn.svm]
    dependencies: {pip: gpu/requirements.txt, conda: gpu/conda.txt, shell: gpu/install.sh}
  networking:
    endpoint: /flowers
  compute:
    cpu: 1.5
    mem: 512Mi
    gpu: 1
  limits: {max_running: 4, max_waiting: 100, log: 1G}
  retries: 3
- name: shell
  kind: TaskAPI
  definition:
    command: [sh, -c, "echo hi"]
"""


def mistakes(text: str) -> list[str]:
    """The lines of the message, without the name of the file."""
    with pytest.raises(InvalidSpec) as raised:
        read_apis(text, "cortex.yaml")
    lines = raised.value.message.split("\n")
    assert all(re.match(r"cortex\.yaml:\d+: .", line) for line in lines)
    return [line.removeprefix("cortex.yaml:") for line in lines]


def mistake(text: str) -> str:
    found = mistakes(text)
    assert len(found) == 1, found
    return found[0]


def one_api(definition: str = "path: iris.py", more: str = "") -> str:
    """One API: its `definition` on line 4 and what follows from line 5 on."""
    return f"- name: iris\n  kind: TaskAPI\n  definition:\n    {definition}\n{more}"


def test_every_field_is_read() -> None:
    iris, shell = read_apis(FULL, "cortex.yaml")
    assert iris == Api(
        name="iris",
        definition=Definition(
            path="src/iris.py",
            config={"C": 0.5, "layers": [1, {"a": None}], "on": True},
            python_path="src",
            env={"MODE": "fast", "EMPTY": ""},
            log_level="debug",
            preload=("numpy", "sklearn.svm"),
            dependencies=Dependencies(
                pip="gpu/requirements.txt", conda="gpu/conda.txt", shell="gpu/install.sh"
            ),
        ),
        networking=Networking(endpoint="flowers"),
        compute=Compute(cpu_m=1500, mem=512 << 20, gpu=1),
        limits=Limits(max_running=4, max_waiting=100, log=10**9),
        retries=3,
    )
    assert shell.definition.command == ["sh", "-c", "echo hi"]


def test_a_missing_or_null_field_has_its_default() -> None:
    (api,) = read_apis(MINIMAL, "cortex.yaml")
    assert api.networking.endpoint == "iris"
    assert api.compute == Compute(cpu_m=200, mem=None, gpu=0)
    nulls = MINIMAL + "  networking:\n  compute: {cpu: , mem: null}\n"
    assert read_apis(nulls, "cortex.yaml") == [api]
    assert read_apis(MINIMAL + "  networking: {endpoint: null}\n", "cortex.yaml") == [api]


def test_an_api_is_frozen_and_survives_json() -> None:
    (api, _) = read_apis(FULL, "cortex.yaml")
    assert Api.model_validate_json(api.model_dump_json()) == api
    with pytest.raises(ValueError, match="frozen"):
        api.name = "other"  # type: ignore[misc]  # invalid on purpose


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [("1", 1000), ("0.25", 250), ('"200m"', 200), ("200m", 200), ('"2"', 2000), ("0.0001", 1)],
)
def test_cpu_is_read_in_thousandths(cpu: str, expected: int) -> None:
    (api,) = read_apis(MINIMAL + f"  compute: {{cpu: {cpu}}}\n", "cortex.yaml")
    assert api.compute.cpu_m == expected


@pytest.mark.parametrize(
    ("mem", "expected"),
    [
        ("512Mi", 512 << 20),
        ("1G", 10**9),
        ("1Gi", 1 << 30),
        ("1.5Gi", 3 << 29),
        ("100M", 10**8),
        ("20000k", 20 * 10**6),
        ("20000K", 20 * 10**6),
        ("20000Ki", 20000 << 10),
        ("1T", 10**12),
        ("1Ti", 1 << 40),
        ("1e9", 10**9),
        ('"1e9"', 10**9),
        ("100000000", 10**8),
        ('"100000000"', 10**8),
        ("100_000_000", 10**8),
        ("0x10000000", 1 << 28),
    ],
)
def test_mem_is_read_in_bytes(mem: str, expected: int) -> None:
    (api,) = read_apis(MINIMAL + f"  compute: {{mem: {mem}}}\n", "cortex.yaml")
    assert api.compute.mem == expected


def test_a_mistake_has_its_line_the_value_and_what_is_allowed() -> None:
    text = one_api(more='  compute:\n    cpu: 1\n    mem: "12 potatoes"\n')
    assert mistake(text) == (
        '7: compute.mem: found "12 potatoes"; allowed: bytes, or a size such as 512Mi or 1G'
    )


def test_a_label_has_one_value_or_several() -> None:
    text = "  compute:\n    node_labels: {zone: [a, b], example.com/disk: ssd}\n"
    (api,) = read_apis(one_api(more=text), "cortex.yaml")
    assert api.compute.node_labels == {"zone": ("a", "b"), "example.com/disk": ("ssd",)}
    assert Api.model_validate_json(api.model_dump_json()) == api


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a", '6: compute.node_labels: found "a"; allowed: an object of labels'),
        ("{zone: 3}", "6: compute.node_labels.zone: found 3; allowed: at most 63 letters"),
        (
            "{zone: []}",
            "6: compute.node_labels.zone: found an empty list; allowed: at most 63 letters",
        ),
        ("{zone: [a, -b]}", '6: compute.node_labels.zone: found "-b"; allowed: at most 63'),
        ("{-zone: a}", '6: compute.node_labels: found the label "-zone"; allowed in a label'),
        ("{a/b/c: a}", '6: compute.node_labels: found the label "a/b/c"; allowed in a label'),
    ],
)
def test_mistakes_in_labels_are_reported(labels: str, message: str) -> None:
    assert mistake(one_api(more=f"  compute:\n    node_labels: {labels}\n")).startswith(message)


@pytest.mark.parametrize("found", ["-1", "1.5", "true", '"2"', "[]"])
def test_retries_are_a_count(found: str) -> None:
    (line,) = mistakes(one_api(more=f"  retries: {found}\n"))
    assert line.startswith("5: retries: found ")
    assert line.endswith("; allowed: a whole number, 0 or more")


def test_every_mistake_is_reported_at_once_in_the_order_of_lines() -> None:
    text = """\
- name: Iris
  kind: BatchAPI
  defnition: {}
- kind: TaskAPI
  definition:
    path: /etc/passwd
    env: {CORTEX_X: a, 1a: b, PORT: 80, DEBUG: true}
    log_level: warn
  compute: {cpu: true, gpu: -1, mem: 1Mi, disk: 1}
"""
    found = mistakes(text)
    assert [int(line.split(":")[0]) for line in found] == [
        1,
        1,
        2,
        3,
        4,
        6,
        7,
        7,
        7,
        7,
        8,
        9,
        9,
        9,
        9,
    ]
    joined = "\n".join(found)
    for message in (
        '1: name: found "Iris"; allowed: at most 63 lower-case',
        'did you mean "iris"?',
        "1: definition: missing; it is required",
        '2: kind: found "BatchAPI"; allowed: TaskAPI (no other kind is supported)',
        '3: defnition: unknown field; allowed: name, kind, definition, networking, compute, limits, retries; did you mean "definition"?',
        "4: name: missing; it is required",
        '6: definition.path: found "/etc/passwd"; allowed: a Python file, relative',
        "7: definition.env.CORTEX_X: names that start with CORTEX_ are reserved",
        '7: definition.env: found the name "1a"',
        "7: definition.env.PORT: found a number; allowed: a string; put it in quotes",
        "7: definition.env.DEBUG: found true; allowed: a string; put it in quotes",
        '8: definition.log_level: found "warn"; allowed: debug, info, warning, error; did you mean "warning"?',
        "9: compute.cpu: found true; allowed: cores",
        "9: compute.gpu: found -1; allowed: a whole number",
        '9: compute.mem: found "1Mi"; allowed: at least 16Mi',
        "9: compute.disk: unknown field; allowed: cpu, mem, gpu, node_labels",
    ):
        assert message in joined


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: no API found; allowed: a list of APIs"),
        ("# nothing\n", "1: no API found"),
        ("[]", "1: no API found"),
        ("~", "1: no API found"),
        ("name: iris\n", "1: found an object; allowed: a list of APIs"),
        ("\n\niris", '3: found "iris"; allowed: a list of APIs'),
        ("- iris", '1: found "iris"; allowed: an object with the fields name, kind'),
        ("- name: [a\n", "2: cannot be read as YAML: while parsing a flow sequence"),
        ("- a\n\t- b", "2: cannot be read as YAML"),
        ("- a\n- \x07", "2: cannot be read as YAML: special characters are not allowed"),
        ('- "\\U00110000"', "1: cannot be read as YAML"),
        ("--- a\n--- b\n", "2: cannot be read as YAML: expected a single document"),
        ("- *nobody", "1: cannot be read as YAML: found undefined alias"),
        ("[" * 500, "1: nested more than 100 levels deep"),
        ("- " * 2000, "1: nested more than 100 levels deep"),
        ("- a\n" * 25_000, "1: more than 20,000 values"),
        ("- &a [*a]", "1: nested more than 100 levels deep, or an alias contains itself"),
        ("#" * (1 << 20) + "\n", "1: the file is larger than 1 MiB"),
        ("# " + "é" * (1 << 19), "1: the file is larger than 1 MiB"),
    ],
    ids=range(19),
)
def test_a_text_without_a_list_of_apis_is_refused(text: str, message: str) -> None:
    assert mistake(text).startswith(message)


def test_an_anchor_may_be_defined_again() -> None:
    (api,) = read_apis(
        one_api("path: iris.py\n    config: {a: &x 1, b: &x 2, c: *x}"), "cortex.yaml"
    )
    assert api.definition.config == {"a": 1, "b": 2, "c": 2}


def test_aliases_are_expanded_within_bounds() -> None:
    bomb = "- &a0 [x, x]\n" + "".join(f"- &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    assert "too large once its aliases are expanded" in "\n".join(mistakes(bomb))
    long = "- &a " + "x" * 100_000 + "\n" + "- *a\n" * 200
    assert "too large once its aliases are expanded" in "\n".join(mistakes(long))
    kind = one_api(
        "<<: &d {path: a.py}", "- {name: b, kind: TaskAPI, definition: {<<: *d, path: b.py}}"
    )
    assert [api.definition.path for api in read_apis(kind, "cortex.yaml")] == ["a.py", "b.py"]
    both = "<<: [{path: a.py}, {path: b.py, log_level: debug}]"
    (api,) = read_apis(one_api(both), "cortex.yaml")
    assert (api.definition.path, api.definition.log_level) == ("a.py", "debug")
    assert mistake(one_api("<<: [{path: a.py}, 3]")).startswith(
        "4: definition.<<: found a number; allowed: an ob"
    )


def test_keys_must_be_strings_and_unique() -> None:
    text = one_api(
        "path: a.py\n    path: b.py\n    path: c.py\n    1: x\n    ? [a]\n    : b\n    ~: c"
    )
    assert mistakes(text) == [
        "5: definition.path: given twice, first on line 4",
        "6: definition.path: given twice, first on line 4",
        "7: definition: the key 1 is not a string; put it in quotes",
        "8: definition: the key a list or an object is not a string; put it in quotes",
        "10: definition: the key ~ is not a string; put it in quotes",
    ]


def test_names_and_endpoints_must_be_unique() -> None:
    other = "- {name: %s, kind: TaskAPI, definition: {path: a.py}%s}\n"
    assert (
        mistake(MINIMAL + other % ("iris", ""))
        == '4: name: "iris" is already used by the API on line 1'
    )
    assert mistake(MINIMAL + other % ("b", ", networking: {endpoint: iris}")) == (
        '4: networking.endpoint: "iris" is already used by the API on line 1'
    )
    same_line = "[{name: a, kind: TaskAPI, definition: {path: a}}, {name: a, kind: TaskAPI, definition: {path: b}}]"
    assert mistake(same_line) == '1: name: "a" is already used by the API on line 1'


@pytest.mark.parametrize(
    "name", ["", "1a", "a-", "-a", "a_b", "a.b", "a" * 64, "ä", "a\n", "5", "true", "[a]", "null"]
)
def test_a_name_that_is_not_dns_1035_is_refused(name: str) -> None:
    quote = json.dumps(name) if name not in {"5", "true", "[a]", "null"} else name
    assert mistake(MINIMAL.replace("iris\n", f"{quote}\n", 1)).startswith("1: name: found ")


@pytest.mark.parametrize("name", ["a", "a1", "a-b", "a" * 63])
def test_a_dns_1035_name_is_accepted(name: str) -> None:
    assert read_apis(MINIMAL.replace("iris", name, 1), "c")[0].name == name


@pytest.mark.parametrize("reserved", ["healthz", "readyz", "metrics"])
def test_a_reserved_endpoint_is_refused(reserved: str) -> None:
    message = f'"{reserved}" is reserved'
    assert message in mistake(MINIMAL.replace("iris", reserved, 1))
    assert message in mistake(MINIMAL + f"  networking: {{endpoint: /{reserved}}}\n")


@pytest.mark.parametrize(
    "endpoint", ["a/b", "//a", "a/", ".", "..", "-a", "", "a b", "ä", 5, [], "a\n"]
)
def test_an_endpoint_that_is_not_one_path_segment_is_refused(endpoint: object) -> None:
    text = MINIMAL + f"  networking:\n    endpoint: {json.dumps(endpoint)}\n"
    assert mistake(text).startswith("5: networking.endpoint: found ")


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (
            "path: a.py\n    command: [a]",
            "5: definition: found path and command; allowed: exactly one",
        ),
        ("config: {}", "3: definition: found neither; allowed: exactly one of path and command"),
        ("path: ../a.py", '4: definition.path: found "../a.py"; allowed: a Python file, relative'),
        ("path: a/../../b.py", "4: definition.path: found"),
        ("path: ''", '4: definition.path: found ""'),
        ("path: 5", "4: definition.path: found 5"),
        ('path: "a\\0.py"', '4: definition.path: found "a\\x00.py"'),
        ("path: a.py\n    python_path: /usr", "5: definition.python_path: found"),
        ("command: ls", '4: definition.command: found "ls"; allowed: a list of strings'),
        ("command: []", "4: definition.command: found an empty list"),
        (
            "command:\n    - ls\n    - 5",
            "6: definition.command[1]: found 5; allowed: a non-empty string",
        ),
        ("command: [ls, '']", '4: definition.command[1]: found ""'),
        ('command: ["a\\0"]', "4: definition.command[0]: found"),
        ("path: a.py\n    env: [A]", "5: definition.env: found a list; allowed: an object"),
        ("path: a.py\n    env: {A: }", "5: definition.env.A: found nothing; allowed: a string"),
        ('path: a.py\n    env: {A: "\\0"}', "5: definition.env.A: contains a NUL"),
        ("path: a.py\n    env: {A: 2020-01-01}", "5: definition.env.A: found a date; allowed"),
        ("path: a.py\n    config: 5", "5: definition.config: found 5; allowed: an object"),
        ("path: a.py\n    preload: numpy", '5: definition.preload: found "numpy"; allowed: a list'),
        (
            "path: a.py\n    preload: [a-b]",
            '5: definition.preload[0]: found "a-b"; allowed: the name',
        ),
        ("path: a.py\n    log_level: 10", "5: definition.log_level: found 10; allowed: debug"),
        (
            "command: [a]\n    preload: [numpy]",
            "5: definition.preload: allowed only with path: the",
        ),
        (
            "command: [a]\n    preload: []",
            "5: definition.preload: allowed only with path: the program of a command",
        ),
        (
            "path: a.py\n    dependencies: requirements.txt",
            '5: definition.dependencies: found "requirements.txt"; allowed: an object with the fields pip',
        ),
        (
            "path: a.py\n    dependencies:\n      pip: ../r.txt",
            '6: definition.dependencies.pip: found "../r.txt"; allowed: a file like requirements.txt',
        ),
        (
            "path: a.py\n    dependencies: {poetry: pyproject.toml}",
            "5: definition.dependencies.poetry: unknown field; allowed: pip, conda, shell",
        ),
    ],
)
def test_an_invalid_definition_is_refused(definition: str, message: str) -> None:
    assert mistake(one_api(definition)).startswith(message)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("2020-01-01", "a date (2020-01-01)"),
        ("2020-13-45", "a date (2020-13-45)"),
        (".nan", "nan"),
        ("-.inf", "-inf"),
        ("1e999", "inf"),
        ("!!binary aGk=", "binary data"),
        ("!!set {a}", "a set"),
        ("!!python/object:os.system {}", "a tag (python/object:os.system)"),
        ("!secret x", "a tag (!secret)"),
        ("!!int x", "an invalid number (x)"),
        ("9" * 5000, "an invalid number (9"),
        ('"\\ud800"', "text with half a character"),
    ],
)
def test_a_config_value_that_json_cannot_express_is_refused(value: str, found: str) -> None:
    message = mistake(one_api(f"path: a.py\n    config:\n      a:\n        - {value}"))
    assert message.startswith(f"7: definition.config.a[0]: found {found}")
    assert "a JSON value; put it in quotes" in message


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("HUSH7", "definition.env: found a string"),
        ("[HUSH7]", "definition.env: found a list"),
        ("{KEY: 55577}", "definition.env.KEY: found a number"),
        ("{KEY: 5.5577}", "definition.env.KEY: found a number"),
        ("{KEY: 2020-05-05}", "definition.env.KEY: found a date"),
        ("{KEY: !!int HUSH7}", "definition.env.KEY: found an invalid number"),
        ("{KEY: !HUSH7 }", "definition.env.KEY: found a tag"),
        ('{KEY: "HUSH7\\0"}', "definition.env.KEY: contains a NUL character"),
        ("{KEY: *HUSH7}", "cannot be read as YAML: found undefined alias; put a value that begins"),
        ("{KEY: !HUSH7!a b}", "cannot be read as YAML: while parsing a node, found undefined tag"),
        ("{KEY:HUSH7}", 'definition.env: found the name "KEY…"; allowed'),
        ("{KEY=HUSH7}", 'definition.env: found the name "KEY…"; allowed'),
        ("{<<: HUSH7}", "definition.env.<<: found a string; allowed: an object"),
    ],
)
def test_mistakes_in_env_show_no_values(env: str, message: str) -> None:
    with pytest.raises(InvalidSpec) as raised:
        read_apis(one_api(f"path: a.py\n    env: {env}"), "c")
    assert raised.value.message.startswith(f"c:5: {message}")
    assert all(secret not in raised.value.message for secret in ("HUSH7", "5577", "2020"))


def test_scalars_are_those_of_yaml_1_2() -> None:
    config = r'{a: 0o14, b: 1_000, c: -0x1F, d: yes, e: 1e3, f: "😀", g: =, h: +5, i: !!str 5}'
    (api,) = read_apis(one_api(f"path: a.py\n    config: {config}"), "c")
    expected = {"a": 12, "b": 1000, "c": -31, "d": "yes", "e": 1000.0, "f": "\U0001f600"}
    assert api.definition.config == expected | {"g": "=", "h": 5, "i": "5"}


@pytest.mark.parametrize(
    "cpu", ["0", "-1", ".nan", ".inf", '"0m"', '"200 m"', "[1]", "false", "1e30"]
)
def test_an_invalid_cpu_is_refused(cpu: str) -> None:
    assert mistake(MINIMAL + f"  compute: {{cpu: {cpu}}}\n").startswith("4: compute.cpu: found ")


@pytest.mark.parametrize(
    ("mem", "hint"),
    [
        ("512MB", "512M"),
        ("512 MiB", "512Mi"),
        ("1g", "1G"),
        ("1 gi", "1Gi"),
        ("512m", "512M"),
        ("", None),
        ("1Pi", None),
        ("-1", None),
        ("1e99", None),
        ("9999999T", None),
        ("٣Gi", None),
    ],
)
def test_an_invalid_size_is_refused_with_a_suggestion(mem: str, hint: str | None) -> None:
    message = mistake(MINIMAL + f'  compute: {{mem: "{mem}"}}\n')
    assert message.startswith("4: compute.mem: found ")
    assert message.partition("; did you mean ")[2] == (f'"{hint}"?' if hint else "")


@pytest.mark.parametrize("gpu", ["1.0", "true", '"1"', "-1", "100000"])
def test_an_invalid_gpu_is_refused(gpu: str) -> None:
    assert mistake(MINIMAL + f"  compute: {{gpu: {gpu}}}\n").startswith("4: compute.gpu: found ")


def test_the_error_for_a_misplaced_field_names_its_place() -> None:
    assert mistake(MINIMAL + "  endpoint: a\n").endswith('did you mean "networking.endpoint"?')
    assert mistake(MINIMAL + "  mem: 1Gi\n").endswith('did you mean "compute.mem"?')


def test_a_long_value_is_shortened_in_the_error() -> None:
    long = "x\n" * 5000
    message = mistake(MINIMAL + f"  compute: {{mem: {json.dumps(long)}}}\n")
    assert len(message) < 200


def test_field_lines_name_every_field() -> None:
    lines = field_lines(FULL)
    assert lines[0, "definition", "path"] == 4
    assert lines[1, "definition", "command"] == 22
    assert lines[1,] == 19
    assert field_lines("") == {}


@pytest.mark.parametrize(
    ("field", "name", "instead"),
    [
        ("pod: {containers: [{image: x}]}", "pod", "definition.command"),
        ("image: x", "image", "requirements.txt"),
        ("node_groups: [a]", "node_groups", "compute.node_labels"),
        ("shm_size: 1Gi", "shm_size", "remove it"),
        ("predictor: {path: a.py}", "predictor", "definition: {path: FILE.py}"),
        ("autoscaling: {max_replicas: 2}", "autoscaling", "limits.max_running"),
        ("networking: {local_port: 8000}", "networking.local_port", "cortex serve --port"),
        ("compute: {inf: 1}", "compute.inf", "compute.gpu"),
        ("compute: {node_groups: [a]}", "compute.node_groups", "compute.node_labels"),
        ("compute: {shm: 1Gi}", "compute.shm", "remove it"),
    ],
)
def test_a_field_of_cortex_alone_is_refused_with_what_to_write_instead(
    field: str, name: str, instead: str
) -> None:
    message = mistake(MINIMAL + f"  {field}\n")
    assert message.startswith(f"4: {name}: this field of Cortex is not supported; ")
    assert instead in message


@pytest.mark.parametrize(
    ("field", "instead"),
    [
        ("image: quay.io/x", "list the packages in requirements.txt"),
        ("shm_size: 1Gi", "/dev/shm"),
    ],
)
def test_a_field_of_a_definition_of_cortex_alone_is_refused(field: str, instead: str) -> None:
    line = mistake(one_api(f"path: a.py\n    {field}"))
    assert line.startswith(
        f"5: definition.{field.partition(':')[0]}: this field of Cortex is not supported; "
    )
    assert instead in line


def test_an_old_spec_without_the_newer_fields_is_read() -> None:
    old = {"path": "a.py", "command": None, "config": {}, "env": {"PYTHONHOME": "/x"}}
    entry = {"name": "a", "definition": old, "networking": {"endpoint": "a"}}
    assert Api.model_validate(entry).definition.dependencies == Dependencies()


@pytest.mark.parametrize(
    "name", ["PYTHONEXECUTABLE", "PYTHONHOME", "PYTHONINSPECT", "PYTHONPLATLIBDIR"]
)
def test_a_variable_of_python_that_no_job_of_a_path_can_have_is_refused(name: str) -> None:
    message = mistake(one_api(f"path: a.py\n    env:\n      A: b\n      {name}: x"))
    assert message.startswith(
        f"7: definition.env.{name}: allowed only with a command, not with a path: it "
    )
    (api,) = read_apis(one_api(f"command: [a]\n    env: {{{name}: x}}"), "cortex.yaml")
    assert api.definition.env == {name: "x"}


@pytest.mark.parametrize(
    ("name", "refused", "allowed"),
    [
        ("PYTHON_CPU_COUNT", ["0", "x"], ["default", "1", ""]),
        ("PYTHON_FROZEN_MODULES", ["x"], ["on", "off"]),
        ("PYTHON_GIL", ["0", "2"], ["1", ""]),
        ("PYTHONPATH", [], ["libs", "/no/such"]),
        ("PYTHON_VERSION", [], ["3.11"]),
    ],
)
def test_variables_of_later_pythons_are_checked_and_others_are_not(
    name: str, refused: list[str], allowed: list[str]
) -> None:
    assert None not in [refusal(name, value) for value in refused]
    assert [refusal(name, value) for value in allowed] == [None] * len(allowed)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
    max_leaves=12,
)
_YAMLISH = st.text(st.sampled_from("-:{}[]&*!|>%@`'\"#,?<= \n\tab01.~\\xuU\0\ud800é"), max_size=60)
_FIELDS = st.sampled_from(
    [
        "name",
        "kind",
        "definition",
        "path",
        "command",
        "env",
        "config",
        "compute",
        "cpu",
        "mem",
        "<<",
    ]
)
_ENTRIES = st.lists(
    st.dictionaries(_FIELDS, _JSON | st.dictionaries(_FIELDS, _JSON, max_size=3), max_size=6)
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.text()
    | _YAMLISH
    | _ENTRIES.map(json.dumps)
    | st.tuples(st.integers(0, len(FULL)), _YAMLISH).map(
        lambda at: FULL[: at[0]] + at[1] + FULL[at[0] :]
    )
)
def test_any_text_is_read_or_refused_as_invalid_spec(text: str) -> None:
    try:
        apis = read_apis(text, "cortex.yaml")
    except InvalidSpec as error:
        assert all(re.match(r"cortex\.yaml:\d+: .", line) for line in error.message.split("\n"))
        error.message.encode()
    else:
        assert [Api.model_validate_json(api.model_dump_json()) for api in apis] == apis
    field_lines(text)
