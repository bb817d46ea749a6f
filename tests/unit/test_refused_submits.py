"""What a submit leaves that was claimed ahead, and refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cortex.engines.local import LocalEngine
from cortex.operator.dispatch import admission
from cortex.operator.dispatch.live_jobs import LiveJobs
from cortex.store import InitialClaim
from unit.test_store import draft


@pytest.mark.parametrize("laid_out", [[], ["log", "job.json"]])
def test_the_folder_of_a_job_that_there_never_was_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, laid_out: list[str]
) -> None:
    job = draft()
    none: Any = None
    engine = LocalEngine(tmp_path)

    async def refuse() -> None:
        board = LiveJobs(none)
        claim = InitialClaim("1", engine.claim(job.job_id, 1))
        for name in laid_out:
            (tmp_path / job.job_id / name).touch()
        waiting = admission.Admission(board, engine, none)
        waiting.storing(claim)
        waiting.stored(job, claim, is_claimed=False, is_refused=True)
        await board.tasks.finish()

    monkeypatch.setattr(admission, "_LAID_OUT_S", 0)
    asyncio.run(refuse())
    assert not list(tmp_path.iterdir())
