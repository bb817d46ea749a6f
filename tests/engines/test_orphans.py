"""Which of the processes that it inherits the operator ends, and which it spares. Each test has
a process of its own, which inherits them."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import asyncio, os, subprocess, sys, time
from cortex.engines.local import orphans as operator_orphans
from cortex.worker.forkserver import orphans
from cortex.worker import processes

MARKED = "from cortex.worker.forkserver import orphans; orphans.mark(); "
DAEMON = "import os, subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True, env={}); "


def start(code):
    command = [sys.executable, "-c", code + "print(flush=True); import time; time.sleep(300)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    return child


own, known = start(""), start(MARKED)
before = start(MARKED)
watch = operator_orphans.Orphans(lambda: {known.pid})
watch.open()
stranger = start(MARKED + DAEMON)
below = processes.descendants(stranger.pid)
spared = [own, known, before]
try:
    asyncio.run(main())
    print([each.poll() for each in spared], len(below), [processes.ticks_if_alive(pid) for pid in below])
    print(os.path.exists(f"/proc/{stranger.pid}"))
finally:
    for each in spared:
        each.kill()
    processes.send_signals({**below, stranger.pid: processes.ticks_if_alive(stranger.pid)}, 9)
"""
ENDED = "[None, None, None] 1 [None]\nFalse\n"


def test_only_unknown_descendants_of_a_fork_server_are_ended() -> None:
    assert output_of("async def main(): await watch.end_orphans()") == ENDED


def test_a_check_that_fails_for_lack_of_descriptors_is_repeated() -> None:
    main = """
def refuse(parent):
    operator_orphans.orphans.marked = marked
    raise OSError(24, "too many open files")

async def main():
    global marked
    marked, operator_orphans.orphans.marked = operator_orphans.orphans.marked, refuse
    await watch.end_orphans()
"""
    assert output_of(main).endswith(ENDED)


def test_no_process_is_ended_once_the_supervisors_are_released() -> None:
    main = "async def main():\n    watch.close()\n    await watch.end_orphans()"
    assert output_of(main).endswith("True\n")


def output_of(main: str) -> str:
    command = [sys.executable, "-c", f"{main}\n{SCRIPT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
