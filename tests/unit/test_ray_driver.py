"""The driver's answers to the operator where Ray fails."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from cortex.engines.ray.link import Answer
from cortex.engines.ray.messages import Refusal
from cortex.ray_node import driver


def failing(error: Exception) -> Answer:
    """The answer to a call of an agent that raises this error."""

    class Failing(driver.Driver):
        async def call_agent(self, *_: object) -> object:
            raise error

    arguments = ("node", "hello", (), 10.0)
    return asyncio.run(driver.answer(Failing("namespace", ""), "call_agent", arguments))


def test_the_user_gets_a_sentence_and_the_operators_log_the_whole_text_of_ray() -> None:
    text = "RpcError: RPC error: ipv4:192.0.2.2:4: Connection refused rpc_code: 14"
    answer = failing(ActorUnavailableError(text, b"a" * 16))
    assert answer.unreachable == "its agent does not answer: connection refused (192.0.2.2:4)"
    assert text in (answer.detail or "")
    raised = RayTaskError(  # type: ignore[no-untyped-call]  # Ray types a part of itself
        "Agent.start", "Traceback\n  File x", OSError("no room"), pid=1, ip="::1"
    )
    answer = failing(raised)
    assert answer.unreachable == "the call to its agent failed: no room"
    assert "Traceback\n  File x" in (answer.detail or "")
    answer = failing(TimeoutError())
    assert answer.unreachable == "the call to its agent failed: it did not answer in time"


def test_a_refusal_has_the_text_of_ray_for_the_operators_log() -> None:
    def refuse() -> None:
        try:
            raise ActorUnavailableError("rpc_code: 14", b"a" * 16)
        except ActorUnavailableError as error:
            raise Refusal("Ray did not report the reserved GPUs") from error

    with pytest.raises(Refusal) as raised:
        refuse()
    answer = failing(raised.value)
    assert answer.refused == "Ray did not report the reserved GPUs"
    assert "rpc_code: 14" in (answer.detail or "")
