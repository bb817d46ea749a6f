"""A job has its project to itself: no other job finds its changes in the current folder, and the
project stays as it was deployed. Both kinds of workspace, overlay and copy, promise the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cortex.engines.base import Attempt, Lost, NeverStarted
from cortex.engines.local import LocalEngine, workspaces
from cortex.errors import StartupError
from cortex.spec.job import Json
from cortex.system.account import find
from cortex.system.folders import remove
from cortex.worker.copying import Copy
from engines.conftest import assert_no_leftovers
from engines.engine_harness import EngineHarness, exists, until

IS_ROOT = os.geteuid() == 0
DEPLOYED = {
    "task.py": "",
    "data.csv": "deployed",
    "model.pkl": "deployed",
    "sub/deep/file.txt": "deployed",
    "sub/other.txt": "deployed",
    "helper.py": "import os\nHERE = os.path.dirname(os.path.abspath(__file__))\n",
}
# The project as a job finds it: names, contents, modes and targets of links.
LISTING = """
import os, stat

def listing(top="."):
    found = {}
    for parent, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in folders + names:
            path = os.path.join(parent, name)
            about = os.lstat(path)
            if stat.S_ISREG(about.st_mode):
                with open(path) as file:
                    content = file.read()
            else:
                content = os.readlink(path) if stat.S_ISLNK(about.st_mode) else None
            found[os.path.relpath(path, top)] = [oct(about.st_mode), content, about.st_mtime_ns]
            if stat.S_ISDIR(about.st_mode):
                found[os.path.relpath(path, top)].pop()
    return found
"""
# Each change is made by one job. Beside it: the names in `own/` afterwards.
CHANGES = {
    "a new file": ("open('new.txt', 'w').write('x')", {"new.txt"}),
    "a file that replaces one": ("open('model.pkl', 'w').write('x')", {"model.pkl"}),
    "a rename over one": (
        "open('part', 'w').write('x'); os.replace('part', 'model.pkl')",
        {"model.pkl"},
    ),
    "an append": ("open('data.csv', 'a').write('x')", {"data.csv"}),
    "a file of the same size and time": (
        "about = os.stat('data.csv'); open('data.csv', 'w').write('DEPLOYED'); "
        "os.utime('data.csv', ns=(about.st_atime_ns, about.st_mtime_ns))",
        {"data.csv"},
    ),
    "a file in a sub-folder": (
        "open('sub/deep/new.txt', 'w').write('x')",
        {"sub/deep/new.txt"},
    ),
    "a file of a sub-folder": (
        "open('sub/deep/file.txt', 'w').write('x')",
        {"sub/deep/file.txt"},
    ),
    "a file by __file__": (
        "import helper; open(helper.HERE + '/sub/by.txt', 'w').write('x')",
        {"sub/by.txt"},
    ),
    "a new folder": (
        "os.makedirs('out/of/it'); open('out/of/it/f', 'w').write('x')",
        {"out/of/it/f"},
    ),
    "a deleted file": ("os.unlink('data.csv')", set()),
    "a deleted folder": ("shutil.rmtree('sub')", set()),
    "everything deleted": (
        "[shutil.rmtree(n) if os.path.isdir(n) else os.unlink(n) for n in os.listdir('.')]",
        set(),
    ),
    "a renamed file": ("os.rename('data.csv', 'sub/data.csv')", {"sub/data.csv"}),
    "a file that comes and goes": ("open('x', 'w').close(); os.unlink('x')", set()),
    "two files that change places": (
        "os.rename('data.csv', 'x'); os.rename('model.pkl', 'data.csv'); os.rename('x', 'model.pkl')",
        {"data.csv", "model.pkl"},
    ),
    "a file in a folder's place": (
        "shutil.rmtree('sub'); open('sub', 'w').write('x')",
        {"sub"},
    ),
    "a folder in a file's place": (
        "os.unlink('data.csv'); os.mkdir('data.csv'); open('data.csv/f', 'w').write('x')",
        {"data.csv/f"},
    ),
    "a link in a file's place": (
        "os.unlink('data.csv'); os.symlink('model.pkl', 'data.csv')",
        {"data.csv"},
    ),
    "a write through a link": ("open('link.txt', 'w').write('x')", {"data.csv"}),
    "a hard link that is written to": (
        "os.link('data.csv', os.environ['CORTEX_JOB_DIR'] + '/hard') if config else "
        "os.link('data.csv', 'hard'); open('hard' if not config else "
        "os.environ['CORTEX_JOB_DIR'] + '/hard', 'w').write('x')",
        {"data.csv", "hard"},
    ),
    "a mapped file": (
        "import mmap; f = open('data.csv', 'r+b'); m = mmap.mmap(f.fileno(), 0); m[:4] = b'xxxx'; m.flush()",
        {"data.csv"},
    ),
    "a database": (
        "import sqlite3; c = sqlite3.connect('jobs.db'); c.execute('create table t (x)'); c.commit(); c.close()",
        {"jobs.db"},
    ),
    "a mode": ("os.chmod('data.csv', 0o777)", {"data.csv"}),
    "a closed folder": (
        "open('sub/other.txt', 'w').write('x'); os.chmod('sub', 0)",
        {"sub/other.txt"},
    ),
    "the mode of the folder itself": ("os.chmod('.', 0o500)", set()),
    "by a command": (
        "subprocess.run('echo x > sub/s.txt; rm data.csv', shell=True)",
        {"sub/s.txt"},
    ),
    "many files": (
        "[open(f'f{i}', 'w').close() for i in range(500)]",
        {f"f{i}" for i in range(500)},
    ),
    "a large file": ("open('large', 'wb').truncate(1 << 30)", {"large"}),
    "unusual names": (
        "open(b'\\xff\\n,:', 'w').close(); os.mkdir('-rf'); open('-rf/x', 'w').close()",
        {"\udcff\n,:", "-rf/x"},
    ),
    "a deep tree": (
        "here = os.getcwd()\n    for i in range(3000): os.mkdir('d'); os.chdir('d')\n    os.chdir(here)",
        None,
    ),
    "a pipe": ("os.mkfifo('pipe')", {"pipe"}),
}
TASK = """
import os, shutil, subprocess, sys, time
from listing import listing

