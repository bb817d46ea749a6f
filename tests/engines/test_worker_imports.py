"""The worker runs in the user's environment: the standard library is all that it may load, and of that little."""

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


def test_importing_the_worker_loads_the_standard_library_alone_and_little_of_it() -> None:
    command = [sys.executable, "-c", PROBE]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    worker, everything = (set(line.split()) for line in told.splitlines())
    tops = {name.partition(".")[0] for name in everything}
    assert tops - sys.stdlib_module_names == {"cortex"}
    # All that is loaded is copied by each fork.
    dear = {"ast", "asyncio", "pathlib", "selectors", "shutil", "socket", "threading", "traceback"}
    assert not dear & worker
