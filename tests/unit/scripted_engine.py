"""An engine that does what the test says, and a world that outlives it: what was really begun, fenced
off and ended. For the tests of what drives engines."""

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
)
from cortex.spec.api import Compute

Key = tuple[str, int]  # job and attempt


@dataclass
class World:
    """What is so, whoever knows it. An attempt is ordered, running, or over; `fenced` ones never ran."""

    ordered: dict[Key, Attempt] = field(default_factory=dict)
    running: dict[Key, Started] = field(default_factory=dict)
    over: dict[Key, Ended | Lost] = field(default_factory=dict)
    fenced: set[Key] = field(default_factory=set)
    begun: Counter[Key] = field(default_factory=Counter)  # how often an attempt's code was started
    told_to_stop: set[str] = field(default_factory=set)
    clock: int = 2 * 10**18

    def tick(self) -> int:
        self.clock += 1
        return self.clock


class ScriptedLedger:
    """Room for so many jobs at once."""

    def __init__(self, room: int, report_freed: Callable[[], None]) -> None:
        self.room = room
        self.taken: set[str] = set()
        self._report_freed = report_freed

    def refusal(self, compute: Compute) -> str | None:
        return None

    def reserve(self, job_id: str, compute: Compute) -> str | None:
        if job_id not in self.taken and len(self.taken) >= self.room:
            return "needs a place"
        self.taken.add(job_id)
        return None

    def release(self, job_id: str) -> None:
        if job_id in self.taken:
            self.taken.remove(job_id)
            self._report_freed()

    def nodes(self) -> list[NodeInfo]:
        return []


class ScriptedEngine:
    """One operator's view of a world, with room for so many jobs at once."""

    def __init__(self, world: World, room: int) -> None:
        self.world = world
        self.ledger = ScriptedLedger(room, lambda: self._say(CapacityFreed()))
        self.told_to_stop: set[str] = set()  # by this operator
        self.said: list[Observation] = []
        self._report: Report = lambda _: None

    # The protocol

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities("scripted", Capacity(self.ledger.room, 0, 0), "none", "none")

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
        self.told_to_stop.add(job_id)
        self.world.told_to_stop.add(job_id)

    async def recover(self, attempt: Attempt) -> None:
        key = (attempt.spec.job_id, attempt.number)
        self.ledger.taken.add(key[0])
        if key in self.world.over:
            self._settle(self.world.over[key])
        elif key in self.world.running:
            self._say(self.world.running[key])
        else:  # what was ordered and has not begun is fenced off, and never will
            self.never(key)

    def warm(self, version: Version) -> None: ...

    def forget(self, *, versions: Sequence[str] = (), jobs: Sequence[str] = ()) -> None: ...

    # The script

    def begin(self, key: Key) -> None:
        """The attempt's code begins to run."""
        del self.world.ordered[key]
        self.world.begun[key] += 1
        self.world.running[key] = Started(*key, self.world.tick())
        self._say(self.world.running[key])

    def end(self, key: Key, ending: Ending, exit_code: int) -> None:
        """The attempt ends by itself, or because it was told to."""
        started = self.world.running.pop(key)
        self.world.over[key] = Ended(
            *key, ending, started.start_ns, self.world.tick(), exit_code, None, None, False
        )
        self._settle(self.world.over[key])

    def lose(self, key: Key) -> None:
        """The platform loses a running attempt."""
        del self.world.running[key]
        self.world.over[key] = Lost(*key, "lost")
        self._settle(self.world.over[key])

    def never(self, key: Key) -> None:
        """An attempt comes to nothing before its code could run."""
        self.world.ordered.pop(key, None)
        self.world.fenced.add(key)
        self._settle(NeverStarted(*key))

    def away(self, key: Key) -> None:
        """A running attempt cannot be asked after."""
        self._say(Unreachable(*key, "away"))

    def back(self, key: Key) -> None:
        """It can be asked after again."""
        self._say(Reachable(*key))

    def repeat(self, index: int) -> None:
        """Say again what was said before, late and twice."""
        if self.said:
            self._report(self.said[index % len(self.said)])

    def _settle(self, last: Ended | Lost | NeverStarted) -> None:
        self.ledger.taken.discard(last.job_id)
        self._say(last)
        self._say(CapacityFreed())

    def _say(self, observation: Observation) -> None:
        self.said.append(observation)
        self._report(observation)
