"""What an engine has to run jobs on: the ledger that every engine keeps, and the words for what is
lacking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from cortex.engines.base import Capacity, NodeInfo
from cortex.spec.api import Compute
from cortex.spec.quantities import MILLI
from cortex.worker.messages import size


class CapacityLedger(Protocol):
    """Which job has reserved what. It counts what jobs ask for, not what they use.

    All methods are called on the event loop, and do not block it. The ledger is in memory alone: after
    a restart it is empty, and `Engine.recover` counts the capacity of each attempt again. The engine
    itself gives back a job's capacity before it reports the end of the attempt.
    """

    def refusal(self, compute: Compute) -> str | None:
        """Why the engine could never run this ("needs 8 GPUs, this machine has 2"); None if it could.

        Call it at any time while the engine is open. Changes nothing. The answer may become None when
        a larger machine joins.
        """

    def reserve(self, job_id: str, compute: Compute) -> str | None:
        """Reserve capacity for a job; None. If too little is free, reserve nothing and return what is
        lacking ("needs 32 GiB, 31 GiB free"); the engine then reports CapacityFreed once more may be
        free.

        Call it before `Engine.claim`. A second call for a job with a reservation changes nothing and
        returns None.
        """

    def release(self, job_id: str) -> None:
        """Give back what `reserve` took and undo what `Engine.prepare` did, for a job that is not going
        to be started. Reports CapacityFreed if a reservation was refused before.

        Call it instead of `Engine.start`. It has no effect on a job without a reservation; a second
        call therefore has none.
        """

    def nodes(self) -> list[NodeInfo]:
        """The machines that jobs run on now, and what is free on each. Changes nothing."""


def lacking(compute: Compute, most: Capacity, words: str) -> str | None:
    """What is lacking for a job, or None.

    Args:
        most: the amount of each kind that is available.
        words: for that amount, with a placeholder for it: "{} free".
    """
    found = []
    if compute.cpu_m > most.cpu_m:
        cpu = f"{max(0, most.cpu_m) / MILLI:g}"
        found.append(f"needs {_cpu(compute)}, {words.format(cpu)}")
    if compute.mem is not None and compute.mem > most.mem:
        found.append(f"needs {size(compute.mem)}, {words.format(size(max(0, most.mem)))}")
    if compute.gpu > most.gpu:
        found.append(f"needs {_gpus(compute)}, {words.format(max(0, most.gpu))}")
    return "; ".join(found) or None


def fits(compute: Compute, available: Capacity) -> bool:
    """Whether enough of each kind is available."""
    return (
        compute.cpu_m <= available.cpu_m
        and (compute.mem or 0) <= available.mem
        and compute.gpu <= available.gpu
    )


def amounts(compute: Compute) -> str:
    """The capacity that a job takes: "4 CPU and 4 GiB"."""
    wanted = [_cpu(compute), *([size(compute.mem)] if compute.mem else [])]
    return " and ".join([*wanted, *([_gpus(compute)] if compute.gpu else [])])


def selects(wanted: Mapping[str, tuple[str, ...]], labels: Mapping[str, str]) -> bool:
    """Whether a job with these `compute.node_labels` may run on a node with these labels."""
    return all(labels.get(name) in values for name, values in wanted.items())


def label_words(wanted: Mapping[str, tuple[str, ...]]) -> str:
    """The labels that a job asks for: "zone=a, disk=ssd or nvme"."""
    return ", ".join(f"{name}={' or '.join(values)}" for name, values in wanted.items())


def _cpu(compute: Compute) -> str:
    return f"{compute.cpu_m / MILLI:g} CPU"


def _gpus(compute: Compute) -> str:
    return f"{compute.gpu} GPU{'s' * (compute.gpu > 1)}"
