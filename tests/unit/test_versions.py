"""A version is made ready when its files can be had, and not before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cortex.operator.versions import HeldUp, Unusable, Versions
from cortex.projects.files import Files
from cortex.projects.kept import Projects
from cortex.spec.api import ApiSpec, Definition, Networking
from cortex.store import Store


def test_a_version_is_held_up_while_its_files_cannot_be_had(tmp_path: Path) -> None:
    asyncio.run(_check(tmp_path))


async def _check(tmp_path: Path) -> None:
    shelf, data = tmp_path / "shelf", tmp_path / "data"
    for folder in (shelf, data / "projects", data / "locks"):
        folder.mkdir(parents=True)
    projects = Projects(data / "projects", data / "locks", Files(f"file://{shelf}"))
    with projects.incoming() as incoming:
        incoming.mkdir()
        (incoming / "task.py").write_text("def task(config): pass\n")
        identity = projects.take_in(incoming)
    (data / "projects" / identity).rename(tmp_path / "taken-away")
    spec = ApiSpec(
        name="a",
        kind="TaskAPI",
        definition=Definition(path="task.py"),
        networking=Networking(endpoint="a"),
        api_id="v1",
        project_id=identity,
        last_updated="2026-01-01T00:00:00.000000000Z",
    )
    store = Store(f"sqlite:///{tmp_path / 'operator.db'}")
    try:
        await store.deploy([spec])
        versions = Versions(store, projects, None)
        shelf.rename(tmp_path / "away")
        with pytest.raises(HeldUp, match=r"the store of files .* cannot be used"):
            await versions.prepare("v1")
        shelf.mkdir()
        with pytest.raises(Unusable, match="deploy it again"):
            await versions.prepare("v1")
        shelf.rmdir()
        (tmp_path / "away").rename(shelf)
        version = await versions.prepare("v1")
        assert (version.project / "task.py").is_file()
        await versions.close()
    finally:
        store.close()
