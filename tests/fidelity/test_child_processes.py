"""Child processes: commands, and forks by hand."""

from __future__ import annotations

import pytest

from fidelity.harness import Program, Runner
from fidelity.programs import program

SUBPROCESSES = [
    program(
        "order-of-output",
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
        "child-runs-at-exit",
        "import subprocess\ndef task(config):\n    subprocess.Popen(['sleep', '0.1'])\n    return 1\n",
    ),
    program(
        "child-writes-at-exit",
        "import subprocess\ndef task(config):\n    global p\n    p = subprocess.Popen(['cat'], stdin=-1)\n    p.stdin.write(b'words\\n')\n",
    ),
    program(
        "child-still-writes-at-exit",
        "import subprocess\ndef task(config):\n    global p\n"
        "    p = subprocess.Popen('sleep 0.2; gzip -n > words.gz', shell=True, stdin=-1)\n"
        "    p.stdin.write(b'words\\n' * 5000)\n",
    ),
    program(
        "children-and-grandchildren-still-write-at-exit",
        "import subprocess\ndef task(config):\n    global p\n"
        "    p = subprocess.Popen('cat | (sleep 0.2; cat) | tee words', shell=True, stdin=-1)\n"
        "    p.stdin.write(b'words\\n')\n",
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


@pytest.mark.parametrize("program", SUBPROCESSES)
def test_child_processes_agree_with_plain_python(program: Program, runner: Runner) -> None:
    runner.check(program)
