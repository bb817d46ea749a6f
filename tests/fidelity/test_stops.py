"""Programs that get SIGTERM while they run: a stop and a timeout send it."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

WAIT = "def task(config):\n    print('ready')\n    time.sleep(600)\n"

PROGRAMS = [
    program("no-handler", "import time\n" + WAIT, stop_at="ready"),
    program(
        "half-a-line",
        "import time\ndef task(config):\n    print('loading weights ...', end='')\n    time.sleep(600)\n",
        stop_at="...",
    ),
    program(
        "half-a-line-of-c",
        "import ctypes, time\ndef task(config):\n    ctypes.CDLL(None).printf(b'loading ...')\n    time.sleep(600)\n",
        stop_at="...",
    ),
    program(
        "open-file",
        "import time\nf = open('f', 'w')\nf.write('lost, as in plain Python')\n" + WAIT,
        stop_at="ready",
    ),
    program(
        "exit-handler",
        "import atexit, time\natexit.register(print, 'never')\n" + WAIT,
        stop_at="ready",
    ),
    program(
        "handler-that-exits",
        "import signal, sys, time\nf = open('f', 'w')\nf.write('kept')\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(3))\n"
        + WAIT,
        stop_at="ready",
    ),
    program(
        "handler-that-saves",
        "import signal, sys, time\ndef save(*a):\n    open('checkpoint', 'w').write('state')\n    sys.exit(0)\nsignal.signal(signal.SIGTERM, save)\n"
        + WAIT,
        stop_at="ready",
    ),
    program(
        "handler-that-raises",
        "import signal, time\ndef stop(*a):\n    raise KeyboardInterrupt\nsignal.signal(signal.SIGTERM, stop)\ndef task(config):\n    try:\n        print('ready')\n        time.sleep(600)\n    finally:\n        print('cleaned up')\n",
        stop_at="ready",
    ),
    program(
        "handler-that-continues",
        "import signal, time\nstopped = []\nsignal.signal(signal.SIGTERM, lambda *a: stopped.append(1))\ndef task(config):\n    print('ready')\n    while not stopped:\n        time.sleep(0.01)\n    print('saved')\n",
        stop_at="ready",
    ),
    program(
        "context-manager",
        "import time\ndef task(config):\n    with open('f', 'w') as f:\n        f.write('lost')\n        print('ready')\n        time.sleep(600)\n",
        stop_at="ready",
    ),
    program("at-import", "import time\nprint('importing')\ntime.sleep(600)\n", stop_at="importing"),
    program(
        "in-a-library",
        "import lib\ndef task(config):\n    return 1\n",
        libraries={"lib.py": "import time\nprint('importing')\ntime.sleep(600)\n"},
        stop_at="importing",
    ),
    program(
        "asyncio-handler",
        "import asyncio, signal\nasync def main():\n    stop = asyncio.Event()\n    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)\n    print('ready')\n    await stop.wait()\n    print('stopped')\ndef task(config):\n    asyncio.run(main())\n",
        stop_at="ready",
    ),
    program(
        "shared-memory",
        "import time\nfrom multiprocessing.shared_memory import SharedMemory\ndef task(config):\n    block = SharedMemory(create=True, size=100)\n    print(block.name)\n    print('ready')\n    time.sleep(600)\n",
        stop_at="ready",
    ),
    program(
        "blocked",
        "import signal, time\ndef task(config):\n    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n    print('ready')\n    print(signal.sigwait({signal.SIGTERM}).name)\n",
        stop_at="ready",
    ),
    program(
        "thread",
        "import threading, time\ndef task(config):\n    threading.Thread(target=time.sleep, args=(600,)).start()\n    print('ready')\n",
        stop_at="ready",
    ),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_stop_agrees_with_sigterm_in_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
