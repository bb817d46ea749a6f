"""The files that the jobs of one supervising process share: each job reads its own records alone,
whatever is killed, truncated or spoilt."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cortex.engines.local import records
from cortex.system import folders
from cortex.worker import trees
from cortex.worker.messages import ExitRecord, StartRecord
from cortex.worker.supervisor import reuse
from cortex.worker.supervisor.reuse import Reuse


class Jobs:
    """The jobs of one supervising process, one after another, each in a folder below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reuse = Reuse()
        self.last: int | None = None
        self._numbers = itertools.count()

    def begin(self, name: str = "") -> tuple[Path, int]:
        """Lay out the next job and create its start record; the path and the descriptor of its
        folder."""
        path = self.root / (name or f"job-{next(self._numbers)}")
        path.mkdir(exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
        self.reuse.lay_out(folder, self.last, job_of(path))
        start = StartRecord(job_id=path.name, attempt=1, pid=1 << 30, ticks=1, start_ns=1)
        assert self.reuse.create_start(folder, "start.1", start.dumps())
        return path, folder

    def end(self, path: Path, folder: int, result: object = None) -> Path:
        data = exit_record_of(path, result).dumps()
        self.reuse.write_exit_record(folder, "exit.1", data)
        self.close_last()
        self.last = folder
        return path

    def run(self, result: object = None) -> Path:
        return self.end(*self.begin(), result)

    def close_last(self) -> None:
        if self.last is not None:
            os.close(self.last)
            self.last = None


def job_of(path: Path) -> bytes:
    return json.dumps({"job_id": path.name}).encode()


def exit_record_of(path: Path, result: object = None) -> ExitRecord:
    return ExitRecord(
        job_id=path.name,
        attempt=1,
        ending="exited",
        exit_code=0,
        start_ns=1,
        end_ns=2,
        message=f"the end of {path.name}",
        result=result,
        has_result=True,
    )


def found(path: Path) -> ExitRecord | None:
    return records.read_exit(path, 1).exit


def recovered_exit(path: Path) -> ExitRecord | None:
    """The exit record of a job whose process has exited, as recovery reads it."""
    state = records.inspect_attempt(path, attempt())
    assert isinstance(state, records.Exited)
    return state.exit


def is_recorded(path: Path) -> bool:
    """Whether the exit record of this job can be read; the record of another job must never be."""
    record = found(path)
    assert record is None or record.message == f"the end of {path.name}"
    return record is not None


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(tmp_path)
    yield made
    made.close_last()
    for fd in made.reuse.private_fds:
        os.close(fd)


def inode(path: Path) -> int:
    return path.lstat().st_ino


def test_only_the_first_job_creates_files(jobs: Jobs) -> None:
    jobs.run()
    before = {inode(path) for path in jobs.root.rglob("*")}
    path = jobs.run()
    assert {inode(each) for each in path.iterdir()} <= before
    assert sorted(each.name for each in path.iterdir()) == [
        "exit.1",
        "files",
        "job.json",
        "start.1",
    ]


def test_each_job_reads_its_own_records(jobs: Jobs) -> None:
    paths = [jobs.run(result=number) for number in range(20)]
    for number, path in enumerate(paths):
        record = found(path)
        assert record is not None
        assert (record.job_id, record.result) == (path.name, number)
    path, folder = jobs.begin()
    start = records.read_start(folder, path.name, 1)
    assert start is not None
    assert (start.job_id, start.pid) == (path.name, 1 << 30)
    os.close(folder)


def test_a_start_record_of_an_earlier_job_names_no_process(jobs: Jobs) -> None:
    earlier = jobs.run()
    jobs.run()
    (earlier / "exit.1").unlink()
    state = records.inspect_attempt(earlier, attempt())
    assert isinstance(state, records.Exited)
    assert state.start is not None
    assert (state.start.pid, state.start.job_id) == (0, "")
    assert state.start.gpus == []


def attempt() -> Any:
    return SimpleNamespace(number=1, handle=records.make_handle())


@contextmanager
def fenced(path: Path) -> Iterator[int]:
    path.mkdir()
    folder = os.open(path, os.O_RDONLY)
    assert records.inspect_attempt(path, attempt()) == records.Fenced()
    yield folder
    os.close(folder)


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_fenced_start_is_refused(jobs: Jobs, earlier: int) -> None:
    for _ in range(earlier):
        jobs.run()
    with fenced(jobs.root / "fenced") as folder:
        assert not jobs.reuse.create_start(folder, "start.1", StartRecord(pid=1).dumps())
        assert records.inspect_attempt(jobs.root / "fenced", attempt()) == records.Fenced()


def test_a_journal_does_not_grow_for_ever(jobs: Jobs) -> None:
    paths = [jobs.run(result="x" * 1000) for _ in range(100)]
    assert all(is_recorded(path) for path in paths)
    journals = {inode(path / "exit.1"): (path / "exit.1").stat().st_size for path in paths}
    assert max(journals.values()) <= reuse.MAX_JOURNAL
    assert len(journals) <= 5


def test_a_file_has_a_limited_number_of_names(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "MAX_LINKS", 4)
    paths = [jobs.run() for _ in range(10)]
    assert all(is_recorded(path) for path in paths)
    for name in ("start.1", "exit.1"):
        assert max((path / name).stat().st_nlink for path in paths) == 4


@pytest.mark.parametrize("refusal", [errno.EMLINK, errno.EXDEV, errno.EPERM, errno.ENOENT])
def test_records_have_separate_files_where_no_link_can_be_made(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    link = os.link

    def link_from_a_path_alone(source: str, *args: Any, **options: Any) -> None:
        if source.startswith("/proc/"):
            raise OSError(refusal, os.strerror(refusal))
        link(source, *args, **options)

    monkeypatch.setattr(os, "link", link_from_a_path_alone)
    paths = [jobs.run() for _ in range(5)]
    assert all(is_recorded(path) for path in paths)
    assert {(path / name).stat().st_nlink for path in paths for name in ("start.1", "exit.1")} == {
        1
    }


def test_a_large_record_has_a_separate_file(jobs: Jobs) -> None:
    jobs.run()
    path = jobs.run(result="x" * reuse.MAX_LINE)
    assert is_recorded(path)
    assert (path / "exit.1").stat().st_nlink == 1
    assert is_recorded(jobs.run())


def test_a_journal_whose_jobs_are_all_removed_is_followed_by_another(jobs: Jobs) -> None:
    folders.remove(jobs.run())
    paths = [jobs.run() for _ in range(2)]
    assert all(is_recorded(path) for path in paths)


def replaced(path: Path, make: Callable[[], object]) -> None:
    """Remove a file or an empty folder, and make something else with its name."""
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    make()


SPOILS: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "garbled": lambda path: path.write_bytes(b"\0" * path.stat().st_size),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b'{"job_id"'),
    "another line": lambda path: path.write_bytes(
        path.read_bytes()
        + exit_record_of(path.parent).dumps().replace(b"exited", b"stopped")
        + b"\n"
    ),
    "huge": lambda path: os.truncate(path, 1 << 40),
    "unreadable": lambda path: path.chmod(0),
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: replaced(path, path.mkdir),
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("name", ["start.1", "exit.1", "job.json"])
def test_a_spoilt_file_of_a_job_harms_no_later_job(jobs: Jobs, spoil: str, name: str) -> None:
    path = jobs.run()
    SPOILS[spoil](path / name)
    for _ in range(2):
        later, folder = jobs.begin()
        start = records.read_start(folder, later.name, 1)
        assert start is not None
        assert start.job_id == later.name
        jobs.end(later, folder)
        assert is_recorded(later)
        assert (later / "job.json").read_bytes() == job_of(later)
        for each in ("start.1", "exit.1", "job.json"):
            about = (later / each).stat()
            assert (about.st_mode & 0o777, about.st_uid) == (0o644, os.getuid()), each


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_start_record_that_a_running_job_spoils_harms_no_earlier_job(
    jobs: Jobs, spoil: str
) -> None:
    paths = [jobs.run() for _ in range(3)]
    running, folder = jobs.begin()
    SPOILS[spoil](running / "start.1")
    assert all(is_recorded(path) for path in paths)
    assert all(recovered_exit(path) == found(path) or is_recorded(path) for path in paths)
    jobs.end(running, folder)
    assert is_recorded(running)


def rebooted() -> Any:
    return SimpleNamespace(number=1, handle=json.dumps({"v": 1, "boot": "another"}))


@pytest.mark.parametrize("make_attempt", [attempt, rebooted])
def test_a_fence_that_a_job_writes_fences_no_other_job(
    jobs: Jobs, make_attempt: Callable[[], Any]
) -> None:
    """A loss of power may have taken the exit record of the other job."""
    path = jobs.run()
    running, folder = jobs.begin()
    (running / "start.1").write_bytes(b'{"fenced": true}')
    (path / "exit.1").unlink()
    state = records.inspect_attempt(path, make_attempt())
    assert isinstance(state, records.Exited)
    assert state.start is not None
    assert not state.start.fenced
    os.close(folder)


def test_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "start.1").write_text('{"v": 1, "fenced": true, "pid": 0, "ticks": 0, "boot": ""}')
    assert records.inspect_attempt(folder, attempt()) == records.Fenced()
    (folder / "exit.1").write_text(
        '{"v": 1, "ending": "exited", "exit_code": 3, "start_ns": 1, "end_ns": 2, "message": null}'
    )
    record = found(folder)
    assert record is not None
    assert record.exit_code == 3


