"""Whether there is enough for a job, and in which words there is not. Called by engines."""

from __future__ import annotations

from collections.abc import Mapping

from cortex.engines.base import Capacity
from cortex.spec.api import MILLI, Compute
from cortex.worker.messages import size


def lacking(compute: Compute, most: Capacity, words: str) -> str | None:
    """What there is too little of, or None.

    Args:
        most: what there is of each at most.
        words: for what there is, with a place for the amount: "{} free".
    """
    found = []
    if compute.cpu_m > most.cpu_m:
        there = f"{max(0, most.cpu_m) / MILLI:g}"
        found.append(f"needs {_cpu(compute)}, {words.format(there)}")
    if compute.mem is not None and compute.mem > most.mem:
        found.append(f"needs {size(compute.mem)}, {words.format(size(max(0, most.mem)))}")
    if compute.gpu > most.gpu:
        found.append(f"needs {_gpus(compute)}, {words.format(max(0, most.gpu))}")
    return "; ".join(found) or None


def fits(compute: Compute, there: Capacity) -> bool:
    """Whether it has enough of all."""
    return (
        compute.cpu_m <= there.cpu_m
        and (compute.mem or 0) <= there.mem
        and compute.gpu <= there.gpu
    )


def amounts(compute: Compute) -> str:
    """What a job takes: "4 CPU and 4 GiB"."""
    wanted = [_cpu(compute), *([size(compute.mem)] if compute.mem else [])]
    return " and ".join([*wanted, *([_gpus(compute)] if compute.gpu else [])])


def selects(wanted: Mapping[str, tuple[str, ...]], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one of those that a job may go to."""
    return all(labels.get(name) in values for name, values in wanted.items())


def label_words(wanted: Mapping[str, tuple[str, ...]]) -> str:
    """The labels that a job asks for: "zone=a, disk=ssd or nvme"."""
    return ", ".join(f"{name}={' or '.join(values)}" for name, values in wanted.items())


def _cpu(compute: Compute) -> str:
    return f"{compute.cpu_m / MILLI:g} CPU"


def _gpus(compute: Compute) -> str:
    return f"{compute.gpu} GPU{'s' * (compute.gpu > 1)}"
