"""One tree of errors: what happened, which HTTP status it is, and what to do next.

Raised where a fact is known, turned into HTTP by the operator, back into these classes by the
client, and printed by the command. `kind` is stable: programs may compare it.
"""

from __future__ import annotations

import errno


class CortexError(Exception):
    """Something went wrong in the platform."""

    kind = "internal"
    http_status = 500
    retry_after_s: int | None = None
    """When the same request may well be taken; None where nothing says that it ever will."""

    def __init__(self, message: str, *, kind: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if kind is not None:
            self.kind = kind


class InvalidRequest(CortexError):
    """The request is not one that the contract allows."""

    kind = "request.invalid"
    http_status = 400


class InvalidSpec(CortexError):
    """The file that describes the APIs has mistakes; the message lists all of them."""

    kind = "spec.invalid"
    http_status = 400


class InvalidProject(CortexError):
    """The uploaded project cannot be taken as it is."""

    kind = "project.invalid"
    http_status = 400


class Unauthorized(CortexError):
    """The token is missing or wrong."""

    kind = "auth.unauthorized"
    http_status = 401


class Forbidden(CortexError):
    """The token is right, and its scope is too small for this."""

    kind = "auth.forbidden"
    http_status = 403


class ForeignOrigin(CortexError):
    """A browser sent this request on behalf of a page from elsewhere."""

    kind = "request.foreign_origin"
    http_status = 403


class RequestTimeout(CortexError):
    """The request did not come whole, or only too slowly."""

    kind = "request.timeout"
    http_status = 408


class ForeignHost(CortexError):
    """The request names a host that this operator, which asks for no token, is not known as."""

    kind = "request.foreign_host"
    http_status = 421


class NotFound(CortexError):
    """There is no such API, job or page."""

    kind = "not_found"
    http_status = 404


class MethodNotAllowed(CortexError):
    """The page exists, the method does not."""

    kind = "request.method_not_allowed"
    http_status = 405


class Conflict(CortexError):
    """The request contradicts what is already so."""

    kind = "conflict"
    http_status = 409


class TooLarge(CortexError):
    """The body is over the limit."""

    kind = "request.too_large"
    http_status = 413


class UnsupportedMediaType(CortexError):
    """The body's Content-Type is not one that is read here."""

    kind = "request.unsupported_media_type"
    http_status = 415


class RangeNotSatisfiable(CortexError):
    """The range begins beyond the end of what there is."""

    kind = "request.range_not_satisfiable"
    http_status = 416


class OverLimit(CortexError):
    """The API has as many jobs waiting as its `limits.max_waiting` allows; nothing was stored."""

    kind = "limit.max_waiting"
    http_status = 429
    retry_after_s = 1


class OverWaitingBytes(OverLimit):
    """Jobs with as many bytes of config wait as may, of all APIs together; nothing was stored."""

    kind = "limit.max_waiting_bytes"


class StorageUnavailable(CortexError):
    """The store or its disk cannot take writes right now; nothing was stored."""

    kind = "storage.unavailable"
    http_status = 503
    retry_after_s = 5


class Superseded(StorageUnavailable):
    """Another operator drives the jobs: what is the driver's alone is not stored for this one."""

    kind = "operator.superseded"


class NoLeader(CortexError):
    """No operator drives the jobs at this moment, and only that one could answer."""

    kind = "operator.no_driver"
    http_status = 503
    retry_after_s = 1


class Busy(CortexError):
    """The operator's machine has no room for this request now; nothing was stored."""

    kind = "operator.busy"
    http_status = 503
    retry_after_s = 1


class OutcomeUnknown(CortexError):
    """The connection to the store was lost while it stored a change: whether it did is not known."""

    kind = "operator.outcome_unknown"
    http_status = 503


class OperatorUnreachable(CortexError):
    """The operator does not answer at the environment's endpoint."""

    kind = "client.operator_unreachable"
    http_status = 503
    is_unanswered = False
    """Whether the request was sent and no answer came: what it asked for may have been done."""
    was_there = True
    """Whether the client that asked has ever had a connection: else the endpoint may be mistyped."""


class UnknownEnvironment(CortexError):
    """The named environment is not configured."""

    kind = "client.unknown_environment"
    http_status = 404


class StartupError(CortexError):
    """The operator cannot start as it is configured."""

    kind = "operator.startup"
    http_status = 500


# What a disk says that may say something else later: it is full, over a quota, read-only, failing.
_LATER = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
# What a machine has none of for now: processes and threads, descriptors, memory.
_SHORT = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


def is_shortage(error: OSError) -> bool:
    """Whether the machine lacks something now that it may have later."""
    return error.errno in _SHORT


def is_storage(error: OSError) -> bool:
    """Whether this is a disk that cannot take what is written to it now, and may take it later."""
    return error.errno in _LATER


def from_response(http_status: int, kind: str, message: str) -> CortexError:
    """The error that an operator's answer stands for, as the class that was raised there.

    A kind that this version does not know becomes the class of the same HTTP status, else the root.
    """
    classes = _tree(CortexError)
    by_kind = next((c for c in classes if c.kind == kind), None)
    by_status = next((c for c in classes if c.http_status == http_status), CortexError)
    return (by_kind or by_status)(message, kind=kind)


def _tree(root: type[CortexError]) -> list[type[CortexError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]
