"""A version becomes ready when its files are available, and not before."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from cortex.objects import ObjectStore
from cortex.operator.deploy.versions import VersionBlocked, Versions, VersionUnusable
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.spec.api import ApiSpec, Definition, Networking
from cortex.store import Store


def test_a_version_is_blocked_while_its_files_are_unavailable(tmp_path: Path) -> None:
    asyncio.run(_block_and_recover(tmp_path))


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (b"\xff\xfe", ".env: not UTF-8 text; save it as UTF-8"),
        (b"A=x\0y\n", ".env:1: A: the value contains a NUL character; remove it"),
    ],
)
def test_a_version_whose_dotenv_a_job_has_spoilt_is_unusable(
    tmp_path: Path, written: bytes, reason: str
) -> None:
    async def main() -> None:
        for folder in ("projects", "locks"):
            (tmp_path / folder).mkdir()
        projects = Projects(tmp_path / "projects", tmp_path / "locks")
        store = Store(f"sqlite:///{tmp_path / 'operator.db'}")
        try:
            spec = store_project(projects)
            (projects.folder(spec.project_id) / ".env").write_bytes(written)
            await store.deploy([spec])
            with pytest.raises(VersionUnusable) as raised:
                await Versions(store, projects, None).make_ready("v1")
            assert raised.value.reason == reason
        finally:
            store.close()

    asyncio.run(main())


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_temporary_lack_of_resources_blocks_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def popen(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", popen)
    with (
        deployed_version(tmp_path) as versions,
        pytest.raises(VersionBlocked, match="cannot be built now"),
    ):
        asyncio.run(versions.make_ready("v1"))


def test_a_failed_start_of_a_thread_blocks_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    async def main(versions: Versions) -> None:
        await versions.spec("v1")
        await asyncio.to_thread(lambda: None)
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))  # one that has no thread yet
        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", start)
            with pytest.raises(VersionBlocked, match="cannot be built now"):
                await versions.make_ready("v1")

    with deployed_version(tmp_path) as versions:
        asyncio.run(main(versions))


@contextmanager
def deployed_version(folder: Path) -> Iterator[Versions]:
    """The versions of an operator with one deployed version, whose environment is not built yet."""
    for name in ("projects", "locks", "environments"):
        (folder / name).mkdir()
    projects = Projects(folder / "projects", folder / "locks")
    store = Store(f"sqlite:///{folder / 'operator.db'}")
    try:
        asyncio.run(store.deploy([store_project(projects)]))
        yield Versions(store, projects, Environments(folder / "environments"))
    finally:
        store.close()


def store_project(projects: Projects) -> ApiSpec:
    with projects.incoming() as incoming:
        incoming.mkdir()
        (incoming / "task.py").write_text("def task(config): pass\n")
        identity = projects.add_project(incoming)
    return ApiSpec(
        name="a",
        kind="TaskAPI",
        definition=Definition(path="task.py"),
        networking=Networking(endpoint="a"),
        api_id="v1",
        project_id=identity,
        last_updated="2026-01-01T00:00:00.000000000Z",
    )


async def _block_and_recover(tmp_path: Path) -> None:
    objects, data = tmp_path / "objects", tmp_path / "data"
    for folder in (objects, data / "projects", data / "locks"):
        folder.mkdir(parents=True)
    projects = Projects(data / "projects", data / "locks", ObjectStore(f"file://{objects}"))
    spec = store_project(projects)
    (data / "projects" / spec.project_id).rename(tmp_path / "taken-away")
    store = Store(f"sqlite:///{tmp_path / 'operator.db'}")
    try:
        await store.deploy([spec])
        versions = Versions(store, projects, None)
        objects.rename(tmp_path / "away")
        with pytest.raises(VersionBlocked, match=r"the object store .* cannot be used"):
            await versions.make_ready("v1")
        objects.mkdir()
        with pytest.raises(VersionUnusable, match="deploy it again"):
            await versions.make_ready("v1")
        objects.rmdir()
        (tmp_path / "away").rename(objects)
        version = await versions.make_ready("v1")
        assert (version.project / "task.py").is_file()
        await versions.close()
    finally:
        store.close()
