"""Hostile code in builds of environments, with `cortex serve --run-as`.

Such a build reaches no file of root's, and ends when the operator cancels it or exits. These tests
need to run as root.
"""

from __future__ import annotations

import json
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_projects import project_files
from operator_harness import PROBE, Operator, probe_yaml, until
from root_operator import UID, USER, operator_as_root

SWAPPER = """
import os, time


def task(config):
    above, known = config["environments"], set()
    for name in os.listdir(above):
        known |= {f"{name}/{each}" for each in os.listdir(f"{above}/{name}")}
    print("watching", flush=True)
    while True:
        for name in os.listdir(above):
            for each in os.listdir(f"{above}/{name}"):
                source = f"{above}/{name}/{each}/source"
                if f"{name}/{each}" not in known and os.path.isdir(source):
                    os.rename(source, source + ".moved")
                    os.symlink(config["victim"], source)
                    return len(os.listdir(source + ".moved"))
"""


@pytest.fixture(scope="module")
def run_as_operator() -> Iterator[Operator]:
    with operator_as_root() as running:
        yield running


def test_a_link_in_the_folder_of_a_build_leads_root_nowhere(run_as_operator: Operator) -> None:
    with tempfile.TemporaryDirectory() as folder:
        victim = Path(folder)
        victim.chmod(0o755)
        (victim / "secret").write_text("root's")
        (victim / "secret").chmod(0o600)
        swapper = run_as_operator.deployed(probe_yaml("swapper"), {"probe.py": SWAPPER})
        config = {"environments": str(run_as_operator.data_dir / "environments"), "victim": folder}
        job = run_as_operator.submit(swapper, config=config)
        run_as_operator.await_log(swapper, job, "watching")
        padding = {f"made/data/{number}.txt": "x" for number in range(2000)}
        attacked = run_as_operator.deployed(
            probe_yaml("attacked"), {"probe.py": PROBE, **project_files("", "made"), **padding}
        )
        swapped = run_as_operator.finished(swapper, job)
        assert swapped["status"] == "status_succeeded", run_as_operator.log_of(swapper, job)
        # When this job ends, the attacked copy of the project is complete.
        run_as_operator.run(attacked)
        assert [path.name for path in victim.iterdir()] == ["secret"]
        for path in (victim, victim / "secret"):
            assert path.stat().st_uid == 0
        assert (victim / "secret").read_text() == "root's"


def test_a_build_gets_no_rights_by_setuid_and_no_variables_of_the_operator(
    run_as_operator: Operator,
) -> None:
    tool = run_as_operator.folder / "setuid-id"
    shutil.copy(shutil.which("id") or "/usr/bin/id", tool)
    tool.chmod(0o4755)
    found = "found.json"
    code = (
        "import json, subprocess\n"
        f"uids = [subprocess.run([{str(tool)!r}, '-u'], stdout=-1, text=True).stdout.strip()]\n"
        "try:\n    os.setuid(0)\nexcept PermissionError:\n    uids.append('refused')\n"
        "status = open('/proc/self/status').read()\n"
        f"open(HERE / {found!r}, 'w').write(json.dumps([uids, os.getgroups(), dict(os.environ), status]))\n"
    )
    endpoint = run_as_operator.deployed(
        probe_yaml("setuid"), {"probe.py": PROBE, **project_files(code, "privileged")}
    )
    done = run_as_operator.run(endpoint)
    assert done["status"] == "status_succeeded", run_as_operator.log_of(endpoint, done)
    [report] = run_as_operator.data_dir.glob(f"environments/*/*/source/privileged/{found}")
    uids, groups, environment, status = json.loads(report.read_text())
    assert uids == [str(UID), "refused"]
    assert 0 not in groups
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    assert environment["HOME"] == pwd.getpwnam(USER).pw_dir
    assert Path(environment["TMPDIR"]).parent == report.parents[2]
    assert "s3cret" not in environment.values()
    assert not [name for name in environment if name.startswith(("CORTEX_", "AWS_"))]


def test_a_build_can_neither_signal_nor_outlive_its_supervisor(run_as_operator: Operator) -> None:
    mark = run_as_operator.folder / "marks"
    mark.mkdir()
    mark.chmod(0o777)
    code = (
        "pid = os.getpid()\n"
        "while b'build_supervisor.py' not in open(f'/proc/{pid}/cmdline', 'rb').read():\n"
        "    pid = int(open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[1])\n"
        "for number in (signal.SIGSTOP, signal.SIGKILL):\n"
        "    try:\n        os.kill(pid, number)\n"
        f"    except PermissionError:\n        open({str(mark)!r} + f'/refused-{{number}}', 'w')\n"
        f"daemonise({str(mark / 'daemon')!r})\nhang()\n"
    )
    run_as_operator.deployed(
        probe_yaml("signals"), {"probe.py": PROBE, **project_files(code, "signalling")}
    )
    until((mark / "daemon").exists, "the daemon runs")
    assert len(list(mark.glob("refused-*"))) == 2
    run_as_operator.kill()
    daemon = Path(f"/proc/{(mark / 'daemon').read_text()}")
    until(lambda: not daemon.exists(), "the daemon has exited")
    run_as_operator.start()
    run_as_operator.http.delete(f"{run_as_operator.url}/-/apis/signals")
