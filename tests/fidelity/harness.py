"""Runs one small program twice, as plain Python and as a job, and compares what came of it.

The oracle is Python itself: a driver of a few lines imports the task from the project, in the project's folder, calls
it and notes its result. The job is the same project with `definition.path`, run by the local engine. Both have the
same environment and the same variables, each has folders of its own. Used by every test of this folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from cortex.engines.base import (
    Attempt,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Observation,
    Started,
    Unreachable,
    Version,
)
from cortex.engines.local import LocalEngine
from cortex.engines.local.fork_server_pool import environment
from cortex.joblog.folders import JobFolders
from cortex.spec.api import ApiSpec, Compute, Definition, Networking
from cortex.spec.job import JobSpec
from cortex.spec.times import new_id, now_ns
from cortex.worker.supervisor.watch import LEFTOVER_TIMEOUT_S
from fidelity.outcome import NO_RESULT, Outcome, agree, contents, left_of, normalised, read, running

LIMIT_S = 90.0
SETTLE_S = 10.0

DRIVER = """
import sys
def main():
    from os import O_CREAT, O_WRONLY, close, getpid, open, write
    pid = getpid()
    sys.path.append({import_dir!r})
    module = __import__({module!r}, fromlist=["task"])
    call = module.Task() if hasattr(module, "Task") else module.task
    value = call({config!r})
    if value is None or getpid() != pid:
        return
    try:
        import json
        text = json.dumps(value, allow_nan=False)
    except BaseException:
        return
    file = open({result!r}, O_CREAT | O_WRONLY)
    write(file, text.encode())
    close(file)
