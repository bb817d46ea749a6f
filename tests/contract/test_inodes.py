"""What a job costs the disk of its operator: each new inode costs a millisecond where files were removed lately."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from operator_harness import Operator, probe_yaml


def test_a_job_makes_two_inodes_in_the_data_folder_all_in_all(shared_operator: Operator) -> None:
    endpoint = shared_operator.deployed(
        probe_yaml("frugal"), {"probe.py": "def task(config):\n    print('a line')\n    return 1\n"}
    )
    ended = [shared_operator.run(endpoint)]
    before = inodes(shared_operator)
    for _ in range(10):
        ended.append(shared_operator.run(endpoint))
    assert {job["status"] for job in ended} == {"status_succeeded"}
    # The first job of a supervising process makes some more, and a later job may be that.
    assert len(inodes(shared_operator) - before) < 3 * 10


def inodes(operator: Operator) -> set[int]:
    found = set()
    for folder, folders, files in os.walk(operator.data_dir):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):  # another test's, which goes meanwhile
                found.add(Path(folder, name).lstat().st_ino)
    return found
