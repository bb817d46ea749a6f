"""Programs of more than one process: multiprocessing in all start methods, executors, asyncio, subprocess, fork by hand;
and pickling, which finds functions and classes by the names of their modules."""

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

ASYNC = [
    program(
        "run",
        "import asyncio\nasync def main():\n    await asyncio.sleep(0.01)\n    return 1\ndef task(config):\n    return asyncio.run(main())\n",
    ),
    program(
        "loop-left-open",
        "import asyncio\nloop = asyncio.new_event_loop()\nasync def main():\n    return 1\ndef task(config):\n    return loop.run_until_complete(main())\n",
    ),
    program(
        "tasks-left-pending",
        """
        import asyncio
        async def wait():
            try:
                await asyncio.sleep(60)
            finally:
                print('cancelled')
        async def main():
            asyncio.create_task(wait(), name='waiting')
            await asyncio.sleep(0)
            return 1
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "tasks-left-pending-in-an-open-loop",
        """
        import asyncio
        loop = asyncio.new_event_loop()
        async def wait():
            await asyncio.sleep(60)
        async def main():
            loop.kept = asyncio.create_task(wait(), name='waiting')
            await asyncio.sleep(0)
        def task(config):
            loop.run_until_complete(main())
        """,
    ),
    program(
        "error-never-retrieved",
        """
        import asyncio
        async def fail():
            raise ValueError('nobody asks')
        async def main():
            asyncio.create_task(fail(), name='failing')
            await asyncio.sleep(0.01)
        def task(config):
            asyncio.run(main())
        """,
    ),
    program(
        "subprocess",
        """
        import asyncio
        async def main():
            p = await asyncio.create_subprocess_exec('sh', '-c', 'echo words; exit 3', stdout=-1)
            out, _ = await p.communicate()
            return [out.decode(), p.returncode]
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "subprocess-left-running",
        """
        import asyncio
        async def main():
            p = await asyncio.create_subprocess_exec('sleep', '0.2')
            return p.returncode
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "in-a-thread",
        """
        import asyncio, time
        async def main():
            return await asyncio.to_thread(sum, [1, 2])
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "in-processes",
        """
        import asyncio
        from concurrent.futures import ProcessPoolExecutor
        async def main():
            with ProcessPoolExecutor(1) as pool:
                return await asyncio.get_running_loop().run_in_executor(pool, abs, -3)
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "server-and-client",
        """
        import asyncio
        async def answer(reader, writer):
            writer.write((await reader.readline()).upper())
            writer.close()
        async def main():
            server = await asyncio.start_server(answer, '127.0.0.1', 0)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b'words\\n')
            found = (await reader.read()).decode()
            writer.close()
            return found
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "signals",
        """
        import asyncio, os, signal
        async def main():
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, stop.set)
            os.kill(os.getpid(), signal.SIGUSR1)
            await stop.wait()
            return 'stopped'
        def task(config):
            return asyncio.run(main())
        """,
    ),
    program(
        "interrupt",
        """
        import asyncio, os, signal
        async def main():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)
            finally:
                print('cleaned up')
        def task(config):
            asyncio.run(main())
        """,
    ),
    program(
        "debug-mode",
        "import asyncio\nasync def main():\n    return asyncio.get_running_loop().get_debug()\ndef task(config):\n    return asyncio.run(main(), debug=True)\n",
    ),
    program(
        "is-there-a-loop",
        """
        import asyncio
        def task(config):
            try:
                asyncio.get_running_loop()
            except RuntimeError as error:
                return str(error)
        """,
    ),
]

