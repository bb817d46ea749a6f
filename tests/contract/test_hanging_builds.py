"""Builds of environments that hang, and delay no other use of the operator."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_projects import project_files
from operator_harness import Operator, operator, probe_yaml, until

TASK = "def task(config):\n    import made\n    return made.VALUE\n"


class Build:
    """A build that logs its pid, and then waits until the test creates the file `go`, if ever."""

    def __init__(self, folder: Path, name: str) -> None:
        self.log, self.go = folder / f"{name}.log", folder / f"{name}.go"
        wait = f"while not os.path.exists({str(self.go)!r}):\n    time.sleep(0.02)\n"
        code = (
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"log = os.open({str(self.log)!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n"
            f"os.write(log, f'{{os.getpid()}}\\n'.encode())\n{wait}"
        )
        self.files = {"probe.py": TASK, **project_files(code, name)}

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.log.read_text().split()] if self.log.exists() else []

    def wait_for_start(self, number: int = 1) -> int:
        until(lambda: len(self.pids()) == number, f"build {number} has started")
        return self.pids()[-1]

    def wait_for_end(self) -> None:
        until(
            lambda: not any(Path(f"/proc/{pid}").exists() for pid in self.pids()),
            "all processes of the build have exited",
        )


def deploy_and_run(own_operator: Operator, name: str, build: Build) -> None:
    endpoint = own_operator.deployed(probe_yaml(name), build.files)
    build.go.touch()
    assert own_operator.run(endpoint)["result"] == 7


def test_a_build_over_its_time_limit_fails_the_jobs_that_wait_for_it(tmp_path: Path) -> None:
    build = Build(tmp_path, "hang")
    with operator(tmp_path, "--build-timeout", "2.5") as own_operator:
        endpoint = own_operator.deployed(probe_yaml("hang"), build.files)
        done = own_operator.run(endpoint)
        assert done["status"] == "status_unexpected_error"
        assert "not built within 2.5 s" in done["message"]
        assert "--build-timeout" in done["message"]
        assert "timed out: it took longer than 2.5 s" in own_operator.log_of(endpoint, done)
        build.wait_for_end()


def test_the_build_of_a_deleted_api_ends_and_delays_no_other(
    own_operator: Operator, tmp_path: Path
) -> None:
    hanging = [Build(tmp_path, f"hang{n}") for n in range(2)]
    for number, build in enumerate(hanging):
        endpoint = own_operator.deployed(probe_yaml(f"hang{number}"), build.files)
        own_operator.submit(endpoint)
        build.wait_for_start()
    other = Build(tmp_path, "other")
    endpoint = own_operator.deployed(probe_yaml("other"), other.files)
    job = own_operator.submit(endpoint)
    assert other.pids() == []
    for number, build in enumerate(hanging):
        own_operator.http.delete(f"{own_operator.url}/-/apis/hang{number}")
        build.wait_for_end()
    other.go.touch()
    assert own_operator.finished(endpoint, job)["result"] == 7
    assert [len(build.pids()) for build in hanging] == [1, 1]


def test_the_build_of_a_superseded_version_ends_when_no_job_waits_for_it(
    own_operator: Operator, tmp_path: Path
) -> None:
    first, second = Build(tmp_path, "first"), Build(tmp_path, "second")
    own_operator.deployed(probe_yaml(), first.files)
    first.wait_for_start()
    deploy_and_run(own_operator, "probe", second)
    first.wait_for_end()


def test_a_build_continues_as_long_as_a_job_waits_for_it(
    own_operator: Operator, tmp_path: Path
) -> None:
    first, second = Build(tmp_path, "first"), Build(tmp_path, "second")
    endpoint = own_operator.deployed(probe_yaml(), first.files)
    jobs = [own_operator.submit(endpoint) for _ in range(2)]
    pid = first.wait_for_start()
    deploy_and_run(own_operator, "probe", second)
    own_operator.delete(endpoint, jobs[0])
    assert own_operator.finished(endpoint, jobs[0])["status"] == "status_stopped"
    assert Path(f"/proc/{pid}").exists()
    own_operator.delete(endpoint, jobs[1])
    first.wait_for_end()
    assert own_operator.finished(endpoint, jobs[1])["status"] == "status_stopped"


def test_the_build_of_a_superseded_version_ends_when_its_job_times_out(
    own_operator: Operator, tmp_path: Path
) -> None:
    first, second = Build(tmp_path, "first"), Build(tmp_path, "second")
    endpoint = own_operator.deployed(probe_yaml(), first.files)
    first.wait_for_start()
    job = own_operator.submit(endpoint, timeout=3)
    deploy_and_run(own_operator, "probe", second)
    assert own_operator.finished(endpoint, job)["status"] == "status_timed_out"
    first.wait_for_end()


def test_a_new_version_of_the_same_requirements_continues_the_build(
    own_operator: Operator, tmp_path: Path
) -> None:
    build = Build(tmp_path, "same")
    own_operator.deployed(probe_yaml(), build.files)
    build.wait_for_start()
    endpoint = own_operator.deployed(probe_yaml(more="  limits: {max_running: 3}\n"), build.files)
    job = own_operator.submit(endpoint)
    build.go.touch()
    assert own_operator.finished(endpoint, job)["result"] == 7
    assert len(build.pids()) == 1


@pytest.mark.parametrize("way", ["kill", "stop"])
def test_a_build_ends_with_its_operator_and_starts_again_once(
    own_operator: Operator, tmp_path: Path, way: str
) -> None:
    build = Build(tmp_path, "slow")
    endpoint = own_operator.deployed(probe_yaml(), build.files)
    job = own_operator.submit(endpoint)
    build.wait_for_start()
    for restart in range(2):
        getattr(own_operator, way)()
        build.wait_for_end()
        own_operator.start()
        build.wait_for_start(restart + 2)
    build.go.touch()
    endpoint = f"{own_operator.url}/probe"
    assert own_operator.finished(endpoint, job)["result"] == 7
    assert len(build.pids()) == 3


def test_an_api_that_is_deployed_again_is_built_again(
    own_operator: Operator, tmp_path: Path
) -> None:
    build = Build(tmp_path, "again")
    own_operator.deployed(probe_yaml(), build.files)
    build.wait_for_start()
    own_operator.http.delete(f"{own_operator.url}/-/apis/probe")
    build.wait_for_end()
    endpoint = own_operator.deployed(probe_yaml(), build.files)
    build.wait_for_start(2)
    build.go.touch()
    assert own_operator.run(endpoint)["result"] == 7
