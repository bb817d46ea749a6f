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


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (b"\xff\xfe", ".env: not UTF-8 text; save it as UTF-8"),
        (b"A=x\0y\n", ".env:1: A: holds a NUL character"),
    ],
)
def test_a_version_whose_variables_a_job_has_spoilt_is_told_so(
    tmp_path: Path, written: bytes, reason: str
) -> None:
    async def main() -> None:
        for folder in ("projects", "locks"):
            (tmp_path / folder).mkdir()
        projects = Projects(tmp_path / "projects", tmp_path / "locks")
        store = Store(f"sqlite:///{tmp_path / 'operator.db'}")
        try:
            spec = taken_in(projects)
            (projects.folder(spec.project_id) / ".env").write_bytes(written)
            await store.deploy([spec])
            with pytest.raises(Unusable) as raised:
                await Versions(store, projects, None).prepare("v1")
            assert raised.value.reason == reason
        finally:
            store.close()

    asyncio.run(main())


def taken_in(projects: Projects) -> ApiSpec:
    with projects.incoming() as incoming:
        incoming.mkdir()
        (incoming / "task.py").write_text("def task(config): pass\n")
        identity = projects.take_in(incoming)
    return ApiSpec(
        name="a",
        kind="TaskAPI",
        definition=Definition(path="task.py"),
        networking=Networking(endpoint="a"),
        api_id="v1",
        project_id=identity,
        last_updated="2026-01-01T00:00:00.000000000Z",
    )


async def _check(tmp_path: Path) -> None:
    shelf, data = tmp_path / "shelf", tmp_path / "data"
    for folder in (shelf, data / "projects", data / "locks"):
        folder.mkdir(parents=True)
    projects = Projects(data / "projects", data / "locks", Files(f"file://{shelf}"))
    spec = taken_in(projects)
    (data / "projects" / spec.project_id).rename(tmp_path / "taken-away")
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