def test_an_exit_record_without_a_job_id_in_a_shared_file_belongs_to_no_job(jobs: Jobs) -> None:
    paths = [jobs.run() for _ in range(2)]
    (paths[0] / "exit.1").write_bytes(exit_record_of(paths[0]).dumps().replace(b"job-0", b""))
    assert [found(path) for path in paths] == [None, None]


def test_an_added_line_does_not_change_an_exit_record(jobs: Jobs) -> None:
    path = jobs.run()
    SPOILS["another line"](path / "exit.1")
    record = found(path)
    assert record is not None
    assert record.ending == "exited"


def test_after_a_loss_of_power_a_record_is_complete_or_absent(jobs: Jobs) -> None:
    paths = [jobs.run(result=[path]) for path in "abc"]
    journal = (paths[0] / "exit.1").read_bytes()
    starts = [journal.index(path.name.encode()) for path in paths]
    ends = [journal.index(b"}\n", start) + 1 for start in starts]
    for size in range(len(journal) + 1):
        (paths[0] / "exit.1").write_bytes(journal[:size])
        assert [is_recorded(path) for path in paths] == [size >= end for end in ends]
        (paths[0] / "exit.1").write_bytes(journal[:size].ljust(len(journal) + 1, b"\0"))
        assert [is_recorded(path) for path in paths] == [size > end for end in ends]


