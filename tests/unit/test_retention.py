"""What retention does where something fails, or somebody deploys, while it removes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cortex.engines.local import LocalEngine
from cortex.operator import retention
from cortex.operator.context import Context
from cortex.operator.folder import make_folders
from cortex.operator.render import Renderer
from cortex.operator.retention import Retention
from cortex.operator.settings import Keep, Settings
from cortex.operator.shared import SharedJobs
from cortex.operator.versions import Versions
from cortex.projects.environments import Environments
from cortex.projects.kept import Projects
from cortex.store import Store


class Parts:
    """Of an operator that keeps nothing long."""

    def __init__(self, folder: Path) -> None:
        settings = Settings(folder, keep=Keep(jobs_s=0.001))
        make_folders(settings)
        none: Any = None
        self.store = Store(settings.database_url)
        self.projects = Projects(settings.projects, settings.locks)
        self.environments = Environments(settings.environments, projects=self.projects)
        versions = Versions(self.store, self.projects, self.environments)
        jobs = SharedJobs(self.store, lambda: None, lambda: None)
        self.context = Context(
            settings, self.store, LocalEngine(settings.jobs), versions, jobs,
            Renderer(self.store, jobs), none, self.projects, self.store.in_turn(),
        )  # fmt: skip

    def retention(self) -> Retention:
        return Retention(self.context, self.environments)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    monkeypatch.setattr(retention, "_SOONEST_S", 0.01)
    made = Parts(tmp_path)
    yield made
    made.store.close()


def test_a_round_that_fails_as_nobody_thought_of_is_logged_and_the_next_one_comes(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, rounds = parts.store.jobs_ended, 0

    async def main() -> None:
        came = asyncio.Event()

        async def fails_once(before_ns: int, most: int) -> list[str]:
            nonlocal rounds
            rounds += 1
            if rounds == 1:
                raise ZeroDivisionError("nobody thought of this")
            came.set()
            return await ended(before_ns, most)

        monkeypatch.setattr(parts.store, "jobs_ended", fails_once)
        removal = parts.retention()
        await removal.open()
        async with asyncio.timeout(30):
            await came.wait()
        await removal.close()

    with capture_logs() as logs:
        asyncio.run(main())
    [told] = [entry for entry in logs if entry["log_level"] == "error"]
    assert told["event"] == "retention failed"
    assert str(told["exc_info"]) == "nobody thought of this"
