"""The supervisor reads a job's messages without a module that the user can replace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("loaded", ["absent", "blocked", "imported"])
def test_a_truncated_message_is_refused_also_where_the_user_has_a_module_json(
    tmp_path: Path, loaded: str
) -> None:
    """CPython's decoder finds its exception by the name `json.decoder`; the user may have one."""
    script = """
import json, sys
from cortex.worker.messages import Outcome
for name in [name for name in sys.modules if name.partition(".")[0] == "json"]:
    del sys.modules[name]
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "blocked":
    sys.modules["json"] = None
elif sys.argv[2] == "imported":
    import json
before = list(sys.modules.items())
for text in (b'{"message": "cut', b'{"message": [1,}', b'{"message"', b'', b'\\xff'):
    try:
        Outcome.loads(text)
    except ValueError:
        print("no message")
assert list(sys.modules.items()) == before
"""
    (tmp_path / "json.py").write_text("print('run')\n")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, loaded], capture_output=True, text=True, check=True
    )
    runs = ["run"] if loaded == "imported" else []
    assert done.stdout.split("\n") == [*runs, *["no message"] * 5, ""]
