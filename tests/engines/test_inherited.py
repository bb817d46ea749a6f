"""What the operator ends of what it inherits, and what it spares. In a process of its own, for it is to inherit."""

from __future__ import annotations

import subprocess
import sys

MADE = """
import asyncio, os, subprocess, sys, time
from cortex.engines.local import orphans as inherited
from cortex.worker.forkserver import orphans
from cortex.worker import processes

MARKED = "from cortex.worker.forkserver import orphans; orphans.mark(); "
DAEMON = "import os, subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True, env={}); "


def start(code):
    command = [sys.executable, "-c", code + "print(flush=True); import time; time.sleep(300)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    return child


made = []
own, known = start(""), start(MARKED)
before = start(MARKED)
watch = inherited.Orphans(lambda: {known.pid})
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


def test_only_what_descends_from_a_fork_server_and_nobody_knows_is_ended() -> None:
    assert told("async def main(): await watch.end_orphans()") == ENDED


def test_what_cannot_be_told_for_want_of_descriptors_is_asked_again() -> None:
    main = """
def refuse(parent):
    inherited.orphans.marked = marked
    raise OSError(24, "too many open files")

async def main():
    global marked
    marked, inherited.orphans.marked = inherited.orphans.marked, refuse
    await watch.end_orphans()
"""
    assert told(main).endswith(ENDED)


def test_nothing_is_ended_any_more_once_supervising_processes_are_let_go_of() -> None:
    main = "async def main():\n    watch.close()\n    await watch.end_orphans()"
    assert told(main).endswith("True\n")


def told(main: str) -> str:
    command = [sys.executable, "-c", f"{main}\n{MADE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
