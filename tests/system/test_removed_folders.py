"""Folders in which users' code has written are removed, whatever it has left there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cortex.engines.local import LocalEngine
from cortex.joblog.folders import JobFolders
from cortex.projects.environments import Environments
from cortex.ray_node import workspace
from cortex.ray_node.agent import Agent
from cortex.ray_node.checkpoints import Checkpoints
from cortex.system.folders import remove
from cortex.worker import beneath
from operator_harness import as_unprivileged_owner

MODES = {"unwritable": 0o500, "unreadable": 0o300, "unsearchable": 0o600, "closed": 0o000}


def lay_out(job: Path) -> None:
    for name in MODES:
        (job / name / "closed").mkdir(parents=True)
        (job / name / "closed" / "file").touch()


def make_unusable(job: Path) -> None:
    for name, mode in MODES.items():
        (job / name / "closed").chmod(0o000)
        (job / name).chmod(mode)
    job.chmod(0o500)


def by_remove(root: Path) -> None:
    remove(root / "jobs" / "job")


def by_an_agent(root: Path) -> None:
    folders = JobFolders(root / "jobs")
    agent: Any = SimpleNamespace(
        _orders={},
        _folders=folders,
        _engine=LocalEngine(root / "jobs"),
        _checkpoints=Checkpoints(root / "checkpoints", folders, lambda _: None),
    )
    asyncio.run(Agent.discard(agent, ["job"]))


def by_the_next_agent_of_the_node(root: Path) -> None:
    workspace.find_or_create(root.parent, "node")


def by_environments(root: Path) -> None:
    Environments(root / "jobs").remove_unused([])


@pytest.mark.parametrize(
    "removal", [by_remove, by_an_agent, by_the_next_agent_of_the_node, by_environments]
)
def test_folders_that_their_own_user_cannot_open_are_removed(
    removal: Callable[[Path], None],
) -> None:
    def is_removed(own: Path) -> bool:
        make_unusable(own / "0" / "jobs" / "job")
        removal(own / "0")
        jobs = own / "0" / "jobs"
        return not jobs.exists() or not list(jobs.iterdir())

    assert as_unprivileged_owner(lambda own: lay_out(own / "0" / "jobs" / "job"), is_removed)


def test_removing_a_missing_folder_leaves_its_parent_unchanged(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # with `run_as`, the user of the jobs passes through it
    remove(tmp_path / "job")
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_folders_however_deep_and_closed_go_with_few_descriptors(tmp_path: Path) -> None:
    def lay_out(own: Path) -> None:
        os.mkdir(own / "job")  # noqa: PTH102  # the others are made by descriptors
        folder = os.open(own / "job", beneath.FOLDER)
        for level in range(1500):
            os.mkdir("deeper", dir_fd=folder)
            for name in ("file", f"{level}"):
                os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=folder))
            os.symlink("/etc", "link", dir_fd=folder)
            above, folder = folder, os.open("deeper", beneath.FOLDER, dir_fd=folder)
            os.close(above)
        os.close(folder)

    def is_gone(own: Path) -> bool:
        lay_out(own)
        folders = [os.open(own / "job", beneath.FOLDER)]
        for _ in range(200):
            folders.append(os.open("deeper", beneath.FOLDER, dir_fd=folders[-1]))
        for folder in folders:
            os.fchmod(folder, 0)
            os.close(folder)
        before = descriptors()
        remove(own / "job")
        return not (own / "job").exists() and descriptors() == before

    assert as_unprivileged_owner(lambda own: (own / "0").mkdir(), is_gone)


def test_what_cannot_be_removed_is_told_and_left(tmp_path: Path) -> None:
    def is_left(own: Path) -> bool:
        job = own / "jobs" / "job"
        job.mkdir(parents=True)
        (own / "jobs").chmod(0o500)
        remove(job)
        return job.is_dir()

    assert as_unprivileged_owner(lambda own: None, is_left)
