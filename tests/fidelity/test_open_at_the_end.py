"""What can be open when a program ends, in each of the ways that hold it: a module's variable, a cycle, a class, a
default argument, a generator, a local variable of a frame that an exception keeps."""

from __future__ import annotations

from textwrap import dedent

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

WRITERS = {
    # What opens a file, what writes into it.
    "text": ("open('f', 'w')", "f.write('42 rows\\n')"),
    "text-with-large-buffer": ("open('f', 'w', buffering=1 << 20)", "f.write('x' * 100_000)"),
    "text-with-newline": (
        "open('f', 'w', newline='\\r\\n', encoding='utf-16')",
        "f.write('a\\nb')",
    ),
    "append": ("open('given.txt', 'a')", "f.write('more\\n')"),
    "update": ("open('given.txt', 'r+')", "f.write('new')"),
    "binary": ("open('f', 'wb')", "f.write(bytes(range(256)))"),
    "binary-random": ("open('f', 'w+b')", "f.write(b'abc'); f.seek(1); f.write(b'x')"),
    "unbuffered": ("open('f', 'wb', buffering=0)", "f.write(b'abc')"),
    "line-buffered": ("open('f', 'w', buffering=1)", "f.write('one\\ntwo')"),
    "pathlib": ("__import__('pathlib').Path('f').open('w')", "f.write('abc')"),
    "fdopen": ("os.fdopen(os.open('f', os.O_CREAT | os.O_WRONLY), 'w')", "f.write('abc')"),
    "codecs": ("__import__('codecs').open('f', 'w', 'utf-8')", "f.write('ä')"),
    "io-wrapped": (
        "io.TextIOWrapper(io.BufferedWriter(io.FileIO('f', 'w'), 1 << 16))",
        "f.write('abc')",
    ),
    "buffered-random": ("io.BufferedRandom(io.FileIO('f', 'w+'))", "f.write(b'abc')"),
    "gzip": ("gzip.GzipFile('f', 'wb', mtime=0)", "f.write(b'rows' * 1000)"),
    "gzip-text": (
        "io.TextIOWrapper(gzip.GzipFile('f', 'wb', mtime=0))",
        "f.write('rows\\n' * 1000)",
    ),
    "bz2": ("bz2.open('f', 'wt')", "f.write('rows\\n' * 1000)"),
    "lzma": ("lzma.open('f', 'wb')", "f.write(b'rows' * 1000)"),
    "zip": (
        "zipfile.ZipFile('f', 'w')",
        "f.writestr(zipfile.ZipInfo('a', (2020, 1, 1, 0, 0, 0)), 'rows')",
    ),
    "tar": ("tarfile.open('f', 'w')", "f.addfile(tarfile.TarInfo('a'), io.BytesIO())"),
    "tar-gz": ("tarfile.open('f', 'w:xz')", "f.addfile(tarfile.TarInfo('a'), io.BytesIO())"),
    "csv": ("open('f', 'w', newline='')", "csv.writer(f).writerows([[1, 'a'], [2, 'b,c']])"),
    "pickle": ("open('f', 'wb')", "pickle.dump({'a': [1, 2]}, f)"),
    "pickler": ("open('f', 'wb')", "keep = pickle.Pickler(f); keep.dump(list(range(50)))"),
    "json": ("open('f', 'w')", "json.dump({'a': 1}, f)"),
    "fileinput": ("fileinput.input('given.txt', inplace=True)", "next(f); print('in place')"),
    "named-temporary": ("tempfile.NamedTemporaryFile('w', delete=False)", "f.write('abc')"),
    "named-temporary-that-goes": ("tempfile.NamedTemporaryFile('w')", "f.write('abc')"),
    "temporary": ("tempfile.TemporaryFile('w')", "f.write('abc')"),
    "spooled": ("tempfile.SpooledTemporaryFile(max_size=2)", "f.write(b'abc')"),
    "temporary-folder": ("tempfile.TemporaryDirectory()", "open(f.name + '/a', 'w').write('x')"),
    "made-folder": ("tempfile.mkdtemp()", "open(f + '/a', 'w').write('x')"),
    "wave": (
        "wave.open('f', 'wb')",
        "f.setparams((1, 2, 8000, 0, 'NONE', '')); f.writeframes(b'ab' * 100)",
    ),
    "xml": ("open('f', 'wb')", "ElementTree.ElementTree(ElementTree.Element('a')).write(f)"),
    "mailbox": ("mailbox.mbox('f')", "f.lock(); f.add('Subject: a\\n\\nb')"),
    "dbm-dumb": ("dbm.dumb.open('f', 'c')", "f['a'] = 'b'"),
    "socket-file": ("socket.socketpair()", "keep = f[0].makefile('w'); keep.write('abc')"),
    "pipe": ("os.popen('cat > f', 'w')", "f.write('abc')"),
    "file-handler": (
        "logging.FileHandler('f')",
        "logging.getLogger().addHandler(f); logging.warning('words')",
    ),
    "delayed-file-handler": (
        "logging.FileHandler('f', delay=True)",
        "logging.getLogger().addHandler(f); logging.warning('words')",
    ),
    "memory-handler": (
        "logging.handlers.MemoryHandler(100, target=logging.FileHandler('f'))",
        "logging.getLogger().addHandler(f); logging.warning('words')",
    ),
    "rotating-handler": (
        "logging.handlers.RotatingFileHandler('f', maxBytes=20, backupCount=2)",
        "logging.getLogger().addHandler(f); [logging.warning('words %s', n) for n in range(4)]",
    ),
    "queue-listener": (
        "logging.handlers.QueueListener(queue.Queue(), logging.FileHandler('f'))",
        "f.start(); f.queue.put(logging.makeLogRecord({'msg': 'words'})); time.sleep(0.1)",
    ),
}
IMPORTS = """\
import bz2, csv, dbm.dumb, fileinput, gzip, io, json, logging, logging.handlers, lzma, mailbox, os, pickle, queue
import socket, sys, tarfile, tempfile, time, wave, zipfile
from xml.etree import ElementTree
"""

