"""Jobs that turn on the processes that watch over them."""

from __future__ import annotations

import json
import re
from typing import Any

from cortex.worker import processes
from operator_harness import Operator, probe_yaml, until

# A job that turns on its relatives. What it starts says who it is, and is not ended by the end of its parent.
HOSTILE = """
import ctypes, os, signal, sys, time

libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PTRACE_ATTACH = 1, 16


class Task:
    def __call__(self, config):
        print("pid", os.getpid(), "\\n", end="", flush=True)
        self.supervisor = os.getppid()
        self.server = self.parent(self.supervisor)
        return getattr(self, config["do"])(config)

    def parent(self, pid):
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])

    def last(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready\\n", end="", flush=True)
        while True:
            time.sleep(1)

    def wait(self, config):
        print("ready\\n", end="", flush=True)
        while not os.path.exists(config["go"]):
            time.sleep(0.02)

    def stop_it(self, config):
        os.kill(self.supervisor, signal.SIGSTOP)
        self.last()

    def stop_it_again_and_again(self, config):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("pid", os.getpid(), "\\n", end="", flush=True)
            while True:
                os.kill(self.supervisor, signal.SIGSTOP)
                time.sleep(0.0001)
        while open(f"/proc/{self.supervisor}/stat").read().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.0001)
        self.last()

    def trace_it(self, config):
        if libc.ptrace(PTRACE_ATTACH, self.supervisor, 0, 0) != 0:  # some systems refuse it
            os.kill(self.supervisor, signal.SIGSTOP)
        self.last()

    def stop_server(self, config):
        os.kill(self.server, signal.SIGSTOP)
        self.last()

    def stop_server_again_and_again(self, config):
        self.supervisor = self.server
        self.stop_it_again_and_again(config)

    def trace_server(self, config):
        self.supervisor = self.server
        self.trace_it(config)

    def kill_it_when_asked_to_end(self, config):
        def kill(*_):
            os.kill(self.supervisor, signal.SIGKILL)
        libc.prctl(PR_SET_PDEATHSIG, 0)
        signal.signal(signal.SIGTERM, kill)
        print("ready\\n", end="", flush=True)
        while True:
            time.sleep(1)

    # The same processes on other tries find out what is left of the first.

    def hide(self, config):
        hidden = open_file(config["file"], "r")
        if hidden:
            return [pid for pid in hidden.split() if os.path.exists(f"/proc/{pid}")]
        for number in range(3):
            if os.fork() == 0:
                libc.prctl(PR_SET_PDEATHSIG, 0)
                os.setsid()
                code = "import os, time; os.fork(); os.setsid(); time.sleep(600)"
                if number == 1:  # no two looks find the same process
                    code = "import os, time\\nwhile os.fork() == 0: time.sleep(0.001)"
                os.execve(sys.executable, [sys.executable, "-c", code], {})
        libc.prctl(PR_SET_PDEATHSIG, 0)
        time.sleep(0.5)
        open_file(config["file"], "w", " ".join(map(str, [os.getpid(), *self.below()])))
        victims = {"server": self.server, "supervisor": self.supervisor}
        for who, number in config["signals"]:
            os.kill(victims[who], getattr(signal, number))
        time.sleep(600)

    def below(self):
        return [int(e) for e in os.listdir("/proc") if e.isdigit() and int(e) != os.getpid() and self.parent_or_none(e) == os.getpid()]

    def parent_or_none(self, pid):
        try:
            return self.parent(pid)
        except OSError:
            return None


def open_file(path, mode, text=None):
    try:
        with open(path, mode) as file:
            return file.read() if text is None else file.write(text)
    except FileNotFoundError:
        return ""
"""
HIDES = {
    "fork server first": [("server", "SIGKILL"), ("supervisor", "SIGKILL")],
    "supervisor first": [("supervisor", "SIGKILL"), ("server", "SIGKILL")],
    "fork server stopped": [("server", "SIGSTOP"), ("supervisor", "SIGKILL")],
    "both stopped": [
        ("server", "SIGSTOP"),
        ("supervisor", "SIGSTOP"),
        ("supervisor", "SIGKILL"),
        ("server", "SIGKILL"),
    ],
}


def deployed(running: Operator, name: str = "probe", more: str = "") -> str:
    endpoint = running.deployed(probe_yaml(name, more), {"probe.py": HOSTILE})
    return endpoint.removeprefix(running.url)


def warmed_up(running: Operator, path: str) -> str:
    """The path again, when a job of that API has run: the next begins long before its timeout."""
    done = running.run(running.url + path, config={"do": "wait", "go": "/"})
    assert done["status"] == "status_succeeded"
    return path


def begun(running: Operator, path: str, what: str, timeout: int | None = None) -> Any:
    """A job that has done its worst."""
    job = running.submit(running.url + path, config={"do": what}, timeout=timeout)
    running.await_log(running.url + path, job, "ready")
    return job


def left(running: Operator, path: str, job: Any) -> list[int]:
    """What lives of the processes that a job has told of."""
    told = re.findall(r"pid (\d+)", running.log_of(running.url + path, job))
    assert told
    return [int(pid) for pid in told if processes.ticks_if_alive(pid) is not None]


def supervisor_of(running: Operator, job: Any) -> int:
    records = running.data_dir / "jobs" / job["job_id"]
    until(lambda: list(records.glob("start.*")), "a start record")
    return int(json.loads(max(records.glob("start.*")).read_bytes())["pid"])


def state(pid: int) -> str:
    about = processes.stat(pid)
    return "gone" if about is None else about[0]
