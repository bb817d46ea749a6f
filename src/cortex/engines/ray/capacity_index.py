"""Nodes in the order of what they have free, so that of a thousand few are looked at. Called by `nodes`."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic, TypeVar

from cortex.engines.base import NOTHING, Capacity
from cortex.engines.capacity import fits
from cortex.spec.api import Compute

T = TypeVar("T")


class CapacityIndex(Generic[T]):
    """Each has a number of its own; of two that are as empty, the one with the lower number is first."""

    def __init__(self) -> None:
        self._free: dict[int, tuple[Capacity, T]] = {}
        self._emptiest: list[tuple[int, int]] = []  # by cores: what is taken most of
        self._mem: list[int] = []
        self._gpu: list[int] = []

    def put(self, number: int, free: Capacity, node: T) -> None:
        self._free[number] = free, node
        insort(self._emptiest, (-free.cpu_m, number))
        insort(self._mem, free.mem)
        insort(self._gpu, free.gpu)

    def drop(self, number: int) -> None:
        """Harmless for one that is not there."""
        if number in self._free:
            free, _ = self._free.pop(number)
            for values, value in ((self._mem, free.mem), (self._gpu, free.gpu)):
                del values[bisect_left(values, value)]
            del self._emptiest[bisect_left(self._emptiest, (-free.cpu_m, number))]

    def first(self, compute: Compute) -> T | None:
        """The emptiest that has enough."""
        if not self._free or not fits(compute, self.most):
            return None
        for cpu_m, number in self._emptiest:
            if -cpu_m < compute.cpu_m:
                return None
            free, node = self._free[number]
            if fits(compute, free):
                return node
        return None

    @property
    def is_empty(self) -> bool:
        return not self._free

    @property
    def most(self) -> Capacity:
        """What is free of each at most, if not on the same node."""
        if not self._free:
            return NOTHING
        return Capacity(-self._emptiest[0][0], self._mem[-1], self._gpu[-1])
