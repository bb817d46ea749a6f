"""What this machine has, and who has taken what of it. Called by the local engine alone."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Capacity
from cortex.engines.capacity import label_words, lacking
from cortex.spec.api import MILLI, Compute


def detect() -> Capacity:
    """The cores that this process may run on, memory within its control group, NVIDIA GPUs."""
    return Capacity(cpu_m=len(os.sched_getaffinity(0)) * MILLI, mem=_memory(), gpu=_gpus())


@dataclass(frozen=True)
class Share:
    """What one job has taken."""

    amount: Capacity
    gpus: tuple[int, ...]


class Ledger:
    """Accounts for `total`: by what was asked for, not by what is used."""

    def __init__(self, total: Capacity) -> None:
        self.total = total
        self.free = total
        self._shares: dict[str, Share] = {}
        self._refused = False

    def refusal(self, compute: Compute) -> str | None:
        """Why this never fits, or None."""
        if compute.node_labels:
            return (
                f"needs a node with {label_words(compute.node_labels)}: labels are those of a cluster's "
                "nodes, and this operator runs jobs on its own machine"
            )
        return lacking(compute, self.total, "this machine has {}")

    def take(self, job_id: str, compute: Compute) -> str | None:
        """Take a share, or say what is lacking and take nothing."""
        if job_id in self._shares:
            return None
        too_little = lacking(compute, self.free, "{} free")
        if too_little is not None:
            self._refused = True
            return too_little
        self._give(job_id, compute, self._free_gpus(compute.gpu))
        return None

    def hold(self, job_id: str, compute: Compute, gpus: list[int]) -> None:
        """Take what a recovered job has already, even if that is more than there is now."""
        self._give(job_id, compute, gpus or self._free_gpus(compute.gpu))

    def gpus(self, job_id: str) -> list[int]:
        share = self._shares.get(job_id)
        return list(share.gpus) if share else []

    def release(self, job_id: str) -> bool:
        """Give a share back; True if somebody was refused before and may fit now."""
        share = self._shares.pop(job_id, None)
        if share is None:
            return False
        self.free += share.amount
        refused, self._refused = self._refused, False
        return refused

    def _give(self, job_id: str, compute: Compute, gpus: list[int]) -> None:
        amount = Capacity(compute.cpu_m, compute.mem or 0, len(gpus))
        self._shares[job_id] = Share(amount, tuple(gpus))
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
