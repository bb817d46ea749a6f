"""Variables of the environment that Python and the C library read, and others."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

VARIABLES = [
    program(
        "path",
        "import helper\ndef task(config):\n    return helper.X\n",
        files={"libs/helper.py": "X = 7\n"},
        env={"PYTHONPATH": "libs"},
    ),
    program(
        "two-on-the-path",
        "import a, b\ndef task(config):\n    return [a.X, b.X]\n",
        files={"one/a.py": "X = 1\n", "two/b.py": "X = 2\n"},
        env={"PYTHONPATH": "one:two"},
    ),
    program(
        "path-of-children",
        "import subprocess, sys\ndef task(config):\n    return subprocess.run([sys.executable, '-c', 'import helper; print(helper.X)'], capture_output=True, text=True).stdout\n",
        files={"libs/helper.py": "X = 7\n"},
        env={"PYTHONPATH": "libs"},
    ),
    program(
        "path-before-the-library",
        "import tablelib\ndef task(config):\n    return tablelib.WHO\n",
        files={"libs/tablelib.py": "WHO = 'own'\n"},
        libraries={"tablelib.py": "WHO = 'installed'\n"},
        env={"PYTHONPATH": "libs"},
    ),
    program(
        "path-after-the-project",
        "import helper\ndef task(config):\n    return helper.WHO\n",
        files={"helper.py": "WHO = 'project'\n", "libs/helper.py": "WHO = 'path'\n"},
        env={"PYTHONPATH": "libs"},
    ),
    program(
        "hash-seed",
        "def task(config):\n    return [hash('words'), list({'a', 'b', 'c', 'd', 'e'})]\n",
        env={"PYTHONHASHSEED": "7"},
        jobs=2,
    ),
    program(
        "hash-seed-of-zero",
        "def task(config):\n    return hash('words')\n",
        env={"PYTHONHASHSEED": "0"},
    ),
    program(
        "warnings",
        "import warnings, sys\ndef task(config):\n    warnings.warn('words', DeprecationWarning)\n    return sys.warnoptions\n",
        env={"PYTHONWARNINGS": "error"},
    ),
    program(
        "warnings-by-category",
        "import warnings\ndef task(config):\n    warnings.warn('words', DeprecationWarning)\n    warnings.warn('words', UserWarning)\n",
        env={"PYTHONWARNINGS": "ignore::UserWarning,always::DeprecationWarning"},
    ),
    program(
        "optimize",
        "import sys\ndef task(config):\n    assert False, 'left out'\n    return [sys.flags.optimize, __debug__]\n",
        env={"PYTHONOPTIMIZE": "1"},
    ),
    program(
        "optimize-twice",
        "def task(config):\n    'words'\n    return task.__doc__\n",
        env={"PYTHONOPTIMIZE": "2"},
    ),
    program(
        "no-byte-code",
        "import sys, helper\ndef task(config):\n    return sys.dont_write_bytecode\n",
        files={"helper.py": ""},
        env={"PYTHONDONTWRITEBYTECODE": "1"},
    ),
    program(
        "fault-handler",
        "import faulthandler\ndef task(config):\n    return faulthandler.is_enabled()\n",
        env={"PYTHONFAULTHANDLER": "1"},
    ),
    program(
        "fault-handler-crash",
        "import ctypes\ndef task(config):\n    ctypes.string_at(0)\n",
        env={"PYTHONFAULTHANDLER": "1"},
    ),
    program(
        "tracemalloc",
        "import tracemalloc\ndef task(config):\n    return [tracemalloc.is_tracing(), tracemalloc.get_traceback_limit()]\n",
        env={"PYTHONTRACEMALLOC": "5"},
    ),
    program(
        "utf-8",
        "import sys\ndef task(config):\n    return [sys.flags.utf8_mode, open(__file__).encoding]\n",
        env={"PYTHONUTF8": "1"},
    ),
    program(
        "not-utf-8",
        "import sys\ndef task(config):\n    return [sys.flags.utf8_mode, sys.getfilesystemencoding()]\n",
        env={"PYTHONUTF8": "0"},
    ),
    program(
        "encoding-of-streams",
        "import sys\ndef task(config):\n    print('żółw')\n    return [sys.stdout.encoding, sys.stdout.errors]\n",
        env={"PYTHONIOENCODING": "ascii:xmlcharrefreplace"},
    ),
    program(
        "development-mode",
        "import sys\ndef task(config):\n    open('f', 'w')\n    return [sys.flags.dev_mode, sys.warnoptions]\n",
        env={"PYTHONDEVMODE": "1"},
    ),
    program(
        "allocator",
        "def task(config):\n    return len([bytes(100) for _ in range(1000)])\n",
        env={"PYTHONMALLOC": "malloc"},
    ),
    program(
        "async-debug",
        "import asyncio\nasync def main():\n    return asyncio.get_running_loop().get_debug()\ndef task(config):\n    return asyncio.run(main())\n",
        env={"PYTHONASYNCIODEBUG": "1"},
    ),
    program(
        "no-user-site",
        "import site, sys\ndef task(config):\n    return [sys.flags.no_user_site, site.ENABLE_USER_SITE]\n",
        env={"PYTHONNOUSERSITE": "1"},
    ),
    program(
        "breakpoint-off",
        "def task(config):\n    breakpoint()\n    return 'on'\n",
        env={"PYTHONBREAKPOINT": "0"},
    ),
    program(
        "own-breakpoint",
        "def task(config):\n    return breakpoint('words')\n",
        files={"hook.py": "def stop(words):\n    return words\n"},
        env={"PYTHONBREAKPOINT": "hook.stop"},
    ),
    program("breakpoint", "def task(config):\n    breakpoint()\n    return 'on'\n"),
    program(
        "digits",
        "def task(config):\n    return len(str(10 ** 5000))\n",
        env={"PYTHONINTMAXSTRDIGITS": "0"},
    ),
    program("digits-by-default", "def task(config):\n    return len(str(10 ** 5000))\n"),
    program(
        "locale-given",
        "import locale\ndef task(config):\n    return [locale.setlocale(locale.LC_ALL, ''), open(__file__).encoding]\n",
        env={"LC_ALL": "C.UTF-8"},
    ),
    program(
        "unusual-values",
        "import os\ndef task(config):\n    return [os.environ['A'], os.environ['B'], os.environ['C']]\n",
        env={"A": "", "B": "ż=\n$HOME", "C": " x "},
    ),
    program(
        "malloc-of-c",
        "import os\ndef task(config):\n    return os.environ['MALLOC_ARENA_MAX']\n",
        env={"MALLOC_ARENA_MAX": "1"},
    ),
]


@pytest.mark.parametrize("program", VARIABLES)
def test_environment_variables_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