def task(config):
    change = config["change"]
    before = listing()
    if change:
        exec("def make_change():\\n    config = {}\\n    " + change, globals())
        make_change()
    while "wait" in config and not os.path.exists(config["wait"]):
        time.sleep(0.01)
    return [before, os.getcwd(), os.path.dirname(os.path.abspath(__file__))]
"""


def harness_with_project(folder: Path, own_folder: str | None) -> EngineHarness:
    harness = EngineHarness(folder, None, own_folder)
    for name, text in DEPLOYED.items():
        path = harness.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (harness.project / "listing.py").write_text(LISTING)
    (harness.project / "link.txt").symlink_to("data.csv")
    (harness.project / "broken").symlink_to("nowhere")
    (harness.project / "folder").symlink_to("sub")
    (harness.project / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (harness.project / "run.sh").chmod(0o755)
    return harness


@pytest.fixture(params=["overlay", "copy"] if IS_ROOT else ["copy"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineHarness]:
    harness = harness_with_project(tmp_path, None if request.param == "overlay" else "copy")
    yield harness
    assert_no_leftovers(harness)
    assert list(workspaces.workspaces_of(harness.root).glob("*")) == []


def job(
    harness: EngineHarness, change: str = "", like: Attempt | None = None, wait: str | None = None
) -> Attempt:
    config: Json = {"change": change} if wait is None else {"change": change, "wait": wait}
    attempt = harness.attempt(TASK, config=config)
    return attempt if like is None else replace(attempt, version=like.version)


def own_file_names(harness: EngineHarness, attempt: Attempt) -> set[str]:
    """The names of the files in a job's `own/`."""
    top = harness.own_files(attempt)
    return {
        str(Path(parent, name).relative_to(top))
        for parent, _, names in os.walk(top)
        for name in names
    }


