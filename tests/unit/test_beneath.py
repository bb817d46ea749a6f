"""Folders that another user may change at any moment: no link is followed, a log is shown only if
it is the job's own, and removal works with any content."""

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

OTHER_UID = 65534


def count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_link_below_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a" / "file").touch()
    before = count_descriptors()
    with beneath.opened(str(tmp_path), "a", "b") as folder:
        assert os.fstat(folder).st_ino == (tmp_path / "a" / "b").stat().st_ino
    with beneath.opened(str(tmp_path / "link")) as folder:  # a link in the trusted path is followed
        assert sorted(beneath.names(folder)) == ["b", "file"]
    for names in (["link"], ["link", "b"], ["a", "file"], ["a", "b", "c"]):
        # The error numbers differ.
        with pytest.raises(OSError), beneath.opened(str(tmp_path), *names):
            pass
    assert count_descriptors() == before


def test_the_status_of_a_link_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with beneath.opened(str(tmp_path)) as folder:
        found = beneath.stat(folder, "link")
        assert found is not None
        assert found.st_size == len("nowhere")
        assert beneath.stat(folder, "nothing") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")
@pytest.mark.parametrize(
    ("owner", "mode", "links", "is_shown"),
    [
        (OTHER_UID, 0o600, 1, True),
        (OTHER_UID, 0o644, 1, True),
        (0, 0o644, 1, True),  # lines of the operator, where no job ran
        # The folder's owner can rename a private file of root's into the place of the log.
        (0, 0o600, 1, False),
        (0, 0o640, 1, False),
        (OTHER_UID - 1, 0o644, 1, False),
        (OTHER_UID, 0o644, 2, False),
        (0, 0o644, 2, False),
    ],
)
def test_only_a_file_of_the_job_alone_is_shown_as_its_log(
    tmp_path: Path, owner: int, mode: int, links: int, is_shown: bool
) -> None:
    job = tmp_path / "job"
    job.mkdir()
    os.chown(job, OTHER_UID, OTHER_UID)
    log = job / "log"
    log.write_text("words\n")
    log.chmod(mode)
    os.chown(log, owner, 0)
    if links > 1:
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


def test_only_a_regular_file_is_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = count_descriptors()
    assert open_log(log) is None
    for make in (log.mkdir, partial(os.mkfifo, log), partial(log.symlink_to, "/etc/passwd")):
        make()
        assert open_log(log) is None
        remove(log)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(log))
    assert open_log(log) is None
    assert count_descriptors() == before


def test_a_file_made_elsewhere_gets_its_name_only_once(tmp_path: Path) -> None:
    job, made_in = tmp_path / "job", tmp_path / "jobs"
    job.mkdir()
    made_in.mkdir()
    with beneath.opened(str(job)) as folder, beneath.opened(str(made_in)) as above:
        assert files.create(folder, "start.1", b"fenced", made_in=above)
        assert not files.create(folder, "start.1", b"again", made_in=above)
        assert files.read(folder, "start.1") == b"fenced"
    assert (job / "start.1").stat().st_nlink == 1
    assert list(made_in.iterdir()) == []
