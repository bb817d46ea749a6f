"""The speed of a real operator beside the bare limits of the machine, in one run: `make bench`.

Every figure is the median of several rounds, with its minimum and maximum; what counts are the ratios
to the limits, because both were measured on the same machine within the same minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from load import Connection, parallel

CORTEX = Path(sys.executable).with_name("cortex")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    """One measured thing over its rounds."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def row(self, beside: Figure | None = None) -> str:
        span = f"{min(self.values):9.1f} … {max(self.values):<9.1f}"
        ratio = "" if beside is None else f"  {self.median / beside.median:6.3f} of {beside.name}"
        return f"{self.name:<44} {self.median:9.1f} {span} {self.unit:<10}{ratio}"


def fork_and_exit(number: int = 1000) -> float:
    """Forks, exits and waits per second of a bare interpreter, on one core."""
    code = (
        "import os, time\n"
        "start = time.perf_counter()\n"
        f"for _ in range({number}):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        f"print({number} / (time.perf_counter() - start))"
    )
    return float(subprocess.check_output([sys.executable, "-I", "-S", "-c", code]))


def supervised_fork(number: int = 500) -> float:
    """The same with a supervising process for each, which writes and syncs an exit record."""
    code = (
        "import os, tempfile, time\n"
        "folder = tempfile.mkdtemp()\n"
        "start = time.perf_counter()\n"
        f"for n in range({number}):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        child = os.fork()\n"
        "        if child == 0: os._exit(0)\n"
        "        os.waitpid(child, 0)\n"
        "        fd = os.open(f'{folder}/{n}.tmp', os.O_CREAT | os.O_WRONLY)\n"
        "        os.write(fd, b'{}' * 256); os.fsync(fd)\n"
        "        os.rename(f'{folder}/{n}.tmp', f'{folder}/{n}')\n"
        "        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        f"print({number} / (time.perf_counter() - start))\n"
        "import shutil; shutil.rmtree(folder)"
    )
    return float(subprocess.check_output([sys.executable, "-I", "-S", "-c", code]))


def interpreter(number: int = 20) -> float:
    """Milliseconds to run `python -c pass`."""
    start = time.perf_counter()
    for _ in range(number):
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    return (time.perf_counter() - start) / number * 1000


def rate(url: str, path: str, number: int, connections: int = 16) -> float:
    """Submits (POSTs of {}) per second over keep-alive connections."""
    start = time.perf_counter()
    asyncio.run(parallel(url, "POST", path, b"{}", number, connections))
    return number / (time.perf_counter() - start)


def end_to_end(url: str, number: int) -> float:
    """Jobs per second from the first submit until the last is final."""

    async def work() -> float:
        start = time.perf_counter()
        answers = await parallel(url, "POST", "/noop", b"{}", number, 16)
        connection = await Connection.open(url)
        for answer in answers:
            path = f"/noop/{answer['job_id']}?wait=60"
            done = (await connection.request("GET", path))["job_status"]
            assert done["status"] == "status_succeeded", done
        elapsed = time.perf_counter() - start
        connection.close()
        return number / elapsed

    return asyncio.run(work())


def first_line(url: str, number: int) -> list[float]:
    """Milliseconds from sending a submit to the task's first line, one job at a time."""

    async def work() -> list[float]:
        connection = await Connection.open(url)
        taken = []
        for _ in range(number):
            sent = time.time_ns()
            job = await connection.request("POST", "/noop", b"{}")
            path = f"/noop/{job['job_id']}?wait=60"
            done = (await connection.request("GET", path))["job_status"]
            taken.append((done["result"] - sent) / 1e6)
        connection.close()
        return taken

    return asyncio.run(work())


def stop_to_gone(url: str, number: int) -> list[float]:
    """Milliseconds from sending a stop until no process of the job is left."""

    async def work() -> list[float]:
        connection = await Connection.open(url)
        taken = []
        for _ in range(number):
            job = await connection.request("POST", "/sleeper", b"{}")
            path = f"/sleeper/{job['job_id']}"
            while (await connection.request("GET", path))["job_status"]["worker_counts"]["pending"]:
                await asyncio.sleep(0.002)
            pid = await _first_word(connection, f"{path}/logs")
            start = time.perf_counter()
            await connection.request("DELETE", path)
            while os.path.exists(f"/proc/{pid}"):
                await asyncio.sleep(0.0005)
            taken.append((time.perf_counter() - start) * 1000)
        connection.close()
        return taken

    return asyncio.run(work())


