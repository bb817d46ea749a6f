"""Environments that the real uv builds, most of them from packages inside the project."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest
import uv

from cortex.projects import builder, lockfiles
from cortex.projects.builder import EnvironmentFailed
from cortex.projects.environments import Environments
from cortex.projects.requirements import read_requirements
from cortex.spec.api import DEFAULT_DEPENDENCIES, Dependencies
from wheels import wheel

# A build calls sync(2), which waits for all data that the machine has yet to write.
WAIT_TIMEOUT_S = 300


def in_loop(test: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """Run an async test in an event loop. pytest finds the fixtures by the wrapped signature."""

    @functools.wraps(test)
    def in_new_loop(*args: object, **kwargs: object) -> None:
        asyncio.run(test(*args, **kwargs))

    return in_new_loop


def project(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".").replace("_", "-")).write_text(content)
    return folder


def with_wheel(folder: Path, value: int = 1) -> Path:
    name = wheel(folder, value=value)
    return project(folder, requirements__txt=f"./{name}\n")


# A package whose build backend is in the project: it writes its pid and waits for the file `go`.
BACKEND = """
import os, pathlib, subprocess, sys, time, zipfile
HERE = pathlib.Path(__file__).resolve().parent
def get_requires_for_build_wheel(config_settings=None):
    return []
def build_wheel(directory, config_settings=None, metadata_directory=None):
    (HERE / "written-by-the-build").write_text("x")
    with open({log!r}, "a") as log:
        log.write(f"{{os.getpid()}}\\n")
    while not os.path.exists({go!r}):
        time.sleep(0.01)
    name = "slowprobe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(directory, name), "w") as zipped:
        zipped.writestr("slowprobe.py", "VALUE = 7")
        info = "slowprobe-1.0.dist-info"
        zipped.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: slowprobe\\nVersion: 1.0\\n")
        zipped.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        zipped.writestr(info + "/RECORD", "")
    return name
