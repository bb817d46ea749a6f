"""What a task returns."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.outcome import NO_RESULT
from fidelity.programs import program

NOT_JSON = (
    "JSON has no such value: the job's message says so, plain Python has nothing to say it of"
)


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
]


NO_RESULTS = [
    ("not-a-number", "{'loss': float('nan')}", ""),
    ("infinity", "[float('inf')]", ""),
    ("object", "object()", ""),
    ("bytes", "b'bytes'", ""),
    ("set", "{1, 2}", ""),
    ("module", "sys", "import sys"),
    ("function", "task", ""),
    ("mock", "Mock()", "from unittest.mock import Mock"),
    ("array", "array.array('d', [1.0])", "import array"),
    ("decimal", "decimal.Decimal('1.5')", "import decimal"),
    ("itself", "[loop]", "loop = []\nloop.append(loop)"),
]


@pytest.mark.parametrize("program", RESULTS)
def test_a_result(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize(
    ("name", "value", "before"), NO_RESULTS, ids=[row[0] for row in NO_RESULTS]
)
def test_a_result_that_is_not_kept(name: str, value: str, before: str, runner: Runner) -> None:
    code = f"{before}\ndef task(config):\n    return {value}\n"
    runner.check(Program(name, code, says="not kept", but={"result": NO_RESULT}, why=NOT_JSON))
