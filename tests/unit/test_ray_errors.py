"""Texts of Ray 2.60, as it gave them to a driver whose agent, raylet or head was killed or stopped,
and the sentences that users get instead."""

from __future__ import annotations

import re

import pytest
from ray.core.generated import common_pb2
from ray.exceptions import ActorDiedError, ActorUnavailableError, RaySystemError

from cortex.engines.ray.ray_errors import explain, explain_output

UNAVAILABLE = "The actor 0d8a19085bf99a2f7ff44ee601000000 is unavailable: "
MAY = ". The task may or may not have been executed on the actor."
UNFIT = re.compile(
    r"\x1b|\n|rpc_code|RpcError|RPC error|\.cc:|ray::|0x[0-9a-f]|pid=|[0-9a-f]{24}|Traceback"
    r'|File "|https?:|state-dump'
)

NO_FOLDER = """\
The actor died because of an error raised in its creation task, \
\x1b[36mray::cortex-agent-7eb6e647:Agent.__init__()\x1b[39m (pid=21085, ip=192.0.2.2, \
actor_id=a31f8f812ecbdb8350819bf201000000, repr=<cortex.ray_node.agent.Agent object at 0x7ff83449>)
FileNotFoundError: [Errno 2] No such file or directory: '/proc/nowhere/ns2'

During handling of the above exception, another exception occurred:

\x1b[36mray::cortex-agent-7eb6e647:Agent.__init__()\x1b[39m (pid=21085, ip=192.0.2.2, \
actor_id=a31f8f812ecbdb8350819bf201000000, repr=<cortex.ray_node.agent.Agent object at 0x7ff83449>)
  File "/usr/lib/python3.11/pathlib.py", line 1121, in mkdir
    self.mkdir(mode, parents=False, exist_ok=exist_ok)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/usr/lib/python3.11/pathlib.py", line 1116, in mkdir
    os.mkdir(self, mode)
FileNotFoundError: [Errno 2] No such file or directory: '/proc/nowhere'"""

OTHER_VERSIONS = """\
Version mismatch: The cluster was started with:
    Ray: 2.9.0
    Python: 3.10.1
This process on node at 192.0.2.4 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""

NO_HEAD = """\
[2026-11-29 16:32:31,811 E 20493 20801] rpc_client.h:204: Failed to connect to GCS within 60 \
seconds. GCS may have been killed. It's either GCS is terminated by `ray stop` or is killed \
unexpectedly. If it is killed unexpectedly, see the log file gcs_server.out. \
https://docs.ray.io/en/master/ray-observability/user-guides/configure-logging.html\
#logging-directory-structure. The program will terminate."""

RAYLET_KILLED = """\
\x1b[33m(raylet)\x1b[0m Raylet is terminated. Termination is unexpected. Possible reasons include: \
(1) SIGKILL by the user or system OOM killer. Last 20 lines of the Raylet logs:
    [state-dump] \tNodeManager.deadline_timer.flush_free_objects - 1 total (1 active)
    [2026-11-29 16:30:22,771 I 20563 20563] (raylet) accessor.cc:475: Received address and \
liveness notification for node, IsAlive = 1 \
node_id=26d66ee44967971350c11630f34a4784b879a56629875023904dedc9

"""

