"""Inspects and signals processes, through /proc and pidfds. Used by supervisors and by the local
engine.

A pid alone never identifies a process: it is always a pid with start ticks, which are checked while
an open pidfd keeps the kernel from reusing the pid.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time

from cortex.worker.syscalls import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
MAX_EXEC_S = 0.5
"""For this time, a process without a command line counts as being in the middle of its exec."""
MAX_SWEEPS = 200
KILL_TIMEOUT_S = 5.0
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Only kernels with CONFIG_PROC_CHILDREN have it.
_HAS_CHILDREN = os.path.exists("/proc/thread-self/children")

# Errors that do not mean that the process does not exist.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def stat(pid: int | str) -> tuple[str, int, int] | None:
    """State, parent and start ticks of a process; None if it does not exist.

    Raises:
        OSError: out of file descriptors or memory.
    """
    fields = _fields(pid)
    return None if fields is None else (fields[0].decode(), int(fields[1]), int(fields[19]))


def ticks_if_alive(pid: int | str) -> int | None:
    """The start ticks of a process that can still run; None for any other.

    A process that has ended remains as a zombie until its parent reaps it. Some parents never do:
    the first process of a container does not have to. A process whose first thread has ended before
    the others has the state of a zombie, but is alive.

    Raises:
        OSError: out of file descriptors or memory.
    """
    fields = _fields(pid)
    if fields is None or (fields[0] in (b"Z", b"X") and int(fields[17]) <= 1):
        return None
    return int(fields[19])


def open_pidfd(pid: int, ticks: int) -> int | None:
    """Open a pidfd of exactly this process; None if it has ended.

    Raises:
        OSError: out of file descriptors or memory.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        _raise_shortage(error)
        return None
    try:
        found = ticks_if_alive(pid)
    except OSError:
        os.close(pidfd)
        raise
    if found != ticks:
        os.close(pidfd)
        return None
    return pidfd


def owner(pid: int) -> int | None:
    """The real user id of a process, which says who may signal it; None if it does not exist."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Uid:"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def pid_of(pidfd: int) -> int:
    """The pid that a pidfd refers to. Not positive if the process has been reaped, or if the
    descriptor is not a pidfd.

    Raises:
        OSError: out of file descriptors.
    """
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), -1)


def send_signals(processes: dict[int, int], *signals: int) -> OSError | None:
    """Send these signals to each of these processes (pid: start ticks), and to no process that got
    one of the pids later.

    Returns:
        the error, if some processes got no signal for lack of descriptors or memory.
    """
    short = None
    for pid, ticks in processes.items():
        try:
            pidfd = open_pidfd(pid, ticks)
        except OSError as error:
            short = error
            continue
        if pidfd is None:
            continue
        try:
            for number in signals:
                signal.pidfd_send_signal(pidfd, number)
        except OSError:
            pass  # it has ended, or is a setuid program, which this user may not signal
        finally:
            os.close(pidfd)
    return short


def kill_all(list_processes: Callable[[], Iterable[tuple[int, int]]]) -> None:
    """Kill all processes that this function lists, as pid and start ticks. Stops them first: a fork
    bomb cannot outrun that."""
    stopped: dict[int, int] = {}
    for _ in range(MAX_SWEEPS):
        known = len(stopped)
        for pid, ticks in list_processes():
            if stopped.get(pid) != ticks:
                send_signals({pid: ticks}, signal.SIGSTOP)
                stopped[pid] = ticks
        if len(stopped) == known:
            break
    send_signals(stopped, signal.SIGKILL)


def has_descendants(pidfd: int) -> bool:
    """Whether a process has descendants that are alive.

    Raises:
        OSError: out of file descriptors.
    """
    pid = pid_of(pidfd)
    return pid > 0 and any(True for _ in walk(pid))


def kill_with_descendants(pidfd: int) -> None:
    """Kill a supervising process that no longer works, after all its descendants: they remain its
    descendants only while it exists.

    Raises:
        OSError: out of file descriptors.
    """
    until = time.monotonic() + KILL_TIMEOUT_S
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)  # or it would report its job as killed
        while has_descendants(pidfd) and time.monotonic() < until:
            root = pid_of(pidfd)
            kill_all(lambda: walk(root))  # noqa: B023  # called before `root` changes
            time.sleep(0.01)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended


def walk(root: int) -> Iterator[tuple[int, int]]:
    """All descendants of a process that are alive, parents before children: pid and start ticks. If
    the caller stops each process at once, the list of its children is final."""
    below = _children if _HAS_CHILDREN else _scanner()
    waiting = [root]
    while waiting:
        for pid in below(waiting.pop()):
            ticks = _ticks_if_alive(pid)
            if ticks is not None:
                yield pid, ticks
                waiting.append(pid)


def tree(root: int) -> Iterator[tuple[int, int]]:
    """A process and all its descendants that are alive: pid and start ticks."""
    ticks = _ticks_if_alive(root)
    if ticks is not None:
        yield root, ticks
        yield from walk(root)


def children(pid: int) -> list[int]:
    """The children of a process."""
    return _children(pid) if _HAS_CHILDREN else _scanner()(pid)


def has_child(pid: int) -> bool:
    """Whether a single-threaded process has a child. False if the kernel does not provide that."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def descendants(root: int) -> dict[int, int]:
    """All descendants of a process that are alive (pid: start ticks)."""
    return dict(walk(root))


