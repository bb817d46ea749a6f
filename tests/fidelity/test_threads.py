"""Threads that still run when a program ends."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

THREADS = [
    program(
        "thread-that-continues",
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
        "thread-that-continues-after-an-error",
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
        "daemon-thread-with-an-open-file",
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
        "executor-with-many-pending-tasks",
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
        "open-pool-of-threads",
        """
        from multiprocessing.pool import ThreadPool
        pool = ThreadPool(2)
        def task(config):
            return pool.map(abs, [-1, -2])
        """,
    ),
]


@pytest.mark.parametrize("program", THREADS)
def test_threads_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
