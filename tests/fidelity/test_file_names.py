"""The names and the layout of a project's files: unusual names of the task's file, names of
standard modules, packages, data beside the code, a folder of `definition.python_path`."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

SPAWN = """
import multiprocessing as mp
def square(n):
    return n * n
def task(config):
    with mp.get_context('spawn').Pool(1) as pool:
        return pool.map(square, [3])
"""
ONE = "def task(config):\n    return 1\n"

PATHS = [
    program("dash", ONE, path="my-task.py"),
    program("dash-and-spawn", SPAWN, path="my-task.py"),
    program("space", ONE, path="my task.py"),
    program("space-and-spawn", SPAWN, path="my task.py"),
    program("digits", ONE, path="2024.py"),
    program("non-ascii", ONE, path="żółw.py"),
    program("keyword", ONE, path="class.py"),
    program("dots", ONE, path="my.task.py", import_by_path=True),
    program("dots-and-a-version", ONE, path="train-v1.2.py", import_by_path=True),
    program(
        "dots-and-an-error",
        "def task(config):\n    raise ValueError('x')\n",
        path="my.task.py",
        import_by_path=True,
    ),
    program("folder", ONE, path="jobs/train.py"),
    program("folder-and-spawn", SPAWN, path="jobs/train.py"),
    program("folder-with-a-dash", ONE, path="my-jobs/train.py"),
    program("deep-folder", ONE, path="a/b/c/d.py"),
    program(
        "standard-name",
        "import sys\nX = 3\ndef task(config):\n    import random\n    return getattr(random, 'X', None)\n",
        path="random.py",
    ),
    *[
        program(f"standard-name-{name}", ONE, path=f"{name}.py", import_by_path=name == "__main__")
        for name in (
            "queue",
            "test",
            "code",
            "main",
            "__main__",
            "job",
            "cortex",
            "worker",
            "email",
            "calendar",
            "statistics",
        )
    ],
    program(
        "package",
        "from . import helper\ndef task(config):\n    return [helper.X, __name__, __package__]\n",
        path="pkg/task.py",
        files={"pkg/__init__.py": "", "pkg/helper.py": "X = 1\n"},
    ),
    program(
        "package-in-a-package",
        "from ..other import X\nfrom .helper import Y\ndef task(config):\n    return [X, Y]\n",
        path="pkg/sub/task.py",
        files={
            "pkg/__init__.py": "",
            "pkg/other.py": "X = 1\n",
            "pkg/sub/__init__.py": "",
            "pkg/sub/helper.py": "Y = 2\n",
        },
    ),
    program(
        "package-with-output",
        "print('task')\ndef task(config):\n    return 1\n",
        path="pkg/task.py",
        files={"pkg/__init__.py": "print('package')\n"},
    ),
    program(
        "package-that-imports-the-task",
        "X = 1\ndef task(config):\n    return 1\n",
        path="pkg/task.py",
        files={"pkg/__init__.py": "from .task import X\n"},
    ),
    program(
        "package-that-fails",
        ONE,
        path="pkg/task.py",
        files={"pkg/__init__.py": "1 / 0\n"},
        message_contains="ZeroDivisionError",
    ),
    program(
        "package-and-absolute-imports",
        "from pkg.helper import X\nimport pkg\ndef task(config):\n    return [X, pkg.task.__name__]\n",
        path="pkg/task.py",
        files={"pkg/__init__.py": "", "pkg/helper.py": "X = 1\n"},
    ),
    program(
        "package-and-spawn",
        "from .helper import X\n" + SPAWN,
        path="pkg/task.py",
        files={"pkg/__init__.py": "", "pkg/helper.py": "X = 1\n"},
    ),
    program(
        "package-and-pickle",
        "import pickle\nclass P:\n    pass\ndef task(config):\n    return pickle.dumps(P, 0).decode()\n",
        path="pkg/task.py",
        files={"pkg/__init__.py": ""},
    ),
    program(
        "relative-import-without-a-package",
        "from . import helper\n" + ONE,
        files={"helper.py": ""},
        message_contains="ImportError",
    ),
    program(
        "python-path",
        "import helper\ndef task(config):\n    return helper.X\n",
        files={"src/helper.py": "X = 1\n"},
        python_path="src",
    ),
    program(
        "python-path-of-children",
        "import subprocess, sys\nimport multiprocessing as mp\nimport helper\ndef task(config):\n    with mp.get_context('spawn').Pool(1) as pool:\n        return pool.map(helper.twice, [2])\n",
        files={"src/helper.py": "def twice(n):\n    return 2 * n\n"},
        python_path="src",
    ),
    program("byte-order-mark", "\ufeff" + ONE),
    program("windows-line-ends", ONE.replace("\n", "\r\n")),
    program("old-mac-line-ends", ONE.replace("\n", "\r")),
    program("form-feed", "\f\n" + ONE),
    program("no-newline-at-the-end", ONE.rstrip("\n")),
    program("empty-lines", "\n\n\n" + ONE),
    program("first-line-of-a-program", "#!/usr/bin/env python3\n# -*- coding: utf-8 -*-\n" + ONE),
    program("long", "x = 0\n" + "x += 1\n" * 5000 + "def task(config):\n    return x\n"),
]

FILES = {
    "queue": "class Queue:\n    WHO = 'own'\n",
    "logging": "WHO = 'own'\n",
    "types": "WHO = 'own'\n",
    "random": "WHO = 'own'\n",
    "json": "WHO = 'own'\n",
    "signal": "WHO = 'own'\n",
    "socket": "WHO = 'own'\n",
    "select": "WHO = 'own'\n",
    "time": "WHO = 'own'\n",
    "io": "WHO = 'own'\n",
    "os": "WHO = 'own'\n",
    "site": "WHO = 'own'\n",
    "abc": "WHO = 'own'\n",
    "ctypes": "WHO = 'own'\n",
    "weakref": "WHO = 'own'\n",
    "atexit": "WHO = 'own'\n",
    "gc": "WHO = 'own'\n",
    "resource": "WHO = 'own'\n",
    "importlib": "WHO = 'own'\n",
    "contextlib": "WHO = 'own'\n",
    "dataclasses": "WHO = 'own'\n",
    "traceback": "WHO = 'own'\n",
    "operator": "WHO = 'own'\n",
    "string": "WHO = 'own'\n",
    "enum": "WHO = 'own'\n",
    "cortex": "WHO = 'own'\n",
    "builtins": "WHO = 'own'\n",
    "codecs": "WHO = 'own'\n",
    "tempfile": "WHO = 'own'\n",
    "platform": "WHO = 'own'\n",
    "config": "WHO = 'own'\n",
    "utils": "WHO = 'own'\n",
    "test": "WHO = 'own'\n",
}
# The driver imports json for the result, and would import the project's own module of these names.
NO_RESULT = {"json", "enum", "re", "codecs"}


def named(name: str, *, package: bool = False) -> object:
    code = f"import {name}\ndef task(config):\n    print(getattr({name}, 'WHO', 'standard'))\n"
    path = f"{name}/__init__.py" if package else f"{name}.py"
    return program(f"{name}-package" if package else name, code, files={path: FILES[name]})


OWN = [
    *[named(name) for name in FILES],
    *[
        named(name, package=True)
        for name in ("queue", "logging", "cortex", "types", "test", "signal", "ctypes")
    ],
    program(
        "threading",
        "import threading\ndef task(config):\n    return threading.WHO\n",
        files={"threading.py": "WHO = 'own'\n"},
        differences={"log": ""},
        reason="Python calls a function of any module of this name to wait for threads, and prints an error where the function is missing",
    ),
    program(
        "package-cortex-with-a-logger",
        "from cortex.logger import logger\ndef task(config):\n    return logger\n",
        files={"cortex/__init__.py": "", "cortex/logger.py": "logger = 'own'\n"},
    ),
    program(
        "own-queue-and-a-library",
        "import lib\ndef task(config):\n    return lib.WHO\n",
        files={"queue.py": "WHO = 'own'\n"},
        libraries={"lib.py": "import queue\nWHO = getattr(queue, 'WHO', 'standard')\n"},
    ),
    program(
        "own-module-like-a-library",
        "import lib\ndef task(config):\n    return lib.WHO\n",
        files={"lib.py": "WHO = 'own'\n"},
        libraries={"lib.py": "WHO = 'installed'\n"},
    ),
    program(
        "library-like-a-standard-module",
        "import queue\ndef task(config):\n    return getattr(queue, 'WHO', 'standard')\n",
        libraries={"queue.py": "WHO = 'installed'\n"},
    ),
    program(
        "shadow-that-breaks",
        "import logging\ndef task(config):\n    return 1\n",
        files={"string.py": "1 / 0\n"},
        message_contains="ZeroDivisionError",
    ),
    program(
        "named-like-the-task",
        "import task as other\ndef task(config):\n    return other.__name__\n",
        files={"task/data.txt": ""},
    ),
    program(
        "only-byte-code",
        "import py_compile, os, sys\npy_compile.compile('helper.py', 'made.pyc')\nimport made\ndef task(config):\n    return made.X\n",
        files={"helper.py": "X = 1\n"},
        reader="print('read')",
    ),
    program(
        "zip-on-the-path",
        "import sys, zipfile\nwith zipfile.ZipFile('libs.zip', 'w') as z:\n    z.writestr('inzip.py', 'X = 1')\nsys.path.append('libs.zip')\nimport inzip\ndef task(config):\n    return inzip.X\n",
        reader="print('read')",
    ),
    program(
        "text-beside-the-code",
        "import os\nHERE = os.path.dirname(__file__)\ndef task(config):\n    return [open(os.path.join(HERE, 'data/rows.txt')).read(), open('data/rows.txt').read()]\n",
        files={"data/rows.txt": "1\n"},
    ),
    program(
        "importlib-resources",
        "import importlib.resources\ndef task(config):\n    return importlib.resources.files('pack').joinpath('rows.txt').read_text()\n",
        files={"pack/__init__.py": "", "pack/rows.txt": "1\n"},
    ),
    program(
        "resources-of-a-folder",
        "from importlib.resources import files\ndef task(config):\n    return sorted(p.name for p in files('data').iterdir())\n",
        files={"data/rows.txt": "1\n"},
    ),
    program(
        "pkgutil",
        "import pkgutil\ndef task(config):\n    import pack\n    return [pkgutil.get_data('pack', 'rows.txt').decode(), sorted(m.name for m in pkgutil.iter_modules(pack.__path__))]\n",
        files={"pack/__init__.py": "", "pack/rows.txt": "1\n", "pack/a.py": ""},
    ),
    program(
        "metadata",
        "import importlib.metadata\ndef task(config):\n    return [importlib.metadata.version('lib'), sorted(d.name for d in importlib.metadata.distributions())]\n",
        libraries={
            "lib.py": "",
            "lib-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: lib\nVersion: 1.2\n",
        },
    ),
    program(
        "entry-points",
        "from importlib.metadata import entry_points\ndef task(config):\n    return [e.load()() for e in entry_points(group='tools')]\n",
        libraries={
            "lib.py": "def f():\n    return 'tool'\n",
            "lib-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: lib\nVersion: 1.2\n",
            "lib-1.2.dist-info/entry_points.txt": "[tools]\na = lib:f\n",
        },
    ),
    program(
        "pth-files",
        "import lib\ndef task(config):\n    return lib.X\n",
        libraries={"more/lib.py": "X = 1\n", "more.pth": "more\n"},
    ),
    program(
        "pth-files-that-run-code",
        "import sys\ndef task(config):\n    return sys.started\n",
        libraries={"start.pth": "import sys; sys.started = 'yes'\n"},
    ),
    program(
        "site-customize",
        "import sys\ndef task(config):\n    return sys.started\n",
        libraries={"sitecustomize.py": "import sys\nsys.started = 'yes'\n"},
    ),
    program(
        "user-customize",
        "import sys\ndef task(config):\n    return hasattr(sys, 'started')\n",
        files={
            "usercustomize.py": "import sys\nsys.started = 1\n",
            "sitecustomize.py": "import sys\nsys.started = 1\n",
        },
        differences={"result": False},
        reason="`python -c` imports a sitecustomize of the current folder only where PYTHONPATH names that folder",
    ),
    program(
        "dotenv",
        "import os\ndef task(config):\n    return [l for l in open('.env')]\n",
        files={".env": "A=1\n"},
    ),
    program(
        "task-and-class",
        "class Task:\n    def __call__(self, config):\n        return 'class'\ndef task(config):\n    return 'function'\n",
    ),
    program(
        "imported-task",
        "from helper import task\n",
        files={"helper.py": "def task(config):\n    return 'helper'\n"},
    ),
    program(
        "partial",
        "import functools\ndef work(a, config):\n    return [a, config]\ntask = functools.partial(work, 3)\n",
    ),
    program(
        "decorated",
        "import functools\ndef twice(f):\n    @functools.wraps(f)\n    def inner(*a):\n        return [f(*a), f(*a)]\n    return inner\n@twice\ndef task(config):\n    return config['x']\n",
        config={"x": 2},
    ),
    program(
        "object",
        "class Work:\n    def __call__(self, config):\n        return 'object'\ntask = Work()\n",
    ),
    program(
        "static-method",
        "class Task:\n    @staticmethod\n    def __call__(config):\n        return config\n",
        config={"a": [1]},
    ),
    program(
        "data-class",
        "import dataclasses\n@dataclasses.dataclass\nclass Task:\n    n: int = 3\n    def __call__(self, config):\n        return self.n\n",
    ),
    program(
        "config-is-its-own",
        "def task(config):\n    config['x'].append(2)\n    return config\n",
        config={"x": [1]},
        jobs=2,
    ),
    program("more-parameters", "def task(config, more=3, *args, **kwargs):\n    return more\n"),
    program("no-parameter", "def task():\n    return 1\n", message_contains="TypeError"),
]


@pytest.mark.parametrize("program", PATHS)
def test_task_files_of_any_name_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", OWN)
def test_files_of_the_project_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
