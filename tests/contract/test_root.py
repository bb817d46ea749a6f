"""Attacks on an operator that is root by jobs that run as another user: it is to do for them, in folders that are theirs,
what they may not do. The time in which they can is made long by `strace`, which delays the operator's system calls.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from contract.test_traced import fork_servers, kill
from cortex.joblog.reader import REPLACED
from operator_harness import PROBE, WAIT_TIMEOUT_S, operator, probe_yaml, reachable, until
from root_operator import UID, USER, passable_folder, waiting_for_import

SECRET = "what only root may read"
ROOTS = "the root user's words"
# Puts a link to what only root may read in place of each file that is about to become a start record, and takes what root
# makes of that for its log.
SWAPS = """
import os

def attack(folder, config):
    here = os.path.dirname(os.environ["CORTEX_JOB_SPEC"])
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        if name.startswith(".start.") and not os.path.islink(path):
            os.unlink(path)
            os.symlink(config["secret"], path)
        elif os.lstat(path).st_ino == config["inode"]:
            os.rename(path, here + "/log")
            return True
    return False

def task(config):
    print("at it", flush=True)
    is_last = False
    while not is_last:
        is_last = os.path.exists(config["end"])
        for folder in config["folders"]:
            try:
                if attack(folder, config):
                    return "has it"
            except OSError:
                continue
    return "has it not"
"""


def delay(*calls: str, by_us: int) -> list[str]:
    """How `strace` is told to delay these system calls."""
    names = ",".join(calls)
    slow = [f"trace={names}", "-e", f"inject={names}:delay_enter={by_us}", "-e", "signal=none"]
    return ["strace", "-f", "-o", "/dev/null", "-e", *slow]


@contextmanager
def slowed(pid: int, *calls: str, by_us: int) -> Iterator[None]:
    """Delay system calls of a process that runs."""
    command = [*delay(*calls, by_us=by_us), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate()


@pytest.fixture
def folder() -> Iterator[Path]:
    with passable_folder() as made:
        yield made


@pytest.fixture
def secret(folder: Path) -> Iterator[Path]:
    """A file of root's that is as it was when the test is over."""
    file = folder / "secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    before = file.stat()
    yield file
    after = file.stat()
    assert file.read_text() == SECRET
    for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_nlink", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, name) == getattr(before, name), name


def test_no_file_of_roots_gets_a_name_in_a_jobs_folder(folder: Path, secret: Path) -> None:
    with operator(folder, "--run-as", USER, "--cpu", "2", within=reachable()) as running:
        jobs, end, go = running.data_dir / "jobs", folder / "end", folder / "go"
        victims, victim = waiting_for_import(running, go)
        swaps = running.deployed(probe_yaml("swaps"), {"probe.py": SWAPS})
        # A job can ask the operator for others' ids.
        told = {"secret": str(secret), "inode": secret.stat().st_ino, "end": str(end)}
        folders = [str(jobs), str(jobs / victim["job_id"])]
        attacker = running.submit(swaps, config={**told, "folders": folders})
        running.await_log(swaps, attacker, "at it")
        with slowed(running.process.pid, "linkat", by_us=500_000):
            # All at once: what one of them had becomes the operator's.
            for pid in fork_servers(running):
                kill(pid)
            start = jobs / victim["job_id"] / "start.1"
            until(lambda: start.exists() or secret.stat().st_nlink > 1, "its attempt fenced off")
            end.touch()
            assert running.finished(swaps, attacker)["result"] == "has it not"
        assert SECRET not in running.log_of(swaps, attacker)
        go.touch()
        assert running.finished(victims, victim)["status"] == "status_succeeded"


@contextmanager
def swapping(folder: Path, link_to: Path) -> Iterator[None]:
    """Somebody without rights who puts a link and a folder in place of each other all the time."""
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(UID)
        os.setuid(UID)
        _swap(folder, link_to)
    try:
        until((folder / "link").is_symlink, "the first swap")
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _swap(folder: Path, link_to: Path) -> None:
    own, link = folder / "folder", folder / "link"
    names = os.fsencode(own), os.fsencode(link)
    exchange = ctypes.CDLL(None).renameat2
    while True:
        # What removes them leaves the one and not the other.
        if not own.is_symlink() and not link.is_symlink():
            with suppress(OSError):
                (link / "below").rmdir()
            with suppress(OSError):
                link.rmdir()
            with suppress(OSError):
                link.symlink_to(link_to)
        with suppress(OSError):
            own.mkdir()
        with suppress(OSError):
            (own / "below").mkdir()
        exchange(-100, names[0], -100, names[1], 2)


