"""A real engine with real processes, called through the protocol, for all tests of this folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
import venv
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from cortex.engines.base import (
    Attempt,
    CapacityFreed,
    Ended,
    Engine,
    Lost,
    NeverStarted,
    Observation,
    Started,
    Unreachable,
    Version,
    Waits,
)
from cortex.engines.local import LocalEngine, cgroup_support, cgroups
from cortex.projects.unpack import project_id
from cortex.spec.api import ApiSpec, Compute, Definition, Limits, Networking
from cortex.spec.job import JobSpec, Json
from cortex.spec.times import new_id, now_ns

LIMIT_S = 90.0
T = TypeVar("T")
E = TypeVar("E", bound=Engine)
"""The class of a test's engine, which is the class that the test's fixture makes."""
Final = Ended | Lost | NeverStarted


SLEEP = """
    import os, sys, time
    def task(config):
        with open(config["file"], "a") as file:
            file.write("ran\\n")
        print("pid", os.getpid(), flush=True)
        while not os.path.exists(config["file"] + ".go"):
            time.sleep(0.01)
        return "done"
"""


class EngineHarness:
    """A project folder, a data root, and the observations of an engine on them.

    This class has the local engine; the harnesses of the other engines extend it.
    """

    def __init__(
        self, folder: Path, memory_limit: str | None = None, own_folder: str | None = None
    ) -> None:
        self.root = folder / "jobs"
        self.project = folder / "project"
        self.project.mkdir()
        self.memory_limit = memory_limit
        self.own_folder = own_folder
        self.grace_s = 5.0
        self.kill_delays_s = [0, 0.01, 0.03, 0.05, 0.08]
        """Seconds after a start at which an operator is killed: from "no interpreter yet" to
        "long running"."""
        self.python = Path(sys.executable)
        self.env: Mapping[str, str] = {}
        self.observations: list[Observation] = []
        self.wait_reasons: list[str] = []
        self.changed = asyncio.Event()
        self.jobs: list[str] = []

    def run(self, scenario: Callable[[E], Awaitable[None]]) -> None:
        """Run a scenario with an open engine."""
        self.run_with_new_engine(scenario)

    def run_with_new_engine(self, scenario: Callable[[E], Awaitable[None]]) -> None:
        """Open an engine, run a scenario with it, and close it."""

        async def main() -> None:
            async with self.engine() as engine:
                await scenario(cast(E, engine))

        self.changed = asyncio.Event()  # an Event is bound to its loop
        asyncio.run(main())

    def new_engine(self) -> Engine:
        """An engine on this harness's data root, not open yet."""
        _, arguments = self.engine_arguments()
        return LocalEngine(*arguments)

    def engine_arguments(self) -> tuple[str, tuple[Any, ...]]:
        """The name of the class of `new_engine` and its arguments, for another process."""
        limits = self.memory_limit, None, self.own_folder
        return "local", (self.root, None, self.grace_s, *limits)

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[Engine]:
        engine = self.new_engine()
        await engine.open(self.report)
        try:
            yield engine
        finally:
            await engine.close()

    def write(self, code: str, name: str = "task.py") -> None:
        path = self.project / name
        path.parent.mkdir(exist_ok=True)
        text = textwrap.dedent(code)
        if path.exists() and path.read_text() == text:
            return
        path.write_text(text)
        os.utime(self.project)  # a deploy does the same

    def bare_environment(self, modules: Mapping[str, str]) -> None:
        """Use an environment that contains these modules alone."""
        folder = self.root.parent / "environment"
        venv.create(folder, symlinks=True)
        site = next(folder.glob("lib/python*/site-packages"))
        for name, code in modules.items():
            (site / f"{name}.py").write_text(code)
        self.python = folder / "bin" / "python"

    def project_id(self) -> str:
        """The project's id, computed again if a job compiles files of the project at the same
        time."""
        while True:
            try:
                return project_id(self.project)
            except FileNotFoundError:
                continue

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
        preload: tuple[str, ...] = (),
        handle: str = "",
        cpu_m: int = 100,
        gpu: int = 0,
        log_limit: int = 64 << 20,
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
                preload=preload,
            ),
            networking=Networking(endpoint="/probe"),
            compute=Compute(cpu_m=cpu_m, mem=mem, gpu=gpu),
            limits=Limits(log=log_limit),
            api_id=api_id or new_id(),
            project_id=self.project_id(),
            last_updated="2020-07-16T14:56:10.276007415Z",
        )
        spec = JobSpec(
            job_id=new_id(),
            api_name="probe",
            config=json.dumps(config or {}),
            api_id=api.api_id,
            timeout=timeout,
            created_ns=now_ns(),
        )
        self.jobs.append(spec.job_id)
        version = Version(api, self.project, self.python, self.env)
        deadline = None if timeout is None else time.monotonic() + timeout
        return Attempt(spec, version, 1, handle, deadline)

    async def start(self, engine: Engine, attempt: Attempt) -> str:
        """Reserve, claim and start, as the dispatcher does."""
        return (await self.start_attempt(engine, attempt)).spec.job_id

    async def start_attempt(self, engine: Engine, attempt: Attempt, number: int = 1) -> Attempt:
        """The same. Returns the attempt as the store has it then, with its handle."""
        job_id = attempt.spec.job_id
        assert engine.ledger.reserve(job_id, attempt.version.api.compute) is None
        attempt = replace(attempt, number=number, handle=engine.claim(job_id, number))
        engine.start(attempt)
        return attempt

    async def outcome(self, engine: Engine, attempt: Attempt) -> Ended:
        """Start an attempt and wait for its end."""
        await self.start(engine, attempt)
        return await self.ended(attempt)

    async def started(self, attempt: Attempt) -> Started:
        return await self._first(attempt, Started)

    async def observed(self, attempt: Attempt, kind: type[T]) -> T:
        return await self._first(attempt, kind)

    async def unreachable(self, attempt: Attempt) -> Unreachable:
        return await self._first(attempt, Unreachable)

    async def ended(self, attempt: Attempt) -> Ended:
        last = await self.final(attempt)
        assert isinstance(last, Ended), last
        return last

    async def final(self, attempt: Attempt) -> Final:
        return await self._first(attempt, Ended, Lost, NeverStarted)

    async def printed(self, attempt: Attempt, text: str) -> None:
        """Wait until the job's log contains this text."""
        await until(lambda: text in self.log(attempt))

    async def number_in_log(self, attempt: Attempt, word: str) -> int:
        """Wait for a line of the job's log that ends in this word and a number; the number."""
        line = re.compile(rf"{word} (\d+)\n")
        await until(lambda: line.search(self.log(attempt)))
        found = line.search(self.log(attempt))
        assert found is not None
        return int(found[1])

    def log(self, attempt: Attempt) -> str:
        path = self.root / attempt.spec.job_id / "log"
        return path.read_text() if path.exists() else ""

    def folder(self, attempt: Attempt) -> Path:
        """The job's folder, on the machine where its worker runs."""
        return self.root / attempt.spec.job_id

    def files(self, attempt: Attempt) -> Path:
        """The project's folder, on the machine where the worker runs."""
        return self.project

    def own_files(self, attempt: Attempt) -> Path:
        """The files that the job made or changed in its current folder, once it has ended."""
        return self.folder(attempt) / "own"

    def killed_operator(self, attempt: Attempt, moment: str) -> Attempt:
        """Start the attempt in an operator that is then killed. Returns the attempt as the store
        has it.

        Args:
            attempt: is claimed and started.
            moment: "claimed", "started", or the seconds after the start at which the operator is killed.
        """
        operator = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "killed_operator.py")],
            input=pickle.dumps((*self.engine_arguments(), moment, attempt)),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert operator.returncode == -signal.SIGKILL, operator.stderr.decode()
        return replace(attempt, handle=operator.stdout.decode())

    @property
    def marker(self) -> Path:
        """The job of `sleeper` writes this file. `finish_sleeper` lets that job end."""
        return self.project.parent / "marker"

    def sleeper(self, cpu_m: int = 100) -> Attempt:
        return self.attempt(SLEEP, config={"file": str(self.marker)}, cpu_m=cpu_m)

    def finish_sleeper(self) -> None:
        Path(f"{self.marker}.go").touch()

    def start_record(self, attempt: Attempt) -> Path:
        return self.folder(attempt) / f"start.{attempt.number}"

    def close(self) -> None:
        """Release what the harness has besides the engine."""

    def leftovers(self) -> list[str]:
        """The processes and control groups of this data root."""
        found = [f"{pid}: {about}" for pid, about in processes(str(self.root.parent), self.jobs)]
        prefix = cgroup_support.group_prefix(self.root)
        for folder, names, _ in os.walk("/sys/fs/cgroup"):
            found += [f"{folder}/{name}" for name in names if name.startswith(prefix)]
        return found

    def remove_orphaned_groups(self) -> None:
        """Remove the empty groups of a closed operator, as the next operator does."""
        for group in cgroup_support.list_groups(self.root):
            if cgroups.is_orphaned(group):
                cgroups.remove(group, timeout_s=0)
        for folder in self.leftovers():
            if folder.endswith("-jobs"):
                with contextlib.suppress(OSError):
                    Path(folder).rmdir()

    def leftovers_of_jobs(self) -> list[str]:
        """The same without the fork servers and supervisors that wait for the next job."""
        return [
            line
            for line in self.leftovers()
            if "forkserver/main.py" not in line and not _is_of_a_live_supervisor(line)
        ]

    async def _first(self, attempt: Attempt, *kinds: type[T]) -> T:
        """Wait for the first observation of these kinds for the attempt."""
        end = time.monotonic() + LIMIT_S
        while True:
            for observation in self.observations:
                if isinstance(observation, CapacityFreed):
                    continue
                is_of_job = observation.job_id == attempt.spec.job_id
                is_of_attempt = is_of_job and observation.attempt == attempt.number
                if is_of_attempt and isinstance(observation, kinds):
                    return observation
            assert time.monotonic() < end, (
                f"only {self.observations} were reported; log: {self.log(attempt)}"
            )
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 1)

    def report(self, observation: Observation) -> None:
        if isinstance(observation, Waits):  # their number depends on how fast an interpreter starts
            self.wait_reasons.append(observation.reason)
        else:
            self.observations.append(observation)
        self.changed.set()


def _is_of_a_live_supervisor(group: str) -> bool:
    """Whether it is the folder of all groups, or the group of a live supervisor."""
    is_supervisors = "-supervisor." in group and not cgroups.is_orphaned(Path(group))
    return is_supervisors or group.endswith("-jobs")


async def until(condition: Callable[..., object], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {limit_s} s"
        await asyncio.sleep(0.01)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def processes(folder: str, jobs: list[str]) -> list[tuple[int, str]]:
    """The processes whose current folder, command line or environment names the folder or a job.

    Returns:
        The pid of each, and the beginning of its command line and environment.
    """
    names = [folder.encode(), *(job.encode() for job in jobs)]
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            about = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            if not about:  # it is ending: it still has its folder, and no memory
                continue
            about += os.fsencode((entry / "cwd").readlink())
        except OSError:
            continue
        if any(name in about for name in names):
            found.append((int(entry.name), about[:200].decode(errors="replace")))
    return found
