"""The capacity that an engine runs jobs on: its ledger, and the messages about what is lacking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from cortex.engines.base import NOTHING, Capacity, NodeInfo
from cortex.spec.api import Compute
from cortex.spec.quantities import MILLI
from cortex.worker.messages import size

Selection = tuple[tuple[str, tuple[str, ...]], ...]
"""The labels that a job requires of its node, sorted."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Capacity of one machine that is kept for a waiting job. Jobs behind it get what is left.

    Attributes:
        node: the ledger's number of the machine.
    """

    job_id: str
    node: int
    amount: Capacity


class Holds:
    """The holds of waiting jobs, in the order of the jobs."""

    def __init__(self) -> None:
        self._holds: list[Hold] = []
        self._amounts: dict[int, Capacity] = {}

    def add(self, hold: Hold) -> None:
        """Add the hold of a job behind all others."""
        self._holds.append(hold)
        self._amounts[hold.node] = self._amounts.get(hold.node, NOTHING) + hold.amount

    def __iter__(self) -> Iterator[Hold]:
        return iter(self._holds)

    def left_of(self, node: int, free: Capacity) -> Capacity:
        """What the holds leave of a machine's free capacity; less than nothing where it lacks."""
        held = self._amounts.get(node)
        return free if held is None else free - held


NO_HOLDS = Holds()


class CapacityLedger(Protocol):
    """The reservations of all jobs: the capacity that they request, not what they use.

    All methods are called on the event loop, and do not block it. The ledger is in memory alone:
    after a restart it is empty, and `Engine.recover` counts the capacity of each attempt again. The
    engine itself gives back a job's capacity before it reports the end of the attempt.
    """

    def refusal(self, compute: Compute) -> str | None:
        """Why the engine could never run this ("needs 8 GPUs, this machine has 2"), or None.

        Call it at any time while the engine is open. Changes nothing. The answer may become None
        when a larger machine joins.
        """

    def can_run(self, compute: Compute) -> bool:
        """Whether a machine that is ready now could run this, if it ran nothing else.

        Changes nothing. Where it is False, the engine reports CapacityFreed when a machine joins.
        """

    def reserve(self, job_id: str, compute: Compute, holds: Holds = NO_HOLDS) -> str | Hold | None:
        """Reserve capacity for a job.

        Call it before `Engine.claim`. A second call for a job with a reservation changes nothing
        and returns None.

        Args:
            holds: what the job must leave to others.

        Returns:
            None, or what is lacking, as `lacks` says it, or the first hold without which the job
            might fit. Nothing is reserved then, and the engine reports CapacityFreed when more may
            be free.
        """

    def hold(self, job_id: str, compute: Compute, holds: Holds, kept: Hold | None) -> Hold:
        """Choose the machine that a job which does not fit waits for. Reserves nothing.

        Call it where `can_run`. Once the jobs that run on the machine have ended, the job fits on
        it, if the jobs that start meanwhile leave the hold free.

        Args:
            holds: those of jobs before this one.
            kept: the job's hold until now. Its machine is chosen again while it can run the job:
                otherwise the job could wait for each machine in turn, and never start.
        """

    def lacks(self, compute: Compute) -> str | None:
        """What is lacking for a job now ("needs 32 GiB, 31 GiB free"), or None. Holds count as
        free. Changes nothing."""

    def release(self, job_id: str) -> None:
        """Release the reservation of a job that will not be started, and undo `Engine.prepare`.

        It reports CapacityFreed if a reservation was refused before. Call it instead of
        `Engine.start`. It has no effect on a job without a reservation.
        """

    def nodes(self) -> list[NodeInfo]:
        """The machines that jobs run on now, and the free capacity of each."""


def lacking(compute: Compute, available: Capacity, template: str) -> str | None:
    """What is lacking for a job, or None.

    Args:
        available: the amount of each kind that is available.
        template: the message about that amount, with a placeholder for it: "{} free".
    """
    found = []
    if compute.cpu_m > available.cpu_m:
        cpu = f"{max(0, available.cpu_m) / MILLI:g}"
        found.append(f"needs {_cpu(compute)}, {template.format(cpu)}")
    if compute.mem is not None and compute.mem > available.mem:
        found.append(f"needs {size(compute.mem)}, {template.format(size(max(0, available.mem)))}")
    if compute.gpu > max(0, available.gpu):
        found.append(f"needs {_gpus(compute)}, {template.format(max(0, available.gpu))}")
    return "; ".join(found) or None


def fits(compute: Compute, available: Capacity) -> bool:
    """Whether enough of each requested kind is available. Recovered jobs may have more than there
    is of another kind."""
    return (
        compute.cpu_m <= available.cpu_m
        and (not compute.mem or compute.mem <= available.mem)
        and (not compute.gpu or compute.gpu <= available.gpu)
    )


def capacity_of(compute: Compute) -> Capacity:
    """The capacity that a job takes."""
    return Capacity(compute.cpu_m, compute.mem or 0, compute.gpu)


def selection_of(compute: Compute) -> Selection:
    """The nodes on which a job may run: its `compute.node_labels`."""
    return tuple(sorted(compute.node_labels.items())) if compute.node_labels else ()


def amounts(compute: Compute) -> str:
    """The capacity that a job takes: "4 CPU and 4 GiB"."""
    requested = [_cpu(compute), *([size(compute.mem)] if compute.mem else [])]
    return " and ".join([*requested, *([_gpus(compute)] if compute.gpu else [])])


def selects(requested: Mapping[str, tuple[str, ...]], labels: Mapping[str, str]) -> bool:
    """Whether a job with these `compute.node_labels` may run on a node with these labels."""
    return all(labels.get(name) in values for name, values in requested.items())


def label_text(requested: Mapping[str, tuple[str, ...]]) -> str:
    """The labels that a job requests: "zone=a, disk=ssd or nvme"."""
    return ", ".join(f"{name}={' or '.join(values)}" for name, values in requested.items())


def _cpu(compute: Compute) -> str:
    return f"{compute.cpu_m / MILLI:g} CPU"


def _gpus(compute: Compute) -> str:
    return f"{compute.gpu} GPU{'s' * (compute.gpu > 1)}"
