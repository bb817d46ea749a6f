"""Makes the upgrade fixture of one version: the data its operator leaves when the machine dies.

    .venv/bin/python tests/upgrades/make.py PATH/TO/BIN/cortex tests/upgrades/VERSION.tar.xz

`test_upgrade.py` starts the current operator on every fixture of this folder. Before a release, run
this script with the `cortex` of that release and commit the archive. The script needs PostgreSQL's
programs and GNU tar.

The archive has two folders, `sqlite` and `postgresql`. Each one has:

    data/           the data folder, copied after SIGKILL to the operator and before its jobs end
    files/          the object store
    dump.sql        the database (only in `postgresql`)
    expected.json   answers of that version: statuses, logs, APIs, audit; its tokens and keys

The script leaves out environments and the jobs' overlay folders, which belong to the machine. It
replaces the machine's identity in handles and start records: zeros for the boot id, so that the
running jobs count as lost by a restart on every machine; "0:0" for the identity of the jobs folder,
which the test replaces by that of the folder it has unpacked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
import postgresql_server

# A fixed path, because tracebacks in the logs name it.
FOLDER = Path("/tmp/cortex-upgrade")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
NO_BOOT_ID = "00000000-0000-0000-0000-000000000000"
TIMEOUT_S = 120.0
LONG = "long text " * 2000
LOG_LIMIT = 64 << 10
SCOPES = ("read", "submit", "deploy")

TASK = """
import os, signal, sys, time

VERSION = 1


def task(config):
    print(f"version {VERSION} attempt {os.environ['CORTEX_ATTEMPT']} pid {os.getpid()}", flush=True)
    return globals()[config.get("do", "echo")](config)


def echo(config):
    return {"version": VERSION, "config": config}


def first_sleeps(config):
    if os.environ["CORTEX_ATTEMPT"] == "1":
        sleep(config)
    return {"version": VERSION, "attempt": int(os.environ["CORTEX_ATTEMPT"])}


def fail(config):
    raise ValueError("as asked")


def leave(config):
    sys.stdout.flush()
    os.write(1, b"no UTF-8: \\xff\\xfe, and the end has no newline")
    sys.exit(3)


def die(config):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(300)


def allocate(config):
    pieces = []
    while True:
        pieces.append(bytearray(b"x") * (4 << 20))


def save(config):
    with open(os.path.join(os.environ["CORTEX_JOB_DIR"], "saved.txt"), "w") as file:
        file.write("kept")


def sleep(config):
    print("asleep", flush=True)
    time.sleep(300)


def stubborn(config):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        print("asleep", flush=True)
        time.sleep(300)
"""

CHATTER = """
import sys
for number in range(int(sys.argv[1])):
    sys.stdout.write(f"line {number}\\n")
"""


def yaml(name: str, more: str = "") -> str:
    return (
        f"- name: {name}\n"
        "  kind: TaskAPI\n"
        "  definition: {path: task.py, config: {base: 1, nested: {kept: true}}, env: {SECRET: x}}\n"
        f"  compute: {{cpu: 1m, mem: 96Mi}}\n{more}"
    )


CHATTER_YAML = f"""
- name: chatter
  kind: TaskAPI
  definition: {{command: [python, chatter.py, "20000"]}}
  networking: {{endpoint: talk}}
  compute: {{cpu: 1m}}
  limits: {{log: {LOG_LIMIT}}}
