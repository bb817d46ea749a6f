"""Objects that exist when a program ends: their destructors, generators, context managers."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

DESTRUCTORS = [
    program(
        "of-a-module",
        """
        class Thing:
            def __init__(self, name):
                self.name = name
            def __del__(self):
                print('deleted', self.name)
        a = Thing('a')
        b = Thing('b')
        _c = Thing('_c')
        def task(config):
            local = Thing('local')
            print('task')
            return 1
        """,
    ),
    program(
        "of-the-task",
        """
        class Task:
            def __call__(self, config):
                return 1
            def __del__(self):
                print('task deleted')
        """,
    ),
    program(
        "of-the-result",
        """
        class Result(dict):
            def __del__(self):
                print('result deleted')
        def task(config):
            return Result(a=1)
        """,
    ),
    program(
        "of-a-cycle",
        """
        class Thing:
            def __del__(self):
                print('deleted')
        def task(config):
            thing = Thing()
            thing.me = thing
        """,
    ),
    program(
        "of-a-cycle-of-a-module",
        """
        class Thing:
            def __del__(self):
                print('deleted', self.name)
        one, two = Thing(), Thing()
        one.name, two.name = 'one', 'two'
        one.other, two.other = two, one
        def task(config):
            return 1
        """,
    ),
    program(
        "after-exit-handlers",
        """
        import atexit
        class Thing:
            def __del__(self):
                print('deleted')
        thing = Thing()
        atexit.register(print, 'at exit')
        def task(config):
            print('task')
        """,
    ),
    program(
        "failing",
        """
        class Thing:
            def __del__(self):
                raise ValueError('in the destructor')
        def task(config):
            Thing()
            return 1
        """,
    ),
    program(
        "using-a-module",
        """
        import json, os
        class Thing:
            def __del__(self, dumps=json.dumps):
                print(dumps({'a': 1}), os.getcwd() != '')
        thing = Thing()
        def task(config):
            return 1
        """,
    ),
    program(
        "of-an-untracked-object",
        """
        class Bare:
            __slots__ = ()
            def __del__(self):
                print('bare deleted')
        class Number(int):
            __slots__ = ()
            def __del__(self):
                print('number deleted')
        kept = (Bare(), [Bare()], {'a': Number(3)}, frozenset([Number(4)]))
        def task(config):
            return 1
        """,
    ),
    program(
        "inherited-by-an-untracked-object",
        """
        class Base:
            __slots__ = ()
            def __del__(self):
                print('deleted')
        class Below(Base):
            __slots__ = ()
        kept = Below()
        del Base
        def task(config):
            return 1
        """,
    ),
    program(
        "added-later",
        """
        class Bare:
            __slots__ = ()
        kept = Bare()
        def task(config):
            Bare.__del__ = lambda self: print('deleted')
        """,
    ),
    program(
        "of-a-class",
        """
        class Meta(type):
            def __del__(cls):
                print('class deleted')
        class Thing(metaclass=Meta):
            pass
        def task(config):
            return 1
        """,
    ),
    program(
        "behind-plain-things",
        """
        class Thing:
            def __del__(self):
                print('deleted')
        class Holder:
            held = property(lambda self, thing=Thing(): thing)
            also = staticmethod(lambda thing=Thing(): thing)
            more = classmethod(lambda cls, thing=Thing(): thing)
            __slots__ = ('x',)
        def task(config):
            task.held = {1: [(Thing(),)]}
        """,
    ),
    program(
        "called-back-by-a-weak-reference",
        """
        import _weakref
        class Thing:
            pass
        thing = Thing()
        seen = _weakref.ref(thing, lambda _: print('gone'))
        def task(config):
            return 1
        """,
    ),
    program(
        "of-a-library",
        "import lib\ndef task(config):\n    return 1\n",
        libraries={
            "lib.py": "class T:\n    def __del__(self):\n        print('library deleted')\nt = T()\n"
        },
    ),
    program(
        "of-an-own-module",
        "import helper\ndef task(config):\n    return 1\n",
        files={
            "helper.py": "class T:\n    def __del__(self):\n        print('helper deleted')\nt = T()\n"
        },
    ),
    program(
        "referenced-by-an-exception",
        """
        class Thing:
            def __del__(self):
                print('deleted')
        def task(config):
            thing = Thing()
            raise ValueError('x')
        """,
    ),
    program(
        "after-sys-exit",
        """
        import sys
        class Thing:
            def __del__(self):
                print('deleted')
        thing = Thing()
        def task(config):
            local = Thing()
            sys.exit(2)
        """,
    ),
    program(
        "referenced-by-a-standard-module",
        """
        import os
        class Thing:
            def __del__(self):
                print('deleted')
        os.kept = Thing()
        def task(config):
            return 1
        """,
    ),
    program(
        "revived",
        """
        kept = []
        class Thing:
            def __del__(self):
                kept.append(self)
                print('revived')
        def task(config):
            Thing()
            return len(kept)
        """,
    ),
    program(
        "generator",
        """
        def numbers():
            try:
                yield 1
            finally:
                print('generator closed')
        kept = numbers()
        def task(config):
            local = numbers()
            next(local)
            return next(kept)
        """,
    ),
    program(
        "generator-that-refuses",
        """
        def numbers():
            try:
                yield 1
            except GeneratorExit:
                yield 2
        kept = numbers()
        def task(config):
            return next(kept)
        """,
        differences={
            "log": "Exception ignored in: <generator object numbers at <address>>\n"
            'Traceback (most recent call last):\n  File "sys", line 1, in <module>\n'
            "RuntimeError: generator ignored GeneratorExit\n"
        },
        reason="Python adds the running frame to the error; at the end of plain Python no frame runs",
    ),
    program(
        "open-context-manager",
        """
        import contextlib
        @contextlib.contextmanager
        def resource():
            print('acquired')
            try:
                yield
            finally:
                print('released')
        manager = resource()
        def task(config):
            manager.__enter__()
        """,
    ),
    program(
        "coroutine-never-awaited",
        "async def later():\n    pass\ndef task(config):\n    later()\n    return 1\n",
    ),
    program(
        "unfinished-coroutine",
        "async def later():\n    pass\nkept = later()\ndef task(config):\n    return 1\n",
    ),
    program(
        "open-async-generator",
        """
        import asyncio
        async def numbers():
            try:
                yield 1
            finally:
                print('closed')
        async def main():
            global kept
            kept = numbers()
            return await kept.__anext__()
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "collector-callbacks",
        """
        import gc
        def told(phase, about):
            if phase == 'start' and about['generation'] == 2:
                print('full collection')
        gc.callbacks.append(told)
        class Thing:
            def __del__(self):
                print('deleted')
        def task(config):
            thing = Thing()
            thing.me = thing
            gc.collect()
            gc.callbacks.clear()
        """,
    ),
    program(
        "state-of-the-collector",
        "import gc\ndef task(config):\n    return [gc.isenabled(), gc.get_threshold(), gc.get_debug(), len(gc.garbage)]\n",
    ),
    program(
        "debugging-the-collector",
        """
        import gc
        class Thing: pass
        def task(config):
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
            thing = Thing()
            thing.me = thing
            del thing
            gc.collect()
            gc.set_debug(0)
            found = [type(each).__name__ for each in gc.garbage]
            gc.garbage.clear()
            return found
        """,
    ),
    program(
        "objects-of-the-collector",
        """
        import gc
        class Thing: pass
        kept = [Thing() for _ in range(3)]
        def task(config):
            return [sum(isinstance(o, Thing) for o in gc.get_objects()), len(gc.get_referrers(kept[0]))]
        """,
    ),
]