KILLED_AT_A_CALL = """
import os, signal, sys
from pathlib import Path
from worker import test_reuse

calls_left = int(sys.argv[2])


def counted(call):
    def step(*args, **options):
        global calls_left
        calls_left -= 1
        if calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)

    return step


def report(*words):
    sys.stdout.write(" ".join(words) + "\\n")
    sys.stdout.flush()


jobs = test_reuse.Jobs(Path(sys.argv[1]))
for name in ("open", "write", "pwrite", "ftruncate", "link", "rename", "replace", "unlink", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
for name in ("first-of-all", "second", "3rd"):
    path, folder = jobs.begin(name)
    report("started", name)
    jobs.end(path, folder)
    report("ended", name)
report("all")
"""


def test_a_kill_at_any_moment_leaves_each_job_its_own_records(tmp_path: Path) -> None:
    for moment in itertools.count(1):
        root = tmp_path / str(moment)
        root.mkdir()
        command = [sys.executable, "-c", KILLED_AT_A_CALL, str(root), str(moment)]
        source = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=source, check=False)
        reports = done.stdout.splitlines()
        for name in ("first-of-all", "second", "3rd"):
            folder = root / name
            if not folder.exists():
                assert f"started {name}" not in reports
                continue
            has_start = (folder / "start.1").exists()
            assert has_start or f"started {name}" not in reports
            assert is_recorded(folder) or f"ended {name}" not in reports
            state = records.inspect_attempt(folder, attempt())
            assert isinstance(state, records.Exited) == has_start
            if isinstance(state, records.Exited) and state.exit is None and state.start is not None:
                assert (state.start.pid, state.start.job_id) == (1 << 30, name)
            if has_start and (folder / "job.json").exists():
                assert (folder / "job.json").read_bytes() == job_of(folder)
        if reports[-1:] == ["all"]:
            assert done.returncode == 0
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert moment > 30


