"""Folders that somebody else may change at any moment: what is followed there, shown of it, and removed."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path

import pytest

from cortex.joblog.folders import JobFolders
from cortex.joblog.reader import open_log
from cortex.system.folders import remove
from cortex.worker import beneath, files

OTHER = 65534


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_link_is_followed_on_the_way_down(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a" / "file").touch()
    before = descriptors()
    with beneath.opened(str(tmp_path), "a", "b") as folder:
        assert os.fstat(folder).st_ino == (tmp_path / "a" / "b").stat().st_ino
    with beneath.opened(str(tmp_path / "link")) as folder:  # whoever gave it that name was asked
        assert sorted(beneath.names(folder)) == ["b", "file"]
    for names in (["link"], ["link", "b"], ["a", "file"], ["a", "b", "c"]):
        with pytest.raises(OSError), beneath.opened(str(tmp_path), *names):  # of several kinds
            pass
    assert descriptors() == before


def test_of_a_link_the_link_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with beneath.opened(str(tmp_path)) as folder:
        found = beneath.stat(folder, "link")
        assert found is not None
        assert found.st_size == len("nowhere")
        assert beneath.stat(folder, "nothing") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
@pytest.mark.parametrize(
    ("owner", "mode", "names", "is_shown"),
    [
        (OTHER, 0o600, 1, True),
        (OTHER, 0o644, 1, True),
        (0, 0o644, 1, True),  # the operator's words, where no job ran
        (
            0,
            0o600,
            1,
            False,
        ),  # in a folder of theirs there may be files of root's, which they may move
        (0, 0o640, 1, False),
        (OTHER - 1, 0o644, 1, False),
        (OTHER, 0o644, 2, False),
        (0, 0o644, 2, False),
    ],
)
def test_a_log_is_a_file_that_the_job_alone_has(
    tmp_path: Path, owner: int, mode: int, names: int, is_shown: bool
) -> None:
    job = tmp_path / "job"
    job.mkdir()
    os.chown(job, OTHER, OTHER)
    log = job / "log"
    log.write_text("words\n")
    log.chmod(mode)
    os.chown(log, owner, 0)
    if names > 1:
        (tmp_path / "other name").hardlink_to(log)
    folders = JobFolders(tmp_path)
    file = open_log(log)
    assert (file is not None) == is_shown
    if file is None:
        with pytest.raises(OSError, match="the job's alone"):
            folders.append_to_log("job", "more")
        assert log.read_text() == "words\n"
        return
    assert os.read(file.fd, 100) == b"words\n"
    file.close()
    folders.append_to_log("job", "more")
    assert log.read_text() == "words\nmore\n"


def test_what_is_no_file_is_no_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = descriptors()
    assert open_log(log) is None
    for make in (log.mkdir, partial(os.mkfifo, log), partial(log.symlink_to, "/etc/passwd")):
        make()
        assert open_log(log) is None
        remove(log)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(log))
    assert open_log(log) is None
    assert descriptors() == before


def test_a_file_that_is_made_elsewhere_gets_its_name_once(tmp_path: Path) -> None:
    job, made_in = tmp_path / "job", tmp_path / "jobs"
    job.mkdir()
    made_in.mkdir()
    with beneath.opened(str(job)) as folder, beneath.opened(str(made_in)) as above:
        assert files.create(folder, "start.1", b"fenced", made_in=above)
        assert not files.create(folder, "start.1", b"again", made_in=above)
        assert files.read(folder, "start.1") == b"fenced"
    assert (job / "start.1").stat().st_nlink == 1
    assert list(made_in.iterdir()) == []
