"""The names of the figures and of their subjects."""

from __future__ import annotations

import os
from dataclasses import dataclass

CORES = len(os.sched_getaffinity(0))

OURS = "ours"
WAITING = 100
BEHIND_WAITING = f"{OURS}, {WAITING} jobs waiting"
ALL_CORES = "supervised fork on all cores"
ONE_CORE = "supervised fork on one core"
PEERS = ("RQ", "Celery", "Ray Jobs")
INTERPRETER = "python -c pass"
ECHO = "echo endpoint, same server"
BARE_ECHO = "bare echo, same server, no framework"
COMMITS = "rows in synced commits of 16"
SIZES = {"1 thousand": 1_000, "100 thousand": 100_000, "1 million": 1_000_000}
FEW, *_, MANY = SIZES
ON_POSTGRESQL = f"{OURS}, on PostgreSQL"
IMPORTED_BY_EACH = f"{OURS}, imported by each job"
IMPORTED_AHEAD = f"{OURS}, imported ahead"


@dataclass(frozen=True)
class Kind:
    """The title and unit of a figure."""

    title: str
    unit: str
    more_is_better: bool = False


KINDS = {
    "submit": Kind("Submits at 16 connections, durable", "/s", more_is_better=True),
    "end-to-end": Kind("No-op jobs, submitted to final", "/s", more_is_better=True),
    "first-line-p50": Kind("Submit to first line, p50", "ms"),
    "first-line-p99": Kind("Submit to first line, p99", "ms"),
    "stop": Kind("Stop to exit", "ms"),
    "idle-memory": Kind("Memory when idle, all processes (PSS)", "MB"),
    "idle-operator": Kind("Memory when idle, the operator's process (PSS)", "MB"),
    "idle-others": Kind("Memory when idle, fork server and supervisors (PSS)", "MB"),
    "idle-after-burst": Kind("Memory a second after a burst of jobs (PSS)", "MB"),
    "crowd-starts": Kind("Many jobs at once, started", "/s", more_is_better=True),
    "crowd-stops": Kind("Many jobs at once, stopped", "/s", more_is_better=True),
    "crowd-memory": Kind("Memory of each running job beyond its own process (PSS)", "MB"),
    "crowd-own-memory": Kind("Memory of each running job's own process (PSS)", "MB"),
    "stored-submit": Kind("Submits beside stored jobs", "/s", more_is_better=True),
    "stored-end-to-end": Kind("No-op jobs beside stored jobs", "/s", more_is_better=True),
    "stored-first-line": Kind("Submit to first line beside stored jobs, p50", "ms"),
    "stored-status": Kind("Statuses of stored jobs at 16 connections", "/s", more_is_better=True),
    "stored-status-p99": Kind("Status of a stored job at 16 connections, p99", "ms"),
    "stored-start-up": Kind("Start of an operator with stored jobs", "s"),
    "imports-first-line": Kind("Submit to first line after importing scikit-learn, p50", "ms"),
    "imports-end-to-end": Kind(
        "Jobs that import scikit-learn, submitted to final", "/s", more_is_better=True
    ),
    "imports-memory": Kind("Memory of each running job with scikit-learn (PSS)", "MB"),
    "aged-end-to-end": Kind("No-op jobs where files were just removed", "/s", more_is_better=True),
    "aged-first-line": Kind("Submit to first line where files were just removed, p50", "ms"),
    "stores-end-to-end": Kind(
        "No-op jobs on each kind of store, submitted to final", "/s", more_is_better=True
    ),
    "stores-first-line": Kind("Submit to first line on each kind of store, p50", "ms"),
    "engine-first-line": Kind("Submit to first line, p50", "ms"),
    "engine-end": Kind("Submit to the answer that the job is final, p50", "ms"),
    "engine-end-to-end": Kind("No-op jobs, submitted to final", "/s", more_is_better=True),
    "engine-load": Kind("Load of the machine in the last minute", "processes"),
    "forks": Kind("Fork and exit", "/s", more_is_better=True),
}
IDLE = [name for name in KINDS if name.startswith("idle-")]
IMPORTS = [name for name in KINDS if name.startswith("imports-")]
AGED = [name for name in KINDS if name.startswith("aged-")]
STORES = [name for name in KINDS if name.startswith("stores-")]
STORED = [name for name in KINDS if name.startswith("stored-")]

PICTURES: dict[str, tuple[str, list[str]]] = {
    "end-to-end": ("Throughput", ["end-to-end"]),
    "aged": ("On an aged folder", AGED),
    "imports": ("With scikit-learn", IMPORTS),
    "submit": ("Submits", ["submit"]),
    "first-line": ("First line", ["first-line-p50", "first-line-p99"]),
    "stop": ("Stop", ["stop"]),
    "stores": ("On each kind of store", STORES),
    "stored": ("With many jobs stored", STORED),
    "crowd": ("Many jobs at once", ["crowd-starts", "crowd-stops"]),
    "memory": (
        "Memory",
        [*IDLE, "crowd-memory", "crowd-own-memory"],
    ),
    "forks": ("Bare forks", ["forks"]),
}
