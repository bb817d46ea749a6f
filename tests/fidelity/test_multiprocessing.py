"""multiprocessing in all start methods."""

from __future__ import annotations

from textwrap import dedent

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

METHODS = ("fork", "spawn", "forkserver")


POOLS = {
    "pool": """
        import multiprocessing as mp
        def square(n):
            return n * n
        def task(config):
            with mp.get_context(METHOD).Pool(2) as pool:
                return pool.map(square, range(4))
    """,
    "pool-with-initializer": """
        import multiprocessing as mp
        STATE = []
        def start(value):
            STATE.append(value)
        def get(n):
            return STATE + [n]
        def task(config):
            with mp.get_context(METHOD).Pool(1, start, ('ready',)) as pool:
                return pool.map(get, range(2))
    """,
    "pool-left-open": """
        import multiprocessing as mp
        def square(n):
            return n * n
        def task(config):
            global pool
            pool = mp.get_context(METHOD).Pool(2)
            return pool.map(square, range(4))
    """,
    "process-that-prints": """
        import multiprocessing as mp, os
        def work(words):
            print('child', words)
        def task(config):
            p = mp.get_context(METHOD).Process(target=work, args=('words',), name='worker')
            p.start()
            p.join()
            print('exit code', p.exitcode)
    """,
    "process-that-fails": """
        import multiprocessing as mp
        def work():
            raise ValueError('in the child')
        def task(config):
            p = mp.get_context(METHOD).Process(target=work, name='worker')
            p.start()
            p.join()
            return p.exitcode
    """,
    "process-that-exits": """
        import multiprocessing as mp, sys
        def work():
            sys.exit(9)
        def task(config):
            p = mp.get_context(METHOD).Process(target=work)
            p.start()
            p.join()
            return p.exitcode
    """,
    "process-not-joined": """
        import multiprocessing as mp, time
        def work():
            time.sleep(0.3)
            print('child done')
        def task(config):
            mp.get_context(METHOD).Process(target=work).start()
            print('task done')
    """,
    "daemon-not-joined": """
        import multiprocessing as mp, time
        def work():
            time.sleep(600)
        def task(config):
            mp.get_context(METHOD).Process(target=work, daemon=True).start()
            print('task done')
    """,
    "queue": """
        import multiprocessing as mp
        def work(queue):
            queue.put({'from': 'child', 'sum': sum(iter(queue.get, None))}) if False else queue.put('child')
        def task(config):
            context = mp.get_context(METHOD)
            queue = context.Queue()
            p = context.Process(target=work, args=(queue,))
            p.start()
            found = queue.get()
            p.join()
            return found
    """,
    "queue-not-emptied": """
        import multiprocessing as mp
        queue = mp.get_context(METHOD).Queue()
        def task(config):
            queue.put('x')
            queue.cancel_join_thread()
            return 1
    """,
    "pipe-and-events": """
        import multiprocessing as mp
        def work(end, event, lock):
            with lock:
                end.send('child')
            event.set()
        def task(config):
            context = mp.get_context(METHOD)
            ours, theirs = context.Pipe()
            event, lock = context.Event(), context.Lock()
            p = context.Process(target=work, args=(theirs, event, lock))
            p.start()
            event.wait()
            p.join()
            return ours.recv()
    """,
    "manager": """
        import multiprocessing as mp
        def work(shared, n):
            shared[n] = n * n
        def task(config):
            context = mp.get_context(METHOD)
            with context.Manager() as manager:
                shared = manager.dict()
                ps = [context.Process(target=work, args=(shared, n)) for n in range(2)]
                [p.start() for p in ps]
                [p.join() for p in ps]
                return sorted(shared.items())
    """,
    "manager-left-open": """
        import multiprocessing as mp
        def task(config):
            global manager
            manager = mp.get_context(METHOD).Manager()
            return list(manager.list([1, 2]))
    """,
    "value-and-array": """
        import multiprocessing as mp
        def work(value, array):
            value.value += 1
            array[0] = 5
        def task(config):
            context = mp.get_context(METHOD)
            value, array = context.Value('i', 1), context.Array('i', 3)
            p = context.Process(target=work, args=(value, array))
            p.start()
            p.join()
            return [value.value, list(array)]
    """,
    "shared-memory": """
        import multiprocessing as mp
        from multiprocessing.shared_memory import SharedMemory
        def work(name):
            block = SharedMemory(name)
            block.buf[0] = 7
            block.close()
        def task(config):
            block = SharedMemory(create=True, size=100)
            print(block.name)
            p = mp.get_context(METHOD).Process(target=work, args=(block.name,))
            p.start()
            p.join()
            found = block.buf[0]
            block.close()
            block.unlink()
            return found
    """,
    "shared-memory-manager": """
        from multiprocessing.managers import SharedMemoryManager
        import multiprocessing as mp
        def work(shared):
            shared[0] = 'child'
        def task(config):
            with SharedMemoryManager(ctx=mp.get_context(METHOD)) as manager:
                shared = manager.ShareableList(['parent', 2])
                p = mp.get_context(METHOD).Process(target=work, args=(shared,))
                p.start()
                p.join()
                return shared[0]
    """,
    "executor": """
        import multiprocessing as mp
        from concurrent.futures import ProcessPoolExecutor
        def square(n):
            return n * n
        def task(config):
            with ProcessPoolExecutor(2, mp_context=mp.get_context(METHOD)) as pool:
                return list(pool.map(square, range(4)))
    """,
    "executor-left-open": """
        import multiprocessing as mp
        from concurrent.futures import ProcessPoolExecutor
        def square(n):
            return n * n
        def task(config):
            global pool
            pool = ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD))
            return pool.submit(square, 3).result()
    """,
    "executor-whose-worker-dies": """
        import multiprocessing as mp, os
        from concurrent.futures import ProcessPoolExecutor
        def task(config):
            with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
                try:
                    pool.submit(os._exit, 3).result()
                except Exception as error:
                    return type(error).__name__
    """,
    "error-comes-back": """
        import multiprocessing as mp
        class Odd(Exception):
            pass
        def fail(n):
            raise Odd(n)
        def task(config):
            with mp.get_context(METHOD).Pool(1) as pool:
                try:
                    pool.map(fail, [3])
                except Odd as error:
                    return [error.args, error.__cause__ is not None]
    """,
    "own-classes": """
        import multiprocessing as mp
        from dataclasses import dataclass
        import helper
        @dataclass
        class Point:
            x: int
        def move(point):
            return Point(point.x + helper.BY)
        def task(config):
            with mp.get_context(METHOD).Pool(1) as pool:
                return pool.map(move, [Point(1)])[0].x
    """,
    "method-of-the-task": """
        import multiprocessing as mp
        class Task:
            def __init__(self):
                self.by = 3
            def __call__(self, config):
                with mp.get_context(METHOD).Pool(1) as pool:
                    return pool.map(self.add, [1, 2])
            def add(self, n):
                return n + self.by
    """,
    "names": """
        import multiprocessing as mp, os, sys
        def about(_):
            return [__name__, mp.current_process().name.split('-')[0], mp.parent_process() is not None,
                    'helper.py' in os.listdir(), sys.modules['__main__'].__name__]
        def task(config):
            with mp.get_context(METHOD).Pool(1) as pool:
                return [pool.map(about, [1]), mp.current_process().name, mp.parent_process() is None]
    """,
    "environment-and-folder": """
        import multiprocessing as mp, os
        def about(_):
            return [os.environ['ODD'], os.path.basename(os.getcwd())]
        def task(config):
            os.environ['ODD'] = 'set'
            os.mkdir('sub')
            os.chdir('sub')
            with mp.get_context(METHOD).Pool(1) as pool:
                return pool.map(about, [1])
    """,
    "guarded-main": """
        import multiprocessing as mp
        print('module', __name__)
        def square(n):
            return n * n
        def task(config):
            with mp.get_context(METHOD).Pool(1) as pool:
                return pool.map(square, [3])
        if __name__ == '__main__':
            print('never')
    """,
    "exit-handlers-of-children": """
        import atexit, multiprocessing as mp, os
        PID = os.getpid()
        atexit.register(lambda: print('at exit of', 'the task' if os.getpid() == PID else 'a child'))
        def work():
            print('child')
        def task(config):
            p = mp.get_context(METHOD).Process(target=work)
            p.start()
            p.join()
    """,
    "set-start-method": """
        import multiprocessing as mp
        def square(n):
            return n * n
        def task(config):
            mp.set_start_method(METHOD)
            with mp.Pool(1) as pool:
                return pool.map(square, [3])
    """,
    "logging-to-stderr": """
        import logging, multiprocessing as mp
        def work():
            logging.warning('from the child')
        def task(config):
            logging.basicConfig(format='%(message)s %(name)s')
            p = mp.get_context(METHOD).Process(target=work)
            p.start()
            p.join()
            logging.warning('from the task')
    """,
}


ALL_METHODS = {
    "pool",
    "process-that-fails",
    "queue",
    "manager",
    "shared-memory",
    "executor",
    "own-classes",
    "method-of-the-task",
    "names",
    "set-start-method",
}
"""The programs for all start methods. For the others, forkserver adds nothing to spawn."""

POOLED = [
    program(
        f"{name}-{method}",
        dedent(code).replace("METHOD", repr(method)),
        files={"helper.py": "BY = 2\n"},
    )
    for name, code in POOLS.items()
    for method in METHODS
    if method != "forkserver" or name in ALL_METHODS
]


@pytest.mark.parametrize("program", POOLED)
def test_multiprocessing_agrees_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