TOUCHES: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: (path / "model").write_text("theirs"),
    "a hidden file": lambda path: (path / ".model").write_text("theirs"),
    "a folder": lambda path: (path / "models").mkdir(),
    "a link": lambda path: (path / "model").symlink_to("/nowhere"),
    "its mode": lambda path: path.chmod(0o700),
    "an attribute": lambda path: os.setxattr(path, "user.theirs", b"theirs"),
    "removed": lambda path: path.rmdir(),
    "renamed": lambda path: path.rename(path.with_name("mine")),
    "a file in its place": lambda path: replaced(path, lambda: path.write_text("theirs")),
    "a link in its place": lambda path: replaced(path, lambda: path.symlink_to("/")),
    "another in its place": lambda path: replaced(path, lambda: path.mkdir(0o700)),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_touched_folder_stays_with_its_job_and_the_next_job_gets_another(
    jobs: Jobs, touch: str
) -> None:
    jobs.run()
    path, folder = jobs.begin()
    TOUCHES[touch](path / "files")
    left = sorted(path.rglob("*"))
    jobs.end(path, folder)
    for _ in range(2):
        later = jobs.run()
        about = (later / "files").lstat()
        assert (about.st_mode & 0o777, about.st_uid) == (0o755, os.getuid())
        assert list((later / "files").iterdir()) == []
        assert os.listxattr(later / "files") == []
    assert [each for each in left if each.name != "job.json" and not os.path.lexists(each)] == []


def test_an_attempt_finds_the_files_of_the_previous_attempt(jobs: Jobs) -> None:
    jobs.run()
    retried = jobs.root / "retried"
    (retried / "files").mkdir(parents=True)
    (retried / "files" / "checkpoint").write_text("kept")
    path, folder = jobs.begin("retried")
    assert (path / "files" / "checkpoint").read_text() == "kept"
    jobs.end(path, folder)
    assert list((jobs.run() / "files").iterdir()) == []
    assert (path / "files" / "checkpoint").read_text() == "kept"


def test_a_job_file_with_a_second_link_is_not_reused(jobs: Jobs) -> None:
    path, folder = jobs.begin()
    os.link(path / "job.json", jobs.root / "kept")
    jobs.end(path, folder)
    jobs.run()
    assert (jobs.root / "kept").read_bytes() == job_of(path)


def test_a_shorter_job_file_has_no_rest_of_the_previous_one(jobs: Jobs) -> None:
    jobs.end(*jobs.begin("a-long-name" * 10))
    path, folder = jobs.begin("short")
    assert (path / "job.json").read_bytes() == job_of(path)
    jobs.end(path, folder)


def test_a_removal_takes_nothing_of_the_next_job(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removal is slow, or its process is stopped, and the next job begins meanwhile."""
    path = jobs.run()
    begun: list[Path] = []
    remove_from = trees.remove_from

    def remove_late(above: int, name: str) -> None:
        if not begun:
            later, folder = jobs.begin()
            (later / "files" / "model").write_text("theirs")
            begun.append(jobs.end(later, folder))
            assert inode(later / "files") != removed
        remove_from(above, name)

    removed = inode(path / "files")
    monkeypatch.setattr(trees, "remove_from", remove_late)
    folders.remove(path)
    assert not path.exists()
    assert (begun[0] / "files" / "model").read_text() == "theirs"


def test_a_removed_job_folder_is_an_error_and_the_next_job_is_recorded(jobs: Jobs) -> None:
    jobs.run()
    path, folder = jobs.begin()
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError):
        jobs.end(path, folder)
    with pytest.raises(FileNotFoundError):
        jobs.reuse.create_start(folder, "start.1", b"{}")
    with pytest.raises(FileNotFoundError):
        jobs.reuse.lay_out(folder, jobs.last, b"{}")
    os.close(folder)
    assert is_recorded(jobs.run())


def test_a_folder_in_place_of_an_exit_record_is_an_error_and_leaves_no_file(jobs: Jobs) -> None:
    jobs.run()
    path, folder = jobs.begin()
    (path / "exit.1").mkdir()
    with pytest.raises(IsADirectoryError):
        jobs.end(path, folder)
    os.close(folder)
    assert sorted(each.name for each in path.iterdir()) == [
        "exit.1",
        "files",
        "job.json",
        "start.1",
    ]


def test_a_full_disk_leaves_no_partial_record(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = jobs.run()
    path, folder = jobs.begin()
    pwrite, write = os.pwrite, os.write

    def half(fd: int, data: bytes, offset: int) -> int:
        return pwrite(fd, data[: len(data) // 2], offset)

    def none(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", half)
    monkeypatch.setattr(os, "write", none)
    with pytest.raises(OSError, match="No space left"):
        jobs.reuse.write_exit_record(folder, "exit.1", exit_record_of(path).dumps())
    assert not (path / "exit.1").exists()
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "write", write)
    jobs.end(path, folder)
    assert is_recorded(first)
    assert is_recorded(path)