def programs(root: int) -> list[str]:
    """The names of the programs below a process, sorted, without resource trackers."""
    found = set()
    for pid in descendants(root).keys() - trackers(root).keys():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
            found.add(file.read().rstrip(b"\n").decode("utf-8", "backslashreplace"))
    return sorted(found)


def trackers(root: int) -> dict[int, int]:
    """The resource trackers of multiprocessing and of loky below a process (pid: start ticks)."""
    until = time.monotonic() + MAX_EXEC_S
    while True:
        found = {}
        is_sure = True
        for pid, ticks in walk(root):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read()
            except OSError:
                continue  # it has ended
            if b"resource_tracker import main" in words:
                found[pid] = ticks
            is_sure = is_sure and words != b""  # empty in the middle of an exec
        if is_sure or time.monotonic() > until:
            return found
        time.sleep(0.002)


def with_variable(name: str, value: str) -> dict[int, int]:
    """All processes whose environment block contains this variable (pid: start ticks).

    Raises:
        OSError: out of file descriptors or memory.
    """
    wanted = f"{name}={value}".encode()
    return _with_environ(lambda entries: wanted in entries)


def with_variable_below(name: str, folder: str) -> dict[int, int]:
    """Processes in whose environment this variable is a path below a folder, as {pid: start ticks}.

    Raises:
        OSError: descriptors or memory are short.
    """
    start = f"{name}={folder}/".encode()
    return _with_environ(lambda entries: any(entry.startswith(start) for entry in entries))


def _with_environ(matches: Callable[[list[bytes]], bool]) -> dict[int, int]:
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                is_match = matches(file.read().split(b"\0"))
        except OSError as error:
            _raise_shortage(error)
            continue
        ticks = ticks_if_alive(entry) if is_match else None
        if ticks is not None:
            found[int(entry)] = ticks
    return found


def variables(pid: int) -> dict[str, str]:
    """The environment block of a process; empty if it cannot be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            lines = file.read().split(b"\0")
    except OSError:
        return {}
    pairs = (line.partition(b"=") for line in lines if b"=" in line)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def memory(pids: list[int], limit: int) -> int:
    """The memory that these processes use together, in bytes. Resident sizes count shared pages
    once per process; proportional sizes are exact, but expensive to read. Proportional sizes are
    read only if the sum of the resident sizes exceeds the limit."""
    resident = {pid: _resident(pid) for pid in pids}
    total = sum(resident.values())
    if total <= limit:
        return total
    return sum(_proportional(pid, amount) for pid, amount in resident.items())


def close_all_but(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            # The descriptor of the listing itself is closed already.
            with contextlib.suppress(OSError):
                os.close(int(name))


def _fields(pid: int | str) -> list[bytes] | None:
    """The fields of /proc/<pid>/stat from the state on."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError as error:
        _raise_shortage(error)
        return None
    return data[data.rindex(b")") + 2 :].split()


def _ticks_if_alive(pid: int) -> int | None:
    try:
        return ticks_if_alive(pid)
    except OSError:
        return None  # callers of `walk` repeat it


def _raise_shortage(error: OSError) -> None:
    if error.errno in _SHORTAGES:
        raise error


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found  # it has ended: a later walk finds its children below their new parent
    for thread in threads:
        # A thread that has ended has left its children to another thread.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
            found += map(int, file.read().split())
    return found


def _scanner() -> Callable[[int], list[int]]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        about = stat(entry) if entry.isdigit() else None
        if about is not None:
            children.setdefault(about[1], []).append(int(entry))
    return lambda pid: children.get(pid, [])


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _proportional(pid: int, fallback: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return fallback
