"""Processes as the kernel tells of them. Called by supervisors and by the local engine.

A process is never known by its bare pid: pid and start ticks, verified while a pidfd holds it.
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
EXEC_S = 0.5
"""How long a process may show no command line and be taken to be in its exec."""
MOST_SWEEPS = 200
END_S = 5.0
_PAGE = os.sysconf("SC_PAGE_SIZE")
# Only kernels with CONFIG_PROC_CHILDREN have it.
_HAS_CHILDREN = os.path.exists("/proc/thread-self/children")

# What is not told for want of these is there all the same.
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} failed")


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def stat(pid: int | str) -> tuple[str, int, int] | None:
    """State, parent and start ticks; None when there is no such process.

    Raises:
        OSError: it cannot be told, for want of descriptors or memory.
    """
    fields = _fields(pid)
    return None if fields is None else (fields[0].decode(), int(fields[1]), int(fields[19]))


def living(pid: int | str) -> int | None:
    """The start ticks of a process that can still run; None of any other. One that has ended is there until its parent
    has collected it, and some never do: no first process of a container has to. One whose first thread has ended before
    the others is a zombie by its state, and lives on.

    Raises:
        OSError: it cannot be told, for want of descriptors or memory.
    """
    fields = _fields(pid)
    if fields is None or (fields[0] in (b"Z", b"X") and int(fields[17]) <= 1):
        return None
    return int(fields[19])


def hold(pid: int, ticks: int) -> int | None:
    """A pidfd of exactly this process, or None when it has ended.

    Raises:
        OSError: it cannot be told, for want of descriptors or memory.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        _raise_shortage(error)
        return None
    try:
        found = living(pid)
    except OSError:
        os.close(pidfd)
        raise
    if found != ticks:
        os.close(pidfd)
        return None
    return pidfd


def owner(pid: int) -> int | None:
    """Whose it is: the real user, who may signal it; None when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Uid:"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def held(pidfd: int) -> int:
    """The pid of a pidfd; not a positive one when it is gone, or this is none.

    Raises:
        OSError: there are no descriptors to find out with.
    """
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("Pid:")), -1)


def send(processes: dict[int, int], *signals: int) -> OSError | None:
    """Signal each of these (pid: start ticks), and nobody who got one of the pids later; the shortage for which
    some were not, if there was one."""
    short = None
    for pid, ticks in processes.items():
        try:
            pidfd = hold(pid, ticks)
        except OSError as error:
            short = error
            continue
        if pidfd is None:
            continue
        try:
            for number in signals:
                signal.pidfd_send_signal(pidfd, number)
        except OSError:
            pass  # gone meanwhile, or (a setuid program) not ours to signal
        finally:
            os.close(pidfd)
    return short


def end(look: Callable[[], Iterable[tuple[int, int]]]) -> None:
    """Kill all that a look finds, as pid and start ticks. They are stopped first, which a fork bomb cannot outrun."""
    stopped: dict[int, int] = {}
    for _ in range(MOST_SWEEPS):
        known = len(stopped)
        for pid, ticks in look():
            if stopped.get(pid) != ticks:
                send({pid: ticks}, signal.SIGSTOP)
                stopped[pid] = ticks
        if len(stopped) == known:
            break
    send(stopped, signal.SIGKILL)


def is_there_below(pidfd: int) -> bool:
    """Whether anything lives below a process.

    Raises:
        OSError: there are no descriptors to find out with.
    """
    pid = held(pidfd)
    return pid > 0 and any(True for _ in walk(pid))


def end_from_below(pidfd: int) -> None:
    """End a supervising process that does not do its work, and all below it: that first, for it stays there only as
    long as the process does.

    Raises:
        OSError: it cannot be told what there is, for want of descriptors.
    """
    until = time.monotonic() + END_S
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)  # it would tell of a job that was killed
        while is_there_below(pidfd) and time.monotonic() < until:
            root = held(pidfd)
            end(lambda: walk(root))  # noqa: B023  # it is called at once
            time.sleep(0.01)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended


def walk(root: int) -> Iterator[tuple[int, int]]:
    """All that live below a process, parents before children: pid and start ticks. What the caller
    stops when it is told of it has its children listed as they then stay."""
    below = _children if _HAS_CHILDREN else _scanner()
    waiting = [root]
    while waiting:
        for pid in below(waiting.pop()):
            ticks = _living(pid)
            if ticks is not None:
                yield pid, ticks
                waiting.append(pid)


def tree(root: int) -> Iterator[tuple[int, int]]:
    """A process and all that live below it."""
    ticks = _living(root)
    if ticks is not None:
        yield root, ticks
        yield from walk(root)


def children(pid: int) -> list[int]:
    """The children of a process."""
    return _children(pid) if _HAS_CHILDREN else _scanner()(pid)


def has_child(pid: int) -> bool:
    """Whether a process of one thread has any child, where the kernel tells that."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def descendants(root: int) -> dict[int, int]:
    """All that live below a process: pid: start ticks."""
    return dict(walk(root))


