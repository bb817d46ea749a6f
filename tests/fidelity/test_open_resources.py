"""Other resources that are open when a program ends: databases, shared memory, C streams,
sockets, locks."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

RESOURCES = [
    program(
        "shelve",
        """
        import shelve
        db = shelve.open('db')
        def task(config):
            db['a'] = [1, 2]
        """,
        reader="import shelve\nwith shelve.open('db') as db: print(dict(db))",
    ),
    program(
        "shelve-with-writeback",
        """
        import shelve
        db = shelve.open('db', writeback=True)
        def task(config):
            db['a'] = []
            db['a'].append(3)
        """,
        reader="import shelve\nwith shelve.open('db') as db: print(dict(db))",
    ),
    program(
        "dbm",
        "import dbm\ndb = dbm.open('db', 'c')\ndef task(config):\n    db['a'] = 'b'\n",
        reader="import dbm\nwith dbm.open('db') as db: print({k: db[k] for k in db.keys()})",
    ),
    program(
        "sqlite-committed",
        """
        import sqlite3
        db = sqlite3.connect('db')
        def task(config):
            db.execute('CREATE TABLE t (x)')
            db.execute('INSERT INTO t VALUES (1)')
            db.commit()
        """,
        reader="import sqlite3\nprint(list(sqlite3.connect('db').execute('SELECT * FROM t')))",
    ),
    program(
        "sqlite-uncommitted",
        """
        import sqlite3
        db = sqlite3.connect('db')
        db.execute('CREATE TABLE t (x)')
        def task(config):
            db.execute('INSERT INTO t VALUES (1)')
            return db.in_transaction
        """,
        reader="import os, sqlite3\nprint(sorted(os.listdir()), list(sqlite3.connect('db').execute('SELECT * FROM t')))",
    ),
    program(
        "sqlite-write-ahead-log",
        """
        import sqlite3
        db = sqlite3.connect('db', isolation_level=None)
        db.execute('PRAGMA journal_mode=WAL')
        def task(config):
            db.execute('CREATE TABLE t (x)')
            db.execute('INSERT INTO t VALUES (1)')
        """,
        reader="import os, sqlite3\nprint(sorted(os.listdir()), list(sqlite3.connect('db').execute('SELECT * FROM t')))",
    ),
    program(
        "mmap",
        """
        import mmap
        f = open('f', 'w+b')
        f.truncate(4096)
        memory = mmap.mmap(f.fileno(), 0)
        def task(config):
            memory[:3] = b'abc'
        """,
    ),
    program(
        "shared-memory-and-an-error",
        """
        from multiprocessing.shared_memory import SharedMemory
        def task(config):
            block = SharedMemory(create=True, size=8 << 20)
            print(block.name)
            raise ValueError('bad batch')
        """,
    ),
    program(
        "shared-memory-in-a-module",
        """
        from multiprocessing.shared_memory import SharedMemory
        block = SharedMemory(create=True, size=1 << 20)
        def task(config):
            block.buf[0] = 1
            print(block.name)
        """,
    ),
    program(
        "shared-memory-of-many",
        """
        from multiprocessing.shared_memory import SharedMemory
        def task(config):
            global blocks
            blocks = [SharedMemory(create=True, size=4096) for _ in range(20)]
            for block in blocks:
                print(block.name)
        """,
    ),
    program(
        "shared-memory-that-is-unlinked",
        """
        from multiprocessing.shared_memory import SharedMemory
        def task(config):
            block = SharedMemory(create=True, size=4096)
            print(block.name)
            block.close()
            block.unlink()
        """,
    ),
    program(
        "shared-memory-and-a-kill",
        """
        import os, signal
        from multiprocessing.shared_memory import SharedMemory
        def task(config):
            block = SharedMemory(create=True, size=4096)
            print(block.name)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    ),
    program(
        "shared-memory-and-os-exit",
        """
        import os
        from multiprocessing.shared_memory import SharedMemory
        def task(config):
            block = SharedMemory(create=True, size=4096)
            print(block.name)
            os._exit(0)
        """,
    ),
    program(
        "shared-list",
        """
        from multiprocessing.shared_memory import ShareableList
        def task(config):
            global kept
            kept = ShareableList([1, 'a', None])
            print(kept.shm.name)
            return list(kept)
        """,
    ),
    program(
        "c-file",
        """
        import ctypes
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        libc.fwrite.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
        def task(config):
            file = libc.fopen(b'f', b'w')
            return libc.fwrite(b'rows', 1, 4, file)
        """,
    ),
    program(
        "c-printf",
        "import ctypes\ndef task(config):\n    ctypes.CDLL(None).printf(b'solver: converged\\n')\n",
    ),
    program(
        "c-printf-and-print",
        """
        import ctypes
        def task(config):
            ctypes.CDLL(None).printf(b'from C, half a line')
            print('from Python')
            ctypes.CDLL(None).printf(b', and more of it\\n')
        """,
    ),
    program(
        "c-printf-and-an-error",
        "import ctypes\ndef task(config):\n    ctypes.CDLL(None).printf(b'from C\\n')\n    raise ValueError('x')\n",
    ),
    program(
        "c-printf-and-an-exit",
        "import ctypes, sys\ndef task(config):\n    ctypes.CDLL(None).puts(b'from C')\n    sys.exit('words')\n",
    ),
    program(
        "c-printf-and-os-exit",
        "import ctypes, os\ndef task(config):\n    ctypes.CDLL(None).puts(b'from C')\n    os._exit(0)\n",
    ),
    program(
        "c-printf-at-import",
        "import ctypes\nctypes.CDLL(None).puts(b'from C')\ndef task(config):\n    return 1\n",
    ),
    program(
        "c-printf-at-exit",
        "import atexit, ctypes\natexit.register(ctypes.CDLL(None).puts, b'from C')\ndef task(config):\n    return 1\n",
    ),
    program(
        "c-stderr",
        "import ctypes\ndef task(config):\n    ctypes.CDLL(None).perror(b'from C')\n    ctypes.CDLL(None).dprintf(1, b'now\\n')\n",
    ),
    program(
        "c-printf-and-a-fork",
        """
        import ctypes, os
        def task(config):
            ctypes.CDLL(None).printf(b'once or twice\\n')
            pid = os.fork()
            if pid == 0:
                ctypes.CDLL(None).exit(0)
            os.waitpid(pid, 0)
        """,
    ),
    program(
        "socket-with-a-reader",
        """
        import socket, threading
        ours, theirs = socket.socketpair()
        file = ours.makefile('w')
        def read():
            print(theirs.recv(100))
        def task(config):
            threading.Thread(target=read).start()
            file.write('abc\\n')
            file.flush()
        """,
    ),
    program(
        "server-socket",
        """
        import socket
        server = socket.create_server(('127.0.0.1', 0))
        client = socket.create_connection(server.getsockname())
        def task(config):
            return 'open'
        """,
    ),
    program(
        "unix-socket",
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('s')\ndef task(config):\n    return 'open'\n",
    ),
    program(
        "lock-file",
        """
        import fcntl
        f = open('lock', 'w')
        def task(config):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            f.write('mine')
        """,
        jobs=2,
    ),
    program(
        "many-files",
        """
        def task(config):
            global files
            files = [open(f'f{n}', 'w') for n in range(200)]
            for n, file in enumerate(files):
                file.write(str(n))
        """,
    ),
    program(
        "file-of-an-earlier-current-folder",
        """
        import os
        def task(config):
            global f
            f = open('f', 'w')
            f.write('abc')
            os.mkdir('there')
            os.chdir('there')
            open('g', 'w').write('def')
        """,
    ),
    program(
        "full-disk",
        """
        f = open('/dev/full', 'w')
        def task(config):
            f.write('abc')
        """,
    ),
    program(
        "descriptor-closed-behind-its-back",
        "import os\nf = open('f', 'w')\ndef task(config):\n    f.write('abc')\n    os.close(f.fileno())\n",
    ),
    program(
        "all-descriptors-closed",
        "import os\nf = open('f', 'w')\ndef task(config):\n    f.write('abc')\n    os.closerange(3, 100)\n    return 1\n",
        differences={
            "result": "<no result>",
            "log": "cortex: the task's return value was not kept: the task has closed the file of its "
            "outcome\n",
        },
        reason="the job's result and message travel through a descriptor that the program has closed",
    ),
    program(
        "detached-buffer",
        "f = open('f', 'w')\ndef task(config):\n    f.write('abc')\n    global raw\n    raw = f.detach()\n",
    ),
    program(
        "buffer-that-refers-to-itself",
        "import io\nclass B(io.BufferedWriter):\n    pass\nf = B(io.FileIO('f', 'w'))\nf.me = f\ndef task(config):\n    f.write(b'abc')\n",
    ),
    program(
        "resource-warnings-of-untracked-objects",
        "import os\nkept = os.scandir('.')\ndef task(config):\n    next(kept)\n",
        env={"PYTHONWARNINGS": "default"},
    ),
    program(
        "resource-warnings",
        "import warnings\nwarnings.simplefilter('always')\nf = open('f', 'w')\ndef task(config):\n    f.write('abc')\n",
    ),
]


@pytest.mark.parametrize("program", RESOURCES)
def test_open_resources_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
