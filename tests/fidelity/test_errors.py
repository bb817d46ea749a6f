"""Exceptions of every kind that end a program."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program


def raised(name: str, classes: str, error: str, message_contains: str | None = None) -> object:
    code = f"{classes}\ndef task(config):\n    raise {error}\n"
    return program(name, code, message_contains=message_contains)


ERRORS = [
    raised("value-error", "", "ValueError('bad batch')", message_contains="ValueError: bad batch"),
    raised("without-a-message", "", "ValueError"),
    raised("several-lines", "", "ValueError('one\\ntwo\\n\\nthree')"),
    raised("non-ascii", "", "ValueError('żółw 🐢')"),
    raised(
        "frozen-dataclass",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass MissingColumn(Exception):\n    name: str",
        "MissingColumn('price')",
        message_contains="price",
    ),
    raised(
        "frozen-dataclass-with-slots",
        "from dataclasses import dataclass\n@dataclass(frozen=True, slots=True)\nclass E(Exception):\n    name: str",
        "E('price')",
        message_contains="task.E: price",
    ),
    raised(
        "slots",
        "class E(Exception):\n    __slots__ = ('x',)",
        "E('words')",
        message_contains="task.E: words",
    ),
    raised(
        "no-attributes-may-be-set",
        "class E(Exception):\n    def __setattr__(self, name, value):\n        raise AttributeError(name)",
        "E('words')",
        message_contains="task.E: words",
    ),
    raised(
        "no-attributes-may-be-read",
        "class E(Exception):\n    def __getattribute__(self, name):\n        raise RuntimeError(name)",
        "E('words')",
    ),
    raised(
        "str-raises",
        "class E(Exception):\n    def __str__(self):\n        raise ValueError('no words')",
        "E",
    ),
    raised(
        "str-exits", "class E(Exception):\n    def __str__(self):\n        raise SystemExit(5)", "E"
    ),
    raised("str-is-none", "class E(Exception):\n    def __str__(self):\n        return None", "E"),
    raised(
        "repr-raises",
        "class E(KeyError):\n    def __repr__(self):\n        raise ValueError('no words')",
        "E('key')",
    ),
    raised(
        "eq-raises",
        "class E(Exception):\n    def __eq__(self, other):\n        raise ValueError('no comparing')\n"
        "    __hash__ = None",
        "E('words') from E('cause')",
    ),
    raised(
        "bool-raises",
        "class E(Exception):\n    def __bool__(self):\n        raise ValueError('no truth')\n"
        "    def __len__(self):\n        return 0",
        "E('words')",
    ),
    raised("key-error", "", "KeyError('column')"),
    raised("base-exception", "class E(BaseException):\n    pass", "E('words')"),
    raised("generator-exit", "", "GeneratorExit('words')"),
    raised("stop-iteration", "", "StopIteration(3)"),
    raised("asyncio-cancelled", "import asyncio", "asyncio.CancelledError('words')"),
    raised("keyboard-interrupt", "", "KeyboardInterrupt"),
    raised("subclass-of-keyboard-interrupt", "class E(KeyboardInterrupt):\n    pass", "E('words')"),
    raised("memory-error", "", "MemoryError"),
    raised("os-error", "", "OSError(2, 'No such file', '/etc/x', None, '/etc/y')"),
    raised("unicode-error", "", "UnicodeDecodeError('utf-8', b'\\xff', 0, 1, 'why')"),
    raised(
        "group", "", "ExceptionGroup('two', [ValueError('a'), ExceptionGroup('b', [TypeError(1)])])"
    ),
    raised("base-group", "", "BaseExceptionGroup('one', [KeyboardInterrupt()])"),
    raised("group-of-exits", "", "BaseExceptionGroup('one', [SystemExit(3)])"),
    raised(
        "local-class",
        "def make():\n    class E(Exception):\n        pass\n    return E",
        "make()('words')",
    ),
    raised(
        "exception-without-a-module", "class E(Exception):\n    __module__ = None", "E('words')"
    ),
    raised(
        "module-is-main", "class E(Exception):\n    pass\nE.__module__ = '__main__'", "E('words')"
    ),
    raised("not-an-exception", "", "3"),
    raised("string-instead-of-an-exception", "", "'words'"),
    raised(
        "class-that-cannot-be-made",
        "class E(Exception):\n    def __init__(self, a, b):\n        pass",
        "E",
    ),
    raised("assertion", "def check():\n    assert 1 == 2, 'not the same'\n", "check()"),
    program(
        "notes",
        """
        def task(config):
            error = ValueError('words')
            error.add_note('a note')
            error.add_note('another\\nof two lines')
            raise error
        """,
    ),
    program(
        "notes-that-are-no-strings",
        """
        def task(config):
            error = ValueError('words')
            error.__notes__ = [3, None, object]
            raise error
        """,
    ),
    program(
        "cause-and-context",
        """
        def task(config):
            try:
                try:
                    {}['a']
                except KeyError as error:
                    raise ValueError('second') from error
            except ValueError:
                raise TypeError('third')
        """,
    ),
    program(
        "context-suppressed",
        """
        def task(config):
            try:
                {}['a']
            except KeyError:
                raise ValueError('second') from None
        """,
    ),
    program(
        "cause-that-is-itself",
        """
        def task(config):
            error = ValueError('words')
            error.__cause__ = error
            raise error
        """,
    ),
    program(
        "frozen-context",
        """
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class E(Exception):
            name: str
        def task(config):
            try:
                raise E('first')
            except E:
                raise ValueError('second')
        """,
    ),
    program("recursion", "def task(config):\n    return task(config)\n"),
    program(
        "no-memory",
        "def task(config):\n    return len(bytearray(1 << 62))\n",
        message_contains="MemoryError",
    ),
    program(
        "division", "def task(config):\n    x = [1, 2]\n    return x[0] / (x[1] -\n        2)\n"
    ),
    program("syntax-error", "def task(config):\n    return 1 +\n", message_contains="SyntaxError"),
    program(
        "indentation-error", "def task(config):\nreturn 1\n", message_contains="IndentationError"
    ),
    program("tabs", "def task(config):\n        x = 1\n\treturn x\n", message_contains="TabError"),
    program("null-byte", "def task(config):\n    return 'a\0b'\n", message_contains="null bytes"),
    program(
        "message-that-is-not-utf-8",
        "# coding: nonsense\ndef task(config):\n    return 1\n",
        message_contains="nonsense",
    ),
    program("other-source-encoding", "# coding: latin-1\ndef task(config):\n    return 'ü'\n"),
    program(
        "error-at-import",
        "x = {}['a']\ndef task(config):\n    return 1\n",
        message_contains="KeyError: 'a'",
    ),
    program("exit-at-import", "import sys\nsys.exit(3)\n"),
    program(
        "exit-with-a-message-at-import",
        "import sys\nsys.exit('no licence')\n",
        message_contains="no licence",
    ),
    program(
        "error-in-the-class",
        "class Task:\n    def __init__(self):\n        raise ValueError('no model')\n"
        "    def __call__(self, config):\n        return 1\n",
        message_contains="no model",
    ),
    program(
        "error-in-a-library",
        "import lib\ndef task(config):\n    return lib.work()\n",
        libraries={"lib.py": "def work():\n    raise ValueError('inside')\n"},
    ),
    program(
        "warning-that-is-an-error",
        "import warnings\ndef task(config):\n    warnings.simplefilter('error')\n    warnings.warn('careful')\n",
    ),
    program(
        "traceback-through-exec",
        "def task(config):\n    exec(compile('x = 1\\ny = x / 0', 'generated.py', 'exec'))\n",
    ),
    program(
        "traceback-with-eval",
        "def task(config):\n    return eval('1 / 0', {}, {})\n",
        message_contains="division",
    ),
    program(
        "error-in-a-child-class",
        "class Task:\n    def __call__(self, config):\n        return self.step()\n"
        "    def step(self):\n        raise LookupError\n",
    ),
    program(
        "group-from-asyncio",
        """
        import asyncio
        async def fail(n):
            raise ValueError(n)
        async def main():
            async with asyncio.TaskGroup() as group:
                group.create_task(fail(1))
                group.create_task(fail(2))
        def task(config):
            asyncio.run(main())
        """,
    ),
    program(
        "error-while-handling-an-exit",
        "import sys\ndef task(config):\n    try:\n        sys.exit(3)\n    finally:\n        1 / 0\n",
    ),
    program(
        "exit-while-handling-an-error",
        "import sys\ndef task(config):\n    try:\n        1 / 0\n    finally:\n        sys.exit(3)\n",
    ),
]


@pytest.mark.parametrize("program", ERRORS)
def test_an_error_ends_a_job_as_it_ends_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
