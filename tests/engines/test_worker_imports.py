"""The worker runs in users' environments: it may load only a small part of the standard library."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
before = set(sys.modules)
import cortex.worker.forkserver.server
print(*set(sys.modules) - before)
import cortex.logger
print(*set(sys.modules) - before)
"""


def test_the_worker_loads_only_a_small_part_of_the_standard_library() -> None:
    command = [sys.executable, "-c", PROBE]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    worker, everything = (set(line.split()) for line in output.splitlines())
    tops = {name.partition(".")[0] for name in everything}
    assert tops - sys.stdlib_module_names == {"cortex"}
    # Each fork copies all that is loaded.
    dear = {"ast", "asyncio", "pathlib", "selectors", "shutil", "socket", "threading", "traceback"}
    assert not dear & worker
