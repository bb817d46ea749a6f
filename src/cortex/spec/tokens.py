"""Tokens: who may do what. The secret is shown once, when it is made; only its hash is kept."""

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
    """What a token allows; each allows what those before it do."""

    READ = "read"  # see APIs, jobs and logs
    SUBMIT = "submit"  # submit and stop jobs
    DEPLOY = "deploy"  # deploy and delete APIs, which is to run any code

    def allows(self, wanted: Scope) -> bool:
        scopes = list(Scope)
        return scopes.index(self) >= scopes.index(wanted)


@dataclass(frozen=True)
class Token:
    """A token as it is kept."""

    name: str
    scope: Scope
    created_ns: int


def new_secret() -> str:
    """A new secret: 256 bits of randomness, known by its prefix where it should not be."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """SHA-256 of a secret. Nobody guesses 256 random bits, so a slow hash would add nothing but time
    to each request."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def checked_name(name: str) -> str:
    """A token's name; InvalidRequest when it is none."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is no name for a token: at most 63 letters, digits, '.', '_' and '-' are "
            "allowed, starting with a letter or digit"
        )
    return name
