"""The worker runs in the user's environment: the standard library is all that it may load."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
before = set(sys.modules)
import cortex.logger
import cortex.worker.child, cortex.worker.forkserver, cortex.worker.preload
import cortex.worker.supervisor, cortex.worker.task
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print("pathlib" in sys.modules, "typing" in sys.modules, "asyncio" in sys.modules)
"""


def test_importing_the_worker_loads_the_standard_library_alone() -> None:
    told = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert set(told[0].split()) - sys.stdlib_module_names == {"cortex"}
    assert "asyncio" not in told[0].split()
