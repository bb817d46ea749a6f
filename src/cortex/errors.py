"""Every error of the platform: what happened, its HTTP status, and what to do about it.

The code raises an error where it knows the fact, the operator turns it into HTTP, the client turns
the answer back into the same class, and the command prints it. `kind` is stable: programs may
compare it.

- CortexError
  - InvalidRequest
  - InvalidSpec
  - InvalidProject
  - Unauthorized
  - Forbidden
  - ForeignOrigin
  - RequestTimeout
  - ForeignHost
  - NotFound
  - MethodNotAllowed
  - Conflict
  - TooLarge
  - UnsupportedMediaType
  - RangeNotSatisfiable
  - OverLimit
    - OverWaitingBytes
  - StorageUnavailable
    - Superseded
  - NoLeader
  - Busy
  - OutcomeUnknown
  - OperatorUnreachable
  - UnknownEnvironment
  - StartupError
"""

from __future__ import annotations


class CortexError(Exception):
    """Something went wrong in the platform."""

    kind = "internal"
    http_status = 500
    retry_after_s: int | None = None
    """Seconds after which a retry may succeed; None where retrying is not known to help."""

    def __init__(self, message: str, *, kind: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if kind is not None:
            self.kind = kind


class InvalidRequest(CortexError):
    """The contract does not allow this request."""

    kind = "request.invalid"
    http_status = 400


class InvalidSpec(CortexError):
    """The `cortex.yaml` has mistakes; the message lists all of them, each with its line."""

    kind = "spec.invalid"
    http_status = 400


class InvalidProject(CortexError):
    """The uploaded project cannot be deployed as it is."""

    kind = "project.invalid"
    http_status = 400


class Unauthorized(CortexError):
    """The token is missing or wrong."""

    kind = "auth.unauthorized"
    http_status = 401


class Forbidden(CortexError):
    """The token is valid, but its scope does not allow this request."""

    kind = "auth.forbidden"
    http_status = 403


class ForeignOrigin(CortexError):
    """A browser sent this request for a page of another origin."""

    kind = "request.foreign_origin"
    http_status = 403


class RequestTimeout(CortexError):
    """The request did not arrive completely, or arrived too slowly."""

    kind = "request.timeout"
    http_status = 408


class ForeignHost(CortexError):
    """The `Host` header is none of the operator's names; checked where no token is required."""

    kind = "request.foreign_host"
    http_status = 421


class NotFound(CortexError):
    """There is no such API, job, token or page."""

    kind = "not_found"
    http_status = 404


class MethodNotAllowed(CortexError):
    """The page exists, but does not support this method."""

    kind = "request.method_not_allowed"
    http_status = 405


class Conflict(CortexError):
    """The request contradicts what is already stored."""

    kind = "conflict"
    http_status = 409


class TooLarge(CortexError):
    """The body is larger than the limit."""

    kind = "request.too_large"
    http_status = 413


class UnsupportedMediaType(CortexError):
    """The operator cannot read a body of this Content-Type here."""

    kind = "request.unsupported_media_type"
    http_status = 415


class RangeNotSatisfiable(CortexError):
    """The range begins after the end of the content."""

    kind = "request.range_not_satisfiable"
    http_status = 416


class OverLimit(CortexError):
    """The API already has `limits.max_waiting` waiting jobs; nothing was stored."""

    kind = "limit.max_waiting"
    http_status = 429
    retry_after_s = 1


class OverWaitingBytes(OverLimit):
    """The configs of all waiting jobs together reach `max_waiting_bytes`; nothing was stored."""

    kind = "limit.max_waiting_bytes"


class StorageUnavailable(CortexError):
    """The store or its disk does not accept writes at the moment; nothing was stored."""

    kind = "storage.unavailable"
    http_status = 503
    retry_after_s = 5


class Superseded(StorageUnavailable):
    """Another operator is the leader, and only the leader may do this; nothing was stored."""

    kind = "operator.superseded"


class NoLeader(CortexError):
    """There is no leader at the moment, and only the leader can answer this."""

    kind = "operator.no_driver"
    http_status = 503
    retry_after_s = 1


class Busy(CortexError):
    """The operator's machine is short of resources for this request; nothing was stored."""

    kind = "operator.busy"
    http_status = 503
    retry_after_s = 1


class OutcomeUnknown(CortexError):
    """The connection to the store broke during a commit: the change may or may not be stored."""

    kind = "operator.outcome_unknown"
    http_status = 503


class OperatorUnreachable(CortexError):
    """No operator answers at the environment's endpoint."""

    kind = "client.operator_unreachable"
    http_status = 503
    is_unanswered = False
    """Whether the request was sent but not answered: the operator may have carried it out."""
    was_ever_reached = True
    """Whether this client ever connected to the endpoint; if not, the endpoint may be mistyped."""


class UnknownEnvironment(CortexError):
    """The named environment is not configured."""

    kind = "client.unknown_environment"
    http_status = 404


class StartupError(CortexError):
    """The operator cannot start with this configuration."""

    kind = "operator.startup"
    http_status = 500


def from_response(http_status: int, kind: str, message: str) -> CortexError:
    """Turn an operator's answer back into the class of error that the operator raised.

    A kind that this version does not know becomes a class of the same HTTP status, else the root.
    """
    classes = _tree(CortexError)
    by_kind = next((c for c in classes if c.kind == kind), None)
    by_status = next((c for c in classes if c.http_status == http_status), CortexError)
    return (by_kind or by_status)(message, kind=kind)


def _tree(root: type[CortexError]) -> list[type[CortexError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]
