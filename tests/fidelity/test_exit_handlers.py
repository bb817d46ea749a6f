"""Exit handlers and finalizers, and their order."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

HANDLERS = [
    program(
        "order",
        """
        import atexit
        for n in range(3):
            atexit.register(print, 'handler', n)
        def task(config):
            atexit.register(print, 'of the task')
            print('task')
        """,
    ),
    program(
        "failing",
        """
        import atexit
        def fail():
            raise ValueError('at exit')
        atexit.register(print, 'first registered')
        atexit.register(fail)
        atexit.register(print, 'last registered')
        def task(config):
            return 1
        """,
    ),
    program(
        "exiting",
        """
        import atexit, sys
        atexit.register(print, 'still called')
        atexit.register(sys.exit, 7)
        def task(config):
            return 1
        """,
    ),
    program(
        "leaving",
        "import atexit, os\natexit.register(os._exit, 9)\ndef task(config):\n    return 1\n",
    ),
    program(
        "killing",
        "import atexit, os\natexit.register(os.kill, os.getpid(), 9)\ndef task(config):\n    return 1\n",
    ),
    program(
        "interrupting",
        """
        import atexit
        def interrupt():
            raise KeyboardInterrupt
        atexit.register(interrupt)
        def task(config):
            return 1
        """,
    ),
    program(
        "registering",
        """
        import atexit
        def more():
            atexit.register(print, 'registered at exit')
            print('at exit')
        atexit.register(more)
        def task(config):
            return 1
        """,
    ),
    program(
        "unregistered",
        """
        import atexit
        atexit.register(print, 'never')
        def task(config):
            atexit.unregister(print)
        """,
    ),
    program(
        "run-by-hand",
        """
        import atexit
        atexit.register(print, 'once')
        def task(config):
            atexit._run_exitfuncs()
            print('after')
        """,
    ),
    program("count", "import atexit\ndef task(config):\n    return atexit._ncallbacks()\n", jobs=2),
    program(
        "count-with-logging",
        "import logging\nimport atexit\ndef task(config):\n    return atexit._ncallbacks()\n",
        jobs=2,
    ),
    program(
        "cleared",
        "import atexit\natexit.register(print, 'never')\ndef task(config):\n    atexit._clear()\n",
    ),
    program(
        "after-an-error",
        "import atexit\natexit.register(print, 'at exit')\ndef task(config):\n    raise ValueError('x')\n",
    ),
    program(
        "after-an-error-at-import",
        "import atexit\natexit.register(print, 'at exit')\n1 / 0\n",
    ),
    program(
        "after-a-syntax-error-of-another-module",
        "import atexit\natexit.register(print, 'at exit')\nimport other\n",
        files={"other.py": "def f(:\n"},
        message_contains="SyntaxError",
    ),
    program(
        "writing-a-result",
        """
        import atexit, os
        def save():
            with open('state', 'w') as f:
                f.write(os.getcwd() == START and 'here' or 'elsewhere')
        START = os.getcwd()
        atexit.register(save)
        def task(config):
            return 1
        """,
    ),
    program(
        "in-a-child",
        """
        import atexit, os, sys
        atexit.register(lambda: print('in', 'the child' if os.getpid() != PID else 'the task'))
        PID = os.getpid()
        def task(config):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
        """,
    ),
    program(
        "starting-a-thread",
        """
        import atexit, threading
        def start():
            t = threading.Thread(target=print, args=('thread at exit',))
            t.start()
            t.join()
        atexit.register(start)
        def task(config):
            return 1
        """,
    ),
    program(
        "starting-a-process",
        """
        import atexit, subprocess
        atexit.register(subprocess.run, ['echo', 'process at exit'])
        def task(config):
            return 1
        """,
    ),
    program(
        "of-a-library",
        "import lib\ndef task(config):\n    return 1\n",
        libraries={"lib.py": "import atexit\natexit.register(print, 'library at exit')\n"},
    ),
    program(
        "imports-in-it",
        """
        import atexit
        def late():
            import decimal, helper
            print(decimal.Decimal('1.1') + helper.X)
        atexit.register(late)
        def task(config):
            return 1
        """,
        files={"helper.py": "X = 1\n"},
    ),
    program(
        "threading-atexit",
        """
        import threading
        threading._register_atexit(print, 'before the threads are joined')
        def task(config):
            return 1
        """,
    ),
    program(
        "logging-shutdown",
        """
        import logging
        class Handler(logging.Handler):
            def flush(self):
                print('flushed')
            def close(self):
                print('closed')
                super().close()
        handler = Handler()
        def task(config):
            return 1
        """,
    ),
    program(
        "finalizers",
        """
        import weakref
        class Thing: pass
        things = [Thing() for _ in range(3)]
        for n, thing in enumerate(things):
            weakref.finalize(thing, print, 'finalizer', n)
        quiet = weakref.finalize(things[0], print, 'never at exit')
        quiet.atexit = False
        def task(config):
            things.pop()
            print('task')
        """,
    ),
    program(
        "finalizer-that-fails",
        """
        import weakref
        class Thing: pass
        thing = Thing()
        weakref.finalize(thing, lambda: 1 / 0)
        def task(config):
            return 1
        """,
    ),
    program(
        "weak-reference-callback",
        """
        import weakref
        class Thing: pass
        thing = Thing()
        ref = weakref.ref(thing, lambda ref: print('gone'))
        def task(config):
            return 1
        """,
    ),
    program(
        "handlers-of-the-task-object",
        """
        import atexit
        class Task:
            def __init__(self):
                atexit.register(self.close)
            def __call__(self, config):
                return 1
            def close(self):
                print('closed')
        """,
    ),
]


@pytest.mark.parametrize("program", HANDLERS)
def test_exit_handlers_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
