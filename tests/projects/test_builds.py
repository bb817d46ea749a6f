"""Builds whose code is hostile, hangs or leaves processes behind; the real uv runs them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

from build_projects import make_project
from cortex.projects import build_rules, builder, environments, lockfiles
from cortex.projects.build_rules import BuildRules
from cortex.projects.builder import EnvironmentFailed
from cortex.projects.environments import Environments
from operator_harness import until

WAIT_TIMEOUT_S = 150
T = TypeVar("T")
LONG_TIMEOUT = BuildRules(timeout_s=WAIT_TIMEOUT_S)
BUILD = (
    "import asyncio, sys; from pathlib import Path\n"
    "from cortex.projects.environments import Environments\n"
    "asyncio.run(Environments(Path(sys.argv[1])).build(Path(sys.argv[2])))\n"
)
LEAVE = "daemonise({daemon!r})\nopen({own!r}, 'w').write(os.readlink('/proc/self'))\nhang()\n"


class Hanging:
    """A project whose build daemonises a process and then hangs."""

    def __init__(self, folder: Path, before: str = "") -> None:
        self._pids = [folder / "daemon", folder / "own"]
        daemon, own = map(str, self._pids)
        self.project = make_project(
            folder / f"p-{folder.name}", before + LEAVE.format(daemon=daemon, own=own)
        )

    @property
    def has_begun(self) -> bool:
        return self._pids[1].exists() and bool(self._pids[1].read_text())

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self._pids]

    @property
    def supervisor(self) -> int:
        pid = self.pids()[1]
        while b"build_supervisor.py" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            pid = parent(pid)
        return pid

    async def begun(self) -> None:
        await asyncio.to_thread(until, lambda: self.has_begun, "the build")


async def hanging_builds(
    made: Environments, folder: Path, number: int
) -> tuple[list[Hanging], list[asyncio.Task[Path]]]:
    """Start the builds of `number` projects; each of them hangs."""
    hanging = [Hanging(folder / str(n), f"# {n}\n") for n in range(number)]
    builds = [asyncio.create_task(made.build(each.project)) for each in hanging]
    for each in hanging:
        await each.begun()
    return hanging, builds


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "environments"


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run(work: Coroutine[object, object, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, WAIT_TIMEOUT_S))


def leftovers(root: Path) -> list[Path]:
    return [path for folder in root.iterdir() for path in folder.iterdir()]


def test_the_daemons_of_a_build_end_with_it(root: Path, tmp_path: Path) -> None:
    daemon = tmp_path / "daemon"
    mine = make_project(tmp_path / "p", f"daemonise({str(daemon)!r})\n")
    python = run(Environments(root).build(mine))
    assert not is_alive(int(daemon.read_text()))
    done = subprocess.run([python, "-c", "import made; print(made.VALUE)"], check=True, stdout=-1)
    assert done.stdout == b"7\n"
    assert not list(root.glob("*/*/tmp"))


def test_a_build_that_times_out_is_killed_with_its_processes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = Hanging(tmp_path, "print('about to hang', flush=True)\n")
    timed_out = builder._timed_out

    async def after_the_start(
        process: subprocess.Popen[bytes], lifeline: int, timeout_s: float
    ) -> bool:
        assert timeout_s == 1234
        await hanging.begun()
        return await timed_out(process, lifeline, 0.01)

    monkeypatch.setattr(builder, "_timed_out", after_the_start)
    with pytest.raises(EnvironmentFailed, match="uv pip install timed out after 1234 s") as raised:
        run(Environments(root, rules=BuildRules(timeout_s=1234)).build(hanging.project))
    assert not any(map(is_alive, hanging.pids()))
    assert "not built within 1234 s" in raised.value.reason
    assert "--build-timeout" in raised.value.reason
    assert "uv pip install timed out" in raised.value.output
    assert leftovers(root) == []


def test_a_build_has_no_time_limit_while_it_waits_for_others(root: Path, tmp_path: Path) -> None:
    async def main() -> None:
        made = Environments(root, rules=LONG_TIMEOUT)
        _, builds = await hanging_builds(made, tmp_path, 2)
        made.rules = BuildRules(timeout_s=WAIT_TIMEOUT_S / 2)
        third = asyncio.create_task(made.build(make_project(tmp_path / "third", "")))
        await asyncio.sleep(0.2)
        assert not third.done()
        for build in builds:
            build.cancel()
        assert await third
        await asyncio.gather(*builds, return_exceptions=True)

    run(main())


def test_slow_builds_make_room_for_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "_QUICK_BUILD_S", 0.05)

    async def main() -> None:
        made = Environments(root, rules=LONG_TIMEOUT)
        hanging, builds = await hanging_builds(made, tmp_path, 3)
        assert await made.build(make_project(tmp_path / "quick", ""))
        for build in builds:
            build.cancel()
        await asyncio.gather(*builds, return_exceptions=True)
        assert not any(is_alive(pid) for each in hanging for pid in each.pids())
        assert made._quick_builds._value == 2
        assert made._all_builds._value == 8

    run(main())


def test_an_environment_without_packages_waits_for_no_other_build(
    root: Path, tmp_path: Path
) -> None:
    async def main() -> None:
        made = Environments(root, rules=LONG_TIMEOUT)
        _, builds = await hanging_builds(made, tmp_path, 2)
        (tmp_path / "plain").mkdir()
        assert await made.build(tmp_path / "plain")
        for build in builds:
            build.cancel()
        await asyncio.gather(*builds, return_exceptions=True)

    run(main())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_build_ends_with_its_operator(root: Path, tmp_path: Path, how: signal.Signals) -> None:
    hanging = Hanging(tmp_path)
    operator = subprocess.Popen([sys.executable, "-c", BUILD, root, hanging.project])
    try:
        until(lambda: hanging.has_begun, "the build")
    finally:
        operator.send_signal(how)
        operator.wait()
    until(lambda: not any(map(is_alive, hanging.pids())), "the end of the build")
    assert Environments(root).built_python(hanging.project) is None


@pytest.mark.parametrize("by", ["the next build", "the next operator"])
def test_leftovers_of_a_build_whose_supervisor_was_killed_are_killed(
    root: Path, tmp_path: Path, by: str
) -> None:
    go, own = tmp_path / "go", tmp_path / "own"
    code = (
        f"if pathlib.Path({str(go)!r}).exists():\n    raise SystemExit('the second build')\n"
        f"open({str(own)!r}, 'w').write(os.readlink('/proc/self'))\nhang()\n"
    )
    mine = make_project(tmp_path / "p", code)
    operator = subprocess.Popen([sys.executable, "-c", BUILD, root, mine])
    until(lambda: own.exists() and own.read_text(), "the build")
    pid = above = int(own.read_text())
    while b"build_supervisor.py" not in Path(f"/proc/{above}/cmdline").read_bytes():
        above = parent(above)
    os.kill(
        operator.pid, signal.SIGSTOP
    )  # the operator must not observe the death of the supervisor
    os.kill(above, signal.SIGKILL)
    operator.kill()
    operator.wait()
    assert is_alive(pid)
    if by == "the next operator":
        Environments(root).end_leftover_builds()
        assert not is_alive(pid)
        return
    go.touch()
    with pytest.raises(EnvironmentFailed, match="uv pip install failed"):
        run(Environments(root).build(mine))
    assert not is_alive(pid)


def test_a_build_that_kills_its_supervisor_fails_and_leaves_nothing(
    root: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    code = (
        f"open({str(own)!r}, 'w').write(os.readlink('/proc/self'))\n"
        "pid = os.getpid()\n"
        "while b'build_supervisor.py' not in open(f'/proc/{pid}/cmdline', 'rb').read():\n"
        "    pid = int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
        "os.kill(pid, signal.SIGKILL)\nhang()\n"
    )
    mine = make_project(tmp_path / "p", code)
    with pytest.raises(EnvironmentFailed, match="the supervisor of uv pip install was killed"):
        run(Environments(root).build(mine))
    assert not is_alive(int(own.read_text()))
    assert leftovers(root) == []


@pytest.mark.parametrize("again", ["", "while True:\n{stop}"], ids=["once", "again and again"])
def test_a_build_that_stops_its_supervisor_is_killed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    monkeypatch.setattr(builder, "_END_TIMEOUT_S", 1.0 if again else 30.0)
    own = tmp_path / "own"
    stop = "    os.kill(pid, signal.SIGSTOP)\n"
    code = (
        "pid = os.getpid()\n"
        "while b'build_supervisor.py' not in open(f'/proc/{pid}/cmdline', 'rb').read():\n"
        "    pid = int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
        f"if True:\n{stop}"
        f"open({str(own)!r}, 'w').write(os.readlink('/proc/self'))\n"
        f"{again}hang()\n"
    ).replace("{stop}", stop)

    async def main() -> None:
        build = asyncio.create_task(Environments(root).build(make_project(tmp_path / "p", code)))
        await asyncio.to_thread(until, lambda: own.exists() and own.read_text(), "the build")
        build.cancel()
        await asyncio.gather(build, return_exceptions=True)

    run(main())
    assert not is_alive(int(own.read_text()))
    assert leftovers(root) == []


def test_a_lack_of_descriptors_is_reported_and_leaks_none(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    pipe = os.pipe
    made: list[tuple[int, int]] = []

    def no_descriptor(*_: object) -> NoReturn:
        raise full

    def first_pipe_only() -> tuple[int, int]:
        made.append(pipe() if not made else no_descriptor())
        return made[-1]

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    (tmp_path / "p").mkdir()

    async def main() -> None:
        before = descriptors()
        for name, substitute in (("pipe", first_pipe_only), ("pidfd_open", no_descriptor)):
            with (
                monkeypatch.context() as short,
                pytest.raises(OSError, match="open files") as raised,
            ):
                short.setattr(os, name, substitute)
                await Environments(root).build(tmp_path / "p")
            assert raised.value.errno == errno.EMFILE
        assert descriptors() == before
        assert leftovers(root) == []

    run(main())


def test_a_build_that_forks_without_end_is_killed(root: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = (
        "import threading\n"
        f"open({str(begun)!r}, 'w').write('x')\n"
        "def breed(depth):\n"
        "    while True:\n"
        "        if os.fork() == 0:\n"
        "            os.setsid()\n"
        "            if depth < 1: breed(depth + 1)\n"
        "            time.sleep(600)\n"
        "        time.sleep(0.02)\n"
        "breed(0)\n"
    )

    async def main() -> None:
        build = asyncio.create_task(Environments(root).build(make_project(tmp_path / "p", code)))
        await asyncio.to_thread(until, begun.exists, "the build")
        await asyncio.sleep(0.2)
        build.cancel()
        await asyncio.gather(build, return_exceptions=True)

    run(main())
    marked = [
        entry.name
        for entry in Path("/proc").glob("[0-9]*")
        if str(root).encode() in (environ(entry) or b"")
    ]
    assert marked == []


def environ(process: Path) -> bytes | None:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return None


def test_a_build_gets_no_new_privileges_and_few_descriptors(root: Path, tmp_path: Path) -> None:
    found = tmp_path / "found"
    code = (
        "status = open('/proc/self/status').read()\n"
        "out = os.readlink('/proc/self/fd/0')\n"
        f"open({str(found)!r}, 'w').write(status.partition('NoNewPrivs:')[2].split()[0] + out)\n"
    )
    run(Environments(root).build(make_project(tmp_path / "p", code)))
    assert found.read_text() == "1/dev/null"


def test_a_build_gets_the_variables_of_the_allow_list_and_no_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = {
        "UV_INDEX_MINE_PASSWORD", "PIP_CONFIG_FILE", "https_proxy", "No_Proxy", "LC_TIME", "CFLAGS",
        "XDG_CONFIG_HOME", "NAMED", "UV_NO_INDEX",
    }  # fmt: skip
    refused = {
        "AWS_SECRET_ACCESS_KEY", "CORTEX_SERVE_STORE", "CORTEX_TOKEN", "FSSPEC_S3_SECRET", "PGPASSWORD",
        "DATABASE_URL", "GITHUB_TOKEN", "HF_TOKEN", "SSH_AUTH_SOCK", "UV_PUBLISH_TOKEN", "LD_PRELOAD_X",
        "CARGO_REGISTRY_TOKEN", "PYTHONPATH", "UV_SYSTEM_PYTHON", "OTHER",
    }  # fmt: skip
    for name in allowed | refused:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    found = tmp_path / "found"
    code = (
        "import json\n"
        "names = open('/proc/self/environ').read().split(chr(0))\n"
        f"open({str(found)!r}, 'w').write(json.dumps([n.partition('=')[0] for n in names]))\n"
    )
    rules = BuildRules(variables=frozenset({"NAMED"}))
    run(Environments(root, rules=rules).build(make_project(tmp_path / "p", code)))
    names = set(json.loads(found.read_text()))
    assert allowed <= names
    assert names & refused == set()
    assert not [name for name in names if name.startswith(("AWS_", "CORTEX_", "PG"))]


def test_the_allow_list_of_variables_is_documented() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    page = guide[
        guide.index("### A build's environment variables") : guide.index(
            "### Variables of Python's own"
        )
    ]
    named = set(re.findall(r"`(\w+)`", page)) | {*re.findall(r"`(\w+)…`", page)}
    names = build_rules._NAMES | build_rules._PROXIES | {*build_rules._PREFIXES}
    assert names | {build_rules._OWN_FOLDERS} <= named


def test_a_build_as_another_user_does_not_inherit_the_operators_folders() -> None:
    found = BuildRules().inherited({"XDG_CACHE_HOME": "/root/x", "PATH": "/"}, is_own_user=False)
    assert found == {"PATH": "/"}


def test_links_in_an_environment_are_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    made = Environments(root)
    python = run(made.build(tmp_path / "p"))
    packages = next((python.parents[1] / "lib").glob("python*")) / "site-packages"
    (packages / "one-1.0.dist-info").mkdir(parents=True)
    assert lockfiles.installed_versions(python) == "one==1.0\n"
    packages.rename(tmp_path / "elsewhere")
    packages.symlink_to(tmp_path / "elsewhere")
    assert lockfiles.installed_versions(python) == ""
    assert made.built_python(tmp_path / "p") == python
    python.parent.rename(tmp_path / "bin")
    python.parent.symlink_to(tmp_path / "bin")
    assert made.built_python(tmp_path / "p") is None


def test_an_environment_without_its_python_is_not_built(root: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    made = Environments(root)
    python = run(made.build(tmp_path / "p"))
    for target in ("/nowhere/python", "python", "../bin/python", "python4"):
        python.unlink()
        python.symlink_to(target)
        assert made.built_python(tmp_path / "p") is None


def test_only_the_end_of_a_builds_output_is_reported(root: Path, tmp_path: Path) -> None:
    code = "print('x' * (1 << 20), flush=True)\nraise SystemExit('the end')\n"
    with pytest.raises(EnvironmentFailed) as raised:
        run(Environments(root).build(make_project(tmp_path / "p", code)))
    assert len(raised.value.output) <= builder._MAX_OUTPUT
    assert "the end" in raised.value.output


def test_a_failed_copy_of_the_project_reports_its_reason(root: Path, tmp_path: Path) -> None:
    mine = make_project(tmp_path / "p", "")
    (mine / "made" / "pipe").mkdir()
    os.mkfifo(mine / "made" / "pipe" / "one")
    with pytest.raises(EnvironmentFailed, match="the copy of the project failed") as raised:
        run(Environments(root).build(mine))
    assert "is a named pipe" in raised.value.output
