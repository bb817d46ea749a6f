"""The number of inodes per job. A new inode costs 1 ms on a disk with recently removed files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from operator_harness import Operator, probe_yaml


def test_a_job_makes_fewer_than_three_inodes_in_the_data_folder(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(
        probe_yaml("frugal"), {"probe.py": "def task(config):\n    print('a line')\n    return 1\n"}
    )
    ended = [shared_operator.run(endpoint)]
    before = inodes(shared_operator)
    for _ in range(10):
        ended.append(shared_operator.run(endpoint))
    assert {job["status"] for job in ended} == {"status_succeeded"}
    # The first job of a supervisor makes more, and a later job may be the first of another one.
    assert len(inodes(shared_operator) - before) < 3 * 10


def inodes(operator: Operator) -> set[int]:
    found = set()
    for folder, folders, files in os.walk(operator.data_dir):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # another test removed its file meanwhile
                found.add(Path(folder, name).lstat().st_ino)
    return found
