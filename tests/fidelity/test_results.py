"""The return value of a task."""

from __future__ import annotations

import json
import sys

import pytest

from cortex.worker.job import task
from fidelity.harness import Program, Runner
from fidelity.outcome import NO_RESULT
from fidelity.programs import program

NOT_JSON = "JSON has no such value: the job's message says it, plain Python has no message"


FEW_DIGITS = {"PYTHONINTMAXSTRDIGITS": "640"}


def returned(name: str, value: str, before: str = "") -> object:
    return program(name, f"{before}\ndef task(config):\n    return {value}\n")


RESULTS = [
    returned("nothing", "None"),
    returned("zero", "0"),
    returned("false", "False"),
    returned("text", "'żółw 🐢 \\ud800'"),
    returned("nested", "{'a': [1, 2.5, {'b': None}], 'ü': True}"),
    returned("tuple", "(1, (2, 3))"),
    returned("keys-that-are-numbers", "{1: 'a', 2.5: 'b', None: 'c', True: 'd'}"),
    returned("large-numbers", "[2**200, 1e308, -0.0]"),
    returned("bool-of-a-subclass", "E.A", "import enum\nclass E(enum.IntEnum):\n    A = 3"),
    returned("the-config", "config"),
    returned(
        "named-tuple", "P(1, 2)", "import collections\nP = collections.namedtuple('P', 'x y')"
    ),
    returned(
        "dict-whose-attributes-are-its-keys",
        "DotDict(accuracy=0.9)",
        "class DotDict(dict):\n    __getattr__ = dict.get\n    __setattr__ = dict.__setitem__",
    ),
    returned(
        "object-with-every-attribute",
        "{'ok': Anything()}",
        "class Anything(str):\n    def __getattr__(self, name):\n        return self",
    ),
    returned("mock", "str(type(Mock()))", "from unittest.mock import Mock"),
    returned("ordered-dict", "OrderedDict(b=1, a=2)", "from collections import OrderedDict"),
    returned("user-float", "F(1.5)", "class F(float):\n    pass"),
    returned("number-of-as-many-digits-as-python-reads", "10**4299"),
    returned("text-of-digits", "'7' * 5000"),
    program(
        "number-of-more-digits-than-the-variable-allows",
        "import sys\ndef task(config):\n    sys.set_int_max_str_digits(0)\n    return 10**700\n",
        env=FEW_DIGITS,
    ),
    program(
        "most-digits",
        "import sys\ndef task(config):\n    return sys.get_int_max_str_digits()\n",
        env=FEW_DIGITS,
    ),
    program(
        "config-of-more-digits-than-the-variable-allows",
        "def task(config):\n    return config['n'] == 10**700\n",
        env=FEW_DIGITS,
        config={"n": 10**700},
        differences={"exit_code": 0, "result": True, "log": ""},
        reason="plain Python cannot parse the driver's literal",
        message_contains="",
    ),
]


NO_RESULTS = [
    ("not-a-number", "{'loss': float('nan')}", ""),
    ("infinity", "[float('inf')]", ""),
    ("object", "object()", ""),
    ("bytes", "b'bytes'", ""),
    ("keys-that-collide-in-json", "{'a': [{1: 'x', '1': 'y'}]}", ""),
    ("set", "{1, 2}", ""),
    ("module", "sys", "import sys"),
    ("function", "task", ""),
    ("mock", "Mock()", "from unittest.mock import Mock"),
    ("array", "array.array('d', [1.0])", "import array"),
    ("decimal", "decimal.Decimal('1.5')", "import decimal"),
    ("itself", "[loop]", "loop = []\nloop.append(loop)"),
]


@pytest.mark.parametrize("program", RESULTS)
def test_results_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize(
    ("name", "value", "before"), NO_RESULTS, ids=[row[0] for row in NO_RESULTS]
)
def test_a_result_that_is_not_json_is_not_stored(
    name: str, value: str, before: str, runner: Runner
) -> None:
    code = f"{before}\ndef task(config):\n    return {value}\n"
    runner.check(
        Program(
            name,
            code,
            message_contains="not kept",
            differences={"result": NO_RESULT},
            reason=NOT_JSON,
        )
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_with_more_digits_than_python_reads_is_no_result(sign: int) -> None:
    number = sign * 10**4300
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        problems = [
            task._why_no_result(json.dumps(each).encode()) for each in ([number], str(number))
        ]
    finally:
        sys.set_int_max_str_digits(limit)
    assert problems == ["it has a number of over 4300 digits", None]