def workspaces_of(harness: EngineHarness) -> set[tuple[str, int]]:
    """The paths and inodes below the folder of the workspaces."""
    top = workspaces.workspaces_of(harness.root)
    return {
        (name, os.lstat(Path(parent, name)).st_ino)
        for parent, folders, names in os.walk(top)
        for name in folders + names
    }


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_job_finds_the_project_as_it_was_deployed(
    harness: EngineHarness, name: str
) -> None:
    change, own = CHANGES[name]

    async def scenario(engine: LocalEngine) -> None:
        first = job(harness, change)
        outcome = await harness.outcome(engine, first)
        assert outcome.exit_code == 0, harness.log(first)
        result: Any = outcome.result
        before, where, file = result
        assert where == file
        following = job(harness, like=first)
        result = (await harness.outcome(engine, following)).result
        after, again, _ = result
        assert again == where  # in the same supervisor
        assert after == before
        # The project itself stays unchanged for jobs of other supervisors.
        assert (harness.project / "data.csv").read_text() == "deployed"
        assert not (harness.project / "new.txt").exists()
        if own is not None:
            assert own_file_names(harness, first) == own
        assert not harness.own_files(following).exists()
        assert "cortex:" not in harness.log(first)
        remove(harness.folder(first))  # as retention does; pytest cannot remove a folder that deep
        assert not harness.folder(first).exists()

    harness.run(scenario)


