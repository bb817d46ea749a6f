"""Retention while a part of the operator fails, or another operator deploys."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cortex.engines.local import LocalEngine
from cortex.errors import StorageUnavailable
from cortex.operator import retention
from cortex.operator.checkpoints import Checkpoints
from cortex.operator.config.settings import RetentionLimits, Settings
from cortex.operator.data_folder import make_folders
from cortex.operator.deploy.versions import Versions
from cortex.operator.retention import Retention
from cortex.projects.environments import Environments
from cortex.projects.repository import Projects
from cortex.spec.api import ApiSpec
from cortex.store import Store


class Parts:
    """The parts of an operator that retention uses; ended jobs expire after a millisecond."""

    def __init__(self, folder: Path) -> None:
        self.settings = settings = Settings(folder, retention=RetentionLimits(jobs_s=0.001))
        make_folders(settings)
        self.store = Store(settings.database_url)
        self.projects = Projects(settings.projects, settings.locks)
        self.environments = Environments(settings.environments, projects=self.projects)
        self.versions = Versions(self.store, self.projects, self.environments)
        self.checkpoints: Checkpoints | None = None

    def retention(self) -> Retention:
        return Retention(
            self.settings, self.store, LocalEngine(self.settings.jobs), self.versions,
            self.projects, self.environments, None, self.checkpoints,
        )  # fmt: skip

    def add_project(self, content: str) -> str:
        """Store a project, as a deploy does."""
        with self.projects.incoming() as incoming:
            incoming.mkdir()
            (incoming / "a.py").write_text(content)
            return self.projects.add_project(incoming)

    def project_folders(self) -> set[str]:
        return {folder.name for folder in self.settings.projects.iterdir()}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    monkeypatch.setattr(retention, "_MIN_INTERVAL_S", 0.01)
    made = Parts(tmp_path)
    yield made
    made.store.close()


def test_an_unexpected_error_is_logged_and_the_next_round_runs(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, rounds = parts.store.jobs_ended, 0

    async def main() -> None:
        second_round = asyncio.Event()

        async def fails_once(before_ns: int, most: int) -> list[str]:
            nonlocal rounds
            rounds += 1
            if rounds == 1:
                raise ZeroDivisionError("unexpected")
            second_round.set()
            return await ended(before_ns, most)

        monkeypatch.setattr(parts.store, "jobs_ended", fails_once)
        removal = parts.retention()
        await removal.open()
        async with asyncio.timeout(30):
            await second_round.wait()
        await removal.close()

    with capture_logs() as logs:
        asyncio.run(main())
    [error] = [entry for entry in logs if entry["log_level"] == "error"]
    assert error["event"] == "retention failed"
    assert str(error["exc_info"]) == "unexpected"


@pytest.mark.parametrize("days", [1e6, 1e300])
def test_a_time_to_keep_that_is_longer_than_the_store_can_count_keeps_everything(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, days: float
) -> None:
    age_s = days * 86_400
    parts.settings = replace(
        parts.settings, retention=RetentionLimits(jobs_s=age_s, logs_s=age_s, audit_s=age_s)
    )
    trim_audit = parts.store.trim_audit

    async def main() -> None:
        is_trimmed = asyncio.Event()

        async def trim(before_ns: int | None) -> None:
            await trim_audit(before_ns)
            is_trimmed.set()

        monkeypatch.setattr(parts.store, "trim_audit", trim)
        removal = parts.retention()
        await removal.open()
        async with asyncio.timeout(30):
            await is_trimmed.wait()
        await removal.close()

    with capture_logs() as logs:
        asyncio.run(main())
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == []


def test_a_closed_retention_stops_before_the_next_project(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        parts.add_project(str(number))
    move_to_trash = parts.projects.move_to_trash
    is_moving, may_move = threading.Event(), threading.Event()

    def move_slowly(identity: str, used_ns: int) -> None:
        is_moving.set()
        assert may_move.wait(30)
        move_to_trash(identity, used_ns)

    monkeypatch.setattr(parts.projects, "move_to_trash", move_slowly)

    async def main() -> None:
        removal = parts.retention()
        await removal.open()
        assert await asyncio.to_thread(is_moving.wait, 30)
        await removal.close()
        may_move.set()
        # `asyncio.run` waits for the loop's threads.

    asyncio.run(main())
    assert len([name for name in parts.project_folders() if not name.startswith(".")]) == 2


def test_a_project_that_another_operator_deploys_during_a_round_stays(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity, other = parts.add_project("x = 1"), parts.add_project("x = 2")
    parts.projects.save_lockfile(identity, "one.lock", "six==1.0\n")
    all_versions = parts.store.all_versions

    async def main() -> None:
        # This operator paused for so long that another one has got the deploy lock.
        async def read_before_a_deploy() -> list[ApiSpec]:
            old = await all_versions()
            assert parts.add_project("x = 1") == identity
            return old

        monkeypatch.setattr(parts.store, "all_versions", read_before_a_deploy)
        removal = parts.retention()
        await removal.open()
        async with asyncio.timeout(30):
            while any(other in name for name in parts.project_folders()):  # noqa: ASYNC110  # no event reports it
                await asyncio.sleep(0.01)
        await removal.close()

    asyncio.run(main())
    assert parts.project_folders() == {identity}
    assert parts.projects.locks(identity) == {"one.lock": "six==1.0\n"}


def test_checkpoints_go_before_their_jobs(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parts.settings.checkpoints
    for job_id in ("old", "young"):
        (folder / job_id).write_text("checkpoint")
    parts.checkpoints = Checkpoints(folder, None)
    remove, failures = parts.checkpoints.remove, [StorageUnavailable("away")]

    def fail_once(job_ids: Sequence[str]) -> None:
        if failures:
            raise failures.pop()
        remove(job_ids)

    monkeypatch.setattr(parts.checkpoints, "remove", fail_once)
    ended = ["old"]

    async def main() -> None:
        is_removed = asyncio.Event()

        async def jobs_ended(before_ns: int, most: int) -> list[str]:
            return list(ended)

        async def remove_jobs(job_ids: list[str]) -> None:
            assert not (folder / "old").exists()
            ended.clear()
            is_removed.set()

        monkeypatch.setattr(parts.store, "jobs_ended", jobs_ended)
        monkeypatch.setattr(parts.store, "remove_jobs", remove_jobs)
        removal = parts.retention()
        await removal.open()
        async with asyncio.timeout(30):
            await is_removed.wait()
        await removal.close()

    asyncio.run(main())
    assert [path.name for path in folder.iterdir()] == ["young"]
    assert failures == []
