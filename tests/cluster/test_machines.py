"""The machines themselves: their processes, their cuts, and their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.machines import AGENT, DRIVER, GCS, HEAD, RAYLET, TASK, Machines, task_yaml
from cluster.namespaces import Machine, network
from operator_harness import processes_with, until

pytestmark = pytest.mark.cluster
CONNECT_TIMEOUT_S = 1.5


def connects(source: Machine, target: Machine) -> bool:
    with target.inside(lambda: socket.create_server((target.ip, 0))) as listening:
        address = listening.getsockname()
        try:
            source.inside(lambda: socket.create_connection(address, CONNECT_TIMEOUT_S)).close()
        except TimeoutError:
            return False
        return True


def test_a_cut_drops_what_it_names_until_it_is_healed() -> None:
    with network() as made:
        a, b, c = (made.add(name) for name in ("n1", "n2", "n3"))

        def connected() -> list[bool]:
            return [connects(a, b), connects(b, a), connects(a, c), connects(c, a)]

        assert connected() == [True] * 4
        made.refuse_connections("n1", "n2")
        assert connected() == [False, True, True, True]
        made.heal("n1")
        made.cut_direction("n1", "n2")  # without answers, no connection works in either direction
        assert connected() == [False, False, True, True]
        made.heal("n2")
        made.cut("n1")
        assert connected() == [False] * 4
        assert connects(b, c)
        made.heal("n1")
        assert connected() == [True] * 4


def test_a_refused_connection_ends_those_that_are_open() -> None:
    with network() as made:
        a, b = made.add("n1"), made.add("n2")
        with b.inside(lambda: socket.create_server((b.ip, 0))) as listening:
            address = listening.getsockname()
            with a.inside(lambda: socket.create_connection(address)) as client:
                server, _ = listening.accept()
                with server:
                    made.refuse_connections("n1", "n2")
                    client.sendall(b"lost")
                    server.settimeout(CONNECT_TIMEOUT_S)
                    with pytest.raises(TimeoutError):
                        server.recv(4)
                    made.heal("n2")
                    server.settimeout(None)
                    assert server.recv(4) == b"lost"  # TCP sends it again


LASTS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from cluster.namespaces import network
with network() as made:
    machine = made.add("n1")
    sleeping = machine.popen(["sleep", "31536000"], env={"MARK": str(made.folder)})
    print(json.dumps([str(made.folder), made.interface]), flush=True)
    sleeping.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_the_machines_of_an_interrupted_test(number: int) -> None:
    tests = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", LASTS, tests],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as test:  # fmt: skip
        assert test.stdout is not None
        folder, interface = json.loads(test.stdout.readline())
        until(lambda: processes_with(folder), "the machine has a process")
        os.kill(test.pid, number)
    until(lambda: not Path("/sys/class/net", interface).exists(), "the interface is gone")
    until(lambda: not processes_with(folder), "the process has ended")
    if number == signal.SIGKILL:
        subprocess.run(["rm", "-rf", folder], check=True)  # a killed test cannot remove it
    assert not Path(folder).exists()


def test_an_operator_on_its_own_machine_runs_jobs_on_others(cluster: Machines) -> None:
    running = cluster.start_operator("o1")
    cluster.await_ready(running, "n1", "n2")
    for node, zone in (("n1", "a"), ("n2", "b")):
        endpoint = running.deployed(task_yaml(f"in-{zone}", zone), {"task.py": TASK})
        done = running.run(endpoint, config=cluster.config())
        assert (done["status"], done["result"]) == ("status_succeeded", node)
        assert running.log_of(endpoint, done) == f"runs on {node}\n"
        job = running.submit(endpoint, config=cluster.config("never"))
        running.await_log(endpoint, job, "runs on")
        assert running.delete(endpoint, job).status_code == 200
        assert running.status(endpoint, job)["status"] == "status_stopped"
    assert [mark[1:] for mark in cluster.marks()] == [["1", n] for n in ("n1", "n1", "n2", "n2")]
    for name, kind in ((HEAD, GCS), ("n1", RAYLET), ("n1", AGENT), ("o1", DRIVER)):
        assert len(cluster.pids(name, kind)) == 1, (name, kind)
