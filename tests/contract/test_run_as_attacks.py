"""Jobs of another user attack an operator that runs as root.

They try to make root change files that they may not change, through links in their own folders.
`strace` delays the operator's system calls, which makes such races likely.
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

from contract.test_root_syscalls import fork_servers, kill
from cortex.joblog.reader import REPLACED
from operator_harness import (
    PROBE,
    WAIT_TIMEOUT_S,
    operator,
    probe_yaml,
    reachable_interpreter,
    until,
)
from root_operator import UID, USER, passable_folder, waiting_for_import

SECRET = "what only root may read"
ROOT_TEXT = "text of the root user"
# Replaces each file that is about to become a start record by a link to the secret file. If root
# links that file into a job's folder, the job renames it to its own log.
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
    print("attacking", flush=True)
    is_last = False
    while not is_last:
        is_last = os.path.exists(config["end"])
        for folder in config["folders"]:
            try:
                if attack(folder, config):
                    return "got the secret"
            except OSError:
                continue
    return "got nothing"
"""


def delay(*calls: str, by_us: int) -> list[str]:
    """The `strace` command that delays these system calls."""
    names = ",".join(calls)
    slow = [f"trace={names}", "-e", f"inject={names}:delay_enter={by_us}", "-e", "signal=none"]
    return ["strace", "-f", "-o", "/dev/null", "-e", *slow]


@contextmanager
def slowed(pid: int, *calls: str, by_us: int) -> Iterator[None]:
    """Delay system calls of a running process, for the duration of the block."""
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
    """A file of root that must be unchanged after the test."""
    file = folder / "secret"
    file.write_text(SECRET)
    file.chmod(0o600)
    before = file.stat()
    yield file
    after = file.stat()
    assert file.read_text() == SECRET
    for name in ("st_ino", "st_mode", "st_uid", "st_gid", "st_nlink", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, name) == getattr(before, name), name


def test_no_file_of_root_is_linked_into_a_jobs_folder(folder: Path, secret: Path) -> None:
    with operator(
        folder, "--run-as", USER, "--cpu", "2", command_prefix=reachable_interpreter()
    ) as running:
        jobs, end, go = running.data_dir / "jobs", folder / "end", folder / "go"
        victims, victim = waiting_for_import(running, go)
        swaps = running.deployed(probe_yaml("swaps"), {"probe.py": SWAPS})
        # A job can get the ids of other jobs from the operator.
        config = {"secret": str(secret), "inode": secret.stat().st_ino, "end": str(end)}
        folders = [str(jobs), str(jobs / victim["job_id"])]
        attacker = running.submit(swaps, config={**config, "folders": folders})
        running.await_log(swaps, attacker, "attacking")
        with slowed(running.process.pid, "linkat", by_us=500_000):
            # All fork servers at once: the operator fences the attempts that they had.
            for pid in fork_servers(running):
                kill(pid)
            start = jobs / victim["job_id"] / "start.1"
            until(lambda: start.exists() or secret.stat().st_nlink > 1, "the attempt is fenced")
            end.touch()
            assert running.finished(swaps, attacker)["result"] == "got nothing"
        assert SECRET not in running.log_of(swaps, attacker)
        go.touch()
        assert running.finished(victims, victim)["status"] == "status_succeeded"


@contextmanager
def swapping(folder: Path, link_to: Path) -> Iterator[None]:
    """An unprivileged process that swaps a link and a folder all the time."""
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
        # The removal deletes one of the two first.
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
def test_a_link_put_into_a_folder_during_its_removal_leads_nowhere(
    folder: Path, secret: Path, code: str
) -> None:
    theirs = folder / "jobs" / "theirs"
    theirs.mkdir(parents=True)
    os.chown(theirs, UID, UID)
    roots = folder / "roots"
    roots.mkdir(mode=0o755)
    (roots / "file").write_text(ROOT_TEXT)
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
    assert (roots / "file").read_text() == ROOT_TEXT
    subprocess.run([*command, "1"], check=True, timeout=WAIT_TIMEOUT_S)
    assert list(theirs.iterdir()) == []


def test_a_log_that_is_a_hard_link_to_a_file_of_root_is_not_served(
    folder: Path,
) -> None:
    """Jobs could make an operator of an earlier version create such a link."""
    with operator(folder, "--run-as", USER, command_prefix=reachable_interpreter()) as running:
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
        # A file of root with one name: a job could have moved it here.
        file.unlink()
        assert running.log_of(endpoint, job) == REPLACED


def test_a_log_with_a_lease_does_not_block_its_reader(folder: Path) -> None:
    code = (
        "import fcntl, os, signal, time\n"
        "def task(config):\n"
        "    signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "    log = os.path.dirname(os.environ['CORTEX_JOB_SPEC']) + '/log'\n"
        "    os.unlink(log)\n"
        "    file = os.open(log, os.O_RDWR | os.O_CREAT)\n"
        "    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
        "    open('leased', 'w').close()\n"
        "    while not os.path.exists(config['end']):\n"
        "        time.sleep(0.02)\n"
    )
    with operator(folder, "--run-as", USER, command_prefix=reachable_interpreter()) as running:
        endpoint, end = running.deployed(probe_yaml("lease"), {"probe.py": code}), folder / "end"
        job = running.submit(endpoint, config={"end": str(end)})
        own = running.data_dir / "jobs" / ".own"
        until(lambda: list(own.glob("*/*/leased")), "the job has the lease")
        started = time.monotonic()
        assert running.log_of(endpoint, job) == REPLACED
        # Without O_NONBLOCK the kernel waits 45 s for the lease.
        assert time.monotonic() - started < 20
        end.touch()
        assert running.finished(endpoint, job)["status"] == "status_succeeded"
        assert running.log_of(endpoint, job) == ""
