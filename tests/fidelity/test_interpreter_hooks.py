"""Hooks that a program installs in the interpreter."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

HOOKS = [
    program(
        "excepthook",
        """
        import sys
        def hook(kind, error, trace):
            print('hook', kind.__name__, error, trace is error.__traceback__)
        sys.excepthook = hook
        def task(config):
            raise ValueError('x')
        """,
    ),
    program(
        "excepthook-and-a-frozen-error",
        """
        import sys
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class E(Exception):
            name: str
        sys.excepthook = lambda *args: print('hook', args[1].name)
        def task(config):
            raise E('price')
        """,
    ),
    program(
        "excepthook-that-fails",
        """
        import sys
        def hook(*args):
            raise TypeError('in the hook')
        sys.excepthook = hook
        def task(config):
            raise ValueError('x')
        """,
    ),
    program(
        "excepthook-that-exits",
        """
        import sys
        sys.excepthook = lambda *args: sys.exit(9)
        def task(config):
            raise ValueError('x')
        """,
    ),
    program(
        "excepthook-is-none",
        "import sys\nsys.excepthook = None\ndef task(config):\n    raise ValueError('x')\n",
    ),
    program(
        "excepthook-deleted",
        "import sys\ndel sys.excepthook\ndef task(config):\n    raise ValueError('x')\n",
    ),
    program(
        "excepthook-not-for-an-exit",
        "import sys\nsys.excepthook = lambda *args: print('never')\ndef task(config):\n    sys.exit(3)\n",
    ),
    program(
        "excepthook-for-an-interrupt",
        "import sys\nsys.excepthook = lambda *args: print('hook')\ndef task(config):\n    raise KeyboardInterrupt\n",
    ),
    program(
        "last-error",
        """
        import atexit, sys
        atexit.register(lambda: print(sys.last_type, sys.last_value))
        def task(config):
            raise ValueError('x')
        """,
    ),
    program(
        "unraisablehook",
        """
        import sys
        sys.unraisablehook = lambda about: print('hook', about.exc_value, about.err_msg)
        class Thing:
            def __del__(self):
                raise ValueError('x')
        def task(config):
            Thing()
        """,
    ),
    program(
        "displayhook",
        "import sys\ndef task(config):\n    sys.displayhook(3)\n    exec(compile('1 + 1', 'x', 'single'))\n",
    ),
    program(
        "audit-hook",
        """
        import sys
        seen = []
        def hook(event, args):
            if event == 'open' and args[0] == 'f':
                print('opened', args[0])
        def task(config):
            sys.addaudithook(hook)
            open('f', 'w').close()
        """,
    ),
    program(
        "meta-path-hook",
        """
        import sys
        class Finder:
            def find_spec(self, name, path, target=None):
                if name.startswith('odd_'):
                    print('sought', name)
        sys.meta_path.insert(0, Finder())
        def task(config):
            try:
                import odd_module
            except ImportError as error:
                return str(error)
        """,
    ),
    program(
        "tracebacklimit",
        "import sys\nsys.tracebacklimit = 0\ndef task(config):\n    raise ValueError('x')\n",
    ),
    program(
        "traceback-module",
        """
        import traceback
        def task(config):
            try:
                1 / 0
            except ZeroDivisionError:
                traceback.print_exc()
                print(traceback.format_exc(limit=1))
        """,
    ),
    program(
        "logging-of-an-error",
        """
        import logging
        def task(config):
            try:
                1 / 0
            except ZeroDivisionError:
                logging.exception('failed')
        """,
    ),
    program(
        "cgitb",
        "import faulthandler\ndef task(config):\n    faulthandler.enable()\n    return faulthandler.is_enabled()\n",
    ),
]


@pytest.mark.parametrize("program", HOOKS)
def test_hooks_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
