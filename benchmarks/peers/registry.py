"""The peers and their versions. Called by `run` and `measurements`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from peers import celery, ray_jobs, rq
from peers.common import PYTHON
from service import Service

PEERS: dict[str, Callable[[Path], AbstractContextManager[Service]]] = {
    "rq": rq.opened,
    "celery": celery.opened,
    "ray": ray_jobs.opened,
}
_PACKAGES = ("rq", "celery", "ray", "redis", "fastapi", "uvicorn", "uvloop", "httptools")


def versions() -> dict[str, str]:
    """The versions of the packages and the Redis server.

    Raises:
        SystemExit: the peers are not installed.
    """
    if not PYTHON.exists() or shutil.which("redis-server") is None:
        raise SystemExit("the peers are not installed: `make bench-peers` does it, and measures")
    code = "import sys, importlib.metadata as m\nfor p in sys.argv[1:]: print(p, m.version(p))"
    listed = subprocess.check_output([PYTHON, "-I", "-c", code, *_PACKAGES], text=True)
    server = subprocess.check_output(["redis-server", "--version"], text=True)
    found = dict(line.split() for line in listed.splitlines())
    return {**found, "redis-server": server.split("v=")[1].split()[0]}
