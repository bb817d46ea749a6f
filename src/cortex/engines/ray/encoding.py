"""The encoding of requests and answers between the operator and the agents.

Requests are pickled: an operator runs any code on nodes, and an agent executes them only after the
authentication. Answers are pickled as plain data without classes. A job runs as the user of its
agent and could forge them, and unpickling a class sets whatever attributes the sender names, even
those of the class itself. `validation` checks the values.

`connection` and `cortex.ray_node.server` call it.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import fields
from typing import Any, NoReturn

from cortex.engines.base import (
    Capacity,
    Ended,
    Ending,
    Lost,
    NeverStarted,
    Reachable,
    Started,
    Unreachable,
    Waits,
)
from cortex.engines.ray.link import Answer
from cortex.engines.ray.messages import Checkpoint, Lock, LogPiece, Poll

_MESSAGES: dict[str, type[Any]] = {
    each.__name__: each
    for each in (
        Answer,
        Capacity,
        Checkpoint,
        Ended,
        Lock,
        LogPiece,
        Lost,
        NeverStarted,
        Poll,
        Reachable,
        Started,
        Unreachable,
        Waits,
    )
}
# The fields that contain further messages. All others are plain data.
_NESTED = {
    (Answer, "value"),
    (Poll, "seen"),
    (Poll, "logs"),
    (Poll, "rests"),
    (Poll, "held"),
}
_MESSAGE, _TUPLE, _DICT, _PLAIN = range(4)


def encode_request(method: str, arguments: tuple[object, ...]) -> bytes:
    """A request as bytes."""
    return pickle.dumps((method, arguments))


def decode_request(data: bytes) -> tuple[str, tuple[object, ...]]:
    """A request of an operator that is authenticated."""
    method, arguments = pickle.loads(data)
    return method, arguments


def encode_answer(answer: Answer) -> bytes:
    """An answer as bytes.

    Raises:
        pickle.PicklingError: it contains what is neither plain data nor a message.
    """
    data = io.BytesIO()
    _PlainPickler(data).dump(_to_plain(answer))
    return data.getvalue()


def decode_answer(data: bytes) -> Answer:
    """An answer of an agent. Its values are not checked.

    Raises:
        ValueError, TypeError, pickle.UnpicklingError and others: it is no answer.
    """
    answer = _from_plain(_PlainUnpickler(io.BytesIO(data)).load())
    if not isinstance(answer, Answer):
        raise TypeError(f"{type(answer).__name__} is not an answer")
    return answer


class _PlainPickler(pickle.Pickler):
    def reducer_override(self, value: object) -> NoReturn:
        raise pickle.PicklingError(f"{type(value).__name__} is not plain data")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def _to_plain(value: object) -> tuple[object, ...]:
    kind: type[Any] = type(value)
    if _MESSAGES.get(kind.__name__) is kind:
        return (
            _MESSAGE,
            kind.__name__,
            *(
                _to_plain(getattr(value, field.name))
                if (kind, field.name) in _NESTED
                else _without_class(getattr(value, field.name))
                for field in fields(kind)
            ),
        )
    if isinstance(value, tuple):
        return (_TUPLE, *(_to_plain(each) for each in value))
    if isinstance(value, dict):
        return (_DICT, *((key, _to_plain(each)) for key, each in value.items()))
    return _PLAIN, value


def _from_plain(data: object) -> object:
    if not isinstance(data, tuple):
        raise TypeError(f"{type(data).__name__} is not an encoded value")
    kind, *content = data
    if kind == _MESSAGE:
        name, *values = content
        message = _MESSAGES[name]
        return message(
            *(
                _from_plain(value) if (message, field.name) in _NESTED else value
                for field, value in zip(fields(message), values, strict=True)
            )
        )
    if kind == _TUPLE:
        return tuple(_from_plain(each) for each in content)
    if kind == _DICT:
        return {key: _from_plain(each) for key, each in content}
    (value,) = content
    return value


def _without_class(value: object) -> object:
    return value.value if isinstance(value, Ending) else value