HOLDERS = {
    "module": "f = {open}\ndef task(config):\n    global keep\n    {write}\n    return 1\n",
    "local": "def task(config):\n    f = {open}\n    {write}\n    return 1\n",
    "default-argument": "def task(config, f={open}):\n    {write}\n    return 1\n",
    "cycle": (
        "class Node: pass\ndef task(config):\n    f = {open}\n    {write}\n    node = Node()\n"
        "    node.me, node.f = node, f\n    return 1\n"
    ),
    "module-cycle": (
        "class Node: pass\nnode = Node()\nf = node.f = {open}\nnode.me = node\n"
        "def task(config):\n    {write}\n    return 1\n"
    ),
    "class-variable": (
        "class Task:\n    f = {open}\n    def __call__(self, config):\n        f = self.f\n        {write}\n        return 1\n"
    ),
    "instance": (
        "class Task:\n    def __init__(self):\n        self.f = {open}\n"
        "    def __call__(self, config):\n        f = self.f\n        {write}\n        return 1\n"
    ),
    "closure": (
        "def make():\n    f = {open}\n    def task(config):\n        {write}\n        return 1\n    return task\n"
        "task = make()\n"
    ),
    "lru-cache": (
        "import functools\n@functools.lru_cache\ndef get():\n    return {open}\n"
        "def task(config):\n    f = get()\n    {write}\n    return 1\n"
    ),
    "own-module": "import held\ndef task(config):\n    f = held.f = {open}\n    {write}\n    return 1\n",
    "library": "import lib\ndef task(config):\n    f = lib.f = {open}\n    {write}\n    return 1\n",
    "standard-module": "def task(config):\n    f = sys.f = os.f = {open}\n    {write}\n    return 1\n",
    "builtins": "import builtins\ndef task(config):\n    f = builtins.f = {open}\n    {write}\n    return 1\n",
    "main": "import __main__\ndef task(config):\n    f = __main__.f = {open}\n    {write}\n    return 1\n",
    "thread-local": (
        "import threading\nlocal = threading.local()\ndef task(config):\n    f = local.f = {open}\n    {write}\n    return 1\n"
    ),
    "context-variable": (
        "import contextvars\nvar = contextvars.ContextVar('v')\ndef task(config):\n    f = {open}\n    var.set(f)\n    {write}\n    return 1\n"
    ),
    "generator": (
        "def rows():\n    with {open} as f:\n        {write}\n        yield 1\n        print('never')\n"
        "kept = rows()\ndef task(config):\n    return next(kept)\n"
    ),
    "exit-stack": (
        "import contextlib\nstack = contextlib.ExitStack()\ndef task(config):\n    f = stack.enter_context({open})\n    {write}\n    return 1\n"
    ),
    "exception": "def task(config):\n    f = {open}\n    {write}\n    raise ValueError('bad row')\n",
    "module-and-exception": "f = {open}\ndef task(config):\n    {write}\n    raise ValueError('bad row')\n",
    "kept-exception": (
        "kept = []\ndef work():\n    f = {open}\n    {write}\n    1 / 0\n"
        "def task(config):\n    try:\n        work()\n    except ZeroDivisionError as error:\n        kept.append(error)\n    return 1\n"
    ),
    "exit": "f = {open}\ndef task(config):\n    {write}\n    sys.exit(3)\n",
    "import-fails": "f = {open}\n{write}\n1 / 0\n",
    "deleted-module": (
        "f = {open}\ndef task(config):\n    {write}\n    del sys.modules[__name__]\n    return 1\n"
    ),
    "thread": (
        "import threading\ndef work():\n    f = {open}\n    {write}\n    time.sleep(0.1)\n"
        "def task(config):\n    threading.Thread(target=work).start()\n    return 1\n"
    ),
    "thread-that-is-daemon": (
        "import threading\nready = threading.Event()\ndef work():\n    f = {open}\n    {write}\n    ready.set()\n    time.sleep(60)\n"
        "def task(config):\n    threading.Thread(target=work, daemon=True).start()\n    ready.wait()\n    return 1\n"
    ),
    "gc-off": "import gc\ndef task(config):\n    gc.disable()\n    f = [{open}]\n    f.append(f)\n    f = f[0]\n    {write}\n    return 1\n",
    "gc-frozen": "import gc\nf = {open}\ndef task(config):\n    {write}\n    gc.freeze()\n    return 1\n",
}

