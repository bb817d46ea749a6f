"""The asyncio client: concurrent calls and cancelled calls."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import cortex
from operator_harness import PROBE, WAIT_TIMEOUT_S, Operator

SPEC = {"kind": "TaskAPI", "compute": {"cpu": "1m"}}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, WAIT_TIMEOUT_S))


def test_jobs_are_submitted_and_awaited_concurrently(shared_operator: Operator, probe: str) -> None:
    async def test() -> None:
        async with cortex.AsyncClient(shared_operator.url) as client:

            async def done(number: int) -> object:
                job = await client.submit_job("probe", {"number": number})
                view = await client.get_job("probe", job["job_id"], wait=WAIT_TIMEOUT_S)
                result: Any = view["job_status"]["result"]
                return result["number"]

            assert await asyncio.gather(*map(done, range(8))) == list(range(8))

    run(test())


def test_long_polls_do_not_block_the_stops_that_end_them(
    shared_operator: Operator, probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cortex.sdk.transport_async._MAX_WAITING_REQUESTS", 1)
    monkeypatch.setattr("cortex.sdk.transport_async._MAX_REQUESTS", 1)

    async def test() -> None:
        async with cortex.AsyncClient(shared_operator.url) as client:
            jobs = [await client.submit_job("probe", {"do": "sleep", "s": 300}) for _ in range(3)]
            waits = [
                asyncio.create_task(client.get_job("probe", job["job_id"], wait=WAIT_TIMEOUT_S))
                for job in jobs
            ]
            await asyncio.sleep(0)
            await asyncio.gather(*(client.stop_job("probe", job["job_id"]) for job in jobs))
            ended = {view["job_status"]["status"] for view in await asyncio.gather(*waits)}
            assert ended == {"status_stopped"}

    run(test())


def test_a_cancelled_wait_ends_and_the_client_still_works(
    shared_operator: Operator, probe: str
) -> None:
    async def test() -> None:
        async with cortex.AsyncClient(shared_operator.url) as client:
            job = await client.submit_job("probe", {"do": "sleep", "s": 300})
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.get_job("probe", job["job_id"], wait=WAIT_TIMEOUT_S)
            await client.stop_job("probe", job["job_id"])

    run(test())


def test_a_log_stream_is_closed_when_its_loop_breaks(shared_operator: Operator, probe: str) -> None:
    async def test() -> None:
        async with cortex.AsyncClient(shared_operator.url) as client:
            job = await client.submit_job("probe", {"do": "sleep", "s": 300})
            async with aclosing(client.stream_job_logs("probe", job["job_id"])) as log:
                async for text in log:
                    assert text == "asleep\n"
                    break
            await client.stop_job("probe", job["job_id"])

    run(test())


def test_concurrent_deploys_each_deploy_their_own_task(shared_operator: Operator) -> None:
    def task(number: int) -> Any:
        return lambda config: number

    async def test() -> None:
        async with cortex.AsyncClient(shared_operator.url) as client:

            async def result(number: int) -> object:
                name = f"at-once-{number}"
                await client.create_api({**SPEC, "name": name}, task=task(number))
                job = await client.submit_job(name)
                view = await client.get_job(name, job["job_id"], wait=WAIT_TIMEOUT_S)
                return view["job_status"]["result"]

            assert await asyncio.gather(*map(result, range(3))) == [0, 1, 2]

    run(test())


def test_a_deploy_cancelled_while_packing_deploys_nothing(
    shared_operator: Operator, tmp_path: Path
) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    for number in range(200):
        (tmp_path / f"data-{number}").write_bytes(bytes(range(256)) * 256)
    spec = {**SPEC, "name": "cancelled", "definition": {"path": "probe.py"}}

    async def test() -> None:
        async with cortex.AsyncClient(shared_operator.url) as client:
            deploy = asyncio.create_task(client.create_api(spec, project_dir=tmp_path))
            await asyncio.sleep(0)
            deploy.cancel()
            with pytest.raises(asyncio.CancelledError):
                await deploy
            names = {api["spec"]["name"] for api in await client.list_apis()}
            assert "cancelled" not in names

    run(test())
