"""Projects and lock files: one machine stores them in the object store, another fetches them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from cortex.objects import ObjectStore
from cortex.projects import repository, trash
from cortex.projects.repository import Projects
from cortex.projects.unpack import project_id


@pytest.fixture
def files(tmp_path: Path) -> ObjectStore:
    (tmp_path / "files").mkdir()
    return ObjectStore(f"file://{tmp_path}/files")


def projects(data: Path, files: ObjectStore | None) -> Projects:
    for folder in ("projects", "locks"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    return Projects(data / "projects", data / "locks", files)


def lay_out(folder: Path) -> None:
    """A project with one entry of each kind that a project can contain."""
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty" / "within").mkdir(parents=True)
    (folder / "deep" / "er" / ".hidden").write_text("x")
    (folder / "script").write_text("#!")
    (folder / "script").chmod(0o755)
    (folder / "nämé").write_bytes(b"\xff\n" * 50_000)
    (folder / "link").symlink_to("deep/er")
    (folder / "file-link").symlink_to("script")


def add_a_project(here: Projects) -> str:
    with here.incoming() as incoming:
        lay_out(incoming)
        return here.add_project(incoming)


def test_another_machine_fetches_the_same_project(tmp_path: Path, files: ObjectStore) -> None:
    here, there = projects(tmp_path / "a", files), projects(tmp_path / "b", files)
    identity = add_a_project(here)
    assert add_a_project(here) == identity
    assert there.ensure_local(identity)
    assert project_id(there.folder(identity)) == identity
    assert {path.name for path in (tmp_path / "b" / "projects").iterdir()} == {identity}
    assert not there.ensure_local("0" * 64)


def test_an_added_project_is_synced_to_disk_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, list[str]]] = []

    def fsync(fd: int) -> None:
        folder = Path(f"/proc/self/fd/{fd}").readlink()
        synced.append((folder.name, [path.name for path in folder.iterdir()]))

    here = projects(tmp_path, None)
    monkeypatch.setattr(os, "fsync", fsync)
    identity = add_a_project(here)
    assert synced == [("projects", [identity])]


def test_without_an_object_store_a_project_exists_on_its_machine_alone(tmp_path: Path) -> None:
    here = projects(tmp_path, None)
    identity = add_a_project(here)
    assert here.ensure_local(identity)
    here.upload_missing({identity})
    here.prune_unused(set())
    assert not projects(tmp_path / "b", None).ensure_local(identity)


def test_concurrent_fetches_result_in_one_complete_project(
    tmp_path: Path, files: ObjectStore
) -> None:
    identity = add_a_project(projects(tmp_path / "a", files))
    there = projects(tmp_path / "b", files)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(there.ensure_local(identity)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert project_id(there.folder(identity)) == identity
    assert {path.name for path in (tmp_path / "b" / "projects").iterdir()} == {identity}


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_damaged_project_is_not_fetched(
    tmp_path: Path, files: ObjectStore, content: bytes | None
) -> None:
    identity = add_a_project(projects(tmp_path / "a", files))
    name = f"projects/{identity}/project.tar.gz"
    if content is None:  # the archive of another project
        with (other := projects(tmp_path / "c", files)).incoming() as incoming:
            incoming.mkdir()
            (incoming / "x").touch()
            content = files.read(f"projects/{other.add_project(incoming)}/project.tar.gz")
    assert content is not None
    files.put(name, content)
    there = projects(tmp_path / "b", files)
    assert not there.ensure_local(identity)
    assert not list((tmp_path / "b" / "projects").iterdir())


def test_a_project_missing_in_the_object_store_is_uploaded_unless_it_was_changed(
    tmp_path: Path, files: ObjectStore
) -> None:
    identity = add_a_project(projects(tmp_path / "a", None))
    here = projects(tmp_path / "a", files)
    (here.folder(identity) / "script").write_text("changed")
    here.upload_missing({identity})
    assert files.listed("projects") == {}
    (here.folder(identity) / "script").write_text("#!")
    (here.folder(identity) / "__pycache__").mkdir()
    here.upload_missing({identity, "elsewhere"})
    assert projects(tmp_path / "b", files).ensure_local(identity)


def test_a_lock_file_that_was_removed_locally_is_fetched_again(
    tmp_path: Path, files: ObjectStore
) -> None:
    here = projects(tmp_path, files)
    identity = add_a_project(here)
    here.save_lockfile(identity, "one.lock", "six==1.0\n")
    assert here.locks(identity) == {"one.lock": "six==1.0\n"}
    here.prune_unused(set())
    assert (
        add_a_project(here) == identity
    )  # a new deploy; the lock file is younger than `_MIN_AGE_S`
    assert here.locks(identity) == {"one.lock": "six==1.0\n"}


def test_unused_projects_are_removed_from_the_object_store_but_not_new_ones(
    tmp_path: Path, files: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = projects(tmp_path / "a", files)
    identity = add_a_project(here)
    here.save_lockfile(identity, "lock", "x==1\n")
    here.prune_unused(set())
    assert len(files.listed("projects")) == 2
    monkeypatch.setattr(repository, "_MIN_AGE_S", -60)
    here.prune_unused({identity})
    assert len(files.listed("projects")) == 2
    here.prune_unused(set())
    assert files.listed("projects") == {}


def test_a_new_deploy_repairs_a_project_that_jobs_have_changed(
    tmp_path: Path,
) -> None:
    here = projects(tmp_path, None)
    identity = add_a_project(here)
    folder, outside = here.folder(identity), tmp_path / "outside"
    outside.mkdir()
    (folder / "script").chmod(0o644)
    (folder / "nämé").write_bytes(b"\xfe\n" * 50_000)  # of the same length
    (folder / "link").unlink()
    (folder / "link").mkdir()
    (folder / "link" / "within").touch()
    (folder / "file-link").unlink()
    (folder / "file-link").symlink_to("nowhere")
    shutil.rmtree(folder / "deep")
    (folder / "deep").symlink_to(outside)
    (folder / "empty" / "within").rmdir()
    (folder / "empty" / "within").write_text("a file")
    (folder / "output").write_text("of a job")
    assert add_a_project(here) == identity
    assert (folder / "output").read_text() == "of a job"
    assert list(outside.iterdir()) == []
    (folder / "output").unlink()
    assert project_id(folder) == identity
    assert here.last_used().keys() == {identity}


def test_an_incomplete_upload_is_no_lock_file(tmp_path: Path, files: ObjectStore) -> None:
    here = projects(tmp_path, files)
    identity = add_a_project(here)
    files.put(f"projects/{identity}/project.tar.gz.1.part", b"\x1f\x8b")
    files.put(f"projects/{identity}/one.lock", b"six==1.0\n")
    assert here.locks(identity) == {"one.lock": "six==1.0\n"}
    assert [path.name for path in (tmp_path / "locks" / identity).iterdir()] == ["one.lock"]


def test_odd_files_of_a_job_do_not_prevent_the_upload_of_its_project(
    tmp_path: Path, files: ObjectStore
) -> None:
    identity = add_a_project(projects(tmp_path, None))
    here = projects(tmp_path, files)
    os.mkfifo(here.folder(identity) / "pipe")
    (here.folder(identity) / "gone").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(here.folder(identity)):
        bound.bind("socket")
    here.upload_missing({identity})
    assert files.listed("projects") == {}  # with that link it is a different project
    (here.folder(identity) / "gone").unlink()
    here.upload_missing({identity})
    assert projects(tmp_path / "b", files).ensure_local(identity)


def test_a_project_that_is_deployed_while_it_moves_to_the_trash_exists_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = projects(tmp_path, None)
    identity = add_a_project(here)
    first_used_ns = here.last_used()[identity]
    last_used_ns = trash.last_used_ns
    for moment in range(3):  # before the first check, before the move, before the second check
        checks = 0

        def last_used_after_a_deploy(folder: Path, moment: int = moment) -> int:
            nonlocal checks
            checks += 1
            if checks > 2:
                return last_used_ns(folder)
            if (checks, moment) in {(1, 0), (2, 2)}:
                add_a_project(here)
            used_ns = last_used_ns(folder)
            if (checks, moment) == (1, 1):
                add_a_project(here)
            return used_ns

        with monkeypatch.context() as slow:
            slow.setattr(trash, "last_used_ns", last_used_after_a_deploy)
            here.move_to_trash(identity, first_used_ns)
        assert project_id(here.folder(identity)) == identity
        first_used_ns = here.last_used()[identity]
    here.move_to_trash(identity, first_used_ns)
    assert not here.folder(identity).exists()
    assert add_a_project(here) == identity
    here.remove_leftovers()
    assert here.trashed_folders() == []


def test_lock_files_are_known_until_they_change(tmp_path: Path, files: ObjectStore) -> None:
    here = projects(tmp_path / "a", files)
    identity = add_a_project(here)
    assert here.known_locks(identity) is None
    assert here.locks(identity) == {}
    assert here.known_locks(identity) == {}
    here.save_lockfile(identity, "one.lock", "x==1\n")
    assert here.known_locks(identity) is None
    assert here.locks(identity) == {"one.lock": "x==1\n"}
    assert here.known_locks(identity) is None  # its folder has changed within this second
    folder = tmp_path / "a" / "locks" / identity
    os.utime(folder, ns=(0, folder.stat().st_mtime_ns - 2 * 10**9))
    assert here.locks(identity) == here.known_locks(identity) == {"one.lock": "x==1\n"}
    here.reset_cache()
    assert here.known_locks(identity) is None  # another operator may have added some
    assert here.locks(identity) == here.known_locks(identity) == {"one.lock": "x==1\n"}
    (folder / "one.lock").unlink()
    assert here.known_locks(identity) is None
    here.prune_unused(set())
    assert here.known_locks(identity) is None


def test_other_machines_fetch_lock_files_and_the_first_one_stays(
    tmp_path: Path, files: ObjectStore
) -> None:
    here = projects(tmp_path / "a", files)
    identity = add_a_project(here)
    assert here.locks(identity) == {}
    here.save_lockfile_if_absent(identity, "one.lock", "x==1\n")
    here.save_lockfile_if_absent(identity, "one.lock", "x==2\n")
    there = projects(tmp_path / "b", files)
    assert there.locks(identity) == here.locks(identity) == {"one.lock": "x==1\n"}
    there.save_lockfile_if_absent(identity, "one.lock", "x==2\n")
    assert there.locks(identity) == {"one.lock": "x==1\n"}
