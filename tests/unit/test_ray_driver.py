"""The driver's answers to the operator where Ray fails."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from cortex.engines.base import Capacity
from cortex.engines.ray.cluster import Cluster
from cortex.engines.ray.link import Answer, Link, NotSent
from cortex.engines.ray.messages import NodeState, Refusal
from cortex.engines.ray.placement import Node, Placement
from cortex.engines.ray.tracked import TrackedAttempt, handle
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


def test_a_call_for_which_ray_has_no_agent_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_agent(*_: object) -> None:
        raise RuntimeError("the head does not answer")

    monkeypatch.setattr(driver.Driver, "_find_or_create_agent", no_agent)

    async def main() -> None:
        made = driver.Driver("namespace", "")
        response = await driver.answer(made, "call_agent", ("node", "start", (), 60.0))
        assert not response.is_sent
        reason = "cannot find or start its agent: the head does not answer"
        assert response.unreachable == reason

    asyncio.run(main())


def test_a_loss_names_the_node_and_handles_of_earlier_versions_are_read() -> None:
    state = NodeState("ab12", "n1", True, Capacity(1000, 0, 0), Capacity(0, 0, 0))
    made = handle(Node(state, 0, lambda _: None), None, 5)
    attempt: Any = SimpleNamespace(handle=made)
    tracked = TrackedAttempt.of(attempt)
    assert (tracked.node_id, tracked.log_base) == ("ab12", 5)
    assert tracked.left == "its node n1 is no longer in the cluster"
    content = json.loads(made)
    del content["name"]
    attempt.handle = json.dumps(content)
    assert TrackedAttempt.of(attempt).left == "its node is no longer in the cluster"


def test_a_call_without_a_link_was_not_sent() -> None:
    link = Link("127.0.0.1:1", "namespace", None)
    with pytest.raises(NotSent, match="cannot be reached"):
        asyncio.run(link.call("node_states", timeout_s=60))
    away = Cluster("127.0.0.1:1", "namespace", None, Placement())
    with pytest.raises(NotSent, match="cannot be reached"):
        asyncio.run(away.call_driver("node_states"))
