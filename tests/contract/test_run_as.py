"""`cortex serve --run-as`: users' code runs as a user without rights, and reaches nothing of the
operator's. The operator has to be root for that, as it is where these tests are meant to run.
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
from operator_harness import CORTEX, PROBE, Operator, operator, probe_yaml, reachable, until
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
def other() -> Iterator[Operator]:
    with operator_as_root() as running:
        yield running


def snooped(other: Operator) -> Any:
    endpoint = other.deployed(probe_yaml("snoop"), {"probe.py": SNOOP})
    [deployed] = other.data_dir.glob("projects/*/probe.py")
    told = {
        "data": str(other.data_dir),
        "operator": other.process.pid,
        "deployed": str(deployed),
    }
    return other.run(endpoint, config=told)["result"]


def test_a_job_has_no_rights_and_reaches_nothing_of_the_operators(other: Operator) -> None:
    found = snooped(other)
    assert found["ids"][:3] == [UID, UID, UID]
    assert 0 not in found["ids"][3]
    assert int(found["capabilities"], 16) == 0
    for what in ("read", "write", "environ", "kill"):
        assert found[what] == "PermissionError", what
    assert found["own"] == "1"
    assert found["replaced"] == "13"  # in a copy of the project that is the job's own
    assert next(other.data_dir.glob("projects/*/probe.py")).read_text() == SNOOP
    assert other.http.get(f"{other.url}/-/info").json()["own_folder"] == "copy"
    assert found["tmp"] == "0"
    assert len(found["descriptors"]) == 5  # the standard three, its pipe, and that of the listing


def test_its_end_memory_limit_and_stop_are_as_ever(other: Operator) -> None:
    endpoint = other.deployed(
        probe_yaml("limited").replace("cpu: 1m", "cpu: 1m, mem: 64Mi"), {"probe.py": PROBE}
    )
    ends = {
        "succeeded": other.submit(endpoint),
        "worker_error": other.submit(endpoint, config={"do": "leave", "code": 3}),
        "worker_oom": other.submit(endpoint, config={"do": "allocate"}),
        "timed_out": other.submit(endpoint, config={"do": "stubborn"}, timeout=1),
    }
    stubborn = other.submit(endpoint, config={"do": "stubborn"})
    other.await_log(endpoint, stubborn, "asleep")
    other.delete(endpoint, stubborn)
    for end, job in ends.items():
        assert other.finished(endpoint, job)["status"] == f"status_{end}"
    assert "64 MiB" in other.status(endpoint, ends["worker_oom"])["message"]
    assert other.status(endpoint, stubborn)["status"] == "status_stopped"


def test_an_environment_is_built_as_that_user_too(other: Operator) -> None:
    setup = "import os\nfrom setuptools import setup\nos.makedirs('built-as-%d' % os.getuid(), exist_ok=True)\nsetup()"
    files = {
        "probe.py": "import glob\ndef task(config): return glob.glob('/nowhere')",
        "requirements.txt": "./made\n",
        "made/setup.py": setup,
        "made/pyproject.toml": '[project]\nname = "made"\nversion = "1"\n'
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n',
    }
    endpoint = other.deployed(probe_yaml("built"), files)
    done = other.run(endpoint)
    assert done["status"] == "status_succeeded", other.log_of(endpoint, done)
    environments = other.data_dir / "environments"
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
def test_what_a_job_puts_in_its_logs_place_is_not_shown(other: Operator, plant: str) -> None:
    # On the file system of the data folder: what is root's in a folder of theirs, jobs may move.
    with tempfile.TemporaryDirectory(dir=other.data_dir.parent) as root:
        (Path(root) / "secret").write_text("root's")
        (Path(root) / "secret").chmod(0o600)
        os.chown(root, UID, UID)
        code = f"def task(config):\n    exec({PLANT.format(plant=plant)!r})\n"
        endpoint = other.deployed(probe_yaml("planter"), {"probe.py": code})
        job = other.submit(endpoint, config={"root": root})
        assert other.finished(endpoint, job)["status"] == "status_succeeded"
        assert other.log_of(endpoint, job) == REPLACED
        followed = {"Accept": "text/event-stream"}
        events = other.http.get(f"{endpoint}/{job['job_id']}/logs", headers=followed).text
        told, end, _ = events.split("\n\n")
        assert json.dumps(REPLACED) in told
        assert end.startswith("event: end\n")


@pytest.mark.parametrize(
    "plant", ['os.symlink("/dev/zero", folder + "/log.cut")', 'os.mkfifo(folder + "/log.cut")']
)
def test_what_a_job_puts_in_place_of_what_tells_of_a_gap_is_not_read(
    other: Operator, plant: str
) -> None:
    code = f"def task(config):\n    print('said')\n    folder = {FOLDER}\n    {plant}\n"
    endpoint = other.deployed(probe_yaml("planter"), {"probe.py": f"import os\n{code}"})
    job = other.submit(endpoint)
    assert other.finished(endpoint, job)["status"] == "status_succeeded"
    assert other.log_of(endpoint, job) == "said\n"


@pytest.mark.parametrize("record", ["exit.1", "start.1"])
def test_a_job_that_spoils_its_records_harms_itself_alone(other: Operator, record: str) -> None:
    code = (
        "import os, time\ndef task(config):\n"
        "    path = os.path.dirname(os.environ['CORTEX_JOB_SPEC'])\n"
        f"    open(path + '/{record}', 'w').write('{{')\n"
    )
    endpoint = other.deployed(probe_yaml("spoiler"), {"probe.py": code})
    done = other.finished(endpoint, other.submit(endpoint))
    assert done["status"] in ("status_succeeded", "status_unexpected_error")
    assert other.http.get(f"{other.url}/readyz").status_code == 200


def test_a_job_that_locks_its_folder_ends_as_it_ends(other: Operator) -> None:
    code = (
        "import os\ndef task(config):\n"
        "    os.chmod(os.path.dirname(os.environ['CORTEX_JOB_SPEC']), 0o500)\n"
    )
    endpoint = other.deployed(probe_yaml("locker"), {"probe.py": code})
    assert other.run(endpoint)["status"] == "status_succeeded"


def test_a_running_job_outlives_the_operator(other: Operator) -> None:
    endpoint = other.deployed(probe_yaml(), {"probe.py": PROBE})
    job = other.submit(endpoint, config={"do": "sleep", "s": 3})
    other.await_log(endpoint, job, "asleep")
    other.kill()
    other.start()
    assert other.finished(f"{other.url}/probe", job)["status"] == "status_succeeded"


def test_the_database_is_nobody_elses(shared_operator: Operator) -> None:
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
def test_a_user_that_cannot_be_is_told(
    tmp_path: Path, user: str, as_user: int | None, words: str
) -> None:
    within = [] if as_user is None else [*reachable(), "setpriv", f"--reuid={as_user}"]
    done = subprocess.run(
        [*within, CORTEX, "serve", "--run-as", user, "--data-dir", str(tmp_path), "--port", "0"],
        capture_output=True, text=True, timeout=60, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_user_that_cannot_reach_python_is_told(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir(mode=0o700)
    done = subprocess.run(
        [CORTEX, "serve", "--run-as", USER, "--data-dir", str(hidden / "data"), "--port", "0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "jobs cannot run as 'nobody'" in done.stderr


def test_what_is_restored_is_the_jobs_user_s(other: Operator) -> None:
    yaml = probe_yaml("restored", more="  retries: 1\n")
    path = other.deployed(yaml, {"probe.py": PROBE}).removeprefix(other.url)
    done = other.submit(other.url + path, config={"do": "say"})
    other.finished(other.url + path, done)
    runs = other.submit(other.url + path, config={"do": "sleep", "s": 300})
    other.await_log(other.url + path, runs, "asleep")
    with passable_folder() as folder:
        file = str(folder / "backup.tar.gz")
        for words in (
            ["backup", file, "--data-dir", str(other.data_dir)],
            ["restore", file, "--data-dir", str(folder / "data"), "--run-as", USER],
        ):
            made = preloaded_cli.run(*words)
            assert made.returncode == 0, made.stderr
        with operator(folder, "--run-as", USER, within=reachable()) as third:
            for job in (done, runs):
                log = third.data_dir / "jobs" / job["job_id"] / "log"
                assert (log.stat().st_uid, log.parent.stat().st_uid) == (UID, UID)
            assert third.log_of(third.url + path, done) == "line 0\n"
            until(lambda: third.log_of(third.url + path, runs).count("asleep") == 2, "again")
    assert other.delete(other.url + path, runs).status_code == 200
