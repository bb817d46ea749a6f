"""The capacity of this machine, and the ledger of what jobs have reserved of it. Called by the
local engine; the operator calls the ledger.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Capacity, NodeInfo
from cortex.engines.capacity import (
    NO_HOLDS,
    Hold,
    Holds,
    capacity_of,
    fits,
    label_text,
    lacking,
)
from cortex.spec.api import Compute
from cortex.spec.quantities import MILLI

_NUMBER = 0  # of the only machine, in its holds


def detect() -> Capacity:
    """The cores that this process may use, the memory of its control group, the NVIDIA GPUs."""
    return Capacity(cpu_m=len(os.sched_getaffinity(0)) * MILLI, mem=_memory(), gpu=_gpus())


@dataclass(frozen=True)
class _Share:
    """What a job has reserved."""

    amount: Capacity
    gpus: tuple[int, ...]


class MachineLedger:
    """The `CapacityLedger` of one machine. GPUs have indices, and no two jobs share one."""

    def __init__(
        self,
        total: Capacity,
        undo_prepare: Callable[[str], object] = lambda _: None,
        report_freed: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Args:
            undo_prepare: called with the job whose reservation `release` removes.
            report_freed: called when `release` has freed capacity and a reservation was refused
                before.
        """
        self.total = total
        self.free = total
        self._undo_prepare = undo_prepare
        self._report_freed = report_freed
        self._shares: dict[str, _Share] = {}
        self._has_refused = False

    def set_total(self, total: Capacity) -> None:
        """The machine has this capacity. Reservations stay."""
        self.free += total - self.total
        self.total = total

    def refusal(self, compute: Compute) -> str | None:
        """See `CapacityLedger.refusal`."""
        if compute.node_labels:
            return (
                f"needs a node with {label_text(compute.node_labels)}: labels are those of a "
                "cluster's nodes, and this operator runs jobs on its own machine"
            )
        return lacking(compute, self.total, "this machine has {}")

    def can_run(self, compute: Compute) -> bool:
        """See `CapacityLedger.can_run`."""
        return fits(compute, self.total)

    def reserve(self, job_id: str, compute: Compute, holds: Holds = NO_HOLDS) -> str | Hold | None:
        """See `CapacityLedger.reserve`."""
        if job_id in self._shares:
            return None
        if not fits(compute, holds.left_of(_NUMBER, self.free)):
            self._has_refused = True
            return self.lacks(compute) or next(iter(holds))
        self._share(job_id, compute, self._free_gpus(compute.gpu))
        return None

    def hold(self, job_id: str, compute: Compute, holds: Holds, kept: Hold | None) -> Hold:
        """See `CapacityLedger.hold`."""
        return Hold(job_id, _NUMBER, capacity_of(compute))

    def lacks(self, compute: Compute) -> str | None:
        """See `CapacityLedger.lacks`."""
        return lacking(compute, self.free, "{} free")

    def reserve_granted(self, job_id: str, compute: Compute, gpus: list[int]) -> None:
        """Count what a job was granted before or elsewhere, by an earlier operator or by Ray, even
        if that exceeds what is free.

        Args:
            gpus: the indices of the job's GPUs, if they are known.
        """
        self.remove_reservation(job_id)
        self._share(job_id, compute, gpus or self._free_gpus(compute.gpu))

    def gpus(self, job_id: str) -> list[int]:
        """The indices of a job's GPUs."""
        share = self._shares.get(job_id)
        return list(share.gpus) if share else []

    def release(self, job_id: str) -> None:
        """See `CapacityLedger.release`."""
        self._undo_prepare(job_id)
        if self.remove_reservation(job_id) and self.pop_refused():
            self._report_freed()

    def remove_reservation(self, job_id: str) -> bool:
        """Remove the reservation of a job; whether it had one."""
        share = self._shares.pop(job_id, None)
        if share is None:
            return False
        self.free += share.amount
        return True

    def pop_refused(self) -> bool:
        """Whether a reservation was refused since the last call."""
        has_refused, self._has_refused = self._has_refused, False
        return has_refused

    def nodes(self) -> list[NodeInfo]:
        """See `CapacityLedger.nodes`."""
        return [NodeInfo(platform.node(), True, self.total, self.free)]

    def _share(self, job_id: str, compute: Compute, gpus: list[int]) -> None:
        amount = Capacity(compute.cpu_m, compute.mem or 0, len(gpus))
        self._shares[job_id] = _Share(amount, tuple(gpus))
        self.free -= amount

    def _free_gpus(self, number: int) -> list[int]:
        if not number:
            return []
        taken = {index for share in self._shares.values() for index in share.gpus}
        return [index for index in range(self.total.gpu) if index not in taken][:number]


def _memory() -> int:
    amounts = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            amounts.append(int(line.split()[1]) * 1024)
    # In a container the mount shows the container's own group at its top.
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            amounts.append(int(Path(name).read_text()))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    return min(amounts)


def _gpus() -> int:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
