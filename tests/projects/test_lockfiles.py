"""An environment that another machine builds from the lock file of the first build."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from cortex.objects import ObjectStore
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.spec.api import DEFAULT_DEPENDENCIES
from wheels import wheel


@pytest.fixture
def files(tmp_path: Path) -> ObjectStore:
    (tmp_path / "files").mkdir()
    return ObjectStore(f"file://{tmp_path}/files")


def projects(data: Path, files: ObjectStore) -> Projects:
    for folder in ("projects", "locks"):
        (data / folder).mkdir(parents=True)
    return Projects(data / "projects", data / "locks", files)


def test_another_machine_builds_the_environment_with_the_same_versions(
    tmp_path: Path, files: ObjectStore
) -> None:
    wheels = tmp_path / "wheels"
    wheel(wheels, "tinyprobe", version="1.0")

    def deployed(data: Path) -> tuple[Projects, str]:
        here = projects(data, files)
        with here.incoming() as incoming:
            incoming.mkdir()
            lines = f"--no-index\n--find-links {wheels}\ntinyprobe\n"
            (incoming / "requirements.txt").write_text(lines)
            return here, here.add_project(incoming)

    here, identity = deployed(tmp_path / "a")
    first = built(Environments(tmp_path / "a" / "envs", projects=here), here.folder(identity))
    assert version_in(first) == "1.0"
    wheel(wheels, "tinyprobe", version="2.0")
    # On the same machine the environment is not built again.
    again = built(Environments(tmp_path / "a" / "envs", projects=here), here.folder(identity))
    assert again == first
    there = projects(tmp_path / "b", files)
    assert there.ensure_local(identity)
    environments = Environments(tmp_path / "b" / "envs", projects=there)
    locked = built(environments, there.folder(identity))
    assert version_in(locked) == "1.0"
    environments.remove_unused([(there.folder(identity), DEFAULT_DEPENDENCIES)])
    assert environments.built_python(there.folder(identity)) == locked
    # Without the lock file, the newest version at the time of the build is installed.
    free = built(Environments(tmp_path / "c" / "envs"), there.folder(identity))
    assert version_in(free) == "2.0"


def built(environments: Environments, project: Path) -> Path:
    python = asyncio.run(environments.build(project))
    environments.pin_versions(project)
    return python


def version_in(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('tinyprobe'))"
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
