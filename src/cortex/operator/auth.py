"""Who may do what: every request brings a token, whose scope has to be wide enough for it."""

from __future__ import annotations

import re

from cortex.errors import CortexError, Forbidden, StorageUnavailable, Unauthorized
from cortex.operator.http import App, Receive, Scope, Send, refuse
from cortex.spec.token import Scope as TokenScope
from cortex.spec.token import digest
from cortex.store import Store

_OPEN = frozenset({"/healthz", "/readyz"})  # what probes of load balancers ask
_JOBS = re.compile(r"/-/apis/[^/]+/jobs(/.*)?", re.DOTALL)
_BEARER = re.compile(rb"bearer +([!-~]{1,512})", re.IGNORECASE)


class Authentication:
    """ASGI middleware, in front of all that reads a body. A token is looked up for each request, so
    that one that is revoked is refused from then on."""

    def __init__(self, app: App, store: Store) -> None:
        self._app = app
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            refusal = await self._refusal(scope)
            if refusal is not None:
                error, challenge = refusal
                # Closed, for the body that may follow is not going to be read.
                headers = {"Connection": "close"}
                if challenge:
                    headers["WWW-Authenticate"] = challenge
                await refuse(error, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _refusal(self, scope: Scope) -> tuple[CortexError, str] | None:
        given = _BEARER.fullmatch(dict(scope["headers"]).get(b"authorization", b""))
        if given is None:
            return Unauthorized(
                "this operator wants a token, as 'Authorization: Bearer …'; whoever runs it makes one "
                "with `cortex token create`. The command takes it with `cortex env configure --token` or "
                "from $CORTEX_TOKEN"
            ), "Bearer"
        try:
            has = await self._store.token_scope(digest(given[1].decode()))
        except StorageUnavailable as error:
            return error, ""
        if has is None:
            return Unauthorized(
                "the token is not known here, or was revoked; ask whoever runs the operator for another"
            ), 'Bearer error="invalid_token"'
        wants = wanted(scope["method"], scope["path"])
        if not has.allows(wants):
            return Forbidden(
                f"the token's scope is {has.value!r}, and this needs {wants.value!r}"
            ), f'Bearer error="insufficient_scope", scope="{wants.value}"'
        return None


def wanted(method: str, path: str) -> TokenScope:
    """The scope that a request needs."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return TokenScope.READ
    is_of_jobs = not path.startswith("/-/") or _JOBS.fullmatch(path)
    return TokenScope.SUBMIT if is_of_jobs else TokenScope.DEPLOY