@pytest.mark.parametrize(
    "code",
    [
        "from cortex.system.folders import remove as clear",
        "from cortex.engines.local.workspaces import sweep as clear",
    ],
    ids=["a job's folder", "workspaces"],
)
def test_no_link_that_is_put_in_a_folder_while_that_is_removed_leads_out(
    folder: Path, secret: Path, code: str
) -> None:
    theirs = folder / "jobs" / "theirs"
    theirs.mkdir(parents=True)
    os.chown(theirs, UID, UID)
    roots = folder / "roots"
    roots.mkdir(mode=0o755)
    (roots / "file").write_text(ROOTS)
    (roots / "file").chmod(0o604)
    code += (
        "\nimport os, sys; from pathlib import Path\nfor _ in range(int(sys.argv[2])):\n"
        "    theirs = Path(sys.argv[1]); clear(theirs); theirs.mkdir(exist_ok=True)\n"
        f"    os.chown(theirs, {UID}, {UID})\n"
    )
    slow = delay("chmod", "fchmodat", "unlinkat", "rmdir", by_us=3_000)
    command = [sys.executable, "-c", code, str(theirs)]
    for link_to in (secret, roots):
        with swapping(theirs, link_to):
            subprocess.run([*slow, *command, "10"], check=True, timeout=WAIT_TIMEOUT_S)
    assert roots.stat().st_mode & 0o777 == 0o755
    assert (roots / "file").stat().st_mode & 0o777 == 0o604
    assert (roots / "file").read_text() == ROOTS
    subprocess.run([*command, "1"], check=True, timeout=WAIT_TIMEOUT_S)
    assert list(theirs.iterdir()) == []


def test_a_link_that_root_itself_has_made_in_place_of_a_log_is_not_read_through(
    folder: Path,
) -> None:
    """As an operator of an earlier version could be made to."""
    with operator(folder, "--run-as", USER, within=reachable()) as running:
        endpoint = running.deployed(probe_yaml(), {"probe.py": PROBE})
        job = running.submit(endpoint, config={"do": "say"})
        assert running.finished(endpoint, job)["status"] == "status_succeeded"
        log = running.data_dir / "jobs" / job["job_id"] / "log"
        for name in ("public", "private"):
            file = folder / name
            file.write_text(SECRET)
            file.chmod(0o644 if name == "public" else 0o600)
            log.unlink()
            log.hardlink_to(file)
            assert running.log_of(endpoint, job) == REPLACED
            url, part = f"{endpoint}/{job['job_id']}/logs", {"Range": "bytes=0-3"}
            assert SECRET[:4] not in running.http.get(url, headers=part).text
        # What root may read alone has one name, too, where the job could move it here.
        file.unlink()
        assert running.log_of(endpoint, job) == REPLACED


def test_a_log_that_a_job_holds_on_to_holds_up_nobody(folder: Path) -> None:
    code = (
        "import fcntl, os, signal, time\n"
        "def task(config):\n"
        "    signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "    log = os.path.dirname(os.environ['CORTEX_JOB_SPEC']) + '/log'\n"
        "    os.unlink(log)\n"
        "    file = os.open(log, os.O_RDWR | os.O_CREAT)\n"
        "    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
        "    open('held', 'w').close()\n"
        "    while not os.path.exists(config['end']):\n"
        "        time.sleep(0.02)\n"
    )
    with operator(folder, "--run-as", USER, within=reachable()) as running:
        endpoint, end = running.deployed(probe_yaml("holds"), {"probe.py": code}), folder / "end"
        job = running.submit(endpoint, config={"end": str(end)})
        own = running.data_dir / "jobs" / ".own"
        until(lambda: list(own.glob("*/*/held")), "the lease")
        begun = time.monotonic()
        assert running.log_of(endpoint, job) == REPLACED
        assert time.monotonic() - begun < 20  # the kernel would wait for 45 s
        end.touch()
        assert running.finished(endpoint, job)["status"] == "status_succeeded"
        assert running.log_of(endpoint, job) == ""
