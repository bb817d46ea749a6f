"""Files that are open when a program ends, with each kind of reference to them: a module's
variable, a cycle, a class, a default argument, a generator, a local variable of a frame that an
exception refers to."""

from __future__ import annotations

from textwrap import dedent

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

WRITERS = {
    # The code that opens a file, and the code that writes to it.
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
    "named-temporary-deleted-at-close": ("tempfile.NamedTemporaryFile('w')", "f.write('abc')"),
    "temporary": ("tempfile.TemporaryFile('w')", "f.write('abc')"),
    "spooled": ("tempfile.SpooledTemporaryFile(max_size=2)", "f.write(b'abc')"),
    "temporary-folder": ("tempfile.TemporaryDirectory()", "open(f.name + '/a', 'w').write('x')"),
    "made-folder": ("tempfile.mkdtemp()", "open(f + '/a', 'w').write('x')"),
    "wave": (
        "wave.open('f', 'wb')",
        "f.setparams((1, 2, 8000, 0, 'NONE', '')); f.writeframes(b'ab' * 100)",
    ),
    "xml": ("open('f', 'wb')", "ElementTree.ElementTree(ElementTree.Element('a')).write(f)"),
    "mailbox": (
        "mailbox.mbox('f')",
        "m = mailbox.mboxMessage('Subject: a\\n\\nb'); m.set_from('a', time.gmtime(0)); f.add(m)",
    ),
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
        "f.start(); f.queue.put(logging.makeLogRecord({'msg': 'words'})); f.queue.join()",
    ),
}


IMPORTS = """\
import bz2, csv, dbm.dumb, fileinput, gzip, io, json, logging, logging.handlers, lzma, mailbox, os, pickle, queue
import socket, sys, tarfile, tempfile, time, wave, zipfile
from xml.etree import ElementTree
"""


REFERENCES = {
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
    "stored-exception": (
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


def with_open_file(writer: str, reference: str) -> object:
    opening, writing = WRITERS[writer]
    code = REFERENCES[reference].format(open=opening, write=writing)
    given = {"given.txt": "given\nlines\n", "held.py": ""}
    return program(
        f"{writer}-{reference}", IMPORTS + dedent(code), files=given, libraries={"lib.py": ""}
    )


PROGRAMS = [
    *[with_open_file(writer, "module") for writer in WRITERS],
    *[with_open_file("text", reference) for reference in REFERENCES if reference != "module"],
    *[
        with_open_file(writer, reference)
        for writer in ("gzip", "zip", "csv", "temporary-folder")
        for reference in ("cycle", "exception", "library", "own-module")
    ],
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_open_files_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