"""


class OldOperator:
    """A running operator of the old version, and requests to it."""

    def __init__(self, cortex: Path, folder: Path, *options: str) -> None:
        self.cortex = str(cortex)
        self.folder = folder
        self.data = folder / "data"
        self.files = folder / "files"
        self.files.mkdir(parents=True)
        self.where = ["--data-dir", str(self.data), *options]
        self.environment = {**os.environ, "CORTEX_CLI_CONFIG_DIR": str(folder / "cli")}
        self.http = httpx.Client(timeout=TIMEOUT_S)
        self.tokens = {name: self._token(name) for name in SCOPES}
        self.tokens["revoked"] = self._token("revoked", "read")
        self._run("token", "revoke", "revoked", *self.where)
        self.http.headers["Authorization"] = f"Bearer {self.tokens['deploy']}"
        self.jobs: dict[str, tuple[str, str]] = {}
        self.keys: list[dict[str, Any]] = []
        self.logs: dict[str, bytes] = {}  # read before the operator deletes its copies

    def start(self) -> None:
        options = ["--port", "0", "--require-token", "--grace", "60"]
        command = [self.cortex, "serve", *self.where, "--files", f"file://{self.files}", *options]
        with (self.folder / "operator.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " listening on " in line, (self.folder / "operator.log").read_text()
        self.url = line.split()[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Stop the operator and all jobs."""
        if self.process.poll() is not None:
            self.start()
        for api in self.get("/-/apis"):
            self.http.delete(f"{self.url}/-/apis/{api['spec']['name']}").raise_for_status()
        self.kill_stubborn()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(TIMEOUT_S) == 0

    def kill_stubborn(self) -> None:
        for api, job_id in self.jobs.values():
            if api == "stubborn":
                self._kill(job_id, worker_alone=True)

    def deploy(self, text: str, files: dict[str, str]) -> None:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for name, content in {"cortex.yaml": text, **files}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content.encode())
                tar.addfile(member, io.BytesIO(content.encode()))
        parts = {
            "config": ("cortex.yaml", text.encode()),
            "project": ("project.tar.gz", archive.getvalue()),
        }
        answer = self.http.post(f"{self.url}/-/apis", files=parts)
        assert answer.status_code == 200, answer.text

    def submit(self, name: str, api: str, key: str | None = None, **body: Any) -> None:
        """Submit a job; `name` is its name in the fixture."""
        headers = {} if key is None else {"Idempotency-Key": key}
        answer = self.http.post(f"{self.url}/-/apis/{api}/jobs", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        self.jobs[name] = (api, answer.json()["job_id"])
        if key is not None:
            self.keys.append({"api": api, "key": key, "body": body, "answer": answer.json()})

    def stop(self, name: str) -> None:
        self.http.delete(self.url + self.path(name)).raise_for_status()

    def path(self, name: str) -> str:
        api, job_id = self.jobs[name]
        return f"/-/apis/{api}/jobs/{job_id}"

    def get(self, path: str) -> Any:
        answer = self.http.get(self.url + path)
        assert answer.status_code == 200, (path, answer.text)
        return answer.json()

    def status(self, name: str) -> Any:
        return self.get(self.path(name))["job_status"]

    def log(self, name: str) -> bytes:
        return self.http.get(f"{self.url}{self.path(name)}/logs").content

    def finished(self, name: str, status: str) -> None:
        done = self.get(f"{self.path(name)}?wait=100")["job_status"]
        assert done["status"] == status, (name, done)

    def await_start(self, name: str) -> None:
        until(lambda: b"asleep" in self.log(name) and "running" in self.state(name), f"{name} runs")

    def state(self, name: str) -> str:
        counts = self.status(name).get("worker_counts", {})
        return " ".join(each for each, count in counts.items() if count)

    def lose(self, name: str) -> None:
        """Kill the job's supervisor and its worker."""
        self._kill(self.jobs[name][1])

    def _kill(self, job_id: str, *, worker_alone: bool = False) -> None:
        folder = self.data / "jobs" / job_id
        pids = [int((folder / "log").read_text().split("pid ")[1].split()[0])]
        if not worker_alone:
            pids.insert(0, int(json.loads((folder / "start.1").read_text())["pid"]))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # the worker ends with its supervisor
                os.kill(pid, signal.SIGKILL)

    def is_archived(self, name: str) -> bool:
        return (self.data / "archived" / self.jobs[name][1]).exists()

    def drop(self, *names: str) -> None:
        """Make the operator delete its local copies of these logs, as it does after a day."""
        long_ago = time.time() - 2 * 86_400
        until(lambda: all(map(self.is_archived, names)), "the logs are archived")
        for name in names:
            self.logs[name] = self.log(name)
            os.utime(self.data / "archived" / self.jobs[name][1], (long_ago, long_ago))
        self.kill()
        self.start()  # an operator deletes old copies once an hour
        self.log("plain")
        for name in names:
            assert not (self.data / "jobs" / self.jobs[name][1] / "log").exists()

    def _token(self, name: str, scope: str | None = None) -> str:
        return self._run("token", "create", name, "--scope", scope or name, *self.where).strip()

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.cortex, *arguments],
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def run_scenario(old: OldOperator) -> None:
    """Deploy APIs, run jobs to every final status, then start jobs that outlive the operator."""
    task = {"task.py": TASK}
    newer = {"task.py": TASK.replace("VERSION = 1", "VERSION = 2")}
    old.deploy(yaml("probe"), task)
    old.deploy(yaml("stubborn"), task)
    old.deploy(yaml("retried", "  retries: 1\n"), task)
    old.deploy(yaml("line", "  retries: 1\n  limits: {max_running: 1}\n"), task)
    old.deploy(yaml("gone"), task)
    old.deploy(CHATTER_YAML, {"chatter.py": CHATTER})
    assert (
        old.http.get(f"{old.url}/-/apis", headers={"Authorization": "Bearer wrong"}).status_code
        == 401
    )

    old.submit("deleted", "gone", config={"a": 1})
    old.submit("cut", "chatter")
    old.submit("cut dropped", "chatter")
    old.submit("plain", "probe", key="key of plain", config={"text": "é", "number": 1.5})
    old.submit("timed out", "probe", timeout=1, config={"do": "sleep"})
    old.submit("out of memory", "probe", config={"do": "allocate"})
    old.submit("dropped", "probe", config={"a": [1, None, True]})
    old.submit("saved", "probe", config={"do": "save"})
    old.submit("long", "probe", key="key of long", config={"text": LONG, "rows": [{"n": 1}] * 500})
    old.submit("raised", "probe", config={"do": "fail"})
    old.submit("exited", "probe", config={"do": "leave"})
    old.submit("killed", "probe", config={"do": "die"})
    old.submit("stopped", "probe", config={"do": "sleep"})
    old.submit("lost", "probe", config={"do": "sleep"})
    old.submit("lost once", "retried", config={"do": "first_sleeps"})
    for name in ("stopped", "lost", "lost once"):
        old.await_start(name)
    old.stop("stopped")
    old.lose("lost")
    old.lose("lost once")
    for name in ("deleted", "cut", "cut dropped", "plain", "dropped", "saved", "long", "lost once"):
        old.finished(name, "status_succeeded")
    for name in ("raised", "exited", "killed"):
        old.finished(name, "status_worker_error")
    old.finished("timed out", "status_timed_out")
    old.finished("out of memory", "status_worker_oom")
    old.finished("stopped", "status_stopped")
    old.finished("lost", "status_unexpected_error")
    old.http.delete(f"{old.url}/-/apis/gone").raise_for_status()
    old.drop("dropped", "cut dropped")

    # In progress when the operator is killed.
    old.submit("again", "line", config={"do": "first_sleeps"})
    old.await_start("again")
    old.submit("cancelled", "line")
    old.stop("cancelled")
    old.submit("waiting", "line", key="key of waiting", config={"mine": 1})
    old.submit("waiting long", "line", config={"text": LONG})
    old.deploy(yaml("line", "  retries: 1\n  limits: {max_running: 1}\n"), newer)
    old.submit("waiting of the new version", "line")
    old.deploy(yaml("probe"), newer)
    old.submit("running", "probe", key="key of running", config={"do": "sleep"})
    old.submit("stopping", "stubborn", config={"do": "stubborn"})
    for name in ("running", "stopping"):
        old.await_start(name)
    old.stop("stopping")
    old.submit("late", "line", timeout=30)


