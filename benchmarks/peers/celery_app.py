"""Celery's tasks and endpoint; its worker imports them once, before it forks."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from fastapi import FastAPI
from pydantic import BaseModel

from peers import tasks

_REDIS = f"redis+socket://{os.environ['BENCH_REDIS']}"

app = FastAPI()
celery = Celery("bench", broker=_REDIS, backend=_REDIS)
celery.conf.task_acks_late = True
noop = celery.task(tasks.noop)
sleeper = celery.task(tasks.sleeper)


class Submission(BaseModel):
    config: dict[str, Any] = {}


@app.post("/{name}")
def submit(name: str, submission: Submission) -> dict[str, str]:
    task = noop if name == "noop" else sleeper
    return {"job_id": task.apply_async((submission.config,), queue=name).id}


@app.get("/{name}/{job_id}")
def status(name: str, job_id: str) -> dict[str, Any]:
    found = celery.AsyncResult(job_id)
    state = found.state
    return {"status": state, "result": found.result if state == "SUCCESS" else None}


@app.delete("/{name}/{job_id}")
def stop(name: str, job_id: str) -> dict[str, str]:
    celery.control.revoke(job_id, terminate=True)
    return {"message": f"stopped {job_id}"}
