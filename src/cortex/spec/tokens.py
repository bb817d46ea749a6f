"""Tokens and their scopes. A token's secret is shown once; the store has only its hash."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum

from cortex.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PREFIX = "ctx_"


class Scope(StrEnum):
    """What a token allows; each scope includes the scopes before it."""

    READ = "read"  # read APIs, jobs and logs
    SUBMIT = "submit"  # submit and stop jobs
    DEPLOY = "deploy"  # deploy and delete APIs: deploying means running any code

    def allows(self, wanted: Scope) -> bool:
        scopes = list(Scope)
        return scopes.index(self) >= scopes.index(wanted)


@dataclass(frozen=True)
class Token:
    """A token in the store, without its digest."""

    name: str
    scope: Scope
    created_ns: int


def new_secret() -> str:
    """A new secret: 256 random bits, with a prefix by which scanners find leaked ones."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """SHA-256 of a secret: 256 random bits cannot be guessed, so no slow hash is needed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def checked_name(name: str) -> str:
    """Check a token's name.

    Raises:
        InvalidRequest: the name is not allowed.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not a valid token name; use at most 63 letters, digits, '.', '_' and "
            "'-', starting with a letter or digit"
        )
    return name