def expected(old: OldOperator) -> dict[str, Any]:
    """The answers of the old version."""
    jobs = {
        name: {
            "path": old.path(name),
            "answer": old.get(old.path(name)),
            "log": (old.logs.get(name) or old.log(name)).decode("latin-1"),
        }
        for name in old.jobs
    }
    return {
        "version": old.get("/-/info")["version"],
        "url": old.url,
        "tokens": old.tokens,
        "keys": old.keys,
        "jobs": jobs,
        "apis": old.get("/-/apis"),
        "audit": old.get("/-/audit?limit=1000"),
    }


def make(
    cortex: Path, root: Path, dump: Callable[[Path, Path], None] | None, *options: str
) -> None:
    """Fill `root` with one half of the fixture.

    Args:
        dump: writes the database to a file; None where it is a file of the data folder.
    """
    folder = FOLDER / root.name
    folder.mkdir()
    old = OldOperator(cortex, folder, *options)
    old.start()
    try:
        run_scenario(old)
        (root / "expected.json").write_text(json.dumps(expected(old), indent=1))
        old.kill()
        # Hard links and holes stay.
        subprocess.run(["cp", "-a", "--sparse=always", old.data, old.files, root], check=True)
        for excluded in ("jobs/.own", "environments"):
            shutil.rmtree(root / "data" / excluded)
        if dump is not None:
            dump(root / "dump.sql", old.data / "jobs")
        else:
            with closing(
                sqlite3.connect(root / "data" / "operator.db", isolation_level=None)
            ) as connection:
                for machine_id in _machine_ids(old.data / "jobs").items():
                    connection.execute("UPDATE jobs SET handle = replace(handle, ?, ?)", machine_id)
                connection.execute("VACUUM")  # removes the old text from free pages
    finally:
        old.end()
    _remove_machine_names(root / "data" / "jobs")


