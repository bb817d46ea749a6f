"""Programs that change Python itself: functions that it calls at its end, its modules, trace
functions, its garbage collector, its filters of warnings."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

KEEPS_A_FILE = "f = open('f', 'w')\ndef task(config):\n    f.write('abc')\n"

REPLACED = [
    program("os-exit", "import os, sys\nos._exit = sys.exit\ndef task(config):\n    return 1\n"),
    program(
        "os-exit-that-does-nothing",
        "import os\nos._exit = print\ndef task(config):\n    return 1\n",
    ),
    program("os-exit-deleted", "import os\ndel os._exit\ndef task(config):\n    return 1\n"),
    program(
        "os-kill",
        "import os\nos.kill = lambda *a: None\ndef task(config):\n    raise KeyboardInterrupt\n",
    ),
    program("os-getpid", "import os\nos.getpid = lambda: 7\ndef task(config):\n    return 1\n"),
    program("os-write", "import os\nos.write = lambda *a: 0\ndef task(config):\n    return 1\n"),
    program(
        "os-write-that-fails",
        "import os\ndef no(*a):\n    raise OSError\nos.write = no\ndef task(config):\n    return 1\n",
    ),
    program(
        "os-fstat",
        "import os\nos.fstat = os.stat = lambda *a: None\ndef task(config):\n    return 1\n",
    ),
    program(
        "exit-handlers",
        "import atexit\natexit.register(print, 'at exit')\natexit._run_exitfuncs = print\ndef task(config):\n    return 1\n",
    ),
    program("objects", f"import gc\ngc.get_objects = lambda *a: []\n{KEEPS_A_FILE}"),
    program("objects-deleted", f"import gc\ndel gc.get_objects\n{KEEPS_A_FILE}"),
    program(
        "collect",
        f"import gc\ndef no(*a):\n    raise ValueError\ngc.collect = no\n{KEEPS_A_FILE}",
    ),
    *[
        program(
            f"builtin-{name}",
            f"import builtins\ndel builtins.{name}\ndef task(config):\n    1 / 0\n",
            message_contains="ZeroDivisionError: division by zero",
        )
        for name in ("getattr", "isinstance", "len", "str", "type")
    ],
]

MODULES = [
    program(
        "that-refuses-attributes",
        """
        import sys
        class Odd:
            def __getattr__(self, name):
                raise RuntimeError(name)
        sys.modules['odd'] = Odd()
        def task(config):
            return 1
        """,
    ),
    program(
        "that-refuses-attributes-and-a-slow-import",
        """
        import sys, time
        class Odd:
            def __getattr__(self, name):
                raise RuntimeError(name)
        sys.modules['odd'] = odd = Odd()
        time.sleep(0.25)
        def task(config):
            return 1
        """,
    ),
    program(
        "that-loads-itself-when-it-is-used",
        """
        import importlib.util, sys, time
        spec = importlib.util.find_spec('helper')
        spec.loader = importlib.util.LazyLoader(spec.loader)
        sys.modules['helper'] = helper = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(helper)
        time.sleep(0.25)
        def task(config):
            return 1
        """,
        files={"helper.py": "print('loaded')\n"},
    ),
    program(
        "removed-and-added-again",
        f"import sys\nsys.modules['os'] = sys.modules.pop('os')\n{KEEPS_A_FILE}",
    ),
    program("deleted", f"import sys\n{KEEPS_A_FILE}    del sys.modules\n"),
    program("replaced", f"import sys\n{KEEPS_A_FILE}    sys.modules = {{}}\n"),
    program(
        "in-order",
        "import sys, helper\ndef task(config):\n    return list(sys.modules)[-2:] == ['helper', __name__]\n",
        files={"helper.py": ""},
    ),
    program(
        "replaced-by-the-task-file",
        """
        import sys
        class Other:
            def task(self, config):
                return 'other'
        def task(config):
            return 'own'
        sys.modules[__name__] = Other()
        """,
    ),
]

WATCHERS = [
    program(
        "failing-trace-at-exit",
        """
        import sys
        def late(frame, event, argument):
            raise TimeoutError('late')
        def task(config):
            sys.settrace(late)
        """,
    ),
    program(
        "failing-profile-at-exit",
        """
        import sys
        def late(frame, event, argument):
            if event == 'call':
                raise TimeoutError('late')
        def task(config):
            sys.setprofile(late)
        """,
    ),
    *[
        program(
            f"{what}-left-for-exit-handlers",
            f"""
            import atexit, sys
            def handler():
                print('at exit')
            atexit.register(handler)
            def watcher(frame, event, argument):
                if event == 'call':
                    sys.stdout.write(frame.f_code.co_name + '\\n')
            def task(config):
                sys.set{what}(watcher)
            """,
        )
        for what in ("trace", "profile")
    ],
    program(
        "audit-hook-that-refuses",
        """
        import sys
        is_over = []
        def hook(event, arguments):
            if is_over:
                raise RuntimeError(event)
        sys.addaudithook(hook)
        f = open('f', 'w')
        def task(config):
            f.write('abc')
            is_over.append(True)
        """,
    ),
]

COLLECTOR = [
    program(
        "gc-callbacks-at-exit",
        """
        import gc
        def told(phase, about):
            print(phase, about['generation'])
        def task(config):
            gc.callbacks.append(told)
        """,
    ),
    program(
        "uncollected-garbage",
        "import gc\ndef task(config):\n    gc.garbage.append('x')\n    gc.set_debug(gc.DEBUG_UNCOLLECTABLE)\n",
    ),
    program(
        "revived-for-good",
        """
        import os
        os.kept = kept = []
        class Thing:
            def __del__(self):
                print('deleted')
                kept.append(self)
        def task(config):
            Thing()
        """,
    ),
]

OPEN = {
    "folder": "import os\nkept = os.scandir('.')",
    "socket": "import _socket\nkept = _socket.socket()",
}
CHANGES = {
    "added": "warnings.simplefilter('always')",
    "reset": "warnings.resetwarnings()",
    "replaced": "warnings.filters = []",
}
FILTERS = [
    program(
        f"{what}-{how}",
        f"import warnings\n{code}\ndef task(config):\n    global context\n    {change}\n",
    )
    for what, code in OPEN.items()
    for how, change in CHANGES.items()
]


@pytest.mark.parametrize("program", REPLACED)
def test_replaced_functions_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", MODULES)
def test_changes_of_sys_modules_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", WATCHERS)
def test_trace_and_profile_functions_agree_with_plain_python(
    program: Program, runner: Runner
) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", COLLECTOR)
def test_changes_of_the_garbage_collector_agree_with_plain_python(
    program: Program, runner: Runner
) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", FILTERS)
def test_filters_of_warnings_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
