"""The logger of tasks in a process whose standard output is closed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("close", ["sys.stdout.close()", "sys.stdout = None"])
def test_a_record_goes_to_stderr_without_a_stdout(close: str) -> None:
    code = f"import sys; from cortex_internal.lib.log import logger; {close}; logger.info('still')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    (line,) = done.stderr.splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    json.dumps(record, ensure_ascii=False).encode()
    assert record["message"] == "still"
    assert done.stdout == ""
