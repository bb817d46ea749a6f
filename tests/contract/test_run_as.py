"""`cortex serve --run-as`: jobs run as an unprivileged user without access to the operator.

The operator, and so these tests, must run as root.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import preloaded_cli
from cortex.joblog.reader import REPLACED
from operator_harness import (
    CORTEX,
    PROBE,
    Operator,
    operator,
    probe_yaml,
    reachable_interpreter,
    until,
)
from root_operator import UID, USER, operator_as_root, passable_folder

SNOOP = """
import os, signal, subprocess, sys


def attempt(action, *arguments):
    try:
        return str(action(*arguments))
    except OSError as error:
        return type(error).__name__


def task(config):
    data, here = config["data"], os.environ["CORTEX_JOB_DIR"]
    operator = config["operator"]
    return {
        "ids": [os.getuid(), os.geteuid(), os.getgid(), os.getgroups()],
        "capabilities": [l.split()[1] for l in open("/proc/self/status") if l[:6] == "CapEff"][0],
        "home": os.environ["HOME"],
        "read": attempt(open, data + "/operator.db"),
        "write": attempt(open, config["deployed"], "a"),
        "replaced": attempt(lambda: open("probe.py", "a").write("# of this job")),
        "environ": attempt(open, f"/proc/{operator}/environ"),
        "kill": attempt(os.kill, operator, signal.SIGKILL),
        "own": attempt(lambda: open(here + "/mine", "w").write("x")),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "tmp": attempt(lambda: subprocess.run(["true"]).returncode),
    }
