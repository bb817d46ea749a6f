"""An operator that runs as root, with jobs that run as an unprivileged user (`--run-as`)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from operator_harness import PROBE, Operator, operator, probe_yaml, reachable_interpreter, until

USER, UID = "nobody", 65534
WAITING_MODULE = """
import os, time
while not os.path.exists({go!r}):
    time.sleep(0.02)
"""


@contextmanager
def passable_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter."""
    assert os.geteuid() == 0, "these tests need root: --run-as requires it"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def operator_as_root(user: str = USER, *, command_prefix: Sequence[str] = ()) -> Iterator[Operator]:
    """An operator that runs as root, with jobs that run as this user.

    Args:
        command_prefix: a command that executes `cortex serve`.
    """
    command = [*command_prefix, *reachable_interpreter()]
    with (
        passable_folder() as folder,
        operator(folder, "--run-as", user, command_prefix=command) as running,
    ):
        yield running


def waiting_for_import(running: Operator, go: Path) -> tuple[str, Any]:
    """The endpoint of an API, and its job that waits for an import ahead until a file exists."""
    yaml = probe_yaml("waits").replace("path:", "preload: [waits]\n    path:")
    endpoint = running.deployed(
        yaml, {"probe.py": PROBE, "waits.py": WAITING_MODULE.format(go=str(go))}
    )
    job = running.submit(endpoint)
    until(
        lambda: "imported ahead" in str(running.status(endpoint, job).get("message")),
        "the fork server imports the module",
    )
    return endpoint, job
