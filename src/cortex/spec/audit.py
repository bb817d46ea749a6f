"""The audit: who changed what, and which requests were refused because of their token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    """The kind of an audit entry."""

    DEPLOY = "deploy"
    DELETE = "delete"  # of an API
    STOP = "stop"  # of a job
    CREATE_TOKEN = "create_token"
    REVOKE_TOKEN = "revoke_token"
    REFUSE = "refuse"  # a request whose token is missing, wrong, or of too small a scope


@dataclass(frozen=True)
class Actor:
    """The author of a change or of a refused request."""

    name: str | None = None
    """The token's name; for a command on the store the system user; None if no token is needed."""
    address: str | None = None
    """The client address of the request; None for a command on the store."""


UNKNOWN = Actor()


@dataclass(frozen=True)
class AuditEntry:
    """One change or refusal."""

    action: Action
    actor: Actor
    time_ns: int
    api_name: str | None = None
    job_id: str | None = None
    token: str | None = None
    """The name of the token that was created or revoked."""
    message: str | None = None
    count: int = 1
    """How many requests; equal refused requests of one minute share an entry."""
    seq: int = 0
    """The number that the store gave the entry."""

    def facts(self) -> dict[str, str | int | None]:
        """All fields but the time and the actor's name, with their names in store and answers."""
        return {
            "action": self.action.value,
            "address": self.actor.address,
            "api_name": self.api_name,
            "job_id": self.job_id,
            "token": self.token,
            "message": self.message,
            "count": self.count,
        }
