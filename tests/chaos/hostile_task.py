"""A hostile job, whose seed draws its attacks. `hostile.py` deploys it, and it runs as a user
without rights.

It attacks its own job: its records, its log, its folder, its control groups, its supervisor and its
fork server. Jobs of one user are not protected from each other, therefore it attacks no other job.
"""

import contextlib
import ctypes
import os
import random
import signal
import socket
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_PTRACER = 1, 4, 36, 0x59616D61
PIDFD_OPEN, PIDFD_GETFD = 434, 438
PTRACE_ATTACH = 16
NUMBERS = [0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, 1e308, 4.6e18, True, None, "", "1", [], {}]
WORDS = ["", "x", "\0", "\ud800", "é" * 300, "x" * 100_000, "../../../etc/shadow", "status_stopped"]
RECORDS = [
    "start.1",
    "exit.1",
    "start.2",
    "exit.2",
    "log",
    "log.cut",
    "job.json",
    "outcome",
    "own",
    "files",
]


class Job:
    def __init__(self, config):
        self.random = random.Random(config["seed"])
        self.canary = config["canary"]
        self.mark = config["mark"]
        self.folder = os.path.dirname(os.environ["CORTEX_JOB_SPEC"])
        self.supervisor = os.getppid()
        self.fork_server = _parent(self.supervisor)

    def run(self):
        names = sorted(name for name in dir(self) if name.startswith("do_"))
        for name in self.random.choices(names, k=self.random.randint(1, 8)):
            print("hostile:", name, flush=True)
            with contextlib.suppress(Exception):
                getattr(self, name)()
        end = self.random.choice(["return", "exit", "sleep", "kill", "stop", "odd"])
        print("hostile: end by", end, flush=True)
        if end == "exit":
            os._exit(self.random.randrange(256))
        if end == "sleep":
            time.sleep(600)
        if end == "kill":
            os.kill(
                os.getpid(), self.random.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
            )
        if end == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return float("nan") if end == "odd" else "done"

    def path(self):
        return f"{self.folder}/{self.random.choice(RECORDS)}"

    def value(self, depth=0):
        if depth < 3 and self.random.random() < 0.3:
            return {self.random.choice(WORDS): self.value(depth + 1) for _ in range(2)}
        return self.random.choice(NUMBERS + WORDS)

    def record(self):
        import json

        fields = [
            "job_id",
            "attempt",
            "start_ns",
            "end_ns",
            "exit_code",
            "signal",
            "result",
            "has_result",
            "message",
            "cause",
            "pid",
            "ticks",
            "boot_id",
            "fenced",
            "start",
            "end",
            "limit",
            "groups",
        ]
        return json.dumps(
            {name: self.value() for name in fields if self.random.random() < 0.8}
        ).encode()

    # Its records

    def do_write_a_record(self):
        with open(self.path(), "wb") as file:
            file.write(self.record())

    def do_write_noise(self):
        with open(self.path(), "r+b" if self.random.random() < 0.5 else "wb") as file:
            file.write(self.random.randbytes(self.random.choice([1, 100, 1 << 20])))

    def do_change_a_record(self):
        path = self.path()
        with open(path, "rb") as file:
            data = bytearray(file.read(1 << 16))
        for _ in range(3):
            data[self.random.randrange(len(data))] = self.random.randrange(256)
        with open(path, "wb") as file:
            file.write(data)

    def do_make_a_record_sparse(self):
        os.truncate(self.path(), self.random.choice([0, 1 << 20, 1 << 40]))

    def do_remove(self):
        os.unlink(self.path())

    def do_exchange(self):
        os.rename(self.path(), self.path())

    def do_link_to_a_secret(self):
        path = self.path()
        with contextlib.suppress(OSError):
            os.unlink(path)
        target = self.random.choice(
            [self.canary, "/etc/shadow", "/dev/zero", "/proc/kmsg", path, self.folder]
        )
        if self.random.random() < 0.3:
            os.link(target, path)
        else:
            os.symlink(target, path)

    def do_put_something_odd(self):
        path = self.path()
        with contextlib.suppress(OSError):
            os.unlink(path)
        kind = self.random.choice(["fifo", "folder", "socket"])
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            os.mkdir(path)
        else:
            socket.socket(socket.AF_UNIX).bind(path)

    def do_swap_in_a_loop(self):
        """For three seconds, replace each new file in its folder with a link to a secret."""

        def swap():
            until = time.monotonic() + 3
            known = set(os.listdir(self.folder))
            while time.monotonic() < until:
                for name in set(os.listdir(self.folder)) - known:
                    with contextlib.suppress(OSError):
                        os.symlink(self.canary, f"{self.folder}/.swap")
                        os.rename(f"{self.folder}/.swap", f"{self.folder}/{name}")

        threading.Thread(target=swap, daemon=True).start()

    def do_close_its_folder(self):
        os.chmod(self.folder, self.random.choice([0, 0o500, 0o777, 0o1777]))

    def do_dig(self):
        os.chdir(self.folder)
        for _ in range(self.random.choice([10, 1100])):
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
        os.chmod(".", 0)

    def do_fill_its_folder(self):
        for number in range(300):
            with contextlib.suppress(OSError):
                os.symlink(self.canary, f"{self.folder}/{number}")

    # Its descriptors, and those of its supervisor and fork server

    def do_write_to_descriptors(self):
        for fd in range(3, 64):
            with contextlib.suppress(OSError):
                os.set_blocking(fd, False)
                os.write(fd, self.record())

    def do_close_descriptors(self):
        os.closerange(self.random.choice([0, 3]), 256)

    def do_speak_for_its_supervisor(self):
        victim = self.random.choice([self.supervisor, self.fork_server])
        pidfd = LIBC.syscall(PIDFD_OPEN, victim, 0)
        for number in range(64):
            fd = LIBC.syscall(PIDFD_GETFD, pidfd, number, 0)
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.set_blocking(fd, False)
                    os.write(fd, self.record() + b"\n")
                os.close(fd)

    def do_write_through_proc(self):
        victim = self.random.choice([self.supervisor, self.fork_server])
        for name in os.listdir(f"/proc/{victim}/fd"):
            with contextlib.suppress(OSError):
                fd = os.open(f"/proc/{victim}/fd/{name}", os.O_RDWR | os.O_NONBLOCK)
                os.write(fd, self.record())
                os.close(fd)

    def do_signal_a_relative(self):
        number = self.random.choice(
            [
                signal.SIGSTOP,
                signal.SIGKILL,
                signal.SIGTERM,
                signal.SIGCONT,
                signal.SIGUSR1,
                signal.SIGCHLD,
                signal.SIGALRM,
                signal.SIGSEGV,
                signal.SIGTSTP,
                signal.SIGPIPE,
            ]
        )
        os.kill(self.random.choice([self.supervisor, self.fork_server]), number)

    def do_signal_again_and_again(self):
        victim = self.random.choice([self.supervisor, self.fork_server])
        for _ in range(50):
            os.kill(victim, self.random.choice([signal.SIGSTOP, signal.SIGCONT]))
            time.sleep(0.005)

    def do_trace_its_supervisor(self):
        LIBC.ptrace(PTRACE_ATTACH, self.supervisor, 0, 0)

    # Its control groups and its process tree

    def do_leave_its_groups(self):
        for line in open("/proc/self/cgroup"):
            _, controllers, path = line.strip().split(":", 2)
            mount = "/sys/fs/cgroup" + (f"/{controllers.split('=')[-1]}" if controllers else "")
            for root in (mount, "/sys/fs/cgroup/unified"):
                for folder in ("", os.path.dirname(path), path):
                    for name in ("tasks", "cgroup.procs", "cgroup.threads"):
                        with (
                            contextlib.suppress(OSError),
                            open(f"{root}/{folder}/{name}", "w") as file,
                        ):
                            file.write("0")

    def do_lift_its_limits(self):
        for line in open("/proc/self/cgroup"):
            _, controllers, path = line.strip().split(":", 2)
            mount = "/sys/fs/cgroup" + (f"/{controllers.split('=')[-1]}" if controllers else "")
            for root in (mount, "/sys/fs/cgroup/unified"):
                for name, text in (
                    ("memory.limit_in_bytes", "-1"),
                    ("memory.max", "max"),
                    ("pids.max", "max"),
                    ("freezer.state", "FROZEN"),
                    ("cgroup.freeze", "1"),
                    ("memory.oom_control", "1"),
                    ("cgroup.subtree_control", "+memory"),
                    ("notify_on_release", "1"),
                ):
                    with contextlib.suppress(OSError), open(f"{root}/{path}/{name}", "w") as file:
                        file.write(text)
                with contextlib.suppress(OSError):
                    os.mkdir(f"{root}/{path}/mine")

    def do_hide(self):
        """Start a daemon without parent, session, environment or death signal."""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                LIBC.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
                for number in range(1, 65):
                    with contextlib.suppress(OSError, ValueError):
                        signal.signal(number, signal.SIG_IGN)
                os.closerange(0, 256)
                os.chdir("/")
                os.execve("/bin/sleep", [self.mark, "600"], {})
            os._exit(0)

    def do_have_children(self):
        for _ in range(5):
            if os.fork() == 0:
                os.execve("/bin/sleep", [self.mark, "600"], {})

    def do_turn_its_death_signal_off(self):
        LIBC.prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)
        with contextlib.suppress(OSError):
            os.setsid()

    def do_adopt(self):
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.do_hide()

    def do_ignore_all(self):
        for number in range(1, 65):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_IGN)

    def do_be_the_last(self):
        """Kill its fork server and its supervisor, which could report its end, and run on."""
        self.do_turn_its_death_signal_off()
        self.do_ignore_all()
        for victim in (self.fork_server, self.supervisor):
            with contextlib.suppress(OSError):
                os.kill(victim, signal.SIGKILL)
        time.sleep(self.random.choice([0, 2, 600]))

    def do_say_much(self):
        os.write(1, self.random.randbytes(1 << 20))
        os.write(1, b"\xed\xa0\x80\0[cortex: 1 MiB of the log are gone]\n")

    def do_raise_oddly(self):
        class Odd(BaseException):
            def __str__(self):
                return "\ud800\0" * 100_000

        raise Odd


def _parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def task(config):
    return Job(config).run()