OTHERS = [
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
        "socket-that-somebody-reads",
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
        "file-of-a-folder-that-was-left",
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
        but={"result": "<no result>"},
        why="the job's result travels through a descriptor that the program has closed",
        says="not kept",
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
        "resource-warnings",
        "import warnings\nwarnings.simplefilter('always')\nf = open('f', 'w')\ndef task(config):\n    f.write('abc')\n",
    ),
]

STREAMS = [
    program("print-without-newline", "def task(config):\n    print('no newline', end='')\n"),
    program(
        "half-a-line-and-a-kill",
        "import os, signal\ndef task(config):\n    print('loading weights ...', end='')\n    os.kill(os.getpid(), signal.SIGKILL)\n",
    ),
    program(
        "order-of-both",
        "import sys\ndef task(config):\n    for n in range(5):\n        print('out', n)\n        print('err', n, file=sys.stderr)\n        sys.stdout.write('half')\n        sys.stderr.write('HALF')\n",
    ),
    program(
        "descriptor-1",
        "import os\ndef task(config):\n    print('a')\n    os.write(1, b'b\\n')\n    print('c', end='')\n    os.write(2, b'd')\n    print('e')\n",
    ),
    program(
        "buffer-of-stdout",
        "import sys\ndef task(config):\n    print('a', end='')\n    sys.stdout.buffer.write(b'\\xff\\n')\n    print('b')\n",
    ),
    program(
        "not-flushed-on-request",
        "def task(config):\n    print('a', flush=False)\n    print('b', flush=True)\n",
    ),
    program(
        "carriage-returns",
        "def task(config):\n    for n in range(3):\n        print(f'\\r{n} %', end='')\n",
    ),
    program("odd-letters", "def task(config):\n    print('żółw 🐢')\n"),
    program("null-bytes", "def task(config):\n    print('a\\0b')\n"),
    program("long-line", "def task(config):\n    print('x' * 300_000)\n"),
    program(
        "stdout-replaced",
        "import io, sys\ndef task(config):\n    sys.stdout = io.StringIO()\n    print('lost')\n    return sys.stdout.getvalue()\n",
    ),
    program(
        "stdout-is-a-file",
        "import sys\ndef task(config):\n    sys.stdout = open('f', 'w')\n    print('into the file')\n",
    ),
    program(
        "stdout-redirected",
        "import contextlib, io\ndef task(config):\n    with contextlib.redirect_stdout(io.StringIO()) as text:\n        print('kept')\n    return text.getvalue()\n",
    ),
    program(
        "stdout-detached",
        "import sys\ndef task(config):\n    print('a')\n    global buffer\n    buffer = sys.stdout.detach()\n    buffer.write(b'b\\n')\n    return 1\n",
    ),
    program(
        "stdout-reconfigured",
        "import sys\ndef task(config):\n    sys.stdout.reconfigure(encoding='utf-16-le', line_buffering=False)\n    print('a')\n",
    ),
    program(
        "stdout-buffered-again",
        "import sys\ndef task(config):\n    sys.stdout = open(1, 'w', closefd=False)\n    print('in the buffer')\n    print('error', file=sys.stderr)\n",
    ),
    program(
        "stdout-wrapped-again",
        "import io, sys\ndef task(config):\n    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n    print('wrapped')\n",
    ),
    program(
        "codec-writer",
        "import codecs, sys\ndef task(config):\n    sys.stdout = codecs.getwriter('utf-8')(sys.stdout.detach())\n    print('żółw')\n",
    ),
    program(
        "stdout-closed", "import sys\ndef task(config):\n    sys.stdout.close()\n    return 1\n"
    ),
    program(
        "stdout-closed-and-printed",
        "import sys\ndef task(config):\n    sys.stdout.close()\n    print('x')\n",
    ),
    program(
        "stderr-closed-and-an-error",
        "import sys\ndef task(config):\n    sys.stderr.close()\n    raise ValueError('x')\n",
    ),
    program(
        "stdout-is-none",
        "import sys\ndef task(config):\n    sys.stdout = None\n    print('lost')\n    return 1\n",
    ),
    program(
        "stderr-is-none",
        "import sys\ndef task(config):\n    sys.stderr = None\n    raise ValueError('lost')\n",
    ),
    program(
        "streams-deleted",
        "import sys\ndef task(config):\n    del sys.stdout, sys.stderr\n    return 1\n",
    ),
    program("descriptor-1-closed", "import os\ndef task(config):\n    os.close(1)\n    return 1\n"),
    program(
        "descriptor-1-closed-and-printed",
        "import os\ndef task(config):\n    os.close(1)\n    print('x')\n",
    ),
    program(
        "descriptors-swapped",
        "import os\ndef task(config):\n    os.dup2(os.open('f', os.O_CREAT | os.O_WRONLY), 1)\n    print('into the file')\n    os.system('echo from a shell')\n",
    ),
    program(
        "odd-stdout",
        "import sys\nclass Tee:\n    def __init__(self, to):\n        self.to = to\n    def write(self, text):\n        self.to.write(text.upper())\ndef task(config):\n    sys.stdout = Tee(sys.stdout)\n    print('louder')\n    return 1\n",
    ),
    program(
        "flush-fails",
        "import sys\nclass Odd:\n    def write(self, text):\n        pass\n    def flush(self):\n        raise OSError(28, 'full')\ndef task(config):\n    sys.stdout = Odd()\n    print('x')\n    return 1\n",
    ),
    program(
        "stdout-is-full",
        "import os\ndef task(config):\n    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n    return 1\n",
    ),
    program(
        "is-a-terminal",
        "import sys\ndef task(config):\n    return [s.isatty() for s in (sys.stdin, sys.stdout, sys.stderr)]\n",
    ),
    program(
        "stdin",
        "import sys\ndef task(config):\n    return [sys.stdin.read(), sys.stdin.fileno(), sys.stdin.encoding]\n",
    ),
    program("input", "def task(config):\n    input('your name? ')\n"),
    program(
        "about-streams",
        "import sys\ndef task(config):\n    return [[s.name, s.mode, s.encoding, s.line_buffering, s.write_through, s.newlines, s is o, type(s.buffer).__name__]"
        "\n            for s, o in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__))]\n",
    ),
    program(
        "errors-of-stderr",
        "import sys\ndef task(config):\n    print('\\udcff \\ud800', file=sys.stderr)\n",
    ),
    program(
        "pprint",
        "import pprint\ndef task(config):\n    pprint.pprint({'a' * 50: ['b' * 40, 'c' * 40]})\n",
    ),
    program(
        "logging",
        "import logging\ndef task(config):\n    logging.basicConfig(level='INFO')\n    logging.info('words')\n    logging.getLogger('a.b').error('x', exc_info=ValueError('y'))\n",
    ),
    program(
        "last-resort",
        "import logging\ndef task(config):\n    logging.warning('words')\n    logging.getLogger('x').info('not shown')\n",
    ),
]


def held(writer: str, holder: str) -> object:
    opening, writing = WRITERS[writer]
    code = HOLDERS[holder].format(open=opening, write=writing)
    given = {"given.txt": "given\nlines\n", "held.py": ""}
    return program(
        f"{writer}-{holder}", IMPORTS + dedent(code), files=given, libraries={"lib.py": ""}
    )


HELD = [
    *[held(writer, "module") for writer in WRITERS],
    *[held("text", holder) for holder in HOLDERS if holder != "module"],
    *[
        held(writer, holder)
        for writer in ("gzip", "zip", "csv", "temporary-folder")
        for holder in ("cycle", "exception", "library", "own-module")
    ],
]


@pytest.mark.parametrize("program", HELD)
def test_a_file(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", OTHERS)
def test_something_else(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", STREAMS)
def test_a_stream(program: Program, runner: Runner) -> None:
    runner.check(program)
