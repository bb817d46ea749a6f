"""The benchmarks run: a short round of those without extra packages gives figures for each."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from operator_harness import processes_with, until

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "run.py"


def test_a_quick_run_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    out, mark = tmp_path / "results.json", tmp_path / "tmp"
    mark.mkdir()
    names = "submit,end-to-end,crowd,stored-status,aged"
    done = subprocess.run(
        [sys.executable, RUN, "--quick", "--only", names, "--out", out],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(mark)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["figures"]
    for name in ("submit", "end-to-end", "crowd-starts", "crowd-stops", "crowd-memory"):
        assert all(value > 0 for value in figures[name]["subjects"]["ours"]), figures[name]
    assert all(value > 0 for value in figures["aged-first-line"]["subjects"]["ours"])
    assert len(figures["aged-end-to-end"]["subjects"]) == 3
    assert len(figures["stored-status"]["subjects"]) == 2
    assert "submits/s, compared with the echo endpoint" in done.stdout
    until(lambda: not processes_with(str(mark)), "all processes have exited")
    assert list(mark.iterdir()) == []


def test_a_quick_run_compares_the_stores(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    # In the common folder for temporary files: PostgreSQL's server cannot enter that of this test.
    subprocess.run(
        [sys.executable, RUN, "--quick", "--only", "stores", "--out", out], timeout=300, check=True
    )
    figures = json.loads(out.read_text())["figures"]
    for name in ("stores-end-to-end", "stores-first-line"):
        subjects = figures[name]["subjects"]
        assert set(subjects) == {"ours", "ours, on PostgreSQL"}
        assert all(value > 0 for values in subjects.values() for value in values), subjects


def test_an_unknown_measurement_is_refused_by_name() -> None:
    done = subprocess.run(
        [sys.executable, RUN, "--only", "speed"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "there is no 'speed'" in done.stderr


def test_missing_peers_are_reported_with_their_make_target(tmp_path: Path) -> None:
    # No environment for the peers lies beside this copy.
    shutil.copytree(RUN.parent, tmp_path / "benchmarks")
    done = subprocess.run(
        [sys.executable, tmp_path / "benchmarks" / "run.py", "--peers", "--quick"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "`make bench-peers`" in done.stderr


# Scripted peers: one does not start, one fails in the second round and at its exit, one works.
PEERS_FAIL = """
import json, sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import measurements, page
from figures import HEAD, Results, aligned
from measurements import Bench, Options

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
measured = []


@contextmanager
def absent(_):
    raise OSError("no redis-server")
    yield


@contextmanager
def slow(_):
    yield SimpleNamespace(name="Slow")
    raise RuntimeError("it is still there")


@contextmanager
def fine(_):
    yield SimpleNamespace(name="Fine")


def measure(peer):
    measured.append(peer.name)
    if measured.count("Slow") == 2 and peer.name == "Slow":
        raise RuntimeError("1 stopped jobs have not ended\\nwithin 60 s")
    return {"starts": 2.0, "stops": 3.0}


measurements.PEERS.update({"absent": absent, "slow": slow, "fine": fine})
results = Results()
names = ("absent", "slow", "fine")
with Bench(Options([], 3, 1, True, True), results, folder, out) as bench:
    ours = {"ours": lambda: {"starts": 1.0, "stops": 1.0}}
    bench.measure("crowd", {**ours, **bench.of_peers(names, measure)})
    stored = Results.load(out)
    assert measured == ["Slow", "Fine", "Slow", "Fine", "Fine"], measured
assert stored.values["crowd-starts"] == {"ours": [1.0] * 3, "Fine": [2.0] * 3}, stored.values
print(aligned([HEAD, *stored.rows()]))
print(page.measured(stored))

# A later run that succeeds replaces the failure.
results = Results()
with Bench(Options([], 1, 1, True, True), results, folder, out) as bench:
    bench.measure("crowd", ours)
assert json.loads(out.read_text())["failed"] == {}
"""


def test_a_peer_that_fails_is_in_the_table_and_the_others_are_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEERS_FAIL, tmp_path, tmp_path / "results.json"],
        cwd=RUN.parent, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "crowd absent failed no redis-server" in rows
    assert "crowd Slow failed 1 stopped jobs have not ended within 60 s" in rows
    assert "| crowd | Slow | failed | 1 stopped jobs have not ended within 60 s | |" in rows
    assert done.stderr == "slow did not end as it should: it is still there\n"


def test_an_error_outside_the_peers_ends_the_run(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from figures import Results\n"
        "from measurements import Bench, Options\n"
        "with Bench(Options([], 1, 1, False, True), Results(), Path(sys.argv[1])) as bench:\n"
        "    bench.measure('submit', {'ours': lambda: 1 / 0})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=RUN.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_the_page_shows_the_stored_results() -> None:
    # The page must be the same on a machine with one core.
    code = (
        "import os\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import page\n"
        "text = page.PAGE.read_text()\n"
        "assert page.page(text, page.Results.load(page.RESULTS)) == text"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=RUN.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, "run `make bench-pictures`: " + done.stderr


@pytest.fixture
def traversable_folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user may enter. Only the owner may enter pytest's folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_the_ray_engine_is_measured_beside_the_local_one_and_nothing_is_left_behind(
    traversable_folder: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, RUN.with_name("on_ray.py"), "--rounds", "1", "--jobs", "20"],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(traversable_folder)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for figure in ("engine-first-line", "engine-end", "engine-end-to-end"):
        for name in ("local, PostgreSQL", "Ray, SQLite", "Ray, PostgreSQL and S3"):
            line = rf"^{figure}: \S+ times the value of local, SQLite: {name}$"
            assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    until(lambda: not processes_with(str(traversable_folder)), "all processes have exited")
    assert list(traversable_folder.iterdir()) == []


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_the_scale_is_measured_and_nothing_is_left_behind(
    traversable_folder: Path, store: str
) -> None:
    done = subprocess.run(
        [
            sys.executable, RUN.with_name("scale.py"), "--store", store,
            "--nodes", "20", "--cores", "2", "--waiting", "400", "--seconds", "0.3", "--requests", "3",
        ],
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(traversable_folder)},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    heading, columns, *rows = done.stdout.splitlines()
    assert heading.endswith(f"{store}, 2 jobs run on each node")
    assert "20 nodes, 400 wait" in columns
    assert len(rows) == 16
    until(lambda: not processes_with(str(traversable_folder)), "all processes have exited")
    assert list(traversable_folder.iterdir()) == []
