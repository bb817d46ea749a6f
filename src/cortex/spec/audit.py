"""The audit: who changed what, and which requests were refused for their token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """What an audit entry is about."""

    DEPLOY = "deploy"
    DELETE = "delete"  # of an API
    STOP = "stop"  # of a job
    CREATE_TOKEN = "create_token"
    REVOKE_TOKEN = "revoke_token"
    REFUSE = (
        "refuse"  # a request without a token, with a wrong one, or with one of too small a scope
    )


@dataclass(frozen=True)
class Actor:
    """Who did it."""

    name: str | None = None
    """The token's name; of a command on the store, the system user; None where no token is required."""
    address: str | None = None
    """The address that the request came from; None of a command on the store."""


UNKNOWN = Actor()


@dataclass(frozen=True)
class AuditEntry:
    """One thing that was done or refused."""

    action: Action
    actor: Actor
    time_ns: int
    api_name: str | None = None
    job_id: str | None = None
    token: str | None = None
    """The name of the token that was created or revoked."""
    message: str | None = None
    count: int = 1
    """Equal refused requests of one minute are one entry."""
    seq: int = 0
    """The store's number of it."""

    def facts(self) -> dict[str, str | int | None]:
        """All but the time and the actor's name, by the names that the store and answers have."""
        return {
            "action": self.action.value,
            "address": self.actor.address,
            "api_name": self.api_name,
            "job_id": self.job_id,
            "token": self.token,
            "message": self.message,
            "count": self.count,
        }
