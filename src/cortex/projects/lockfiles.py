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
from cortex.worker import beneath

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
    venv = python.parents[1]
    pins = []
    for version in _listed(venv, "lib"):
        where = ("lib", version, "site-packages")
        for name in _listed(venv, *where) if version.startswith("python") else ():
            found = _PACKAGE.fullmatch(name)
            if found is not None and "direct_url.json" not in _listed(venv, *where, name):
                pins.append(f"{found['name']}=={found['version']}\n")
    return "".join(sorted(pins))


def _listed(venv: Path, *names: str) -> list[str]:
    """The names in a folder of an environment, whose owner may be the jobs' user; none if it is not there."""
    try:
        with beneath.opened(str(venv.parents[1]), venv.parent.name, venv.name, *names) as folder:
            return beneath.names(folder)
    except OSError:  # it is no folder
        return []
