"""RQ's endpoint."""

from __future__ import annotations

import os
from typing import Any

import redis
import rq
import rq.command
from fastapi import FastAPI
from pydantic import BaseModel

from peers import tasks

app = FastAPI()
connection = redis.Redis(unix_socket_path=os.environ["BENCH_REDIS"])
queues = {name: rq.Queue(name, connection=connection) for name in ("noop", "later", "sleeper")}


class Submission(BaseModel):
    config: dict[str, Any] = {}


@app.post("/{name}")
def submit(name: str, submission: Submission) -> dict[str, str]:
    task = tasks.noop if name == "noop" else tasks.sleeper
    return {"job_id": queues[name].enqueue(task, submission.config).id}


@app.get("/{name}/{job_id}")
def status(name: str, job_id: str) -> dict[str, Any]:
    job = rq.job.Job.fetch(job_id, connection=connection)
    found = job.get_status(refresh=False)
    return {"status": found, "result": job.return_value() if found == "finished" else None}


@app.delete("/{name}/{job_id}")
def stop(name: str, job_id: str) -> dict[str, str]:
    rq.command.send_stop_job_command(connection, job_id)
    return {"message": f"stopped {job_id}"}
