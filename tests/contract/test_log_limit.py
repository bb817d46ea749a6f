"""A log over its limit keeps its beginning and its end, fills no disk, and keeps its offsets."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from contract.test_logs import events
from operator_harness import Operator, until

LIMIT = 256 << 10
MARKER = re.compile(r"^\[cortex: \S+ [KM]iB of the log are gone: limits\.log is 256 KiB\]$", re.M)
LINES = 100_000
# Prints numbered lines, which show gaps. After line 0 it waits for the file that it may be given.
CHATTER = """
import os, sys, time
print("line 0", flush=True)
while len(sys.argv) > 2 and not os.path.exists(sys.argv[2]):
    time.sleep(0.02)
for number in range(1, int(sys.argv[1])):
    sys.stdout.write(f"line {number}\\n")
print("done", flush=True)
time.sleep(300 if len(sys.argv) > 2 else 0)
"""


def start_chatter(operator: Operator, lines: int, go: Path | None = None) -> tuple[str, Any]:
    arguments = json.dumps(["python", "chatter.py", str(lines), *([str(go)] if go else [])])
    endpoint = operator.deployed(
        f"- name: chatter{lines}\n  kind: TaskAPI\n  compute: {{cpu: 1m}}\n"
        f"  limits: {{log: {LIMIT}}}\n"
        f"  definition: {{command: {arguments}}}\n",
        {"chatter.py": CHATTER},
    )
    return endpoint, operator.submit(endpoint)


def disk_usage(operator: Operator, job: Any) -> int:
    log: Path = operator.data_dir / "jobs" / job["job_id"] / "log"
    return log.stat().st_blocks * 512


def check_lines(text: str, lines: int) -> tuple[list[int], list[int]]:
    """The line numbers before and after the marker: whole lines, in order, none repeated."""
    before, marker, after = re.split(rf"({MARKER.pattern})\n", text, flags=re.M)
    assert marker
    numbers = [
        [int(n) for n in re.fullmatch(r"((?:line \d+\n)*)(?:done\n)?", part)[1].split()[1::2]]  # type: ignore[index]
        for part in (before, after)
    ]
    assert numbers[0] == list(range(len(numbers[0])))
    assert numbers[1] == list(range(lines - len(numbers[1]), lines))
    assert len(before) > LIMIT // 5
    assert len(after) > LIMIT // 5
    return numbers[0], numbers[1]


def test_a_log_over_its_limit_keeps_its_beginning_and_its_end(own_operator: Operator) -> None:
    endpoint, job = start_chatter(own_operator, LINES)
    assert own_operator.finished(endpoint, job)["status"] == "status_succeeded"
    check_lines(own_operator.log_of(endpoint, job), LINES)
    assert disk_usage(own_operator, job) <= LIMIT + (64 << 10)


def test_the_limit_of_a_running_job_holds_while_no_operator_runs(
    own_operator: Operator, tmp_path: Path
) -> None:
    endpoint, job = start_chatter(own_operator, LINES, go=tmp_path / "go")
    own_operator.await_log(endpoint, job, "line 0\n")
    own_operator.kill()
    (tmp_path / "go").touch()
    log = own_operator.data_dir / "jobs" / job["job_id"] / "log"
    until(lambda: log.read_bytes().endswith(b"done\n"), "the job has written all lines")
    until(lambda: disk_usage(own_operator, job) <= LIMIT + (64 << 10), "the log is cut")
    own_operator.start()
    endpoint = endpoint.replace(endpoint.rpartition("/")[0], own_operator.url)
    check_lines(own_operator.log_of(endpoint, job), LINES)
    own_operator.delete(endpoint, job)


def test_a_follower_gets_the_marker_of_the_gap(own_operator: Operator) -> None:
    endpoint, job = start_chatter(own_operator, LINES)
    own_operator.finished(endpoint, job)
    received = list(events(own_operator, f"{endpoint}/{job['job_id']}/logs"))
    text = "".join(json.loads(event["data"]) for event in received[:-1])
    assert text == own_operator.log_of(endpoint, job)
    assert received[-1]["event"] == "end"
    # Offsets include the gap: a resumed follower gets the rest, and no byte twice.
    pieces = [(int(event["id"]), json.loads(event["data"])) for event in received[:-1]]
    index = next(i for i, (_, piece) in enumerate(pieces) if MARKER.search(piece))
    resumed = own_operator.http.get(
        f"{endpoint}/{job['job_id']}/logs", params={"offset": pieces[index][0]}
    )
    assert resumed.text == "".join(piece for _, piece in pieces[index + 1 :])


def test_a_range_is_cut_to_the_bytes_outside_the_gap(own_operator: Operator) -> None:
    endpoint, job = start_chatter(own_operator, LINES)
    own_operator.finished(endpoint, job)
    url = f"{endpoint}/{job['job_id']}/logs"
    gap = json.loads((own_operator.data_dir / "jobs" / job["job_id"] / "log.cut").read_text())

    def part(first: int, last: int) -> tuple[int, str | None]:
        answer = own_operator.http.get(url, headers={"Range": f"bytes={first}-{last}"})
        if answer.status_code == 206:
            assert "\0" not in answer.text
        return answer.status_code, answer.headers.get("content-range")

    size = (own_operator.data_dir / "jobs" / job["job_id"] / "log").stat().st_size
    start, end = gap["start"], gap["end"]
    assert part(0, 9) == (206, f"bytes 0-9/{size}")
    assert part(0, end) == (206, f"bytes 0-{start - 1}/{size}")
    assert part(start + 1, end + 9) == (206, f"bytes {end}-{end + 9}/{size}")
    assert part(start + 1, end - 1)[0] == 416


@pytest.mark.parametrize("content", ["", "{}", "[", '{"start": "a", "end": 3, "limit": 1}', "\0"])
def test_an_invalid_log_cut_file_is_ignored(own_operator: Operator, content: str) -> None:
    endpoint, job = start_chatter(own_operator, 3)
    own_operator.finished(endpoint, job)
    (own_operator.data_dir / "jobs" / job["job_id"] / "log.cut").write_text(content)
    assert own_operator.log_of(endpoint, job) == "line 0\nline 1\nline 2\ndone\n"


def test_a_file_system_without_hole_punching_is_reported_once(tmp_path: Path) -> None:
    """The file system is ramfs, mounted in the test's own namespace."""
    script = f"""
import os
from cortex.worker.supervisor import logfile
folder = os.open({str(tmp_path)!r}, os.O_RDONLY)
with open({str(tmp_path / "log")!r}, "ab", buffering=0) as file:
    file.write(b"x" * 70000)
    log = logfile.Log(folder, 65536)
    log.enforce_limit()
    file.write(b"y")
    log.enforce_limit()
data = open({str(tmp_path / "log")!r}, "rb").read()
assert data.count(b"limits.log is not enforced") == 1, data[-200:]
assert data.startswith(b"x" * 70000) and data.endswith(b"y")
assert not os.path.exists({str(tmp_path / "log.cut")!r})
print("kept")
"""
    import sys

    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t ramfs ramfs "$1" && exec "$2" -c "$3"', "sh"]
    done = subprocess.run(
        [*mounted, str(tmp_path), sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "kept\n", done.stderr
