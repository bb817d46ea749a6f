"""Jobs that attack their supervisor and their fork server."""

from __future__ import annotations

import json
import re
from typing import Any

from cortex.worker import processes
from operator_harness import Operator, probe_yaml, until

# A job that attacks its ancestors. Its processes print their pids, and outlive their parents.
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

    def ignore_sigterm(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("ready\\n", end="", flush=True)
        while True:
            time.sleep(1)

    def wait(self, config):
        print("ready\\n", end="", flush=True)
        while not os.path.exists(config["go"]):
            time.sleep(0.02)

    def stop_supervisor(self, config):
        os.kill(self.supervisor, signal.SIGSTOP)
        self.ignore_sigterm()

    def stop_supervisor_repeatedly(self, config):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("pid", os.getpid(), "\\n", end="", flush=True)
            while True:
                os.kill(self.supervisor, signal.SIGSTOP)
                time.sleep(0.0001)
        while open(f"/proc/{self.supervisor}/stat").read().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.0001)
        self.ignore_sigterm()

    def trace_supervisor(self, config):
        if libc.ptrace(PTRACE_ATTACH, self.supervisor, 0, 0) != 0:  # some systems forbid ptrace
            os.kill(self.supervisor, signal.SIGSTOP)
        self.ignore_sigterm()

    def stop_server(self, config):
        os.kill(self.server, signal.SIGSTOP)
        self.ignore_sigterm()

    def stop_server_repeatedly(self, config):
        self.supervisor = self.server
        self.stop_supervisor_repeatedly(config)

    def trace_server(self, config):
        self.supervisor = self.server
        self.trace_supervisor(config)

    def kill_supervisor_on_sigterm(self, config):
        def kill(*_):
            os.kill(self.supervisor, signal.SIGKILL)
        libc.prctl(PR_SET_PDEATHSIG, 0)
        signal.signal(signal.SIGTERM, kill)
        print("ready\\n", end="", flush=True)
        while True:
            time.sleep(1)

    # The second attempt returns the processes of the first one that still live.

    def hide(self, config):
        hidden = open_file(config["file"], "r")
        if hidden:
            return [pid for pid in hidden.split() if os.path.exists(f"/proc/{pid}")]
        for number in range(3):
            if os.fork() == 0:
                libc.prctl(PR_SET_PDEATHSIG, 0)
                os.setsid()
                code = "import os, time; os.fork(); os.setsid(); time.sleep(600)"
                if number == 1:  # the process changes between any two scans of /proc
                    code = "import os, time\\nwhile os.fork() == 0: time.sleep(0.001)"
                os.execve(sys.executable, [sys.executable, "-c", code], {})
        libc.prctl(PR_SET_PDEATHSIG, 0)
        time.sleep(0.5)
        open_file(config["file"], "w", " ".join(map(str, [os.getpid(), *self.children()])))
        victims = {"server": self.server, "supervisor": self.supervisor}
        for who, number in config["signals"]:
            os.kill(victims[who], getattr(signal, number))
        time.sleep(600)

    def children(self):
        own = os.getpid()
        pids = [int(e) for e in os.listdir("/proc") if e.isdigit() and int(e) != own]
        return [pid for pid in pids if self.parent_or_none(pid) == own]

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
SIGNALS_AFTER_HIDING = {
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


def deploy_hostile(running: Operator, name: str = "probe", more: str = "") -> str:
    endpoint = running.deployed(probe_yaml(name, more), {"probe.py": HOSTILE})
    return endpoint.removeprefix(running.url)


def warm_up(running: Operator, path: str) -> str:
    """Run one job of an API: the next job starts well before its timeout. Returns the path."""
    done = running.run(running.url + path, config={"do": "wait", "go": "/"})
    assert done["status"] == "status_succeeded"
    return path


def start_attack(running: Operator, path: str, what: str, timeout: int | None = None) -> Any:
    """Submit a job and wait until it has attacked."""
    job = running.submit(running.url + path, config={"do": what}, timeout=timeout)
    running.await_log(running.url + path, job, "ready")
    return job


def living_processes(running: Operator, path: str, job: Any) -> list[int]:
    """The processes whose pid a job printed and that still live."""
    reported = re.findall(r"pid (\d+)", running.log_of(running.url + path, job))
    assert reported
    return [int(pid) for pid in reported if processes.ticks_if_alive(pid) is not None]


def supervisor_of(running: Operator, job: Any) -> int:
    records = running.data_dir / "jobs" / job["job_id"]
    until(lambda: list(records.glob("start.*")), "a start record")
    return int(json.loads(max(records.glob("start.*")).read_bytes())["pid"])


def process_state(pid: int) -> str:
    about = processes.stat(pid)
    return "gone" if about is None else about[0]
