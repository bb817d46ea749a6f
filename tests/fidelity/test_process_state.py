"""The state of a process, at its start and after changes: signals, tracing, locale, folder,
limits, flags."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

INITIAL = [
    program(
        "signals",
        """
        import signal
        def task(config):
            return {s.name: str(signal.getsignal(s)) for s in signal.Signals
                    if signal.getsignal(s) is not signal.SIG_DFL and s is not signal.SIGCHLD}
        """,
    ),
    program(
        "handler-of-children",
        "import signal\ndef task(config):\n    return str(signal.getsignal(signal.SIGCHLD))\n",
    ),
    program(
        "blocked-signals",
        "import signal\ndef task(config):\n    return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n",
    ),
    program(
        "timers",
        "import signal\ndef task(config):\n    return [signal.getitimer(t) for t in (0, 1, 2)] + [signal.set_wakeup_fd(-1)]\n",
    ),
    program(
        "folder",
        "import os\ndef task(config):\n    return [os.path.basename(os.getcwd()), os.getcwd() == os.path.dirname(os.path.abspath(__file__))]\n",
    ),
    program("umask", "import os\ndef task(config):\n    return os.umask(0)\n"),
    program(
        "user",
        "import os, getpass\ndef task(config):\n    return [os.getuid(), os.getegid(), os.getgroups(), os.path.expanduser('~')]\n",
    ),
    program(
        "priority",
        "import os\ndef task(config):\n    return [os.nice(0), os.sched_getscheduler(0), len(os.sched_getaffinity(0))]\n",
    ),
    program(
        "limits",
        "import resource\ndef task(config):\n    names = [n for n in dir(resource) if n.startswith('RLIMIT_') and n != 'RLIMIT_NOFILE']\n    return {n: resource.getrlimit(getattr(resource, n)) for n in names}\n",
    ),
    program(
        "environment",
        "import os\ndef task(config):\n    return sorted(n for n in os.environ if n not in ('LC_CTYPE', 'CORTEX_TASK_FILE'))\n",
    ),
    program(
        "values-of-the-environment",
        "import os\ndef task(config):\n    return {n: os.environ.get(n) for n in ('PATH', 'HOME', 'LANG', 'PYTHONUNBUFFERED', 'CORTEX_ATTEMPT', 'VIRTUAL_ENV')}\n",
    ),
    program(
        "environment-of-c",
        "import ctypes, os\ng = ctypes.CDLL(None).getenv\ng.restype = ctypes.c_char_p\ndef task(config):\n    os.environ['ODD'] = 'x'\n    return [g(n).decode() for n in (b'ODD', b'CORTEX_ATTEMPT', b'PATH')] + [g(b'CORTEX_JOB_ID').decode() == os.environ['CORTEX_JOB_ID']]\n",
    ),
    program(
        "locale",
        "import locale\ndef task(config):\n    return [locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(), locale.getlocale()]\n",
    ),
    program(
        "encodings",
        "import sys\ndef task(config):\n    return [sys.getdefaultencoding(), sys.getfilesystemencoding(), sys.getfilesystemencodeerrors(), open(__file__).encoding]\n",
    ),
    program(
        "name-that-is-not-utf-8",
        "import os\ndef task(config):\n    open(b'f\\xff', 'w').close()\n    return [repr(n) for n in os.listdir() if n.startswith('f')]\n",
        reader="print('read')",
    ),
    program(
        "flags",
        "import sys\ndef task(config):\n    return {n: getattr(sys.flags, n) for n in ('optimize', 'debug', 'verbose', 'utf8_mode', 'dev_mode', 'bytes_warning', 'interactive', 'quiet')}\n",
    ),
    program(
        "interpreter",
        "import sys\ndef task(config):\n    return [sys.version, sys.executable, sys.prefix, sys.base_prefix, sys.exec_prefix, sys.platform, sys.byteorder]\n",
    ),
    program(
        "dont-write-byte-code",
        "import sys\ndef task(config):\n    return [sys.dont_write_bytecode, sys.pycache_prefix]\n",
    ),
    program(
        "warn-options",
        "import sys\ndef task(config):\n    return [sys.warnoptions, sys._xoptions]\n",
    ),
    program(
        "recursion-limit", "import sys\ndef task(config):\n    return sys.getrecursionlimit()\n"
    ),
    program(
        "switch-interval", "import sys\ndef task(config):\n    return sys.getswitchinterval()\n"
    ),
    program(
        "tracing",
        "import sys, threading\ndef task(config):\n    return [sys.gettrace(), sys.getprofile(), threading.gettrace()]\n",
    ),
    program(
        "faulthandler",
        "import faulthandler\ndef task(config):\n    return faulthandler.is_enabled()\n",
    ),
    program(
        "hooks",
        "import sys, threading, builtins\ndef task(config):\n    return [sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__, sys.unraisablehook is sys.__unraisablehook__, threading.excepthook is threading.__excepthook__, builtins.__import__.__name__]\n",
    ),
    program(
        "main",
        "import __main__, sys\ndef task(config):\n    return [__main__.__name__, __main__ is sys.modules['__main__'], __main__.__doc__, hasattr(__main__, '__file__'), __main__.__spec__, hasattr(__main__, '__builtins__')]\n",
    ),
    program(
        "name",
        "print(__name__)\ndef task(config):\n    return [__name__, __doc__]\nif __name__ == '__main__':\n    raise SystemExit(9)\n",
    ),
    program(
        "file",
        "import os\ndef task(config):\n    return [os.path.basename(__file__), os.path.isabs(__file__), os.path.basename(__cached__ or '').split('.')[0]]\n",
    ),
    program(
        "arguments",
        "import argparse, sys\nparser = argparse.ArgumentParser()\nparser.add_argument('--x', default=3)\ndef task(config):\n    return [parser.parse_args().x, len(sys.argv)]\n",
    ),
    program(
        "first-of-the-path",
        "import os, sys\ndef task(config):\n    return os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__))\n",
    ),
    program(
        "builtins-of-site",
        "def task(config):\n    return [exit.__class__.__name__, quit.__class__.__name__, bool(copyright), 'site' in __import__('sys').modules]\n",
    ),
    program(
        "finders",
        "import sys\ndef task(config):\n    return [getattr(f, '__name__', str(f)) for f in sys.meta_path]\n",
    ),
    program(
        "frames",
        "import sys, traceback\ndef task(config):\n    return [sys._getframe().f_code.co_name, traceback.extract_stack()[-1].name]\n",
    ),
    program(
        "context-variables",
        "import contextvars\ndef task(config):\n    return len(contextvars.copy_context())\n",
    ),
    program(
        "exception-in-flight", "import sys\ndef task(config):\n    return list(sys.exc_info())\n"
    ),
    program(
        "children",
        "import os\ndef task(config):\n    try:\n        os.waitpid(-1, os.WNOHANG)\n    except ChildProcessError as error:\n        return str(error)\n",
    ),
    program(
        "usage",
        "import resource, time\ndef task(config):\n    return [resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.process_time() < 2, time.thread_time() < 2]\n",
    ),
    program(
        "file-locks",
        "import fcntl\ndef task(config):\n    with open('f', 'w') as f:\n        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n    return 1\n",
    ),
    program(
        "new-files-number",
        "def task(config):\n    with open('f', 'w') as f:\n        return f.fileno() < 20\n",
    ),
]


CHANGED = [
    program(
        "handler",
        "import os, signal\ndef task(config):\n    signal.signal(signal.SIGTERM, lambda *a: print('term'))\n    os.kill(os.getpid(), signal.SIGTERM)\n    return 'on'\n",
    ),
    program(
        "handler-that-exits",
        "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(3))\ndef task(config):\n    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n    finally:\n        print('cleaned')\n",
    ),
    program(
        "handler-that-raises",
        "import signal\ndef fail(*a):\n    raise TimeoutError('too slow')\ndef task(config):\n    signal.signal(signal.SIGALRM, fail)\n    signal.setitimer(signal.ITIMER_REAL, 0.05)\n    signal.pause()\n",
    ),
    program(
        "interrupt-caught",
        "import os, signal\ndef task(config):\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt:\n        return 'caught'\n",
    ),
    program(
        "child-handler",
        "import os, signal\nseen = []\ndef task(config):\n    signal.signal(signal.SIGCHLD, lambda *a: seen.append(1))\n    pid = os.fork()\n    if pid == 0:\n        os._exit(0)\n    os.waitpid(pid, 0)\n    return len(seen)\n",
    ),
    program(
        "children-ignored",
        "import os, signal, time\ndef task(config):\n    signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n    if os.fork() == 0:\n        os._exit(0)\n    time.sleep(0.05)\n    try:\n        os.wait()\n    except ChildProcessError:\n        return 'reaped'\n",
    ),
    program(
        "signal-and-a-thread",
        "import signal, threading\ndef task(config):\n    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n    signal.raise_signal(signal.SIGUSR1)\n    return int(signal.sigwait({signal.SIGUSR1}))\n",
    ),
    program(
        "faulthandler-crash",
        "import ctypes, faulthandler\ndef task(config):\n    faulthandler.enable()\n    ctypes.string_at(0)\n",
    ),
    program(
        "faulthandler-dump",
        "import faulthandler, sys\ndef task(config):\n    faulthandler.dump_traceback()\n",
    ),
    program(
        "trace",
        "import sys\nlines = []\ndef trace(frame, event, arg):\n    if frame.f_code.co_name == 'work':\n        lines.append([event, frame.f_lineno])\n    return trace\ndef work():\n    x = 1\n    return x\ndef task(config):\n    sys.settrace(trace)\n    work()\n    sys.settrace(None)\n    return lines\n",
    ),
    program(
        "trace-at-exit",
        "import sys\ncount = [0]\ndef task(config):\n    sys.settrace(lambda *a: count.__setitem__(0, 1))\n    sum([])\n    return 1\n",
    ),
    program(
        "profile",
        "import cProfile\ndef task(config):\n    p = cProfile.Profile()\n    return p.runcall(sum, [1, 2])\n",
    ),
    program(
        "tracemalloc",
        "import tracemalloc\ndef task(config):\n    tracemalloc.start()\n    x = [bytes(1000) for _ in range(10)]\n    return [tracemalloc.is_tracing(), tracemalloc.get_traced_memory()[0] > 5000]\n",
    ),
    program(
        "locale-changed",
        "import locale\ndef task(config):\n    locale.setlocale(locale.LC_ALL, 'C.UTF-8')\n    return [locale.setlocale(locale.LC_ALL), f'{1234.5:n}']\n",
    ),
    program(
        "time-zone",
        "import os, time\ndef task(config):\n    os.environ['TZ'] = 'Asia/Tokyo'\n    time.tzset()\n    return [time.tzname, time.localtime(0).tm_hour]\n",
    ),
    program(
        "time-zone-given",
        "import time, datetime\ndef task(config):\n    return [time.tzname, str(datetime.datetime.fromtimestamp(0))]\n",
        env={"TZ": "America/New_York"},
    ),
    program(
        "umask-changed",
        "import os\ndef task(config):\n    os.umask(0o077)\n    os.mkdir('d')\n    open('d/f', 'w').close()\n    return [oct(os.stat('d').st_mode), oct(os.stat('d/f').st_mode)]\n",
        jobs=2,
    ),
    program(
        "folder-changed",
        "import os\ndef task(config):\n    os.chdir('/')\n    os.makedirs(os.environ['TMPDIR'] + '/x')\n    import helper\n    return [os.getcwd(), helper.X]\n",
        files={"helper.py": "X = 1\n"},
        differences={"result": ["/", 1], "exit_code": 0, "log": ""},
        reason="a job's sys.path has the project's absolute path; `python -c` has the current folder there, and finds no modules after a chdir",
    ),
    program(
        "folder-removed",
        "import os\ndef task(config):\n    os.mkdir('d')\n    os.chdir('d')\n    os.rmdir('../d')\n    try:\n        os.getcwd()\n    except FileNotFoundError:\n        return 'gone'\n",
    ),
    program(
        "file-limit",
        "import resource\ndef task(config):\n    resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))\n    global files\n    files = []\n    while True:\n        files.append(open('/dev/null'))\n",
    ),
    program(
        "memory-limit",
        "import resource\ndef task(config):\n    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n    try:\n        bytearray(4 << 30)\n    except MemoryError:\n        return 'no memory'\n",
    ),
    program(
        "size-limit",
        "import resource\ndef task(config):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n    with open('f', 'wb') as f:\n        f.write(bytes(2000))\n",
    ),
    program(
        "cpu-limit",
        "import resource\ndef task(config):\n    resource.setrlimit(resource.RLIMIT_CPU, (0, 5))\n    while True:\n        pass\n",
    ),
    program(
        "recursion-limit-changed",
        "import sys\ndef down(n):\n    return n and down(n - 1)\ndef task(config):\n    sys.setrecursionlimit(3000)\n    return down(2500)\n",
    ),
    program(
        "recursion-as-deep-as-in-plain-python",
        "def down(n):\n    return n and down(n - 1)\ndef task(config):\n    return down(950)\n",
    ),
    program(
        "stack-of-threads",
        "import sys, threading\ndef down(n):\n    return n and down(n - 1)\nfound = []\ndef work():\n    found.append(down(20000))\ndef task(config):\n    sys.setrecursionlimit(30000)\n    threading.stack_size(256 << 20)\n    t = threading.Thread(target=work)\n    t.start()\n    t.join()\n    return found\n",
    ),
    program(
        "environment-changed",
        "import os, subprocess\ndef task(config):\n    os.environ['A'] = 'x'\n    os.environ.pop('HOME', None)\n    return subprocess.run(['sh', '-c', 'echo $A; echo ${HOME-none}'], capture_output=True, text=True).stdout\n",
    ),
    program(
        "environment-cleared",
        "import os, subprocess\ndef task(config):\n    os.environ.clear()\n    return subprocess.run(['/usr/bin/env'], capture_output=True, text=True).stdout\n",
    ),
    program(
        "arguments-changed",
        "import sys, runpy\ndef task(config):\n    sys.argv = ['tool', '--x']\n    runpy.run_path('tool.py', run_name='__main__')\n",
        files={"tool.py": "import sys\nprint(__name__, sys.argv)\n"},
    ),
    program(
        "run-as-main",
        "import runpy\ndef task(config):\n    return runpy.run_module('tool', run_name='__main__')['X']\n",
        files={"tool.py": "X = __name__\n"},
    ),
    program(
        "path-changed",
        "import sys\ndef task(config):\n    sys.path.insert(0, 'libs')\n    import json\n    import extra\n    return [extra.X, json.dumps(1)]\n",
        files={"libs/extra.py": "X = 1\n", "libs/unused.py": ""},
    ),
    program(
        "modules-forgotten",
        "import sys\ndef task(config):\n    import helper\n    del sys.modules['helper']\n    import helper\n",
        files={"helper.py": "print('imported')\n"},
    ),
    program(
        "all-modules-forgotten",
        "import sys\ndef task(config):\n    sys.modules.clear()\n    return 1\n",
        differences={"result": 1},
        reason="the driver cannot import json any more; a job has imported json before",
    ),
    program(
        "builtins-changed",
        "import builtins\ndef task(config):\n    builtins.sorted = lambda x: 7\n    builtins.open = None\n    return sorted('')\n",
        differences={"result": 7},
        reason="the driver imports json with the remaining builtins; a job has imported json before",
    ),
    program(
        "streams-of-children-changed",
        "import os, subprocess\ndef task(config):\n    with open('out', 'w') as f:\n        saved = os.dup(1)\n        os.dup2(f.fileno(), 1)\n        subprocess.run(['echo', 'into the file'])\n        os.dup2(saved, 1)\n        print('back')\n",
    ),
    program(
        "daemonised",
        "import os\ndef task(config):\n    if os.fork() == 0:\n        os.setsid()\n        os._exit(0)\n    os.wait()\n    return 1\n",
    ),
    program("session-refused", "import os\ndef task(config):\n    os.setsid()\n"),
    program(
        "garbage-collector-off",
        "import gc\ngc.disable()\nclass Node: pass\ndef task(config):\n    for _ in range(10):\n        n = Node()\n        n.me = n\n    return gc.collect() >= 9\n",
    ),
    program(
        "exit-code-after-warnings",
        "import warnings, sys\ndef task(config):\n    warnings.warn('x')\n    sys.exit(0)\n",
    ),
]


@pytest.mark.parametrize("program", INITIAL)
def test_the_initial_state_agrees_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)


@pytest.mark.parametrize("program", CHANGED)
def test_changes_of_the_state_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