"""


class SlowProject:
    """A project whose build waits until `go` exists; `log` has a line per build."""

    def __init__(self, folder: Path, *, number: int = 0) -> None:
        self.log, self.go = folder / f"log{number}", folder / f"go{number}"
        self.project = project(
            folder / f"slow{number}",
            requirements__txt="./\n",
            pyproject__toml='[project]\nname = "slowprobe"\nversion = "1.0"\n'
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
            backend__py=BACKEND.format(log=str(self.log), go=str(self.go)),
        )

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.log.read_text().split()] if self.log.exists() else []

    async def started(self, builds: int = 1) -> None:
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            while len(self.pids()) < builds:  # noqa: ASYNC110  # another process writes it
                await asyncio.sleep(0.01)


def run(python: Path, code: str) -> str:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def leftovers(root: Path) -> list[Path]:
    return [path for folder in root.iterdir() for path in folder.iterdir()]


def environ(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def has_exited(pid: int) -> bool:
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "environments"


@in_loop
async def test_a_project_without_requirements_gets_a_plain_shared_environment(
    root: Path, tmp_path: Path
) -> None:
    environments = Environments(root)
    one = project(tmp_path / "one", requirements__txt="# none\n")
    other = project(tmp_path / "other", pyproject__toml='[project]\nname = "x"\nversion = "1"\n')
    assert environments.built_python(one) is None
    python = await environments.build(one)
    assert environments.built_python(one) == environments.built_python(other) == python
    assert run(python, "import sys; print(*sys.version_info[:3])") == "{} {} {}".format(
        *sys.version_info
    )
    found = "import importlib.util as u; print(u.find_spec('pydantic'), u.find_spec('cortex'))"
    assert run(python, found) == "None None"


@in_loop
async def test_requirements_are_installed_once_and_found_by_a_new_operator(
    root: Path, tmp_path: Path
) -> None:
    first = with_wheel(tmp_path / "p")
    python = await Environments(root).build(first)
    assert run(python, "import tinyprobe; print(tinyprobe.VALUE)") == "1"
    assert Environments(root).built_python(first) == python
    assert await Environments(root).build(first) == python
    changed = with_wheel(tmp_path / "q", value=2)
    assert Environments(root).built_python(changed) is None


def test_an_operator_with_another_python_keeps_the_environment_of_a_running_job(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = with_wheel(tmp_path / "p")
    python = asyncio.run(Environments(root).build(mine))
    pipe = subprocess.PIPE
    job = subprocess.Popen([python, "-c", "input('begun\\n')"], stdin=pipe, stdout=pipe)
    try:
        assert job.stdout is not None
        job.stdout.readline()  # right after execve the process has no command line yet
        monkeypatch.setattr(sys, "version", "another")
        upgraded = Environments(root)
        for _ in range(2):
            upgraded.remove_unused([(mine, DEFAULT_DEPENDENCIES)])
            assert run(python, "import tinyprobe; print(tinyprobe.VALUE)") == "1"
    finally:
        job.communicate()
    upgraded.remove_unused([(mine, DEFAULT_DEPENDENCIES)])
    assert not python.exists()


@in_loop
async def test_files_that_jobs_write_into_the_project_do_not_change_its_environment(
    root: Path, tmp_path: Path
) -> None:
    mine, environments = with_wheel(tmp_path / "p"), Environments(root)
    python = await environments.build(mine)
    project(mine / "__pycache__", task__pyc="")
    for _ in range(2):
        environments.remove_unused([(mine, DEFAULT_DEPENDENCIES)])
    assert environments.built_python(mine) == python
    assert python.exists()


@in_loop
async def test_an_editable_project_is_installed_from_a_copy(root: Path, tmp_path: Path) -> None:
    slow = SlowProject(tmp_path)
    slow.go.touch()
    before = Environments(root).identify(slow.project)
    python = await Environments(root).build(slow.project)
    assert run(python, "import slowprobe; print(slowprobe.VALUE)") == "7"
    assert not (slow.project / "written-by-the-build").exists()
    assert Environments(root).identify(slow.project) == before


@in_loop
async def test_packages_come_from_the_registry_for_pyproject_and_included_files(
    root: Path, tmp_path: Path
) -> None:
    mine = project(
        tmp_path / "p",
        requirements__txt="-r more.txt\n",
        more__txt="six  # a comment\n",
        pyproject__toml='[project]\nname = "x"\nversion = "1"\ndependencies = ["iniconfig"]\n',
        conda_packages__txt=f"python={sys.version_info[0]}.{sys.version_info[1]}\npip\n",
    )
    python = await Environments(root).build(mine)
    assert run(python, "import six, iniconfig, pip; print('ok')") == "ok"


@in_loop
async def test_requirements_that_cannot_be_resolved_fail_with_the_resolvers_output(
    root: Path, tmp_path: Path
) -> None:
    mine = project(tmp_path / "p", requirements__txt="no-such-package-cortex-probe==9\n")
    environments = Environments(root)
    for _ in range(2):
        with pytest.raises(
            EnvironmentFailed, match=r"uv pip install failed \(exit code \d\)"
        ) as raised:
            await environments.build(mine)
        assert "no-such-package-cortex-probe" in raised.value.output
        assert environments.built_python(mine) is None
    assert leftovers(root) == []


@in_loop
async def test_a_python_that_does_not_exist_is_reported(root: Path, tmp_path: Path) -> None:
    for number, files in enumerate(
        (
            {"conda_packages__txt": "python=3.98\n"},
            {"pyproject__toml": '[project]\nname="x"\nversion="1"\nrequires-python=">=3.98"\n'},
        )
    ):
        with pytest.raises(EnvironmentFailed, match="uv venv failed") as raised:
            await Environments(root).build(project(tmp_path / str(number), **files))
        assert "3." in raised.value.output


@in_loop
async def test_requirements_with_mistakes_are_not_built(root: Path, tmp_path: Path) -> None:
    mine = project(tmp_path / "p", conda_packages__txt="numpy\n")
    with pytest.raises(EnvironmentFailed) as raised:
        await Environments(root).build(mine)
    assert raised.value.output.startswith("conda-packages.txt:1: numpy")


@in_loop
async def test_concurrent_callers_share_one_build(root: Path, tmp_path: Path) -> None:
    slow, environments = SlowProject(tmp_path), Environments(root)
    callers = [asyncio.create_task(environments.build(slow.project)) for _ in range(5)]
    await slow.started()
    callers[0].cancel()  # the other callers still wait for the build
    await asyncio.gather(callers[0], return_exceptions=True)
    slow.go.touch()
    assert len(set(await asyncio.gather(*callers[1:]))) == 1
    assert len(slow.pids()) == 1


@in_loop
async def test_at_most_two_builds_run_at_once(root: Path, tmp_path: Path) -> None:
    environments = Environments(root)
    slow = [SlowProject(tmp_path, number=n) for n in range(3)]
    callers = [asyncio.create_task(environments.build(one.project)) for one in slow]
    waits = [asyncio.create_task(one.started()) for one in slow]
    async with asyncio.timeout(WAIT_TIMEOUT_S):
        while sum(wait.done() for wait in waits) < 2:
            await asyncio.wait([w for w in waits if not w.done()], return_when="FIRST_COMPLETED")
    (third,) = [one for one in slow if not one.pids()]
    next(one for one in slow if one.pids()).go.touch()
    await third.started()
    for one in slow:
        one.go.touch()
    await asyncio.gather(*callers, *waits)


@in_loop
async def test_a_cancelled_build_leaves_no_process_and_no_environment(
    root: Path, tmp_path: Path
) -> None:
    slow, environments = SlowProject(tmp_path), Environments(root)
    caller = asyncio.create_task(environments.build(slow.project))
    await slow.started()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert has_exited(slow.pids()[0])
    assert environments.built_python(slow.project) is None
    assert leftovers(root) == []
    slow.go.touch()
    assert (await environments.build(slow.project)).exists()


@in_loop
async def test_a_build_cancelled_at_its_very_end_does_not_undo_the_next_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncing, go_on = threading.Event(), threading.Event()
    marked = threading.Event()
    mark = builder._mark

    def sync() -> None:
        if not syncing.is_set():
            syncing.set()
            assert go_on.wait(WAIT_TIMEOUT_S)

    def marks(folder: Path, attempt: Path) -> None:
        try:
            mark(folder, attempt)
        finally:
            marked.set()

    monkeypatch.setattr(os, "sync", sync)
    monkeypatch.setattr(builder, "_mark", marks)
    mine, environments = with_wheel(tmp_path / "p"), Environments(root)
    first = asyncio.create_task(environments.build(mine))
    assert await asyncio.to_thread(syncing.wait, WAIT_TIMEOUT_S)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    python = await environments.build(mine)
    marked.clear()
    go_on.set()
    assert await asyncio.to_thread(marked.wait, WAIT_TIMEOUT_S)
    assert environments.built_python(mine) == python


@in_loop
async def test_an_environment_whose_build_was_killed_with_its_operator_is_built_again(
    root: Path, tmp_path: Path
) -> None:
    slow = SlowProject(tmp_path)
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from cortex.projects.environments import Environments\n"
        "asyncio.run(Environments(Path(sys.argv[1])).build(Path(sys.argv[2])))\n"
    )
    operator = await asyncio.create_subprocess_exec(sys.executable, "-c", code, root, slow.project)
    await slow.started()
    operator.kill()
    await operator.wait()
    environments = Environments(root)
    assert environments.built_python(slow.project) is None
    assert has_exited(slow.pids()[0])  # although `go` does not exist
    again = asyncio.create_task(environments.build(slow.project))
    await slow.started(2)
    slow.go.touch()
    python = await again
    assert run(python, "import slowprobe; print(slowprobe.VALUE)") == "7"
    assert environments.built_python(slow.project) == python


@in_loop
async def test_an_environment_without_its_interpreter_is_built_again(
    root: Path, tmp_path: Path
) -> None:
    mine, environments = with_wheel(tmp_path / "p"), Environments(root)
    python = await environments.build(mine)
    python.unlink()
    assert environments.built_python(mine) is None
    assert run(await environments.build(mine), "import tinyprobe; print(1)") == "1"


@in_loop
async def test_a_killed_uv_is_reported_with_its_signal(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "uv"
    fake.write_text("#!/bin/sh\nkill -9 $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(uv, "find_uv_bin", lambda: str(fake))
    with pytest.raises(EnvironmentFailed, match=f"signal {signal.SIGKILL.value}"):
        await Environments(root).build(project(tmp_path / "p"))


@in_loop
async def test_uv_inherits_the_operators_settings_but_not_its_packages(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path / "wheels", "onlyhere")
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("PYTHONPATH", "/nonsense")
    monkeypatch.setenv("UV_SYSTEM_PYTHON", "1")
    python = await Environments(root).build(project(tmp_path / "p", requirements__txt="onlyhere\n"))
    assert run(python, "import onlyhere; print(onlyhere.VALUE)") == "1"


def test_the_identity_depends_on_what_the_build_depends_on_and_nothing_else(
    root: Path, tmp_path: Path
) -> None:
    environments = Environments(root)
    numbers = iter(range(100))

    def identity(**files: str) -> str:
        return environments.identify(project(tmp_path / str(next(numbers)), **files))

    plain = identity()
    six = identity(requirements__txt="six\n")
    assert plain == identity(main__py="x = 1") == identity(requirements__txt="\n# c\n")
    assert six == identity(requirements__txt="# c\n\nsix # why\n", main__py="x = 1")
    table = '[project]\nname = "x"\nversion = "{}"\ndependencies = [{}]\n'
    by_table = identity(pyproject__toml=table.format(1, '"six"'))
    assert by_table == identity(pyproject__toml=table.format(2, '"six"'))
    assert plain == identity(conda_packages__txt="python={}.{}".format(*sys.version_info))
    assert plain == identity(pyproject__toml=table.format(1, "") + 'requires-python=">=3.11"\n')
    different = [
        plain,
        six,
        by_table,
        identity(requirements__txt="six==1\n"),
        identity(requirements__txt="-r a.txt\n", a__txt="six"),
        identity(requirements__txt="-r a.txt\n", a__txt="toml"),
        identity(requirements__txt="-c a.txt\nsix\n", a__txt="six<2"),
        identity(requirements__txt="six\n", uv__toml="no-index = true"),
        identity(pyproject__toml=table.format(1, '"six"') + "[tool.uv]\nno-index = true\n"),
        identity(conda_packages__txt="python=3.99"),
        identity(pyproject__toml=table.format(1, "") + 'requires-python=">=3.99"\n'),
        identity(conda_packages__txt="pip=24"),
        identity(requirements__txt="-e .\n", main__py="x = 1"),
        identity(requirements__txt="-e .\n", main__py="x = 2"),
        identity(pyproject__toml='[project]\nname = "x"\ndynamic = ["dependencies"]\n'),
    ]
    assert len(set(different)) == len(different)


@in_loop
async def test_two_apis_of_a_project_have_the_environments_of_their_own_requirements(
    root: Path, tmp_path: Path
) -> None:
    mine = project(with_wheel(tmp_path / "p"), gpu__txt=f"./{wheel(tmp_path / 'p', 'other')}\n")
    gpu = Dependencies(pip="gpu.txt")
    assert lockfiles.file_name(read_requirements(mine, gpu)) != lockfiles.file_name(
        read_requirements(mine)
    )
    assert Environments(root).identify(mine, gpu) != Environments(root).identify(mine)
    python = await Environments(root).build(mine, gpu)
    assert run(python, "import other; print(other.VALUE)") == "1"
    for _ in range(2):
        environments = Environments(root)
        environments.remove_unused([(mine, DEFAULT_DEPENDENCIES), (mine, gpu)])
        assert environments.built_python(mine, gpu) == python
    environments.remove_unused([(mine, DEFAULT_DEPENDENCIES)])
    assert not python.exists()


@in_loop
async def test_a_build_gets_none_of_the_operators_secrets(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CORTEX_SERVE_STORE", "CORTEX_TOKEN", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("CFLAGS", "-DSHOWN")
    slow, environments = SlowProject(tmp_path), Environments(root)
    build = asyncio.create_task(environments.build(slow.project))
    await slow.started()
    seen = environ(slow.pids()[0])
    slow.go.write_text("")
    await build
    assert b"CFLAGS=-DSHOWN" in seen
    assert b"s3cret" not in seen
