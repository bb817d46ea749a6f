"""Lock files: the exact versions that an environment contained when it was first built, as
constraints for later builds. Called by `environments`; `builder` installs by them, and `repository`
stores them.
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


def apply_to(requirements: Requirements) -> bool:
    """Whether a lock file is of use: something is installed, and no requirement has hashes, which
    pin the versions already."""
    has_hashes = any("--hash" in line for _, line in requirements.lines)
    return bool(requirements.arguments) and not has_hashes


def file_name(requirements: Requirements) -> str:
    """The name of the lock file: one for each platform, Python version and file of requirements,
    because the same versions may not exist for others. The Python is the operator's own unless the
    project requests another."""
    python = requirements.python_to_find or f"{sys.version_info.major}.{sys.version_info.minor}"
    name = f"{sysconfig.get_platform()}-{python}"
    if requirements.pip_file != REQUIREMENTS:
        name += f"-{hashlib.sha256(requirements.pip_file.encode()).hexdigest()[:12]}"
    return re.sub(r"[^\w.-]+", "_", f"{name}{SUFFIX}", flags=re.ASCII)


def locked_identity(identity: str, lock: str) -> str:
    """The identity of an environment that is built with a lock file.

    Args:
        identity: that of the environment built without one.
        lock: the content of the lock file.
    """
    return hashlib.sha256(f"{identity}\n{lock}".encode()).hexdigest()


def installed_versions(python: Path) -> str:
    """The content of a lock file for an environment: its packages and their versions, except
    packages that were installed from a path or a URL.

    Args:
        python: the environment's interpreter.
    """
    venv = python.parents[1]
    pins = []
    for version in _listed(venv, "lib"):
        packages = ("lib", version, "site-packages")
        for name in _listed(venv, *packages) if version.startswith("python") else ():
            package = _PACKAGE.fullmatch(name)
            if package is not None and "direct_url.json" not in _listed(venv, *packages, name):
                pins.append(f"{package['name']}=={package['version']}\n")
    return "".join(sorted(pins))


def _listed(venv: Path, *names: str) -> list[str]:
    """The names in a folder of an environment; an empty list if there is no such folder. The folder
    may belong to the user that jobs run as, so no link in it is followed."""
    try:
        with beneath.opened(str(venv.parents[1]), venv.parent.name, venv.name, *names) as folder:
            return beneath.names(folder)
    except OSError:  # no such folder
        return []
