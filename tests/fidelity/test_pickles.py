"""Pickles: they refer to functions and classes by the names of their modules."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

PICKLES = [
    program(
        "function-and-class",
        """
        import pickle
        class Point:
            def __init__(self, x):
                self.x = x
        def twice(n):
            return 2 * n
        def task(config):
            assert pickle.loads(pickle.dumps(twice)) is twice
            with open('point', 'wb') as f:
                pickle.dump(Point(3), f, protocol=4)
            return pickle.dumps(Point, protocol=0).decode()
        """,
    ),
    program(
        "read-back-elsewhere",
        """
        import pickle, subprocess, sys
        class Point:
            x = 3
        def task(config):
            data = pickle.dumps(Point()).hex()
            code = f'import pickle; print(pickle.loads(bytes.fromhex("{data}")).x)'
            return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
        """,
    ),
    program(
        "class-of-main",
        "import __main__, pickle\nclass Point:\n    pass\nPoint.__module__ = '__main__'\ndef task(config):\n    return pickle.dumps(Point())\n",
    ),
    program(
        "class-put-into-main",
        """
        import __main__, pickle
        class Point:
            pass
        Point.__module__ = '__main__'
        __main__.Point = Point
        def task(config):
            return type(pickle.loads(pickle.dumps(Point()))) is Point
        """,
    ),
    program("lambda", "import pickle\nf = lambda: 1\ndef task(config):\n    pickle.dumps(f)\n"),
    program(
        "local-class",
        "import pickle\ndef task(config):\n    class Point:\n        pass\n    pickle.dumps(Point())\n",
    ),
    program(
        "named-tuple",
        "import collections, pickle\nP = collections.namedtuple('P', 'x')\ndef task(config):\n    return [P.__module__, pickle.loads(pickle.dumps(P(1))).x]\n",
    ),
    program(
        "enum",
        "import enum, pickle\nE = enum.Enum('E', 'A B')\ndef task(config):\n    return [E.__module__, pickle.loads(pickle.dumps(E.A)) is E.A]\n",
    ),
    program(
        "names-of-modules",
        "import sys\ndef task(config):\n    return [__name__, __package__, __spec__.name, __spec__.origin == __file__, __loader__.name, task.__module__, task.__qualname__]\n",
    ),
    program(
        "copy-and-inspect",
        "import inspect, sys\ndef task(config):\n    return [inspect.getsource(task).count('x') > 0, inspect.getmodule(task) is sys.modules[__name__]]\n",
    ),
    program(
        "type-hints",
        "from __future__ import annotations\nimport dataclasses, typing\n@dataclasses.dataclass\nclass A:\n    x: 'B'\nclass B:\n    pass\ndef task(config):\n    return typing.get_type_hints(A)['x'] is B\n",
    ),
]


@pytest.mark.parametrize("program", PICKLES)
def test_pickles_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
