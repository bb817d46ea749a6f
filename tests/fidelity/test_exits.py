"""Other ends of a program: sys.exit of every kind of value, os._exit, signals."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program


def exits_with(name: str, code: str) -> object:
    return program(name, f"import os, sys\n{code}\ndef task(config):\n    sys.exit({name})\n")


EXITS = [
    exits_with("None", ""),
    exits_with("0", ""),
    exits_with("1", ""),
    exits_with("2", ""),
    exits_with("127", ""),
    exits_with("255", ""),
    exits_with("256", ""),
    exits_with("257", ""),
    exits_with("-1", ""),
    exits_with("-256", ""),
    exits_with("2**31", ""),
    exits_with("2**32 + 5", ""),
    exits_with("2**63 - 1", ""),
    exits_with("2**63", ""),
    exits_with("2**70", ""),
    exits_with("-2**70", ""),
    exits_with("'words'", ""),
    exits_with("'words\\nof two lines\\n'", ""),
    exits_with("''", ""),
    exits_with("'żółw \\udcff'", ""),
    exits_with("[]", ""),
    exits_with("{}", ""),
    exits_with("(1, 2)", ""),
    exits_with("True", ""),
    exits_with("False", ""),
    exits_with("0.0", ""),
    exits_with("3.7", ""),
    exits_with("b'bytes'", ""),
    exits_with("ValueError('x')", ""),
    exits_with("Code.BAD", "import enum\nclass Code(enum.IntEnum):\n    BAD = 4"),
    exits_with(
        "Index()",
        "class Index:\n    def __index__(self):\n        return 9\n    def __repr__(self):\n        return 'Index()'",
    ),
    exits_with("Int(300)", "class Int(int):\n    pass"),
]


OTHER_EXITS = [
    program("raise-system-exit", "def task(config):\n    raise SystemExit\n"),
    program("raise-with-many", "def task(config):\n    raise SystemExit(1, 2)\n"),
    program("own-class", "class E(SystemExit):\n    code = 6\ndef task(config):\n    raise E\n"),
    program(
        "own-class-whose-code-fails",
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


@pytest.mark.parametrize("program", EXITS)
def test_sys_exit_agrees_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", OTHER_EXITS)
def test_other_ends_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
