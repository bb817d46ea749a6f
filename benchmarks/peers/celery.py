"""Celery: a prefork worker with two processes and late acknowledgement, behind FastAPI
(`celery_app`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peers import common
from peers.redis_server import redis
from service import Service

PROCESSES = 2


class Celery(Service):
    """A running Celery."""

    name = "Celery"
    max_running = PROCESSES

    def __init__(self, url: str) -> None:
        self.url = url

    def result(self, answer: bytes) -> Any:
        job = json.loads(answer)
        if job["status"] == "FAILURE":
            raise RuntimeError(f"a job did not succeed: {job}")
        return job["result"] if job["status"] == "SUCCESS" else None


@contextmanager
def opened(folder: Path) -> Iterator[Service]:
    """Celery with its Redis, worker and endpoint, while the block runs."""
    with ExitStack() as stack:
        env = {"BENCH_REDIS": stack.enter_context(redis(folder))}
        command = [
            "celery", "--app", "peers.celery_app:celery", "worker", "--pool", "prefork",
            "--concurrency", str(PROCESSES), "--queues", "noop,sleeper", "--loglevel", "WARNING",
        ]  # fmt: skip
        stack.enter_context(common.worker(command, folder, env))
        celery = Celery(stack.enter_context(common.endpoint("peers.celery_app:app", folder, env)))
        common.warm_up(celery)
        yield celery
