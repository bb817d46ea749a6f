"""Where a job differs from plain Python on purpose: plain Python runs no code there, or cannot
report it."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

GENERATOR = "cortex: the task is a generator: nothing of it has run. Take yield out of it, and return a value\n"
ASYNC = "cortex: the task is async: nothing of it has run. Define def task(config), and call asyncio.run in it\n"
NOTHING_RAN = "a call of the task runs no line of it, in plain Python and in a job; a job would count as succeeded"

PROGRAMS = [
    program(
        "generator",
        "def task(config):\n    print('training')\n    for epoch in range(3):\n        yield epoch\n",
        differences={"exit_code": 1, "log": GENERATOR},
        reason=NOTHING_RAN,
        message_contains="generator",
    ),
    program(
        "class-whose-call-is-a-generator",
        "class Task:\n    def __call__(self, config):\n        yield 1\n",
        differences={"exit_code": 1, "log": GENERATOR},
        reason=NOTHING_RAN,
        message_contains="generator",
    ),
    program(
        "async",
        "async def task(config):\n    print('training')\n",
        differences={"exit_code": 1, "log": ASYNC},
        reason=NOTHING_RAN,
        message_contains="asyncio.run",
    ),
    program(
        "async-generator",
        "async def task(config):\n    yield 1\n",
        differences={"exit_code": 1, "log": ASYNC},
        reason=NOTHING_RAN,
        message_contains="asyncio.run",
    ),
    program(
        "future",
        "import asyncio\nloop = asyncio.new_event_loop()\ndef task(config):\n    return loop.create_future()\n",
        differences={"exit_code": 1, "log": ASYNC},
        reason=NOTHING_RAN,
        message_contains="asyncio.run",
    ),
    program(
        "exhausted-generator",
        "def task(config):\n    g = (print(n) for n in range(2))\n    list(g)\n    return g\n",
        message_contains="not kept",
    ),
    program(
        "generator-expression",
        "def task(config):\n    return (n for n in range(2))\n",
        message_contains="not kept",
    ),
    program(
        "no-task",
        "def run(config):\n    return 1\n",
        differences={
            "log": "cortex: task.py defines neither a class Task nor a function task(config)\n"
        },
        reason="plain Python names the missing attribute and the driver's code",
        message_contains="neither a class Task nor a function",
    ),
    program(
        "no-call",
        "class Task:\n    def run(self, config):\n        return 1\n",
        differences={
            "log": "cortex: the class Task of task.py has no method __call__(self, config)\n"
        },
        reason="plain Python names the object that is not callable and the driver's code",
        message_contains="no method __call__",
    ),
    *[
        program(
            f"exit-with-a-message-that-cannot-be-shown-{name}",
            f"import sys\nclass Odd:\n    def __str__(self):\n        {body}\ndef task(config):\n    sys.exit(Odd())\n",
            differences={"log": "<its message cannot be shown>\n"},
            reason="plain Python prints an empty line there",
        )
        for name, body in (
            ("raises", "raise ValueError"),
            ("none", "return None"),
            ("exits", "sys.exit(7)"),
        )
    ],
    program(
        "child-runs-forever",
        "import os, subprocess\ndef task(config):\n    global p, q\n    p = subprocess.Popen(['sleep', '60'])\n"
        "    q = subprocess.Popen(['sh', '-c', 'sleep 60 & wait'], start_new_session=True)\n    return 1\n",
        message_contains="it had left processes running, which were killed: sh, sleep. ",
    ),
    program(
        "child-runs-forever-after-a-failure",
        "import subprocess\ndef task(config):\n    global p\n    p = subprocess.Popen(['sleep', '60'])\n    raise ValueError('x')\n",
        message_contains="ValueError: x",
    ),
    program(
        "surrogates",
        "def task(config):\n    print('\\udcff \\ud800')\n    return 1\n",
        differences={"log": "\\udcff \\ud800\n", "exit_code": 0, "result": 1},
        reason="a log is UTF-8 for any locale, and shows other bytes with backslashes",
    ),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_job_differs_from_plain_python_only_as_intended(program: Program, runner: Runner) -> None:
    runner.check(program)
