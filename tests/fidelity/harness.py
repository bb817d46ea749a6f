"""Runs one small program twice, as plain Python and as a job, and compares the outcomes.

The oracle is Python itself: a driver of a few lines imports the task from the project, in the
project's folder, calls it and writes its result to a file. The job is the same project with
`definition.path`, run by the local engine. Both have the same environment and the same
variables, and each has its own folders. Every test of this folder uses it.
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
from cortex.worker.checks import NOT_KEPT
from cortex.worker.supervisor.watch import LEFTOVER_TIMEOUT_S
from fidelity.outcome import (
    NO_RESULT,
    Outcome,
    assert_agree,
    contents,
    leftovers_of,
    normalised,
    proc_file,
    processes_of_run,
)

LIMIT_S = 90.0
TRACKER_TIMEOUT_S = 10.0

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
IMPORT_BY_PATH = """
    from importlib.util import module_from_spec, spec_from_file_location
    spec = spec_from_file_location({module!r}, {path!r})
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
"""


@dataclass(frozen=True)
class Program:
    """A project of a few lines, and how to run it."""

    name: str
    code: str
    """The content of the task's file."""
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
    """The number of jobs of one version, one after another: each must agree with plain Python."""
    is_random: bool = False
    """Whether each job must have a different result, instead of the result of plain Python."""
    stop_at: str | None = None
    """The run gets SIGTERM when this text is in the log."""
    reader: str | None = None
    """Code that prints the content of the run's files: for formats whose bytes always differ."""
    import_by_path: bool = False
    """Whether the driver imports the task's file by path: an import statement cannot name it."""
    message_contains: str | None = None
    """A part of the job's message. Plain Python has no message."""
    differences: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the outcome that differ for a job by design, with their values for the job."""
    reason: str | None = None
    """The reason for the differences."""
    python: Path | None = None
    """An interpreter of an existing environment."""


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
    """An open engine, with its own loop and thread, and a folder for all runs."""

    def __init__(self, folder: Path, own_folder: str | None = None) -> None:
        self._folder = folder
        self._bare = _environment(folder / "bare", {})
        self._count = 0
        self._observations: dict[str, list[Observation]] = {}
        self._changed = asyncio.Event()
        self.root = folder / "jobs"
        self.engine = LocalEngine(self.root, None, 5.0, own_folder=own_folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._in_loop(self.engine.open(self._report))

    def close(self) -> None:
        self._in_loop(self.engine.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        end = time.monotonic() + TRACKER_TIMEOUT_S
        while (left := processes_of_run(str(self._folder))) and time.monotonic() < end:
            time.sleep(0.01)
        assert not left, [proc_file(pid, "cmdline") for pid in left]

    def check(self, program: Program) -> None:
        """Assert that the program has the same outcome as a job and in plain Python."""
        with self._project(program) as (folder, version, run_folder):
            expected = self._run_plain(program, RunFolder(folder / "plain", program), version)
            _assert_no_typing_mistake(program, expected)
            expected = replace(expected, **program.differences)
            results = []
            for _ in range(program.jobs):
                outcome, message = self._in_loop(self._run_job(program, run_folder, version))
                results.append(outcome.result)
                if program.is_random:
                    outcome = replace(outcome, result=expected.result)
                assert_agree(outcome, expected, message)
                part = program.message_contains
                if part is not None and part not in (message or ""):
                    pytest.fail(f"message: {message!r}, without {part!r}", pytrace=False)
                run_folder.clear()
            if program.is_random and len({json.dumps(each) for each in results}) < program.jobs:
                pytest.fail(f"jobs have the same result: {results}", pytrace=False)

    def run(self, program: Program) -> tuple[Outcome, Outcome]:
        """The outcomes of a job and of plain Python, for a test that compares them itself."""
        with self._project(program) as (folder, version, run_folder):
            plain = self._run_plain(program, RunFolder(folder / "plain", program), version)
            job, _ = self._in_loop(self._run_job(program, run_folder, version))
            return job, plain

    @contextlib.contextmanager
    def _project(self, program: Program) -> Iterator[tuple[Path, Version, RunFolder]]:
        self._count += 1
        folder = self._folder / str(self._count)
        python = program.python or self._bare
        if program.libraries:
            python = _environment(folder / "environment", program.libraries)
        run_folder = RunFolder(folder / "job", program)
        version = self._version(program, run_folder, python)
        try:
            yield folder, version, run_folder
        finally:
            self._in_loop(self._forget(version))
            shutil.rmtree(folder, ignore_errors=True)

    def _version(self, program: Program, run_folder: RunFolder, python: Path) -> Version:
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
        env = {"TMPDIR": str(run_folder.temporary), **program.env}
        return Version(api, run_folder.project, python, env)

    def _run_plain(self, program: Program, run_folder: RunFolder, version: Version) -> Outcome:
        run_id = new_id()
        folder = run_folder.folder
        result, log, own = folder / "result", folder / "log", folder / "files"
        own.mkdir()
        values = {
            "config": program.config,
            "import_dir": str(self.root / ".import"),
            "module": program.path.removesuffix(".py").replace("/", "."),
            "path": program.path,
            "result": str(result),
        }
        driver = DRIVER
        if program.import_by_path:
            lines = DRIVER.splitlines(keepends=True)
            at = next(n for n, line in enumerate(lines) if "__import__" in line)
            driver = "".join([*lines[:at], IMPORT_BY_PATH, *lines[at + 1 :]])
        env = {
            **environment(version, None),
            "CORTEX_JOB_ID": run_id,
            "CORTEX_JOB_DIR": str(own),
            "CORTEX_JOB_SPEC": str(run_folder.folder / "job.json"),
            "CORTEX_ATTEMPT": "1",
            **program.env,
            "TMPDIR": str(run_folder.temporary),
        }
        if program.python_path is not None:
            env["PYTHONPATH"] = str(run_folder.project / program.python_path)
        before = contents(run_folder.project)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(version.python), "-c", driver.format_map(values)],
                cwd=run_folder.project,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            if program.stop_at is not None:
                stop_at = program.stop_at
                _until(lambda: stop_at in log.read_text() or process.poll() is not None, stop_at)
                process.send_signal(signal.SIGTERM)
            code = process.wait(LIMIT_S)
        finally:
            process.kill()
            process.wait()
            self._end_leftovers(run_id)
        text = log.read_bytes().decode("utf-8", "backslashreplace")
        return Outcome(
            exit_code=code,
            # A job that fails has no result, whatever the task returned before an exit handler
            # failed.
            result=json.loads(result.read_text()) if result.exists() and code == 0 else NO_RESULT,
            log=normalised(
                text, {run_folder.project: "project", own: "own", run_folder.folder: "run"}
            ),
            files=self._files(program, version, before, [run_folder.project, own]),
            leftovers=leftovers_of(text, run_folder.temporary),
        )

    def _end_leftovers(self, run_id: str) -> None:
        """Give leftover processes and trackers time to end by themselves, then kill them."""
        start = time.monotonic()
        while left := processes_of_run(run_id):
            has_tracker = any(b"tracker" in proc_file(pid, "cmdline") for pid in left)
            timeout_s = TRACKER_TIMEOUT_S if has_tracker else LEFTOVER_TIMEOUT_S
            if time.monotonic() > start + timeout_s:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    async def _run_job(
        self, program: Program, run_folder: RunFolder, version: Version
    ) -> tuple[Outcome, str | None]:
        spec = JobSpec(
            job_id=new_id(),
            api_name="probe",
            config=json.dumps(program.config),
            api_id=version.api.api_id,
            timeout=None,
            created_ns=now_ns(),
        )
        before = contents(run_folder.project)
        job_id = spec.job_id
        assert self.engine.ledger.reserve(job_id, version.api.compute) is None
        self.engine.start(Attempt(spec, version, 1, self.engine.claim(job_id, 1), None))
        log = JobFolders(self.root).log(job_id)
        if program.stop_at is not None:
            stop_at = program.stop_at
            await self._wait_for(job_id, Started)
            end = time.monotonic() + LIMIT_S
            while not (log.exists() and stop_at in log.read_text()):
                assert time.monotonic() < end, log.read_text()
                await asyncio.sleep(0.01)
            self.engine.stop(job_id)
        try:
            ended = await self._wait_for(job_id, Ended)
        except BaseException:
            self.engine.stop(job_id)
            await self._wait_for(job_id, Ended)
            raise
        assert ended.ending is (Ending.EXITED if program.stop_at is None else Ending.STOPPED), ended
        assert not processes_of_run(job_id), "a process of the job still runs"
        text = log.read_bytes().decode("utf-8", "backslashreplace")
        if (ended.message or "").startswith(NOT_KEPT):
            # Plain Python has no such line. `contract.test_status` checks it.
            text = text.removesuffix(f"cortex: {ended.message}\n")
        text = re.sub(rf"{self.root}/\.own/[0-9-]+/project", str(run_folder.project), text)
        folder = log.parent
        names = {run_folder.project: "project", folder / "files": "own", run_folder.folder: "run"}
        changed = [run_folder.project, folder / "own", folder / "files"]
        outcome = Outcome(
            exit_code=ended.exit_code,
            result=ended.result if ended.has_result else NO_RESULT,
            log=normalised(text, names),
            files=self._files(program, version, before, changed),
            leftovers=leftovers_of(text, run_folder.temporary),
        )
        return outcome, ended.message

    async def _forget(self, version: Version) -> None:
        self.engine.forget(versions=[version.api.api_id])

    async def _wait_for(self, job_id: str, kind: type[Any]) -> Any:
        end = time.monotonic() + LIMIT_S
        while True:
            for observation in self._observations.get(job_id, ()):
                if isinstance(observation, (kind, Ended)):
                    return observation
                if isinstance(observation, Lost | NeverStarted | Unreachable):
                    pytest.fail(repr(observation), pytrace=False)
            if time.monotonic() > end:
                log = JobFolders(self.root).log(job_id)
                text = log.read_text() if log.exists() else "no log"
                pytest.fail(
                    f"the job has not ended within {LIMIT_S} s; its log: {text}", pytrace=False
                )
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1)

    def _report(self, observation: Observation) -> None:
        job_id = getattr(observation, "job_id", None)
        if job_id is not None:
            self._observations.setdefault(job_id, []).append(observation)
            self._changed.set()

    def _in_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * LIMIT_S)

    def _files(
        self, program: Program, version: Version, before: Mapping[str, bytes], folders: list[Path]
    ) -> Mapping[str, Any]:
        """The new and changed files, or the output of the program's reader about them."""
        changed: dict[str, Any] = {}
        for folder in folders:
            now = contents(folder)
            changed |= {name: data for name, data in now.items() if before.get(name) != data}
        if program.reader is None:
            return changed
        folder = self._folder / "read"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in changed.items():
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
    """A virtual environment that contains these files alone."""
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


def _assert_no_typing_mistake(program: Program, outcome: Outcome) -> None:
    """Both runs of a program with a typing mistake would agree."""
    if program.reason is None:
        assert not program.differences
    if program.message_contains is None:
        for mistake in ("SyntaxError", "NameError", "IndentationError"):
            assert mistake in program.code or mistake not in outcome.log, outcome.log


def _until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"not within {LIMIT_S} s: {what}"
        time.sleep(0.01)
