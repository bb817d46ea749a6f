"""Structured logs for tasks: `from cortex.logger import logger`. JSON lines on standard output, which
in a job is its log; works outside a job too. Standard library alone: it runs in the user's environment.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "timestamp": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            # Read for each record: a fork server imports this once for many jobs.
            "api_name": os.environ.get("CORTEX_API_NAME"),
            "job_id": os.environ.get("CORTEX_JOB_ID"),
        }
        line.update((k, v) for k, v in vars(record).items() if k not in _STANDARD)
        if record.exc_info:
            line["exc_info"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack_info"] = record.stack_info
        return json.dumps(line, default=str)


class _Stdout(logging.Handler):
    """Whatever standard output is when a line is written, not when this was imported."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stdout.write(self.format(record) + "\n")
            sys.stdout.flush()
        except Exception:  # noqa: BLE001, RUF100  # logging must not fail a task
            self.handleError(record)


def _rfc3339(seconds: float) -> str:
    micros = round(seconds * 1_000_000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(micros // 1_000_000))
    return f"{whole}.{micros % 1_000_000:06d}Z"


def _configured() -> logging.Logger:
    found = logging.getLogger("cortex")
    found.propagate = False
    level = logging.getLevelName(os.environ.get("CORTEX_LOG_LEVEL", "info").upper())
    found.setLevel(level if isinstance(level, int) else logging.INFO)
    if not any(isinstance(h, _Stdout) for h in found.handlers):
        handler = _Stdout()
        handler.setFormatter(_JsonLines())
        found.addHandler(handler)
    return found


logger = _configured()