MODULES_COMPLETE = "Python's modules are complete while a job's own objects are destroyed; in plain Python they may be cleared"

MORE_IN_A_JOB = [
    program(
        "failing",
        """
        class Thing:
            def __del__(self):
                raise ValueError('in the destructor')
        thing = Thing()
        def task(config):
            return 1
        """,
        differences={
            "log": "Exception ignored in: <function Thing.__del__ at <address>>\n"
            "Traceback (most recent call last):\n"
            '  File "<project>/task.py", line 3, in __del__\n'
            "    raise ValueError('in the destructor')\n"
            "ValueError: in the destructor\n"
        },
        reason=f"{MODULES_COMPLETE}, and with them the lines of a traceback",
    ),
    program(
        "writing-a-file",
        """
        class Writer:
            def __init__(self):
                self.rows = []
            def __del__(self):  # NameError: plain Python has removed `open` before
                with open('rows', 'w') as f:
                    f.write(str(self.rows))
        writer = Writer()
        def task(config):
            writer.rows.append(1)
        """,
        differences={"log": "", "files": {"rows": b"[1]"}},
        reason=MODULES_COMPLETE,
    ),
]


@pytest.mark.parametrize("program", MORE_IN_A_JOB)
def test_a_destructor_can_do_more_in_a_job_than_in_plain_python(
    program: Program, runner: Runner
) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", DESTRUCTORS)
def test_destructors_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
