"""A real engine with real processes, driven through the protocol; used by every test of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import textwrap
import time
import venv
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from cortex.engines.base import (
    Attempt,
    CapacityFreed,
    Ended,
    Lost,
    NeverStarted,
    Observation,
    Started,
    Unreachable,
    Version,
)
from cortex.engines.local import LocalEngine, limits
from cortex.spec.api import ApiSpec, Compute, Definition, Networking
from cortex.spec.job import JobSpec, Json
from cortex.spec.times import new_id, now_ns

LIMIT_S = 30.0
T = TypeVar("T")
Final = Ended | Lost | NeverStarted


class Bench:
    """A project folder, a data root, and what an engine on them has reported."""

    def __init__(self, folder: Path, memory_limit: str | None) -> None:
        self.root = folder / "jobs"
        self.project = folder / "project"
        self.project.mkdir()
        self.memory_limit = memory_limit
        self.grace_s = 5.0
        self.python = Path(sys.executable)
        self.env: Mapping[str, str] = {}
        self.seen: list[Observation] = []
        self.changed = asyncio.Event()
        self.jobs: list[str] = []

    def run(self, scenario: Callable[[LocalEngine], Awaitable[None]]) -> None:
        """Run a scenario with an engine that is open."""

        async def main() -> None:
            async with self.engine() as engine:
                await scenario(engine)

        asyncio.run(main())

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[LocalEngine]:
        engine = LocalEngine(self.root, None, self.grace_s, self.memory_limit)
        await engine.open(self._saw)
        try:
            yield engine
        finally:
            await engine.close()

    def write(self, code: str, name: str = "task.py") -> None:
        path = self.project / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(code))

    def bare_environment(self, modules: Mapping[str, str]) -> None:
        """An environment that holds these modules and nothing else."""
        folder = self.root.parent / "environment"
        venv.create(folder, symlinks=True)
        site = next(folder.glob("lib/python*/site-packages"))
        for name, code in modules.items():
            (site / f"{name}.py").write_text(code)
        self.python = folder / "bin" / "python"

    def attempt(
        self,
        code: str | None = None,
        *,
        command: list[str] | None = None,
        config: Json | None = None,
        mem: int | None = None,
        timeout: int | None = None,
        path: str = "task.py",
        api_id: str | None = None,
        python_path: str | None = None,
        handle: str = "",
    ) -> Attempt:
        if code is not None:
            self.write(code, path)
        api = ApiSpec(
            name="probe",
            definition=Definition(
                path=None if command else path,
                command=command,
                config={"deployed": True},
                python_path=python_path,
            ),
            networking=Networking(endpoint="/probe"),
            compute=Compute(cpu_m=100, mem=mem),
            api_id=api_id or new_id(),
            project_id="p",
            last_updated="2020-07-16T14:56:10.276007415Z",
        )
        spec = JobSpec(
            job_id=new_id(),
            api_name="probe",
            config=config or {},
            api_id=api.api_id,
            timeout=timeout,
            created_ns=now_ns(),
        )
        self.jobs.append(spec.job_id)
        return Attempt(spec, Version(api, self.project, self.python, self.env), 1, handle)

    async def start(self, engine: LocalEngine, attempt: Attempt) -> str:
        """Reserve, claim and start, as the dispatcher does."""
        job_id = attempt.spec.job_id
        assert engine.reserve(job_id, attempt.version.api.compute) is None
        handle = engine.claim(job_id, attempt.number)
        await engine.start(Attempt(attempt.spec, attempt.version, attempt.number, handle))
        return job_id

    async def outcome(self, engine: LocalEngine, attempt: Attempt) -> Ended:
        """Start an attempt and wait for its end."""
        await self.start(engine, attempt)
        return await self.ended(attempt)

    async def started(self, attempt: Attempt) -> Started:
        return await self._first(attempt, Started)

    async def unreachable(self, attempt: Attempt) -> Unreachable:
        return await self._first(attempt, Unreachable)

    async def ended(self, attempt: Attempt) -> Ended:
        last = await self.last(attempt)
        assert isinstance(last, Ended), last
        return last

    async def last(self, attempt: Attempt) -> Final:
        return await self._first(attempt, Ended, Lost, NeverStarted)

    async def printed(self, attempt: Attempt, words: str) -> None:
        """Wait until the job's log holds these words."""
        await until(lambda: words in self.log(attempt))

    def log(self, attempt: Attempt) -> str:
        path = self.root / attempt.spec.job_id / "log"
        return path.read_text() if path.exists() else ""

    def start_record(self, attempt: Attempt) -> Path:
        return self.root / attempt.spec.job_id / f"start.{attempt.number}"

    def left(self) -> list[str]:
        """Processes and control groups that belong to this data root."""
        found = [f"{pid}: {about}" for pid, about in processes(str(self.root.parent), self.jobs)]
        prefix = limits.prefix(self.root)
        for folder, names, _ in os.walk("/sys/fs/cgroup"):
            found += [f"{folder}/{name}" for name in names if name.startswith(prefix)]
        return found

    async def _first(self, attempt: Attempt, *kinds: type[T]) -> T:
        """The first observation of these kinds for the attempt; all others stay to be asked for."""
        end = time.monotonic() + LIMIT_S
        while True:
            for one in self.seen:
                mine = not isinstance(one, CapacityFreed) and one.job_id == attempt.spec.job_id
                if mine and one.attempt == attempt.number and isinstance(one, kinds):
                    return one
            assert time.monotonic() < end, f"only saw {self.seen}; log: {self.log(attempt)}"
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 1)

    def _saw(self, observation: Observation) -> None:
        self.seen.append(observation)
        self.changed.set()


async def until(holds: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.01)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def processes(folder: str, jobs: list[str]) -> list[tuple[int, str]]:
    """Whose folder, command line or environment names the folder or one of the jobs."""
    words = [folder.encode(), *(job.encode() for job in jobs)]
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            about = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            about += os.fsencode((entry / "cwd").readlink())
        except OSError:
            continue
        if any(word in about for word in words):
            found.append((int(entry.name), about[:200].decode(errors="replace")))
    return found
