"""An engine that follows a test's script, for tests of the dispatcher. Its world outlives it, and
has the facts: the attempts that have started, ended or were fenced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cortex.engines.base import (
    Attempt,
    Capabilities,
    Capacity,
    CapacityFreed,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    NodeInfo,
    Observation,
    Reachable,
    Report,
    Started,
    Unreachable,
    Version,
    Waits,
)
from cortex.engines.capacity import NO_HOLDS, Hold, Holds
from cortex.spec.api import Compute

Key = tuple[str, int]  # job and attempt


@dataclass
class World:
    """The facts about all attempts, whether an operator knows them or not. An attempt is ordered,
    running or ended; a fenced attempt never ran."""

    ordered: dict[Key, Attempt] = field(default_factory=dict)
    running: dict[Key, Started] = field(default_factory=dict)
    ended: dict[Key, Ended | Lost] = field(default_factory=dict)
    fenced: set[Key] = field(default_factory=set)
    start_counts: Counter[Key] = field(default_factory=Counter)
    """How often the code of each attempt has started."""
    stop_requested: set[str] = field(default_factory=set)
    clock: int = 2 * 10**18

    def tick(self) -> int:
        self.clock += 1
        return self.clock


class ScriptedLedger:
    """Capacity for a number of jobs, whatever each needs."""

    def __init__(self, max_jobs: int, report_freed: Callable[[], None]) -> None:
        self.max_jobs = max_jobs
        self.taken: set[str] = set()
        self._report_freed = report_freed

    def refusal(self, compute: Compute) -> str | None:
        return None

    def can_run(self, compute: Compute) -> bool:
        return True

    def reserve(self, job_id: str, compute: Compute, holds: Holds = NO_HOLDS) -> str | Hold | None:
        if job_id not in self.taken and len(self.taken) >= self.max_jobs:
            return "needs a free slot"
        self.taken.add(job_id)
        return None

    def hold(self, job_id: str, compute: Compute, holds: Holds, kept: Hold | None) -> Hold:
        return Hold(job_id, 0, Capacity(1, 0, 0))

    def lacks(self, compute: Compute) -> str | None:
        return "needs a free slot" if len(self.taken) >= self.max_jobs else None

    def release(self, job_id: str) -> None:
        if job_id in self.taken:
            self.taken.remove(job_id)
            self._report_freed()

    def nodes(self) -> list[NodeInfo]:
        return []


class ScriptedEngine:
    """The engine of one operator in a world, with capacity for a number of jobs."""

    def __init__(self, world: World, max_jobs: int) -> None:
        self.world = world
        self.ledger = ScriptedLedger(max_jobs, lambda: self._observe(CapacityFreed()))
        self.stop_requested: set[str] = set()  # by this operator
        self.observations: list[Observation] = []
        self.demands: list[list[Compute]] = []
        self._report: Report = lambda _: None

    # The protocol

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("scripted", Capacity(self.ledger.max_jobs, 0, 0), "none", "none")

    async def open(self, report: Report) -> None:
        self._report = report

    async def close(self) -> None:
        self._report = lambda _: None

    def claim(self, job_id: str, attempt: int) -> str:
        return f"{job_id} {attempt}"

    def prepare(self, attempt: Attempt) -> None:
        pass

    def start(self, attempt: Attempt) -> None:
        key = (attempt.spec.job_id, attempt.number)
        assert key not in self.world.ordered, "an attempt is started once"
        assert key not in self.world.fenced
        self.world.ordered[key] = attempt

    def stop(self, job_id: str) -> None:
        self.stop_requested.add(job_id)
        self.world.stop_requested.add(job_id)

    def demand(self, waiting: Sequence[Compute]) -> None:
        self.demands.append(list(waiting))

    async def recover(self, attempt: Attempt) -> None:
        key = (attempt.spec.job_id, attempt.number)
        self.ledger.taken.add(key[0])
        if key in self.world.ended:
            self._finish(self.world.ended[key])
        elif key in self.world.running:
            self._observe(self.world.running[key])
        else:  # an attempt that was ordered and has not started is fenced: it never starts
            self.never_start(key)

    def warm(self, version: Version) -> None: ...

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None: ...

    # The script

    def begin(self, key: Key) -> None:
        """The attempt's code begins to run."""
        del self.world.ordered[key]
        self.world.start_counts[key] += 1
        self.world.running[key] = Started(*key, self.world.tick())
        self._observe(self.world.running[key])

    def end(self, key: Key, ending: Ending, exit_code: int) -> None:
        """The attempt ends, by itself or after a stop."""
        started = self.world.running.pop(key)
        self.world.ended[key] = Ended(
            *key, ending, started.start_ns, self.world.tick(), exit_code, None, None, False
        )
        self._finish(self.world.ended[key])

    def lose(self, key: Key) -> None:
        """The platform loses a running attempt."""
        del self.world.running[key]
        self.world.ended[key] = Lost(*key, "lost")
        self._finish(self.world.ended[key])

    def report_wait(self, key: Key, reason: str) -> None:
        """An attempt does not start yet, for this reason."""
        self._observe(Waits(*key, reason))

    def never_start(self, key: Key, held_up_by: str | None = None) -> None:
        """An attempt fails before its code starts, and is fenced."""
        self.world.ordered.pop(key, None)
        self.world.fenced.add(key)
        self._finish(NeverStarted(*key, held_up_by))

    def make_unreachable(self, key: Key) -> None:
        """The engine loses contact with a running attempt."""
        self._observe(Unreachable(*key, "away"))

    def make_reachable(self, key: Key) -> None:
        """The engine has contact with the attempt again."""
        self._observe(Reachable(*key))

    def repeat(self, index: int) -> None:
        """Report an earlier observation again."""
        if self.observations:
            self._report(self.observations[index % len(self.observations)])

    def _finish(self, last: Ended | Lost | NeverStarted) -> None:
        self.ledger.taken.discard(last.job_id)
        self._observe(last)
        self._observe(CapacityFreed())

    def _observe(self, observation: Observation) -> None:
        self.observations.append(observation)
        self._report(observation)
