"""The limits of the machine: the bare work that every job, request or commit needs.

Written files stay until the end of all measurements. After a removal a file system may be slow to
make new files (ext4 without a journal: ten times, for up to six minutes), and the next subject
would lose that time. For the same reason the measurement on an aged folder is the last.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from load import flood, request
from service import HERE, running

# Both programs print "ready", and start at the first byte of their input.
_FORK = """
import os, sys, time
number = int(sys.argv[1])
print("ready", flush=True)
sys.stdin.read(1)
start = time.monotonic()
for _ in range(number):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
print(start, time.monotonic())
"""

_SUPERVISED = """
import os, sys, time
number, folder = int(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.read(1)
start = time.monotonic()
for n in range(number):
    pid = os.fork()
    if pid == 0:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        fd = os.open(f"{folder}/{n}.tmp", os.O_CREAT | os.O_WRONLY)
        os.write(fd, b"{}" * 256)
        os.fsync(fd)
        os.rename(f"{folder}/{n}.tmp", f"{folder}/{n}")
        os._exit(0)
    os.waitpid(pid, 0)
print(start, time.monotonic())
"""


def fork_and_exit(number: int, processes: int = 1) -> float:
    """Forks, exits and waits per second of bare interpreters."""
    return _rate_together([_command(_FORK, number, processes)] * processes, number)


def supervised_fork(folder: Path, number: int, processes: int = 1) -> float:
    """The same with a supervisor for each, which writes and syncs an exit record.

    Args:
        folder: a new one, for the records.
    """
    commands = []
    for own in (folder / str(n) for n in range(processes)):
        own.mkdir()
        commands.append([*_command(_SUPERVISED, number, processes), str(own)])
    return _rate_together(commands, number)


def age(folder: Path, number: int) -> None:
    """Make so many files, six to a folder, and remove them all, as retention does."""
    removed = folder / "removed"
    for n in range(number // 6):
        below = removed / str(n)
        below.mkdir(parents=True)
        for name in "abcdef":
            (below / name).touch()
    shutil.rmtree(removed)


def interpreter(number: int = 20) -> float:
    """Milliseconds to run `python -c pass`."""
    start = time.perf_counter()
    for _ in range(number):
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    return (time.perf_counter() - start) / number * 1000


def grouped_commits(folder: Path, number: int, group: int = 16) -> float:
    """Rows per second into SQLite as durable as ours are (WAL, synchronous=FULL), 16 to a commit.

    Args:
        folder: a new one, for the database.
    """
    connection = sqlite3.connect(folder / "rows.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
    start = time.perf_counter()
    for _ in range(number // group):
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(group):
            connection.execute("INSERT INTO rows (text) VALUES (?)", ("x" * 400,))
        connection.execute("COMMIT")
    elapsed = time.perf_counter() - start
    connection.close()
    return number // group * group / elapsed


class Echo:
    """An endpoint on our server and framework that returns its input."""

    def __init__(self, url: str) -> None:
        self.url = url

    def rate(self, number: int, path: str = "/") -> float:
        """Requests per second at 16 connections."""
        asked = request(self.url, "POST", path, b"{}")
        return flood(self.url, [asked] * number).rate


@contextmanager
def echo(folder: Path) -> Iterator[Echo]:
    """The echo endpoint while the block runs."""
    command: list[str | Path] = [sys.executable, HERE / "echo.py", folder / "data"]
    with running(command, folder=folder, ready=" listening on ") as (_, line):
        yield Echo(line.split()[-1])


def _command(code: str, number: int, processes: int) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, str(number // processes)]


def _rate_together(commands: list[list[str]], number: int) -> float:
    """The joint rate of several processes that start at the same time."""
    pipe = subprocess.PIPE
    started = [subprocess.Popen(each, stdin=pipe, stdout=pipe, text=True) for each in commands]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.flush()
    outputs = [process.communicate()[0].split() for process in started]
    begin = min(float(start) for start, _ in outputs)
    end = max(float(end) for _, end in outputs)
    return number // len(commands) * len(commands) / (end - begin)
