"""How a program can end: by its return value, an exception, sys.exit, a signal, or with something left to do."""

from __future__ import annotations

import pytest

from fidelity.harness import NO_RESULT, Program, Runner
from fidelity.programs import program

NOT_JSON = (
    "JSON has no such value: the job's message says so, plain Python has nothing to say it of"
)


def returned(name: str, value: str, before: str = "") -> object:
    return program(name, f"{before}\ndef task(config):\n    return {value}\n")


def raised(name: str, classes: str, error: str, says: str | None = None) -> object:
    code = f"{classes}\ndef task(config):\n    raise {error}\n"
    return program(name, code, says=says)


def left(name: str, code: str) -> object:
    return program(name, f"import os, sys\n{code}\ndef task(config):\n    sys.exit({name})\n")


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

ERRORS = [
    raised("value-error", "", "ValueError('bad batch')", says="ValueError: bad batch"),
    raised("without-words", "", "ValueError"),
    raised("several-lines", "", "ValueError('one\\ntwo\\n\\nthree')"),
    raised("odd-letters", "", "ValueError('żółw 🐢')"),
    raised(
        "frozen-dataclass",
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass MissingColumn(Exception):\n    name: str",
        "MissingColumn('price')",
        says="price",
    ),
    raised(
        "frozen-dataclass-with-slots",
        "from dataclasses import dataclass\n@dataclass(frozen=True, slots=True)\nclass E(Exception):\n    name: str",
        "E('price')",
        says="task.E: price",
    ),
    raised(
        "slots", "class E(Exception):\n    __slots__ = ('x',)", "E('words')", says="task.E: words"
    ),
    raised(
        "no-attributes-may-be-set",
        "class E(Exception):\n    def __setattr__(self, name, value):\n        raise AttributeError(name)",
        "E('words')",
        says="task.E: words",
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
    raised("odd-module", "class E(Exception):\n    __module__ = None", "E('words')"),
    raised(
        "module-is-main", "class E(Exception):\n    pass\nE.__module__ = '__main__'", "E('words')"
    ),
    raised("not-an-exception", "", "3"),
    raised("words-instead", "", "'words'"),
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
        "notes-of-odd-kinds",
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
        "no-memory", "def task(config):\n    return len(bytearray(1 << 62))\n", says="MemoryError"
    ),
    program(
        "division", "def task(config):\n    x = [1, 2]\n    return x[0] / (x[1] -\n        2)\n"
    ),
    program("syntax-error", "def task(config):\n    return 1 +\n", says="SyntaxError"),
    program("indentation-error", "def task(config):\nreturn 1\n", says="IndentationError"),
    program("tabs", "def task(config):\n        x = 1\n\treturn x\n", says="TabError"),
    program("null-byte", "def task(config):\n    return 'a\0b'\n", says="null bytes"),
    program(
        "not-utf-8-in-words",
        "# coding: nonsense\ndef task(config):\n    return 1\n",
        says="nonsense",
    ),
    program("other-coding", "# coding: latin-1\ndef task(config):\n    return 'ü'\n"),
    program(
        "error-at-import", "x = {}['a']\ndef task(config):\n    return 1\n", says="KeyError: 'a'"
    ),
    program("exit-at-import", "import sys\nsys.exit(3)\n"),
    program("exit-with-words-at-import", "import sys\nsys.exit('no licence')\n", says="no licence"),
    program(
        "error-in-the-class",
        "class Task:\n    def __init__(self):\n        raise ValueError('no model')\n"
        "    def __call__(self, config):\n        return 1\n",
        says="no model",
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
        says="division",
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

EXITS = [
    left("None", ""),
    left("0", ""),
    left("1", ""),
    left("2", ""),
    left("127", ""),
    left("255", ""),
    left("256", ""),
    left("257", ""),
    left("-1", ""),
    left("-256", ""),
    left("2**31", ""),
    left("2**32 + 5", ""),
    left("2**63 - 1", ""),
    left("2**63", ""),
    left("2**70", ""),
    left("-2**70", ""),
    left("'words'", ""),
    left("'words\\nof two lines\\n'", ""),
    left("''", ""),
    left("'żółw \\udcff'", ""),
    left("[]", ""),
    left("{}", ""),
    left("(1, 2)", ""),
    left("True", ""),
    left("False", ""),
    left("0.0", ""),
    left("3.7", ""),
    left("b'bytes'", ""),
    left("ValueError('x')", ""),
    left("Code.BAD", "import enum\nclass Code(enum.IntEnum):\n    BAD = 4"),
    left(
        "Index()",
        "class Index:\n    def __index__(self):\n        return 9\n    def __repr__(self):\n        return 'Index()'",
    ),
    left("Int(300)", "class Int(int):\n    pass"),
    left("Shy()", "class Shy:\n    def __str__(self):\n        raise ValueError('no words')"),
    left("None_()", "class None_:\n    def __str__(self):\n        return None"),
    left("Exits()", "class Exits:\n    def __str__(self):\n        sys.exit(7)"),
]

OTHER_EXITS = [
    program("raise-system-exit", "def task(config):\n    raise SystemExit\n"),
    program("raise-with-many", "def task(config):\n    raise SystemExit(1, 2)\n"),
    program("own-class", "class E(SystemExit):\n    code = 6\ndef task(config):\n    raise E\n"),
    program(
        "own-class-of-odd-code",
        "class E(SystemExit):\n    @property\n    def code(self):\n        raise ValueError\n"
        "def task(config):\n    raise E(3)\n",
    ),
    program("quit", "def task(config):\n    quit(4)\n"),
    program("exit", "def task(config):\n    exit('words')\n"),
    program(
        "exit-in-a-thread",
        "import sys, threading\ndef task(config):\n"
        "    t = threading.Thread(target=sys.exit, args=(5,))\n    t.start()\n    t.join()\n    return 'on'\n",
    ),
    *[
        program(
            f"os-exit-{code}",
            f"import os\ndef task(config):\n    print('half', end='')\n    f = open('f', 'w')\n    f.write('lost')\n    os._exit({code})\n",
        )
        for code in (0, 3, 255, 256)
    ],
    *[
        program(
            f"signal-{name}",
            f"import os, signal, time\ndef task(config):\n    print('half a line', end='')\n"
            f"    os.kill(os.getpid(), signal.{name})\n    time.sleep(60)\n",
        )
        for name in (
            "SIGKILL",
            "SIGTERM",
            "SIGSEGV",
            "SIGINT",
            "SIGHUP",
            "SIGUSR1",
            "SIGALRM",
            "SIGQUIT",
        )
    ],
    *[
        program(
            f"ignored-signal-{name}",
            f"import os, signal\ndef task(config):\n    os.kill(os.getpid(), signal.{name})\n    return 'on'\n",
        )
        for name in ("SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGWINCH", "SIGURG")
    ],
    program("abort", "import os\ndef task(config):\n    print('before')\n    os.abort()\n"),
    program("null-pointer", "import ctypes\ndef task(config):\n    ctypes.string_at(0)\n"),
    program(
        "raise-signal",
        "import signal\ndef task(config):\n    signal.raise_signal(signal.SIGTERM)\n",
    ),
    program(
        "alarm",
        "import signal, time\ndef task(config):\n    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    time.sleep(60)\n",
    ),
    program(
        "c-exit",
        "import atexit, ctypes\ndef task(config):\n    atexit.register(print, 'no')\n    ctypes.CDLL(None).exit(5)\n",
    ),
    program(
        "c-exit-handler",
        """
        import ctypes, os
        HANDLER = ctypes.CFUNCTYPE(None)(lambda: None)
        def task(config):
            libc = ctypes.CDLL(None)
            libc.printf(b'in the buffer\\n')
            libc.atexit(libc.fflush)
            return 1
        """,
    ),
    program(
        "exec",
        "import os, sys\ndef task(config):\n    os.execv('/bin/sh', ['sh', '-c', 'echo another program; exit 7'])\n",
    ),
    program("pthread-exit", "import _thread\ndef task(config):\n    _thread.exit()\n"),
    program(
        "interrupt-main",
        "import _thread, time\ndef task(config):\n    _thread.interrupt_main()\n    time.sleep(60)\n",
    ),
    program(
        "sigpipe-by-default",
        """
        import os, signal
        def task(config):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            read, write = os.pipe()
            os.close(read)
            os.write(write, b'x')
        """,
    ),
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


@pytest.mark.parametrize("program", ERRORS)
def test_an_error(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", EXITS)
def test_an_exit(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", OTHER_EXITS)
def test_another_end(program: Program, runner: Runner) -> None:
    runner.check(program)