main()
"""
BY_FILE = """
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location({module!r}, {path!r})
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
"""


@dataclass(frozen=True)
class Program:
    """A project of a few lines, and how it is run."""

    name: str
    code: str
    """Of the task's file."""
    path: str = "task.py"
    files: Mapping[str, str] = field(default_factory=dict)
    """Other files of the project."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Files of the environment's site-packages."""
    config: Any = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    python_path: str | None = None
    jobs: int = 1
    """Jobs of one version, run one after another: each agrees with plain Python."""
    fresh: bool = False
    """Whether each run has another result, and the jobs of a version have different ones."""
    stop_at: str | None = None
    """Words in the log at which the run gets SIGTERM."""
    reader: str | None = None
    """Code that prints what is in the files of a run: for formats whose bytes differ each time."""
    by_file: bool = False
    """Whether an import statement cannot name the task's file."""
    says: str | None = None
    """What the job's message holds: plain Python has none."""
    but: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the outcome that differ for a job by design, and what they are there."""
    why: str | None = None
    """The reason for that."""
    python: Path | None = None
    """An interpreter of an environment that is there already."""


class RunFolder:
    """The folders of one run."""

    def __init__(self, folder: Path, program: Program) -> None:
        self.folder = folder
        self.project = folder / "project"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        for name, text in {**program.files, program.path: program.code}.items():
            path = self.project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dedent(text).lstrip("\n").encode())

    def clear(self) -> None:
        shutil.rmtree(self.temporary)
        self.temporary.mkdir()


class Runner:
    """An engine that stays open, with a loop and a thread of its own, and a folder for all runs."""

    def __init__(self, folder: Path, own_folder: str | None = None) -> None:
        self._folder = folder
        self._bare = _environment(folder / "bare", {})
        self._count = 0
        self._seen: dict[str, list[Observation]] = {}
        self._changed = asyncio.Event()
        self.root = folder / "jobs"
        self.engine = LocalEngine(self.root, None, 5.0, own_folder=own_folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._do(self.engine.open(self._saw))

    def close(self) -> None:
        self._do(self.engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        end = time.monotonic() + SETTLE_S
        while (left := running(str(self._folder))) and time.monotonic() < end:
            time.sleep(0.01)
        assert not left, [read(pid, "cmdline") for pid in left]

    def check(self, program: Program) -> None:
        """The program comes to the same as a job as it does in plain Python."""
        with self._prepared(program) as (folder, version, place):
            expected = self._plain(program, RunFolder(folder / "plain", program), version)
            _sane(program, expected)
            expected = replace(expected, **program.but)
            results = []
            for _ in range(program.jobs):
                found, message = self._do(self._job(program, place, version))
                results.append(found.result)
                if program.fresh:
                    found = replace(found, result=expected.result)
                agree(found, expected, message)
                if program.says is not None and program.says not in (message or ""):
                    pytest.fail(f"message: {message!r}, without {program.says!r}", pytrace=False)
                place.clear()
            if program.fresh and len({json.dumps(each) for each in results}) < program.jobs:
                pytest.fail(f"jobs have the same result: {results}", pytrace=False)

    def run(self, program: Program) -> tuple[Outcome, Outcome]:
        """What a job and plain Python come to, for a test that compares them itself."""
        with self._prepared(program) as (folder, version, place):
            plain = self._plain(program, RunFolder(folder / "plain", program), version)
            job, _ = self._do(self._job(program, place, version))
            return job, plain

    @contextlib.contextmanager
    def _prepared(self, program: Program) -> Iterator[tuple[Path, Version, RunFolder]]:
        self._count += 1
        folder = self._folder / str(self._count)
        python = program.python or self._bare
        if program.libraries:
            python = _environment(folder / "environment", program.libraries)
        place = RunFolder(folder / "job", program)
        version = self._version(program, place, python)
        try:
            yield folder, version, place
        finally:
            self._do(self._forget(version))
            shutil.rmtree(folder, ignore_errors=True)

    def _version(self, program: Program, place: RunFolder, python: Path) -> Version:
        api = ApiSpec(
            name="probe",
            definition=Definition(
                path=program.path, python_path=program.python_path, preload=program.preload
            ),
            networking=Networking(endpoint="/probe"),
            compute=Compute(cpu_m=1),
            api_id=new_id(),
            project_id="0" * 64,
            last_updated="2020-07-16T14:56:10.276007415Z",
        )
        env = {"TMPDIR": str(place.temporary), **program.env}
        return Version(api, place.project, python, env)

    # As plain Python

    def _plain(self, program: Program, place: RunFolder, version: Version) -> Outcome:
        mark = new_id()
        result, log, own = place.folder / "result", place.folder / "log", place.folder / "files"
        own.mkdir()
        values = {
            "config": program.config,
            "import_dir": str(self.root / ".import"),
            "module": program.path.removesuffix(".py").replace("/", "."),
            "path": program.path,
            "result": str(result),
        }
        driver = DRIVER
        if program.by_file:
            lines = DRIVER.splitlines(keepends=True)
            at = next(n for n, line in enumerate(lines) if "__import__" in line)
            driver = "".join([*lines[:at], BY_FILE, *lines[at + 1 :]])
        env = {
            **environment(version, None),
            "CORTEX_JOB_ID": mark,
            "CORTEX_JOB_DIR": str(own),
            "CORTEX_JOB_SPEC": str(place.folder / "job.json"),
            "CORTEX_ATTEMPT": "1",
            **program.env,
            "TMPDIR": str(place.temporary),
        }
        if program.python_path is not None:
            env["PYTHONPATH"] = str(place.project / program.python_path)
        before = contents(place.project)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(version.python), "-c", driver.format_map(values)],
                cwd=place.project,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            if program.stop_at is not None:
                words = program.stop_at
                _until(lambda: words in log.read_text() or process.poll() is not None, words)
                process.send_signal(signal.SIGTERM)
            code = process.wait(LIMIT_S)
        finally:
            process.kill()
            process.wait()
            self._settle(mark)
        text = log.read_bytes().decode("utf-8", "backslashreplace")
        return Outcome(
            exit_code=code,
            # A job that fails has no result, whatever the task returned before an exit handler failed.
            result=json.loads(result.read_text()) if result.exists() and code == 0 else NO_RESULT,
            log=normalised(text, {place.project: "project", own: "own", place.folder: "run"}),
            files=self._files(program, version, before, [place.project, own]),
            left=left_of(text, place.temporary),
        )

    def _settle(self, mark: str) -> None:
        """Let what was left end by itself, and its trackers clean up; then nothing of the run may stay."""
        begun = time.monotonic()
        while left := running(mark):
            has_tracker = any(b"tracker" in read(pid, "cmdline") for pid in left)
            if time.monotonic() > begun + (SETTLE_S if has_tracker else LEFTOVER_TIMEOUT_S):
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    # As a job

    async def _job(
        self, program: Program, place: RunFolder, version: Version
    ) -> tuple[Outcome, str | None]:
        spec = JobSpec(
            job_id=new_id(),
            api_name="probe",
            config=json.dumps(program.config),
            api_id=version.api.api_id,
            timeout=None,
            created_ns=now_ns(),
        )
        before = contents(place.project)
        job_id = spec.job_id
        assert self.engine.ledger.reserve(job_id, version.api.compute) is None
        self.engine.start(Attempt(spec, version, 1, self.engine.claim(job_id, 1), None))
        log = JobFolders(self.root).log(job_id)
        if program.stop_at is not None:
            words = program.stop_at
            await self._first(job_id, Started)
            end = time.monotonic() + LIMIT_S
            while not (log.exists() and words in log.read_text()):
                assert time.monotonic() < end, log.read_text()
                await asyncio.sleep(0.01)
            self.engine.stop(job_id)
        try:
            ended = await self._first(job_id, Ended)
        except BaseException:
            self.engine.stop(job_id)
            await self._first(job_id, Ended)
            raise
        assert ended.ending is (Ending.EXITED if program.stop_at is None else Ending.STOPPED), ended
        assert not running(job_id), "a process of the job is left"
        text = log.read_bytes().decode("utf-8", "backslashreplace")
        text = re.sub(rf"{self.root}/\.own/[0-9-]+/project", str(place.project), text)
        folder = log.parent
        names = {place.project: "project", folder / "files": "own", place.folder: "run"}
        changed = [place.project, folder / "own", folder / "files"]
        outcome = Outcome(
            exit_code=ended.exit_code,
            result=ended.result if ended.has_result else NO_RESULT,
            log=normalised(text, names),
            files=self._files(program, version, before, changed),
            left=left_of(text, place.temporary),
        )
        return outcome, ended.message

    async def _forget(self, version: Version) -> None:
        self.engine.forget(versions=[version.api.api_id])

    async def _first(self, job_id: str, kind: type[Any]) -> Any:
        end = time.monotonic() + LIMIT_S
        while True:
            for one in self._seen.get(job_id, ()):
                if isinstance(one, (kind, Ended)):
                    return one
                if isinstance(one, Lost | NeverStarted | Unreachable):
                    pytest.fail(repr(one), pytrace=False)
            if time.monotonic() > end:
                log = JobFolders(self.root).log(job_id)
                text = log.read_text() if log.exists() else "no log"
                pytest.fail(f"the job does not end; its log: {text}", pytrace=False)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1)

    def _saw(self, observation: Observation) -> None:
        job_id = getattr(observation, "job_id", None)
        if job_id is not None:
            self._seen.setdefault(job_id, []).append(observation)
            self._changed.set()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * LIMIT_S)

    def _files(
        self, program: Program, version: Version, before: Mapping[str, bytes], folders: list[Path]
    ) -> Mapping[str, Any]:
        """The files that are new or different, or what the program's reader says of them."""
        found: dict[str, Any] = {}
        for folder in folders:
            now = contents(folder)
            found |= {name: data for name, data in now.items() if before.get(name) != data}
        if program.reader is None:
            return found
        folder = self._folder / "read"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in found.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        done = subprocess.run(
            [str(version.python), "-c", dedent(program.reader)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return {"read": done.stdout}


def _environment(folder: Path, libraries: Mapping[str, str]) -> Path:
    """An environment that holds these files and nothing else, as a virtual environment has it."""
    base = Path(sys.executable).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    site.mkdir(parents=True)
    (folder / "bin").mkdir()
    for name in ("python", "python3", version):
        (folder / "bin" / name).symlink_to(base)
    config = f"home = {base.parent}\ninclude-system-site-packages = false\n"
    (folder / "pyvenv.cfg").write_text(config)
    for name, code in libraries.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(code))
    return folder / "bin" / "python"


def _sane(program: Program, outcome: Outcome) -> None:
    """A program with a typing mistake would agree with itself, too."""
    if program.why is None:
        assert not program.but
    if program.says is None:
        for mistake in ("SyntaxError", "NameError", "IndentationError"):
            assert mistake in program.code or mistake not in outcome.log, outcome.log


def _until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)