def programs(root: int) -> list[str]:
    """The names of what runs below a process, but for resource trackers, each once and in alphabetical order."""
    found = set()
    for pid in descendants(root).keys() - trackers(root).keys():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
            found.add(file.read().rstrip(b"\n").decode("utf-8", "backslashreplace"))
    return sorted(found)


def trackers(root: int) -> dict[int, int]:
    """The resource trackers of multiprocessing and of joblib's loky below a process: pid: start ticks."""
    until = time.monotonic() + EXEC_S
    while True:
        found = {}
        is_sure = True
        for pid, ticks in walk(root):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read()
            except OSError:
                continue  # gone meanwhile
            if b"resource_tracker import main" in words:
                found[pid] = ticks
            is_sure = is_sure and words != b""  # in the midst of its exec a process shows none
        if is_sure or time.monotonic() > until:
            return found
        time.sleep(0.002)


def with_variable(name: str, value: str) -> dict[int, int]:
    """All processes whose environment block holds this variable: pid: start ticks.

    Raises:
        OSError: it cannot be told, for want of descriptors or memory.
    """
    wanted = f"{name}={value}".encode()
    return _with_environ(lambda entries: wanted in entries)


def with_variable_below(name: str, folder: str) -> dict[int, int]:
    """All processes in whose environment block this variable is a path below a folder: pid: start ticks.

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
        ticks = living(entry) if is_match else None
        if ticks is not None:
            found[int(entry)] = ticks
    return found


def variables(pid: int) -> dict[str, str]:
    """The environment block of a process; an empty one where it cannot be told."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            lines = file.read().split(b"\0")
    except OSError:
        return {}
    pairs = (line.partition(b"=") for line in lines if b"=" in line)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def memory(pids: list[int], limit: int) -> int:
    """Bytes that these processes take together. Resident sizes count shared pages in each, and
    proportional ones are dear to ask for: those are asked for only if the first are over the limit."""
    resident = {pid: _resident(pid) for pid in pids}
    total = sum(resident.values())
    if total <= limit:
        return total
    return sum(_proportional(pid, amount) for pid, amount in resident.items())


def close_all_but(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            # The one that listed the folder is closed already.
            with contextlib.suppress(OSError):
                os.close(int(name))


def _fields(pid: int | str) -> list[bytes] | None:
    """What the kernel tells of a process, from its state on."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError as error:
        _raise_shortage(error)
        return None
    return data[data.rindex(b")") + 2 :].split()


def _living(pid: int) -> int | None:
    try:
        return living(pid)
    except OSError:
        return None  # whoever walks looks again


def _raise_shortage(error: OSError) -> None:
    if error.errno in _SHORTAGES:
        raise error


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found  # gone: its children have another parent by now, and the next look finds them
    for thread in threads:
        # One that is gone has left its children to another thread.
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
