"""What a claim leaves that was made before its submit was stored, when the submit is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cortex.engines.local import LocalEngine
from cortex.joblog.folders import JobFolders
from cortex.operator.dispatch import starter
from cortex.operator.dispatch.live_jobs import LiveJobs
from cortex.system.background import Background
from store.store_harness import draft


@pytest.mark.parametrize("files", [[], ["log", "job.json"]])
def test_the_folder_of_a_refused_job_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    job = draft()
    unused: Any = None
    engine = LocalEngine(tmp_path)

    async def refuse() -> None:
        background = Background("failed")
        starts = starter.Starter(
            LiveJobs(unused, unused), engine, unused, unused, JobFolders(tmp_path), background
        )
        engine.claim(job.job_id, 1)
        for name in files:
            (tmp_path / job.job_id / name).touch()
        starts.cancel_claim(job, is_refused=True)
        await background.finish()

    monkeypatch.setattr(starter, "_FOLDER_GRACE_S", 0)
    asyncio.run(refuse())
    assert not list(tmp_path.iterdir())
