"""What Python runs before it exits: threads, exit handlers, destructors, finalizers, hooks; and in which order."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

THREADS = [
    program(
        "thread-that-goes-on",
        """
        import threading, time
        def work():
            time.sleep(0.2)
            print('thread done')
        def task(config):
            threading.Thread(target=work).start()
            print('task done')
            return 1
        """,
    ),
    program(
        "thread-that-goes-on-after-an-error",
        """
        import threading, time
        def work():
            time.sleep(0.2)
            print('thread done')
        def task(config):
            threading.Thread(target=work).start()
            raise ValueError('x')
        """,
    ),
    program(
        "thread-that-starts-another",
        """
        import threading, time
        def work(n):
            time.sleep(0.05)
            print('thread', n)
            if n:
                threading.Thread(target=work, args=(n - 1,)).start()
        def task(config):
            threading.Thread(target=work, args=(3,)).start()
        """,
    ),
    program(
        "thread-and-sys-exit",
        """
        import sys, threading, time
        def work():
            time.sleep(0.2)
            print('thread done')
        def task(config):
            threading.Thread(target=work).start()
            sys.exit(3)
        """,
    ),
    program(
        "daemon-thread",
        """
        import threading, time
        def work():
            while True:
                time.sleep(0.01)
        def task(config):
            threading.Thread(target=work, daemon=True).start()
            return 'done'
        """,
    ),
    program(
        "daemon-thread-that-computes",
        """
        import threading
        def work():
            while True:
                sum(range(1000))
        def task(config):
            threading.Thread(target=work, daemon=True).start()
            return 'done'
        """,
    ),
    program(
        "daemon-thread-that-holds-a-file",
        """
        import threading, time
        ready = threading.Event()
        def work():
            with open('f', 'w') as f:
                f.write('in the buffer')
                ready.set()
                time.sleep(60)
        def task(config):
            threading.Thread(target=work, daemon=True).start()
            ready.wait()
            return 'done'
        """,
    ),
    program(
        "raw-thread",
        """
        import _thread, time
        def work():
            time.sleep(60)
        def task(config):
            _thread.start_new_thread(work, ())
            return 'done'
        """,
    ),
    program(
        "timer",
        "import threading\ndef task(config):\n    threading.Timer(0.1, print, ('later',)).start()\n",
    ),
    program(
        "error-in-a-thread",
        """
        import threading
        def work():
            raise ValueError('in the thread')
        def task(config):
            t = threading.Thread(target=work, name='worker')
            t.start()
            t.join()
            return 'on'
        """,
    ),
    program(
        "excepthook-of-threads",
        """
        import threading
        def hook(about):
            print('hook', about.exc_type.__name__, about.thread.name)
        threading.excepthook = hook
        def work():
            raise ValueError('in the thread')
        def task(config):
            threading.Thread(target=work, name='worker').start()
        """,
    ),
    program(
        "thread-that-was-started-at-import",
        """
        import queue, threading
        tasks = queue.Queue()
        def work():
            for n in iter(tasks.get, None):
                print('worked on', n)
        thread = threading.Thread(target=work)
        thread.start()
        def task(config):
            tasks.put(1)
            tasks.put(None)
        """,
    ),
    program(
        "names-of-threads",
        """
        import threading
        def task(config):
            main = threading.main_thread()
            return [main.name, main is threading.current_thread(), threading.active_count(), main.daemon,
                    main.ident == threading.get_ident(), threading.get_native_id() == __import__('os').getpid()]
        """,
    ),
    program(
        "names-of-later-threads",
        """
        import threading
        def task(config):
            return [threading.Thread().name for _ in range(3)]
        """,
        jobs=2,
    ),
    program(
        "executor-left-open",
        """
        import concurrent.futures, time
        pool = concurrent.futures.ThreadPoolExecutor(2)
        def work(n):
            time.sleep(0.05)
            print('worked on', n)
        def task(config):
            pool.submit(work, 1)
            return 'done'
        """,
    ),
    program(
        "executor-with-many-left",
        """
        import concurrent.futures
        pool = concurrent.futures.ThreadPoolExecutor(1)
        def task(config):
            for n in range(20):
                pool.submit(print, n)
        """,
    ),
    program(
        "condition-at-exit",
        """
        import atexit, threading
        stop = threading.Event()
        def work():
            stop.wait()
            print('stopped')
        thread = threading.Thread(target=work, daemon=True)
        def end():
            stop.set()
            thread.join()
        atexit.register(end)
        def task(config):
            thread.start()
        """,
    ),
    program(
        "thread-joins-the-main-thread",
        """
        import threading
        def work():
            threading.main_thread().join()
            print('main thread ended')
        def task(config):
            threading.Thread(target=work).start()
            print('task ended')
        """,
    ),
    program(
        "pool-of-threads-left-open",
        """
        from multiprocessing.pool import ThreadPool
        pool = ThreadPool(2)
        def task(config):
            return pool.map(abs, [-1, -2])
        """,
    ),
]

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
        says="SyntaxError",
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
        "failing-at-the-end",
        """
        class Thing:
            def __del__(self):
                raise ValueError('in the destructor')
        thing = Thing()
        def task(config):
            return 1
        """,
    ),
    program(
        "writing-a-file",
        """
        import os
        class Writer:
            def __init__(self):
                self.rows = []
            def __del__(self):  # NameError: `open` is gone by then
                with open('rows', 'w') as f:
                    f.write(str(self.rows))
        writer = Writer()
        def task(config):
            writer.rows.append(1)
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
        "importing",
        """
        class Thing:
            def __del__(self):
                import colorsys
                print(colorsys.ONE_THIRD)
        thing = Thing()
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
        "kept-by-an-exception",
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
        "kept-by-a-standard-module",
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
        "kept-by-sys",
        """
        import sys
        class Thing:
            def __del__(self):
                sys.stdout.write('deleted\\n')
        sys.kept = Thing()
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
    ),
    program(
        "context-manager-left-open",
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
        "coroutine-kept",
        "async def later():\n    pass\nkept = later()\ndef task(config):\n    return 1\n",
    ),
    program(
        "async-generator-left-open",
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


@pytest.mark.parametrize("program", THREADS)
def test_a_thread(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", HANDLERS)
def test_an_exit_handler(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", DESTRUCTORS)
def test_a_destructor(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", HOOKS)
def test_a_hook(program: Program, runner: Runner) -> None:
    runner.check(program)
