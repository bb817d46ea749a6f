"""Ctrl-C in the middle of a request: the client can still be used and closed."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

from cortex.sdk import Client
from operator_stub import Answer, OperatorStub, answer

INFO: dict[str, Answer | list[Answer]] = {"GET /-/info": answer({"version": "1"})}
# A signal raises KeyboardInterrupt at a random moment of three requests and of the client's end.
INTERRUPTED = """
import random, signal, sys
from cortex.sdk import Client

ROUNDS, LIMIT_S = 500, 60.0
is_armed = False


def interrupt(number, frame):
    global is_armed
    if not is_armed:
        raise SystemExit("a clean-up never ends")
    is_armed = False
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    raise KeyboardInterrupt


signal.signal(signal.SIGALRM, interrupt)
for _ in range(ROUNDS):
    try:
        with Client(sys.argv[1]) as client:
            client.info()
            is_armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
            for _ in range(3):
                client.info()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_a_client_can_be_used_and_closed_after_an_interrupt_within_its_pools_lock() -> None:
    done = threading.Event()

    def work(url: str) -> None:
        client = Client(url)
        transport: Any = client._transport
        lock = transport._pool._transport._pool._optional_thread_lock  # httpx has no seam for it
        lock.__enter__()  # the block that releases it never runs
        assert client.info() == {"version": "1"}
        client.close()
        done.set()

    with OperatorStub(INFO) as stub:
        threading.Thread(target=work, args=[stub.url], daemon=True).start()
        assert done.wait(60)


def test_interrupts_at_any_moment_leave_no_request_and_no_end_waiting() -> None:
    with OperatorStub(INFO) as stub:
        subprocess.run([sys.executable, "-c", INTERRUPTED, stub.url], check=True, timeout=300)
