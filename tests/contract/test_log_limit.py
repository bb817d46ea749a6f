"""A log over its limit: the beginning and the latest stay, the disk is not filled, offsets hold."""

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
# Numbered lines, so that what is missing can be told. After the first it waits for a file if it is given one.
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


def chatter(operator: Operator, lines: int, go: Path | None = None) -> tuple[str, Any]:
    arguments = json.dumps(["python", "chatter.py", str(lines), *([str(go)] if go else [])])
    endpoint = operator.deployed(
        f"- name: chatter{lines}\n  kind: TaskAPI\n  compute: {{cpu: 1m}}\n"
        f"  limits: {{log: {LIMIT}}}\n"
        f"  definition: {{command: {arguments}}}\n",
        {"chatter.py": CHATTER},
    )
    return endpoint, operator.submit(endpoint)


def on_disk(operator: Operator, job: Any) -> int:
    log: Path = operator.data_dir / "jobs" / job["job_id"] / "log"
    return log.stat().st_blocks * 512


def checked(text: str, lines: int) -> tuple[list[int], list[int]]:
    """The numbers before and after the marker: whole lines, in order, none twice."""
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
    endpoint, job = chatter(own_operator, LINES)
    assert own_operator.finished(endpoint, job)["status"] == "status_succeeded"
    checked(own_operator.log_of(endpoint, job), LINES)
    assert on_disk(own_operator, job) <= LIMIT + (64 << 10)


def test_the_limit_holds_while_the_job_runs_and_no_operator_does(
    own_operator: Operator, tmp_path: Path
) -> None:
    endpoint, job = chatter(own_operator, LINES, go=tmp_path / "go")
    own_operator.await_log(endpoint, job, "line 0\n")
    own_operator.kill()
    (tmp_path / "go").touch()
    log = own_operator.data_dir / "jobs" / job["job_id"] / "log"
    until(lambda: log.read_bytes().endswith(b"done\n"), "it has said everything")
    until(lambda: on_disk(own_operator, job) <= LIMIT + (64 << 10), "it is cut")
    own_operator.start()
    endpoint = endpoint.replace(endpoint.rpartition("/")[0], own_operator.url)
    checked(own_operator.log_of(endpoint, job), LINES)
    own_operator.delete(endpoint, job)


def test_a_follower_is_told_what_it_missed(own_operator: Operator) -> None:
    endpoint, job = chatter(own_operator, LINES)
    own_operator.finished(endpoint, job)
    seen = list(events(own_operator, f"{endpoint}/{job['job_id']}/logs"))
    text = "".join(json.loads(event["data"]) for event in seen[:-1])
    assert text == own_operator.log_of(endpoint, job)
    assert seen[-1]["event"] == "end"
    # An offset goes on counting what is gone: who resumes gets the rest, nothing twice.
    pieces = [(int(event["id"]), json.loads(event["data"])) for event in seen[:-1]]
    index = next(i for i, (_, piece) in enumerate(pieces) if MARKER.search(piece))
    resumed = own_operator.http.get(
        f"{endpoint}/{job['job_id']}/logs", params={"offset": pieces[index][0]}
    )
    assert resumed.text == "".join(piece for _, piece in pieces[index + 1 :])


def test_a_range_is_what_is_there_of_it(own_operator: Operator) -> None:
    endpoint, job = chatter(own_operator, LINES)
    own_operator.finished(endpoint, job)
    url = f"{endpoint}/{job['job_id']}/logs"
    gone = json.loads((own_operator.data_dir / "jobs" / job["job_id"] / "log.cut").read_text())

    def part(first: int, last: int) -> tuple[int, str | None]:
        answer = own_operator.http.get(url, headers={"Range": f"bytes={first}-{last}"})
        if answer.status_code == 206:
            assert "\0" not in answer.text
        return answer.status_code, answer.headers.get("content-range")

    size = (own_operator.data_dir / "jobs" / job["job_id"] / "log").stat().st_size
    start, end = gone["start"], gone["end"]
    assert part(0, 9) == (206, f"bytes 0-9/{size}")
    assert part(0, end) == (206, f"bytes 0-{start - 1}/{size}")
    assert part(start + 1, end + 9) == (206, f"bytes {end}-{end + 9}/{size}")
    assert part(start + 1, end - 1)[0] == 416


@pytest.mark.parametrize("content", ["", "{}", "[", '{"start": "a", "end": 3, "limit": 1}', "\0"])
def test_a_job_that_spoils_its_record_of_the_cut_spoils_nothing_else(
    own_operator: Operator, content: str
) -> None:
    endpoint, job = chatter(own_operator, 3)
    own_operator.finished(endpoint, job)
    (own_operator.data_dir / "jobs" / job["job_id"] / "log.cut").write_text(content)
    assert own_operator.log_of(endpoint, job) == "line 0\nline 1\nline 2\ndone\n"


def test_a_file_system_that_cannot_drop_a_part_says_so_once(tmp_path: Path) -> None:
    """ramfs is one; it is mounted in a namespace of the test's own."""
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