"""
FOLDER = 'os.path.dirname(os.environ["CORTEX_JOB_SPEC"])'
PLANT = f"""
import json
import os
folder = {FOLDER}
os.unlink(folder + "/log")
{{plant}}
"""


@pytest.fixture(scope="module")
def run_as_operator() -> Iterator[Operator]:
    with operator_as_root() as running:
        yield running


def run_snoop(run_as_operator: Operator) -> Any:
    endpoint = run_as_operator.deployed(probe_yaml("snoop"), {"probe.py": SNOOP})
    [deployed] = run_as_operator.data_dir.glob("projects/*/probe.py")
    config = {
        "data": str(run_as_operator.data_dir),
        "operator": run_as_operator.process.pid,
        "deployed": str(deployed),
    }
    return run_as_operator.run(endpoint, config=config)["result"]


def test_a_job_has_no_rights_and_no_access_to_the_operator(run_as_operator: Operator) -> None:
    found = run_snoop(run_as_operator)
    assert found["ids"][:3] == [UID, UID, UID]
    assert 0 not in found["ids"][3]
    assert int(found["capabilities"], 16) == 0
    for what in ("read", "write", "environ", "kill"):
        assert found[what] == "PermissionError", what
    assert found["own"] == "1"
    assert found["replaced"] == "13"  # in the job's own copy of the project
    assert next(run_as_operator.data_dir.glob("projects/*/probe.py")).read_text() == SNOOP
    assert run_as_operator.http.get(f"{run_as_operator.url}/-/info").json()["own_folder"] == "copy"
    assert found["tmp"] == "0"
    # The three standard ones, the job's pipe, and the one that lists the folder.
    assert len(found["descriptors"]) == 5


def test_ends_limits_and_stops_work_with_run_as(run_as_operator: Operator) -> None:
    endpoint = run_as_operator.deployed(
        probe_yaml("limited").replace("cpu: 1m", "cpu: 1m, mem: 64Mi"), {"probe.py": PROBE}
    )
    ends = {
        "succeeded": run_as_operator.submit(endpoint),
        "worker_error": run_as_operator.submit(endpoint, config={"do": "leave", "code": 3}),
        "worker_oom": run_as_operator.submit(endpoint, config={"do": "allocate"}),
        "timed_out": run_as_operator.submit(endpoint, config={"do": "stubborn"}, timeout=1),
    }
    stubborn = run_as_operator.submit(endpoint, config={"do": "stubborn"})
    run_as_operator.await_log(endpoint, stubborn, "asleep")
    run_as_operator.delete(endpoint, stubborn)
    for end, job in ends.items():
        assert run_as_operator.finished(endpoint, job)["status"] == f"status_{end}"
    assert "64 MiB" in run_as_operator.status(endpoint, ends["worker_oom"])["message"]
    assert run_as_operator.status(endpoint, stubborn)["status"] == "status_stopped"


def test_an_environment_is_built_as_the_jobs_user(run_as_operator: Operator) -> None:
    setup = "import os\nfrom setuptools import setup\nos.makedirs('built-as-%d' % os.getuid(), exist_ok=True)\nsetup()"
    files = {
        "probe.py": "import glob\ndef task(config): return glob.glob('/nowhere')",
        "requirements.txt": "./made\n",
        "made/setup.py": setup,
        "made/pyproject.toml": '[project]\nname = "made"\nversion = "1"\n'
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n',
    }
    endpoint = run_as_operator.deployed(probe_yaml("built"), files)
    done = run_as_operator.run(endpoint)
    assert done["status"] == "status_succeeded", run_as_operator.log_of(endpoint, done)
    environments = run_as_operator.data_dir / "environments"
    assert list(environments.glob(f"*/*/source/made/built-as-{UID}"))
    owners = {path.stat().st_uid for path in environments.glob("*/*/venv")}
    assert owners == {UID}


@pytest.mark.parametrize(
    "plant",
    [
        'os.symlink("/etc/shadow", folder + "/log")',
        'os.symlink("log", folder + "/log")',
        'os.mkfifo(folder + "/log")',
        'os.mkdir(folder + "/log")',
        'import socket; socket.socket(socket.AF_UNIX).bind(folder + "/log")',
        'os.link(folder + "/job.json", folder + "/log")',
        'os.rename(config["root"] + "/secret", folder + "/log")',
    ],
)
def test_a_file_that_replaces_a_log_is_not_served(run_as_operator: Operator, plant: str) -> None:
    # On the file system of the data folder: in a folder of their user, jobs may move root's files.
    with tempfile.TemporaryDirectory(dir=run_as_operator.data_dir.parent) as root:
        (Path(root) / "secret").write_text("root's")
        (Path(root) / "secret").chmod(0o600)
        os.chown(root, UID, UID)
        code = f"def task(config):\n    exec({PLANT.format(plant=plant)!r})\n"
        endpoint = run_as_operator.deployed(probe_yaml("planter"), {"probe.py": code})
        job = run_as_operator.submit(endpoint, config={"root": root})
        assert run_as_operator.finished(endpoint, job)["status"] == "status_succeeded"
        assert run_as_operator.log_of(endpoint, job) == REPLACED
        followed = {"Accept": "text/event-stream"}
        events = run_as_operator.http.get(f"{endpoint}/{job['job_id']}/logs", headers=followed).text
        log_event, end, _ = events.split("\n\n")
        assert json.dumps(REPLACED) in log_event
        assert end.startswith("event: end\n")


@pytest.mark.parametrize(
    "plant", ['os.symlink("/dev/zero", folder + "/log.cut")', 'os.mkfifo(folder + "/log.cut")']
)
def test_a_link_or_pipe_that_replaces_log_cut_is_not_read(
    run_as_operator: Operator, plant: str
) -> None:
    code = f"def task(config):\n    print('said')\n    folder = {FOLDER}\n    {plant}\n"
    endpoint = run_as_operator.deployed(probe_yaml("planter"), {"probe.py": f"import os\n{code}"})
    job = run_as_operator.submit(endpoint)
    assert run_as_operator.finished(endpoint, job)["status"] == "status_succeeded"
    assert run_as_operator.log_of(endpoint, job) == "said\n"


@pytest.mark.parametrize("record", ["exit.1", "start.1"])
def test_a_job_that_overwrites_its_records_harms_only_itself(
    run_as_operator: Operator, record: str
) -> None:
    code = (
        "import os, time\ndef task(config):\n"
        "    path = os.path.dirname(os.environ['CORTEX_JOB_SPEC'])\n"
        f"    open(path + '/{record}', 'w').write('{{')\n"
    )
    endpoint = run_as_operator.deployed(probe_yaml("spoiler"), {"probe.py": code})
    done = run_as_operator.finished(endpoint, run_as_operator.submit(endpoint))
    assert done["status"] in ("status_succeeded", "status_unexpected_error")
    assert run_as_operator.http.get(f"{run_as_operator.url}/readyz").status_code == 200


def test_a_job_that_makes_its_folder_read_only_succeeds(run_as_operator: Operator) -> None:
    code = (
        "import os\ndef task(config):\n"
        "    os.chmod(os.path.dirname(os.environ['CORTEX_JOB_SPEC']), 0o500)\n"
    )
    endpoint = run_as_operator.deployed(probe_yaml("locker"), {"probe.py": code})
    assert run_as_operator.run(endpoint)["status"] == "status_succeeded"


def test_a_running_job_outlives_the_operator(run_as_operator: Operator) -> None:
    endpoint = run_as_operator.deployed(probe_yaml(), {"probe.py": PROBE})
    job = run_as_operator.submit(endpoint, config={"do": "sleep", "s": 3})
    run_as_operator.await_log(endpoint, job, "asleep")
    run_as_operator.kill()
    run_as_operator.start()
    assert (
        run_as_operator.finished(f"{run_as_operator.url}/probe", job)["status"]
        == "status_succeeded"
    )


def test_no_other_user_can_read_the_database(shared_operator: Operator) -> None:
    found = list(shared_operator.data_dir.glob("operator.db*"))
    assert len(found) == 3
    assert [path for path in found if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize(
    ("user", "as_user", "words"),
    [
        ("no-such-user", None, "no user 'no-such-user'"),
        ("root", None, "--run-as root is root"),
        (USER, 65534, "only root can run jobs"),
    ],
)
def test_an_impossible_user_is_refused_with_the_reason(
    tmp_path: Path, user: str, as_user: int | None, words: str
) -> None:
    command_prefix = (
        [] if as_user is None else [*reachable_interpreter(), "setpriv", f"--reuid={as_user}"]
    )
    done = subprocess.run(
        [*command_prefix, CORTEX, "serve", "--run-as", user, "--data-dir", str(tmp_path), "--port", "0"],
        capture_output=True, text=True, timeout=60, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_user_who_cannot_reach_python_is_refused(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    done = subprocess.run(
        [CORTEX, "serve", "--run-as", USER, "--data-dir", str(hidden / "data"), "--port", "0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "jobs cannot run as 'nobody'" in done.stderr


def test_restored_job_folders_belong_to_the_jobs_user(run_as_operator: Operator) -> None:
    yaml = probe_yaml("restored", more="  retries: 1\n")
    path = run_as_operator.deployed(yaml, {"probe.py": PROBE}).removeprefix(run_as_operator.url)
    done = run_as_operator.submit(run_as_operator.url + path, config={"do": "say"})
    run_as_operator.finished(run_as_operator.url + path, done)
    runs = run_as_operator.submit(run_as_operator.url + path, config={"do": "sleep", "s": 300})
    run_as_operator.await_log(run_as_operator.url + path, runs, "asleep")
    with passable_folder() as folder:
        file = str(folder / "backup.tar.gz")
        for words in (
            ["backup", file, "--data-dir", str(run_as_operator.data_dir)],
            ["restore", file, "--data-dir", str(folder / "data"), "--run-as", USER],
        ):
            made = preloaded_cli.run(*words)
            assert made.returncode == 0, made.stderr
        with operator(folder, "--run-as", USER, command_prefix=reachable_interpreter()) as third:
            for job in (done, runs):
                log = third.data_dir / "jobs" / job["job_id"] / "log"
                assert (log.stat().st_uid, log.parent.stat().st_uid) == (UID, UID)
            assert third.log_of(third.url + path, done) == "line 0\n"
            until(
                lambda: third.log_of(third.url + path, runs).count("asleep") == 2,
                "the restored job runs again",
            )
    assert run_as_operator.delete(run_as_operator.url + path, runs).status_code == 200