def _machine_ids(jobs: Path) -> dict[str, str]:
    """The parts of a handle that identify this machine, each with its replacement."""
    about = jobs.stat()
    return {BOOT_ID: NO_BOOT_ID, f'"{about.st_dev}:{about.st_ino}"': '"0:0"'}


def _remove_machine_names(jobs: Path) -> None:
    """Remove the boot id and the path of the installation from the jobs' folders."""
    for path in jobs.rglob("*"):
        if path.is_symlink():
            where = path.readlink()
            path.unlink()
            path.symlink_to(Path("/opt/cortex-of-before") / where.name)
        elif path.is_file() and path.name.startswith("start."):
            path.write_bytes(path.read_bytes().replace(BOOT_ID.encode(), NO_BOOT_ID.encode()))


def check(folder: Path, cortex: Path) -> None:
    """Check that the fixture names nothing of this machine."""
    machine_words = [
        BOOT_ID,
        socket.gethostname(),
        str(Path.home()),
        str(cortex.parents[2]),
        sys.base_prefix,
    ]
    for path in folder.rglob("*"):
        content = str(path.readlink()).encode() if path.is_symlink() else b""
        content += path.read_bytes() if path.is_file() else b""
        found = [
            word
            for word in machine_words
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)".encode(), content)
        ]
        assert not found, (path, found)


def pack(folder: Path, archive: Path) -> None:
    """Write the archive; sparse logs stay sparse, and root owns every file."""
    options = [
        "--sparse",
        "--format=gnu",
        "--sort=name",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
    ]
    done = subprocess.run(
        ["tar", "-C", folder, *options, "-c", "sqlite", "postgresql"],
        check=True,
        stdout=subprocess.PIPE,
    )
    archive.write_bytes(lzma.compress(done.stdout, preset=9 | lzma.PRESET_EXTREME))


@contextmanager
def database() -> Iterator[tuple[str, Callable[[Path, Path], None]]]:
    """A new database: its URL, and a function that dumps it."""
    with postgresql_server.server() as server:
        name = server.create()

        def dump(target: Path, jobs: Path) -> None:
            with server.connected(name) as connection:
                for machine_id in _machine_ids(jobs).items():
                    connection.execute(
                        "UPDATE jobs SET handle = replace(handle, %s, %s)", machine_id
                    )
                connection.execute("UPDATE operators SET runs_on = %s", (NO_BOOT_ID,))
            command = [
                postgresql_server.program("pg_dump"),
                "-h",
                str(server.folder),
                "-U",
                "postgres",
            ]
            options = ["--no-owner", "--no-privileges", "-f", str(target)]
            subprocess.run([*command, *options, name], check=True)

        yield server.url(name), dump


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the fixture of one version.")
    parser.add_argument("cortex", type=Path, help="that version's command")
    parser.add_argument("archive", type=Path)
    given = parser.parse_args()
    cortex = given.cortex.absolute()
    FOLDER.mkdir()  # fails while another run uses it
    try:
        out = FOLDER / "fixture"
        for name in ("sqlite", "postgresql"):
            (out / name).mkdir(parents=True)
        make(cortex, out / "sqlite", None)
        with database() as (url, dump):
            make(cortex, out / "postgresql", dump, "--store", url)
        check(out, cortex)
        pack(out, given.archive)
    finally:
        shutil.rmtree(FOLDER)
    print(f"{given.archive}: {given.archive.stat().st_size} bytes")


if __name__ == "__main__":
    main()
