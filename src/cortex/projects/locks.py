"""Lock files: the exact versions that an environment held, as constraints for one that is built later.
Called by `environments`; `kept` keeps them.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from pathlib import Path

from cortex.projects.requirements import REQUIREMENTS, Requirements

SUFFIX = ".lock"

_PACKAGE = re.compile(r"(?P<name>[\w.]+)-(?P<version>[\w.!+]+)\.dist-info", re.ASCII)


def apply_to(wanted: Requirements) -> bool:
    """Whether there is anything to lock; who gives hashes has done it already."""
    return bool(wanted.arguments) and not any("--hash" in line for _, line in wanted.lines)


def name(wanted: Requirements) -> str:
    """A lock is for one platform, Python (the operator's own, where no other is asked for) and file of
    requirements: others may not have the same packages."""
    python = wanted.python_to_find or f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{sysconfig.get_platform()}-{python}"
    if wanted.pip_file != REQUIREMENTS:
        name += f"-{hashlib.sha256(wanted.pip_file.encode()).hexdigest()[:12]}"
    return re.sub(r"[^\w.-]+", "_", f"{name}{SUFFIX}", flags=re.ASCII)


def locked(identity: str, lock: str) -> str:
    """The identity of an environment that is built by a lock."""
    return hashlib.sha256(f"{identity}\n{lock}".encode()).hexdigest()


def held(python: Path) -> str:
    """The packages of an interpreter's environment, but those that came from a path or a URL."""
    pins = []
    for info in (python.parents[1] / "lib").glob("python*/site-packages/*.dist-info"):
        found = _PACKAGE.fullmatch(info.name)
        if found is not None and not (info / "direct_url.json").exists():
            pins.append(f"{found['name']}=={found['version']}\n")
    return "".join(sorted(pins))
