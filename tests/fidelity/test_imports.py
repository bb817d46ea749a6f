"""How a program imports its modules: order, conditions, environment, path, names, output.

Each library is a few lines in the site-packages of the environment.
"""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

RETURN = "def task(config):\n    return 1\n"


ORDER = [
    program(
        "environment-before-an-import",
        """
        import os
        os.environ['HUB_HOME'] = '/data/hub'
        import hublib
        def task(config):
            return hublib.HOME
        """,
        libraries={"hublib.py": "import os\nHOME = os.environ.get('HUB_HOME', '/home/default')\n"},
    ),
    program(
        "environment-by-setdefault-in-another-module",
        """
        import settings
        import hublib
        def task(config):
            return hublib.HOME
        """,
        files={"settings.py": "import os\nos.environ.setdefault('HUB_HOME', '/data/hub')\n"},
        libraries={"hublib.py": "import os\nHOME = os.environ.get('HUB_HOME', '/home/default')\n"},
    ),
    program(
        "environment-by-putenv",
        """
        import ctypes, os
        os.putenv('ODD', 'yes')
        import lib
        def task(config):
            return [lib.ODD, os.environ.get('ODD')]
        """,
        libraries={
            "lib.py": "import ctypes\ng = ctypes.CDLL(None).getenv\ng.restype = ctypes.c_char_p\nODD = (g(b'ODD') or b'').decode()\n"
        },
    ),
    program(
        "environment-that-an-import-changes",
        "import os\nimport lib\ndef task(config):\n    return [os.environ.get('LIB'), 'PATH' in os.environ]\n",
        libraries={"lib.py": "import os\nos.environ['LIB'] = 'set'\ndel os.environ['PATH']\n"},
        jobs=2,
    ),
    program(
        "environment-that-an-import-adds-to",
        "import os\nimport lib\ndef task(config):\n    return os.environ['LIB_FLAGS']\n",
        libraries={
            "lib.py": "import os\nos.environ['LIB_FLAGS'] = os.environ.get('LIB_FLAGS', '') + ' -x'\n"
        },
        jobs=3,
    ),
    program(
        "vendored-before-installed",
        """
        import os, sys
        sys.path.insert(0, os.path.join(os.path.dirname(__file__), 'vendor'))
        import tablelib
        def task(config):
            return tablelib.WHO
        """,
        files={"vendor/tablelib.py": "WHO = 'vendored'\n"},
        libraries={"tablelib.py": "WHO = 'installed'\n"},
    ),
    program(
        "path-appended",
        "import sys\nsys.path.append('vendor')\nimport tablelib\ndef task(config):\n    return tablelib.WHO\n",
        files={"vendor/tablelib.py": "WHO = 'vendored'\n"},
        libraries={"tablelib.py": "WHO = 'installed'\n"},
    ),
    program(
        "path-replaced",
        "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\ntry:\n    import tablelib\nexcept ImportError as error:\n    WHO = str(error)\ndef task(config):\n    return WHO\n",
        libraries={"tablelib.py": "WHO = 'installed'\n"},
    ),
    program(
        "module-replaced-in-sys-modules",
        """
        import sys, types
        fake = types.ModuleType('tablelib')
        fake.WHO = 'fake'
        sys.modules['tablelib'] = fake
        import tablelib
        def task(config):
            return tablelib.WHO
        """,
        libraries={"tablelib.py": "WHO = 'installed'\n"},
    ),
    program(
        "module-forbidden",
        """
        import sys
        sys.modules['fastlib'] = None
        import tablelib
        def task(config):
            return tablelib.FAST
        """,
        libraries={
            "tablelib.py": "try:\n    import fastlib\n    FAST = True\nexcept ImportError:\n    FAST = False\n",
            "fastlib.py": "",
        },
    ),
    program(
        "standard-module-patched-before",
        """
        import time
        time.sleep = lambda seconds: print('slept', seconds)
        import lib
        def task(config):
            lib.wait()
        """,
        libraries={"lib.py": "from time import sleep\ndef wait():\n    sleep(3600)\n"},
    ),
    program(
        "builtin-patched-before",
        """
        import builtins
        builtins.print = lambda *words, print=print: print('patched', *words)
        import lib
        def task(config):
            lib.say()
        """,
        libraries={"lib.py": "def say():\n    print('words')\n"},
        jobs=2,
    ),
    program(
        "class-of-a-library-patched",
        "import lib\nlib.T.name = lib.T.name + '!'\ndef task(config):\n    return lib.T.name\n",
        libraries={"lib.py": "class T:\n    name = 'T'\n"},
        jobs=3,
    ),
    program(
        "state-of-a-library",
        "import lib\ndef task(config):\n    lib.COUNT.append(1)\n    return len(lib.COUNT)\n",
        libraries={"lib.py": "COUNT = []\n"},
        jobs=3,
    ),
    program(
        "conditional",
        """
        import builtins, os
        if os.environ.get('DEBUG'):
            import prettylib
        def task(config):
            return hasattr(builtins, 'PRETTY')
        """,
        libraries={"prettylib.py": "import builtins\nbuiltins.PRETTY = True\n"},
    ),
    program(
        "for-type-checkers",
        """
        import sys
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            import heavylib
        def task(config):
            return 'heavylib' in sys.modules
        """,
        libraries={"heavylib.py": ""},
    ),
    program(
        "in-a-try",
        """
        import sys
        try:
            import missing_lib
        except ImportError:
            import otherlib as missing_lib
        def task(config):
            return [missing_lib.WHO, 'otherlib' in sys.modules]
        """,
        libraries={"otherlib.py": "WHO = 'other'\n"},
    ),
    program(
        "the-better-of-two",
        """
        import sys
        try:
            import goodlib as lib
        except ImportError:
            import badlib as lib
        def task(config):
            return [lib.__name__, 'badlib' in sys.modules]
        """,
        libraries={"goodlib.py": "", "badlib.py": "raise SystemExit('never imported')\n"},
    ),
    program(
        "in-the-task",
        "import sys\ndef task(config):\n    before = 'latelib' in sys.modules\n    import latelib\n    return [before, latelib.X]\n",
        libraries={"latelib.py": "X = 1\n"},
    ),
    program(
        "by-importlib",
        "import importlib\ndef task(config):\n    return importlib.import_module(config['name']).X\n",
        libraries={"latelib.py": "X = 1\n"},
        config={"name": "latelib"},
    ),
    program(
        "reloaded",
        "import importlib\nimport lib\ndef task(config):\n    importlib.reload(lib)\n    return lib.N\n",
        libraries={"lib.py": "N = globals().get('N', 0) + 1\n"},
        jobs=2,
    ),
    program(
        "own-modules-in-a-circle",
        "import a\ndef task(config):\n    return a.get()\n",
        files={
            "a.py": "import b\nX = 1\ndef get():\n    return b.get()\n",
            "b.py": "import a\ndef get():\n    return a.X\n",
        },
    ),
    program(
        "a-circle-that-fails",
        "import a\n" + RETURN,
        files={"a.py": "from b import Y\nX = 1\n", "b.py": "from a import X\nY = 2\n"},
    ),
    program(
        "a-circle-with-the-task",
        "import helper\nX = 5\ndef task(config):\n    return helper.get()\n",
        files={"helper.py": "import task\ndef get():\n    return task.X\n"},
    ),
    program(
        "the-task-is-imported-once",
        "import sys\nprint('imported')\ndef task(config):\n    import task\n    return task is sys.modules[__name__]\n",
    ),
    program(
        "error-behind-another",
        "import weblib\n" + RETURN,
        libraries={
            "metricslib.py": "NAMES = set()\ndef counter(name):\n    if name in NAMES:\n        raise ValueError(f'metric {name} is there already')\n    NAMES.add(name)\n",
            "weblib.py": "import metricslib\nmetricslib.counter('requests_total')\nimport libgl_binding\n",
        },
        message_contains="ModuleNotFoundError: No module named 'libgl_binding'",
    ),
    program(
        "settings-that-an-import-needs",
        """
        import os
        os.environ['APP_SETTINGS'] = 'prod'
        import applib
        def task(config):
            return applib.SETTINGS
        """,
        libraries={
            "metricslib.py": "NAMES = set()\ndef counter(name):\n    if name in NAMES:\n        raise ValueError(f'metric {name} is there already')\n    NAMES.add(name)\n",
            "applib.py": "import os\nimport metricslib\nmetricslib.counter('app_info')\nSETTINGS = os.environ['APP_SETTINGS']\n",
        },
    ),
    program(
        "missing", "import missing_lib\n" + RETURN, message_contains="No module named 'missing_lib'"
    ),
    program(
        "missing-name",
        "from os import no_such_name\n" + RETURN,
        message_contains="cannot import name",
    ),
    program(
        "library-that-fails-at-times",
        """
        try:
            import lib
        except ValueError:
            import lib
        def task(config):
            return lib.X
        """,
        libraries={
            "lib.py": "import builtins\nif not hasattr(builtins, 'seen'):\n    builtins.seen = 1\n    raise ValueError\nX = 1\n"
        },
        jobs=2,
    ),
    program(
        "library-that-exits",
        "import lib\n" + RETURN,
        libraries={"lib.py": "import sys\nsys.exit('this machine has no licence')\n"},
        message_contains="no licence",
    ),
    program(
        "library-that-kills",
        "import lib\n" + RETURN,
        libraries={"lib.py": "import os\nprint('before')\nos.abort()\n"},
    ),
    program(
        "star",
        "from lib import *\ndef task(config):\n    return [a, sorted(n for n in globals() if n in 'abc')]\n",
        libraries={"lib.py": "__all__ = ['a', 'b']\na, b, c = 1, 2, 3\n"},
    ),
    program(
        "sub-modules",
        "import pack.sub\nimport pack\ndef task(config):\n    return [pack.sub.X, hasattr(pack, 'other')]\n",
        libraries={"pack/__init__.py": "", "pack/sub.py": "X = 1\n", "pack/other.py": ""},
    ),
    program(
        "lazy-package",
        "import sys\nimport pack\ndef task(config):\n    before = 'pack.heavy' in sys.modules\n    return [before, pack.heavy.X]\n",
        libraries={
            "pack/__init__.py": "def __getattr__(name):\n    import importlib\n    return importlib.import_module('.' + name, __name__)\n",
            "pack/heavy.py": "X = 1\n",
        },
    ),
    program(
        "lazy-loader",
        """
        import importlib.util, sys
        spec = importlib.util.find_spec('lib')
        spec.loader = importlib.util.LazyLoader(spec.loader)
        lib = sys.modules['lib'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(lib)
        def task(config):
            print('task')
            return lib.X
        """,
        libraries={"lib.py": "print('imported')\nX = 1\n"},
    ),
    program(
        "namespace-package",
        "import space.one, space.two\ndef task(config):\n    return [space.one.X, space.two.X]\n",
        files={"space/one.py": "X = 1\n"},
        libraries={"space/two.py": "X = 2\n"},
    ),
    program(
        "own-package-installed-for-development",
        "import pipeline\ndef task(config):\n    return pipeline.RUN_ID\n",
        files={"src/pipeline/__init__.py": "import uuid\nRUN_ID = uuid.uuid4().hex\n"},
        libraries={
            "pipeline.pth": "import os, sys; sys.path.append(os.path.join(os.getcwd(), 'src'))\n"
        },
        is_random=True,
        jobs=3,
    ),
    program(
        "package-that-makes-an-id",
        "import pipeline\ndef task(config):\n    return pipeline.RUN_ID\n",
        libraries={"pipeline/__init__.py": "import uuid\nRUN_ID = uuid.uuid4().hex\n"},
        is_random=True,
        jobs=3,
    ),
    program(
        "modules-loaded-before",
        """
        import sys
        names = set(sys.modules)
        def task(config):
            return sorted(names & {'hublib', 'numpy', 'threading', 'logging', 'asyncio', 'socket', 'subprocess',
                                   'random', 'multiprocessing', 'queue', 'pathlib', 'typing', 'ast'})
        """,
    ),
    program(
        "warnings-at-import",
        "import lib\n" + RETURN,
        libraries={
            "lib.py": "import warnings\nwarnings.warn('careful')\nwarnings.warn('old', FutureWarning, stacklevel=2)\n"
        },
        jobs=2,
    ),
    program(
        "warnings-once",
        "import warnings\ndef task(config):\n    for _ in range(3):\n        warnings.warn('careful')\n    warnings.warn('old', DeprecationWarning)\n",
        jobs=2,
    ),
    program(
        "filters-of-warnings",
        "import warnings\ndef task(config):\n    return [[f[0], f[2].__name__] for f in warnings.filters]\n",
    ),
    program(
        "output-at-import",
        "import lib\n" + RETURN,
        libraries={
            "lib.py": "import sys\nprint('lib: no GPU, using the CPU')\nprint('to stderr', file=sys.stderr)\n"
        },
        jobs=2,
    ),
    program(
        "half-a-line-at-import",
        "import lib\ndef task(config):\n    print('task')\n",
        libraries={
            "lib.py": "import os\nprint('loading ...', end='')\nos.write(1, b'from below\\n')\n"
        },
    ),
    program(
        "output-of-own-modules",
        "print('task file')\nimport helper\ndef task(config):\n    print('task')\n",
        files={"helper.py": "print('helper')\n"},
        jobs=2,
    ),
    program(
        "logging-set-up-at-import",
        "import lib\nimport logging\ndef task(config):\n    logging.getLogger('x').info('words')\n",
        libraries={
            "lib.py": "import logging, sys\nlogging.basicConfig(level='INFO', stream=sys.stdout, format='%(name)s %(message)s')\n"
        },
        jobs=2,
    ),
]


@pytest.mark.parametrize("program", ORDER)
def test_imports_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
