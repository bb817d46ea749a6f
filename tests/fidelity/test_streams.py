"""The standard streams: the output, its order, and programs that change the streams."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

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
    program("non-ascii", "def task(config):\n    print('żółw 🐢')\n"),
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
        "tee-as-stdout",
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


@pytest.mark.parametrize("program", STREAMS)
def test_streams_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
