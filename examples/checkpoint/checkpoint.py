"""Works in steps for a minute. A stop makes it save a checkpoint, where the next job resumes."""

import json
import os
import signal
import time
from pathlib import Path

from cortex.logger import logger


class Task:
    def __init__(self):
        self.stop = False
        signal.signal(signal.SIGTERM, self.on_sigterm)

    def on_sigterm(self, signum, frame):
        # Only set a flag: a handler can interrupt the work in the middle of a step.
        self.stop = True

    def __call__(self, config):
        done, loss = resume(config["checkpoint"])
        while done < config["steps"] and not self.stop:
            time.sleep(config["interval_s"])
            done, loss = done + 1, loss * 0.95
            logger.info(f"step {done} of {config['steps']}, loss {loss:.4f}")
        path = save(done, loss)
        if self.stop:
            logger.info(f"stopped: the checkpoint of step {done} is in {path}")
            raise SystemExit(128 + signal.SIGTERM)
        return {"steps": done, "loss": loss, "checkpoint": str(path)}


def resume(checkpoint):
    if checkpoint is None:
        return 0, 1.0
    saved = json.loads(Path(checkpoint).read_text())
    logger.info(f"resuming after step {saved['steps']}")
    return saved["steps"], saved["loss"]


def save(done, loss):
    path = Path(os.environ.get("CORTEX_JOB_DIR", ".")).resolve() / "checkpoint.json"
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps({"steps": done, "loss": loss}))
    half.replace(path)
    return path
