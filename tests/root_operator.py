"""An operator that is root, and whose jobs run as a user without rights, for the tests of that border."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from operator_harness import PROBE, Operator, operator, probe_yaml, reachable, until

USER, UID = "nobody", 65534
WAITS = """
import os, time
while not os.path.exists({go!r}):
    time.sleep(0.02)
"""


@contextmanager
def passable_folder() -> Iterator[Path]:
    """A folder that every user may pass through."""
    assert os.geteuid() == 0, "these tests need root, as the operator does for --run-as"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def operator_as_root(user: str = USER, *, within: Sequence[str] = ()) -> Iterator[Operator]:
    """An operator whose jobs run as this user.

    Args:
        within: a command that runs the operator's.
    """
    command = [*within, *reachable()]
    with (
        passable_folder() as folder,
        operator(folder, "--run-as", user, within=command) as running,
    ):
        yield running


def waiting_for_import(running: Operator, go: Path) -> tuple[str, Any]:
    """The endpoint of an API and a job of it, which waits for an import ahead until a file is there."""
    yaml = probe_yaml("waits").replace("path:", "preload: [waits]\n    path:")
    endpoint = running.deployed(yaml, {"probe.py": PROBE, "waits.py": WAITS.format(go=str(go))})
    job = running.submit(endpoint)
    until(
        lambda: "imported ahead" in str(running.status(endpoint, job).get("message")),
        "the fork server at its import",
    )
    return endpoint, job
