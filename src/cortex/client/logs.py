"""Following a job's log: Server-Sent Events, taken up again where they broke off."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from cortex.errors import CortexError, OperatorUnreachable

# An operator that restarts is back within these; their sum is how long one may be away.
PAUSES_S = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)

Connect = Callable[[str | None], AbstractContextManager[Iterable[bytes]]]


@dataclass(frozen=True)
class Event:
    """One event; a comment, which keeps the connection alive, is an event named `:`."""

    name: str
    id: str
    data: str


def follow(connect: Connect, *, pause: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The log's text from its beginning, as it is written, until the job has ended.

    `connect` opens the stream after a given event. Until it has worked once, its failure is final;
    from then on the stream is resumed after the last event that arrived.
    """
    last_id: str | None = None
    pauses: Iterator[float] = iter(())
    connected = False
    while True:
        try:
            with connect(last_id) as chunks:
                if not connected:
                    connected, pauses = True, iter(PAUSES_S)
                for event in parse(chunks):
                    pauses = iter(PAUSES_S)
                    if event.name == "end":
                        return
                    if event.name == "log":
                        last_id = event.id
                        yield json.loads(event.data)
            broken: CortexError = OperatorUnreachable("the stream of the job's log broke off")
        except CortexError as error:
            if error.http_status < 500:
                raise
            broken = error
        wait_s = next(pauses, None)
        if wait_s is None:
            raise broken
        pause(wait_s)


def parse(chunks: Iterable[bytes]) -> Iterator[Event]:
    """The events in a stream of bytes. One that the stream breaks off within is dropped."""
    name, last_id, data = "message", "", list[str]()
    for line in _lines(chunks):
        if not line:
            if data:
                yield Event(name, last_id, "\n".join(data))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "":
            yield Event(":", last_id, value)
        elif field == "event":
            name = value
        elif field == "id":
            last_id = value
        elif field == "data":
            data.append(value)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    # Not `str.splitlines`: it would split data at U+2028 and its like, which end no line here.
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode("utf-8", "replace")
