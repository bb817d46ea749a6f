"""RQ: two workers, a fork for each job, behind FastAPI (`rq_app`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peers import common
from peers.redis_server import redis
from service import Service

WORKERS = 2


class Rq(Service):
    """A running RQ."""

    name = "RQ"
    max_running = WORKERS

    def __init__(self, url: str) -> None:
        self.url = url

    def result(self, answer: bytes) -> Any:
        job = json.loads(answer)
        if job["status"] == "failed":
            raise RuntimeError(f"a job did not succeed: {job}")
        return job["result"] if job["status"] == "finished" else None


@contextmanager
def opened(folder: Path) -> Iterator[Service]:
    """RQ with its Redis, workers and endpoint, while the block runs."""
    with ExitStack() as stack:
        socket = stack.enter_context(redis(folder))
        env = {"BENCH_REDIS": socket}
        command = [
            "rq", "worker", "--url", f"unix://{socket}", "--logging_level", "WARNING", "noop",
            "sleeper",
        ]  # fmt: skip
        for _ in range(WORKERS):
            stack.enter_context(common.worker(command, folder, env))
        service = Rq(stack.enter_context(common.endpoint("peers.rq_app:app", folder, env)))
        common.warm_up(service)
        yield service