def test_concurrent_jobs_do_not_share_their_changes(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        go = harness.root.parent / "go"
        change = (
            "open('model.pkl', 'w').write(os.environ['CORTEX_JOB_ID']); os.unlink('sub/other.txt')"
        )
        first = job(harness, change, wait=str(go))
        jobs = [first, *(job(harness, change, like=first, wait=str(go)) for _ in range(3))]
        for each in jobs:
            await harness.start(engine, each)
        for each in jobs:
            await harness.started(each)
        go.touch()
        results: list[Any] = [(await harness.ended(each)).result for each in jobs]
        assert all(each[0] == results[0][0] for each in results)
        assert [(harness.own_files(each) / "model.pkl").read_text() for each in jobs] == [
            each.spec.job_id for each in jobs
        ]

    harness.run(scenario)


def test_a_folder_of_the_project_can_be_renamed_and_stays_complete(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        change = (
            "os.rename('sub', 'moved'); assert open('moved/deep/file.txt').read() == 'deployed'; "
            "assert not os.path.exists('sub'); open('moved/new.txt', 'w').write('x')"
        )
        first = job(harness, change)
        assert (await harness.outcome(engine, first)).exit_code == 0, harness.log(first)
        assert "moved/new.txt" in own_file_names(harness, first)
        following = job(harness, "assert os.path.exists('sub/deep/file.txt')", like=first)
        assert (await harness.outcome(engine, following)).exit_code == 0, harness.log(following)
        assert (harness.project / "sub/deep/file.txt").exists()

    harness.run(scenario)


def test_a_command_has_the_project_to_itself(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        script = "./run.sh; cat model.pkl; echo mine > model.pkl; cat model.pkl"
        first = harness.attempt(command=["sh", "-c", script])
        for attempt in (first, replace(harness.attempt(command=["sh"]), version=first.version)):
            assert (await harness.outcome(engine, attempt)).exit_code == 0
            assert harness.log(attempt) == "ran\ndeployedmine\n"
            assert (harness.own_files(attempt) / "model.pkl").read_text() == "mine\n"

    harness.run(scenario)


def test_modules_below_python_path_are_the_jobs_own(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        harness.write("import os\nHERE = os.path.dirname(__file__)\n", "src/placed.py")
        code = """
            import os, placed, sys
            def task(config):
                open(os.path.join(placed.HERE, "state"), "x").write("x")
                return [os.path.dirname(placed.HERE) == os.getcwd(), sys.path[:2]]
        """
        first = harness.attempt(code, python_path="src")
        for attempt in (first, replace(harness.attempt(code), version=first.version)):
            result: Any = (await harness.outcome(engine, attempt)).result
            is_here, path = result
            assert is_here
            assert path[1] == path[0] + "/src"
            assert own_file_names(harness, attempt) == {"src/state"}

    harness.run(scenario)


def test_a_job_that_changes_nothing_makes_no_file(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = harness.attempt("import helper\ndef task(config): return open('data.csv').read()")
        assert (await harness.outcome(engine, first)).result == "deployed"
        # The fork server compiles byte code for all jobs; a job before that compiles its own.
        await until(lambda: list(harness.project.glob("__pycache__/helper.*.pyc")))
        code = (harness.project / "task.py").read_text()
        for _ in range(2):  # the first job may find a workspace without the byte code
            following = replace(harness.attempt(code), version=first.version)
            await harness.outcome(engine, following)
        before = workspaces_of(harness)
        for _ in range(3):
            following = replace(harness.attempt(code), version=first.version)
            assert (await harness.outcome(engine, following)).result == "deployed"
            assert not harness.own_files(following).exists()
            assert workspaces_of(harness) == before

    harness.run(scenario)


def test_the_next_job_gets_a_repaired_project(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        first = job(harness)
        await harness.outcome(engine, first)
        harness.write("mended", "sub/other.txt")
        following = job(harness, "assert open('sub/other.txt').read() == 'mended'", like=first)
        assert (await harness.outcome(engine, following)).exit_code == 0, harness.log(following)

    harness.run(scenario)


def test_an_attempt_begins_with_the_project_as_it_was_deployed(harness: EngineHarness) -> None:
    """A later attempt does not find the files of an earlier one."""

    async def scenario(engine: LocalEngine) -> None:
        first = await harness.start_attempt(engine, job(harness, "open('first', 'x').close()"))
        await harness.ended(first)
        second = await harness.start_attempt(engine, first, 2)
        assert (await harness.ended(second)).exit_code == 0
        assert own_file_names(harness, second) == {"first"}

    harness.run(scenario)


@pytest.mark.parametrize(
    "spoil", ["open(own, 'w').close()", "os.symlink('/', own)", "os.mkdir(own)"]
)
def test_a_file_in_place_of_a_jobs_own_folder_is_replaced_and_a_link_is_not_followed(
    harness: EngineHarness, spoil: str
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        place = "own = os.path.dirname(os.environ['CORTEX_JOB_DIR']) + '/own'; "
        attempt = job(harness, f"{place}{spoil}; open('new', 'w').close()")
        assert (await harness.outcome(engine, attempt)).exit_code == 0
        assert own_file_names(harness, attempt) == {"new"}

    harness.run(scenario)


def test_the_log_says_that_files_could_not_be_saved(harness: EngineHarness) -> None:
    assert IS_ROOT, "this test mounts, which takes root"
    # A mount point cannot be renamed.
    change = """own = os.path.dirname(os.environ["CORTEX_JOB_DIR"]) + "/own"; os.mkdir(own)
    subprocess.run(["mount", "-t", "tmpfs", "none", own], check=True); open("new", "w").close()"""

    async def scenario(engine: LocalEngine) -> None:
        attempt = await harness.start_attempt(engine, job(harness, change))
        ended = await harness.ended(attempt)
        if harness.own_files(attempt).is_mount():
            unmount(harness.own_files(attempt))
        else:  # mounted in this supervisor's mount namespace alone: the supervisor may get no more jobs
            await until(lambda: not exists(pid_of(harness, attempt)))
        assert ended.exit_code == 0, harness.log(attempt)
        message = "cortex: not all that the job wrote in its current folder was kept"
        assert message in harness.log(attempt)
        following = job(harness, "assert not os.path.exists('new')", like=attempt)
        assert (await harness.outcome(engine, following)).exit_code == 0, harness.log(following)

    harness.run(scenario)


def pid_of(harness: EngineHarness, attempt: Attempt) -> int:
    return int(json.loads(harness.start_record(attempt).read_text())["pid"])


def mounts_below(folder: Path) -> list[str]:
    """The mounts that name this folder: other processes mount and unmount at the same time."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in mounts if str(folder) in line]


def test_a_killed_supervisor_leaves_no_mount_and_its_workspace_is_swept(
    harness: EngineHarness,
) -> None:
    async def scenario(engine: LocalEngine) -> None:
        attempt = await harness.start_attempt(
            engine, job(harness, "open('new', 'w').close()", wait="/no/such")
        )
        await harness.started(attempt)
        os.kill(pid_of(harness, attempt), signal.SIGKILL)
        assert isinstance(await harness.final(attempt), Lost)
        assert not workspaces_of(harness)

    harness.run(scenario)
    assert mounts_below(harness.root.parent) == []
    left = workspaces.workspaces_of(harness.root) / "1-1-0"
    left.mkdir()
    (left / "of").touch()

    async def nothing(_: LocalEngine) -> None: ...

    harness.run(nothing)


def test_a_workspace_in_use_is_not_swept(harness: EngineHarness) -> None:
    """An operator was killed, and the next one opens while the jobs run."""
    go = harness.root.parent / "go"
    attempt = job(harness, "open('new', 'w').write('kept')", wait=str(go))
    attempt = harness.killed_operator(attempt, "started")

    async def scenario(engine: LocalEngine) -> None:
        await engine.recover(attempt)
        await harness.started(attempt)
        await asyncio.sleep(0)
        go.touch()
        ended = await harness.ended(attempt)
        assert ended.exit_code == 0
        assert (harness.own_files(attempt) / "new").read_text() == "kept"

    harness.run(scenario)


def test_a_job_waits_while_a_full_disk_prevents_its_own_copy(tmp_path: Path) -> None:
    assert IS_ROOT, "this test mounts, which takes root"
    harness = harness_with_project(tmp_path, "copy")
    (harness.project / "large").write_text("x" * (1 << 20))

    async def scenario(engine: LocalEngine) -> None:
        small = str(workspaces.workspaces_of(harness.root))
        mount("-t", "tmpfs", "-o", "size=256k", "none", small)
        try:
            first = await harness.start_attempt(engine, job(harness))
            never = await harness.final(first)
            await until(lambda: not workspaces_of(harness))
        finally:
            # The kernel refuses for as long as the ending process has a descriptor there.
            await until(lambda: subprocess.run(["umount", small], check=False).returncode == 0)
        assert isinstance(never, NeverStarted)
        assert never.held_up_by is not None
        assert "the job's own copy of its project cannot be made: No space left" in never.held_up_by
        second = await harness.start_attempt(engine, first, 2)
        assert (await harness.ended(second)).exit_code == 0

    harness.run(scenario)
    assert_no_leftovers(harness)


def test_a_job_that_can_get_no_own_copy_is_lost_with_the_reason(harness: EngineHarness) -> None:
    async def scenario(engine: LocalEngine) -> None:
        root = workspaces.workspaces_of(harness.root)
        root.rmdir()
        root.write_text("in the way")
        attempt = job(harness)
        await harness.start(engine, attempt)
        lost = await harness.final(attempt)
        assert isinstance(lost, Lost)
        assert "the job's own copy of its project cannot be made: Not a directory" in lost.reason
        assert str(root) in lost.reason

    harness.run(scenario)


AS_NOBODY = """
import os, sys
from cortex.worker.messages import Setup
from cortex.worker.workspace import Workspace

project, own_root = sys.argv[1:]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
setup = Setup(package="", import_dir="", open_files=64, own_folder="overlay", own_root=own_root, project=project,
              python_path=project + "/src", path=project + "/task.py", command=None, env={}, preload=False)
place = Workspace(setup)
assert place.restore_project()
here = place.setup.project
assert here.startswith(own_root), here
assert place.setup.path == here + "/task.py"
assert place.setup.python_path == here + "/src"
assert not place.restore_project()
for name in ("secret", "closed/file"):
    try:
        open(here + "/" + name)
    except PermissionError:
        continue
    raise AssertionError(name)
assert open(here + "/sub/other.txt").read() == "deployed"
assert not os.path.lexists(here + "/pipe")
try:
    open(here + "/../escaped", "w")
except PermissionError:
    pass
else:
    raise AssertionError("escaped")
place.close()
assert os.listdir(own_root) == []
"""


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that any user can reach. pytest's temporary folders are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_user_who_may_not_mount_gets_a_copy_of_all_that_the_user_can_read(
    open_to_all: Path,
) -> None:
    assert IS_ROOT, "this test becomes another user, which takes root"
    harness = harness_with_project(open_to_all, None)
    (harness.project / "secret").write_text("not theirs")
    (harness.project / "secret").chmod(0o600)
    (harness.project / "closed").mkdir()
    (harness.project / "closed" / "file").touch()
    (harness.project / "closed").chmod(0o700)
    os.mkfifo(harness.project / "pipe")
    root = open_to_all / "own"
    root.mkdir()
    find("nobody").own(root)
    command = [sys.executable, "-c", AS_NOBODY, str(harness.project), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_probe_tries_what_this_machine_allows(tmp_path: Path) -> None:
    assert workspaces.probe(tmp_path, None) == ("overlay" if IS_ROOT else "copy")
    assert workspaces.probe(tmp_path, find("nobody")) == "copy"
    assert list(tmp_path.iterdir()) == []


def test_an_overlay_is_not_used_on_a_file_system_that_cannot_have_one(tmp_path: Path) -> None:
    """A container's root may be an overlay, which the kernel refuses as an upper layer."""
    assert IS_ROOT, "this test mounts, which takes root"
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount("-t", "overlay", "overlay", "-o", layers, str(tmp_path / "merged"))
    try:
        assert workspaces.probe(tmp_path / "merged", None) == "copy"
        assert list((tmp_path / "merged").iterdir()) == []
    finally:
        unmount(tmp_path / "merged")


def test_a_folder_is_swept_once_its_process_has_exited_and_not_before(tmp_path: Path) -> None:
    code = """
import sys
from cortex.worker.workspace import _claim
print(_claim(sys.argv[1])[0], flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        (folder / "file").touch()
        workspaces.sweep(tmp_path)
        assert (folder / "file").exists()
        holder.kill()
    workspaces.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_that_takes_no_workspaces_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / ".own").touch()
    with pytest.raises(StartupError, match="cannot be written"):
        workspaces.prepare_workspaces(workspaces.workspaces_of(tmp_path), None)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def unmount(path: Path) -> None:
    subprocess.run(["umount", path], check=True)


def test_a_file_that_is_renamed_while_the_project_is_copied_fails_no_job(tmp_path: Path) -> None:
    """Byte code is such a file: the fork server compiles it at any time, under a temporary name."""
    project, folder = tmp_path / "project", tmp_path / "own"
    for each in (project, folder):
        each.mkdir()
    (project / "task.py").write_text("whole")
    copied = threading.Event()

    def compile_ahead() -> None:
        number = 0
        while not copied.is_set():
            number += 1
            temporary = project / f"task.pyc.{number}"
            temporary.write_text("whole")
            temporary.rename(project / "task.pyc")

    thread = threading.Thread(target=compile_ahead)
    thread.start()
    try:
        copy = Copy(str(project), str(folder))
        for _ in range(200):
            copy.make()
    finally:
        copied.set()
        thread.join()
    copy.make()
    made = Path(copy.project)
    assert sorted(path.name for path in made.iterdir()) == ["task.py", "task.pyc"]
    assert (made / "task.pyc").read_text() == "whole"