STACK = """\
*** SIGABRT received at time=1764433951 on cpu 1 ***
    @     0x7f3a5c1b9e3c  (unknown)  (unknown)
/site-packages/ray/_raylet.so(+0x1234567) [0x7f3a5c1b9e3c] ray::core::CoreWorker::Exit()
"""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            f"{UNAVAILABLE}The actor is temporarily unavailable: RpcError: RPC error: "
            f"recvmsg:Connection reset by peer rpc_code: 14{MAY}",
            "connection reset by peer",
        ),
        (
            f"{UNAVAILABLE}The actor is temporarily unavailable: RpcError: RPC error: failed to "
            "connect to all addresses; last error: UNKNOWN: ipv4:192.0.2.2:46595: Failed to "
            f"connect to remote host: Connection refused rpc_code: 14{MAY}",
            "connection refused (192.0.2.2:46595)",
        ),
        (
            f"{UNAVAILABLE}The actor is temporarily unavailable: RpcError: RPC error: failed to "
            "connect to all addresses; last error: UNAVAILABLE: ipv6:%5B2001:db8::1%5D:42979: "
            f"recvmsg:Connection reset by peer rpc_code: 14{MAY}",
            "connection reset by peer ([2001:db8::1]:42979)",
        ),
        (
            f"{UNAVAILABLE}The actor is temporarily unavailable: RpcError: RPC error: Something "
            f"new rpc_code: 14{MAY}",
            "The actor is temporarily unavailable: Something new",
        ),
        (
            "The actor is not schedulable: The node specified via NodeAffinitySchedulingStrategy "
            "doesn't exist any more or is infeasible, and soft=False was specified.",
            "its node has left the cluster",
        ),
        (
            f"{UNAVAILABLE}The actor is temporarily unavailable: IOError: The actor is restarting",
            "Ray is starting it again",
        ),
        (
            f"{UNAVAILABLE}The actor is temporarily unavailable: RpcError: RPC error: failed to "
            "connect to all addresses; last error: UNKNOWN: ipv4:192.0.2.2:4: Failed to connect to "
            "remote host: FD Shutdown rpc_code: 14",
            "the connection to it was closed",
        ),
        (NO_FOLDER, "No such file or directory: '/proc/nowhere'"),
        (
            OTHER_VERSIONS,
            "the cluster has Ray 2.9.0 and Python 3.10.1, this process Ray 2.60.0 and Python 3.11.7",
        ),
        (NO_HEAD, "the head of the Ray cluster did not answer for 60 s"),
        ("\x1b[31mA colour\x1b[0m in   Ray's\n\ntext.", "A colour in Ray's text"),
        ("", "Ray gives no reason"),
        ("\x1b[0m", "Ray gives no reason"),
    ],
)
def test_a_text_of_ray_becomes_a_sentence(text: str, sentence: str) -> None:
    assert explain(text) == sentence
    assert not UNFIT.search(sentence)


def test_an_error_of_ray_becomes_a_sentence() -> None:
    def died(message: str) -> ActorDiedError:
        context = common_pb2.ActorDiedErrorContext(  # type: ignore[attr-defined]  # generated
            error_message=message,
            class_name="Agent",
            actor_id=b"a" * 16,
            pid=12,
            name="cortex-agent-7eb6e647",
            node_ip_address="192.0.2.2",
        )
        return ActorDiedError(context)

    node = f"The actor is dead because its node has died. Node Id: {'fe' * 28}"
    process = (
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    )
    assert explain(died(node)) == "its node has died"
    assert explain(died(process)) == "its process has died"
    assert explain(died("It was killed.")) == (
        "The actor died unexpectedly before finishing this task. It was killed"
    )
    assert explain(ActorUnavailableError("RPC error: Socket closed rpc_code: 14", b"a" * 16)) == (
        "socket closed"
    )
    system = RaySystemError(  # type: ignore[no-untyped-call]  # Ray types a part of itself
        "Broken", 'Traceback (most recent call last):\n  File "x.py", line 1'
    )
    assert explain(system) == "System error: Broken"


def test_an_error_that_is_not_rays_keeps_its_words() -> None:
    """A project's id would be noise in a text of Ray, as would a URL."""
    words = f"[Errno 2] No such file or directory: 'projects/{'ab' * 32}/http://x'"
    assert explain(RuntimeError(f"\x1b[1m{words}\x1b[0m\n")) == words
    assert explain(OSError("Connection refused by https://pypi.org")) == (
        "Connection refused by https://pypi.org"
    )
    assert explain(TimeoutError()) == "it did not answer in time"
    assert explain(ValueError()) == "ValueError"
    assert len(explain(ValueError("x" * 5000))) == 300


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (RAYLET_KILLED, None),
        (RAYLET_KILLED + NO_HEAD, "the head of the Ray cluster did not answer for 60 s"),
        (f"{NO_HEAD}\n{STACK}", "the head of the Ray cluster did not answer for 60 s"),
        (
            "[2026-11-29 16:32:31,811 C 20493 20801] core_worker.cc:204: Check failed\n",
            "Check failed",
        ),
        (
            f"Traceback (most recent call last):\n  File {'x.py'!r}, line 1\nImportError: no ray\n",
            "ImportError: no ray",
        ),
        (STACK, None),
        ("", None),
    ],
)
def test_the_output_of_a_process_is_reduced_to_its_last_message(
    output: str, sentence: str | None
) -> None:
    assert explain_output(output) == sentence
