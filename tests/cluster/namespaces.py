"""Machines in one kernel: each has its own network, processes, host name and mounts.

A machine's first process holds its namespaces. The kernel ends all processes of a machine with it,
and removes the network with the last of them. The first process ends with the test process, even
if that is killed.

All machines are ports of one switch, and the test process is another: its clients reach every
machine. The switch drops what a test cuts. Cuts are silent: a packet vanishes, and its sender gets
no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_CLONE_FS = 0x200
_JOINED = 0x20000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, PID, network
_SUBNET_COUNT = 1 << 14  # 10.64.0.0/24 to 10.127.255.0/24
_END_TIMEOUT_S = 30
# Takes over orphans, which the kernel reaps while SIGCHLD is ignored.
_FIRST_PROCESS = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(flush=True)
while True:
    signal.pause()
"""
_NAMESPACES = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]
_REMOVE_GROUPS = """
import sys
from pathlib import Path
from cortex.engines.local import cgroup_support
for root in map(Path, sys.argv[1:]):
    for group in cgroup_support.list_groups(root):
        cgroup_support.cgroups.remove(group, timeout_s=5)
    cgroup_support.remove_parents(root)
    if left := cgroup_support._folders_of(root):
        sys.exit(f"control groups are left: {left}")
"""


class Namespaces:
    """New namespaces, and the process that holds them."""

    def __init__(self) -> None:
        # The kernel would end the first process with the thread that started it.
        assert threading.current_thread() is threading.main_thread()
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", *_NAMESPACES, "--kill-child=KILL",
             sys.executable, "-I", "-S", "-c", _FIRST_PROCESS],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # util-linux 2.38 complains of the SIGKILL that ends it
            start_new_session=True,  # Ctrl-C ends machines after the test, by `end`
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline(), "no new namespaces: this needs root"
        holder = self._holder.pid
        (child,) = Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
        self.pid = int(child)
        self._pidfd = os.pidfd_open(self.pid)
        self.pid_namespace = _pid_namespace(self.pid)
        self._started: list[subprocess.Popen[Any]] = []

    def inside(self, work: Callable[[], T]) -> T:
        """Do some work in a thread that is in the namespaces: sockets that it makes and processes
        that it starts belong there. (In the thread itself, /proc/self does not exist.)"""
        values: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                libc = ctypes.CDLL(None, use_errno=True)
                # A thread that shares its folder with others cannot change its mounts.
                if libc.unshare(_CLONE_FS) or libc.setns(self._pidfd, _JOINED):
                    raise OSError(ctypes.get_errno(), "cannot enter the namespaces")
                values.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return values[0]

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """`subprocess.Popen` in the namespaces. The test process is the parent."""
        options.setdefault("cwd", "/")
        options.setdefault("start_new_session", True)
        process = self.inside(functools.partial(subprocess.Popen, command, **options))
        self._started = [each for each in self._started if each.poll() is None] + [process]
        return process

    def run(self, *command: str, timeout_s: float = 180, **options: Any) -> str:
        """Run a command, which must succeed; its output."""
        process = self.popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, **options,
        )  # fmt: skip
        with process:
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == 0, f"{command}: {output}"
        return str(output)

    def processes(self) -> dict[int, str]:
        """The command lines of all processes but the first, by their pids in the test's view."""
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != self.pid:
                with contextlib.suppress(OSError):
                    if _pid_namespace(int(entry)) == self.pid_namespace:
                        command = Path(f"/proc/{entry}/cmdline").read_bytes()
                        found[int(entry)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def end_processes(self) -> None:
        """Kill all processes but the first, and wait for their end."""
        until_s = time.monotonic() + _END_TIMEOUT_S
        while left := self.processes():
            assert time.monotonic() < until_s, f"processes do not end: {left}"
            for started in self._started:
                started.poll()  # reaps it
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                _thaw(pid)
            time.sleep(0.02)

    def end(self) -> None:
        """Kill all processes, with which the namespaces vanish."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        for each in self._started:  # the first process ends after all others were reaped
            each.wait(_END_TIMEOUT_S)
        self._holder.wait(_END_TIMEOUT_S)
        os.close(self._pidfd)
        assert self._holder.stdout is not None
        self._holder.stdout.close()


class Machine(Namespaces):
    """A machine of the cluster. `here` has the same path on each machine, and content of its own,
    which the test finds in `folder`. All other folders are shared."""

    def __init__(self, name: str, ip: str, folder: Path, here: Path) -> None:
        super().__init__()
        self.name, self.ip, self.folder, self.here = name, ip, folder, here

    def pids(self, kind: str) -> list[int]:
        """The processes whose command line contains this text, the oldest first."""
        return sorted(pid for pid, command in self.processes().items() if kind in command)

    def remove_groups(self, roots: Sequence[Path]) -> None:
        """Remove the empty control groups of jobs, all of which must go.

        Args:
            roots: folders of jobs, as seen here.
        """
        if roots:
            self.run(sys.executable, "-c", _REMOVE_GROUPS, *map(str, roots))


class Network:
    """The switch, and the machines. Everything is named after the subnet, of which only one run
    can have the interface."""

    def __init__(self) -> None:
        self.switch = Namespaces()
        self.machines: dict[str, Machine] = {}
        try:
            self.prefix, self.interface = self._connect_test_process()
            self.folder = Path(tempfile.mkdtemp(prefix="cm-", dir="/tmp"))
        except BaseException:
            self.switch.end()
            raise
        self._hosts = self.folder / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        (self.folder / "resolv.conf").touch()  # nothing there resolves a name but the file
        (self.folder / "here").mkdir()

    def _connect_test_process(self) -> tuple[str, str]:
        taken = _run("ip", "-4", "route", "show")
        start = os.getpid()
        for number in (each % _SUBNET_COUNT for each in range(start, start + _SUBNET_COUNT)):
            prefix, interface = f"10.{64 + number // 256}.{number % 256}", f"cm{number}"
            if prefix in taken:
                continue
            with contextlib.suppress(AssertionError):  # another run has it
                _run(
                    *("ip", "link", "add", "name", interface, "type", "veth"),
                    *("peer", "name", "test", "netns", str(self.switch.pid)),
                )
                _run("ip", "address", "add", f"{prefix}.1/24", "dev", interface)
                _run("ip", "link", "set", "dev", interface, "up")
                self.switch.run("sh", "-ec", _SWITCH)
                return prefix, interface
        raise AssertionError("every subnet is taken")

    def add(self, name: str) -> Machine:
        """Switch on a machine with this host name."""
        assert len(name) < 16, "the name of a network interface has at most 15 characters"
        ip = f"{self.prefix}.{len(self.machines) + 10}"
        folder = self.folder / name
        folder.mkdir()
        machine = Machine(name, ip, folder, self.folder / "here")
        self.machines[name] = machine
        _run(
            *("ip", "link", "add", "name", name, "netns", str(self.switch.pid), "type", "veth"),
            *("peer", "name", "eth0", "netns", str(machine.pid)),
        )
        self.switch.run("ip", "link", "set", "dev", name, "master", "switch", "up")
        with self._hosts.open("a") as hosts:  # each machine has this file
            hosts.write(f"{ip} {name}\n")
        machine.run("sh", "-ec", _MACHINE, "sh", name, ip, str(self.folder), str(folder))
        return machine

    def cut(self, name: str) -> None:
        """Drop all packets from and to a machine."""
        self._drop(f"iifname {name}", f"oifname {name}")

    def cut_direction(self, source: str, target: str) -> None:
        """Drop all packets from one machine to another."""
        self._drop(f"iifname {source} oifname {target}")

    def refuse_connections(self, source: str, target: str) -> None:
        """Drop the packets of all connections that `source` has opened to `target`, as a firewall
        or an address translation does. Connections in the other direction work."""
        rule = f"ip saddr {self.machines[source].ip} ct direction original drop"
        self.machines[target].run("nft", "add", "rule", "inet", "cuts", "input", rule)

    def heal(self, name: str) -> None:
        """End all cuts from and to a machine."""
        rules = self.switch.run("nft", "--handle", "list", "chain", "bridge", "cuts", "forward")
        for rule in rules.splitlines():
            if f'"{name}"' in rule:
                handle = rule.rpartition(" ")[2]
                self.switch.run(
                    "nft", "delete", "rule", "bridge", "cuts", "forward", "handle", handle
                )
        for machine in self.machines.values():
            rules = machine.run("nft", "--handle", "list", "chain", "inet", "cuts", "input")
            for rule in rules.splitlines():
                is_own = machine.name == name or f" {self.machines[name].ip} " in rule
                if "direction original" in rule and is_own:
                    handle = rule.rpartition(" ")[2]
                    machine.run("nft", "delete", "rule", "inet", "cuts", "input", "handle", handle)

    def _drop(self, *matches: str) -> None:
        for match in matches:
            # Not ARP: a host that cannot resolve an address gets an error after three seconds.
            rule = f"{match} ether type ip drop"
            self.switch.run("nft", "add", "rule", "bridge", "cuts", "forward", rule)

    def end(self) -> None:
        """Switch everything off, and remove it."""
        for each in (*self.machines.values(), self.switch):
            each.end()
        shutil.rmtree(self.folder)

    def leftovers(self) -> list[str]:
        """What is left of the network after its end."""
        ended = {each.pid_namespace for each in (*self.machines.values(), self.switch)}
        found = [f"the folder {self.folder}"] if self.folder.exists() else []
        if Path("/sys/class/net", self.interface).exists():
            found.append(f"the interface {self.interface}")
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and _pid_namespace(int(entry)) in ended:
                    found.append(f"the process {entry}")
        return found


_SWITCH = """
ip link set lo up
ip link add switch type bridge
ip link set switch up
ip link set test master switch up
nft add table bridge cuts
nft add chain bridge cuts forward '{ type filter hook forward priority 0; }'
"""
# The rule with `ct` lets the kernel track connections from the first on.
_MACHINE = """
hostname "$1"
ip link set lo up
ip address add "$2/24" dev eth0
ip link set eth0 up
mount --bind "$3/hosts" /etc/hosts
mount --bind "$3/resolv.conf" /etc/resolv.conf
mount --bind "$4" "$3/here"
nft add table inet cuts
nft add chain inet cuts input '{ type filter hook input priority 0; }'
nft add rule inet cuts input ct state invalid counter
"""


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network for the duration of the block, after which nothing of it is left."""
    made = Network()
    try:
        yield made
    finally:
        made.end()
        until_s = time.monotonic() + _END_TIMEOUT_S
        while (left := made.leftovers()) and time.monotonic() < until_s:
            time.sleep(0.05)
        assert left == []


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _thaw(pid: int) -> None:
    """Let a process die whose agent was killed while it ended the process's control group: a
    frozen process of a group of v1 gets no signal. The next agent on its node would do the same."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "freezer" and group.startswith("/cortex-"):
                Path(f"/sys/fs/cgroup/freezer{group}/freezer.state").write_text("THAWED")


def _pid_namespace(pid: int) -> int:
    return os.stat(f"/proc/{pid}/ns/pid").st_ino  # noqa: PTH116  # no Path follows this link
