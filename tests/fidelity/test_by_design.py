"""Where a job differs from plain Python on purpose: plain Python runs nothing there, or has nobody to tell of it."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

GENERATOR = "cortex: the task is a generator: nothing of it has run. Take yield out of it, and return a value\n"
ASYNC = "cortex: the task is async: nothing of it has run. Define def task(config), and call asyncio.run in it\n"
NOTHING_RAN = "calling the task runs no line of it, in plain Python as in a job, where it would be called a success"

PROGRAMS = [
    program(
        "generator",
        "def task(config):\n    print('training')\n    for epoch in range(3):\n        yield epoch\n",
        but={"exit_code": 1, "log": GENERATOR},
        why=NOTHING_RAN,
        says="generator",
    ),
    program(
        "class-whose-call-is-a-generator",
        "class Task:\n    def __call__(self, config):\n        yield 1\n",
        but={"exit_code": 1, "log": GENERATOR},
        why=NOTHING_RAN,
        says="generator",
    ),
    program(
        "async",
        "async def task(config):\n    print('training')\n",
        but={"exit_code": 1, "log": ASYNC},
        why=NOTHING_RAN,
        says="asyncio.run",
    ),
    program(
        "async-generator",
        "async def task(config):\n    yield 1\n",
        but={"exit_code": 1, "log": ASYNC},
        why=NOTHING_RAN,
        says="asyncio.run",
    ),
    program(
        "future",
        "import asyncio\nloop = asyncio.new_event_loop()\ndef task(config):\n    return loop.create_future()\n",
        but={"exit_code": 1, "log": ASYNC},
        why=NOTHING_RAN,
        says="asyncio.run",
    ),
    program(
        "generator-that-was-emptied",
        "def task(config):\n    g = (print(n) for n in range(2))\n    list(g)\n    return g\n",
        says="not kept",
    ),
    program(
        "generator-expression",
        "def task(config):\n    return (n for n in range(2))\n",
        says="not kept",
    ),
    program(
        "no-task",
        "def run(config):\n    return 1\n",
        but={"log": "cortex: task.py defines neither a class Task nor a function task(config)\n"},
        why="plain Python names the attribute that is missing, in words of the driver's",
        says="neither a class Task nor a function",
    ),
    program(
        "no-call",
        "class Task:\n    def run(self, config):\n        return 1\n",
        but={"log": "cortex: the class Task of task.py has no method __call__(self, config)\n"},
        why="plain Python names the object that is not callable, in words of the driver's",
        says="no method __call__",
    ),
    *[
        program(
            f"exit-with-words-that-cannot-be-shown-{name}",
            f"import sys\nclass Odd:\n    def __str__(self):\n        {body}\ndef task(config):\n    sys.exit(Odd())\n",
            but={"log": "<its message cannot be shown>\n"},
            why="plain Python prints an empty line there",
        )
        for name, body in (
            ("raises", "raise ValueError"),
            ("none", "return None"),
            ("exits", "sys.exit(7)"),
        )
    ],
    program(
        "left-running-for-good",
        "import os, subprocess\ndef task(config):\n    global p, q\n    p = subprocess.Popen(['sleep', '60'])\n"
        "    q = subprocess.Popen(['sh', '-c', 'sleep 60 & wait'], start_new_session=True)\n    return 1\n",
        says="it had left processes running, which were killed: sh, sleep. ",
    ),
    program(
        "left-running-for-good-by-a-failure",
        "import subprocess\ndef task(config):\n    global p\n    p = subprocess.Popen(['sleep', '60'])\n    raise ValueError('x')\n",
        says="ValueError: x",
    ),
    program(
        "surrogates",
        "def task(config):\n    print('\\udcff \\ud800')\n    return 1\n",
        but={"log": "\\udcff \\ud800\n", "exit_code": 0, "result": 1},
        why="a log is UTF-8 for any locale, and shows what has no place in it",
    ),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_difference(program: Program, runner: Runner) -> None:
    runner.check(program)