SUBPROCESSES = [
    program(
        "order-of-words",
        """
        import subprocess, sys
        def task(config):
            print('before')
            print('half', end='')
            subprocess.run(['echo', 'from echo'])
            print('between')
            subprocess.run([sys.executable, '-c', 'print("from python")'])
            print('after', file=sys.stderr)
        """,
    ),
    program("system", "import os\ndef task(config):\n    return os.system('echo words; exit 3')\n"),
    program("popen", "import os\ndef task(config):\n    return os.popen('echo words').read()\n"),
    program(
        "spawn",
        "import os\ndef task(config):\n    return os.spawnlp(os.P_WAIT, 'sh', 'sh', '-c', 'exit 4')\n",
    ),
    program(
        "posix-spawn",
        "import os\ndef task(config):\n    pid = os.posix_spawn('/bin/sh', ['sh', '-c', 'exit 4'], os.environ)\n    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n",
    ),
    program(
        "stdin-of-children",
        "import subprocess\ndef task(config):\n    return subprocess.run(['cat'], capture_output=True, text=True).stdout\n",
    ),
    program(
        "descriptors-of-children",
        """
        import os, subprocess
        def task(config):
            with open('f', 'w') as f:
                os.set_inheritable(f.fileno(), True)
                return subprocess.run(['ls', '/proc/self/fd'], capture_output=True, text=True, close_fds=False).stdout.split()
        """,
    ),
    program(
        "descriptors-of-the-task",
        "import os\ndef task(config):\n    return sorted(fd for fd in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + fd) and int(fd) < 3)\n",
    ),
    program(
        "inherited-descriptors",
        "import subprocess\ndef task(config):\n    return sorted(subprocess.run(['ls', '/proc/self/fd'], capture_output=True, text=True, close_fds=False).stdout.split())\n",
    ),
    program(
        "modules-of-a-child",
        "import subprocess, sys\ndef task(config):\n    return subprocess.run([sys.executable, '-c', 'import helper; print(helper.X)'], capture_output=True, text=True).stdout\n",
        files={"helper.py": "X = 1\n"},
    ),
    program(
        "library-of-a-child",
        "import subprocess, sys\ndef task(config):\n    return subprocess.run([sys.executable, '-c', 'import lib; print(lib.X)'], capture_output=True, text=True).stdout\n",
        libraries={"lib.py": "X = 1\n"},
    ),
    program(
        "python-on-the-path",
        "import subprocess\ndef task(config):\n    return subprocess.run(['python', '-c', 'import lib; print(lib.X)'], capture_output=True, text=True).stdout\n",
        libraries={"lib.py": "X = 1\n"},
    ),
    program(
        "own-file-as-a-program",
        """
        import subprocess, sys
        def task(config):
            return subprocess.run([sys.executable, __file__, 'an argument'], capture_output=True, text=True).stdout
        if __name__ == '__main__':
            print('as a program', sys.argv[1:])
        """,
    ),
    program(
        "module-as-a-program",
        "import subprocess, sys\ndef task(config):\n    return subprocess.run([sys.executable, '-m', 'pack'], capture_output=True, text=True).stdout\n",
        files={"pack/__init__.py": "", "pack/__main__.py": "print(__name__, __package__)\n"},
    ),
    program(
        "left-running",
        "import subprocess\ndef task(config):\n    subprocess.Popen(['sleep', '0.1'])\n    return 1\n",
    ),
    program(
        "writes-as-it-is-left",
        "import subprocess\ndef task(config):\n    global p\n    p = subprocess.Popen(['cat'], stdin=-1)\n    p.stdin.write(b'words\\n')\n",
    ),
    program(
        "killed-child",
        "import subprocess\ndef task(config):\n    p = subprocess.Popen(['sleep', '60'])\n    p.kill()\n    return p.wait()\n",
    ),
    program(
        "check",
        "import subprocess\ndef task(config):\n    subprocess.run(['sh', '-c', 'exit 4'], check=True)\n",
    ),
    program(
        "not-there",
        "import subprocess\ndef task(config):\n    subprocess.run(['no-such-program'])\n",
    ),
    program(
        "sigpipe-of-children",
        "import subprocess\ndef task(config):\n    return subprocess.run('yes | head -1', shell=True, capture_output=True, text=True).stdout\n",
    ),
    program(
        "signals-of-children",
        """
        import subprocess
        def task(config):
            found = {}
            for line in subprocess.run(['grep', 'Sig', '/proc/self/status'], capture_output=True, text=True).stdout.splitlines():
                name, _, value = line.partition(':')
                if name in ('SigBlk', 'SigIgn'):
                    found[name] = value.strip()
            return found
        """,
    ),
    program(
        "orphan",
        """
        import os, time
        def task(config):
            if os.fork() == 0:
                if os.fork() == 0:
                    print('orphan')
                os._exit(0)
            os.wait()
            time.sleep(0.1)
        """,
    ),
    program(
        "zombie",
        "import os, time\ndef task(config):\n    if os.fork() == 0:\n        os._exit(0)\n    time.sleep(0.05)\n    return 1\n",
    ),
    program(
        "fork-that-returns",
        """
        import os
        def task(config):
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                print('parent')
            else:
                print('child')
            return pid > 0
        """,
    ),
    program(
        "fork-that-fails",
        """
        import os
        def task(config):
            pid = os.fork()
            if pid == 0:
                raise ValueError('in the child')
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        """,
    ),
    program(
        "fork-that-exits",
        """
        import atexit, os, sys
        atexit.register(print, 'at exit')
        def task(config):
            pid = os.fork()
            if pid == 0:
                sys.exit(5)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        """,
    ),
    program(
        "fork-with-an-open-file",
        """
        import os
        f = open('f', 'w')
        def task(config):
            f.write('once or twice\\n')
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
        """,
    ),
    program(
        "terminal",
        "import pty, os\ndef task(config):\n    pid, fd = pty.fork()\n    if pid == 0:\n        os._exit(int(os.isatty(0)))\n    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n",
    ),
    program("no-terminal", "import os\ndef task(config):\n    open('/dev/tty')\n"),
    program(
        "leads-its-session",
        "import os\ndef task(config):\n    return [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()]\n",
    ),
]

