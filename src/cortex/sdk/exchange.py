"""The requests and retries of a call, without the I/O. `Client` and `AsyncClient` share them.

An exchange is a generator. It yields requests and pauses, receives each response, and returns the
call's result. The transport throws a failed request into it, at the `yield` of that request. The
rules for retries are therefore written once, here, for every transport.

Standard library alone: a task's client uses it in the user's environment.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic
from typing import TYPE_CHECKING, Generic, TypeVar
from urllib.parse import quote

from cortex.errors import CortexError, InvalidRequest, NotFound, OperatorUnreachable

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import IO

    from pydantic import JsonValue

    Files = Mapping[str, tuple[str, IO[bytes] | bytes, str]]

RESPONSE_TIMEOUT_S = 30.0

_MIN_RETRY_DELAY_S = 0.1
_MAX_RETRY_DELAY_S = 2.0
# An operator that this client has never reached may be starting at this moment.
_FIRST_CONNECTION_TIMEOUT_S = 5.0
_SUBMIT_RETRY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Request:
    """One HTTP request.

    `path` is relative to the operator's endpoint. The endpoint has a path of its own where the
    operator is behind a reverse proxy.
    """

    method: str
    path: str
    params: Mapping[str, str | float] | None = None
    headers: Mapping[str, str] | None = None
    content: bytes | None = None
    data: Mapping[str, str] | None = None
    files: Files | None = None
    response_timeout_s: float = RESPONSE_TIMEOUT_S


@dataclass(frozen=True)
class Pause:
    """The delay before the next request."""

    seconds: float


T = TypeVar("T")
if TYPE_CHECKING:
    Exchange = Generator[Request | Pause, JsonValue, T]


class RunningExchange(Generic[T]):
    """An exchange in progress, which a transport drives step by step."""

    result: T
    """What the exchange returned; set once `step` is None."""

    def __init__(self, exchange: Exchange[T]) -> None:
        self._exchange = exchange
        self.step: Request | Pause | None = None
        """What the transport does next; None once the exchange has returned."""
        self.resume(None)

    def resume(self, outcome: JsonValue | CortexError) -> None:
        """Continue with the outcome of `step`.

        Args:
            outcome: the response to a request, or its error; None after a pause.

        Raises:
            CortexError: the exchange has failed.
        """
        try:
            if isinstance(outcome, CortexError):
                self.step = self._exchange.throw(outcome)
            else:
                self.step = self._exchange.send(outcome)
        except StopIteration as end:
            self.step, self.result = None, end.value


def path_segment(name: str) -> str:
    """A name, quoted as one segment of a path.

    Raises:
        NotFound: the name is empty or a dot segment, which would lead to another path.
    """
    if name in ("", ".", ".."):
        raise NotFound(f"{name!r} is not a valid name; give the name of an API or the id of a job")
    return quote(name, safe="")


def retry_until(deadline: float, new_request: Callable[[], Request]) -> Exchange[JsonValue]:
    """Repeat an idempotent request while the operator is unreachable or takes no writes.

    Where this client has never reached the operator, it gives up after a few seconds.

    Args:
        deadline: on the monotonic clock. There is at least one attempt, and one last attempt at the
            deadline.
        new_request: makes the request of each attempt.

    Returns:
        The response.

    Raises:
        CortexError: the error is permanent, or it persisted until the deadline.
    """
    delays = _retry_delays()
    first_connection_deadline = min(deadline, monotonic() + _FIRST_CONNECTION_TIMEOUT_S)
    while True:
        try:
            return (yield new_request())
        except CortexError as error:
            was_reached = not isinstance(error, OperatorUnreachable) or error.was_ever_reached
            left_s = (deadline if was_reached else first_connection_deadline) - monotonic()
            if not is_transient(error) or left_s <= 0:
                raise
        yield Pause(min(next(delays), left_s))


def is_transient(error: CortexError) -> bool:
    """Whether a retry may succeed. Refused and broken connections have the status 503 as well."""
    return error.http_status == HTTPStatus.SERVICE_UNAVAILABLE


def submit_body(config: Mapping[str, JsonValue] | None, timeout: int | None) -> bytes:
    """The body of a submit. Each attempt sends the same bytes.

    Raises:
        InvalidRequest: the config cannot be written as JSON.
    """
    fields = []
    if config is not None:
        fields.append(f'"config":{_as_json(config)}')
    if timeout is not None:
        fields.append(f'"timeout":{json.dumps(timeout)}')
    # A lone surrogate is sent unchanged.
    text = f"{{{','.join(fields)}}}"
    return text.encode("utf-8", "surrogatepass")


def submit(path: str, content: bytes, key: str | None) -> Exchange[JsonValue]:
    """Send a submit, and send it again while its response is lost. All attempts make one job.

    Args:
        path: of the API's jobs.
        content: the body.
        key: the idempotency key; None makes one.

    Returns:
        The operator's response.

    Raises:
        CortexError: the job was not submitted; or its state is unknown, and the error names the
            key.
    """
    key = uuid.uuid4().hex if key is None else _checked_key(key)
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    request = Request("POST", path, headers=headers, content=content)
    try:
        return (yield request)
    except OperatorUnreachable as error:
        if not error.is_unanswered:
            raise
    try:
        return (yield from retry_until(monotonic() + _SUBMIT_RETRY_TIMEOUT_S, lambda: request))
    except CortexError as error:
        if not is_transient(error):
            raise
        raise OperatorUnreachable(
            "it is not known whether the job was submitted: the response was lost, and "
            f"{error.message}\nSubmit it again with the idempotency key {key}: that makes one job, "
            "whether or not the first submit arrived."
        ) from error


def _retry_delays() -> Iterator[float]:
    delay_s = _MIN_RETRY_DELAY_S
    while True:
        yield delay_s
        delay_s = min(2 * delay_s, _MAX_RETRY_DELAY_S)


def _as_json(config: Mapping[str, JsonValue]) -> str:
    if not isinstance(config, Mapping):
        raise InvalidRequest(f"config is {config!r}; it must be a dict")
    try:
        # Compact and not escaped: the operator limits the bytes of a body.
        return json.dumps(dict(config), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"config cannot be written as JSON: {error}; use strings, finite numbers, lists, dicts"
        ) from error


def _checked_key(key: str) -> str:
    """The key, which must arrive unchanged as the value of a header."""
    if not 0 < len(key) <= 255 or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise InvalidRequest(
            f"{key!r} is not a valid idempotency key; use 1 to 255 printable ASCII characters, "
            "without spaces at either end"
        )
    return key
