"""What this machine has, and who has taken what of it. Called by the local engine alone."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cortex.engines.base import Capacity
from cortex.spec.api import MILLI, Compute
from cortex.worker.messages import size


def detect() -> Capacity:
    """The cores that this process may run on, memory within its control group, NVIDIA GPUs."""
    return Capacity(cpu_m=len(os.sched_getaffinity(0)) * MILLI, mem=_memory(), gpu=_gpus())


@dataclass(frozen=True)
class Share:
    """What one job has taken."""

    cpu_m: int
    mem: int
    gpus: tuple[int, ...]


class Ledger:
    """Accounts for `total`: by what was asked for, not by what is used."""

    def __init__(self, total: Capacity) -> None:
        self.total = total
        self._shares: dict[str, Share] = {}
        self._refused = False

    def refusal(self, compute: Compute) -> str | None:
        """Why this never fits, or None."""
        total = self.total
        return _lacking(compute, total, f"this machine has {total.gpu}", "this machine has {}")

    def take(self, job_id: str, compute: Compute) -> str | None:
        """Take a share, or say what is lacking and take nothing."""
        if job_id in self._shares:
            return None
        free = self._free()
        lacking = _lacking(compute, free, f"{max(0, free.gpu)} free", "{} free")
        if lacking is not None:
            self._refused = True
            return lacking
        gpus = tuple(self._free_gpus()[: compute.gpu])
        self._shares[job_id] = Share(compute.cpu_m, compute.mem or 0, gpus)
        return None

    def hold(self, job_id: str, compute: Compute, gpus: list[int]) -> None:
        """Take what a recovered job has already, even if that is more than there is now."""
        if not gpus:
            gpus = self._free_gpus()[: compute.gpu]
        self._shares[job_id] = Share(compute.cpu_m, compute.mem or 0, tuple(gpus))

    def gpus(self, job_id: str) -> list[int]:
        share = self._shares.get(job_id)
        return list(share.gpus) if share else []

    def release(self, job_id: str) -> bool:
        """Give a share back; True if somebody was refused before and may fit now."""
        if self._shares.pop(job_id, None) is None:
            return False
        refused, self._refused = self._refused, False
        return refused

    def _free(self) -> Capacity:
        shares = self._shares.values()
        return Capacity(
            cpu_m=self.total.cpu_m - sum(s.cpu_m for s in shares),
            mem=self.total.mem - sum(s.mem for s in shares),
            gpu=self.total.gpu - sum(len(s.gpus) for s in shares),
        )

    def _free_gpus(self) -> list[int]:
        taken = {index for share in self._shares.values() for index in share.gpus}
        return [index for index in range(self.total.gpu) if index not in taken]


def _lacking(compute: Compute, there: Capacity, gpus: str, words: str) -> str | None:
    found = []
    if compute.cpu_m > there.cpu_m:
        found.append(f"needs {_cpu(compute.cpu_m)} CPU, {words.format(_cpu(there.cpu_m))}")
    if compute.mem is not None and compute.mem > there.mem:
        found.append(f"needs {size(compute.mem)}, {words.format(size(max(0, there.mem)))}")
    if compute.gpu > there.gpu:
        found.append(f"needs {compute.gpu} GPU{'s' if compute.gpu > 1 else ''}, {gpus}")
    return "; ".join(found) or None


def _cpu(milli: int) -> str:
    return f"{max(0, milli) / MILLI:g}"


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