async def _first_word(connection: Connection, path: str) -> str:
    while not (text := await connection.text("GET", path)).endswith("\n"):
        await asyncio.sleep(0.002)
    return text.split()[0]


def rounds(name: str, unit: str, number: int, measure: Callable[[], float]) -> Figure:
    return Figure(name, unit, [measure() for _ in range(number)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=500, help="jobs in each round")
    options = parser.parse_args()
    n, jobs = options.rounds, options.jobs
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {n} rounds\n")
    print(f"{'':<44} {'median':>9} {'min … max':>15}")
    forks = rounds("fork + exit", "/s", n, fork_and_exit)
    supervised = rounds("supervised fork + exit record", "/s", n, supervised_fork)
    spawn = rounds("python -c pass", "ms", n, interpreter)
    with tempfile.TemporaryDirectory() as folder:
        echo = subprocess.Popen(
            [sys.executable, HERE / "echo.py"], stdout=subprocess.PIPE, text=True
        )
        command = [CORTEX, "serve", "--port", "0", "--data-dir", folder, "--cpu", "1000"]
        operator = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            echo_url, url = (p.stdout.readline().split()[-1] for p in (echo, operator))  # type: ignore[union-attr]
            _deploy(url, folder)
            first_line(url, 5)  # the environment is built, the fork server warm
            echoed = rounds(
                "echo endpoint, same server", "/s", n, lambda: rate(echo_url, "/", jobs)
            )
            submitted = rounds(
                "submit, durable, 16 connections", "/s", n, lambda: rate(url, "/later", jobs)
            )
            asyncio.run(_delete(url, "later"))
            ended = rounds("no-op jobs, end to end", "/s", n, lambda: end_to_end(url, jobs))
            lines = [first_line(url, 100) for _ in range(n)]
            stops = Figure("stop to gone", "ms", stop_to_gone(url, 10 * n))
        finally:
            for process in (echo, operator):
                process.terminate()
                process.wait()
    p50 = Figure("submit to first line, p50", "ms", [statistics.median(r) for r in lines])
    p99 = Figure(
        "submit to first line, p99", "ms", [statistics.quantiles(r, n=100)[98] for r in lines]
    )
    for row in (
        forks.row(), supervised.row(), spawn.row(), echoed.row(), submitted.row(echoed),
        ended.row(supervised), ended.row(forks), p50.row(spawn), p99.row(spawn), stops.row(),
    ):  # fmt: skip
        print(row)


def _deploy(url: str, folder: str) -> None:
    project = Path(folder, "project")
    project.mkdir()
    (project / "noop.py").write_text(
        "import time\n\n\ndef task(config):\n    now = time.time_ns()\n    print(now)\n    return now\n"
    )
    (project / "sleeper.py").write_text(
        "import os, time\n\n\ndef task(config):\n"
        "    print(os.getpid(), flush=True)\n    time.sleep(300)\n"
    )
    (project / "cortex.yaml").write_text(
        "".join(
            f"- {{name: {name}, kind: TaskAPI, definition: {{path: {path}}}, compute: {{cpu: {cpu}}}}}\n"
            for name, path, cpu in (
                ("noop", "noop.py", "20"),
                ("later", "sleeper.py", "1000"),
                ("sleeper", "sleeper.py", "1"),
            )
        )
    )
    config = {**os.environ, "CORTEX_CLI_CONFIG_DIR": folder}
    for arguments in (
        ["env", "configure", "bench", "--operator-endpoint", url],
        ["deploy", str(project / "cortex.yaml")],
    ):
        subprocess.run([CORTEX, *arguments], check=True, env=config, stdout=subprocess.DEVNULL)


async def _delete(url: str, name: str) -> None:
    connection = await Connection.open(url)
    await connection.request("DELETE", f"/-/apis/{name}")
    connection.close()


if __name__ == "__main__":
    main()