PICKLES = [
    program(
        "function-and-class",
        """
        import pickle
        class Point:
            def __init__(self, x):
                self.x = x
        def twice(n):
            return 2 * n
        def task(config):
            assert pickle.loads(pickle.dumps(twice)) is twice
            with open('point', 'wb') as f:
                pickle.dump(Point(3), f, protocol=4)
            return pickle.dumps(Point, protocol=0).decode()
        """,
    ),
    program(
        "read-back-elsewhere",
        """
        import pickle, subprocess, sys
        class Point:
            x = 3
        def task(config):
            data = pickle.dumps(Point()).hex()
            code = f'import pickle; print(pickle.loads(bytes.fromhex("{data}")).x)'
            return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
        """,
    ),
    program(
        "class-of-main",
        "import __main__, pickle\nclass Point:\n    pass\nPoint.__module__ = '__main__'\ndef task(config):\n    return pickle.dumps(Point())\n",
    ),
    program(
        "class-put-into-main",
        """
        import __main__, pickle
        class Point:
            pass
        Point.__module__ = '__main__'
        __main__.Point = Point
        def task(config):
            return type(pickle.loads(pickle.dumps(Point()))) is Point
        """,
    ),
    program("lambda", "import pickle\nf = lambda: 1\ndef task(config):\n    pickle.dumps(f)\n"),
    program(
        "local-class",
        "import pickle\ndef task(config):\n    class Point:\n        pass\n    pickle.dumps(Point())\n",
    ),
    program(
        "named-tuple",
        "import collections, pickle\nP = collections.namedtuple('P', 'x')\ndef task(config):\n    return [P.__module__, pickle.loads(pickle.dumps(P(1))).x]\n",
    ),
    program(
        "enum",
        "import enum, pickle\nE = enum.Enum('E', 'A B')\ndef task(config):\n    return [E.__module__, pickle.loads(pickle.dumps(E.A)) is E.A]\n",
    ),
    program(
        "names-of-modules",
        "import sys\ndef task(config):\n    return [__name__, __package__, __spec__.name, __spec__.origin == __file__, __loader__.name, task.__module__, task.__qualname__]\n",
    ),
    program(
        "copy-and-inspect",
        "import inspect, sys\ndef task(config):\n    return [inspect.getsource(task).count('x') > 0, inspect.getmodule(task) is sys.modules[__name__]]\n",
    ),
    program(
        "type-hints",
        "from __future__ import annotations\nimport dataclasses, typing\n@dataclasses.dataclass\nclass A:\n    x: 'B'\nclass B:\n    pass\ndef task(config):\n    return typing.get_type_hints(A)['x'] is B\n",
    ),
]

POOLED = [
    program(
        f"{name}-{method}",
        dedent(code).replace("METHOD", repr(method)),
        files={"helper.py": "BY = 2\n"},
    )
    for name, code in POOLS.items()
    for method in METHODS
]


@pytest.mark.parametrize("program", POOLED)
def test_multiprocessing(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", ASYNC)
def test_asyncio(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", SUBPROCESSES)
def test_another_process(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", PICKLES)
def test_a_pickle(program: Program, runner: Runner) -> None:
    runner.check(program)
