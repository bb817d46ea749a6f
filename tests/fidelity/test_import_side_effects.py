"""Side effects of an import: random state, folders, locks, files, threads, processes."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

SIDE_EFFECTS = [
    program(
        "random-state",
        "import fakelib\ndef task(config):\n    return fakelib.name()\n",
        libraries={
            "fakelib.py": "import random\n_random = random.Random()\ndef name():\n    return _random.randrange(10**12)\n"
        },
        is_random=True,
        jobs=3,
    ),
    program(
        "random-of-the-module",
        "import lib\nimport random\ndef task(config):\n    return [random.random(), lib.X]\n",
        libraries={"lib.py": "import random\nX = random.random()\n"},
        is_random=True,
        jobs=3,
    ),
    program(
        "random-seeded",
        "import random\nrandom.seed(1)\ndef task(config):\n    return random.random()\n",
        jobs=2,
    ),
    program(
        "random-seeded-by-a-library",
        "import lib\nimport random\ndef task(config):\n    return random.random()\n",
        libraries={"lib.py": "import random\nrandom.seed(1)\n"},
        jobs=2,
    ),
    program(
        "uuid",
        "import uuid\ndef task(config):\n    return [str(uuid.uuid4()), str(uuid.uuid1())]\n",
        is_random=True,
        jobs=3,
    ),
    program(
        "secrets",
        "import secrets\nX = secrets.token_hex(8)\ndef task(config):\n    return X\n",
        is_random=True,
        jobs=3,
    ),
    program(
        "c-random",
        "import ctypes\ndef task(config):\n    return ctypes.CDLL(None).rand()\n",
        jobs=2,
    ),
    program(
        "hash-seed-given",
        "def task(config):\n    return hash('words')\n",
        env={"PYTHONHASHSEED": "7"},
        jobs=2,
    ),
    program(
        "names-of-temporary-files",
        "import tempfile\nname = tempfile.mktemp()\ndef task(config):\n    return [name, tempfile.mktemp()]\n",
        is_random=True,
        jobs=3,
    ),
    program(
        "temporary-folder",
        "import tmplib\ndef task(config):\n    return tmplib.save('a')\n",
        libraries={
            "tmplib.py": "import os, tempfile\nHERE = tempfile.TemporaryDirectory()\ndef save(name):\n    open(os.path.join(HERE.name, name), 'w').close()\n    return os.listdir(HERE.name)\n"
        },
        jobs=3,
    ),
    program(
        "temporary-folder-that-an-exit-handler-removes",
        "import tmplib\ndef task(config):\n    open(tmplib.HERE + '/a', 'w').close()\n    return 1\n",
        libraries={
            "tmplib.py": "import atexit, shutil, tempfile\nHERE = tempfile.mkdtemp()\natexit.register(shutil.rmtree, HERE)\n"
        },
        jobs=3,
    ),
    program(
        "lock-of-processes",
        "import os\nimport locklib\ndef task(config):\n    print('got the lock:', locklib.LOCK.acquire(timeout=4))\n    os._exit(1)\n",
        libraries={"locklib.py": "import multiprocessing\nLOCK = multiprocessing.Lock()\n"},
        jobs=2,
    ),
    program(
        "lock-of-threads",
        "import locklib\ndef task(config):\n    return locklib.LOCK.acquire(timeout=4)\n",
        libraries={"locklib.py": "import threading\nLOCK = threading.Lock()\n"},
        jobs=2,
    ),
    program(
        "anonymous-shared-memory",
        "import memlib\ndef task(config):\n    memlib.M[0] += 1\n    return memlib.M[0]\n",
        libraries={"memlib.py": "import mmap\nM = mmap.mmap(-1, 4096)\n"},
        jobs=3,
    ),
    program(
        "shared-value",
        "import vallib\ndef task(config):\n    vallib.V.value += 1\n    return vallib.V.value\n",
        libraries={"vallib.py": "import multiprocessing\nV = multiprocessing.Value('i', 0)\n"},
        jobs=3,
    ),
    program(
        "pipe",
        "import os\nimport pipelib\ndef task(config):\n    os.write(pipelib.W, b'x')\n    return len(os.read(pipelib.R, 100))\n",
        libraries={"pipelib.py": "import os\nR, W = os.pipe()\n"},
        jobs=3,
    ),
    program(
        "file-that-is-read",
        "import datalib\ndef task(config):\n    return [datalib.F.read(4), datalib.F.tell()]\n",
        libraries={"datalib.py": "F = open(__file__)\n"},
        jobs=3,
    ),
    program(
        "file-that-is-appended-to",
        "import lib\ndef task(config):\n    lib.F.write('row\\n')\n",
        libraries={"lib.py": "F = open('rows', 'a')\n"},
    ),
    program(
        "connection",
        "import socklib\ndef task(config):\n    socklib.A.send(b'x')\n    return len(socklib.B.recv(10))\n",
        libraries={"socklib.py": "import socket\nA, B = socket.socketpair()\n"},
        jobs=3,
    ),
    program(
        "thread",
        "import threadlib\ndef task(config):\n    return threadlib.call(1)\n",
        libraries={
            "threadlib.py": "import queue, threading\nI, O = queue.Queue(), queue.Queue()\ndef work():\n    while True:\n        O.put(I.get() + 1)\nthreading.Thread(target=work, daemon=True).start()\ndef call(n):\n    I.put(n)\n    return O.get()\n"
        },
        jobs=2,
    ),
    program(
        "raw-thread",
        "import pumplib\ndef task(config):\n    return pumplib.call(1)\n",
        libraries={
            "pumplib.py": "import _thread, queue\nI, O = queue.SimpleQueue(), queue.SimpleQueue()\ndef work():\n    while True:\n        O.put(I.get() + 1)\n_thread.start_new_thread(work, ())\ndef call(n):\n    I.put(n)\n    return O.get()\n"
        },
        jobs=2,
    ),
    program(
        "finished-thread",
        "import lib\nimport threading\ndef task(config):\n    return [lib.X, threading.active_count()]\n",
        libraries={
            "lib.py": "import threading\nX = []\nt = threading.Thread(target=X.append, args=(1,))\nt.start()\nt.join()\n"
        },
        jobs=2,
    ),
    program(
        "executor",
        "import lib\ndef task(config):\n    return lib.P.submit(abs, -1).result()\n",
        libraries={
            "lib.py": "from concurrent.futures import ThreadPoolExecutor\nP = ThreadPoolExecutor(2)\nP.submit(abs, 1).result()\n"
        },
        jobs=2,
    ),
    program(
        "process",
        "import lib\ndef task(config):\n    return lib.ask('a')\n",
        libraries={
            "lib.py": "import subprocess\nP = subprocess.Popen(['cat'], stdin=-1, stdout=-1, text=True, bufsize=1)\ndef ask(words):\n    P.stdin.write(words + '\\n')\n    P.stdin.flush()\n    return P.stdout.readline()\n"
        },
        jobs=2,
    ),
    program(
        "fork",
        "import lib\ndef task(config):\n    return lib.CODE\n",
        libraries={
            "lib.py": "import os\npid = os.fork()\nif pid == 0:\n    os._exit(3)\nCODE = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        },
        jobs=2,
    ),
    program(
        "fork-of-the-task",
        "import os\npid = os.fork()\nif pid == 0:\n    print('child')\n    os._exit(0)\nos.waitpid(pid, 0)\ndef task(config):\n    print('parent')\n",
    ),
    program(
        "fork-hooks",
        "import os\nimport lib\ndef task(config):\n    pid = os.fork()\n    if pid == 0:\n        os._exit(len(lib.SEEN))\n    return [len(lib.SEEN), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]\n",
        libraries={
            "lib.py": "import os\nSEEN = []\nos.register_at_fork(before=lambda: SEEN.append(1), after_in_child=lambda: SEEN.append(2))\n"
        },
        jobs=2,
    ),
    program(
        "process-id",
        "import os\nPID = os.getpid()\ndef task(config):\n    return PID == os.getpid()\n",
        jobs=2,
    ),
    program(
        "process-id-of-a-library",
        "import os\nimport lib\ndef task(config):\n    return lib.PID == os.getpid()\n",
        libraries={"lib.py": "import os\nPID = os.getpid()\n"},
        jobs=2,
    ),
    program(
        "time-of-start",
        "import time\nimport lib\ndef task(config):\n    return [0 <= time.time() - lib.T < 60, time.process_time() < 5]\n",
        libraries={"lib.py": "import time\nT = time.time()\n"},
        jobs=2,
    ),
    program(
        "signal-handler",
        "import signal\nimport lib\ndef task(config):\n    signal.raise_signal(signal.SIGUSR1)\n",
        libraries={
            "lib.py": "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('signal'))\n"
        },
    ),
    program(
        "exit-handler",
        "import lib\ndef task(config):\n    return 1\n",
        libraries={
            "lib.py": "import atexit, os\natexit.register(print, 'at exit', os.getcwd() != '/')\n"
        },
        jobs=2,
    ),
    program(
        "event-loop",
        "import asyncio\nimport lib\nasync def main():\n    await asyncio.sleep(0)\n    return 1\ndef task(config):\n    return lib.LOOP.run_until_complete(main())\n",
        libraries={
            "lib.py": "import asyncio\nLOOP = asyncio.new_event_loop()\nasyncio.set_event_loop(LOOP)\n"
        },
        jobs=2,
    ),
    program(
        "working-folder",
        "import os\nimport lib\ndef task(config):\n    return sorted(os.listdir())\n",
        files={"data/rows": "1\n"},
        libraries={"lib.py": "import os\nos.chdir('data')\n"},
        jobs=2,
    ),
    program(
        "umask",
        "import os\nimport lib\ndef task(config):\n    open('f', 'w').close()\n    return os.stat('f').st_mode\n",
        libraries={"lib.py": "import os\nos.umask(0o077)\n"},
    ),
    program(
        "locale",
        "import locale\nimport lib\ndef task(config):\n    return locale.setlocale(locale.LC_ALL)\n",
        libraries={"lib.py": "import locale\nlocale.setlocale(locale.LC_ALL, 'C')\n"},
        jobs=2,
    ),
    program(
        "recursion-limit",
        "import sys\nimport lib\ndef task(config):\n    return sys.getrecursionlimit()\n",
        libraries={"lib.py": "import sys\nsys.setrecursionlimit(5000)\n"},
        jobs=2,
    ),
    program(
        "default-start-method",
        "import multiprocessing\nimport lib\ndef task(config):\n    return multiprocessing.get_start_method()\n",
        libraries={"lib.py": "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"},
        jobs=2,
    ),
    program(
        "tracing",
        "import sys\nimport lib\ndef task(config):\n    sys.setprofile(None)\n    return lib.CALLS > 0\n",
        libraries={
            "lib.py": "import sys\nCALLS = 0\ndef profile(*_):\n    global CALLS\n    CALLS += 1\nsys.setprofile(profile)\n"
        },
        jobs=2,
    ),
    program(
        "decimal-context",
        "import decimal\nimport lib\ndef task(config):\n    return str(decimal.Decimal(1) / 3)\n",
        libraries={"lib.py": "import decimal\ndecimal.getcontext().prec = 5\n"},
        jobs=2,
    ),
    program(
        "socket-timeout",
        "import socket\nimport lib\ndef task(config):\n    return socket.getdefaulttimeout()\n",
        libraries={"lib.py": "import socket\nsocket.setdefaulttimeout(3)\n"},
        jobs=2,
    ),
]


@pytest.mark.parametrize("program", SIDE_EFFECTS)
def test_side_effects_of_imports_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
